"""What a stage learns is a value with its own methods: another package may bring one, and building a trainer does nothing."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.training.small import Memory, new_policy, tiny_config
from vlaflow.config import override
from vlaflow.data.lerobot import Dataset
from vlaflow.decoders.losses import LossTerms
from vlaflow.errors import ConfigError
from vlaflow.policies.base import PolicyConfig
from vlaflow.policies.objectives import LatentObjective, PolicyObjective, RaterObjective
from vlaflow.policies.processor import Drawn
from vlaflow.policies.recipe import Assets, DataSpec, Objective, ParameterGroup, Setup, TrainConfig
from vlaflow.policies.stages import PolicyStage
from vlaflow.training.metrics_log import read_log
from vlaflow.training.options import Options
from vlaflow.training.recipes import find_recipe
from vlaflow.training.run import train_stage
from vlaflow.training.trainer import Trainer


class States:
    """States alone, as a foreign source of samples."""

    def __init__(self, dataset, episodes):
        self.rows = np.concatenate([np.arange(*dataset.episode_slice(e).indices(len(dataset))) for e in episodes])
        self.state_NS = dataset.columns().state

    def __len__(self):
        return len(self.rows)

    def batch(self, indices):
        batch = Memory().batch(indices)
        return replace(
            batch, observation=replace(batch.observation, state_BS=torch.from_numpy(self.state_NS[self.rows[indices]]))
        )


class MeanStage:
    """Learns the mean state."""

    uneven = False

    def __init__(self, size):
        self.module = nn.Linear(1, size)
        nn.init.zeros_(self.module.weight)
        nn.init.zeros_(self.module.bias)

    def draw(self, batch, generator, shared):
        return Drawn()

    def loss(self, batch, drawn):
        state_BS = batch.observation.state_BS
        total = (state_BS - self.module(torch.ones(len(state_BS), 1))).square().mean()
        return LossTerms(total, {"state": total.detach()})

    def after_step(self, step, shared):
        pass

    def prepare(self, batch):
        return batch

    def to(self, device):
        self.module.to(device)

    def save(self, folder, weights=None, card=""):
        folder.mkdir()
        save_file(dict(weights), folder / "model.safetensors")
        (folder / "README.md").write_text(card)


@dataclass(frozen=True)
class MeanObjective(Objective):
    """An objective of another package."""

    scale: float = 1.0

    def used_assets(self, assets):
        return Assets()

    def require(self, assets):
        if assets != Assets():
            raise ConfigError("A mean needs nothing but a data set.")

    def check_plan(self, config, dataset, assets, before, stage):
        return before

    def open(self, root, reading=None):
        return Dataset.open(root, reading=reading)

    def set_up(self, config, dataset, assets):
        train, held = (States(dataset, part) for part in config.episodes(dataset))
        return Setup(self, MeanStage(dataset.columns().state.shape[1]), train, held, None, {}, "\n".join)


def test_an_objective_of_another_package_trains_like_ours(dataset, tmp_path):
    config = TrainConfig(MeanObjective(), steps=4, global_batch_size=4, validate_every=2, checkpoint_every=2)
    options = Options({"scale": "2.0", "steps": "3"}, "none")
    outcome = train_stage(config, dataset, tmp_path / "mean", name="other.mean", options=options)
    assert (outcome.step, outcome.finished) == (3, True)
    assert load_file(tmp_path / "mean/model.safetensors")["bias"].abs().sum() > 0
    assert "Recipe: other.mean" in (tmp_path / "mean/README.md").read_text()
    assert "state" in read_log(tmp_path / "mean")[-1]["validation"]
    with pytest.raises(ConfigError, match="nothing but a data set"):
        train_stage(config, dataset, tmp_path / "p", name="other.mean", options=Options(tokenizer="x.json"))
    with pytest.raises(ConfigError, match=r"was trained with config\.objective\.scale = 2\.0, now it is 1\.0"):
        train_stage(config, dataset, tmp_path / "mean", name="other.mean", options=Options({"steps": "3"}, "none"))


def test_a_trainer_that_does_not_run_changes_nothing(tmp_path):
    """Neither the folder (an old checkpoint stays where it is, though a fresh start is asked for) nor the networks."""
    config = tiny_config(optim=replace(tiny_config().optim, groups=(ParameterGroup("backbone.", frozen=True),)))
    policy = new_policy(config)
    policy.model.eval()
    (tmp_path / "p").mkdir()
    (tmp_path / "p/config.json").write_text("{}")
    for out in (tmp_path / "p", tmp_path / "q"):
        Trainer(PolicyStage(policy), config, Memory(), Memory(9), out, tracker="none", fresh=True)
    assert [file.name for file in tmp_path.rglob("*")] == ["p", "config.json"]
    assert not policy.model.training
    assert all(parameter.requires_grad for parameter in policy.model.parameters())


@pytest.mark.parametrize(
    ("objective", "key", "text"),
    [
        (PolicyObjective(tiny_config().objective.policy), "policy.n_action_steps", "3"),
        (LatentObjective(None, "front"), "gap_s", "0.5"),
        (LatentObjective(None, "front"), "replacement.every", "7"),
    ],
)
def test_keys_of_the_objective_have_no_prefix(objective, key, text):
    changed = override(TrainConfig(objective), {key: text, "steps": "5"})
    found = changed.objective
    for name in key.split("."):
        found = getattr(found, name)
    assert (str(found), changed.steps) == (text, 5)


def test_no_objective_of_ours_hides_a_key_behind_one_of_the_config():
    """A key of the config itself wins, so the objective's would be out of reach."""
    own = set(TrainConfig.__dataclass_fields__)
    for kind in (PolicyObjective, RaterObjective, LatentObjective):
        assert not own & set(kind.__dataclass_fields__)


def test_a_recipe_is_given_what_it_takes(monkeypatch):
    """The data set's shape, the policy it continues, or both, in any order."""
    data, policy = DataSpec(3, 2, ("front",)), tiny_config().objective.policy
    given = {}

    def both(policy: PolicyConfig, data: DataSpec) -> TrainConfig:
        given.update(policy=policy, data=data)
        return tiny_config()

    recipe = find_recipe("asyncvla.demo")
    assert not recipe.continues
    assert recipe.config(data).objective.policy.backbone.state_dim == 3
    recipe = find_recipe("asyncvla.finetune")
    assert recipe.continues
    assert recipe.config(data, policy).objective.policy == policy
    recipe = find_recipe("asyncvla.rater")
    monkeypatch.setitem(recipe.__dict__, "call", both)
    recipe.config(data, policy)
    assert given == {"policy": policy, "data": data}
