"""Parts of other distributions: found by their entry points, refused in a sentence, and never chosen by a file alone."""

import ast
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import vlaflow
from tests import helpers
from vlaflow import registry
from vlaflow.actions.base import TokenizerConfig
from vlaflow.backbones.base import BackboneConfig
from vlaflow.backbones.tiny import TinyConfig
from vlaflow.compute.parse import able, parse
from vlaflow.compute.spelling import ComputeKind
from vlaflow.config import from_json, to_json
from vlaflow.decoders.base import DecoderConfig
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.rating import BaseRaterConfig
from vlaflow.errors import CapabilityError, ConfigError
from vlaflow.registry import OURS, RegistryEntry, find, installed, kind_of
from vlaflow.serving.observation_keys import ObservationKeys, choose
from vlaflow.simulators.base import Suite, parse_env_name
from vlaflow.training.recipes import find_recipe, list_recipes

KINDS = {"compute": ComputeKind, "simulators": Suite, "layouts": ObservationKeys, "recipes": ModuleType}
BASES = {"backbones": BackboneConfig, "decoders": DecoderConfig, "tokenizers": TokenizerConfig, "raters": BaseRaterConfig}
HOMES = {"tokenizers": "actions", "raters": "decoders"}
"""The subpackage of a group's parts, where it is not called like the group."""

FOREIGN = """
from dataclasses import dataclass
from vlaflow.decoders.base import DecoderConfig

@dataclass(frozen=True)
class ForeignConfig(DecoderConfig):
    action_dim: int
    chunk_size: int = 4

    def build(self, spec):
        raise NotImplementedError

Renamed = ForeignConfig
"""


@dataclass(frozen=True)
class HomelessConfig(DecoderConfig):
    """A config that no distribution declares."""

    action_dim: int = 1
    chunk_size: int = 1

    def build(self, spec):
        raise NotImplementedError


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that installs a distribution as pip would: modules and the metadata that declares its entry points."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(name, entries, modules=()):
        for module, text in dict(modules).items():
            (tmp_path / f"{module}.py").write_text(text)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"[vlaflow.{group}]\n{key} = {value}\n" for group, key, value in entries]
        (info / "entry_points.txt").write_text("\n".join(lines))
        installed.cache_clear()

    yield put
    installed.cache_clear()


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, names in OURS.items() for name in names])
def test_every_part_of_ours_is_where_the_table_says(group, name):
    found = find(group, name).load()
    if group in BASES:
        assert issubclass(found, BASES[group])
        assert found.__name__ == name
    else:
        assert isinstance(found, KINDS[group])


@pytest.mark.parametrize(("group", "base"), BASES.items())
def test_every_config_of_ours_is_in_the_table(group, base):
    """Read from the source text, so that a class whose module nothing imports counts too."""
    table = {value.partition(":")[2] for value in OURS[group].values()}
    written = set()
    folder = HOMES.get(group, group)
    for file in (Path(vlaflow.__file__).parent / folder).glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and any(d for d in node.decorator_list if "dataclass" in ast.unparse(d)):
                kind = getattr(__import__(f"vlaflow.{folder}.{file.stem}", fromlist=[node.name]), node.name)
                if issubclass(kind, base) and not getattr(kind, "__abstractmethods__", None):
                    written.add(node.name)
    assert written == table


def test_a_config_of_another_distribution_is_written_and_read(install):
    install("foreign", [("decoders", "ForeignConfig", "foreign_part:ForeignConfig")], {"foreign_part": FOREIGN})
    kind = kind_of(DecoderConfig, "ForeignConfig")
    written = to_json(kind(action_dim=3))
    assert from_json(DecoderConfig, written, "config.json") == kind(action_dim=3)


def test_a_kind_that_nothing_provides_is_one_sentence_with_what_is_installed():
    with pytest.raises(
        ConfigError,
        match=r"'config.kind' in c.json is 'OtherConfig', which nothing installed provides; installed: .*FlowConfig",
    ):
        from_json(DecoderConfig, {"kind": "OtherConfig", "action_dim": 2}, "c.json")


