"""Which parts of a draft to regenerate: a score per action, and the limit above which the action is doubted.

The refinement itself is in ``refine`` and, for tokens, in ``refine_tokens``. ``evaluation.refinement`` compares the scores with
true errors on held-out data, where demonstrations exist.

Shape letters: R observations, L chunk size, D action dimension, S token slots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Generator, Tensor

from vlaflow.backbones.base import Prefix
from vlaflow.compute.base import Passes, Stopwatch
from vlaflow.compute.consensus import Consensus
from vlaflow.decoders.base import Conditioning, Tokens
from vlaflow.decoders.model import Model
from vlaflow.errors import CapabilityError, ConfigError
from vlaflow.flows.categorical import uniforms


@dataclass(frozen=True)
class Draft:
    """What a doubt looks at: first chunks of R observations.

    Args:
        model, watch: as in ``ComputePolicy.decode``.
        prefix: at full depth.
        generators: one per observation.
        action_RLD: normalised.
        spread_RL: of the draws they were made from, where there were several.
        conditioning: what they were made with.
    """

    model: Model
    prefix: Prefix
    generators: Sequence[Generator]
    action_RLD: Tensor
    spread_RL: Tensor | None
    watch: Stopwatch
    conditioning: Conditioning | None = None


@dataclass(frozen=True)
class Scores:
    """How doubtful the actions of drafts are.

    Args:
        score_RL: float, the larger the more doubtful.
        confidence_RL: the rater's, where it was run.
        spread_RL: of several draws, where they were made for this.
        nfe, layer_passes: what such draws cost each observation; empty without them.
    """

    score_RL: Tensor
    confidence_RL: Tensor | None = None
    spread_RL: Tensor | None = None
    nfe: tuple[int, ...] = ()
    layer_passes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Judged:
    """What a doubt says of drafts.

    Args:
        doubted: bool, of actions (R, L) or of tokens (R, S).
        confidence_RL, spread_RL, nfe, layer_passes: see ``Scores``.
    """

    doubted: Tensor
    confidence_RL: Tensor | None = None
    spread_RL: Tensor | None = None
    nfe: tuple[int, ...] = ()
    layer_passes: tuple[int, ...] = ()

    @staticmethod
    def by(scores: Scores, doubted: Tensor) -> Judged:
        """What was doubted by these scores."""
        return Judged(doubted, scores.confidence_RL, scores.spread_RL, scores.nfe, scores.layer_passes)

    def cost(self, model: Model) -> list[tuple[int, int]]:
        """Decoder evaluations and layer passes of the judgement of each observation, the rater's included."""
        rated = model.rater.layers if model.rater is not None and self.confidence_RL is not None else 0
        nothing = (0,) * len(self.doubted)
        return [(n, rated + p) for n, p in zip(self.nfe or nothing, self.layer_passes or nothing, strict=True)]


class TokenDoubt(ABC):
    """Which tokens of a draft to regenerate. A kind is a frozen dataclass.

    Attributes:
        rater: whether it needs the rater.
    """

    rater: bool = False

    @property
    def spread(self) -> bool:
        """Whether it needs a first round of several draws."""
        return False

    def passes(self, depth: int) -> Passes:
        """The passes through the networks that the judgement takes, besides the rater's; by default none."""
        return Passes(frozenset(), frozenset())

    @abstractmethod
    def judge_tokens(self, draft: Draft, tokens: Tokens) -> Judged:
        """The doubted tokens."""


