"""What is not finite is neither saved nor continued from, and the checkpoint before is there to go back to."""

import re
from math import inf, nan

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.small import Cut, Memory, tiny_config, weights
from tests.training.test_trainer import run
from vlaflow.cli.main import main
from vlaflow.errors import CheckpointError
from vlaflow.policies.base import Policy
from vlaflow.policies.provenance import newest_state, training_states
from vlaflow.policies.stages import PolicyStage
from vlaflow.training.divergence import DivergedError

STEPS = "training/step-{:06d}"


def poison(folder, name, change):
    """Change the first tensor of a training state's file that is a matrix; returns its name."""
    file = folder / f"{name}.safetensors"
    tensors = load_file(file)
    key = next(key for key, tensor in tensors.items() if tensor.ndim == 2)
    tensors[key] = change(tensors[key])
    save_file(tensors, file)
    return key


def overflow(parameter):
    with torch.no_grad():
        parameter.view(-1)[0] = inf


@pytest.mark.parametrize("held_out", ["0", "0.34"])
def test_a_rate_that_makes_weights_too_large_leaves_no_checkpoint(dataset, tmp_path, capsys, held_out):
    """The step's own loss is sound, and its weights are finite, but nothing can be computed with them any more."""
    command = [
        "train",
        "asyncvla.demo",
        "--dataset",
        str(dataset),
        "--out",
        str(tmp_path / "p"),
        "--tracker",
        "none",
        "--no-calibrate",
    ]
    command += [
        "--steps",
        "1",
        "--batch-size",
        "4",
        "--set",
        "optim.learning_rate=1e38",
        "--set",
        f"validation_fraction={held_out}",
    ]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert re.search(r"loss.* is (nan|inf) after step 1 of 1, so\s+nothing is saved\. Lower optim\.learning_rate\.", said)
    assert "Traceback" not in said
    assert newest_state(tmp_path / "p") is None
    assert not (tmp_path / "p/model.safetensors").exists()


def test_weights_that_overflow_later_leave_the_checkpoint_before(tmp_path, monkeypatch):
    after_step = PolicyStage.after_step

    def broken(self, step, shared):
        after_step(self, step, shared)
        if step == 3:
            overflow(self.policy.model.decoder.codec.head[-1].bias)

    monkeypatch.setattr(PolicyStage, "after_step", broken)
    with pytest.raises(DivergedError, match=r"'decoder.* \(weights\) holds .* step 4 of 6.* checkpoint of step 2 is untouched"):
        run(tmp_path)
    assert newest_state(tmp_path)[0] == 2
    Policy.from_pretrained(tmp_path)


def test_a_held_out_loss_that_is_no_number_stops_the_run_before_it_is_saved(tmp_path):
    poisoned = Memory(9, poisoned=4)
    with pytest.raises(DivergedError, match=r"held-out loss is nan after step 3 of 6.*checkpoint of step 2 is untouched"):
        run(tmp_path, held=poisoned)
    assert newest_state(tmp_path)[0] == 2


def test_the_last_two_training_states_are_kept_and_either_continues_to_the_same_bytes(tmp_path):
    with pytest.raises(RuntimeError, match="cut"):
        run(tmp_path / "p", source=Cut(Memory()))
    assert [step for step, _ in training_states(tmp_path / "p")] == [2, 4]
    poison(tmp_path / "p" / STEPS.format(4), "weights", lambda tensor: tensor * nan)
    with pytest.raises(CheckpointError, match=r"holds NaN .*Delete .*step-000004 to continue from step 2\."):
        run(tmp_path / "p")
    for file in (tmp_path / "p" / STEPS.format(4)).iterdir():
        file.unlink()
    (tmp_path / "p" / STEPS.format(4)).rmdir()
    assert run(tmp_path / "p").finished
    assert [step for step, _ in training_states(tmp_path / "p")] == [4, 6]
    run(tmp_path / "whole")
    assert weights(tmp_path / "p") == weights(tmp_path / "whole")


@pytest.mark.parametrize("name", ["weights", "average", "optimizer"])
@pytest.mark.parametrize("value", [nan, -inf])
def test_a_training_state_that_is_not_finite_is_refused_by_file_and_name(tmp_path, name, value):
    run(tmp_path, tiny_config(steps=2))
    key = poison(tmp_path / STEPS.format(2), name, lambda tensor: torch.full_like(tensor, value))
    with pytest.raises(CheckpointError, match=rf"'{key}' in .*{name}\.safetensors holds NaN .*Start again with --fresh"):
        run(tmp_path, tiny_config(steps=2))


@pytest.mark.parametrize("name", ["weights", "average", "optimizer"])
@pytest.mark.parametrize("change", [torch.Tensor.bfloat16, torch.Tensor.int, lambda tensor: tensor[:1, :1]])
def test_a_training_state_is_neither_cast_nor_stretched(tmp_path, name, change):
    """It continues a run to the bit, so not even a wider type will do."""
    run(tmp_path, tiny_config(steps=2))
    key = poison(tmp_path / STEPS.format(2), name, lambda tensor: change(tensor).clone())
    with pytest.raises(CheckpointError, match=rf"another network \('{key}' is \(\d+, \d+\) of .*, the network's is"):
        run(tmp_path, tiny_config(steps=2))
