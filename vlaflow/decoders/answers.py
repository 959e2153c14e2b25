"""Answers in words, one token after the other: always the most probable id, until the end or a limit.

Keys and values of prefix and earlier tokens are kept, so each token costs one pass over itself. An answer that has not ended
within the limit is cut there, and says so.

Shape letters: B batch, T answer tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlaflow.backbones.base import Prefix
from vlaflow.backbones.language import IGNORED, speaking
from vlaflow.errors import ConfigError
from vlaflow.stacks.shared import SharedStack


@dataclass(frozen=True)
class Answers:
    """B answers.

    Args:
        id_BT: int64, the end included; −100 after it. T is the length of the longest.
        ended_B: bool, whether the end came within the limit.
    """

    id_BT: Tensor
    ended_B: Tensor


@dataclass(frozen=True)
class Answer:
    """The text of an answer, and whether its end came within the limit."""

    text: str
    ended: bool


@torch.no_grad()
def greedy(prefix: Prefix, end_id: int, limit: int = 32, allowed_V: Tensor | None = None) -> Answers:
    """The most probable id at every place, given those before it.

    Args:
        prefix: observations, run to any depth.
        end_id: ends an answer (``Processor.end_id``).
        limit: most ids of an answer, the end included.
        allowed_V: bool, ids that may be chosen (the end among them, or every answer is as long as the limit); None for all.

    Raises:
        CapabilityError: when the backbone has no language-model head.
        ConfigError: for a limit below 1, or beyond what the backbone has positions for.
    """
    if limit < 1:
        raise ConfigError(f"An answer has at least one token, so the limit cannot be {limit}.")
    backbone = speaking(prefix.backbone)
    prefix = backbone.run(prefix)
    cache = SharedStack.cache(prefix, limit - 1)
    state_BW = backbone.before_answer(prefix)
    ended_B = torch.zeros(prefix.batch, dtype=torch.bool, device=state_BW.device)
    found: list[Tensor] = []
    for place in range(limit):
        logits_BV = backbone.name_ids(state_BW)
        if allowed_V is not None:
            logits_BV = logits_BV.masked_fill(~allowed_V.to(logits_BV.device), float("-inf"))
        id_B = logits_BV.argmax(-1)
        found.append(id_B.masked_fill(ended_B, IGNORED))
        ended_B = ended_B | (id_B == end_id)
        if place + 1 == limit or bool(ended_B.all()):
            break
        state_BW = SharedStack.extend(backbone.embed_ids(id_B[:, None]), prefix, cache)[:, 0]
    return Answers(torch.stack(found, 1), ended_B)