class Doubt(TokenDoubt):
    """Which actions of a draft to regenerate, or which tokens where each token belongs to one action.

    Attributes:
        name: of the refinement, for tables.
    """

    name: str

    @abstractmethod
    def score(self, draft: Draft) -> Scores:
        """How doubtful each action is."""

    @property
    @abstractmethod
    def limit(self) -> float:
        """Score above which an action is doubted."""

    def judge(self, draft: Draft) -> Judged:
        """The doubted actions."""
        found = self.score(draft)
        return Judged.by(found, found.score_RL > self.limit)

    def judge_tokens(self, draft: Draft, tokens: Tokens) -> Judged:
        """All tokens of the doubted actions; see ``TokenDoubt``."""
        tokenizer = draft.model.decoder.tokenizer
        if tokenizer is None or not tokenizer.local:
            raise CapabilityError(
                f"{type(self).__name__} doubts actions, but in this checkpoint a token belongs to several actions. Doubt "
                "tokens instead: RefineTokens(Improbable(0.5))."
            )
        judged = self.judge(draft)
        return replace(judged, doubted=judged.doubted.repeat_interleave(tokenizer.dim, 1))


@dataclass(frozen=True)
class BelowThreshold(Doubt):
    """Doubt the actions that the rater gives less than ``threshold`` (AsyncVLA eq. 3)."""

    threshold: float = 0.5

    name = "refine"
    rater = True

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"A confidence threshold lies in [0, 1], got {self.threshold}.")

    @property
    def limit(self) -> float:
        """See ``Doubt``; changing both signs rounds nothing."""
        return -self.threshold

    def score(self, draft: Draft) -> Scores:
        """The negative confidence."""
        if draft.model.rater is None:
            raise CapabilityError("Refinement by confidence needs a rater.")
        with draft.watch.part("rater"):
            confidence_RL = draft.model.rater(draft.prefix, draft.action_RLD)
            return Scores(-confidence_RL, confidence_RL)


@dataclass(frozen=True)
class AtRandom(Doubt):
    """Doubt each action with this probability, by the observations' generators: the paper's control for the rater."""

    probability: float = 0.5

    name = "refine-random"

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"A probability lies in [0, 1], got {self.probability}.")

    @property
    def limit(self) -> float:
        """See ``Doubt``."""
        return -self.probability

    def score(self, draft: Draft) -> Scores:
        """Uniform in (−1, 0]."""
        return Scores(-uniforms(draft.generators, draft.action_RLD.shape[1:2], draft.action_RLD.device))


@dataclass(frozen=True)
class Spread(Doubt):
    """Doubt the actions on which several draws lie more than ``threshold`` apart, in the units of ``Chunk.spread``.

    Args:
        threshold: largest spread that is not doubted.
        draws: made to measure the spread of a first round that is a single chunk, as of one without noise; None takes the
            spread that the first round reports.
    """

    threshold: float = 0.5
    draws: Consensus | None = None

    name = "refine-spread"

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ConfigError(f"A spread is 0 or more, got {self.threshold}.")

    @property
    def spread(self) -> bool:
        """Whether it needs a first round of several draws."""
        return self.draws is None

    @property
    def limit(self) -> float:
        """See ``Doubt``."""
        return self.threshold

    def passes(self, depth: int) -> Passes:
        """Those of its own draws, whose prefix has been read."""
        return Passes(frozenset(), frozenset() if self.draws is None else self.draws.passes(depth).steps)

    def score(self, draft: Draft) -> Scores:
        """The spread."""
        if self.draws is not None:
            with draft.watch.part("first"):
                watch = Stopwatch(draft.watch.device)
                made = self.draws.decode(draft.model, draft.prefix, draft.generators, watch, draft.conditioning)
            assert made.spread_BL is not None  # a consensus reports it
            passes = tuple(count - draft.prefix.depth for count in made.layer_passes)
            return Scores(made.spread_BL, None, made.spread_BL, made.nfe, passes)
        if draft.spread_RL is None:
            raise CapabilityError("Refinement by spread needs several draws.")
        return Scores(draft.spread_RL)


def require_spread(name: str, doubt: TokenDoubt, reports_spread: bool) -> None:
    """Refuse a doubt about the spread of draws where the first round makes one draw."""
    if doubt.spread and not reports_spread:
        raise ConfigError(
            f"{name} doubts actions on which several draws differ, and its first round makes one chunk. Give it a "
            "consensus, as in refine-spread+mean:8, or draws of its own, as in refine-spread:draws=8+dense:2@0."
        )
