"""Which package a part needs, and what is said where it is missing."""

import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from vlaflow.actions.bins import BinsFit
from vlaflow.actions.fast import FastFit, FastTokenizer
from vlaflow.decoders.autoregressive import AutoregressiveConfig
from vlaflow.errors import CapabilityError
from vlaflow.packages import EXTRAS, missing, packages_of, require

EXTRAS_OF_THE_PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]


@pytest.mark.parametrize(("package", "extra"), EXTRAS.items())
def test_the_extra_that_is_named_brings_the_package(package, extra):
    """By name, or as the import name of a distribution that it lists."""
    listed = {Requirement(text).name for text in EXTRAS_OF_THE_PROJECT[extra]}
    assert listed & {package, *packages_distributions().get(package, [])}


def test_the_demo_brings_every_package_that_its_recipes_need():
    """`vlaflow train iflybot.demo` after `make demo` needs the tokens extra."""
    demo = Requirement(EXTRAS_OF_THE_PROJECT["demo"][0]).extras
    assert {"metaworld", "train", "viz", "serve", "tokens"} <= demo


def test_a_package_that_is_installed_is_accepted_and_one_that_is_not_is_named_with_its_cure(monkeypatch):
    require("numpy", "sys")
    with pytest.raises(
        CapabilityError, match=r"^Training needs the package 'no_such_package', .*: pip install no_such_package$"
    ):
        require("numpy", "no_such_package", what="Training")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(CapabilityError, match=r"pip install 'vlaflow\[train\]'$"):
        require("accelerate")
    assert missing("mujoco").endswith("pip install 'vlaflow[metaworld]'")


def test_needs_are_found_anywhere_in_a_config():
    merges = FastTokenizer(6, 4, 10.0, 0, 8, ((0, 1),))
    assert packages_of(AutoregressiveConfig(4, merges, chunk_size=6)) == ("tokenizers",)
    assert packages_of(AutoregressiveConfig(4, FastFit(vocabulary=None), chunk_size=6)) == ()
    assert packages_of(AutoregressiveConfig(4, BinsFit(), chunk_size=6)) == ()
    assert packages_of(None) == ()
    assert packages_of(FastFit()) == ("tokenizers",)
