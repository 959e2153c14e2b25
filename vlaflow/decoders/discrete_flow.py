"""Discrete flow matching over action tokens: every token may be revised at every step (DFM-VLA).

All tokens start as uniform noise. At each step the network guesses the final chunk from the present one; the guess defines a
velocity, and the tokens jump along it. Two variants (``velocity``):

    "metric"   training corrupts along a metric path and learns cross-entropy to the target; the velocity is the
               kinetic-optimal one of that path (DFM-VLA's embedding-guided variant; with ``BinMetric`` bins know their order)
    "rate"     training corrupts along the mixture path; a head predicts how fast each token should leave
               (DFM-VLA's head variant, after Edit Flows with substitutions alone)

``refine_deterministic`` adds deterministic steps: the most probable token everywhere, given all the others (the validation of
DFM-VLA).

The paper runs t = 1 − clock. The network does not see the clock unless ``clock_input`` says so.

Shape letters: B batch (observations × noise samples, samples innermost), S token slots, V vocabulary, W width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from vlaflow.backbones.base import Backbone, BackboneSpec, Prefix, RunsLayers
from vlaflow.decoders.base import Capability, Conditioning, Targets, TokenConditioning, Tokens
from vlaflow.decoders.losses import Draws, LossTerms, mean_over_exits
from vlaflow.decoders.tokens import TokenConfig, TokenDecoder, TokenState, cross_entropy, probability_of
from vlaflow.errors import ConfigError
from vlaflow.flows import discrete, gaussian, metrics
from vlaflow.flows.categorical import pick, tempered, uniforms
from vlaflow.flows.sampling import Sampling
from vlaflow.nn.time import clock_embedding

_SMALLEST = 1e-9
"""Probability below which nothing is left."""


class TokenMetric(ABC):
    """The distance between tokens along which the metric path moves. A kind is a frozen dataclass.

    Attributes:
        ordered: whether it needs a tokenizer whose ids are ordered by value.
    """

    ordered: bool = False

    @property
    def frozen(self) -> bool:
        """Whether distances are those of the embeddings before training."""
        return False

    @abstractmethod
    def distance(self, table_VW: Tensor) -> Tensor:
        """d between all tokens, (V, V), mean 1 off the diagonal, given their embeddings."""


@dataclass(frozen=True)
class EmbeddingMetric(TokenMetric):
    """Distances of the tokens' embeddings.

    Args:
        table: "live" follows the embeddings as they train (without a gradient); "frozen" keeps those of the start.
        power: of the Euclidean distance of the unit-norm rows; the larger, the earlier the chain arrives.
    """

    table: Literal["live", "frozen"] = "live"
    power: metrics.Power = 2

    @property
    def frozen(self) -> bool:
        """See ``TokenMetric``."""
        return self.table == "frozen"

    def distance(self, table_VW: Tensor) -> Tensor:
        """See ``TokenMetric``."""
        return metrics.embedding_distance(table_VW, self.power)


@dataclass(frozen=True)
class BinMetric(TokenMetric):
    """Differences of ordered ids: bins, or FAST without merges.

    Args:
        power: of the difference.
    """

    power: metrics.Power = 1

    ordered = True

    def distance(self, table_VW: Tensor) -> Tensor:
        """See ``TokenMetric``."""
        return metrics.bin_distance(len(table_VW), power=self.power).to(table_VW.device)


@dataclass(frozen=True)
class DiscreteFlowConfig(TokenConfig):
    """The discrete flow decoder. What DFM-VLA does not say is marked [ours].

    Args:
        velocity: see the module text.
        metric: of the metric path.
        schedule: c and α of the metric path.
        jump: "linear" leaves with min(1, hλ) (DFM-VLA), "exponential" with 1 − exp(−hλ) (FUDOKI).
        guess: the final chunk as the network sees it, unless a temperature is asked for: the "top" token everywhere [ours], or
            a "sample".
        masks: "synchronous" draws one clock per chunk; "unified" noises each token with a probability y ~ U(0, 1), so that
            tokens given clean are context the network knows [ours, after AsyncVLA].
        clock_input: add a projection of the embedding of each token's clock to its own; the projection starts at zero [ours].
        attention: "blind": the prefix never sees the action tokens, its keys and values are computed once and exact;
            "full": everything sees everything, and the prefix is run again with the tokens.
        refresh: with "full", the share of tokens that must have changed since the prefix was last run for it to be run
            again; 0 runs it at every step, 1 never again (DFM-VLA's adaptive cache; the paper does not give its rule) [ours].
        rate_weight: of the rate head's loss relative to the cross-entropy [ours].
        rate_clip: largest weight 1/clock in the rate's loss [ours].
    """

    velocity: Literal["metric", "rate"] = "metric"
    metric: EmbeddingMetric | BinMetric = field(default_factory=EmbeddingMetric)
    schedule: discrete.MetricSchedule = field(default_factory=discrete.MetricSchedule)
    jump: discrete.JumpRule = "linear"
    guess: Literal["top", "sample"] = "top"
    masks: Literal["synchronous", "unified"] = "synchronous"
    clock_input: bool = False
    attention: Literal["blind", "full"] = "blind"
    refresh: float = 0.0
    rate_weight: float = 1.0
    rate_clip: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.refresh <= 1:
            raise ConfigError(f"refresh is a share of the tokens, in [0, 1], got {self.refresh}.")
        if not (self.rate_weight > 0 and self.rate_clip >= 1):
            raise ConfigError("rate_weight is above 0 and rate_clip at least 1.")

    def build(self, spec: BackboneSpec) -> DiscreteFlowDecoder:
        """The decoder for such a backbone, randomly initialised."""
        return DiscreteFlowDecoder(self, spec)


@dataclass(frozen=True)
class DiscreteFlowState(TokenState):
    """Tokens under way.

    Args:
        refresh: see ``DiscreteFlowConfig``; for both kinds of attention.
        cached_id_BS: tokens that the prefix was last run with.
        prefix: as it was then; None before the first step.
        refreshed: how often it was run for each observation, int64 (B,).
    """

    refresh: float = 1.0
    cached_id_BS: Tensor | None = None
    prefix: Prefix | None = None
    refreshed: Tensor = field(kw_only=True)


class DiscreteFlowDecoder(TokenDecoder[DiscreteFlowState]):
    """See the module text."""

    frozen_VW: Tensor

    def __init__(self, config: DiscreteFlowConfig, spec: BackboneSpec) -> None:
        super().__init__(config, spec)
        self.config = c = config
        if c.metric.ordered and not self.tokenizer.ordered:
            raise ConfigError(
                f"{type(c.metric).__name__} needs a tokenizer whose ids are ordered: use bins, FAST without merges, or "
                "EmbeddingMetric."
            )
        self.clock = nn.Linear(spec.width, spec.width) if c.clock_input else None
        if self.clock is not None:  # drawn at random it would drown the tokens' embeddings, which are twenty times smaller
            nn.init.zeros_(self.clock.weight)
            nn.init.zeros_(self.clock.bias)
        self.rate = nn.Linear(spec.width, 1) if c.velocity == "rate" else None
        if c.velocity == "metric" and c.metric.frozen:
            self.register_buffer("frozen_VW", self.embedding.weight[: self.vocabulary].detach().clone())
        self._distance: tuple[object, Tensor] | None = None

    @torch.no_grad()
    def begin_from(self, backbone: Backbone) -> None:
        """See the base class; frozen distances are those of the rows that the tokens begin with."""
        super().begin_from(backbone)
        if self.config.velocity == "metric" and self.config.metric.frozen:
            self.frozen_VW.copy_(self.embedding.weight[: self.vocabulary])

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Everything a decoder of tokens can do; regeneration after training with mixed clocks.

        And regeneration on the mixture path, where a token is either clean or noise at any clock: a network that does not see
        the clocks cannot tell the two apart.
        """
        c = self.config
        found = {Capability.DETERMINISTIC_STEPS, Capability.PREFIX_REFRESH, Capability.GRID, Capability.TEMPERATURE}
        if c.masks == "unified" or (c.velocity == "rate" and not c.clock_input):
            found.add(Capability.REGENERATION)
        if c.attention == "full":
            found.add(Capability.JOINT_ATTENTION)
        return self.conditioning | found

    def refreshing(self, state: DiscreteFlowState, share: float) -> DiscreteFlowState:
        """See ``Decoder``. With a prefix that is blind to the tokens, 0 is no cache at all: the same chunk, later."""
        return replace(state, refresh=share)

    def read(self, backbone: RunsLayers, prefix: Prefix, depth: int | None = None) -> Prefix:
        """With full attention nothing is run before the tokens are there."""
        return prefix if self.config.attention == "full" else backbone.run(prefix, depth)

    def distance(self) -> Tensor:
        """d between all tokens, (V, V), mean 1 off the diagonal; kept until the embeddings change."""
        metric = self.config.metric
        table_VW = self.frozen_VW if metric.frozen else self.embedding.weight[: self.vocabulary]
        key = (table_VW.data_ptr(), table_VW._version, table_VW.device)
        if self._distance is None or self._distance[0] != key:
            with torch.no_grad():
                self._distance = (key, metric.distance(table_VW))
        return self._distance[1]

    def forget_values(self) -> None:
        """See ``Decoder``; the distances of tokens are, too."""
        super().forget_values()
        self.distance = partial(torch.zeros, self.vocabulary, self.vocabulary)  # type: ignore[method-assign]

    # -- training ----------------------------------------------------------------------------------------------------

    def draw(self, batch: int, generator: Generator) -> Draws:
        """Clocks and uniform numbers, (B·K, S) each."""
        b = batch * self.noise_samples
        # 1 − U lies in (0, 1]: a clock of exactly 0 would have nothing to learn from.
        clock_BS = (1 - torch.rand(b, 1, generator=generator)).expand(b, self.slots)
        if self.config.masks == "unified":
            clock_BS = clock_BS * gaussian.sample_mask(b, self.slots, generator)
        return clock_BS, torch.rand(b, self.slots, generator=generator)

    def loss_of(self, prefix: Prefix, targets: Targets, draws: Draws, depths: Sequence[int] | None = None) -> LossTerms:
        """Cross-entropy to the target at random clocks; for the rate variant also the rate's loss."""
        c = self.config
        id_BS, weight_BS = self.encode(targets)
        id_BS, weight_BS = (x.repeat_interleave(self.noise_samples, 0) for x in (id_BS, weight_BS))
        clock_BS, uniform_BS = draws
        noisy_BS = self.corrupt(id_BS, clock_BS, uniform_BS)
        weight_BS = weight_BS * (clock_BS > 0)
        losses, rates = {}, {}
        depths = depths or (prefix.depth or prefix.backbone.spec.depth,)
        for depth, hidden_BSW in zip(depths, self._layers(noisy_BS, clock_BS, prefix, depths), strict=True):
            logits_BSV = self.head(hidden_BSW)
            losses[depth] = cross_entropy(logits_BSV, id_BS, weight_BS)
            if self.rate is not None:
                wrong_BS = (noisy_BS != id_BS).float()
                rates[depth] = self._rate_loss(hidden_BSW, logits_BSV, id_BS, wrong_BS, clock_BS, weight_BS)
        if not rates:
            return mean_over_exits("token", losses)
        terms = mean_over_exits("token", {d: losses[d] + c.rate_weight * rates[d] for d in depths})
        deepest = depths[-1]
        return replace(terms, parts={**terms.parts, "token": losses[deepest].detach(), "rate": rates[deepest].detach()})

    def corrupt(self, id_BS: Tensor, clock_BS: Tensor, uniform_BS: Tensor) -> Tensor:
        """A draw from the path at each token's clock; a token at clock 0 is returned as it is."""
        if self.config.velocity == "rate":
            weight_BSV = discrete.mixture_path(id_BS, self.vocabulary, clock_BS)
        else:
            weight_BSV = discrete.metric_path(self.distance()[id_BS], self.config.schedule.beta(clock_BS))
        return torch.where(clock_BS > 0, pick(weight_BSV, uniform_BS), id_BS)

    def _rate_loss(  # noqa: PLR0917
        self, hidden_BSW: Tensor, logits_BSV: Tensor, id_BS: Tensor, wrong_BS: Tensor, clock_BS: Tensor, weight_BS: Tensor
    ) -> Tensor:
        """λ − w·[x ≠ y]·(log λ + log Q(y)) with w = 1/clock, clipped (Edit Flows, substitutions alone).

        λ = w·softplus(head), so that the head learns the probability of being wrong, which has no pole, and λ its due.
        """
        assert self.rate is not None
        steep_BS = (1 / clock_BS.clamp(min=1 / self.config.rate_clip)).clamp(max=self.config.rate_clip)
        rho_BS = functional.softplus(self.rate(hidden_BSW)[..., 0].float()).clamp(min=1e-6)
        right_BS = logits_BSV.float().log_softmax(-1).gather(-1, id_BS[..., None])[..., 0]
        loss_BS = steep_BS * (rho_BS - wrong_BS * (rho_BS.log() + right_BS))
        return torch.where(weight_BS > 0, loss_BS * weight_BS, 0.0).sum() / weight_BS.sum().clamp(min=1)

    def _layers(self, id_BS: Tensor, clock_BS: Tensor, prefix: Prefix, depths: Sequence[int]) -> list[Tensor]:
        if self.config.attention == "full":
            if len(depths) > 1:
                raise ConfigError("Full attention has one answer, at full depth; set exits=none or attention='blind'.")
            return [self.without_mark(self.stack.joint(self._embed(id_BS, clock_BS), prefix, depths[0])[0])]
        hidden = self.stack.exits(self._embed(id_BS, clock_BS), prefix, depths)
        return [self.without_mark(hidden_BTW) for hidden_BTW in hidden]

    def _embed(self, id_BS: Tensor, clock_BS: Tensor) -> Tensor:
        embedded_BSW = self.embedding(id_BS)
        if self.clock is not None:
            clock_BSW = self.clock(clock_embedding(clock_BS, embedded_BSW.shape[-1]).to(embedded_BSW.dtype))
            embedded_BSW = embedded_BSW + clock_BSW
        return self.behind_mark(embedded_BSW)

    # -- inference ---------------------------------------------------------------------------------------------------

    def start(
        self,
        prefix: Prefix,
        generators: Sequence[Generator],
        sampling: Sampling,
        conditioning: Conditioning | TokenConditioning | None = None,
    ) -> DiscreteFlowState:
        """Uniform noise; given tokens enter as a draw from the path at their clock."""
        device = prefix.hidden_BPW.device
        noise_B2S = uniforms(generators, (2, self.slots), device)
        id_BS = (noise_B2S[:, 0] * self.vocabulary).long().clamp(max=self.vocabulary - 1)
        clock_BS = torch.ones(id_BS.shape, device=device)
        if conditioning is not None:
            known = self.token_conditioning(conditioning)
            clock_BS = known.clock_BS.to(device)
            id_BS = torch.where(clock_BS < 1, self.corrupt(known.id_BS, clock_BS, noise_B2S[:, 1]), id_BS)
        refresh = self.config.refresh if self.config.attention == "full" else 1.0
        return DiscreteFlowState(
            id_BS,
            clock_BS,
            torch.ones_like(clock_BS),
            tuple(generators),
            done=0,
            sampling=sampling,
            refresh=refresh,
            refreshed=torch.zeros(len(id_BS), dtype=torch.long, device=device),
        )

    def advance(self, state: DiscreteFlowState, prefix: Prefix, steps: int = 1) -> DiscreteFlowState:
        """Stochastic steps: guess the final chunk, jump towards it. The step that ends at clock 0 takes the guess itself.

        With a rate head a token leaves at λ = ρ/t for another one, drawn as the network's scores have it among the others (Edit
        Flows, substitutions alone); what the network still holds to be right at the end stays.
        """
        temperature, count = self.temperature(state.sampling), state.sampling.steps
        for done in range(state.done, min(state.done + steps, count)):
            # A token that started at 0 never moves; a clock of 1 keeps its unused rates finite.
            now_BS = state.clock_at(done).masked_fill(~state.free_BS, 1.0)
            next_BS = state.clock_at(done + 1).masked_fill(~state.free_BS, 1.0)
            hidden_BSW, logits_BSV, state = self._look(state, state.clock_at(done), prefix)
            uniform_3BS = uniforms(state.generators, (3, self.slots), logits_BSV.device).transpose(0, 1)
            chance_BSV = logits_BSV.float().softmax(-1)
            end_BSV = tempered(logits_BSV, temperature)
            guess_BS = pick(end_BSV, uniform_3BS[0])
            if self.rate is not None:
                rho_BS = functional.softplus(self.rate(hidden_BSW)[..., 0].float())
                other_BSV = end_BSV.scatter(-1, state.id_BS[..., None], 0.0)
                other_BSV = other_BSV / other_BSV.sum(-1, keepdim=True).clamp(min=_SMALLEST)  # given that it is wrong
                rate_BSV = other_BSV * (rho_BS / now_BS)[..., None]
                id_BS = discrete.jump(state.id_BS, rate_BSV, now_BS - next_BS, uniform_3BS[1:], self.config.jump)
            elif done + 1 == count:
                id_BS = guess_BS
            else:
                schedule, stride_BS = self.config.schedule, now_BS - next_BS
                beta_BS, slope_BS = schedule.beta(now_BS), schedule.rate(now_BS, stride_BS)
                rate_BSV = discrete.metric_velocity(state.id_BS, guess_BS, self.distance(), beta_BS, slope_BS)
                id_BS = discrete.jump(state.id_BS, rate_BSV, stride_BS, uniform_3BS[1:], self.config.jump)
            state = state.moved(id_BS, chance_BSV.gather(-1, id_BS[..., None])[..., 0])
        return state

    def refine_deterministic(self, state: DiscreteFlowState, prefix: Prefix, steps: int = 1) -> DiscreteFlowState:
        """Deterministic steps: the most probable token in every slot. They change nothing once nothing changes."""
        for _ in range(steps):
            clock_BS = state.clock_at(min(state.done, state.sampling.steps))
            _, logits_BSV, state = self._look(state, clock_BS, prefix)
            best_BS = logits_BSV.argmax(-1)
            state = state.moved(best_BS, probability_of(logits_BSV, best_BS))
        return state

    def temperature(self, sampling: Sampling) -> float:
        """Of the predicted final chunk; what the config calls a top guess is 0, a sample 1, and the rate head draws at 1."""
        if sampling.temperature is not None:
            return sampling.temperature
        return 1.0 if self.rate is not None or self.config.guess == "sample" else 0.0

    def tokens(self, state: DiscreteFlowState) -> Tokens:
        """See ``Decoder``."""
        return replace(super().tokens(state), prefix_runs=tuple(state.refreshed.tolist()))

    def _look(self, state: DiscreteFlowState, clock_BS: Tensor, prefix: Prefix) -> tuple[Tensor, Tensor, DiscreteFlowState]:
        """Hidden states and scores of the present tokens, and the state with the prefix run again where that was due."""
        full = self.config.attention == "full"
        embedded_BTW = self._embed(state.id_BS, clock_BS)
        if not full and state.refresh >= 1:
            return *self.look(embedded_BTW, prefix), state
        if state.cached_id_BS is None or state.prefix is None:
            due_B = torch.ones(len(state.id_BS), dtype=torch.bool, device=state.id_BS.device)
        else:
            changed_B = (state.id_BS != state.cached_id_BS).float().mean(1)
            due_B = changed_B >= state.refresh if state.refresh == 0 else changed_B > state.refresh
        if not bool(due_B.any()):
            assert state.prefix is not None
            return *self.look(embedded_BTW, state.prefix), state
        row_R = due_B.nonzero()[:, 0]
        depth, part = prefix.depth or prefix.backbone.spec.depth, prefix.restart().select(row_R)
        if full:
            hidden_RTW, fresh = self.stack.joint(embedded_BTW[row_R], part, depth)
        else:
            fresh = prefix.backbone.run(part, depth)
            hidden_RTW = self.stack(embedded_BTW[row_R], fresh)
        latest, cached_id_BS = fresh, state.id_BS
        if state.prefix is not None and state.cached_id_BS is not None and len(row_R) < len(state.id_BS):
            layers = zip(state.prefix.kv_cache, fresh.kv_cache, strict=True)
            latest = replace(state.prefix, kv_cache=tuple(old.with_rows(row_R, new) for old, new in layers))
            cached_id_BS = torch.where(due_B[:, None], state.id_BS, state.cached_id_BS)
            hidden_BTW = self.stack(embedded_BTW, latest).index_copy(0, row_R, hidden_RTW)
        else:
            hidden_BTW = hidden_RTW
        hidden_BSW = self.without_mark(hidden_BTW)
        refreshed_B = state.refreshed + due_B
        return (
            hidden_BSW,
            self.head(hidden_BSW),
            replace(state, prefix=latest, cached_id_BS=cached_id_BS, refreshed=refreshed_B),
        )
