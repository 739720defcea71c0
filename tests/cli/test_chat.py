import json
import signal

import pytest
from tiny_models import make_model
from tiny_tokenizer import make_tokenizer

from selfindex.cli import chat, conversation
from selfindex.cli.conversation import Conversation, Stop
from selfindex.cli.streaming import TimedStreamer
from selfindex.config import SelfIndexConfig
from selfindex.evaluation.models import Loaded
from selfindex.evaluation.turns import Turns

TEXT = "\n".join(f"Shelf {i} of the archive holds {i * i} letters." for i in range(30))  # 1,200 bytes
SIZES = {"vocab_size": len(make_tokenizer()), "max_position_embeddings": 2048, "initializer_range": 0.2}
OPTIONS = ("--max-new-tokens", "6", "--device", "cpu", "--budget", "64")


@pytest.fixture(scope="module")
def tiny():
    """A model whose answers depend on the document, and do not end by themselves."""
    tokenizer = make_tokenizer()
    model = make_model("llama", eos_token_id=None, bos_token_id=None, **SIZES)
    return Loaded(model, tokenizer, "tiny")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("chatty")
    tiny.model.save_pretrained(path)
    tiny.tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "report.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def talk(invoke, folder):
    """Run a chat; returns (what it answered, what it told)."""

    def run(*arguments, text="one?\ntwo?\n"):
        result = invoke("chat", folder, *arguments, *OPTIONS, text=text)
        assert result.exit_code == 0, result.output
        return result.stdout, result.stderr

    return run


def start(tiny):
    config = SelfIndexConfig.make(budget=64, dense_below=0, sparse_queries=8)
    return Conversation.start(tiny, Turns(tiny.tokenizer), config)


def ask(talk, question, tiny, most=6, on_first=lambda: None, stop=None):
    talk.ask(question, most, TimedStreamer(tiny.tokenizer, on_first), stop or Stop())
    return talk.ids


@pytest.fixture
def read(tiny):
    """A conversation after a document, with encoded pages that are read sparsely."""
    talk = start(tiny)
    talk.read(TEXT, 100, lambda share: None)
    return talk


def test_saved_document_answers_as_the_read_one(talk, document, tmp_path, monkeypatch):
    answers, told = talk("--file", str(document), "--save", str(tmp_path / "kept"))
    assert "times smaller" in told
    other = tmp_path / "other.txt"
    other.write_text(TEXT[::-1], encoding="utf-8")
    assert talk("--file", str(other))[0] != answers
    monkeypatch.setattr(Conversation, "read", None)  # it must not be read again
    assert talk("--load", str(tmp_path / "kept"))[0] == answers


def test_saved_conversation_goes_on(talk, document, tmp_path):
    whole = talk("--file", str(document))[0]
    first = talk("--file", str(document), text=f"one?\n/save {tmp_path / 'kept'}\n")[0]
    second = talk("--load", str(tmp_path / "kept"), text="two?\n")[0]
    assert first + second == whole
    # Back to the document, of which only the end of the first turn's cache is known.
    again = talk("--load", str(tmp_path / "kept"), text="/reset\none?\n")[0]
    assert again == first


def test_saved_conversation_with_sliding_windows(tiny, document, tmp_path, invoke):
    model = make_model("gemma3", eos_token_id=None, bos_token_id=None, **SIZES)
    for part in (model, tiny.tokenizer):
        part.save_pretrained(tmp_path / "model")

    def talk(*arguments, text):
        return invoke("chat", str(tmp_path / "model"), *arguments, *OPTIONS, text=text)

    whole = talk("--file", str(document), text="one?\ntwo?\n/reset\none?\n").stdout
    kept = tmp_path / "kept"
    first = talk("--file", str(document), text=f"one?\n/save {kept}\n").stdout
    second = talk("--load", str(kept), text="two?\n").stdout
    assert first + second + first == whole
    result = talk("--load", str(kept), text="/reset\n")
    assert result.exit_code == 1
    assert "cannot be taken back" in result.stderr
    # Saved before anything was said, the document is what a reset returns to.
    talk("--file", str(document), "--save", str(kept), text="")
    assert talk("--load", str(kept), text="one?\ntwo?\n/reset\none?\n").stdout == whole


def test_document_and_question_are_what_generate_reads(tiny, invoke, folder, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("A short text: nothing is compressed.", encoding="utf-8")
    options = ("--file", str(short), "--max-new-tokens", "6", "--device", "cpu")
    generated = invoke("generate", folder, "What is it?", *options).stdout
    assert invoke("chat", folder, *options, text="What is it?\n").stdout == generated


def test_turns_follow_the_template(tiny, read):
    ask(read, "one?", tiny)
    answer = tiny.tokenizer.decode(read.ids[read.document :]).partition("assistant\n")[2]
    ask(read, "two?", tiny)
    messages = [("user", f"{TEXT}\n\none?"), ("assistant", answer), ("user", "two?")]
    expected = tiny.tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in messages],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert tiny.tokenizer.decode(read.ids).startswith(expected)


def test_end_of_a_turn_is_there_once(tiny, read, monkeypatch):
    first = ask(read, "one?", tiny)
    at = len(first) - 4
    assert first[at] not in first[-6:at]
    read.reset()
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", first[at])
    assert ask(read, "one?", tiny) == first[:at]
    assert read.cache.get_seq_length() == at
    ask(read, "two?", tiny)


