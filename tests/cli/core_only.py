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


class CoreOnly:
    """Finds nothing of a distribution that the core does not bring."""

    def __init__(self):
        core = core_distributions()
        self.hidden = {
            module for module, names in packages_distributions().items() if not core & {canonical(name) for name in names}
        } - {"vlaflow", "tests"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


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
