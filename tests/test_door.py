"""``import vlaflow``: what it offers, and that it costs nothing until something is used."""

import ast
import importlib
import pkgutil
import subprocess
import sys

import pytest

import vlaflow
from tests.test_structure import DOOR, imported, tree
from vlaflow import compute
from vlaflow.compute.base import ComputePolicy

LOADED = """
import sys, time
before, began = set(sys.modules), time.process_time()
import vlaflow
took = time.process_time() - began
new = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
print(took, *sorted(new))
"""


def test_importing_the_package_loads_nothing_else():
    """Neither torch nor NumPy, and in processor time a fraction of what a command may take to show its help."""
    runs = [subprocess.run([sys.executable, "-c", LOADED], check=True, capture_output=True, text=True) for _ in range(3)]
    took, loaded = zip(*(run.stdout.split(maxsplit=1) for run in runs), strict=True)
    assert {modules.strip() for modules in loaded} == {"vlaflow"}
    assert min(map(float, took)) < 0.05


@pytest.mark.parametrize("name", vlaflow.__all__)
def test_every_name_is_the_object_that_the_type_checker_sees(name):
    """The imports for the type checker and the table of modules are two lists of one thing."""
    guarded = [node for node in tree(DOOR).body if isinstance(node, ast.If)]
    typed = [target for block in guarded for node in block.body for target in imported(node, DOOR)]
    assert sorted(target.rpartition(".")[2] for target in typed) == sorted(vlaflow.__all__)
    module = next(target for target in typed if target.endswith(f".{name}")).rpartition(".")[0]
    assert getattr(vlaflow, name) is getattr(importlib.import_module(module), name)


def test_every_compute_policy_of_ours_is_offered():
    """Those that have a name on the command line, and the classes behind calibrations."""
    for module in pkgutil.iter_modules(compute.__path__, "vlaflow.compute."):
        importlib.import_module(module.name)
    ours = {kind.__name__ for kind in ComputePolicy.__subclasses__() if kind.__module__.startswith("vlaflow.compute.")}
    assert ours <= set(vlaflow.__all__)


def test_names_are_listed_before_they_are_used():
    code = "import sys, vlaflow; print(*dir(vlaflow)); assert 'torch' not in sys.modules"
    listed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert {*vlaflow.__all__, "__version__"} <= set(listed)


@pytest.mark.parametrize(("typed", "hint"), [("Policee", "did you mean 'Policy'"), ("xyz", "valid names: ActionSpec, ")])
def test_an_unknown_name_gets_the_nearest_one(typed, hint):
    with pytest.raises(AttributeError, match=hint):
        getattr(vlaflow, typed)


def test_a_module_is_still_imported_by_its_name():
    code = "from vlaflow import spec, robot; import sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
