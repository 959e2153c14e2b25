"""Latent action tokens: the backbone predicts what will happen, in a few codes, before any action is made (iFlyBot-VLA §3).

The codes are those of a latent action model (``actions.latent``), K of a book of N. By default the backbone answers all of them
in one pass, from K learned query tokens that see the prefix and one another; "autoregressive" answers one after the other, each
seeing the ones before it, as the published code does. Either way the tokens' keys and values stay behind for an expert to read.

Shape letters: B batch, K codes, N codes in the book, T tokens, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vlaflow.backbones.base import BackboneSpec, Prefix
from vlaflow.decoders.tokens import cross_entropy
from vlaflow.errors import ConfigError
from vlaflow.nn.attention import KeyValues, causal_mask
from vlaflow.stacks.shared import Cache, SharedStack


@dataclass(frozen=True)
class LatentTokensConfig:
    """The latent action tokens.

    Args:
        codes: per observation, K.
        book: codes in the book, N.
        answer: "parallel" from query tokens in one pass, or "autoregressive".
    """

    codes: int = 8
    book: int = 32
    answer: Literal["parallel", "autoregressive"] = "parallel"

    def __post_init__(self) -> None:
        if self.codes < 1 or self.book < 2:
            raise ConfigError(f"Latent actions are at least one code of a book of two, got {self.codes} of {self.book}.")

    def build(self, spec: BackboneSpec) -> LatentReader:
        """Query tokens and output head for such a backbone, randomly initialised."""
        return LatentReader(self, spec)


@dataclass(frozen=True)
class Written:
    """Latent action tokens that the backbone has written.

    Args:
        hidden: (B, K, W) after each depth that was asked, from which each code is read.
        kv_cache: keys and values of the K tokens, by layer.
    """

    hidden: tuple[Tensor, ...]
    kv_cache: tuple[KeyValues, ...]

    def after(self, prefix: Prefix) -> Prefix:
        """The prefix with these tokens behind it."""
        return prefix.reading(tuple(p.cat(own) for p, own in zip(prefix.kv_cache, self.kv_cache, strict=False)), self.count)

    def alone(self, prefix: Prefix) -> Prefix:
        """These tokens in the place of the prefix."""
        return prefix.reading(self.kv_cache, self.count)

    @property
    def count(self) -> int:
        """K."""
        return self.kv_cache[0].key_CGPE.shape[2]


class LatentReader(nn.Module):
    """See the module text."""

    def __init__(self, config: LatentTokensConfig, spec: BackboneSpec) -> None:
        super().__init__()
        self.config = config
        # the queries; or one token to begin with and one per code
        rows = config.codes if config.answer == "parallel" else 1 + config.book
        self.embedding = nn.Embedding(rows, spec.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head = nn.Linear(spec.width, config.book)

    @property
    def passes(self) -> int:
        """Passes through the backbone's layers that ``read`` takes."""
        return 1 if self.config.answer == "parallel" else 1 + self.config.codes

    @property
    def suffix_tokens(self) -> int:
        """One per code, and the one to begin with where they follow each other."""
        return self.config.codes + (self.config.answer == "autoregressive")

    def read(self, prefix: Prefix) -> Written:
        """Have the tokens written, greedily where one depends on another, through as many layers as the prefix has run."""
        if self.config.answer == "parallel":
            return self._parallel(prefix, (prefix.depth,))
        k, hidden = self.config.codes, []
        cache = self.cache(prefix)
        row_B1 = torch.zeros(prefix.batch, 1, dtype=torch.long, device=prefix.hidden_BPW.device)  # to begin with
        for _ in range(k):
            hidden_B1W, logits_B1N = self.following(self.embedding(row_B1), prefix, cache)
            hidden.append(hidden_B1W)
            row_B1 = 1 + logits_B1N.argmax(-1)
        self.following(self.embedding(row_B1), prefix, cache)
        own = tuple(KeyValues(m.key_CGPE[:, :, -k:], m.value_CGPE[:, :, -k:]) for m in cache.layers)
        return Written((torch.cat(hidden, 1),), own)

    def cache(self, prefix: Prefix) -> Cache:
        """Room behind the prefix for the token to begin with and one per code."""
        return SharedStack.cache(prefix, 1 + self.config.codes)

    def following(self, token_B1W: Tensor, prefix: Prefix, cache: Cache) -> tuple[Tensor, Tensor]:
        """Hidden states (B, 1, W) and scores (B, 1, N) of the code after this token, whose keys and values are then cached."""
        hidden_B1W = SharedStack.extend(token_B1W, prefix, cache)
        return hidden_B1W, self.logits(hidden_B1W)

    def teach(self, prefix: Prefix, code_BK: Tensor | None, depths: Sequence[int]) -> Written:
        """All tokens in one pass through several depths, each seeing the codes before it where that is how it answers.

        These are the true ones; where a row has none (−1), those that ``read`` answers, as when it acts.
        """
        if self.config.answer == "parallel":
            return self._parallel(prefix, depths)
        assert code_BK is not None  # see LatentFlowConfig
        if bool((code_BK < 0).any()):
            # with gradients, which are not needed: autocast keeps the weights it casts, and must not keep them without
            code_BK = torch.where(code_BK < 0, self.logits(self.read(prefix).hidden[-1]).argmax(-1), code_BK)
        mask_TS = causal_mask(self.config.codes + 1, code_BK.device)
        hidden, kv_cache = prefix.backbone.follow(self._shifted(code_BK), prefix, depths, mask_TS)
        # the first token says nothing of an action; hidden states are one place ahead of the codes they name
        kept = tuple(KeyValues(m.key_CGPE[:, :, 1:], m.value_CGPE[:, :, 1:]) for m in kv_cache)
        return Written(tuple(h_BTW[:, :-1] for h_BTW in hidden), kept)

    def logits(self, hidden_BKW: Tensor) -> Tensor:
        """Scores of every code in the book, (B, K, N)."""
        return self.head(hidden_BKW)

    def loss(self, hidden_BKW: Tensor, code_BK: Tensor) -> Tensor:
        """Mean cross-entropy over the known codes; exactly 0, without a gradient, when there is none."""
        return cross_entropy(self.logits(hidden_BKW), code_BK.clamp(min=0), (code_BK >= 0).float())

    def _parallel(self, prefix: Prefix, depths: Sequence[int]) -> Written:
        query_BKW = self.embedding.weight[None].expand(prefix.batch, -1, -1)
        hidden, kv_cache = prefix.backbone.follow(query_BKW, prefix, depths)
        return Written(tuple(hidden), kv_cache)

    def _shifted(self, code_BK: Tensor) -> Tensor:
        begin_B1 = code_BK.new_zeros(len(code_BK), 1)
        return self.embedding(torch.cat((begin_B1, code_BK + 1), 1))
