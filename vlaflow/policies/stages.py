"""What a training run learns: the policy itself, VQA co-training, or a latent action model.

The rater is in ``rater_stage``, the distillation of a policy in ``consistency_stage``.

A stage holds the module that trains and computes its loss; the trainer knows nothing else of it.

Shape letters: B batch, L chunk size (of a frame pair: frames between the two), D action dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from vlaflow.actions.latent import LatentActionModel
from vlaflow.actions.nsvq import Replacement, perplexity
from vlaflow.backbones.language import speaking
from vlaflow.data.batch import Batch, LossName, VqaBatch
from vlaflow.data.common import Normalizers
from vlaflow.data.pairs import EARLIER, LATER
from vlaflow.data.source import Prepare, Ready, Source
from vlaflow.decoders.losses import LossTerms
from vlaflow.decoders.model import Model
from vlaflow.errors import CapabilityError
from vlaflow.policies.base import Policy
from vlaflow.policies.processor import Drawn, Prepared, PreparedAnswers
from vlaflow.stacks.base import stacks_of


class Stage(Protocol):
    """What the trainer needs."""

    @property
    def module(self) -> nn.Module:
        """The module whose parameters train."""

    @property
    def uneven(self) -> bool:
        """Whether some parameters may get no gradient in a step, which processes that train together must know."""

    def prepare(self, batch: Any) -> Ready:
        """What ``loss`` takes of a batch, on the CPU: the loader's thread does this ahead of the networks."""

    def draw(self, batch: Any, generator: Generator, shared: Generator) -> Drawn:
        """Everything random in the loss on what ``prepare`` made, on the CPU, in the loader's thread too.

        It comes from ``generator``, but for what every process must choose alike, which comes from ``shared``.
        """

    def loss(self, batch: Any, drawn: Drawn) -> LossTerms:
        """Loss on what ``prepare`` and ``draw`` made, on the networks' device."""

    def after_step(self, step: int, shared: Generator) -> None:
        """What is due after the optimiser took step number ``step``, in every process; ``shared`` is alike in all of them."""

    def to(self, device: torch.device) -> None:
        """Move everything, what trains and what does not."""

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None, card: str = "") -> None:
        """Write everything as a checkpoint folder.

        Args:
            folder: where to.
            weights: what to save in place of the module's current weights, under the names of its ``state_dict``.
            card: the checkpoint's README.md.
        """


@dataclass(frozen=True)
class CoTraining:
    """Samples of another kind to learn from in turns with the stage's own: VQA co-training.

    Args:
        train: to learn from.
        held: held out, or None.
        share: of the optimiser steps that are taken on them, in (0, 1).
        batch_size: per step, over all processes; None takes as many as of the others.
    """

    train: Source
    held: Source | None
    share: float
    batch_size: int | None = None


class PolicyStage:
    """Backbone and decoder learn to act."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @property
    def module(self) -> Model:
        """Backbone and decoder; a policy in training has no rater yet."""
        return self.policy.model

    @property
    def uneven(self) -> bool:
        """With an expert nothing reads the last layer's output; with a random exit nothing the layers beyond it."""
        exits, stacks = self.policy.config.exits, stacks_of(self.policy.model.decoder)
        return any(stack.own_layers for stack in stacks) or (exits is not None and exits.choose == "random")

    def prepare(self, batch: Batch) -> Prepared:
        """See ``Policy.prepare``."""
        return self.policy.prepare(batch)

    def draw(self, batch: Prepared, generator: Generator, shared: Generator) -> Drawn:
        """See ``Policy.draw``."""
        return self.policy.draw(batch, generator, shared)

    def loss(self, batch: Prepared, drawn: Drawn) -> LossTerms:
        """See ``Policy.loss_of``."""
        return self.policy.loss_of(batch, drawn)

    def after_step(self, step: int, shared: Generator) -> None:
        """Nothing."""

    def to(self, device: torch.device) -> None:
        """See ``Stage``."""
        self.policy.model.to(device)

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None, card: str = "") -> None:
        """A checkpoint without a rater."""
        replace(self.policy, card=card or self.policy.card).save_pretrained(folder, weights)


TurnDraw = Callable[[Any, Generator, Generator], Drawn]
"""``Stage.draw`` of one kind of batch."""
TurnLoss = Callable[[Any, Drawn], LossTerms]
"""``Stage.loss`` of one kind of batch."""


@dataclass(frozen=True)
class Turn:
    """A batch of actions or of questions, with the loss that it is prepared for.

    Args:
        ready: what the loss takes.
        draw, loss: of this kind of batch.
    """

    ready: Ready
    draw: TurnDraw
    loss: TurnLoss

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Turn:
        """The same on another device."""
        return replace(self, ready=self.ready.to(device, non_blocking=non_blocking))


