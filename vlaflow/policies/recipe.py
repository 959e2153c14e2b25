"""What a recipe returns: one frozen config for one training stage, with nothing left to guess.

Recipes live beside their system (``policies/<system>/recipes.py``) and are plain functions of the data set's shape. The
trainer reads these configs; nothing here trains.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vlaflow.data.augment import Augment, StateMask
from vlaflow.data.quality import PauseRule
from vlaflow.data.questions import Turns
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
class QuestionTraining:
    """Learning to answer questions about pictures beside learning to act: some optimiser steps are taken on questions alone.

    Args:
        share: of the optimiser steps, evenly spread among the others; in (0, 1).
        weight: of the language-model loss.
        batch_size: questions per such step and process; None takes as many as observations.
        turns: of conversations: all, each with the earlier ones before it, or the first alone.
        held_out: share of the questions, by picture and group, that is never trained on.
        size: side in pixels at which pictures are shown to backbones that look at any size.
    """

    share: float = 0.25
    weight: float = 1.0
    batch_size: int | None = None
    turns: Turns = "all"
    held_out: float = 0.1
    size: int = 448

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"questions.share must lie between 0 and 1, both excluded, got {self.share}.")
        sizes = self.size if self.batch_size is None else min(self.size, self.batch_size)
        if not 0 <= self.held_out < 1 or self.weight <= 0 or sizes < 1:
            raise ConfigError(
                "questions.held_out lies in [0, 1), weight is above 0, size and batch_size are at least 1; got "
                f"{self.held_out}, {self.weight}, {self.size}, {self.batch_size}."
            )


@dataclass(frozen=True)
class TrainConfig:
    """One training stage.

    Args:
        policy: the assembly to train from scratch; None for stages that continue a checkpoint.
        rater: the rater to add and train on the frozen policy; None for the policy stage.
        steps: optimiser steps.
        batch_size: observations per optimiser step and process, over all accumulation parts.
        accumulate: parts a batch is split into.
        ema_decay: of the weight average that checkpoints hold; None keeps the last weights.
        shift: largest random image shift in pixels; 0 for none.
        augment: erased and sharpened images; None for none.
        state_mask: hidden proprioceptive states; None for none.
        pauses: which actions count as pauses and are left out of the loss; None keeps all.
        questions: questions to learn to answer beside; None for none.
        demonstrations: share of each task's training episodes that is used; the held-out ones stay the same.
        validation_fraction: share of the episodes of every task held out.
        validate_every, checkpoint_every: steps.
        precision: "auto" is bf16 autocast where the device is fast at it (CUDA, CPUs with AMX), else float32.
        seed: of weights, data order and noise.
    """

    policy: PolicyConfig | None
    rater: RaterConfig | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: int = 1000
    batch_size: int = 64
    accumulate: int = 1
    ema_decay: float | None = 0.998
    shift: int = 0
    augment: Augment | None = None
    state_mask: StateMask | None = None
    pauses: PauseRule | None = None
    questions: QuestionTraining | None = None
    demonstrations: float = 1.0
    validation_fraction: float = 0.06
    validate_every: int = 250
    checkpoint_every: int = 500
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.policy is None) == (self.rater is None):
            raise ConfigError("A training stage has either a policy to train or a rater to add to a trained one.")
        if self.questions is not None and self.policy is None:
            raise ConfigError("A rater learns no questions; leave 'questions' out.")
        if self.batch_size % self.accumulate:
            raise ConfigError(f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}.")
        if min(self.steps, self.batch_size, self.accumulate, self.validate_every, self.checkpoint_every) < 1:
            raise ConfigError("steps, batch_size, accumulate, validate_every and checkpoint_every must be at least 1.")
