"""The plans of the demo: what they name exists, and what they print would do the same."""

import shlex
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import tyro

from vlaflow.cli.arguments import parse_arguments
from vlaflow.cli.demo import Demo, DemoLog, Settings, equivalent
from vlaflow.cli.demo_plans import PLANS
from vlaflow.cli.eval import Eval
from vlaflow.errors import ConfigError
from vlaflow.packages import EXTRAS
from vlaflow.policies.recipe import DataSpec
from vlaflow.simulators.base import expand_env_names
from vlaflow.simulators.metaworld_tasks import TASKS
from vlaflow.training.recipes import find_recipe

ROOT = Path(__file__).parents[2]
APPEND = (tyro.conf.UseAppendAction,)


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_names_tasks_and_recipes_that_exist(name):
    plan = PLANS[name]
    assert len(expand_env_names(plan.envs)) == {"mt50": 50}.get(name, len(plan.envs))
    assert not find_recipe(plan.policy).continues
    assert plan.rater is None or find_recipe(plan.rater).continues


@pytest.mark.parametrize("name", PLANS)
def test_the_extras_of_a_plan_bring_its_packages(name):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    plan = PLANS[name]
    assert set(plan.extra.split(",")) <= set(extras)
    assert {EXTRAS.get(package, package) for package in plan.packages} <= {"metaworld", "libero"}


@pytest.mark.parametrize("name", PLANS)
def test_the_printed_commands_do_what_the_steps_do(name):
    plan, settings = PLANS[name], Settings.of(Demo(plan=name, steps=7))
    commands = {step: shlex.split(line) for step, line in equivalent(settings, plan, Path("runs/x"), 2).items()}
    assert [word for word in commands["record"] if "/" in word] == [*plan.envs, "runs/x/dataset"]
    for option, values in (("--noise", plan.noise), ("--noise-memory", plan.noise_memory)):
        assert [given for word, given in pairwise(commands["record"]) if word == option] == [str(value) for value in values]
    assert commands["train"][:3] == ["vlaflow", "train", plan.policy]
    assert commands["train"][commands["train"].index("--steps") + 1] == "7"
    assert ("rater" in commands) == bool(plan.rater)
    if plan.rater:
        assert commands["rater"][2] == plan.rater
    for protocol in plan.protocols:
        assert all(word in commands[protocol.step] for word in (*plan.envs, *protocol.computes))


def test_the_fifty_tasks_are_evaluated_under_both_published_protocols():
    """LeRobot's seeds and limit, then the seeds 4042 and up with at most 400 steps; the images are as large as the recipe's."""
    plan = PLANS["mt50"]
    commands = equivalent(Settings.of(Demo(plan="mt50")), plan, Path("runs/x"), 2)
    first, second = (
        parse_arguments(Eval, "vlaflow eval", shlex.split(commands[p.step])[2:], config=APPEND) for p in plan.protocols
    )
    assert (first.env, first.episodes, first.seed, first.max_steps) == (("metaworld/all",), 10, 1000, None)
    assert (second.env, second.episodes, second.seed, second.max_steps) == (("metaworld/all",), 10, 4042, 400)
    assert {"auto", "mean:8", "exit:adaptive"} <= set(first.compute)
    assert first.out != second.out
    size = commands["record"].partition("--size ")[2].split()[0]
    assert int(size) == find_recipe(plan.policy).config(DataSpec(4, 4, ("image",)), None).objective.input_size.side


def test_a_quick_run_of_a_group_takes_its_first_task():
    assert Settings.of(Demo(plan="mt50", quick=True)).envs == (f"metaworld/{next(iter(TASKS))}",)


def test_numbers_come_from_the_plan_unless_they_are_given():
    own, given = Settings.of(Demo(plan="libero")), Settings.of(Demo(plan="libero", episodes=3, eval_episodes=1))
    assert (own.episodes, own.eval_episodes, own.steps) == (40, 10, PLANS["libero"].steps)
    assert (given.episodes, given.eval_episodes, given.language_episodes) == (3, 1, 1)
    with pytest.raises(ConfigError, match="at least 1"):
        parse_arguments(Demo, "vlaflow demo", ["--episodes", "0"])


def test_a_folder_of_another_plan_is_refused(tmp_path):
    DemoLog(tmp_path / "demo", Settings.of(Demo(quick=True)))
    with pytest.raises(ConfigError, match="started with plan = metaworld, not libero"):
        DemoLog(tmp_path / "demo", Settings.of(Demo(plan="libero", quick=True)))


def test_make_installs_and_runs_each_plan():
    """`make libero` is the demo with its plan."""
    lines = (ROOT / "Makefile").read_text()
    assert "mt50: setup-demo" in lines
    assert "vlaflow demo --plan mt50" in lines
    assert "libero: setup-libero" in lines
    assert "vlaflow demo --plan libero" in lines
    assert "extras=demo,libero" in (ROOT / "tools/setup.sh").read_text()
