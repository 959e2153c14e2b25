"""The lowest declared version of every dependency, as constraints for pip: python tools/lowest.py EXTRA... [NAME=VERSION...]

NAME=VERSION replaces a declared one, for a machine that cannot get it; what was tested then is not what is declared.
"""

import re
import sys
import tomllib
from pathlib import Path

REQUIREMENT = re.compile(r"([\w.-]+)(?:\[([\w,-]+)\])?\s*(?:>=\s*([\w.]+))?")


def lowest(project: dict, extras: list[str]) -> dict[str, str]:
    """Version by name, of the core dependencies and those of the extras; packages without a lower end are left out."""
    found: dict[str, str] = {}
    optional = project["optional-dependencies"]
    waiting = [*project["dependencies"], *(each for extra in extras for each in optional[extra])]
    while waiting:
        match = REQUIREMENT.match(waiting.pop())
        assert match is not None
        name, nested, version = match.groups()
        if name == project["name"]:
            waiting += [each for extra in nested.split(",") for each in optional[extra]]
        elif version:
            found[name] = version
    return found


if __name__ == "__main__":
    declared = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    replaced = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
    versions = lowest(declared, [word for word in sys.argv[1:] if "=" not in word])
    for name, version in sorted((versions | replaced).items()):
        sys.stdout.write(f"{name}=={version}\n")
