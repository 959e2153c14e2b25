"""One chunk of a token decoder, step by step: the tokens, their probabilities, and the decoded actions.

Shape letters: S token slots, N steps, L chunk size, D action dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator

from vlaflow.compute.base import ComputePolicy
from vlaflow.data.batch import ObservationBatch
from vlaflow.decoders.capability import Capability
from vlaflow.policies.base import Policy
from vlaflow.spec import Observation

HIDDEN = -1


@dataclass(frozen=True)
class Revision:
    """A chunk from noise to its final tokens; row 0 is the start, row n the state after step n.

    Args:
        compute: name of the compute policy.
        instruction: the instruction.
        settling: number of deterministic steps at the end.
        tokens: (N + 1, S) ids; −1 for masked tokens.
        probability: (N + 1, S), probability of each token when the network last evaluated it.
        actions: (N + 1, L, D), the decoded actions, robot units.
        dimensions: names of the D dimensions.
        end: id of the end token; None if there is none.
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
    """Record the steps of the first compute policy with deterministic steps, or else of the first one that consists of steps.

    Returns None for decoders that do not revise tokens.
    """
    decoder = policy.model.decoder
    stepping = [(c, c.stages) for c in computes if c.stages is not None]
    stepping.sort(key=lambda each: not each[1].settling)  # stable: the first one in a tie
    if Capability.TOKEN_CONDITIONING not in decoder.capabilities or decoder.tokenizer is None or not stepping:
        return None
    chosen, stages = stepping[0]
    stochastic, settling = stages.stochastic, stages.settling
    tokens, probability, actions = [], [], []
    with torch.inference_mode(), policy.precision():
        prefix = policy.encode(policy.own(ObservationBatch.collate([observation])))
        state = decoder.start(prefix, [generator], stages.sampling)
        for step in range(stochastic + settling + 1):
            if step:
                state = (decoder.advance if step <= stochastic else decoder.refine_deterministic)(state, prefix)
            found = decoder.tokens(state)
            assert found is not None  # it has a tokenizer
            id_S = found.id_BS[0] if found.masked_BS is None else found.id_BS[0].masked_fill(found.masked_BS[0], HIDDEN)
            tokens.append(tuple(id_S.tolist()))
            probability.append(tuple(found.probability_BS[0].tolist()) if step else (0.0,) * decoder.tokenizer.slots)
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
