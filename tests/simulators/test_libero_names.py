"""LIBERO's names, sentences and limits, which are known without LIBERO."""

import subprocess
import sys

import pytest

from tests.simulators import libero_catalogue
from vlaflow.errors import CapabilityError, ConfigError
from vlaflow.simulators import base, expand_env_names, make, parse_env_name, simulator_spec
from vlaflow.simulators.base import protocol_limits, rendering_versions, step_limit
from vlaflow.simulators.libero_tasks import TASKS


def test_the_suite_ends_at_the_first_slash():
    assert parse_env_name("libero/spatial/0") == ("libero", "spatial/0")
    assert expand_env_names("libero/object") == [f"libero/object/{number}" for number in range(10)]
    assert len(expand_env_names("libero/90")) == 90
    assert len(expand_env_names("libero/main")) == 40


def test_the_instruction_is_the_sentence_in_the_file_name():
    spec = simulator_spec("libero")
    assert spec.tasks["spatial/0"] == "pick up the black bowl between the plate and the ramekin and place it on the plate"
    assert spec.tasks["long/2"] == "turn on the stove and put the moka pot on it"
    assert spec.tasks["90/0"] == "close the top drawer of the cabinet"
    assert spec.tasks["goal_with_milk/3"] == "put the bowl on the plate"


def test_variants_that_change_the_instruction_or_the_task_state_what_is_asked_for():
    for suite in ("spatial", "object", "goal", "long"):
        for number in range(10):
            original = TASKS[f"{suite}/{number}"].instruction
            for variant in ("object", "swap"):
                assert TASKS[f"{suite}_{variant}/{number}"].instruction == original
            for variant in ("lan", "task"):
                assert TASKS[f"{suite}_{variant}/{number}"].instruction != original


@pytest.mark.parametrize(
    ("group", "openvla", "lerobot"),
    [("spatial", 220, 280), ("object_swap", 280, 280), ("goal_with_mug", 300, 300), ("long", 520, 520), ("90", 400, 400)],
)
def test_an_episode_is_as_long_as_the_longest_published_one(group, openvla, lerobot):
    name = f"libero/{group}/1"
    assert protocol_limits(name) == {"openvla": openvla, "lerobot": lerobot}
    assert step_limit(name) == max(openvla, lerobot)
    assert step_limit(name, 100) == 100


def test_the_version_of_the_rendering_is_recorded_with_the_versions():
    found = rendering_versions(["libero/object/1", "metaworld/reach-v3"], "fast")
    assert found.keys() == {"libero rendering", "metaworld rendering"}
    assert rendering_versions(["libero/object"], "fast") != rendering_versions(["libero/object"], "exact")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("libero/spatial_env/0", "not all of its descriptions, initial states and objects"),
        ("libero/object/10", "did you mean 'libero/object/1'"),
        ("libero/objectx/1", "did you mean 'libero/object/1'"),
    ],
)
def test_a_task_that_cannot_run_is_refused_before_anything_is_imported(name, words):
    with pytest.raises(ConfigError, match=words):
        parse_env_name(name)


def test_names_are_known_without_importing_a_simulator():
    program = (
        "import sys, vlaflow.simulators as s; s.expand_env_names('libero/long_lan');"
        "assert not {'libero', 'robosuite', 'mujoco', 'gymnasium', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_another_package_with_the_same_import_name_is_explained(monkeypatch):
    from vlaflow.simulators import libero_package

    libero_package.load.cache_clear()
    monkeypatch.setattr(libero_package.metadata, "packages_distributions", lambda: {"libero": ["hf-libero"]})
    with pytest.raises(CapabilityError, match=r"belongs to another package here \(hf-libero\).*pip uninstall hf-libero"):
        make("libero/object/0")


def test_the_missing_package_is_named_with_a_command(monkeypatch):
    from vlaflow.simulators import libero_package

    def not_found(name):
        raise libero_package.metadata.PackageNotFoundError(name)

    libero_package.load.cache_clear()
    monkeypatch.setattr(libero_package.metadata, "packages_distributions", dict)
    monkeypatch.setattr(libero_package.metadata, "version", not_found)
    with pytest.raises(CapabilityError, match=r"pip install 'vlaflow\[libero\]'"):
        make("libero/object/0")


def test_a_worker_keeps_as_many_environments_as_their_memory_allows(monkeypatch):
    """Two of LIBERO's count as much as eight of Meta-World's; the oldest is closed first."""
    closed = []

    class Stub:
        def __init__(self, name):
            self.name = name

        def close(self):
            closed.append(self.name)

    monkeypatch.setattr(base, "_kept", {})
    monkeypatch.setattr(base, "make", lambda name, **_: Stub(name))
    names = ["metaworld/reach-v3", "metaworld/push-v3", "libero/goal/0", "libero/goal/1", "metaworld/reach-v3", "libero/goal/2"]
    first = [base.cached(name) for name in names]
    assert first[0].name == "metaworld/reach-v3"
    assert closed == ["metaworld/reach-v3", "metaworld/push-v3", "libero/goal/0", "libero/goal/1"]
    assert base.cached("libero/goal/2") is first[-1]


@libero_catalogue.needs_libero
def test_the_catalogue_is_that_of_the_installed_package():
    import json

    assert json.loads(libero_catalogue.FILE.read_text()) == libero_catalogue.catalogue()