class AnsweringStage:
    """Another stage, which also learns from questions: they train the backbone's language model and nothing else.

    Args:
        stage: what everything but questions is for.
        policy: whose backbone is asked.
        weight: of the language-model loss.

    Raises:
        CapabilityError: when the backbone has no language-model head.
    """

    def __init__(self, stage: Stage, policy: Policy, weight: float) -> None:
        speaking(policy.model.backbone)
        self.stage, self.policy, self.weight = stage, policy, weight
        self._learned: dict[LossName, tuple[Prepare, TurnDraw, TurnLoss]] = {
            Batch.loss_name: (stage.prepare, stage.draw, stage.loss),
            VqaBatch.loss_name: (policy.prepare_answers, _draw_nothing, self._answer_loss),
        }

    @property
    def module(self) -> nn.Module:
        """The other stage's."""
        return self.stage.module

    @property
    def uneven(self) -> bool:
        """Always: decoders get no gradient from questions, language-model heads none from actions."""
        return True

    def after_step(self, step: int, shared: Generator) -> None:
        """What the other stage does."""
        self.stage.after_step(step, shared)

    def prepare(self, batch: Batch | VqaBatch) -> Turn:
        """Questions for the language model, anything else for the other stage."""
        prepare, draw, loss = self._learned[batch.loss_name]
        return Turn(prepare(batch), draw, loss)

    def draw(self, batch: Turn, generator: Generator, shared: Generator) -> Drawn:
        """What the loss of this kind of batch draws; that of questions nothing."""
        return batch.draw(batch.ready, generator, shared)

    def loss(self, batch: Turn, drawn: Drawn) -> LossTerms:
        """The language-model loss of questions, the other stage's loss of anything else; never both."""
        return batch.loss(batch.ready, drawn)

    def _answer_loss(self, batch: PreparedAnswers, drawn: Drawn) -> LossTerms:
        loss = self.policy.answer_loss(batch)
        return LossTerms(self.weight * loss, {"answer": loss.detach()})

    def to(self, device: torch.device) -> None:
        """See ``Stage``."""
        self.stage.to(device)

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None, card: str = "") -> None:
        """See ``Stage``."""
        self.stage.save(folder, weights, card)


def _draw_nothing(batch: PreparedAnswers, generator: Generator, shared: Generator) -> Drawn:
    return Drawn()


class LatentStage:
    """A latent action model learns to make the later frame of a pair from the earlier one and a few codes (iFlyBot-VLA).

    Args:
        model: what trains.
        replacement: of codebook entries that are hardly used.
        steps: of the whole run, which the care of the codebook is a share of.
        action: normalisers of the actions, for a model with an action head.
        action_weight: of the action head's loss.
    """

    def __init__(
        self,
        model: LatentActionModel,
        replacement: Replacement,
        steps: int,
        action: Normalizers | None = None,
        action_weight: float = 0.01,
    ) -> None:
        if (model.act is None) != (action is None):
            raise CapabilityError(
                "A latent action model needs a normaliser of the actions if it has an action head, else none."
            )
        self.model, self.replacement, self.steps = model, replacement, steps
        self.action, self.action_weight = action, action_weight

    @property
    def module(self) -> LatentActionModel:
        """All of it."""
        return self.model

    @property
    def uneven(self) -> bool:
        """Never: an unused entry's gradient is 0, not missing."""
        return False

    def prepare(self, batch: Batch) -> Batch:
        """The images as they are: the model turns them into numbers itself."""
        return batch

    def draw(self, batch: Batch, generator: Generator, shared: Generator) -> Drawn:
        """The noise of the quantisation."""
        return Drawn((self.model.draw(len(batch.observation), generator),))

    def loss(self, batch: Batch, drawn: Drawn) -> LossTerms:
        """Mean squared error of the later frame's pixels in [−1, 1]; with an action head also that of the mean action.

        In evaluation mode the codes are the entries themselves, without noise, so the loss is what a user of the model gets.
        """
        earlier, later = batch.observation.images[EARLIER], batch.observation.images[LATER]
        passed = self.model(earlier, later, *drawn.numbers)
        total = pixels = functional.mse_loss(passed.later_BHW3.float(), later.float() / 127.5 - 1)
        parts = {"pixels": pixels.detach(), "perplexity": perplexity(passed.id_BK, self.model.config.book)}
        if passed.action_BD is not None and self.action is not None:
            wanted_BD = self.action.forward(batch.action_BLD, batch.observation.robot_B).mean(1)
            parts["action"] = _mean_square(passed.action_BD.float() - wanted_BD, batch.mask_BLD)
            total = total + self.action_weight * parts["action"]
        return LossTerms(total, {name: part.detach() for name, part in parts.items()})

    def after_step(self, step: int, shared: Generator) -> None:
        """Move codebook entries that are hardly used."""
        self.model.book.replace_unused(self.replacement, step, self.steps, shared)

    def to(self, device: torch.device) -> None:
        """See ``Stage``."""
        self.model.to(device)

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None, card: str = "") -> None:
        """See ``LatentActionModel.save_pretrained``."""
        self.model.save_pretrained(folder, weights, card)


def _mean_square(error_BD: Tensor, mask_BLD: Tensor | None) -> Tensor:
    """Mean over the batch of each row's mean square over the dimensions that its robot has."""
    if mask_BLD is None:
        return error_BD.square().mean()
    mask_BD = mask_BLD.any(1)
    return ((error_BD.square() * mask_BD).sum(1) / mask_BD.sum(1).clamp(min=1)).mean()
