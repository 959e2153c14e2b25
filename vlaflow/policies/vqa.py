"""Learning to answer questions about images, in turns with learning to act (VQA co-training)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlaflow.backbones.language import headless
from vlaflow.data.image_cache import ImageCache, VqaSource, require_shown
from vlaflow.data.vqa import Turns, VqaDataset
from vlaflow.errors import ConfigError, SpecError
from vlaflow.policies.base import Policy, PolicyConfig
from vlaflow.policies.provenance import TrainedVqa
from vlaflow.policies.stages import CoTraining


@dataclass(frozen=True)
class VqaTraining:
    """VQA co-training: some optimiser steps are taken on questions alone.

    Args:
        share: of the optimiser steps, evenly spread among the others; in (0, 1).
        weight: of the language-model loss.
        batch_size: questions per such step, over all processes; None takes as many as observations.
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


def require_askable(policy: PolicyConfig, vqa: VqaDataset) -> None:
    """Refuse a policy that cannot learn these questions, before it is built.

    Raises:
        CapabilityError: it has no language-model head.
        SpecError: a question shows more images than it has views, or is longer than it can read or say.
    """
    backbone = policy.backbone
    if not backbone.can_answer:
        raise headless(backbone)
    for question in vqa.questions:
        require_shown(question, vqa, backbone.views)
        for text, limit in (
            (question.question, backbone.longest_instruction),
            (question.answer, backbone.longest_answer),
        ):
            if limit is not None and (size := len(text.encode())) > limit.size:
                raise SpecError(
                    f"'{text}' of question '{question.name}' in {vqa.file} has {size} bytes, the policy takes at most "
                    f"{limit.size}. Take it out, or raise policy.backbone.{limit.key}; vqa.turns=first leaves "
                    "later turns out."
                )


def vqa_of(policy: Policy, how: VqaTraining, path: Path | str) -> tuple[CoTraining, TrainedVqa, str]:
    """A VQA data set divided, with its images at the size that the policy looks at.

    Returns:
        what is learned from, what later evaluations need to know of it, and a line for the model card.
    """
    views = policy.model.backbone.views
    found = VqaDataset.open(path, how.turns)
    require_askable(policy.config, found)
    images = ImageCache.open(found, next(iter(views.values())) or how.size)
    state_dim = policy.processor.state.dim
    train, held = (
        VqaSource(found, images, tuple(views), state_dim, part) if part else None for part in found.split(how.held_out)
    )
    assert train is not None  # a part of every set stays
    line = (
        f"{found.root.name}, {len(train)} for training, {len(held or ())} held out, on {how.share:g} of the steps, "
        f"fingerprint {found.fingerprint}"
    )
    trained = TrainedVqa(found.fingerprint, how.turns, how.held_out, how.size)
    return CoTraining(train, held, how.share, how.batch_size), trained, line
