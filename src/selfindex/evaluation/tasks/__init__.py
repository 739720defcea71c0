"""Long-context tasks made here from their published definitions, with answers known exactly.

RULER (Hsieh et al., arXiv 2404.06654): eight needle tasks, variable tracking, common words,
frequent words, with its wording, its numbers of needles, hops and words, and its score. Its question
answering needs data sets and is left out. Passkey (Mohtashami and Jaggi, arXiv 2305.16300).

What differs from RULER: the haystack is a text the caller gives (RULER takes essays), words for
keys and lists are drawn from that text, and prompts have exactly the length asked for, so that
samples make a batch. The document is read and compressed before the question is known.
"""

from __future__ import annotations

from .counting import common_words, frequent_words
from .needles import NEEDLES, needle, passkey
from .sample import Maker, Sample, Source, score
from .tracking import variable_tracking

TASKS: dict[str, Maker] = {
    **NEEDLES,
    "vt": variable_tracking,
    "cwe": common_words,
    "fwe": frequent_words,
    "passkey": passkey,
}
"""RULER's names, and passkey."""

__all__ = ["TASKS", "Sample", "Source", "needle", "score"]
