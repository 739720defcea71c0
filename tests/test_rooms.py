"""The house: rooms import downward only, no two modules wait for each other, and files stay small."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "selfindex"

ROOMS = [
    *("errors", "files", "manual", "versions", "config"),
    *("codec", "index", "backends", "store", "attention"),
    *("report", "integrations", "selfindex", "evaluation", "cli", "__main__"),
]
"""Bottom to top. `selfindex` is the package itself, whose names are for use from outside."""

MOST_LINES = 400
SOURCES = {".py", ".cpp", ".h", ".cuh"}


def modules():
    """Path of every module by its name in the package: ("store", "layer"); () is the package itself."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[parts[:-1] if parts[-1] == "__init__" else parts] = path
    return found


MODULES = modules()


def imported(name, text):
    """Modules of the package that the text of a module imports, for types or late ones as well."""
    folder = name if MODULES[name].name == "__init__.py" else name[:-1]
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [tuple(x.name.split(".")) for x in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ("selfindex", *folder)[: len(folder) + 2 - node.level] if node.level else ()
            base = (*start, *(node.module.split(".") if node.module else ()))
            names = [(*base, x.name) for x in node.names]
        else:
            continue
        for full in names:
            if full[0] == "selfindex":
                inner = full[1:]
                found.add(inner if inner in MODULES else inner[:-1])
    return found - {name}


def imports(changed=None):
    """What every module imports; `changed` maps names to another text."""
    texts = {name: path.read_text() for name, path in MODULES.items()} | (changed or {})
    return {name: imported(name, text) for name, text in texts.items()}


def room(name):
    return name[0] if name else "selfindex"


def upward(graph):
    """Imports of a room above, as (who, whom)."""
    return [
        (who, whom)
        for who, found in graph.items()
        for whom in found
        if ROOMS.index(room(whom)) > ROOMS.index(room(who))
    ]


def circle(graph):
    """Modules that import each other in a circle; None if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_every_room_has_its_place():
    assert {room(name) for name in MODULES} == set(ROOMS)


def test_what_is_imported_exists():
    assert {whom for found in imports().values() for whom in found} <= MODULES.keys()


def test_no_room_looks_upward():
    assert upward(imports()) == []


def test_no_modules_import_each_other():
    assert circle(imports()) is None


@pytest.mark.parametrize(
    "line",
    [
        "from ..attention.attend import attend",
        "from .. import attention",
        "import selfindex.attention.attend",
        "if TYPE_CHECKING:\n    from ..attention import step",
        "def late():\n    from selfindex.attention import attend",
    ],
)
def test_an_upward_import_is_seen(line):
    name = ("backends", "reference")
    graph = imports({name: MODULES[name].read_text() + line})
    assert {(room(who), room(whom)) for who, whom in upward(graph)} == {("backends", "attention")}


@pytest.mark.parametrize("line", ["from . import ops", "if TYPE_CHECKING:\n    from .ops import encode"])
def test_a_circle_is_seen(line):
    name = ("backends", "reference")
    graph = imports({name: MODULES[name].read_text() + line})
    assert upward(graph) == []
    assert {name, ("backends", "ops")} <= set(circle(graph))


@pytest.mark.parametrize("folder", ["src", "tests"])
def test_files_hold_one_idea(folder):
    paths = [path for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES]
    lines = {path: len(path.read_text().splitlines()) for path in paths}
    assert lines
    assert {path: n for path, n in lines.items() if n > MOST_LINES} == {}
