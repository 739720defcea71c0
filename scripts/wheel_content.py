"""Check what an installed selfindex consists of: python wheel_content.py SOURCES, away from the tree."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

import selfindex
from selfindex.backends.cpu.loader import instruction_set

sources, installed = Path(sys.argv[1]), Path(selfindex.__file__).parent
wanted = {
    path.relative_to(sources)
    for path in sources.rglob("*")
    if path.suffix in (".py", ".cuh", ".cu", ".typed") and "native" not in path.parts
}
missing = sorted(str(path) for path in wanted if not (installed / path).is_file())
assert not missing, f"not in the wheel: {missing}"
assert any(path.suffix == ".cuh" for path in wanted)
assert installed / "py.typed" in installed.iterdir()
assert sys.prefix in str(installed), f"{installed} is not the environment's"
facts = metadata.metadata("selfindex")
assert facts["Version"] == selfindex.__version__
readme = facts.get_payload() or facts["Description"]
assert "](https://" in readme
relative = re.findall(r"\]\((?!https://|#)[^)]*\)", readme)
assert not relative, f"links that a package index cannot follow: {relative}"
print(f"{len(wanted)} files; CPU operators: {instruction_set()}")
