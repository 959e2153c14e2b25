"""The autoregressive decoder: one token after the other, each seeing the ones before it, until the end token (π0-FAST).

A network evaluation makes one token, so solver steps mean nothing here: a chunk takes as many as it has tokens. Keys and
values of earlier tokens are kept. A sequence that never ends is cut at the last slot, which its report tells.

Shape letters: B batch, S token slots, V vocabulary, W width.
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
from vlaflow.errors import CapabilityError, ConfigError
from vlaflow.flows.categorical import pick, uniforms
from vlaflow.flows.sampling import Sampling
from vlaflow.nn.attention import causal_mask
from vlaflow.ranges import NotNegative
from vlaflow.stacks.shared import Cache, SharedStack


@dataclass(frozen=True)
class AutoregressiveConfig(TokenConfig):
    """The autoregressive decoder.

    Args:
        temperature: of sampling; 0 takes the most probable token.
    """

    temperature: NotNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature < 0:
            raise ConfigError(f"A temperature is 0 (greedy) or more, got {self.temperature}.")
        if self.noise_samples != 1:
            raise ConfigError(
                f"An autoregressive decoder corrupts nothing, so noise_samples must be 1, got {self.noise_samples}."
            )

    def build(self, spec: BackboneSpec) -> AutoregressiveDecoder:
        """The decoder for such a backbone, randomly initialised."""
        return AutoregressiveDecoder(self, spec)


@dataclass(frozen=True)
class AutoregressiveState(TokenState):
    """Tokens so far.

    Args:
        cache: keys and values of prefix and tokens.
        length_B: tokens each observation has made, its end included.
        ended_B: bool, observations that have made their end token.
    """

    cache: Cache = field(kw_only=True)
    length_B: Tensor = field(kw_only=True)
    ended_B: Tensor = field(kw_only=True)


class AutoregressiveDecoder(TokenDecoder[AutoregressiveState]):
    """See the module text."""

    def __init__(self, config: AutoregressiveConfig, spec: BackboneSpec) -> None:
        super().__init__(config, spec, marked=True)
        self.config = config
        self.begin = self.vocabulary

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Tokens are drawn, and nothing can be given beforehand."""
        return self.drawing

    @property
    def suffix_tokens(self) -> int:
        """The mark, and every token but the last, which none follows."""
        return self.slots

    def nfe(self, sampling: Sampling) -> int:
        """One a slot, at most, whatever number of steps."""
        return self.slots

    def draw(self, batch: int, generator: Generator) -> Draws:
        """Nothing."""
        return ()

    def loss_of(self, prefix: Prefix, targets: Targets, draws: Draws, depths: Sequence[int] | None = None) -> LossTerms:
        """Cross-entropy of every next token; of the end tokens only the first is learned."""
        id_BS, weight_BS = self.encode(targets)
        if self.tokenizer.end is not None:
            ended_BS = (id_BS == self.tokenizer.end).long()
            weight_BS = weight_BS * (ended_BS.cumsum(1) - ended_BS == 0)
        depths = depths or (prefix.depth,)
        mask_SS = causal_mask(self.slots, id_BS.device)
        hidden = self.stack.exits(self.embedding(self._shifted(id_BS)), prefix, depths, mask_SS)
        losses = {d: cross_entropy(self.head(h_BSW), id_BS, weight_BS) for d, h_BSW in zip(depths, hidden, strict=True)}
        return mean_over_exits("token", losses)

    def start(
        self,
        prefix: Prefix,
        generators: Sequence[Generator],
        sampling: Sampling,
        conditioning: Conditioning | TokenConditioning | None = None,
    ) -> AutoregressiveState:
        """No tokens yet.

        Raises:
            CapabilityError: when tokens are given.
        """
        if conditioning is not None:
            raise CapabilityError("An autoregressive decoder cannot start from given tokens; use a discrete flow.")
        device, b = prefix.hidden_BPW.device, prefix.batch
        return AutoregressiveState(
            id_BS=torch.full((b, self.slots), self.tokenizer.end or 0, device=device),
            start_BS=torch.ones(b, self.slots, device=device),
            probability_BS=torch.ones(b, self.slots, device=device),
            generators=tuple(generators),
            done=0,
            sampling=sampling,
            cache=self.stack.cache(prefix, self.slots),
            length_B=torch.zeros(b, dtype=torch.long, device=device),
            ended_B=torch.zeros(b, dtype=torch.bool, device=device),
        )

    def advance(self, state: AutoregressiveState, prefix: Prefix, steps: int = 1) -> AutoregressiveState:
        """So many more tokens; none where the sequence has ended."""
        for slot in range(state.done, min(state.done + steps, self.slots)):
            if bool(state.ended_B.all()):
                break
            before_B = torch.full_like(state.length_B, self.begin) if slot == 0 else state.id_BS[:, slot - 1]
            logits_B1V = self.following(self.embedding(before_B[:, None]), prefix, state.cache)
            next_B1 = self._choose(logits_B1V, slot, state)
            chance_B1 = probability_of(logits_B1V, next_B1)
            free_B = ~state.ended_B
            id_BS, probability_BS = state.id_BS.clone(), state.probability_BS.clone()
            id_BS[free_B, slot], probability_BS[free_B, slot] = next_B1[free_B, 0], chance_B1[free_B, 0]
            ended_B = state.ended_B
            if self.tokenizer.end is not None:
                ended_B = ended_B | (next_B1[:, 0] == self.tokenizer.end)
            length_B = state.length_B + free_B
            state = replace(
                state, id_BS=id_BS, probability_BS=probability_BS, done=slot + 1, length_B=length_B, ended_B=ended_B
            )
        return state

    def following(self, token_B1W: Tensor, prefix: Prefix, cache: Cache) -> Tensor:
        """Scores (B, 1, V) of the token that follows this one, whose keys and values are then in the cache."""
        return self.head(SharedStack.extend(token_B1W, prefix, cache))

    def solve(
        self,
        prefix: Prefix,
        generators: Sequence[Generator],
        sampling: Sampling,
        conditioning: Conditioning | TokenConditioning | None = None,
    ) -> AutoregressiveState:
        """Tokens until all sequences have ended or are full."""
        return self.advance(self.start(prefix, generators, sampling, conditioning), prefix, self.slots)

    def tokens(self, state: AutoregressiveState) -> Tokens:
        """See ``Decoder``; a sequence that filled its slots without an end counts as repaired."""
        made = super().tokens(state)
        repaired_B = made.repaired_B
        if self.tokenizer.end is not None:
            repaired_B = repaired_B | ~state.ended_B
        return replace(made, repaired_B=repaired_B, nfe=tuple(state.length_B.tolist()))

    def logits(self, id_BS: Tensor, prefix: Prefix) -> Tensor:
        """Logits (B, S, V) of every token given those before it, all in one pass."""
        mask_SS = causal_mask(id_BS.shape[1], id_BS.device)
        embedded_BSW = self.embedding(self._shifted(id_BS))
        return self.head(self.stack.exits(embedded_BSW, prefix, (prefix.depth,), mask_SS)[0])

    def _shifted(self, id_BS: Tensor) -> Tensor:
        return torch.cat((torch.full_like(id_BS[:, :1], self.begin), id_BS[:, :-1]), 1)

    def _choose(self, logits_B1V: Tensor, slot: int, state: AutoregressiveState) -> Tensor:
        requested, expected = state.sampling.temperature, state.sampling.expected
        temperature = (1.0 if expected else self.config.temperature) if requested is None else requested
        if temperature == 0:  # without a draw for every token
            return logits_B1V.argmax(-1)
        weight_B1V = self.weights(logits_B1V, temperature, expected=expected, slot=slice(slot, slot + 1))
        if expected:
            return weight_B1V.argmax(-1)
        return pick(weight_B1V, uniforms(state.generators, (1,), logits_B1V.device, ~state.ended_B))
