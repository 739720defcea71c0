"""How a document, the questions about it and the answers are framed for a model."""

from __future__ import annotations

from typing import Any

from ..errors import InputError

_DOCUMENT, _ANSWER = "@DOCUMENT@", "@ANSWER@"


def with_document(document: str, question: str) -> str:
    """The text of a message that asks about a document."""
    return f"{document}\n\n{question}"


class Turns:
    """The texts between documents and answers.

    A document's tokens must not depend on the question, so a chat template is taken apart: what it puts
    before a document, after it, and between an answer and the next question. Without a template it
    is plain text, "Question: ... Answer:".

    Args:
        raw: do not use the tokenizer's chat template.
    """

    def __init__(self, tokenizer: Any, raw: bool = False) -> None:
        self.tokenizer = tokenizer
        self.chat = not raw and getattr(tokenizer, "chat_template", None) is not None

    def around(self, question: str) -> tuple[str, str]:
        """(what comes before a document, the question after it up to where the answer begins)."""
        if not self.chat:
            return "", f"\n\nQuestion: {question}\nAnswer:"
        text = self._render(user=with_document(_DOCUMENT, question))
        head, found, tail = text.partition(_DOCUMENT)
        return head, self._checked(tail, found)

    def alone(self, question: str) -> str:
        """The first question where there is no document."""
        return self._render(user=question) if self.chat else f"Question: {question}\nAnswer:"

    def later(self, question: str) -> str:
        """From the end of an answer, without its end token, to where the next one begins."""
        if not self.chat:
            return f"\n\nQuestion: {question}\nAnswer:"
        text = self._render(user=_DOCUMENT, assistant=_ANSWER, then=question)
        _, found, tail = text.partition(_ANSWER)
        return self._checked(tail, found)

    def message(self, text: str) -> str:
        """One message whole; without a chat template the text as it is."""
        return self._render(user=text) if self.chat else text

    def encode(self, text: str, start: bool) -> list[int]:
        """Token ids of a text; `start`: of the sequence, where some models have a token of their own."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=start and not self.chat).input_ids
        return ids

    def _render(self, user: str, assistant: str | None = None, then: str | None = None) -> str:
        turns = (("user", user), ("assistant", assistant), ("user", then))
        messages = [{"role": role, "content": text} for role, text in turns if text is not None]
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates are programs and raise what they like
            raise InputError(f"the model's chat template fails ({error}); use --raw") from error
        return text

    def _checked(self, tail: str, found: str) -> str:
        if not found:
            raise InputError("the model's chat template changes what it is given; use --raw")
        return tail
