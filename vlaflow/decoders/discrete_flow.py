"""Discrete flow matching over action tokens: every token may be revised at every step (DFM-VLA).

All tokens start as uniform noise. At each step the network guesses the final chunk from the present one; the guess defines a
velocity, and the tokens jump along it. Two variants (``velocity``):

    "metric"   training corrupts along a metric path and learns cross-entropy to the target; the velocity is the
               kinetic-optimal one of that path (DFM-VLA's embedding-guided variant; ``token_metrics`` has others)
    "rate"     training corrupts along the mixture path; a head predicts how fast each token should leave
               (DFM-VLA's head variant, after Edit Flows with substitutions alone)

``refine_deterministic`` adds deterministic steps: the most probable token everywhere, given all the others (the validation of
DFM-VLA).

The paper runs t = 1 − clock. The network sees neither the clock, nor which tokens are pure noise, nor what it predicted a step
before, unless ``clock_input``, ``noise_token`` and ``self_conditioning`` say so.

Shape letters: B batch (observations × noise samples, samples innermost), S token slots, V vocabulary, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from vlaflow.backbones.base import Backbone, BackboneSpec, Prefix, RunsLayers
from vlaflow.decoders.base import Conditioning, Targets, TokenConditioning, Tokens
from vlaflow.decoders.capability import Capability
from vlaflow.decoders.losses import Draws, LossTerms, mean_over_exits
from vlaflow.decoders.token_metrics import BinMetric, EmbeddingMetric, SlotMetric, require_order
from vlaflow.decoders.tokens import TokenConfig, TokenDecoder, TokenState, cross_entropy, probability_of
from vlaflow.errors import ConfigError
from vlaflow.flows import discrete, gaussian
from vlaflow.flows.categorical import pick, uniforms
from vlaflow.flows.sampling import Sampling
from vlaflow.nn.time import clock_embedding

_SMALLEST = 1e-9
"""Probability below which nothing is left."""


@dataclass(frozen=True)
class DiscreteFlowConfig(TokenConfig):
    """The discrete flow decoder. What DFM-VLA does not say is marked [ours].

    Args:
        velocity: see the module text.
        metric: of the metric path.
        schedule: c and α of the metric path.
        jump: "linear" leaves with min(1, hλ) (DFM-VLA), "exponential" with 1 − exp(−hλ) (FUDOKI).
        guess: the final chunk as the network sees it, unless the sampling says otherwise: the "top" token everywhere [ours], a
            "sample", or the "expected" token, whose value is nearest to the mean, for ordered ids [ours].
        clocks: of training examples.
        masks: "synchronous" draws one clock per chunk; "unified" noises each token with a probability y ~ U(0, 1), so that
            tokens given clean are context the network knows [ours, after AsyncVLA].
        clock_input: add a projection of the embedding of each token's clock to its own; the projection starts at zero [ours].
        noise_token: tokens at clock 1 are pure noise; show the network one learned token in their place [ours].
        self_conditioning: add a projection of the network's previous prediction of the final chunk to every token; half of the
            training examples have one, as has every step but the first. The projection starts at zero (Chen et al., Analog
            Bits, 2022) [ours].
        attention: "blind": the prefix never sees the action tokens, its keys and values are computed once and exact;
            "full": everything sees everything, and the prefix is run again with the tokens.
        refresh: with "full", the share of tokens that must have changed since the prefix was last run for it to be run
            again; 0 runs it at every step, 1 never again (DFM-VLA's adaptive cache; the paper does not give its rule) [ours].
        rate_weight: of the rate head's loss relative to the cross-entropy [ours].
        rate_clip: largest weight 1/clock in the rate's loss [ours].
    """

    velocity: Literal["metric", "rate"] = "metric"
    metric: EmbeddingMetric | BinMetric | SlotMetric = field(default_factory=EmbeddingMetric)
    schedule: discrete.MetricSchedule = field(default_factory=discrete.MetricSchedule)
    jump: discrete.JumpRule = "linear"
    guess: Literal["top", "sample", "expected"] = "top"
    clocks: discrete.TrainingClocks = field(default_factory=discrete.TrainingClocks)
    masks: Literal["synchronous", "unified"] = "synchronous"
    clock_input: bool = False
    noise_token: bool = False
    self_conditioning: bool = False
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
        if self.noise_token and self.clocks.pure == 0:
            raise ConfigError(
                "A noise_token is learned from examples that are noise alone; set clocks.pure, the share of them, above 0."
            )

    @property
    def unfitted(self) -> bool:
        """Whether tokenizer or metric are still to be fitted."""
        return super().unfitted or self.metric.unfitted

    def fitted(self, action_NLD: np.ndarray) -> DiscreteFlowConfig:
        """The config with a fitted tokenizer and metric; what is fitted already stays."""
        made = super().fitted(action_NLD)
        return replace(made, metric=self.metric.fitted(made.ready, action_NLD))

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
        end_BSV: probabilities of the final chunk as the network predicted it last, for ``self_conditioning``; None before.
    """

    refresh: float = 1.0
    cached_id_BS: Tensor | None = None
    prefix: Prefix | None = None
    end_BSV: Tensor | None = None
    refreshed: Tensor = field(kw_only=True)


class DiscreteFlowDecoder(TokenDecoder[DiscreteFlowState]):
    """See the module text."""

    frozen_VW: Tensor

    def __init__(self, config: DiscreteFlowConfig, spec: BackboneSpec) -> None:
        super().__init__(config, spec, extra=int(config.noise_token))
        self.config = c = config
        require_order(c.metric, self.tokenizer)
        if c.metric.unfitted:
            raise ConfigError(f"This {type(c.metric).__name__} is not fitted yet; training fits it on the demonstrations.")
        if c.guess == "expected" and not self.tokenizer.ordered:
            raise ConfigError("guess='expected' needs a tokenizer whose ids are ordered: use bins, or FAST without merges.")
        self.noise = self.vocabulary if c.noise_token else None
        self.clock = nn.Linear(spec.width, spec.width) if c.clock_input else None
        if self.clock is not None:  # drawn at random it would drown the tokens' embeddings, which are twenty times smaller
            nn.init.zeros_(self.clock.weight)
            nn.init.zeros_(self.clock.bias)
        self.previous = nn.Linear(self.vocabulary, spec.width, bias=False) if c.self_conditioning else None
        if self.previous is not None:
            nn.init.zeros_(self.previous.weight)
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
        found = {Capability.DETERMINISTIC_STEPS, Capability.PREFIX_REFRESH, Capability.GRID}
        if c.masks == "unified" or (c.velocity == "rate" and not c.clock_input):
            found.add(Capability.REGENERATION)
        if c.attention == "full":
            found.add(Capability.JOINT_ATTENTION)
        return self.conditioning | self.drawing | found

    def refreshing(self, state: DiscreteFlowState, share: float) -> DiscreteFlowState:
        """See ``Decoder``. With a prefix that is blind to the tokens, 0 is no cache at all: the same chunk, later."""
        return replace(state, refresh=share)

    def read(self, backbone: RunsLayers, prefix: Prefix, depth: int | None = None) -> Prefix:
        """With full attention nothing is run before the tokens are there."""
        return prefix if self.config.attention == "full" else backbone.run(prefix, depth)

    def distance(self) -> Tensor:
        """d between all tokens, (V, V) or by slot (S, V, V); kept until the embeddings change."""
        metric = self.config.metric
        table_VW = self.frozen_VW if metric.frozen else self.embedding.weight[: self.vocabulary]
        key = (table_VW.data_ptr(), table_VW._version, table_VW.device)
        if self._distance is None or self._distance[0] != key:
            with torch.no_grad():
                self._distance = (key, metric.distance(table_VW, self.tokenizer))
        return self._distance[1]

    def distance_to(self, id_BS: Tensor) -> Tensor:
        """d from every token to these, (B, S, V)."""
        distance = self.distance()
        if distance.dim() == 2:
            return distance[id_BS]
        return distance[torch.arange(self.slots, device=id_BS.device), id_BS]

    def forget_values(self) -> None:
        """See ``Decoder``; the distances of tokens are, too."""
        super().forget_values()
        self.distance = partial(torch.zeros, self.vocabulary, self.vocabulary)  # type: ignore[method-assign]

    # -- training ----------------------------------------------------------------------------------------------------

    def draw(self, batch: int, generator: Generator) -> Draws:
        """Clocks and uniform numbers, (B·K, S) each; with self-conditioning also which examples have a prediction, (B·K, 1)."""
        b = batch * self.noise_samples
        clock_BS = self.config.clocks.draw(b, generator).expand(b, self.slots)
        if self.config.masks == "unified":
            clock_BS = clock_BS * gaussian.sample_mask(b, self.slots, generator)
        uniform_BS = torch.rand(b, self.slots, generator=generator)
        if self.previous is None:
            return clock_BS, uniform_BS
        return clock_BS, uniform_BS, torch.rand(b, 1, generator=generator) < 0.5

    def loss_of(self, prefix: Prefix, targets: Targets, draws: Draws, depths: Sequence[int] | None = None) -> LossTerms:
        """Cross-entropy to the target at random clocks; for the rate variant also the rate's loss."""
        c = self.config
        id_BS, weight_BS = self.encode(targets)
        id_BS, weight_BS = (x.repeat_interleave(self.noise_samples, 0) for x in (id_BS, weight_BS))
        clock_BS, uniform_BS, *predicted = draws
        noisy_BS = self.corrupt(id_BS, clock_BS, uniform_BS)
        weight_BS = weight_BS * (clock_BS > 0)
        losses, rates = {}, {}
        depths = depths or (prefix.depth or prefix.backbone.spec.depth,)
        end_BSV = None
        if predicted:  # for all examples, so that every process of a sharded training runs the same layers
            with torch.no_grad():
                first_BSW = self._layers(noisy_BS, clock_BS, None, prefix, depths[-1:])[0]
                end_BSV = self.head(first_BSW).float().softmax(-1) * predicted[0][..., None]
        for depth, hidden_BSW in zip(depths, self._layers(noisy_BS, clock_BS, end_BSV, prefix, depths), strict=True):
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
            weight_BSV = discrete.metric_path(self.distance_to(id_BS), self.config.schedule.beta(clock_BS))
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

    def _layers(
        self, id_BS: Tensor, clock_BS: Tensor, end_BSV: Tensor | None, prefix: Prefix, depths: Sequence[int]
    ) -> list[Tensor]:
        embedded_BTW = self._embed(id_BS, clock_BS, end_BSV)
        if self.config.attention == "full":
            if len(depths) > 1:
                raise ConfigError("Full attention has one answer, at full depth; set exits=none or attention='blind'.")
            return [self.without_mark(self.stack.joint(embedded_BTW, prefix, depths[0])[0])]
        return [self.without_mark(hidden_BTW) for hidden_BTW in self.stack.exits(embedded_BTW, prefix, depths)]

    def _embed(self, id_BS: Tensor, clock_BS: Tensor, end_BSV: Tensor | None) -> Tensor:
        shown_BS = id_BS if self.noise is None else id_BS.masked_fill(clock_BS >= 1, self.noise)
        embedded_BSW = self.embedding(shown_BS)
        if self.clock is not None:
            clock_BSW = self.clock(clock_embedding(clock_BS, embedded_BSW.shape[-1]).to(embedded_BSW.dtype))
            embedded_BSW = embedded_BSW + clock_BSW
        if self.previous is not None and end_BSV is not None:
            embedded_BSW = embedded_BSW + self.previous(end_BSV.to(embedded_BSW.dtype))
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
        expected, temperature, count = self.expected(state.sampling), self.temperature(state.sampling), state.sampling.steps
        for done in range(state.done, min(state.done + steps, count)):
            # A token that started at 0 never moves; a clock of 1 keeps its unused rates finite.
            now_BS = state.clock_at(done).masked_fill(~state.free_BS, 1.0)
            next_BS = state.clock_at(done + 1).masked_fill(~state.free_BS, 1.0)
            hidden_BSW, logits_BSV, state = self._look(state, state.clock_at(done), prefix)
            uniform_3BS = uniforms(state.generators, (3, self.slots), logits_BSV.device).transpose(0, 1)
            chance_BSV = logits_BSV.float().softmax(-1)
            end_BSV = self.weights(logits_BSV, temperature, expected=expected)
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
                rate_BSV = discrete.metric_velocity(state.id_BS, self.distance_to(guess_BS), beta_BS, slope_BS)
                id_BS = discrete.jump(state.id_BS, rate_BSV, stride_BS, uniform_3BS[1:], self.config.jump)
            state = self._after(state, chance_BSV).moved(id_BS, chance_BSV.gather(-1, id_BS[..., None])[..., 0])
        return state

    def refine_deterministic(self, state: DiscreteFlowState, prefix: Prefix, steps: int = 1) -> DiscreteFlowState:
        """Deterministic steps: the most probable token in every slot, or the expected one where the sampling says so.

        They change nothing once nothing changes.
        """
        expected = self.expected(state.sampling)
        temperature = self.temperature(state.sampling) if expected else 0.0
        for _ in range(steps):
            clock_BS = state.clock_at(min(state.done, state.sampling.steps))
            _, logits_BSV, state = self._look(state, clock_BS, prefix)
            best_BS = self.weights(logits_BSV, temperature, expected=expected).argmax(-1)
            state = self._after(state, logits_BSV.float().softmax(-1)).moved(best_BS, probability_of(logits_BSV, best_BS))
        return state

    def temperature(self, sampling: Sampling) -> float:
        """Of the predicted final chunk; unless one is asked for, a top guess is 0, anything else 1, as for the rate head."""
        if sampling.temperature is not None:
            return sampling.temperature
        return 0.0 if self.rate is None and self.config.guess == "top" and not sampling.expected else 1.0

    def expected(self, sampling: Sampling) -> bool:
        """Whether the final chunk is guessed as the expected one: asked for, or the config's guess and no temperature is."""
        return sampling.expected or (sampling.temperature is None and self.config.guess == "expected")

    def _after(self, state: DiscreteFlowState, end_BSV: Tensor) -> DiscreteFlowState:
        """With what the network has just predicted, where the next step is shown it."""
        return state if self.previous is None else replace(state, end_BSV=end_BSV)

    def tokens(self, state: DiscreteFlowState) -> Tokens:
        """See ``Decoder``."""
        return replace(super().tokens(state), prefix_runs=tuple(state.refreshed.tolist()))

    def _look(self, state: DiscreteFlowState, clock_BS: Tensor, prefix: Prefix) -> tuple[Tensor, Tensor, DiscreteFlowState]:
        """Hidden states and scores of the present tokens, and the state with the prefix run again where that was due."""
        full = self.config.attention == "full"
        embedded_BTW = self._embed(state.id_BS, clock_BS, state.end_BSV)
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
            hidden_BSW, fresh = self.look_jointly(embedded_BTW[row_R], part, depth)
        else:
            fresh = prefix.backbone.run(part, depth)
            hidden_BSW = self.look(embedded_BTW[row_R], fresh)[0]
        latest, cached_id_BS = fresh, state.id_BS
        if state.prefix is not None and state.cached_id_BS is not None and len(row_R) < len(state.id_BS):
            layers = zip(state.prefix.kv_cache, fresh.kv_cache, strict=True)
            latest = replace(state.prefix, kv_cache=tuple(old.with_rows(row_R, new) for old, new in layers))
            cached_id_BS = torch.where(due_B[:, None], state.id_BS, state.cached_id_BS)
            hidden_BSW = self.look(embedded_BTW, latest)[0].index_copy(0, row_R, hidden_BSW)
        refreshed_B = state.refreshed + due_B
        state = replace(state, prefix=latest, cached_id_BS=cached_id_BS, refreshed=refreshed_B)
        return hidden_BSW, self.head(hidden_BSW), state

    def look_jointly(self, embedded_BTW: Tensor, prefix: Prefix, depth: int) -> tuple[Tensor, Prefix]:
        """Hidden states (B, S, W) of tokens that the prefix sees too, through ``depth`` layers, and the prefix as run there."""
        hidden_BTW, latest = self.stack.joint(embedded_BTW, prefix, depth)
        return self.without_mark(hidden_BTW), latest
