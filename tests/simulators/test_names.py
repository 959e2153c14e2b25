"""Environment names, and that naming them loads no simulator."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from vlaflow.errors import ConfigError
from vlaflow.simulators import expand_env_names, make, parse_env_name
from vlaflow.simulators.obstacle_task import SPEC


def test_a_name_is_a_suite_and_a_task():
    """The two halves are what the rest of the library works with."""
    assert parse_env_name("metaworld/drawer-open-v3") == ("metaworld", "drawer-open-v3")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("metaworld/drawer-opne-v3", "did you mean 'metaworld/drawer-open-v3'?"),
        ("metaworl/drawer-open-v3", "did you mean 'metaworld'?"),
        ("drawer-open-v3", "did you mean 'metaworld/drawer-open-v3'?"),
    ],
)
def test_a_typo_gets_the_nearest_name(name, hint):
    """One sentence that says what to type."""
    with pytest.raises(ConfigError) as caught:
        make(name)
    assert hint in str(caught.value)


@pytest.mark.parametrize("arguments", [{"render": "pretty"}, {"size": 0}])
def test_impossible_rendering_is_refused(arguments):
    """Before anything is built."""
    with pytest.raises(ConfigError):
        make("metaworld/drawer-open-v3", **arguments)


def test_groups_stand_for_their_tasks():
    """Duplicates are dropped and order is kept."""
    names = expand_env_names(["metaworld/window-close-v3", "metaworld/hard", "metaworld/push-v3"])
    assert names[0] == "metaworld/window-close-v3"
    assert len(names) == 7
    assert len(expand_env_names("metaworld/all")) == 50
    with pytest.raises(ConfigError):
        expand_env_names("metaworld/harder")


def test_importing_the_room_loads_no_simulator():
    """`vlaflow --help` must answer at once."""
    code = (
        "import sys, vlaflow.simulators as s; s.parse_env_name('metaworld/push-v3');"
        "print([m for m in ('mujoco', 'metaworld', 'gymnasium', 'torch') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_without_opengl_physics_works_and_an_image_is_refused_with_the_packages_to_install():
    """MUJOCO_GL=disable is what `gl.prepare` sets where no OpenGL library is installed."""
    code = (
        "import numpy as np; from vlaflow.errors import CapabilityError; from vlaflow.simulators import make\n"
        "env = make('metaworld/push-v3'); env.restart(1); env.advance(np.zeros(4))\n"
        "try: env.render()\n"
        "except CapabilityError as error: print(error)"
    )
    environment = {**os.environ, "MUJOCO_GL": "disable"}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment).stdout
    assert "apt-get install libegl1" in told


def test_images_work_when_mujoco_was_imported_before_this_library():
    """MuJoCo chooses GLFW then, which needs a display."""
    code = (
        "import mujoco; from vlaflow.simulators import make;"
        "print(make('metaworld/push-v3').reset(seed=1)[0]['pixels'].std() > 1)"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment).stdout
    assert told == "True\n"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_steps": {}}, r"suite 'obstacle' has no 'pass-v0' in its max_steps"),
        ({"size": {"fast": 96}}, "no 'exact' in its size"),
        ({"groups": {"easy": ("pass-v1",)}}, "no 'pass-v1' in its tasks"),
        ({"published": ("easy",)}, "no 'easy' in its groups"),
        ({"protocols": {"theirs": {}}}, r"no 'pass-v0' in its protocols\['theirs'\]"),
        ({"protocols": {"theirs": {"pass-v0": 60}}}, r"max_steps 50 for 'pass-v0', below the 60 of protocols\['theirs'\]"),
    ],
)
def test_a_spec_that_would_fail_later_is_refused(change, named):
    """A recording with --render exact, or an evaluation at its end, would find no number."""
    with pytest.raises(ConfigError, match=named):
        replace(SPEC, **change)
