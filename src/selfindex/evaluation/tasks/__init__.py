"""Long-context tasks made here from their published definitions, with answers known exactly.

========= ==========================================================================================
group     tasks
========= ==========================================================================================
ruler     the thirteen of RULER (Hsieh et al., arXiv 2404.06654): eight needle tasks, variable tracking,
          common words, frequent words, two of question answering, with its wording, its numbers of
          needles, hops and words, and its score
code      completion of the next line, as in LongBench's LCC and RepoBench-P, over installed code
answers   what needs long or many replies: a program by a specification in the document, judged by running
          tests; a passage of the document word for word; ten turns of questions about the document
========= ==========================================================================================

And passkey (Mohtashami and Jaggi, arXiv 2305.16300).

What differs from RULER: the haystack is a text the caller gives (RULER takes essays), words for
keys and lists are drawn from that text, passages to answer questions from are invented (RULER takes
SQuAD's and HotpotQA's), and prompts have exactly the length asked for, so that samples make a batch.
The document is read and compressed before the question is known.
"""

from __future__ import annotations

from .chat import ten_questions
from .code import lcc, repobench_p
from .counting import common_words, frequent_words
from .needles import NEEDLES, needle, passkey
from .programs import write_program
from .questions import one_hop, two_hops
from .quoting import quote
from .sample import Maker, Sample, Source, Turn
from .tracking import variable_tracking

GROUPS: dict[str, dict[str, Maker]] = {
    "ruler": {
        **NEEDLES,
        "vt": variable_tracking,
        "cwe": common_words,
        "fwe": frequent_words,
        "qa_1": one_hop,
        "qa_2": two_hops,
    },
    "code": {"lcc": lcc, "repobench_p": repobench_p},
    "answers": {"program": write_program, "quote": quote, "chat": ten_questions},
}
"""Tasks by the word for all of them."""

TASKS: dict[str, Maker] = {
    **{name: maker for group in GROUPS.values() for name, maker in group.items()},
    "passkey": passkey,
}
"""All tasks by name; RULER's have its names."""

__all__ = ["GROUPS", "TASKS", "Sample", "Source", "Turn", "needle"]
