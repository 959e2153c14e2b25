"""Backbones with a vocabulary: what they say behind a prefix, and how it is learned. What ids mean, their processors know.

An answer is a row of ids: text and its end. Each id is named by the token before it, the first by the last of the prefix.
Greedy answers are in ``decoders.answers``. Actions have no part in this vocabulary: decoders of tokens embed and name theirs.

Shape letters: B batch, T answer tokens, N tokens with a target, V vocabulary, W width.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from vlaflow.backbones.base import Backbone, BackboneConfig, Prefix
from vlaflow.errors import CapabilityError, SpecError
from vlaflow.nn.attention import causal_mask

IGNORED = -100
"""An answer position without a target."""


class LanguageBackbone(Backbone):
    """A backbone that can answer questions. See the module text."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Ids an answer may hold, ends included, V; 0 where there is no language-model head."""

    @abstractmethod
    def embed_ids(self, id_BT: Tensor) -> Tensor:
        """Embedded answer tokens (B, T, W) of ids in 0 .. V − 1."""

    @abstractmethod
    def name_ids(self, state_NW: Tensor) -> Tensor:
        """Logits (..., V) over all ids of states (..., W) that have passed the final norm."""

    def rows(self, id_N: Tensor) -> tuple[Tensor, Tensor]:
        """The rows (N, W) that ids are read and named with; by default the same, of one table."""
        row_NW = self.embed_ids(id_N)
        return row_NW, row_NW

    def read(self, prefix: Prefix, answer_ids: Tensor) -> Tensor:
        """The states (B, T, W) that name each id of known answers, in one pass; ``name_ids`` turns them into logits.

        Raises:
            CapabilityError, SpecError: see ``answer_loss``.
        """
        self._check(answer_ids)
        prefix = self.run(prefix)
        token_BTW = self.embed_ids(answer_ids.to(prefix.hidden_BPW.device).clamp(min=0))
        # what pads a short answer comes after it, so nothing that counts sees it
        mask_TS = causal_mask(token_BTW.shape[1], token_BTW.device)
        (state_BTW,), _ = self.follow(token_BTW, prefix, (prefix.depth,), mask_TS)
        return torch.cat((self.before_answer(prefix)[:, None], state_BTW[:, :-1]), 1)

    def before_answer(self, prefix: Prefix) -> Tensor:
        """The state (B, W) that names an answer's first token: the last token of the prefix, after all layers and the norm."""
        prefix = self.run(prefix)
        if prefix.padding_mask_BP is None:
            return self.finish(prefix.hidden_BPW[:, -1])
        last_B = prefix.padding_mask_BP.shape[1] - 1 - prefix.padding_mask_BP.flip(1).int().argmax(1)
        return self.finish(prefix.hidden_BPW[torch.arange(len(last_B), device=last_B.device), last_B])

    def answer_loss(self, prefix: Prefix, answer_ids: Tensor) -> Tensor:
        """Mean cross-entropy of the answers' ids, each with the same weight, named from the prefix and the answer before it.

        Args:
            prefix: observations, run to any depth.
            answer_ids: int64 (B, T), on the CPU; a negative entry has no target and may only follow an answer's end.

        Raises:
            CapabilityError: without a language-model head.
            SpecError: for an answer without any id, with a hole, or with an id beyond the vocabulary.
        """
        state_BTW = self.read(prefix, answer_ids)
        known_BT = answer_ids >= 0  # counted on the CPU, so that nothing waits for the device
        row_N, place_N = known_BT.nonzero(as_tuple=True)
        target_N = answer_ids[known_BT].to(state_BTW.device)
        return functional.cross_entropy(self.name_ids(state_BTW[row_N, place_N]).float(), target_N)

    def require_head(self) -> None:
        """Nothing, where there is a vocabulary.

        Raises:
            CapabilityError: without a language-model head.
        """
        if not self.vocabulary:
            raise headless(self)

    def _check(self, answer_ids: Tensor) -> None:
        self.require_head()
        known_BT = answer_ids >= 0
        if not bool(known_BT[:, :1].all()) or not answer_ids.shape[1]:
            row = 0 if not answer_ids.shape[1] else int(known_BT[:, 0].int().argmin())
            raise SpecError(f"Answer {row} of the batch is empty. Leave the sample out, or give it an answer with an end.")
        if bool((known_BT[:, 1:] & ~known_BT[:, :-1]).any()):
            raise SpecError("An answer has a hole: ids without a target may only follow its end.")
        if int(answer_ids.max()) >= self.vocabulary:
            raise SpecError(
                f"An answer holds id {int(answer_ids.max())}, the vocabulary ends at {self.vocabulary - 1}. "
                "Have the answer_ids of this backbone's own processor make the ids."
            )


def headless(backbone: Backbone | BackboneConfig) -> CapabilityError:
    """The error for a network without a language-model head, or for its config."""
    return CapabilityError(
        f"{type(backbone).__name__} has no language-model head, so it can neither learn nor give answers. Train a policy whose "
        "backbone has one; the tiny one has with --set policy.backbone.answers=true."
    )


def speaking(backbone: Backbone) -> LanguageBackbone:
    """The backbone, if it can answer questions.

    Raises:
        CapabilityError: when it has no language-model head.
    """
    if not isinstance(backbone, LanguageBackbone):
        raise headless(backbone)
    backbone.require_head()
    return backbone
