"""What a recipe returns: one frozen config for one training stage, with nothing left to guess.

Recipes live next to their system (``policies/<system>/recipes.py``) and are plain functions of the data set's shape. The
trainer reads these configs; nothing here trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from vlaflow.actions.latent import LatentConfig
from vlaflow.actions.nsvq import Replacement
from vlaflow.data.augment import Augment, StateMask
from vlaflow.data.quality import INTERVENTIONS, InterventionRule, PauseRule
from vlaflow.data.vqa import Turns
from vlaflow.decoders.rater import RaterConfig
from vlaflow.errors import ConfigError
from vlaflow.policies.base import PolicyConfig


@dataclass(frozen=True)
class DataSpec:
    """The shape of a data set, which a recipe fits its networks to."""

    state_dim: int
    action_dim: int
    views: tuple[str, ...]


@dataclass(frozen=True)
class VideoSpec:
    """What a recipe of a latent action model needs to know of a data set; ``action_dim`` is 0 where it holds no actions."""

    views: tuple[str, ...]
    action_dim: int


@dataclass(frozen=True)
class LatentTraining:
    """What a latent action model learns from, and how.

    Args:
        model: the networks.
        view: the camera view it looks at.
        gap_s: time between the frames of a pair in seconds; pairs that would cross the end of an episode are not formed.
        replacement: of codebook entries that are hardly used.
        action_weight: of the action head's squared error (normalised actions) relative to that of the pixels (in [−1, 1]).
    """

    model: LatentConfig
    view: str
    gap_s: float = 1.0
    replacement: Replacement = field(default_factory=Replacement)
    action_weight: float = 0.01


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters whose name starts with ``prefix`` train at their own rate, later than the others, or not at all.

    With ``frozen_steps`` they stay as they are for so many optimiser steps and then join the schedule where it stands.

    The longest matching prefix wins; parameters that match none take the optimiser's own rate.
    """

    prefix: str
    learning_rate: float | None = None
    frozen: bool = False
    frozen_steps: int = 0


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and a cosine (or constant) schedule.

    Args:
        learning_rate: peak rate.
        warmup_steps: linear up to the peak; the first step has 1 / warmup_steps of it.
        schedule: after the warm-up.
        final_fraction: share of the peak that the cosine ends at.
        clip_norm: largest gradient norm; larger ones are scaled down.
    """

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    final_fraction: float = 0.0
    clip_norm: float = 1.0
    groups: tuple[ParameterGroup, ...] = ()


@dataclass(frozen=True)
class Pipeline:
    """Several stages, each with what the ones before it have made.

    Args:
        stages: recipes; the last one's checkpoint is the whole's, the others lie in folders of their names inside it.
    """

    stages: tuple[Callable[..., TrainConfig], ...]


@dataclass(frozen=True)
class VqaTraining:
    """VQA co-training: some optimiser steps are taken on questions alone.

    Args:
        share: of the optimiser steps, evenly spread among the others; in (0, 1).
        weight: of the language-model loss.
        batch_size: questions per such step and process; None takes as many as observations.
        turns: of conversations: all, each with the earlier ones before it, or the first alone.
        held_out: share of the questions, by image and group, that is never trained on.
        size: side in pixels at which images are shown to backbones that look at any size.
    """

    share: float = 0.25
    weight: float = 1.0
    batch_size: int | None = None
    turns: Turns = "all"
    held_out: float = 0.1
    size: int = 448

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"vqa.share must lie between 0 and 1, both excluded, got {self.share}.")
        sizes = self.size if self.batch_size is None else min(self.size, self.batch_size)
        if not 0 <= self.held_out < 1 or self.weight <= 0 or sizes < 1:
            raise ConfigError(
                "vqa.held_out lies in [0, 1), weight is above 0, size and batch_size are at least 1; got "
                f"{self.held_out}, {self.weight}, {self.size}, {self.batch_size}."
            )


@dataclass(frozen=True)
class TrainConfig:
    """One training stage.

    Args:
        policy: the assembly to train, from scratch or (by recipes that take a ``PolicyConfig``) from a checkpoint's weights.
        rater: the rater to add and train on the frozen policy; None for the other stages.
        latent: the latent action model to train from video alone; None for the other stages.
        steps: optimiser steps.
        batch_size: observations per optimiser step and process, over all accumulation parts.
        accumulate: parts a batch is split into.
        ema_decay: of the weight average that checkpoints hold; None keeps the last weights.
        shift: largest random image shift in pixels; 0 for none.
        augment: erased and sharpened images; None for none.
        state_mask: hidden proprioceptive states; None for none.
        pauses: which actions count as pauses and are left out of the loss; None keeps all.
        interventions: where a data set that keeps executed actions departs from the noted ones, so that those noted afterwards
            are left out of the loss; None keeps all.
        max_excluded: largest share of the training actions that these two may leave out, in (0, 1]; above it training is
            refused.
        vqa: VQA co-training; None for none.
        demonstrations: share of each task's training episodes that is used; the held-out ones stay the same.
        validation_fraction: share of the episodes of every task held out.
        validate_every, checkpoint_every: steps.
        precision: "auto" is bf16 autocast where the device is fast at it (CUDA, CPUs with AMX), else float32.
        seed: of weights, data order and noise.
    """

    policy: PolicyConfig | None
    rater: RaterConfig | None = None
    latent: LatentTraining | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: int = 1000
    batch_size: int = 64
    accumulate: int = 1
    ema_decay: float | None = 0.998
    shift: int = 0
    augment: Augment | None = None
    state_mask: StateMask | None = None
    pauses: PauseRule | None = None
    interventions: InterventionRule | None = INTERVENTIONS
    max_excluded: float = 0.5
    vqa: VqaTraining | None = None
    demonstrations: float = 1.0
    validation_fraction: float = 0.06
    validate_every: int = 250
    checkpoint_every: int = 500
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if [self.policy, self.rater, self.latent].count(None) != 2:
            raise ConfigError("A training stage has one of policy (to train), rater (to add to a trained one) and latent.")
        if self.latent is not None and (self.shift or self.augment or self.state_mask or self.pauses):
            raise ConfigError(
                "A latent action model's frames are taken as they are: leave out shift, augment, state_mask, pauses."
            )
        if self.vqa is not None and self.policy is None:
            raise ConfigError("Only a policy learns from questions; leave 'questions' out.")
        if not 0 < self.max_excluded <= 1:
            raise ConfigError(f"max_excluded is a share in (0, 1], got {self.max_excluded}.")
        if self.batch_size % self.accumulate:
            raise ConfigError(f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}.")
        if min(self.steps, self.batch_size, self.accumulate, self.validate_every, self.checkpoint_every) < 1:
            raise ConfigError("steps, batch_size, accumulate, validate_every and checkpoint_every must be at least 1.")
