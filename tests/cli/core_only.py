"""Runs commands in processes that can import the core dependencies alone, as after `pip install vlaflow` without extras.

    python -m tests.cli.core_only '[["data", "check", "DIR"], ...]'

The folder ``bare`` must be on PYTHONPATH, so that processes that a command starts are no better off.
Prints what became of each as a line of JSON: its status and what it wrote to standard error, or the traceback.
"""

import contextlib
import io
import json
import re
import sys
import traceback
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


def outcome(arguments):
    from vlaflow.cli.main import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(arguments)
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            return {"status": None, "said": traceback.format_exc()}
    return {"status": status, "said": said.getvalue()}


if __name__ == "__main__":
    for one in json.loads(sys.argv[1]):
        sys.stdout.write(json.dumps(outcome(one)) + "\n")
