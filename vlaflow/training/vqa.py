"""Question sets in training runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlaflow.config import to_json
from vlaflow.data.image_cache import ImageCache, VqaSource, require_shown
from vlaflow.data.vqa import VqaDataset
from vlaflow.errors import CapabilityError, SpecError
from vlaflow.policies.base import Policy, PolicyConfig
from vlaflow.policies.provenance import TrainedQuestions
from vlaflow.policies.recipe import TrainConfig


@dataclass(frozen=True)
class VqaSplit:
    """The questions of a run: those to train on, those held out, and what to say of them."""

    train: VqaSource
    held: VqaSource | None
    words: str
    identity: Mapping[str, Any]


def require_askable(policy: PolicyConfig, vqa: VqaDataset) -> None:
    """Refuse a policy that cannot learn these questions, before it is built.

    Raises:
        CapabilityError: it has no language-model head.
        SpecError: a question shows more images than it has views, or is longer than it can read or say.
    """
    backbone = policy.backbone
    if not backbone.can_answer:
        raise CapabilityError(
            "This backbone has no language-model head, so it can neither learn nor give answers. Train one that has: --set "
            "policy.backbone.answers=true."
        )
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


def vqa_of(policy: Policy, config: TrainConfig, path: Path | str | None) -> VqaSplit:
    """The questions of a config that has some, divided, with their images at the size that the policy looks at."""
    asks, views = config.vqa, policy.model.backbone.views
    assert asks is not None
    assert path is not None
    found = VqaDataset.open(path, asks.turns)
    require_askable(policy.config, found)
    image_cache = ImageCache.open(found, next(iter(views.values())) or asks.size)
    state_dim = len(policy.stats["state"].mean)
    train, held = (
        VqaSource(found, image_cache, tuple(views), state_dim, part) if part else None for part in found.split(asks.held_out)
    )
    assert train is not None  # a part of every set stays
    words = (
        f"{found.root.name}, {len(train)} for training, {len(held or ())} held out, on {asks.share:g} of the steps, "
        f"fingerprint {found.fingerprint}"
    )
    trained = TrainedQuestions(found.fingerprint, asks.turns, asks.held_out, asks.size)
    return VqaSplit(train, held, words, {"vqa": to_json(trained)})
