"""The policies' configs, one type per system. What LeRobot must know before the data set is there comes from the recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig, OptimizerConfig
from torch.optim import Optimizer

from vlaflow.errors import ConfigError
from vlaflow.policies.lerobot import require_trainable
from vlaflow.policies.recipe import DataSpec, OptimConfig, TrainConfig
from vlaflow.training.optim import optimizer_of
from vlaflow.training.options import Options, overridden
from vlaflow.training.recipes import find_recipe

UNKNOWN = DataSpec(7, 7, ("front",))
"""Chunk size, optimiser and schedule of a recipe do not depend on the data set, which is not known yet."""


def _identity() -> dict[str, NormalizationMode]:
    return dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)


@OptimizerConfig.register_subclass("vlaflow_muon")
@dataclass
class MuonConfig(OptimizerConfig):
    """Muon for the matrices of the layers and AdamW for all else, on the groups that the policy sorts its parameters into.

    Args:
        lr, weight_decay: of the recipe, for the record; every group states its own.
        betas, eps: of AdamW.
        grad_clip_norm: largest gradient norm.
    """

    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    grad_clip_norm: float = 1.0

    def build(self, params: Any) -> Optimizer:
        """The optimiser of the groups of ``get_optim_params``."""
        return optimizer_of(list(params), OptimConfig("muon", betas=self.betas, eps=self.eps))


@dataclass
class VlaflowConfig(PreTrainedConfig):
    """What all systems share.

    Args:
        recipe: how the policy is built and trained, such as "asyncvla.demo"; ``vlaflow train --help`` lists the recipes.
        settings: values of the recipe that differ, as KEY=VALUE.
        views: LeRobot's key of every view; the data set's own by default.
        compute: how much compute to spend on a chunk, as ``vlaflow eval --compute``; the calibrated sampler by default.
        chunk_size: actions per chunk, filled in from the recipe; ``settings`` change it.
        n_action_steps: actions executed per chunk; the recipe's by default.
        noise_seed: of the sampler's noise.
        normalization_mapping: vlaflow normalises by itself, so all are left as they are.
    """

    recipe: str | None = None
    settings: list[str] = field(default_factory=list)
    views: dict[str, str] = field(default_factory=dict)
    compute: str | None = None
    chunk_size: int | None = None
    n_action_steps: int | None = None
    noise_seed: int = 0
    normalization_mapping: dict[str, NormalizationMode] = field(default_factory=_identity)

    def train_config(self, data: DataSpec = UNKNOWN) -> TrainConfig:
        """The recipe for a data set.

        Raises:
            ConfigError: there is no such recipe, or it cannot be trained on LeRobot's batches.
        """
        if self.recipe is None:
            raise ConfigError("Name a recipe to train: --policy.recipe=asyncvla.demo (vlaflow train --help lists them).")
        recipe = find_recipe(self.recipe)
        if recipe.several or recipe.continues:
            raise ConfigError(f"'{self.recipe}' is not trained from scratch in one stage. Train it with vlaflow train instead.")
        changes = dict(text.split("=", 1) for text in self.settings)
        if self.n_action_steps is not None:
            changes.setdefault("policy.n_action_steps", str(self.n_action_steps))
        return overridden(recipe.config(data, None), changes, Options().assets())

    def training(self) -> TrainConfig:
        """The recipe for LeRobot's trainer.

        Raises:
            ConfigError: it asks for what that does not do; or as ``train_config``.
        """
        config = self.train_config()
        require_trainable(config, f"'{self.recipe}'")
        return config

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recipe is not None:
            policy = self.train_config().objective.policy
            self.chunk_size, self.n_action_steps = policy.decoder.chunk_size, policy.n_action_steps

    def validate_features(self) -> None:
        """The features are checked when the policy is made."""

    def get_optimizer_preset(self) -> OptimizerConfig:
        """The recipe's optimiser; LeRobot takes a largest norm of 0 for none."""
        optim = self.training().optim
        kind = MuonConfig if optim.kind == "muon" else AdamWConfig
        return kind(
            lr=optim.learning_rate,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            grad_clip_norm=optim.clip_norm or 0.0,
        )

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        """The recipe's schedule; a constant rate is a cosine that ends where it begins."""
        config = self.training()
        optim = config.optim
        return CosineDecayWithWarmupSchedulerConfig(
            num_warmup_steps=optim.warmup_steps,
            num_decay_steps=config.steps,
            peak_lr=optim.learning_rate,
            decay_lr=optim.learning_rate * (1.0 if optim.schedule == "constant" else optim.final_fraction),
        )

    @property
    def observation_delta_indices(self) -> None:
        """One observation."""

    @property
    def action_delta_indices(self) -> list[int]:
        """The actions of a chunk."""
        if self.chunk_size is None:
            raise ConfigError("Name a recipe to train: --policy.recipe=asyncvla.demo (vlaflow train --help lists them).")
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        """No rewards."""


@PreTrainedConfig.register_subclass("vlaflow_policy")
@dataclass
class VlaflowAnyConfig(VlaflowConfig):
    """A policy of any system, such as the baselines."""


@PreTrainedConfig.register_subclass("vlaflow_asyncvla")
@dataclass
class VlaflowAsyncVLAConfig(VlaflowConfig):
    """AsyncVLA."""


@PreTrainedConfig.register_subclass("vlaflow_a1")
@dataclass
class VlaflowA1Config(VlaflowConfig):
    """A1."""


@PreTrainedConfig.register_subclass("vlaflow_dfm_vla")
@dataclass
class VlaflowDfmVLAConfig(VlaflowConfig):
    """DFM-VLA."""


@PreTrainedConfig.register_subclass("vlaflow_iflybot")
@dataclass
class VlaflowIflybotConfig(VlaflowConfig):
    """iFlyBot-VLA; it is trained in stages by ``vlaflow train`` and then exported."""
