"""One result for any layout: a step's parts, their weights and the run's state do not depend on how many processes train."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.training.layouts import LORA, STACKS, everything, trainer
from tests.training.small import CPU, Memory, as_it_is, tiny_config
from vlaflow.data.augment import Augment, StateMask
from vlaflow.errors import CheckpointError, ConfigError
from vlaflow.policies.base import Policy
from vlaflow.policies.stages import CoTraining
from vlaflow.training.loader import Loader, alternating
from vlaflow.training.metrics_log import read_log
from vlaflow.training.pieces import Pieces, piece
from vlaflow.training.team import LONGEST, Team


def losses(folder):
    return [entry["loss"] for entry in read_log(folder)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_steps_parts_are_the_same_on_any_number_of_processes(world):
    """Samples, augmentations and noise, in the same order."""
    config = tiny_config(global_batch_size=8, accumulate=4, augment=Augment(), state_mask=StateMask(0.5))
    alone = Loader(Memory(), config, Team(), CPU, as_it_is).step(3)
    loaders = [Loader(Memory(), config, Team(rank, world), CPU, as_it_is) for rank in range(world)]
    for one, other in zip(alone, [part for loader in loaders for part in loader.step(3)], strict=True):
        assert torch.equal(one.batch.observation.images["front"], other.batch.observation.images["front"])
        assert torch.equal(one.batch.observation.known_BS, other.batch.observation.known_BS)
        assert torch.equal(one.batch.action_BLD, other.batch.action_BLD)
        assert one.drawn.numbers == other.drawn.numbers


def test_a_step_has_as_many_parts_as_its_recipe_its_processes_and_its_past_ask_for():
    config = tiny_config(global_batch_size=24)
    assert config.parts() == 1
    assert config.parts(2) == 2
    assert config.parts(1, before=2) == 2
    assert replace(config, accumulate=4).parts(6) == 12


@pytest.mark.parametrize(("size", "near"), [(62, 64), (67, 64), (3, 8)])
def test_a_batch_that_cannot_be_split_names_the_nearest_that_can(size, near):
    config = tiny_config(global_batch_size=size)
    with pytest.raises(ConfigError, match=rf"{size} samples \(global_batch_size\).*8 parts.*global_batch_size={near}\."):
        config.parts(8)
    assert replace(config, global_batch_size=near).parts(8) == 8
    with pytest.raises(ConfigError, match=rf"accumulate 8\)\. The nearest .*={near}\."):
        replace(config, accumulate=8)


def test_a_begun_run_is_told_on_how_many_processes_it_can_go_on():
    with pytest.raises(ConfigError, match="Continue the run on a number of processes that divides 4"):
        tiny_config(global_batch_size=8).parts(3, before=4)


def test_questions_are_split_as_actions_are():
    acting = Loader(Memory(), tiny_config(accumulate=4), Team(), CPU, as_it_is)
    with pytest.raises(ConfigError, match=r"6 samples \(vqa\.batch_size\).*4 parts .*--set vqa\.batch_size=8\."):
        alternating(acting, CoTraining(Memory(), None, 0.5, batch_size=6))


# -- a small Qwen2.5-VL, sharded by layer ------------------------------------------------------------------------------

ROUNDING = 1e-5
"""Largest relative difference of a loss: the norm that gradients are clipped to is summed in another order, then six steps."""


@pytest.fixture(scope="session")
def layouts(tmp_path_factory):
    pytest.importorskip("transformers")
    out = tmp_path_factory.mktemp("layouts")
    everything(out)
    return out


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("layout", ["copies", "sharded"])
def test_copies_and_shards_learn_what_one_process_learns(layouts, layout, stack):
    assert len(losses(layouts / f"one-{stack}")) == 6
    assert losses(layouts / f"{layout}-{stack}") == pytest.approx(losses(layouts / f"one-{stack}"), rel=ROUNDING)


def test_recomputed_activations_change_nothing_and_bfloat16_little(layouts):
    assert losses(layouts / "recomputed") == pytest.approx(losses(layouts / "sharded-expert"), rel=ROUNDING)
    assert losses(layouts / "rounded") == pytest.approx(losses(layouts / "one-shared"), rel=0.02)


def test_adapters_are_sharded_and_merged_like_everything_else(layouts):
    """On the smol backbone; every process writes its rows of the pretrained weights too, and one process could go on."""
    one, two = layouts / "one-lora", layouts / "sharded-lora"
    assert losses(two) == pytest.approx(losses(one), rel=ROUNDING)
    ours, theirs = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert not any("lora" in name for name in theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=1e-4)  # steps of 1e-3
    run = trainer(two, name="smol", lora=LORA)
    run._begin()
    assert run.step == 6


@pytest.mark.parametrize("run", ["moved", "killed"])
def test_a_run_goes_on_with_other_processes_as_if_nothing_had_happened(layouts, run):
    """From two to one to two; and on one, after one of two was killed."""
    assert losses(layouts / run) == pytest.approx(losses(layouts / "one-shared"), rel=ROUNDING)
    state = json.loads((layouts / run / "training/step-000006/state.json").read_text())
    assert (state["processes"], state["parts"]) == ({"moved": 2, "killed": 1}[run], 2)
    assert Policy.from_pretrained(layouts / run)


def test_two_processes_of_which_one_was_killed_come_to_the_same_bytes(layouts):
    """SIGKILL in step 4, continued by two from the checkpoint of step 2: weights, averages, moments and the policy."""
    whole, again = layouts / "sharded-shared", layouts / "killed-again"
    for file in (*pieces_of(whole), whole / "model.safetensors"):
        assert (again / file.relative_to(whole)).read_bytes() == file.read_bytes()
    assert len(pieces_of(again)) == len(pieces_of(whole)) == 6


@pytest.mark.parametrize("stack", STACKS)
def test_two_layers_at_most_are_whole_and_a_save_gathers_no_weights(layouts, stack):
    """A layer that runs and the one that is fetched meanwhile; what is sent while saving are sentences, which are empty."""
    for rank in (0, 1):
        found = json.loads((layouts / f"sharded-{stack}/rank-{rank}.json").read_text())
        assert found["layers"] <= 2 * found["layer"]
        assert len(found["saved"]) == 3
        assert max(found["saved"]) <= 6 * LONGEST < found["layer"]


@pytest.mark.parametrize("stack", STACKS)
def test_no_process_holds_pretrained_weights_before_they_are_shared(layouts, stack):
    """The first one holds what is drawn at random, decoder and state's projection; the others nothing."""
    first, other = (json.loads((layouts / f"sharded-{stack}/rank-{rank}.json").read_text())["built"] for rank in (0, 1))
    weights = load_file(layouts / f"sharded-{stack}/model.safetensors")
    drawn = sum(t.nbytes for name, t in weights.items() if not name.startswith(("backbone.network.", "backbone.head.")))
    assert (first, other) == (drawn, 0)


