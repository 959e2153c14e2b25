"""Conformance checks of a checkpoint: made-up observations through every compute policy it supports, without a simulator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Generator

from vlaflow.compute.base import ComputePolicy
from vlaflow.compute.parse import able
from vlaflow.errors import SpecError, VlaflowError
from vlaflow.policies.base import Policy
from vlaflow.spec import Chunk, Observation


@dataclass(frozen=True)
class PolicyFinding:
    """The outcome of one check of one compute policy: the promise, whether it was kept, and what was observed."""

    compute: str
    promise: str
    passed: bool
    observed: str


def check_policy(checkpoint: Path | str, device: str = "cpu", observations: int = 4) -> list[PolicyFinding]:
    """Open a checkpoint and check every promise of its public interface.

    Args:
        checkpoint: folder or Hub repository.
        device: where to run it.
        observations: number of made-up observations.

    Raises:
        CheckpointError: the checkpoint cannot be opened.
    """
    policy = Policy.from_pretrained(checkpoint, device)
    fake = fake_observations(policy, observations)
    found = [_refuses(policy, fake[0])]
    for compute in able(policy.model):
        found += _try(policy, compute, fake)
    return found


def fake_observations(policy: Policy, n: int, seed: int = 0) -> list[Observation]:
    """Noise as images, states from the distribution of the training data, and instructions of several lengths."""
    random = np.random.default_rng(seed)
    mean, std = (np.array(getattr(policy.stats["state"], part)) for part in ("mean", "std"))
    sizes = {view: size or 112 for view, size in policy.views.items()}
    sentences = ("pick up the red block", "open the drawer", "press", "")
    return [
        Observation(
            {view: random.integers(0, 256, (size, size, 3), np.uint8) for view, size in sizes.items()},
            (mean + std * random.standard_normal(mean.shape)).astype(np.float32),
            sentences[i % len(sentences)],
        )
        for i in range(n)
    ]


def _promises(policy: Policy, compute: ComputePolicy, observations: list[Observation]) -> Iterator[PolicyFinding]:
    name, spec = compute.name, policy.action_spec
    first = [policy.act(o, compute, generator=_noise(i)) for i, o in enumerate(observations)]
    wanted = (policy.chunk_size, spec.dim)
    shapes = {c.actions.shape for c in first}
    yield PolicyFinding(name, f"chunks of {wanted[0]} actions of {wanted[1]} numbers", shapes == {wanted}, str(shapes.pop()))
    finite = all(np.isfinite(c.actions).all() for c in first)
    yield PolicyFinding(name, "finite numbers", finite, f"{sum(c.actions.size for c in first)} numbers")
    low, high = (f(c.actions) for f, c in ((np.min, _joined(first)), (np.max, _joined(first))))
    inside = all(((c.actions >= spec.low) & (c.actions <= spec.high)).all() for c in first)
    yield PolicyFinding(name, "inside the action spec's range", inside, f"{low:.3g} to {high:.3g}")
    again = [policy.act(o, compute, generator=_noise(i)) for i, o in enumerate(observations)]
    same = all(np.array_equal(a.actions, b.actions) for a, b in zip(first, again, strict=True))
    yield PolicyFinding(name, "same seed, same bytes", same, "run twice")
    together = policy.act(observations, compute, generator=[_noise(i) for i in range(len(observations))])
    span = np.maximum(spec.high - spec.low, 1e-9)
    apart = max(float((np.abs(a.actions - b.actions) / span).max()) for a, b in zip(first, together, strict=True))
    flipped = any(_marks(a) != _marks(b) for a, b in zip(first, together, strict=True))
    # float32 sums in another order; 0.1 % of the range is far too little to matter to a robot
    observed = "a rating crossed the threshold" if flipped else f"{apart:.1e} of the range"
    yield PolicyFinding(name, "alone as in a batch", apart < 1e-3 or flipped, observed)
    ratings = [c.confidence for c in first if c.confidence is not None]
    if ratings:
        rated = np.concatenate(ratings)
        yield PolicyFinding(
            name,
            "confidence between 0 and 1",
            bool(((rated >= 0) & (rated <= 1)).all()),
            f"{rated.min():.2f} to {rated.max():.2f}",
        )
    kept = all(
        np.array_equal(c.actions[~c.regenerated], c.draft[~c.regenerated])
        for c in first
        if c.regenerated is not None and c.draft is not None
    )
    if any(c.regenerated is not None for c in first):
        yield PolicyFinding(name, "confident actions stay unchanged", kept, _share(first))
    slow = np.median([c.milliseconds["total"] for c in again])
    yield PolicyFinding(name, "reports its duration", slow > 0, f"{slow:.1f} ms, {again[0].layer_passes} layer passes")


def _refuses(policy: Policy, observation: Observation) -> PolicyFinding:
    promise = "a state of the wrong length is refused"
    try:
        policy.act(replace(observation, state=np.append(observation.state, 0).astype(np.float32)))
    except SpecError as refusal:
        return PolicyFinding("any", promise, True, str(refusal))
    return PolicyFinding("any", promise, False, "it was accepted")


def _try(policy: Policy, compute: ComputePolicy, observations: list[Observation]) -> list[PolicyFinding]:
    try:
        return list(_promises(policy, compute, observations))
    except (VlaflowError, RuntimeError, ValueError) as error:
        return [PolicyFinding(compute.name, "makes a chunk", False, f"{type(error).__name__}: {error}")]


def _noise(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def _joined(chunks: list[Chunk]) -> Chunk:
    return Chunk(np.concatenate([c.actions for c in chunks]))


def _marks(chunk: Chunk) -> list[bool]:
    return [] if chunk.regenerated is None else chunk.regenerated.tolist()


def _share(chunks: list[Chunk]) -> str:
    again = [c.regenerated for c in chunks if c.regenerated is not None]
    return f"{100 * np.concatenate(again).mean():.0f} % regenerated"
