"""One chunk of a decoder of tokens, step by step: what each token was, how sure the network was of it, and the actions meant.

Shape letters: S token slots, N steps, L horizon, D action dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator

from vlaflow.compute.base import ComputePolicy
from vlaflow.compute.dense import Dense
from vlaflow.compute.two_stage import TwoStage
from vlaflow.data.batch import ObservationBatch
from vlaflow.decoders.masked_diffusion import MaskedState
from vlaflow.decoders.tokens import TokenDecoder
from vlaflow.policies.base import Policy
from vlaflow.spec import Observation

HIDDEN = -1


@dataclass(frozen=True)
class Revision:
    """A chunk from noise to the end; row 0 is the start, row n what step n left.

    Args:
        compute: name of the compute policy whose steps they are.
        instruction: what was asked.
        settling: how many of the last steps were deterministic.
        tokens: (N + 1, S) ids; −1 where a token was still masked.
        probability: (N + 1, S), what the network gave each when it last looked.
        actions: (N + 1, L, D), what the tokens mean, robot units.
        dimensions: names of the D dimensions.
        end: id of the end token; None where there is none.
    """

    compute: str
    instruction: str
    settling: int
    tokens: tuple[tuple[int, ...], ...]
    probability: tuple[tuple[float, ...], ...]
    actions: tuple[tuple[tuple[float, ...], ...], ...]
    dimensions: tuple[str, ...]
    end: int | None


def follow(
    policy: Policy, computes: Sequence[ComputePolicy], observation: Observation, generator: Generator
) -> Revision | None:
    """The steps of the first two-stage (or else dense) compute policy; None for decoders that do not revise tokens."""
    decoder = policy.model.decoder
    chosen = next((c for c in computes if isinstance(c, TwoStage)), None) or next(
        (c for c in computes if isinstance(c, Dense)), None
    )
    if not isinstance(decoder, TokenDecoder) or not decoder.takes_tokens or chosen is None:
        return None
    stochastic, settling = (chosen.stochastic, chosen.settling) if isinstance(chosen, TwoStage) else (chosen.steps, 0)
    tokens, probability, actions = [], [], []
    with torch.inference_mode():
        prefix = policy.encode(ObservationBatch.collate([observation]))
        state = decoder.start(prefix, [generator], stochastic + settling)
        for step in range(stochastic + settling + 1):
            if step:
                state = (decoder.advance if step <= stochastic else decoder.settle)(state, prefix)
            id_S = state.id_BS[0]
            tokens.append(
                tuple((id_S.masked_fill(state.hidden_BS[0], HIDDEN) if isinstance(state, MaskedState) else id_S).tolist())
            )
            probability.append(tuple(state.probability_BS[0].tolist()) if step else (0.0,) * decoder.slots)
            actions.append(tuple(map(tuple, policy.to_robot(decoder.finish(state))[0].tolist())))
    names = tuple(dimension.name for dimension in policy.action_spec.dimensions)
    return Revision(
        compute=chosen.name,
        instruction=observation.instruction,
        settling=settling,
        tokens=tuple(tokens),
        probability=tuple(probability),
        actions=tuple(actions),
        dimensions=names,
        end=decoder.tokenizer.end,
    )
