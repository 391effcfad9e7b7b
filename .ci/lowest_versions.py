"""Prints the lower bounds of pyproject.toml as constraints for pip: `package==bound`, one a line.

python .ci/lowest_versions.py export ort > lowest.txt && pip install -c lowest.txt -e
".[export,ort]"
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: pip brings one
    from pip._vendor import tomli as tomllib

REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?\s*(?:>=|==)\s*([0-9][0-9a-z.]*)")


def lowest(extras: list[str]) -> list[str]:
    """Constraints of the dependencies and of these extras."""
    path = Path(__file__).parent.parent / "pyproject.toml"
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    listed = list(project["dependencies"])
    for extra in extras:
        listed += project["optional-dependencies"][extra]
    found = (REQUIREMENT.match(requirement) for requirement in listed)
    return sorted({f"{match[1]}=={match[2]}" for match in found if match})


if __name__ == "__main__":
    print("\n".join(lowest(sys.argv[1:])))
