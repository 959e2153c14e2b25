"""What the plug-in tells LeRobot's trainer, with the few of LeRobot's classes that this needs replaced."""

import importlib
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from torch import nn

from tests.training.small import SPEC, new_policy, tiny_config, tiny_policy, tiny_stats
from vlaflow.errors import ConfigError
from vlaflow.policies.base import Policy
from vlaflow.policies.recipe import OptimConfig, ParameterGroup

PLUGIN = Path(__file__).parents[2] / "integrations/lerobot_policy_vlaflow"
MODULES = ("configuration_vlaflow", "modeling_vlaflow")


class Registered:
    @classmethod
    def register_subclass(cls, name):
        return lambda kind: kind

    def __post_init__(self):
        pass


@dataclass
class Values:
    """A config that holds what it is given."""

    def __init__(self, **values):
        self.__dict__.update(values)


class LeRobotPolicy(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config


@pytest.fixture(scope="module")
def plugin():
    """The plug-in's two modules, and nothing left of the stand-ins afterwards."""
    names = {
        "lerobot": {},
        "lerobot.configs": {"NormalizationMode": Enum("NormalizationMode", "IDENTITY"), "PreTrainedConfig": Registered},
        "lerobot.optim": {
            "AdamWConfig": Values,
            "CosineDecayWithWarmupSchedulerConfig": Values,
            "OptimizerConfig": Registered,
        },
        "lerobot.policies": {},
        "lerobot.policies.pretrained": {"PreTrainedPolicy": LeRobotPolicy},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, members in names.items():
            module = ModuleType(name)
            module.__dict__.update(members)
            patch.setitem(sys.modules, name, module)
        patch.syspath_prepend(str(PLUGIN))
        configuration, modeling = (importlib.import_module(f"lerobot_policy_vlaflow.{name}") for name in MODULES)
        yield SimpleNamespace(Config=configuration.VlaflowAsyncVLAConfig, Policy=modeling.VlaflowAsyncVLAPolicy)
        for name in [name for name in sys.modules if name.partition(".")[0] == "lerobot_policy_vlaflow"]:
            del sys.modules[name]


def with_optim(plugin, monkeypatch, optim, **changes):
    """The config of a recipe that trains a small policy so."""
    trained = tiny_config(optim=optim, **changes)
    config = plugin.Config()
    config.recipe = "asyncvla.demo"
    monkeypatch.setattr(plugin.Config, "train_config", lambda self, data=None: trained)
    return config


def test_groups_that_a_recipe_freezes_do_not_train_in_lerobot(plugin, monkeypatch):
    frozen = OptimConfig(groups=(ParameterGroup("backbone.", frozen=True),))
    policy = plugin.Policy(with_optim(plugin, monkeypatch, frozen), opened=new_policy(tiny_config()))
    given = {parameter for group in policy.get_optim_params() for parameter in group["params"]}
    assert given == set(policy.model.decoder.parameters())
    assert not any(parameter.requires_grad for parameter in policy.model.backbone.parameters())


@pytest.mark.parametrize(("schedule", "last"), [("constant", 2e-3), ("cosine", 5e-4)])
def test_a_schedule_keeps_its_warm_up_in_lerobot(plugin, monkeypatch, schedule, last):
    optim = OptimConfig(learning_rate=2e-3, warmup_steps=7, schedule=schedule, final_fraction=0.25)
    preset = with_optim(plugin, monkeypatch, optim).get_scheduler_preset()
    assert (preset.num_warmup_steps, preset.peak_lr, preset.decay_lr) == (7, 2e-3, last)


def test_a_gradient_that_is_not_clipped_is_not_clipped_in_lerobot(plugin, monkeypatch):
    assert with_optim(plugin, monkeypatch, OptimConfig(clip_norm=None)).get_optimizer_preset().grad_clip_norm == 0


@pytest.mark.parametrize(
    ("setting", "cure"),
    [
        ("lora={}", "lora=none"),
        ("optim.kind=adamw8bit", "optim.kind=adamw"),
        ('optim.groups=[{"prefix": "decoder.", "frozen_steps": 5}]', "leave frozen_steps out"),
    ],
)
def test_what_lerobots_trainer_does_not_do_is_refused_before_training(plugin, setting, cure):
    config = plugin.Config(recipe="asyncvla.demo", settings=[setting])
    policy = plugin.Policy(config, opened=Policy.create(tiny_policy(), SPEC, tiny_stats(), 0))
    for asked in (config.get_optimizer_preset, config.get_scheduler_preset, policy.get_optim_params):
        with pytest.raises(ConfigError, match=f"{cure}, or train it with vlaflow train"):
            asked()
