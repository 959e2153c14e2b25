"""Backbones with a vocabulary: what follows a prefix as tokens, how it is learned, and what the tokens say.

An answer is a row of ids: text, its end, or *extra* ids that a policy appends to the vocabulary for what is not text (latent
actions, FAST tokens). There are two ways to answer, and both end in an ``AnswerPass``, the states that name each token:

    read     autoregressive: token t is named by the token before it, which the network reads (the first by the prefix's last)
    ask      in parallel: T query tokens are read at once, see each other, and token t is named by query t

So one loss, ``score``, serves both; ``answer_loss`` is ``score(read(...))``. An answer that is partly the one and partly the
other is ``follow`` with the tokens of both and a mask of who sees whom. ``AnswerPass.memory`` holds the keys and values of
the answer's own tokens, layer by layer, for an action expert that reads them. Greedy answers are in ``decoders.answers``.

Shape letters: B batch, P prefix tokens, T answer tokens, N tokens with a target, V vocabulary, W width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vlaflow.backbones.base import Backbone, Prefix
from vlaflow.errors import CapabilityError, SpecError
from vlaflow.nn.attention import KeyValues, causal_mask

IGNORED = -100
"""An answer position without a target."""


@dataclass(frozen=True)
class AnswerPass:
    """An answer's tokens after one pass through all layers.

    Args:
        state_BTW: the state that names token t, after the final norm; ``LanguageBackbone.name_ids`` turns it into logits.
        memory: keys and values of the tokens that were read, layer by layer; their mask hides padding.
    """

    state_BTW: Tensor
    memory: tuple[KeyValues, ...]


class LanguageBackbone(Backbone):
    """A backbone that can be asked. See the module text."""

    @property
    @abstractmethod
    def text_vocabulary(self) -> int:
        """Ids of its own, ends included; extra ids begin here. 0 where it has no language-model head."""

    @property
    @abstractmethod
    def extra_ids(self) -> int:
        """Ids appended to its own, for targets that are not text."""

    @property
    @abstractmethod
    def end_id(self) -> int:
        """The id that ends an answer."""

    @abstractmethod
    def embed_ids(self, id_BT: Tensor) -> Tensor:
        """Embedded answer tokens (B, T, W) of ids in 0 .. vocabulary − 1."""

    @abstractmethod
    def name_ids(self, state_NW: Tensor) -> Tensor:
        """Logits (..., V) over all ids of states (..., W) that have passed the final norm."""

    @abstractmethod
    def answer_ids(self, answers: Sequence[str]) -> Tensor:
        """Ids of each answer and its end, (B, T) int64, padded with −100."""

    @abstractmethod
    def answer_texts(self, id_BT: Tensor) -> list[str]:
        """What rows of ids say, up to their end."""

    @property
    def vocabulary(self) -> int:
        """All ids an answer may hold, V."""
        return self.text_vocabulary + self.extra_ids

    # -- passes ------------------------------------------------------------------------------------------------------

    def follow(
        self, prefix: Prefix, token_BTW: Tensor, mask_TS: Tensor | None = None, seen_BT: Tensor | None = None
    ) -> AnswerPass:
        """Embedded tokens behind the prefix, through all layers; they see the prefix, and each other where ``mask_TS`` says.

        Args:
            prefix: observations, run to any depth.
            token_BTW: embedded tokens.
            mask_TS: bool (T, T), True where token t sees token s; None for full attention.
            seen_BT: bool, False on padding.
        """
        prefix = self.run(prefix)
        hidden_BTW, rotary = self.place(token_BTW, prefix)
        found = []
        for index, memory in enumerate(prefix.memory):
            hidden_BTW, own = self.layer(index, hidden_BTW, rotary, memory, seen_BT, mask_TS=mask_TS)
            found.append(own)
        return AnswerPass(self.finish(hidden_BTW), tuple(found))

    def read(self, prefix: Prefix, answer_ids: Tensor) -> AnswerPass:
        """The autoregressive pass over known answers.

        Raises:
            CapabilityError, SpecError: see ``answer_loss``.
        """
        known_BT = self._known(answer_ids).to(prefix.hidden_BPW.device)
        prefix = self.run(prefix)
        token_BTW = self.embed_ids(answer_ids.to(known_BT.device).clamp(min=0))
        seen_BT = None if bool(known_BT.all()) else known_BT
        passed = self.follow(prefix, token_BTW, causal_mask(known_BT.shape[1], known_BT.device), seen_BT)
        before_BTW = torch.cat((self.before_answer(prefix)[:, None], passed.state_BTW[:, :-1]), 1)
        return AnswerPass(before_BTW, passed.memory)

    def ask(self, prefix: Prefix, query_TW: Tensor) -> AnswerPass:
        """The parallel pass over query tokens, (T, W) for all observations or (B, T, W); queries see each other.

        Raises:
            CapabilityError: without a language-model head.
        """
        self.require_head()
        return self.follow(prefix, query_TW.expand(prefix.batch, *query_TW.shape[-2:]))

    def before_answer(self, prefix: Prefix) -> Tensor:
        """The state (B, W) that names an answer's first token: the last token of the prefix, after all layers and the norm."""
        prefix = self.run(prefix)
        if prefix.seen_BP is None:
            return self.finish(prefix.hidden_BPW[:, -1])
        last_B = prefix.seen_BP.shape[1] - 1 - prefix.seen_BP.flip(1).int().argmax(1)
        return self.finish(prefix.hidden_BPW[torch.arange(len(last_B), device=last_B.device), last_B])

    # -- losses ------------------------------------------------------------------------------------------------------

    def score(self, passed: AnswerPass, answer_ids: Tensor) -> Tensor:
        """Mean cross-entropy of the ids that have a target, each with the same weight, whichever answer it is part of.

        Raises:
            CapabilityError, SpecError: see ``answer_loss``.
        """
        known_BT = self._known(answer_ids).to(passed.state_BTW.device)
        target_N = answer_ids.to(known_BT.device)[known_BT]
        return functional.cross_entropy(self.name_ids(passed.state_BTW[known_BT]).float(), target_N)

    def answer_loss(self, prefix: Prefix, answer_ids: Tensor) -> Tensor:
        """Mean cross-entropy of the answers' ids, each named from the prefix and the answer before it.

        Args:
            prefix: observations, run to any depth.
            answer_ids: int64 (B, T); a negative entry has no target and may only follow an answer's end.

        Raises:
            CapabilityError: without a language-model head.
            SpecError: for an answer without any id, with a hole, or with an id beyond the vocabulary.
        """
        return self.score(self.read(prefix, answer_ids), answer_ids)

    # -- checks ------------------------------------------------------------------------------------------------------

    def require_head(self) -> None:
        """Nothing, where there is a vocabulary.

        Raises:
            CapabilityError: without a language-model head.
        """
        if not self.vocabulary:
            raise CapabilityError(
                f"This {type(self).__name__} has no language-model head, so it can neither learn nor give answers. "
                "Train one that has: --set policy.backbone.answers=true."
            )

    def _known(self, answer_ids: Tensor) -> Tensor:
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
                "Raise the backbone's extra_ids."
            )
        return known_BT


def speaking(backbone: Backbone) -> LanguageBackbone:
    """The backbone, where it can be asked.

    Raises:
        CapabilityError: when it has no language-model head.
    """
    if not isinstance(backbone, LanguageBackbone):
        raise CapabilityError(f"{type(backbone).__name__} has no language-model head, so it cannot answer.")
    backbone.require_head()
    return backbone
