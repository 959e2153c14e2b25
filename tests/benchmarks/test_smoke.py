"""Every benchmark runs, at sizes that say nothing about speed, and writes what it promises."""

import importlib
import json
from collections import defaultdict

import numpy as np
import pytest
import torch

from benchmarks import deployed_parts, large_dataset, predicted, run_all, startup
from benchmarks._timing import Case, seconds_in_turns
from vlaflow.data.lerobot import Dataset
from vlaflow.engine.programs import ProgramKey, Programs
from vlaflow.simulators import gl

TINY = {
    "loader": ["--sizes", "32", "--episodes", "2", "--frames", "6", "--batch-size", "4", "--batches", "1"],
    "operations": ["--batch", "2", "--tokens", "4", "--width", "32", "--heads", "2", "--parameters", "0.01"],
    "training": [
        "--batch-size",
        "2",
        "--threads",
        "1",
        "--side",
        "8",
        "--ladder",
        "--set",
        "backbone.depth=1",
        "backbone.image_size=32",
        "exits=none",
    ],
    "evaluation": [
        "--envs",
        "metaworld/drawer-open-v3",
        "--steps",
        "3",
        "--episodes",
        "1",
        "--fast-size",
        "32",
        "--exact-size",
        "32",
    ],
    "latency": ["--steps", "2", "--set", "backbone.depth=1", "backbone.image_size=32", "exits=none"],
    "deployed": ["--only", "nothing", "--no-compile", "--compute", "dense:1"],
    "predicted": [],
    "decoders": ["--steps", "2", "--views", "2", "--set", "backbone.depth=1", "backbone.image_size=32"],
    "serving": [
        "--clients",
        "2",
        "--requests",
        "4",
        "--steps",
        "1",
        "--set",
        "backbone.depth=1",
        "backbone.image_size=32",
        "exits=none",
    ],
    "startup": [],
    "demo_steps": [],
}
ROUNDS = 2


@pytest.fixture
def result(tmp_path, monkeypatch):
    """A function that runs a benchmark at a tiny size and reads its JSON."""

    def run(name):
        arguments = [*TINY[name], "--json", str(tmp_path / "out.json")]
        if name == "evaluation":
            gl.prepare()  # before anything imports mujoco
            pytest.importorskip("metaworld")
        if name == "predicted":
            shapes = [predicted.Shape(1, 8, steps, depth, 32) for steps, depth in ((1, 1), (2, 1), (1, 2), (2, 2), (3, 1))]
            monkeypatch.setattr(predicted, "FITTED", shapes)
            monkeypatch.setattr(predicted, "HELD_OUT", [predicted.Shape(2, 8, 1, 1, 32)])
        if name == "startup":
            ways = {"import vlaflow.spec": ["-c", "import vlaflow.spec"], "import json": ["-c", "import json"]}
            monkeypatch.setitem(startup.CASES, "import vlaflow.policies.base", ways)
        if name == "demo_steps":
            results = tmp_path / "results.json"
            results.write_text(json.dumps({"minutes": {"kind": "Minutes", "install": None, "record": 1.5, "train": 6.0}}))
            arguments += ["--results", str(results)]
        else:
            arguments += ["--rounds", "1" if name == "startup" else str(ROUNDS)]
        assert importlib.import_module(f"benchmarks.{name}").main(arguments) == 0
        return json.loads((tmp_path / "out.json").read_text())

    return run


@pytest.mark.parametrize("name", TINY)
def test_a_benchmark_writes_positive_ratios_and_where_they_come_from(name, result):
    data = result(name)
    assert data["benchmark"] == name
    assert data["cases"]
    assert {"cpu", "amx", "features", "date", "threads", "versions"} <= data["machine"].keys()
    for case in data["cases"]:
        _, *others = case["arms"]
        assert list(case["times_as_long_as_first"]) == others
        numbers = [*case["arms"].values(), *case["times_as_long_as_first"].values()]
        assert all(0 < n["min"] <= n["median"] <= n["max"] for n in numbers)
    assert "| way |" in run_all.markdown(data)


def test_all_benchmarks_are_run_by_run_all():
    assert set(run_all.NAMES) == TINY.keys()


def test_arms_take_turns():
    """A, B, then B, A: whatever drifts, drifts for both."""
    order = []
    taken = seconds_in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1)
    assert order in (list("abbaabba"), list("baabbaab"))
    assert {name: len(each) for name, each in taken.items()} == {"a": 3, "b": 3}


@pytest.mark.parametrize(("unit", "values"), [("ms", {"a": [1.0, 2.0], "b": [3.0, 6.0]}), ("x/s", {"a": [3, 6], "b": [1, 2]})])
def test_a_ratio_is_taken_within_rounds_and_says_how_much_longer_the_other_way_takes(unit, values):
    ratio = Case("case", unit, values).ratios["b"]
    assert (ratio.min, ratio.median, ratio.max) == (3, 3, 3)


def test_the_large_data_set_has_the_shape_that_is_stated(tmp_path):
    """Several instructions in every episode, all of them known to it."""
    dataset = Dataset.open(large_dataset.make(tmp_path / "data", large_dataset.Options(episodes=4, frames=12, tasks=16)))
    assert (len(dataset), len(dataset.episodes), len(dataset.tasks)) == (48, 4, 16)
    assert dataset.row_notes == ()
    assert dataset.columns().task.tolist() == np.repeat(np.arange(16), 3).tolist()


def test_the_parts_of_a_chunk_add_up(capsys):
    """Also of an eager one, which has no programs: all of it is Python."""
    assert deployed_parts.main(["--engine", "eager", "--compute", "dense:1", "--rounds", "2"]) == 0
    table = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = {cells[1].strip(): cells[2].strip() for cells in table}
    assert float(rows["Python"]) == float(rows["all"]) > 0


def test_programs_are_timed_by_part():
    spent = defaultdict(float)
    with deployed_parts.timed_programs(spent):
        key = ProgramKey("rate", 1, 1, 1, 1)
        programs = Programs({key: lambda tensors: [tensors[0] @ tensors[0]]})
        assert programs.find(key)([torch.eye(200)])[0].sum() == 200
        assert programs.find(ProgramKey("run", 1, 1, 1, 1)) is None
    assert list(spent) == ["rate"]
    assert spent["rate"] > 0
