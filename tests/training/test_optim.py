"""Learning rates, groups and weight decay."""

import math

import pytest
import torch
from torch import nn

from tests.training.small import new_policy, tiny_config
from vlaflow.errors import ConfigError
from vlaflow.policies.recipe import OptimConfig, ParameterGroup
from vlaflow.training.optim import build_optimizer, freeze, multiplier, set_rate


def test_the_schedule_has_its_closed_form():
    config = OptimConfig(warmup_steps=4, final_fraction=0.1)
    assert [multiplier(s, config, 104) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert multiplier(4, config, 104) == 1.0
    assert multiplier(54, config, 104) == pytest.approx(0.55)  # half way: the mean of peak and end
    assert multiplier(79, config, 104) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(0.75 * math.pi)))
    assert multiplier(104, config, 104) == pytest.approx(0.1)


def test_the_schedule_falls_from_the_warm_up_on():
    config = OptimConfig(warmup_steps=10)
    shares = [multiplier(s, config, 100) for s in range(100)]
    assert shares[:10] == sorted(shares[:10])
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert min(shares) > 0


def test_a_constant_schedule_stays_at_its_peak():
    config = OptimConfig(warmup_steps=0, schedule="constant")
    assert {multiplier(s, config, 5) for s in range(5)} == {1.0}


def test_the_longest_prefix_decides_the_rate():
    config = OptimConfig(groups=(ParameterGroup("backbone.", 1e-4), ParameterGroup("backbone.norm.", 1e-5)))
    model = new_policy(tiny_config()).model
    rates = {id(p): g["lr"] for g in build_optimizer(model, config).param_groups for p in g["params"]}
    named = dict(model.named_parameters())
    assert rates[id(named["backbone.norm.weight"])] == 1e-5
    assert rates[id(named["backbone.state.weight"])] == 1e-4
    assert rates[id(named["decoder.codec.project.weight"])] == config.learning_rate


def test_every_trainable_parameter_is_in_one_group_and_frozen_ones_in_none():
    config = OptimConfig(groups=(ParameterGroup("backbone.", frozen=True), ParameterGroup("backbone.norm.")))
    model = new_policy(tiny_config()).model
    freeze(model, config)
    grouped = [id(p) for g in build_optimizer(model, config).param_groups for p in g["params"]]
    trainable = [id(p) for name, p in model.named_parameters() if not name.startswith("backbone.") or "backbone.norm." in name]
    assert sorted(grouped) == sorted(trainable)


def test_only_weights_that_multiply_decay():
    model = new_policy(tiny_config()).model
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    decayed = {name for name, p in model.named_parameters() if decay[id(p)]}
    assert "backbone.layers.0.qkv.weight" in decayed
    assert "backbone.stems.0.convolutions.0.weight" in decayed
    plain = ("bias", "norm", "position", "byte.weight")
    assert not [name for name in decayed if any(word in name for word in plain)]


def test_a_prefix_that_matches_nothing_is_refused_with_the_nearest():
    config = OptimConfig(groups=(ParameterGroup("backbon.", 1e-4),))
    with pytest.raises(ConfigError, match=r"'backbon\.'.*did you mean 'backbone\.'"):
        freeze(new_policy(tiny_config()).model, config)


def test_freezing_everything_is_refused():
    module = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="nothing to train"):
        freeze(module, OptimConfig(groups=(ParameterGroup("", frozen=True),)))


def test_groups_keep_their_ratio_along_the_schedule():
    config = OptimConfig(learning_rate=1e-3, groups=(ParameterGroup("backbone.", 1e-4),))
    optimizer = build_optimizer(new_policy(tiny_config()).model, config)
    set_rate(optimizer.param_groups, 0.5)
    assert {g["lr"] for g in optimizer.param_groups} == {5e-4, 5e-5}
    assert isinstance(optimizer, torch.optim.AdamW)
