"""Code completion in the manner of LongBench (Bai et al., arXiv 2308.14508): the next line of a long file.

LCC asks for the next line of one file; RepoBench-P (Liu et al., arXiv 2306.03091) for the line in which a
function first uses a name that its file imports from another one, which stands before it. The files are
those of `texts.recent_code`, not the data sets'. Prompts are code alone, without a chat template, and
are scored by edit similarity.
"""

from __future__ import annotations

import ast
import random
import re
from functools import lru_cache
from pathlib import PurePosixPath

from ...errors import InputError
from ..texts import recent_code
from .judges import LOOKS_LIKE_TALK, NEXT_LINE
from .sample import Sample, Source, assemble, space

NEW = 64
SHORTEST = 12
"""Characters of a line worth asking for, without its indentation."""
TAIL = 32
"""Tokens before the line that are read after the compressed ones, as a question is."""

Place = tuple[str, int]
"""A file, and a line of it, counted from 0."""


def lcc(source: Source, length: int, seed: int) -> Sample:
    """The next line of a long file; files next to it stand before one that is shorter than the prompt."""
    rng = random.Random(f"lcc {length} {seed}")
    size = space(length, [], [], NEW)
    paths, files = list(recent_code()), recent_code()
    # About what fits, so that most of the prompt is the file itself.
    long = [path for path in paths if len(files[path]) > 3 * size] or paths
    for path in rng.sample(long, len(long)):
        lines = files[path].split("\n")
        rows = [i for i in statements(path) if 2 * i > len(lines)]
        if rows:
            before = [other for other in _siblings(path) if other != path]
            sample = _sample(source, (path, rng.choice(rows)), before, size, {})
            if sample is not None:
                return sample
    raise InputError(f"no installed code is long enough for {length} tokens")


def repobench_p(source: Source, length: int, seed: int) -> Sample:
    """The first line of a function that uses a name from another file, whose definition is in the prompt."""
    rng = random.Random(f"repobench_p {length} {seed}")
    size = space(length, [], [], NEW)
    paths = list(recent_code())
    for path in rng.sample(paths, len(paths)):
        if (found := first_use(path)) is None:
            continue
        line, name, origin = found
        # The file that the name comes from stands anywhere among its neighbours.
        others = [other for other in _siblings(path) if other not in (path, origin)]
        others.insert(rng.randrange(len(others) + 1), origin)
        needed = source.encode(_text(origin, _definition(origin, name)))[: size // 2]
        sample = _sample(source, (path, line), others, size, {origin: needed})
        if sample is not None:
            return sample
    raise InputError(f"no installed code is long enough for {length} tokens")


def _siblings(path: str) -> list[str]:
    """Files to put around one: of its folder, then of the folders that follow."""
    paths = list(recent_code())
    folder = PurePosixPath(path).parent.as_posix() + "/"
    near = [other for other in paths if other.startswith(folder)]
    at = paths.index(path)
    return near + [other for other in paths[at:] + paths[:at] if not other.startswith(folder)]


def _text(path: str, first: int = 0) -> str:
    """A file from a line on, counted from 0, under its name."""
    return f"# {path}\n" + "".join(recent_code()[path].splitlines(keepends=True)[first:]) + "\n"


def _definition(path: str, name: str) -> int:
    """Line on which a name of a file is defined, counted from 0; 0 if that is not plain to see."""
    starts = re.compile(rf"(?:class|def|async def) {name}\b|{name}\b")
    lines = recent_code()[path].splitlines()
    return next((i for i, line in enumerate(lines) if starts.match(line)), 0)


def _sample(
    source: Source, place: Place, others: list[str], size: int, pieces: dict[str, list[int]]
) -> Sample | None:
    """A prompt of `size` tokens that ends before a line, or None if there is not enough to fill it.

    Of the file itself the end is kept. `pieces`, tokens of other files, are in the prompt in any case; the
    others fill it up, the last one with its end, unless the same lines are in them (transformers generates
    files from others). All stand in the order of `others`.
    """
    path, line = place
    lines = recent_code()[path].split("\n")
    own = source.encode(f"# {path}\n" + "\n".join(lines[:line]) + "\n")
    left = size - sum(map(len, pieces.values()))
    own = own[-left:]
    left -= len(own)
    answer = "\n".join(lines[max(0, line - 2) : line + 1])
    for other in others:
        if left > 0 and other not in pieces and answer not in recent_code()[other]:
            pieces[other] = source.encode(_text(other))[-left:]
            left -= len(pieces[other])
    if left > 0:
        return None
    ids = [token for other in others for token in pieces.get(other, ())] + own
    return assemble([], ids[:-TAIL], ids[-TAIL:], [lines[line]], NEW, NEXT_LINE)


@lru_cache(maxsize=4096)
def statements(path: str) -> list[int]:
    """Lines, counted from 0, on which a statement within a function begins that is worth asking for: not
    short, and without what the judge takes for talk.
    """
    lines = recent_code()[path].split("\n")
    found = set()
    for node in ast.walk(ast.parse(recent_code()[path])):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inner = (x for x in ast.walk(node) if isinstance(x, ast.stmt) and x is not node)
            found |= {
                x.lineno - 1
                for x in inner
                if not isinstance(x, (ast.Import, ast.ImportFrom)) and not _text_only(x)
            }
    long = (i for i in found if len(lines[i].strip()) >= SHORTEST)
    return sorted(i for i in long if not any(mark in lines[i] for mark in LOOKS_LIKE_TALK))


def _text_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


@lru_cache(maxsize=4096)
def first_use(path: str) -> tuple[int, str, str] | None:
    """(the first such line of a file that uses a name from another file, the name there, that file)."""
    files = recent_code()
    imported: dict[str, tuple[str, str]] = {}
    tree = ast.parse(files[path])
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level and node.module:
            base = PurePosixPath(path).parents[node.level - 1] / node.module.replace(".", "/")
            if (file := f"{base}.py") in files:
                imported |= {alias.asname or alias.name: (alias.name, file) for alias in node.names}
    begins = set(statements(path))
    uses = sorted(
        (node.lineno - 1, *imported[node.id])
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id in imported
    )
    return next((use for use in uses if use[0] in begins), None)
