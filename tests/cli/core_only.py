"""Processes that can import the core dependencies alone, as after `pip install vlaflow` without extras.

The folder ``bare`` must be on PYTHONPATH, so that processes that a command starts are no better off.
"""

import contextlib
import re
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from tomllib import loads

PROJECT = loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def core_distributions():
    """The dependencies and all that they depend on in turn, without anybody's extras."""
    found, queue = set(), list(PROJECT["dependencies"])
    while queue:
        requirement = queue.pop()
        name = canonical(re.match(r"[\w.-]+", requirement)[0])
        if name in found or re.search(r";.*extra\s*==", requirement):
            continue
        with contextlib.suppress(PackageNotFoundError):  # of another platform
            queue += distribution(name).requires or []
            found.add(name)
    return found


def hidden_modules():
    """Modules of the distributions that the core does not bring."""
    core = core_distributions()
    found = {module for module, names in packages_distributions().items() if not core & {canonical(name) for name in names}}
    return found - {"vlaflow", "tests"}


class CoreOnly:
    """An import finder that finds no hidden module, as if it were not installed; torch also asks without importing."""

    def __init__(self, finder, hidden):
        self.finder, self.hidden = finder, hidden

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in self.hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)