@pytest.mark.parametrize("kind", ["os.system", "vlaflow.decoders.flow:FlowConfig", "TinyConfig", "", None, 3, ["FlowConfig"]])
def test_a_file_can_name_installed_kinds_of_its_field_and_nothing_else(kind):
    with pytest.raises(ConfigError):
        from_json(DecoderConfig, {"kind": kind, "action_dim": 2}, "c.json")


def test_a_config_that_nothing_declares_is_refused_before_it_is_written():
    """It would train for hours, save, and then not open."""
    with pytest.raises(ConfigError, match=r"HomelessConfig = \"tests.test_registry:HomelessConfig\""):
        to_json(HomelessConfig())


FIELDS = """
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
import numpy as np
from vlaflow.decoders.base import DecoderConfig

if TYPE_CHECKING:
    from decimal import Decimal

@dataclass(frozen=True)
class ForeignConfig(DecoderConfig):
    action_dim: int = 1
    chunk_size: int = 4
    more: {field}

    def build(self, spec):
        raise NotImplementedError
"""


@pytest.mark.parametrize(
    ("field", "why"),
    [
        ("Any = field(default_factory=lambda: np.ones(3))", "'ForeignConfig.more' is of type ndarray, which JSON cannot hold"),
        ("int = np.int64(3)", "'ForeignConfig.more' is of type int64"),
        ("tuple = (1, Path('a'))", r"'ForeignConfig.more\[1\]' is of type PosixPath"),
        ("dict = field(default_factory=lambda: {1: 2.0})", "'ForeignConfig.more' is a dict whose keys are not text"),
        ("float = math.nan", "'more' in the JSON of a ForeignConfig must be a finite number, got nan"),
        ("int = 1.5", "'more' in the JSON of a ForeignConfig must be int, got 1.5"),
        ("'Decimal | None' = None", "have a type that cannot be read: name 'Decimal' is not defined"),
        ("Any = field(default=2, init=False)", "the JSON of a ForeignConfig.*cannot be used"),
    ],
)
def test_a_config_that_could_not_be_read_back_is_refused_before_it_is_written(install, field, why):
    """It would train for hours, save, and then not open, or open as another one."""
    text = FIELDS.replace("{field}", field)
    install("foreign", [("decoders", "ForeignConfig", "foreign_fields:ForeignConfig")], {"foreign_fields": text})
    kind = kind_of(DecoderConfig, "ForeignConfig")
    with pytest.raises(ConfigError, match=why):
        to_json(kind())
    sys.modules.pop("foreign_fields")


def test_a_config_that_is_no_dataclass_is_refused_before_it_is_written(install):
    text = FOREIGN.replace("@dataclass(frozen=True)", "").replace("    chunk_size: int = 4", "    chunk_size = 4")
    install("foreign", [("decoders", "ForeignConfig", "foreign_plain:ForeignConfig")], {"foreign_plain": text})
    with pytest.raises(ConfigError, match=r"ForeignConfig.*must be a frozen dataclass"):
        to_json(kind_of(DecoderConfig, "ForeignConfig")())


def test_a_part_that_cannot_be_imported_stops_only_those_who_name_it(install):
    install("broken", [("decoders", "BrokenConfig", "broken_part:BrokenConfig")], {"broken_part": "import nowhere_at_all"})
    assert kind_of(DecoderConfig, "FlowConfig") is FlowConfig
    assert "BrokenConfig" in installed("decoders")
    with pytest.raises(CapabilityError, match=r"comes with broken 1\.0 .*No module named 'nowhere_at_all'"):
        kind_of(DecoderConfig, "BrokenConfig")


def test_an_entry_without_its_attribute_names_its_distribution(install):
    install("empty", [("backbones", "NoConfig", "empty_part:NoConfig")], {"empty_part": ""})
    with pytest.raises(CapabilityError, match=r"empty 1\.0 .*NoConfig"):
        kind_of(BackboneConfig, "NoConfig")


