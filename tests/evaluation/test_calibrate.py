"""``vlaflow calibrate`` from a trained checkpoint to a compute policy, through the public face."""

import json
import shutil
from math import inf
from types import SimpleNamespace

import numpy as np
import pytest

from tests.compute import test_early_exit
from tests.evaluation.conftest import ENV
from vlaflow.cli.main import main
from vlaflow.compute.budget import LADDER, PROFILE
from vlaflow.compute.calibration import Calibration, ShareTarget
from vlaflow.compute.early_exit import EarlyExit, ExitPlan
from vlaflow.compute.thresholds import ExitMeasurements
from vlaflow.data.lerobot import Dataset
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.latent_flow import LatentFlowConfig
from vlaflow.decoders.latent_reader import LatentTokensConfig
from vlaflow.errors import ConfigError
from vlaflow.evaluation import calibrate
from vlaflow.evaluation.calibrate import ByShares, Request, held_out, measure, run, sample
from vlaflow.flows.sampling import Sampling
from vlaflow.policies.base import Policy
from vlaflow.simulators.record import RecordConfig, record
from vlaflow.training.run import Options, train


def latent_flow(dim, chunk_size):
    """A flow behind two latent tokens."""
    return LatentFlowConfig(
        FlowConfig(dim, chunk_size, expert=test_early_exit.EXPERT, masks="synchronous"), LatentTokensConfig(2, 4)
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("calibrate") / "dataset"
    record(RecordConfig((ENV,), 4, size=64), out, workers=0)
    return out


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """A few steps of A1's demo, with exits."""
    out = tmp_path_factory.mktemp("calibrate") / "policy"
    small = {"steps": "3", "global_batch_size": "8", "validation_fraction": "0.5", "validate_every": "3"}
    shape = {
        "backbone.width": "32",
        "backbone.heads": "2",
        "backbone.ffn": "64",
        "backbone.depth": "3",
        "exits.depths": "[1,2,3]",
    }
    expert = {"width": "24", "heads": "2", "kv_heads": "2", "head_dim": "16", "ffn": "48"}
    changes = small | {f"policy.{k}": v for k, v in shape.items()}
    changes |= {f"policy.decoder.expert.block.{k}": v for k, v in expert.items()} | {"policy.backbone.image_size": "64"}
    train("a1.demo", dataset, out, options=Options(changes, tracker="none", command="test", threads=1))
    return out


@pytest.mark.usefixtures("few_timed")
def test_calibrate_bench_and_eval_work_together(trained, dataset, tmp_path, capsys):
    folder = tmp_path / "policy"
    shutil.copytree(trained, folder)
    assert main(["calibrate", str(folder), "--dataset", str(dataset), "--exit-budget", "0.4", "--frames", "40"]) == 0
    made = Calibration.load(folder / "calibration" / "budget-0.4.json")
    assert made.plan.depths == (1, 2, 3)
    assert made.samples == made.effect.samples == 20
    assert sum(made.effect.shares) == pytest.approx(1)
    page = (folder / "calibration" / "budget-0.4.html").read_text()
    assert page.count("<svg") == 3
    assert made.checkpoint in page
    assert main(["bench", "latency", str(folder), "--rounds", "20"]) == 0
    assert {PROFILE} <= {f.name for f in folder.iterdir()}
    names = ("dense", "dense:2,depth=1", "mean:8", "medoid:2+dense:1@0.5", "exit:budget-0.4", "budget:100000")
    computes = [word for name in names for word in ("--compute", name)]
    arguments = ["--env", ENV, "--episodes", "1", "--max-steps", "20", "--steps", "2", "--no-videos", "--workers", "0"]
    assert main(["eval", str(folder), *computes, *arguments, "--out", str(tmp_path / "eval")]) == 0
    found = json.loads((tmp_path / "eval" / "results.json").read_text())
    passes = {e["compute"]: e["layer_passes_per_chunk"] for e in found["evaluations"]}
    assert passes["dense"] == 3 + 2 * 3
    assert passes["dense:2,depth=1"] == 1 + 2 * 1
    assert passes["mean:8"] == 3 + 8 * 2 * 3
    assert passes["medoid:2+dense:1@0.5"] == 3 + 2 * 1 * 3
    assert "ms at p99" in capsys.readouterr().out


def test_risk_is_written_with_what_fresh_frames_show(trained, dataset, tmp_path):
    folder = tmp_path / "policy"
    shutil.copytree(trained, folder)
    words = ["--max-deviation", "100", "--confidence", "0.8", "--frames", "80", "--no-ladder", "--episodes", "all"]
    words += ["--name", "loose"]
    assert main(["calibrate", str(folder), "--dataset", str(dataset), *words]) == 0
    made = Calibration.load(folder / "calibration" / "loose.json")
    assert made.effect.above == 0
    assert made.effect.shares[0] == 1  # nothing deviates by 100 standard deviations, so everybody leaves at once
    words[1], words[3], words[-1] = "0.0", "0.99", "strict"
    assert main(["calibrate", str(folder), "--dataset", str(dataset), *words]) == 0
    assert Calibration.load(folder / "calibration" / "strict.json").effect.shares[-1] == 1


def test_risk_is_tuned_on_some_episodes_and_tested_on_others(trained, dataset):
    opened, policy = Dataset.open(dataset), Policy.from_pretrained(trained)
    frames = sample(policy, opened, range(len(opened.episodes)), 80)
    table = measure(policy, ExitPlan((1, 2, 3)), frames)
    episode_N = opened.columns().episode[frames.windows.rows[frames.index_N]]
    tuning, testing = (set(episode_N[table.choose_N & which]) for which in (table.tuning_N, ~table.tuning_N))
    assert tuning
    assert testing
    assert not tuning & testing


def test_a_ladder_knows_the_steps_of_every_calibration(trained, dataset, tmp_path):
    """Measured again where it does not, and left alone where it does."""
    folder = tmp_path / "policy"
    shutil.copytree(trained, folder)
    ladder = folder / "calibration/ladder.json"

    def calibrated(steps, name):
        words = ["--sampling", str(steps), "--frames", "16", "--name", name]
        assert main(["calibrate", str(folder), "--dataset", str(dataset), *words]) == 0
        return {rung["nfe"] for rung in json.loads(ladder.read_text())["rungs"]}

    assert 4 not in calibrated(2, "two")
    before = ladder.stat().st_mtime_ns
    calibrated(1, "one")
    assert ladder.stat().st_mtime_ns == before
    assert 4 in calibrated(4, "four")
    assert {4, 7} <= calibrated(7, "seven"), "another calibration does not lose the steps of the one before"
    ladder.write_text("{")
    assert {4, 7} <= calibrated(1, "one"), "a damaged one is measured again"


def test_a_name_never_means_something_else_than_before(trained, dataset, tmp_path, monkeypatch, capsys):
    """An evaluation knows a calibration by its name. The same command may make it again, also where it cannot be read."""
    folder = tmp_path / "policy"
    shutil.copytree(trained, folder)
    file = folder / "calibration/budget-0.4.json"
    words = ["calibrate", str(folder), "--dataset", str(dataset), "--no-ladder", "--frames"]
    assert main([*words, "16"]) == 0
    first = file.read_bytes()
    for other, said in (
        (["--exit-distribution", "gamma"], "made with the target's distribution exponential, and this would replace it"),
        (["--sampling", "4"], "made with sampling 2, and this would replace it by one with 4. Give the new one a --name"),
        (["--name", "budget-0.4", "--max-deviation", "1"], "made with the target's max_deviation None"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(calibrate, "measure", None)  # refused before anything is measured
            assert main([*words, "16", *other]) == 2
        assert said in capsys.readouterr().err
    assert file.read_bytes() == first
    assert main([*words, "20"]) == 0
    assert file.read_bytes() != first
    file.write_text("{")
    assert main([*words, "16"]) == 0
    assert Calibration.load(file).samples == 8


@pytest.mark.parametrize("confidence", ["0", "1"])
def test_a_confidence_that_no_frames_can_give_is_refused_first(trained, dataset, confidence, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "measure", None)
    for kind in ([], ["--refine"]):
        words = [
            "calibrate",
            str(trained),
            "--dataset",
            str(dataset),
            *kind,
            "--max-deviation",
            "1",
            "--confidence",
            confidence,
        ]
        assert main(words) == 2
        assert "the risk is 1 − --confidence" in capsys.readouterr().err


@pytest.mark.parametrize("decoder", [FlowConfig, latent_flow], ids=["flow", "latent flow"])
def test_a_calibration_counts_the_layers_that_its_chunks_run(decoder):
    """Those of latent tokens too, which are answered before the solver starts; budgets prefer what runs fewer."""
    made, plan = test_early_exit.policy(decoder=decoder(4, 6)), ExitPlan(test_early_exit.DEPTHS, sampling=Sampling(3))
    equal, ones, half = np.zeros((8, 3)), np.ones((8, 3)), np.arange(8) % 2 == 0
    frames = SimpleNamespace(windows=SimpleNamespace(dataset=SimpleNamespace(fingerprint="dd")))
    for discrepancy, thresholds in ((equal, (inf, inf, inf)), (ones, (-inf, -inf, inf))):
        table = ExitMeasurements(discrepancy, equal, equal, ones, half, half)
        target = SimpleNamespace(choose=lambda _, chosen=thresholds: (np.array(chosen), ShareTarget("gamma", 1, True, ())))
        effect = calibrate.calibrate(made, plan, frames, table, target=target, checkpoint="aa").effect
        taken = test_early_exit.decode(made, EarlyExit(plan, thresholds))
        assert (effect.layer_passes, effect.nfe) == (taken.layer_passes[0], taken.nfe[0])


def test_no_episode_is_in_both_halves_and_none_was_learned_from(trained, dataset):
    opened = Dataset.open(dataset)
    held = held_out(trained, opened)
    assert len(held) == 2
    frames = sample(Policy.from_pretrained(trained), opened, held, 40)
    episode_N = opened.columns().episode[frames.windows.rows[frames.index_N]]
    assert set(episode_N) == set(held)
    assert not set(episode_N[frames.choose_N]) & set(episode_N[~frames.choose_N])


def test_same_seed_same_bytes(trained, dataset, tmp_path):
    made = []
    for name in ("one", "two"):
        folder = tmp_path / name
        shutil.copytree(trained, folder)
        made.append(run(folder, dataset, Request("x", ByShares(budget=0.8), frames=40, ladder=name == "one")).calibration)
    assert made[0] == made[1]
    ladder = json.loads((tmp_path / "one" / "calibration" / LADDER).read_text())
    full = max(ladder["rungs"], key=lambda r: (r["depth"], r["nfe"]))
    assert full["deviation"] == 0
    assert len(ladder["rungs"]) == 3 * 5
    assert np.isfinite([r["error"] for r in ladder["rungs"]]).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--exit-budget", "0.4", "--max-deviation", "1"], "either --exit-budget or --max-deviation"),
        (["--depths", "1", "5"], "answers at depth 5"),
        (["--depths", "1", "2"], "The last of the depths must be the full one, 3, got [1, 2]"),
        (["--max-deviation", "1"], "take more episodes"),
        (["--name", "ladder"], "cannot be named"),
        (["--exit-budget", "-1"], "--exit-budget must be above 0, got -1"),
    ],
)
def test_what_cannot_be_is_one_sentence(trained, dataset, arguments, words, capsys):
    assert main(["calibrate", str(trained), "--dataset", str(dataset), "--frames", "16", *arguments]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert words in said


def test_a_place_that_cannot_be_written_is_one_sentence_before_anything_is_measured(trained, dataset, tmp_path, capsys):
    folder = tmp_path / "policy"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("calibration"))
    (folder / "calibration").write_text("a file")
    assert main(["calibrate", str(folder), "--dataset", str(dataset), "--frames", "16"]) == 2
    said = capsys.readouterr().err
    assert "calibrate a copy of the checkpoint" in said
    assert said.count("\n") == 1


def test_a_checkpoint_without_its_training_folder_says_how_to_go_on(trained, dataset, tmp_path, capsys):
    folder = tmp_path / "policy"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("training"))
    arguments = ["calibrate", str(folder), "--dataset", str(dataset), "--frames", "16", "--no-ladder"]
    assert main(arguments) == 2
    assert "--episodes all" in capsys.readouterr().err
    assert main([*arguments, "--episodes", "all"]) == 0


def test_a_policy_without_exits_has_nothing_to_calibrate(bare_checkpoint, dataset):
    with pytest.raises(ConfigError, match=r"with its full depth \(1\) as the only exit, so there is nothing to calibrate"):
        run(bare_checkpoint, dataset, Request("any", ByShares()))
