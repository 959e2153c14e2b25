"""The GPU's script runs from end to end with a small network on a CPU."""

import json

import pytest

from benchmarks import gpu


def test_it_measures_chunks_and_both_kinds_of_training_step(tmp_path):
    pytest.importorskip("peft")
    file = tmp_path / "gpu.json"
    options = ["--small", "--device", "cpu", "--batch-size", "1", "--rounds", "1", "--no-compile", "--json", str(file)]
    assert gpu.main(options) == 0
    cases = json.loads(file.read_text())["cases"]
    assert [list(case["arms"]) for case in cases] == [
        ["eager", "act"],
        ["layers", "embed (vision tower)", "solver"],
        ["all weights"],
        ["adapters"],
    ]
    assert all(arm["median"] > 0 for case in cases for arm in case["arms"].values())
    assert cases[0]["notes"]["left out"] == "nothing"


def test_what_does_not_fit_into_the_budget_is_said(tmp_path):
    bench = gpu.Bench(gpu.Options(device="cpu", small=True, budget=0.0), tmp_path)
    assert not bench.has(60, "adapters")
    assert bench.left_out == ["adapters"]
