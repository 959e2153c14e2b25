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
from vlaflow.spec import ActionPrefix, ActionSpec, Observation

if TYPE_CHECKING:
    from vlaflow.policies.base import Policy


def in_lists(
    observation: Observation | Sequence[Observation],
    generator: Generator | Sequence[Generator] | None,
    action_prefix: ActionPrefix | Sequence[ActionPrefix | None] | None,
) -> tuple[list[Observation], list[Generator], list[ActionPrefix | None]]:
    """Observations with a generator and an action prefix each, as ``Policy.act`` takes one or several.

    Raises:
        ConfigError: no observation, or not as many of each.
    """
    observations = [observation] if isinstance(observation, Observation) else list(observation)
    if not observations:
        raise ConfigError("There is no observation to act on; give one, or a list of at least one.")
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
    """How many committed actions a chunk of the policy's robot may begin with, which leave at least one to make."""
    return min(policy.model.decoder.max_action_prefix, policy.chunk_size - 1)


def conditioning_of(policy: Policy, action_prefixes: Sequence[ActionPrefix | None], *, guided: bool) -> Conditioning | None:
    """The conditioning by actions of earlier chunks; None if no actions are committed.

    Raises:
        SpecError: for actions of another dimension or far outside the robot's range, or so many that none is left to make.
        CapabilityError: for a decoder that can continue no chunk.
    """
    if not any(action_prefixes):
        return None
    decoder, normalizer, chunk_size = policy.model.decoder, policy.action_normalizer, policy.chunk_size
    dim = normalizer.dim
    rows = []
    for action_prefix in action_prefixes:
        action_ND = (
            np.zeros((0, dim), np.float32) if action_prefix is None else action_prefix.actions[:chunk_size].astype(np.float32)
        )
        if action_ND.shape[1] != dim:
            raise SpecError(f"Committed actions have {dim} dimensions here, got {action_ND.shape[1]}.")
        _require_near_range(action_ND, policy.action_spec)
        rows.append(normalizer.forward(torch.from_numpy(action_ND)))
    more, device = decoder.action_dim - dim, policy.device
    padded = [functional.pad(row, (0, more, 0, decoder.chunk_size - len(row))) for row in rows]
    action_BLD = torch.stack(padded).to(device)
    known_B = torch.tensor([len(row) for row in rows], device=device)
    counts, longest = [c.count if c else 0 for c in action_prefixes], longest_action_prefix(policy)
    if max(counts) > longest and (longest or max(counts) >= chunk_size):
        raise SpecError(
            f"This policy continues at most {longest} committed actions of a chunk of {chunk_size}, got {max(counts)}."
        )
    return decoder.continued(action_BLD, known_B, torch.tensor(counts, device=device), guided=guided)


def _require_near_range(action_ND: np.ndarray, spec: ActionSpec) -> None:
    """Refuse actions more than a whole range beyond its ends: they are in other units, and would lead a chunk anywhere.

    Robots overshoot, and the range of a drafted spec is only that of some data, so a little more than the range is allowed.
    """
    low_D, high_D = spec.low.astype(np.float64), spec.high.astype(np.float64)
    width_D = high_D - low_D
    far_ND = (action_ND < low_D - width_D) | (action_ND > high_D + width_D)
    if far_ND.any():
        place, d = np.argwhere(far_ND)[0].tolist()
        raise SpecError(
            f"Action {place} of the action prefix has {action_ND[place, d]:g} in '{spec.dimensions[d].name}', whose range is "
            f"{low_D[d]:g} to {high_D[d]:g}. Send actions in the units of the action spec, as this policy's chunks hold them."
        )
