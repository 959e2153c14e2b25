"""Training a latent action model: by recipe, resumed, in two processes; what it refuses."""

import shutil
from dataclasses import replace

import pytest
import torch

from tests.data.toyset import edit_info, without_actions
from tests.training.latents import OFTEN, SMALL, Pairs, latent_config, latent_stage, train
from tests.training.small import Cut, weights
from tests.training.two_robots import write_twin, write_wide
from vlaflow.actions.latent import LatentActionModel
from vlaflow.actions.stored_latent import StoredLatentModel
from vlaflow.cli import train as command
from vlaflow.data.lerobot import Dataset
from vlaflow.data.windows import split_episodes
from vlaflow.errors import CapabilityError, ConfigError, DataError, SpecError
from vlaflow.policies.iflybot.codes import dataset_codes, model_pairs
from vlaflow.policies.recipe import DataSpec
from vlaflow.policies.stages import LatentStage
from vlaflow.training import run
from vlaflow.training.metrics_log import read_log
from vlaflow.training.options import Options
from vlaflow.training.recipes import find_recipe


def changed(config, **changes):
    """The config with another care of the codebook."""
    objective = config.objective
    return replace(config, objective=replace(objective, replacement=replace(objective.replacement, **changes)))


@pytest.mark.parametrize("every", [2, 5])
def test_a_run_that_was_cut_ends_with_the_same_bytes(tmp_path, every):
    """After step 4 the statistics are fresh with every = 2 and half gathered with every = 5; both must be restored."""
    config = latent_config(steps=10)
    config = changed(config, every=every)
    train(tmp_path / "whole", config)
    with pytest.raises(RuntimeError, match="cut"):
        train(tmp_path / "cut", config, Cut(Pairs()))
    train(tmp_path / "cut", config)
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")
    for name in ("weights", "optimizer", "average"):
        whole, cut = ((tmp_path / run / f"training/step-000010/{name}.safetensors").read_bytes() for run in ("whole", "cut"))
        assert whole == cut


def test_entries_move_in_training(tmp_path):
    """Where they never move, unused ones keep their first values to the bit (they get no gradient and do not decay)."""
    fixed = latent_config(ema_decay=None)
    fixed = changed(fixed, until=0.0)
    first = latent_stage(fixed).module.book.entry_VE.detach().clone()
    kept = [
        torch.equal(row, before)
        for row, before in zip(train(tmp_path / "a", fixed)[0].module.book.entry_VE, first, strict=True)
    ]
    moved = train(tmp_path / "b", latent_config(ema_decay=None))[0].module.book.entry_VE
    assert any(kept)
    assert not any(torch.equal(row, before) for row, before in zip(moved, first, strict=True))


def test_training_learns(tmp_path):
    """The images roll by three rows; forty steps on eight of them lower the error by a quarter."""
    config = latent_config(steps=40, global_batch_size=8, ema_decay=None, checkpoint_every=100, validate_every=100)
    config = replace(config, optim=replace(config.optim, learning_rate=5e-3))
    train(tmp_path / "p", config, Pairs(8))
    pixels = [entry["parts"]["pixels"] for entry in read_log(tmp_path / "p")]
    assert sum(pixels[-5:]) < 0.75 * sum(pixels[:5])


def test_an_action_head_adds_its_error_and_teaches_the_encoder(tmp_path):
    config = latent_config(model=replace(SMALL, action_dim=2))
    stage = latent_stage(config)
    torch.nn.init.zeros_(stage.module.decoder.leave.weight)  # no gradient from the pixels
    batch = Pairs().batch(torch.arange(4).numpy())
    terms = stage.loss(batch, stage.draw(batch, torch.Generator().manual_seed(0), torch.Generator()))
    assert terms.total.item() == pytest.approx(float(terms.parts["pixels"] + 0.01 * terms.parts["action"]), rel=1e-5)
    terms.total.backward()
    assert stage.module.encoder.project.weight.grad.abs().sum() > 0
    train(tmp_path / "p", config)
    assert "action" in read_log(tmp_path / "p")[-1]["parts"]


def test_an_action_head_needs_a_normaliser():
    model = latent_stage(latent_config(model=replace(SMALL, action_dim=2))).model
    with pytest.raises(CapabilityError, match="needs a normaliser"):
        LatentStage(model, OFTEN, 10)


TINY = ("image_size=32", "patch=4", "width=16", "heads=2", "ffn=32", "spatial=1", "decoder=1", "code_dim=4")


def arguments(dataset, out, *more):
    small = [word for value in TINY for word in ("--set", f"model.{value}")]
    places = [
        "--dataset",
        str(dataset),
        "--out",
        str(out),
        "--tracker",
        "none",
        "--no-calibrate",
        "--steps",
        "3",
        "--batch-size",
        "4",
    ]
    return ["iflybot.latent", *places, *small, *more]


def test_the_recipe_makes_a_model_that_says_where_it_comes_from(dataset, tmp_path, capsys):
    assert command.main(arguments(dataset, tmp_path / "m", "--set", "gap_s=0.3")) == 0
    model = LatentActionModel.from_pretrained(tmp_path / "m")
    origin, opened = model.origin, Dataset.open(dataset)
    assert (origin.dataset, origin.view, origin.rate_hz, origin.gap_s, origin.gap) == (opened.fingerprint, "front", 10, 0.3, 3)
    assert (origin.held_out, origin.seed) == (0.06, 0)
    card = (tmp_path / "m/README.md").read_text()
    for part in ("8 codes of 32", "0.3 s apart (3 frames at 10 per second)", "iflybot.latent", "Steps: 3 of 4", origin.dataset):
        assert part in card
    entry = read_log(tmp_path / "m")[-1]
    assert 1 <= entry["parts"]["perplexity"] <= 32
    assert entry["validation"]["loss"] == pytest.approx(entry["validation"]["pixels"])