def pieces_of(folder):
    return sorted(folder.glob("training/step-000006/*.safetensors"))


def test_each_process_writes_its_rows_and_the_policy_is_put_together(layouts):
    """Half of the rows in each file; the policy has the averages, whole."""
    folder = layouts / "sharded-shared"
    assert [file.name for file in pieces_of(folder)] == [
        f"{group}-0000{n}-of-00002.safetensors" for group in ("average", "optimizer", "weights") for n in (1, 2)
    ]
    policy = load_file(folder / "model.safetensors")
    with Pieces(folder / "training/step-000006", "average", 2) as average:
        assert all(torch.equal(policy[name], average[name]) for name in average)
        assert {name for name in policy if name not in average} == set()
    sizes = [sum(t.numel() for t in load_file(file).values()) for file in pieces_of(folder)[4:]]
    assert abs(sizes[0] - sizes[1]) < 0.05 * sum(sizes)


def test_a_process_that_reads_a_changed_row_notices(layouts):
    """A flipped bit leaves a finite number. Other files are read by other processes."""
    state = shutil.copytree(layouts / "sharded-shared", layouts / "flipped") / "training/step-000006"
    file = piece(state, "optimizer", 1, 2)
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    with safe_open(piece(state, "optimizer", 0, 2), "pt") as first:
        name = next(iter(first.keys()))
    with Pieces(state, "optimizer", 2) as optimizer:
        assert optimizer.rows(name, 0, 1).isfinite().all()
        with pytest.raises(CheckpointError, match=r"optimizer-00002-of-00002\.safetensors is not as it was saved"):
            [optimizer[name] for name in optimizer]


@pytest.mark.parametrize(
    ("group", "damage", "message"),
    [
        ("optimizer", "file", r"optimizer-00002-of-00002\.safetensors cannot be read"),
        ("weights", "rows", r"do not hold each of the \d+ rows of '.*' once"),
        ("optimizer", "moment", r"do not hold each of|of the optimizer's"),
    ],
)
def test_a_missing_file_row_or_moment_is_refused(layouts, group, damage, message):
    out = shutil.copytree(layouts / "sharded-shared", layouts / f"without-{damage}")
    file = piece(out / "training/step-000006", group, 1, 2)
    with safe_open(file, framework="pt") as handle:
        about, tensors = handle.metadata(), {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    if damage == "file":
        file.unlink()
    else:
        save_file(dict(list(tensors.items())[1:]), file, about)
    with pytest.raises(CheckpointError, match=message):
        trainer(out).run()
