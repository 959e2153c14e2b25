"""Masked discrete diffusion: all tokens start masked, the surest are revealed first (MaskGIT; Discrete Diffusion VLA, UD-VLA).

A clock of 1 is a masked token, 0 a revealed one. Without remasking a revealed token is final.

Shape letters: B batch (observations × noise samples, samples innermost), S token slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Generator, Tensor

from vlaflow.backbones.base import BackboneSpec, Prefix
from vlaflow.decoders.base import Conditioning, Targets, TokenConditioning, Tokens
from vlaflow.decoders.capability import Capability
from vlaflow.decoders.losses import Draws, LossTerms, mean_over_exits
from vlaflow.decoders.tokens import TokenConfig, TokenDecoder, TokenState, cross_entropy, probability_of
from vlaflow.errors import ConfigError
from vlaflow.flows import masked
from vlaflow.flows.categorical import gumbel, pick, uniforms
from vlaflow.flows.sampling import Sampling
from vlaflow.ranges import NotNegative


@dataclass(frozen=True)
class MaskedDiffusionConfig(TokenConfig):
    """The masked diffusion decoder.

    Args:
        temperature: of drawing a masked token; 0 takes the most probable one.
        choice_temperature: of the order: Gumbel noise of this size, falling to 0 with the share still masked, is added to the
            log-probabilities by which tokens are revealed.
        remask: let revealed tokens compete with new ones, so that an unsure one may be masked again. A revealed token
            competes with the probability it had when revealed, times the share of the steps that are left (Discrete
            Diffusion VLA).
        floor: smallest share of tokens masked in training.
    """

    temperature: NotNegative = 1.0
    choice_temperature: NotNegative = 1.0
    remask: bool = False
    floor: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.temperature, self.choice_temperature) < 0 or not 0 < self.floor <= 1:
            raise ConfigError("Temperatures are 0 or more, and floor is a share in (0, 1].")

    def build(self, spec: BackboneSpec) -> MaskedDiffusionDecoder:
        """The decoder for such a backbone, randomly initialised."""
        return MaskedDiffusionDecoder(self, spec)


@dataclass(frozen=True)
class MaskedState(TokenState):
    """Tokens under way.

    Args:
        hidden_BS: bool, which are still masked, whatever their id says.
        looks_B: int64, steps in which the network was needed: a chunk whose tokens are all revealed waits for its neighbours.
    """

    hidden_BS: Tensor = field(kw_only=True)
    looks_B: Tensor = field(kw_only=True)


class MaskedDiffusionDecoder(TokenDecoder[MaskedState]):
    """See the module text."""

    def __init__(self, config: MaskedDiffusionConfig, spec: BackboneSpec) -> None:
        super().__init__(config, spec, extra=1)
        self.config = config
        self.mask = self.vocabulary

    def tokens(self, state: MaskedState) -> Tokens:
        """See ``Decoder``."""
        return replace(super().tokens(state), nfe=tuple(state.looks_B.tolist()), masked_BS=state.hidden_BS)

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Conditioning, and regeneration: training masks any tokens and shows the others."""
        return self.conditioning | self.drawing | {Capability.REGENERATION, Capability.GRID}

    def draw(self, batch: int, generator: Generator) -> Draws:
        """Which tokens are masked, bool (B·K, S)."""
        return (masked.training_mask(batch * self.noise_samples, self.slots, generator, self.config.floor),)

    def loss_of(self, prefix: Prefix, targets: Targets, draws: Draws, depths: Sequence[int] | None = None) -> LossTerms:
        """Cross-entropy of the masked tokens."""
        id_BS, weight_BS = self.encode(targets)
        id_BS, weight_BS = (x.repeat_interleave(self.noise_samples, 0) for x in (id_BS, weight_BS))
        (masked_BS,) = draws
        depths = depths or (prefix.depth,)
        hidden = self.hidden(id_BS.masked_fill(masked_BS, self.mask), prefix, depths)
        losses = {
            d: cross_entropy(self.head(h_BSW), id_BS, weight_BS * masked_BS) for d, h_BSW in zip(depths, hidden, strict=True)
        }
        return mean_over_exits("token", losses)

    def start(
        self,
        prefix: Prefix,
        generators: Sequence[Generator],
        sampling: Sampling,
        conditioning: Conditioning | TokenConditioning | None = None,
    ) -> MaskedState:
        """Everything masked, but for what is given at clock 0."""
        device = prefix.hidden_BPW.device
        id_BS = torch.zeros(prefix.batch, self.slots, dtype=torch.long, device=device)
        clock_BS = torch.ones(id_BS.shape, device=device)
        if conditioning is not None:
            known = self.token_conditioning(conditioning)
            id_BS, clock_BS = known.id_BS, (known.clock_BS > 0).float()
        return MaskedState(
            id_BS,
            clock_BS,
            torch.ones_like(clock_BS),
            tuple(generators),
            done=0,
            sampling=sampling,
            hidden_BS=clock_BS > 0,
            looks_B=torch.zeros(prefix.batch, dtype=torch.long, device=device),
        )

    def advance(self, state: MaskedState, prefix: Prefix, steps: int = 1) -> MaskedState:
        """Predict all masked tokens and reveal the surest, as many as the cosine schedule says.

        A temperature in the sampling replaces both of the config's: at 0 no step depends on a generator. The order of expected
        tokens is that of their probabilities.
        """
        c, count_B, sampling = self.config, state.free_BS.sum(1), state.sampling
        temperature = c.temperature if sampling.temperature is None else sampling.temperature
        choice_temperature = c.choice_temperature if sampling.temperature is None else sampling.temperature
        for done in range(state.done, min(state.done + steps, sampling.steps)):
            progress = sampling.progress(done + 1)
            if not bool(state.hidden_BS.any()) and not c.remask:
                break
            logits_BSV = self._look(state, prefix)
            competes_BS = state.free_BS if c.remask else state.hidden_BS
            uniform_B2S = uniforms(state.generators, (2, self.slots), logits_BSV.device, competes_BS.any(1))
            drawn_BS = pick(self.weights(logits_BSV, temperature, expected=sampling.expected), uniform_B2S[:, 0])
            id_BS = torch.where(state.hidden_BS, drawn_BS, state.id_BS)
            chance_BS = torch.where(state.hidden_BS, probability_of(logits_BSV, id_BS), state.probability_BS)
            left_B = masked.still_masked(count_B, done + 1, sampling.steps, progress)
            noise_BS = gumbel(uniform_B2S[:, 1]) * choice_temperature * masked.masked_share(progress).float()
            fading_BS = torch.where(state.hidden_BS, 1.0, 1 - progress)
            sure_BS = (chance_BS * fading_BS).clamp(min=1e-30).log() + noise_BS
            hidden_BS = masked.lowest(sure_BS.masked_fill(~competes_BS, float("inf")), left_B) & competes_BS
            looks_B = state.looks_B + competes_BS.any(1)
            state = replace(state.moved(id_BS, chance_BS), hidden_BS=hidden_BS, looks_B=looks_B)
        return state

    def _look(self, state: MaskedState, prefix: Prefix) -> Tensor:
        id_BS = state.id_BS.masked_fill(state.hidden_BS, self.mask)
        return self.look(self.behind_mark(self.embedding(id_BS)), prefix)[1]
