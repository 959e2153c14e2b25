"""Question sets in training runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlaflow.config import to_json
from vlaflow.data.pictures import PictureCache, Questions, require_shown
from vlaflow.data.questions import QuestionSet
from vlaflow.errors import CapabilityError, SpecError
from vlaflow.policies.base import Policy, PolicyConfig
from vlaflow.policies.recipe import TrainConfig


@dataclass(frozen=True)
class Asked:
    """The questions of a run: those to train on, those held out, and what to say of them."""

    train: Questions
    held: Questions | None
    words: str
    identity: Mapping[str, Any]


def asked_before(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The questions behind a checkpoint: those of its own training and of the checkpoints that it continues.

    Args:
        run: what its training was told (``checkpoint.run_of``).

    Returns:
        For each set its fingerprint ("questions"), how conversations were read ("turns") and the share held out ("held_out").
    """
    own, earlier = (run.get("config") or {}).get("questions"), list(run.get("asked_before", ()))
    if own is None:
        return earlier
    return [*earlier, {"questions": run.get("questions"), "turns": own["turns"], "held_out": own["held_out"]}]


def with_ancestors(run: Mapping[str, Any], config: TrainConfig, before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A run's identity with what its ancestors were asked, where its own questions do not say the same."""
    own = asked_before({**run, "config": to_json(config)})
    others = [dict(each) for number, each in enumerate(before) if each not in own and each not in before[:number]]
    return {**run, **({"asked_before": others} if others else {})}


def require_askable(policy: PolicyConfig, questions: QuestionSet) -> None:
    """Refuse a policy that cannot learn these questions, before it is built.

    Raises:
        CapabilityError: it has no language-model head.
        SpecError: a question shows more pictures than it has views, or is longer than it can read or say.
    """
    backbone = policy.backbone
    if not backbone.can_answer:
        raise CapabilityError(
            "This backbone has no language-model head, so it can neither learn nor give answers. Train one that has: --set "
            "policy.backbone.answers=true."
        )
    for question in questions.questions:
        require_shown(question, questions, backbone.views)
        for text, limit in (
            (question.question, backbone.longest_instruction),
            (question.answer, backbone.longest_answer),
        ):
            if limit is not None and (size := len(text.encode())) > limit.size:
                raise SpecError(
                    f"'{text}' of question '{question.name}' in {questions.file} has {size} bytes, the policy takes at most "
                    f"{limit.size}. Take it out, or raise policy.backbone.{limit.key}; questions.turns=first leaves "
                    "later turns out."
                )


def questions_of(policy: Policy, config: TrainConfig, path: Path | str | None) -> Asked:
    """The questions of a config that has some, divided, with their pictures at the size that the policy looks at."""
    asks, views = config.questions, policy.model.backbone.views
    assert asks is not None
    assert path is not None
    found = QuestionSet.open(path, asks.turns)
    require_askable(policy.config, found)
    pictures = PictureCache.open(found, next(iter(views.values())) or asks.size)
    state_dim = len(policy.stats["state"].mean)
    train, held = (
        Questions(found, pictures, tuple(views), state_dim, part) if part else None for part in found.split(asks.held_out)
    )
    assert train is not None  # a part of every set stays
    words = (
        f"{found.root.name}, {len(train)} for training, {len(held or ())} held out, on {asks.share:g} of the steps, "
        f"fingerprint {found.fingerprint}"
    )
    return Asked(train, held, words, {"questions": found.fingerprint})
