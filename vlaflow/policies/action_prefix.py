"""Committed actions of robots, as what a decoder starts from.

Shape letters: B batch, N actions known, L chunk size, D action dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Generator
from torch.nn import functional

from vlaflow.decoders.base import Conditioning
from vlaflow.errors import ConfigError, SpecError
from vlaflow.spec import ActionPrefix, Observation

if TYPE_CHECKING:
    from vlaflow.policies.base import Policy


def in_lists(
    observation: Observation | Sequence[Observation],
    generator: Generator | Sequence[Generator] | None,
    action_prefix: ActionPrefix | Sequence[ActionPrefix | None] | None,
) -> tuple[list[Observation], list[Generator], list[ActionPrefix | None]]:
    """Observations with a generator and an action prefix each, as ``Policy.act`` takes one or several.

    Raises:
        ConfigError: not as many of each.
    """
    observations = [observation] if isinstance(observation, Observation) else list(observation)
    if generator is None:
        generators = [Generator().manual_seed(0) for _ in observations]
    else:
        generators = [generator] if isinstance(generator, Generator) else list(generator)
    if len(generators) != len(observations):
        raise ConfigError(f"{len(observations)} observations need as many generators, got {len(generators)}.")
    prefixes = [action_prefix] if isinstance(action_prefix, ActionPrefix) or action_prefix is None else list(action_prefix)
    if action_prefix is None:
        prefixes *= len(observations)
    if len(prefixes) != len(observations):
        raise ConfigError(f"{len(observations)} observations need as many action prefixes, got {len(prefixes)}.")
    return observations, generators, prefixes


def longest_action_prefix(policy: Policy) -> int:
    """How many committed actions a chunk of the policy's robot may begin with.

    A robot whose chunks are shorter than the decoder's has at least one action left to make.
    """
    decoder = policy.model.decoder
    shorter = policy.chunk_size < decoder.chunk_size
    return min(decoder.max_action_prefix, policy.chunk_size - 1) if shorter else decoder.max_action_prefix


def conditioning_of(policy: Policy, action_prefixes: Sequence[ActionPrefix | None], *, guided: bool) -> Conditioning | None:
    """The conditioning by actions of earlier chunks; None if no actions are committed.

    Raises:
        SpecError: for actions of another dimension, or so many that none is left to make.
        CapabilityError: for a decoder that can continue no chunk.
    """
    if not any(action_prefixes):
        return None
    decoder, normalizer, chunk_size = policy.model.decoder, policy.action_normalizer, policy.chunk_size
    dim, longest = normalizer.dim, longest_action_prefix(policy)
    rows = []
    for action_prefix in action_prefixes:
        action_ND = (
            np.zeros((0, dim), np.float32) if action_prefix is None else action_prefix.actions[:chunk_size].astype(np.float32)
        )
        if action_ND.shape[1] != dim:
            raise SpecError(f"Committed actions have {dim} dimensions here, got {action_ND.shape[1]}.")
        if action_prefix is not None and longest and action_prefix.count > longest:
            raise SpecError(
                f"This policy continues at most {longest} committed actions of a chunk of {chunk_size}, got "
                f"{action_prefix.count}."
            )
        rows.append(normalizer.forward(torch.from_numpy(action_ND)))
    more, device = decoder.action_dim - dim, policy.device
    padded = [functional.pad(row, (0, more, 0, decoder.chunk_size - len(row))) for row in rows]
    action_BLD = torch.stack(padded).to(device)
    known_B = torch.tensor([len(row) for row in rows], device=device)
    committed_B = torch.tensor([c.count if c else 0 for c in action_prefixes], device=device)
    return decoder.continued(action_BLD, known_B, committed_B, guided=guided)
