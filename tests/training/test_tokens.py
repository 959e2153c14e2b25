"""Decoders of tokens trained by recipe: the tokenizer fitted or given, fewer demonstrations, resuming."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.training.small import weights, write_dataset
from vlaflow.cli.main import main
from vlaflow.config import override
from vlaflow.data.filters import Filtered, filtered
from vlaflow.data.lerobot import Dataset
from vlaflow.data.windows import action_chunks, fewer_episodes, split_episodes
from vlaflow.errors import ConfigError
from vlaflow.policies import mixing
from vlaflow.policies.base import Policy
from vlaflow.policies.mixing import alone, robots_of
from vlaflow.policies.recipe import DataSpec
from vlaflow.policies.stages import PolicyStage
from vlaflow.training.recipes import find_recipe
from vlaflow.training.run import Options, train

SMALL = {
    f"policy.backbone.{k}": v for k, v in {"width": "32", "depth": "1", "heads": "2", "ffn": "64", "image_size": "32"}.items()
}
SMALL |= {
    "policy.decoder.chunk_size": "4",
    "policy.n_action_steps": "2",
    "steps": "6",
    "global_batch_size": "4",
    "checkpoint_every": "3",
}
SMALL |= {"validate_every": "3", "pauses": "none", "validation_fraction": "0.3"}
FIT = {"policy.decoder.tokenizer.scale": "3"}
RECIPES = (
    "dfm_vla.demo",
    "dfm_vla.demo_head",
    "dfm_vla.demo_ordered",
    "dfm_vla.demo_fast",
    "baselines.fast_ar",
    "baselines.coefficients_ar",
    "baselines.masked_diffusion",
)


def run(recipe, dataset, out, *, tokenizer=None, **changes):
    overrides = SMALL | ({} if "bins" in recipe or recipe == "baselines.flow" else FIT) | changes
    return train(recipe, dataset, out, options=Options(overrides, "none", tokenizer=tokenizer, threads=1))


@pytest.mark.parametrize("recipe", [*RECIPES, "dfm_vla.demo_bins", "dfm_vla.demo_slots", "baselines.flow"])
def test_every_demo_trains_saves_its_tokenizer_and_acts(recipe, dataset, tmp_path):
    outcome = run(recipe, dataset, tmp_path / "policy")
    assert outcome.finished
    assert np.isfinite(outcome.loss)
    policy = Policy.from_pretrained(tmp_path / "policy")
    batch = next(_observations(dataset))
    chunk = policy.act(batch, generator=torch.Generator().manual_seed(0))
    assert chunk.actions.shape == (4, 2)
    if recipe != "baselines.flow":
        tokenizer = policy.model.decoder.tokenizer
        assert policy.config.decoder.tokenizer == tokenizer
        assert chunk.tokens.shape == (tokenizer.slots,)


@pytest.mark.parametrize("recipe", ["dfm_vla.demo_bins", "baselines.fast_ar", "baselines.coefficients_ar"])
def test_an_outlier_takes_no_part_in_the_fit_of_a_tokenizer(recipe, tmp_path):
    opened = Dataset.open(write_dataset(tmp_path / "dataset", longer=40))
    config = find_recipe(recipe).config(DataSpec.of(opened.root))
    config = override(config, {"filters": "{}", "pauses": "none"})
    row = opened.episode_slice(config.episodes(opened)[0][0]).start + 3
    fits = []
    for wrong in (100.0, 1000.0):
        opened.columns().action[row] = wrong
        assert np.flatnonzero(filtered(opened, config.filters).outlier_N).tolist() == [row]
        fits.append(config.objective.create(config, opened).model.decoder.tokenizer)
    assert fits[0] == fits[1]


def test_a_tokenizer_without_a_chunk_to_fit_says_what_to_change(dataset, monkeypatch):
    opened = Dataset.open(dataset)
    config = replace(find_recipe("dfm_vla.demo_bins").config(DataSpec.of(dataset)), pauses=None)
    robots = robots_of(config.objective.policy, config, [alone(opened)])
    every = Filtered({"outliers": np.ones(len(opened), bool)})
    monkeypatch.setattr(mixing, "filtered", lambda *_: every)
    with pytest.raises(ConfigError, match=r"--set filters\.outliers=none"):
        mixing.normalised_chunks(config.objective.policy, config, [alone(opened)], robots)


def _observations(dataset):
    from vlaflow.spec import Observation

    yield Observation({"front": np.zeros((32, 32, 3), np.uint8)}, np.zeros(3, np.float32), Dataset.open(dataset).tasks[0])


def test_a_run_that_broke_off_continues_to_the_same_bytes(dataset, tmp_path, monkeypatch, capsys):
    run("dfm_vla.demo", dataset, tmp_path / "whole")
    loss, half = PolicyStage.loss, tmp_path / "halves/training/step-000003"

    def breaks(self, *arguments):
        if half.exists():
            raise OSError("power cut")
        return loss(self, *arguments)

    monkeypatch.setattr(PolicyStage, "loss", breaks)
    with pytest.raises(OSError, match="power cut"):
        run("dfm_vla.demo", dataset, tmp_path / "halves")
    monkeypatch.undo()
    capsys.readouterr()
    run("dfm_vla.demo", dataset, tmp_path / "halves")
    assert "Training: 6/6" in capsys.readouterr().err  # of the whole training
    assert weights(tmp_path / "whole") == weights(tmp_path / "halves")


def test_a_tokenizer_file_is_used_as_it_is(dataset, tmp_path, capsys):
    file = tmp_path / "tokens.json"
    command = [
        "data",
        "fit-tokenizer",
        str(dataset),
        "--out",
        str(file),
        "--chunk-size",
        "4",
        "--scale",
        "2",
        "--vocabulary",
        "64",
    ]
    assert main(command) == 0
    assert "tokens per chunk of 4" in capsys.readouterr().out
    run("baselines.fast_ar", dataset, tmp_path / "policy", tokenizer=file)
    saved = json.loads((tmp_path / "policy/config.json").read_text())["decoder"]["tokenizer"]
    written = json.loads(file.read_text())["tokenizer"]
    assert saved == written
    with pytest.raises(ConfigError, match="no vocabulary"):
        run("baselines.flow", dataset, tmp_path / "flow", tokenizer=file)
    with pytest.raises(ConfigError, match="no vocabulary"):  # whatever its normalisation
        run("baselines.flow", dataset, tmp_path / "flow", tokenizer=file, **{"policy.action_normalisation": "min_max"})
    with pytest.raises(ConfigError, match=r"chunks of 4 actions.*fit-tokenizer --chunk-size 3$"):
        run("baselines.fast_ar", dataset, tmp_path / "other", tokenizer=file, **{"policy.decoder.chunk_size": "3"})
    with pytest.raises(ConfigError, match="normalised by 'quantile'"):
        run("baselines.fast_ar", dataset, tmp_path / "other", tokenizer=file, **{"policy.action_normalisation": "min_max"})


@pytest.mark.parametrize("kind", ["fast", "bins"])
def test_fitting_by_command_twice_gives_the_same_file(kind, dataset, tmp_path):
    files = [tmp_path / f"{i}.json" for i in range(2)]
    for file in files:
        assert main(["data", "fit-tokenizer", str(dataset), "--out", str(file), "--chunk-size", "4", "--kind", kind]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("recipe", ["baselines.fast_ar", "dfm_vla.demo_bins"])
def test_a_file_is_fitted_to_the_numbers_that_training_feeds_its_tokenizer(recipe, dataset, tmp_path, capsys):
    """What is clipped and what is kept as it is changes the numbers, so a tokenizer of others would not fit them."""
    own = {"policy.action_clip": "0.5", "policy.kept_actions": '["x"]', "validation_fraction": "0.06", "steps": "1"}
    run(recipe, dataset, tmp_path / "policy", **own)
    trained = json.loads((tmp_path / "policy/config.json").read_text())["decoder"]["tokenizer"]
    command = ["data", "fit-tokenizer", str(dataset), "--out", str(tmp_path / "same.json"), "--chunk-size", "4"]
    command += ["--kind", "bins"] if "bins" in recipe else ["--scale", "3"]
    assert main([*command, "--action-clip", "0.5", "--kept-actions", "x"]) == 0
    assert "Fitting: 3/3" in capsys.readouterr().err
    assert json.loads((tmp_path / "same.json").read_text())["tokenizer"] == trained
    run(recipe, dataset, tmp_path / "given", tokenizer=tmp_path / "same.json", **own)
    again = [
        "data",
        "fit-tokenizer",
        "--kept-actions",
        "x",
        "--out",
        str(tmp_path / "again.json"),
        str(dataset),
    ]  # as an error says
    assert main([*again, *command[5:], "--action-clip", "0.5"]) == 0
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "same.json").read_bytes()
    assert main([*command[:4], str(tmp_path / "other.json"), *command[5:]]) == 0
    for file, changes in (("other", own), ("same", own | {"policy.kept_actions": "[]"})):
        with pytest.raises(ConfigError, match=r"Fit it again: vlaflow data fit-tokenizer .*--action-clip 0\.5"):
            run(recipe, dataset, tmp_path / "refused", tokenizer=tmp_path / f"{file}.json", **changes)


def test_the_tokenizer_report_compares_files_and_standard_sizes(dataset, tmp_path, capsys):
    file = tmp_path / "bins.json"
    main(["data", "fit-tokenizer", str(dataset), "--out", str(file), "--chunk-size", "4", "--kind", "bins", "--bins", "16"])
    page = tmp_path / "pages/report.html"
    assert main(["data", "tokenizer-report", str(dataset), "--out", str(page), "--tokenizer", str(file)]) == 0
    assert "bins: 16 bins" in page.read_text()
    assert main(["data", "tokenizer-report", str(dataset), "--out", str(page), "--tokenizer", str(file), "--action-clip", "1"])
    assert "with action_clip 1" in capsys.readouterr().err
    assert main(["data", "tokenizer-report", str(dataset), "--out", str(page), "--chunk-size", "4"]) == 0
    text = page.read_text()
    for name in ("FAST, scale 10, 256 ids", "coefficients, scale 10", "64 bins, quantile"):
        assert name in text
    assert text.count("<svg") == 3
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "repaired" in capsys.readouterr().out


def test_fewer_demonstrations_are_a_part_of_more_and_leave_the_held_out_ones_alone(dataset, tmp_path):
    opened = Dataset.open(dataset)
    train_episodes, held = split_episodes(opened, 0.3, 0)
    half, some = (fewer_episodes(opened, train_episodes, share, 0) for share in (0.5, 0.01))
    assert set(some) <= set(half) <= set(train_episodes)
    assert not set(half) & set(held)
    assert {opened.episodes[e].task for e in some} == {opened.episodes[e].task for e in train_episodes}
    run("baselines.flow", dataset, tmp_path / "policy", demonstrations="0.5")
    assert f"{len(half)} for training, {len(held)} held out" in (tmp_path / "policy/README.md").read_text()
    for wrong in (0.0, 1.5):
        with pytest.raises(ConfigError, match=r"in \(0, 1\]"):
            fewer_episodes(opened, train_episodes, wrong, 0)


def test_chunks_are_those_of_the_windows(dataset):
    from vlaflow.data.frames import FrameCache
    from vlaflow.data.windows import Windows

    opened = Dataset.open(dataset)
    windows = Windows(opened, FrameCache.open(opened, 32, ["front"]), 4, episodes=(0, 2))
    expected = windows.batch(np.arange(len(windows))).action_BLD
    np.testing.assert_array_equal(action_chunks(opened, 4, (0, 2)), expected)
