"""Muon: orthogonal steps for the matrices of layers, AdamW's for all else, and runs that continue to the bit."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Generator, nn

from tests.training.sharded import MUON
from tests.training.small import Cut, Memory, new_policy, tiny_config, weights
from tests.training.test_trainer import run
from vlaflow.errors import ConfigError
from vlaflow.policies.recipe import OptimConfig
from vlaflow.training.memory import count
from vlaflow.training.muon import orthogonal
from vlaflow.training.optim import build_optimizer


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_directions_have_the_singular_vectors_of_the_matrix_and_singular_values_near_one(shape, scale):
    u, s, vh = torch.linalg.svd(drawn(*shape), full_matrices=False)
    s = s.clamp(min=0.1 * s.max())
    found = u.mT @ orthogonal(scale * (u @ s.diag() @ vh)) @ vh.mT
    torch.testing.assert_close(found, found.diagonal().diag(), atol=1e-3, rtol=0)
    assert found.diagonal().min() > 0.6
    assert found.diagonal().max() < 1.2


def test_nothing_to_learn_is_no_direction():
    assert not orthogonal(torch.zeros(3, 5)).any()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_copy_of_the_optimiser_takes_the_same_steps(kind):
    """A copy is made of what a pickle holds."""
    model = new_policy(tiny_config()).model
    optimizer = build_optimizer(model, OptimConfig(kind, learning_rate=1e-2))
    step(model, optimizer, 1)
    other, own = deepcopy((model, optimizer))
    for each, its in ((model, optimizer), (other, own)):
        step(each, its, 2)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))
    assert {tuple(values) for values in own.state.values()} == {tuple(values) for values in optimizer.state.values()}


def layers_and_others(model):
    named = dict(model.named_parameters())
    layers = {name for name, p in named.items() if ".layers." in name and p.ndim == 2}
    assert {"backbone.layers.0.qkv.weight"} <= layers
    return {name: named[name] for name in layers}, {name: p for name, p in named.items() if name not in layers}


def step(model, optimizer, number):
    """A step along gradients that are drawn from its number."""
    for place, parameter in enumerate(model.parameters()):
        parameter.grad = drawn(*parameter.shape, seed=100 * number + place)
    optimizer.step()


def stepped(config, *, steps=3, bf16=False):
    """A small policy's parameters before, and after steps along drawn gradients."""
    model = new_policy(tiny_config()).model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, config, bf16=bf16)
    for number in range(steps):
        step(model, optimizer, number)
    return model, before


def test_what_is_no_matrix_of_a_layer_takes_the_steps_of_adamw():
    ours, others = layers_and_others(stepped(MUON)[0])
    adamw = dict(stepped(replace(MUON, kind="adamw"))[0].named_parameters())
    for name, parameter in others.items():
        torch.testing.assert_close(parameter, adamw[name], rtol=0, atol=0, msg=name)
    assert not any(torch.equal(parameter, adamw[name]) for name, parameter in ours.items())


def test_a_first_step_has_a_fifth_of_the_rate_as_its_root_mean_square():
    """Of a full matrix all singular values become 1 or so: R·C·rms² = min(R, C), and the step's rms is 0.2 times the rate."""
    model, before = stepped(replace(MUON, weight_decay=0.0), steps=1)
    for name, parameter in layers_and_others(model)[0].items():
        rms = (parameter.detach() - before[name]).square().mean().sqrt()
        assert 0.6 * 0.2e-2 < rms < 1.2 * 0.2e-2, name


def test_the_steps_are_those_of_torch():
    torch_muon = getattr(torch.optim, "Muon", None)
    if torch_muon is None:
        pytest.skip("this torch has no Muon")
    model, before = stepped(MUON, bf16=True)
    numbers = {name: number for number, (name, _) in enumerate(model.named_parameters())}
    for name, parameter in layers_and_others(model)[0].items():
        other = nn.Parameter(before[name].clone())
        optimizer = torch_muon([other], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for step in range(3):
            other.grad = drawn(*other.shape, seed=100 * step + numbers[name])
            optimizer.step()
        moved = (other - before[name]).norm()
        assert (parameter - other).norm() < 0.02 * moved, name


def test_a_run_that_was_cut_continues_to_the_bit(tmp_path):
    config = tiny_config(optim=MUON)
    run(tmp_path / "a", config)
    with pytest.raises(RuntimeError, match="cut"):
        run(tmp_path / "b", config, source=Cut(Memory(), at=4))
    run(tmp_path / "b", config)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_a_state_that_was_loaded_goes_on_as_one_that_was_not():
    one, other = (new_policy(tiny_config()).model for _ in range(2))
    first, second = (build_optimizer(model, MUON) for model in (one, other))
    step(one, first, 0)
    other.load_state_dict(one.state_dict())
    second.load_state_dict(deepcopy(first.state_dict()))
    for number in (1, 2):
        step(one, first, number)
        step(other, second, number)
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


def test_a_matrix_has_one_moment_where_adamw_has_two():
    config = tiny_config()
    ours, theirs = (
        count(lambda: config.objective.dry_run(None, 32), replace(config, optim=OptimConfig(kind=kind)))
        for kind in ("muon", "adamw")
    )
    model = new_policy(config).model
    assert theirs.optimizer_bytes - ours.optimizer_bytes == 4 * sum(p.numel() for p in layers_and_others(model)[0].values())


def test_without_layers_there_is_nothing_to_turn():
    with pytest.raises(ConfigError, match=r"none trains here. Choose optim\.kind=adamw"):
        build_optimizer(nn.Linear(3, 3), MUON)