def test_reset_returns_to_the_document(tiny, read):
    first = ask(read, "one?", tiny)
    ask(read, "two?", tiny)
    read.reset()
    assert ask(read, "one?", tiny) == first
    assert read.cache.report().layers[0].read < len(TEXT) / 2  # sparse, over the encoded document


def test_reading_in_chunks_shows_progress(tiny, monkeypatch):
    monkeypatch.setattr(conversation, "CHUNK", 500)
    talk, shares = start(tiny), []
    talk.read(TEXT, 100, shares.append)
    assert sum(shares) == pytest.approx(1)
    assert len(shares) == 2 * (len(TEXT) // 500 + 1)  # layers x chunks
    assert talk.cache.get_seq_length() == talk.document > len(TEXT)


def test_one_interrupt_keeps_the_answer_so_far(tiny, read):
    stop = Stop()
    with chat._first_interrupt_stops(stop):
        ask(read, "one?", tiny, 50, lambda: signal.raise_signal(signal.SIGINT), stop)
    prompt = read.turns.encode(read.turns.around("one?")[1], start=False)
    assert 1 <= len(read.ids) - read.document - len(prompt) <= 2
    ask(read, "two?", tiny)


def test_two_interrupts_forget_the_question(tiny, read):
    expected, before = ask(start_of(read), "two?", tiny), list(read.ids)

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    stop, handler = Stop(), signal.getsignal(signal.SIGINT)  # a process in the background ignores it
    with pytest.raises(KeyboardInterrupt), chat._first_interrupt_stops(stop):
        ask(read, "one?", tiny, 50, twice, stop)
    assert signal.getsignal(signal.SIGINT) is handler
    assert read.ids == before
    assert ask(read, "two?", tiny) == expected


def start_of(talk):
    """Another conversation over the same document."""
    return Conversation(talk.loaded, talk.turns, talk.cache.fork(), list(talk.ids), talk.document)


def test_commands(talk, document, tmp_path):
    answers, told = talk("--file", str(document), text="/help\n/report\n/dance\n\n/quit\nnever?\n")
    assert answers == ""
    assert "/save FILE" in told
    assert "self-indexing KV cache (balanced)" in told
    assert "no command '/dance'" in told


def test_without_a_document_and_without_a_template(talk):
    assert len(talk(text="one?\n/reset\none?\n")[0].splitlines()) >= 2
    assert talk("--raw")[0]


def test_options_of_a_saved_document(talk, document, tmp_path, invoke, folder):
    kept = str(tmp_path / "kept")
    talk("--file", str(document), "--save", kept, "--preset", "paper", text="")
    assert "cache (paper)" in talk("--load", kept, text="/report\n")[1]
    result = invoke("chat", folder, "--load", kept, "--preset", "balanced", text="")
    assert result.exit_code == 1
    assert "with the preset paper" in result.output


def test_files_that_do_not_belong_together(talk, document, tmp_path, invoke, folder, tiny):
    kept, other = tmp_path / "kept", tmp_path / "other"

    def refused(*arguments):
        result = invoke("chat", folder, "--load", str(kept), *arguments, *OPTIONS, text="one?\n")
        assert result.exit_code == 1
        assert "Traceback" not in result.output
        return result.output

    talk("--file", str(document), "--save", str(kept), text="")
    talk("--file", str(document), "--save", str(other), text="one?\n")
    assert "leave out --raw" in refused("--raw")
    beside = tmp_path / "kept.json"
    facts = json.loads(beside.read_text())
    beside.write_text(json.dumps(facts | {"version": 99}))
    assert "of this release" in refused()
    beside.write_text(json.dumps(facts | {"cache": "0" * 64}))
    assert "not written together" in refused()
    beside.unlink()
    assert "kept.json is missing" in refused()
    beside.write_text(json.dumps(facts))
    kept.write_bytes(kept.read_bytes()[:-100])
    assert "cannot read the cache" in refused()


def test_bad_options(fails, folder, document, tmp_path):
    missing = str(tmp_path / "missing")
    assert "not both" in fails("chat", folder, "--file", str(document), "--load", missing)
    assert "no such file" in fails("chat", folder, "--load", missing)
    assert "no such folder" in fails("chat", folder, "--file", str(document), "--save", f"{missing}/x")
    assert "nothing to save" in fails("chat", folder, "--save", missing)
    assert "cannot read" in fails("chat", folder, "--file", missing)
    assert "questions come from stdin" in fails("chat", folder, "--file", "-")
    document.write_text(TEXT * 2, encoding="utf-8")
    assert "do not fit the model's 2,048" in fails("chat", folder, "--file", str(document))


def test_a_script_ends_at_an_error_and_typing_goes_on(invoke, tiny, folder, monkeypatch, capsys):
    lines = f"/save /nowhere/kept\none?\n{'x' * 3000}\ntwo?\n"
    result = invoke("chat", folder, *OPTIONS, text=lines)
    assert result.exit_code == 1
    assert result.stdout == ""
    typed = iter(lines.splitlines())

    def type_in(prompt):
        for line in typed:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", type_in)
    monkeypatch.setattr(chat.sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    talk = start(tiny)
    chat._loop(talk, tiny, 6)
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) >= 2
    assert tiny.tokenizer.decode(talk.ids).count("?<end>") == 2
