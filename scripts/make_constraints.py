#!/usr/bin/env python
"""Write constraints.txt: the versions in this environment of what the project needs, and of what that needs in turn.
Run it after the tests have passed.
"""
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("dev", "trackers", "bench")
HEADER = """# The versions that the tests were run with. `make` installs with `-c constraints.txt`; pyproject.toml says
# what is allowed.
# torch is pinned to a release that has a CPU build; which build you get is decided by the index that your pip is set
# to.
# Made by scripts/make_constraints.py.
"""


def canonical(name):
    "The normalised name of a distribution."
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(requirements):
    "{name: version} of the requirements and all they need, as installed here."
    found, waiting = {}, [(Requirement(line), "") for line in requirements]
    seen = set()
    while waiting:
        requirement, extra = waiting.pop()
        key = (canonical(requirement.name), tuple(sorted(requirement.extras)))
        if key in seen or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        seen.add(key)
        try:
            distribution = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            print(f"not installed here, left out: {requirement}", file=sys.stderr)
            continue
        found[canonical(requirement.name)] = distribution.version.split("+")[
            0
        ]  # a local build tag would exclude other builds
        for line in distribution.requires or []:
            waiting += [(Requirement(line), name) for name in ("", *requirement.extras)]
    return found


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = list(project["dependencies"])
    for name in EXTRAS:
        wanted += project["optional-dependencies"].get(name, [])
    lines = [f"{name}=={version}" for name, version in sorted(closure(wanted).items())]
    (ROOT / "constraints.txt").write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"constraints.txt: {len(lines)} packages")
