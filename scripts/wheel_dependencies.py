"""Link the packages that an installed one asks for into an environment, from this interpreter's own.

    python scripts/wheel_dependencies.py ENVIRONMENT PACKAGE

What PACKAGE needs but does not name stays invisible there, and nothing is downloaded.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def requirements(distribution: metadata.Distribution, extras: frozenset[str]) -> list[Requirement]:
    """Those that apply here."""
    found = [Requirement(text) for text in distribution.requires or []]
    chosen = extras or {""}
    return [r for r in found if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in chosen)]


def closure(first: list[Requirement]) -> dict[str, metadata.Distribution]:
    """Installed distributions by name that these requirements lead to; missing ones are left out."""
    found: dict[str, metadata.Distribution] = {}
    left, seen = list(first), set()
    while left:
        requirement = left.pop()
        key = (requirement.name, frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            distribution = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            continue  # `pip check` in the environment says so
        found[requirement.name] = distribution
        left += requirements(distribution, frozenset(requirement.extras))
    return found


def main() -> None:
    """Read the command line, link."""
    environment, package = Path(sys.argv[1]), sys.argv[2]
    (target,) = environment.glob("lib/python*/site-packages")
    (installed,) = metadata.distributions(name=package, path=[str(target)])
    for distribution in closure(requirements(installed, frozenset())).values():
        for name in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            link = target / name
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(name))))


if __name__ == "__main__":
    main()