def test_a_name_that_two_distributions_claim_is_refused_with_both(install):
    install("first", [("decoders", "ForeignConfig", "foreign_part:ForeignConfig")], {"foreign_part": FOREIGN})
    install("second", [("decoders", "ForeignConfig", "foreign_part:ForeignConfig")])
    with pytest.raises(ConfigError, match=r"claimed by (first 1\.0 and second 1\.0|second 1\.0 and first 1\.0)"):
        find("decoders", "ForeignConfig")


def test_nobody_takes_a_name_of_ours(install):
    install("thief", [("decoders", "FlowConfig", "foreign_part:ForeignConfig")], {"foreign_part": FOREIGN})
    with pytest.raises(ConfigError, match=r"claimed by vlaflow and thief 1\.0"):
        find("decoders", "FlowConfig")


@pytest.mark.parametrize(
    ("name", "value"), [("OtherName", "foreign_part:Renamed"), ("TinyConfig2", "vlaflow.backbones.tiny:TinyConfig")]
)
def test_an_entry_must_be_a_config_of_its_group_under_its_own_name(install, name, value):
    install("wrong", [("decoders", name, value)], {"foreign_part": FOREIGN})
    with pytest.raises(ConfigError, match=r"wrong 1\.0\) is .* derived from DecoderConfig"):
        kind_of(DecoderConfig, name)


def test_an_entry_says_its_module():
    assert RegistryEntry("decoders", "x", "package.module:Name").module == "package.module"
    assert registry.find("backbones", "TinyConfig").load() is TinyConfig


def test_what_is_listed_leaves_out_what_cannot_be_imported(install):
    """Lists of recipes, compute policies and environments need no part that is broken; naming it names its distribution."""
    broken = {"broken_part": "import nowhere_at_all"}
    groups = [("recipes", "broken", "broken_part.recipes"), ("compute", "broken", "broken_part:KIND")]
    install("broken", [*groups, ("simulators", "broken", "broken_part:SUITE")], broken)
    assert "asyncvla.demo" in list_recipes()
    assert "dense" in [compute.name for compute in able(helpers.policy().model)]
    with pytest.raises(ConfigError, match="did you mean 'metaworld/reach-v3'"):
        parse_env_name("reach-v3")
    for naming in (
        lambda: find_recipe("broken.demo"),
        lambda: parse("broken:3"),
        lambda: parse_env_name("broken/task"),
    ):
        with pytest.raises(CapabilityError, match=r"broken 1\.0"):
            naming()


def test_a_module_of_recipes_is_read_without_being_imported(install):
    """Its imports may take seconds, and a list is made for every help text."""
    text = (
        'import nowhere_at_all\n\ndef quick(data) -> recipe.TrainConfig:\n    """In no time."""\n\ndef helper() -> int: ...\n'
    )
    install("lazy", [("recipes", "lazy", "lazy_recipes")], {"lazy_recipes": text})
    assert list_recipes()["lazy.quick"].summary == "In no time."
    with pytest.raises(ConfigError, match="'lazy' has no recipe 'helper'"):
        find_recipe("lazy.helper")


def test_an_entry_must_be_what_its_group_holds(install):
    install("wrong", [("layouts", "wrong", "foreign_part:Renamed")], {"foreign_part": FOREIGN})
    with pytest.raises(ConfigError, match=r"wrong 1\.0\) is of type .*; it must be of type ObservationKeys"):
        choose("wrong", ("image",))


def test_a_suite_is_registered_by_the_name_it_has(install):
    text = "from vlaflow.simulators.metaworld_suite import SUITE"
    install("alias", [("simulators", "alias", "alias_part:SUITE")], {"alias_part": text})
    with pytest.raises(ConfigError, match="registered as 'alias' is named 'metaworld'"):
        parse_env_name("alias/reach-v3")
