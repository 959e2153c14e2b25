"""A robot's computer has numpy, msgpack and websockets, and nothing else of what this project uses."""

import ast
import subprocess
import sys

import pytest

from tests.test_structure import PACKAGE
from vlaflow import robot

MODULES = sorted(f"vlaflow.robot.{path.stem}" for path in (PACKAGE / "robot").glob("[a-z]*.py"))
ALONE = """
import sys

class OnlyTheseThree:
    ours = {"vlaflow", "numpy", "msgpack", "websockets"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in sys.stdlib_module_names | self.ours:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, OnlyTheseThree())
"""


def alone(code):
    """Run Python in a process of its own that can import the standard library and these three packages only."""
    return subprocess.run([sys.executable, "-c", ALONE + code], check=False, capture_output=True, text=True)


def test_other_packages_are_out_of_reach_there():
    assert "No module named 'torch'" in alone("import torch").stderr


@pytest.mark.parametrize("module", MODULES)
def test_every_module_needs_these_packages_only(module):
    done = alone(f"import {module}")
    assert not done.returncode, done.stderr


def test_every_name_that_the_room_offers_can_be_imported():
    done = alone(f"from vlaflow.robot import {', '.join(robot.__all__)}")
    assert not done.returncode, done.stderr
    with pytest.raises(ImportError, match="Server"):
        exec("from vlaflow.robot import Server", {})


def test_a_controller_acts_without_websockets():
    """A robot that reaches its policy in another way still uses the controller."""
    done = alone('OnlyTheseThree.ours -= {"websockets", "msgpack"}\nfrom vlaflow.robot import RealtimeController')
    assert not done.returncode, done.stderr


def test_late_imports_need_no_more():
    """What a function imports when it runs counts as well."""
    allowed = sys.stdlib_module_names | {"vlaflow", "numpy", "msgpack", "websockets"}
    names = [
        name.partition(".")[0]
        for path in (PACKAGE / "robot").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    ]
    assert set(names) <= allowed
