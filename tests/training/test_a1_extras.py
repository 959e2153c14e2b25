"""Groups that join late, masked states and augmented images, as A1's recipes need them."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.training.small import CPU, Cut, Memory, as_it_is, new_policy, tiny_config, weights
from tests.training.test_trainer import run
from vlaflow.data.augment import Augment, StateMask
from vlaflow.policies.base import Policy
from vlaflow.policies.recipe import OptimConfig, ParameterGroup
from vlaflow.training.loader import Held, Loader
from vlaflow.training.team import Team

LATE = OptimConfig(learning_rate=1e-3, warmup_steps=4, weight_decay=0.1, groups=(ParameterGroup("backbone.", frozen_steps=4),))


def state(out, step, name):
    return load_file(out / f"training/step-{step:06d}/{name}.safetensors")


def test_a_late_group_does_not_move_before_its_time_and_begins_its_moments_then(tmp_path):
    config = tiny_config(optim=LATE, ema_decay=None)
    start = {name: tensor.clone() for name, tensor in new_policy(config).model.state_dict().items()}
    with pytest.raises(RuntimeError, match="cut"):
        run(tmp_path / "p", config, source=Cut(Memory()))  # the sixth batch, so step 4 is saved
    saved, moments = state(tmp_path / "p", 4, "weights"), state(tmp_path / "p", 4, "optimizer")
    for name, tensor in saved.items():
        assert torch.equal(tensor, start[name]) == name.startswith("backbone."), name
    assert moments
    assert not [name for name in moments if ".backbone." in name]
    run(tmp_path / "p", config)
    after = state(tmp_path / "p", 6, "optimizer")
    assert {float(v) for name, v in after.items() if name.startswith("step.backbone.")} == {2.0}
    assert {float(v) for name, v in after.items() if name.startswith("step.decoder.")} == {6.0}


def test_resuming_across_the_moment_of_joining_is_bitwise_equal(tmp_path):
    config = tiny_config(optim=LATE)
    run(tmp_path / "whole", config)
    with pytest.raises(RuntimeError, match="cut"):
        run(tmp_path / "cut", config, source=Cut(Memory()))
    run(tmp_path / "cut", config)
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")


def test_frozen_gradients_do_not_count_in_the_norm(tmp_path):
    """The first step's gradient norm is that of the decoder alone."""
    norms = {}
    for name, optim in {"late": LATE, "frozen": OptimConfig(groups=(ParameterGroup("backbone.", frozen=True),))}.items():
        run(tmp_path / name, tiny_config(optim=optim, steps=1))
        norms[name] = json.loads((tmp_path / name / "training/log.jsonl").read_text().splitlines()[0])["gradient"]
    assert norms["late"] == pytest.approx(norms["frozen"], rel=1e-6)


def test_masking_hides_the_state_from_the_network_and_from_nothing_else(tmp_path):
    config = tiny_config(state_mask=StateMask(1.0), shift=0)
    policy = new_policy(config)
    batch = Loader(Memory(), config, Team(), CPU, as_it_is).step(0)[0].batch
    plain = Loader(Memory(), tiny_config(shift=0), Team(), CPU, as_it_is).step(0)[0].batch
    assert torch.equal(batch.observation.state_BS, plain.observation.state_BS)
    assert torch.equal(policy.embed(batch.observation).state_BS, torch.zeros(4, 3))
    assert (policy.embed(plain.observation).state_BS != 0).all()


def test_masks_and_augmentation_are_for_training_and_follow_the_seed(tmp_path):
    config = tiny_config(state_mask=StateMask(0.5), augment=Augment(), shift=0)
    loader = Loader(Memory(), config, Team(), CPU, as_it_is)
    first, again, other = (f.step(s)[0].batch.observation for f, s in ((loader, 0), (loader, 0), (loader, 1)))
    assert torch.equal(first.known_BS, again.known_BS)
    assert torch.equal(first.images["front"], again.images["front"])
    assert not torch.equal(first.images["front"], other.images["front"])
    held = Held(Memory(9), 4, 0)
    for part, _ in held.parts(Team(), CPU, as_it_is):
        assert part.batch.observation.known_BS is None
    run(tmp_path / "a", config)
    with pytest.raises(RuntimeError, match="cut"):
        run(tmp_path / "b", config, source=Cut(Memory()))
    run(tmp_path / "b", config)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert Policy.from_pretrained(tmp_path / "a")