def test_episodes_without_a_pair_are_counted_aloud(dataset, tmp_path, capsys):
    """Of lengths 9 … 14 at 10 per second."""
    assert command.main(arguments(dataset, tmp_path / "m", "--set", "gap_s=1.1", "--set", "validation_fraction=0")) == 0
    assert "For training: 3 of 6 episodes are not longer than the gap of 1.1 s (11 frames)" in capsys.readouterr().err


def test_held_out_episodes_without_a_pair_stop_no_training(dataset, tmp_path, capsys):
    """Seeds decide which are held out; where the long ones are, it is the training that has none, and says of how many."""
    opened, gap = Dataset.open(dataset), ["--set", "gap_s=1.2"]
    lengths = [episode.length for episode in opened.episodes]
    longest = {seed: [max(lengths[e] for e in part) for part in split_episodes(opened, 0.06, seed)] for seed in range(9)}
    seed = next(seed for seed, (_, held) in longest.items() if held <= 12)
    assert command.main(arguments(dataset, tmp_path / "m", *gap, "--set", f"seed={seed}")) == 0
    assert "Held out: none of the 2 episodes is longer than the gap" in capsys.readouterr().err
    assert "validation" not in read_log(tmp_path / "m")[-1]
    seed = next(seed for seed, (train, _) in longest.items() if train <= 12)
    with pytest.raises(DataError, match=r"None of the 4 chosen episodes of .* is longer than .*; the longest has 12 frames"):
        command.main(arguments(dataset, tmp_path / "n", *gap, "--set", f"seed={seed}"))


def test_video_alone_is_enough(dataset, tmp_path, monkeypatch):
    """A data set that says neither what its actions mean nor holds any."""
    copy = shutil.copytree(dataset, tmp_path / "video")
    without_actions(copy)
    assert command.main(arguments(copy, tmp_path / "m")) == 0
    assert LatentActionModel.from_pretrained(tmp_path / "m").origin.view == "front"
    with pytest.raises(SpecError, match=r"action_dim is 2, but the actions of .* have 0 dimensions"):
        command.main(arguments(copy, tmp_path / "n", "--set", "model.action_dim=2"))
    with pytest.raises(DataError, match="has no feature 'action'"):
        command.main(["asyncvla.demo", "--dataset", str(copy), "--out", str(tmp_path / "p")])
    edit_info(copy, features={})
    with pytest.raises(DataError, match="has no camera"):
        command.main(arguments(copy, tmp_path / "o"))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (["--policy", "nowhere"], ConfigError, "starts from scratch; leave --policy out"),
        (["--tokenizer", "x.json"], ConfigError, "no use for the action tokenizer"),
        (["--set", "gap_s=60"], DataError, "None of the 4 chosen episodes of .* is longer than the gap of 60 s"),
        (["--set", "gap_s=0.01"], ConfigError, "less than one frame"),
        (["--set", "view=frnt"], DataError, "did you mean 'front'"),
        (["--set", "shift=2"], ConfigError, "taken as they are"),
    ],
)
def test_wrong_arguments_are_one_sentence(dataset, tmp_path, change, kind, message):
    with pytest.raises(kind, match=message):
        command.main(arguments(dataset, tmp_path / "m", *change))


def test_a_data_set_of_video_alone_trains_no_policy():
    """And the sentence names what is missing, whatever the recipe makes of an action dimension of 0."""
    data = DataSpec(3, 0, ("front",))
    assert find_recipe("iflybot.latent").config(data).objective.makes == "latent"
    assert not find_recipe("iflybot.latent").continues
    with pytest.raises(ConfigError, match=r"'dfm_vla\.demo' learns from actions\. The data set has none"):
        find_recipe("dfm_vla.demo").config(data)


@pytest.mark.parametrize("view", ["front", "wrist"])
def test_codes_are_of_the_views_that_the_model_learned_from(view, tmp_path):
    """Also those of a data set without its view, whether that is its first one or not; a stranger's is not guessed."""
    roots = write_twin(tmp_path / "lacking", "xyz", ["side"]), write_wide(tmp_path / "wide")
    config = latent_config(steps=1, validation_fraction=0.3)

    def trained(out, view):
        own = replace(config, objective=replace(config.objective, view=view))
        run.train_stage(own, [str(root) for root in roots], out, name="t", options=Options(tracker="none"))
        return out

    model = StoredLatentModel.open(trained(tmp_path / "latent", view))
    lacking, wide = (Dataset.open(root) for root in roots)
    assert [model_pairs(model, each).view for each in (lacking, wide)] == ["side", view]
    assert dataset_codes(model, lacking).id_NK.max() >= 0
    with pytest.raises(DataError, match=f"has no view '{view}'"):
        model_pairs(model, Dataset.open(write_twin(tmp_path / "stranger", "xyz", ["top"])))
    with pytest.raises(DataError, match="no view 'wrsit'"):
        trained(tmp_path / "unknown", "wrsit")
