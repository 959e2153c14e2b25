"""Timing the parts of a chunk on this machine, layer by layer, and fitting what chunks cost, for budgets in milliseconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Generator, nn
from torch.utils.flop_counter import FlopCounterMode

from vlaflow.compute.base import ComputePolicy
from vlaflow.compute.budget import Profile
from vlaflow.compute.cost import ChunkWork, CostModel, Work, fit
from vlaflow.compute.dense import Dense
from vlaflow.data.batch import ObservationBatch
from vlaflow.errors import ConfigError
from vlaflow.flows.sampling import Sampling
from vlaflow.policies.base import Policy
from vlaflow.policies.example import example
from vlaflow.spec import Chunk, Observation
from vlaflow.versions import device_name, processor, versions

FITTED = ((1, 1), (10, 1), (4, 2), (10, 4), (1, 8), (4, 8))
"""Solver steps and observations of the chunks that a cost is fitted to, at full depth and at the first exit."""
SAMPLING = Sampling(4)
"""Of the chunk whose parts are timed."""


def profile(policy: Policy, checkpoint: str, rounds: int = 100, threads: int = 1, eager: Policy | None = None) -> Profile:
    """Time embedding, every layer's prefix and a decoder evaluation at every exit, in turns; medians. Fit what chunks cost.

    Args:
        policy: the policy to time.
        checkpoint: fingerprint of its checkpoint.
        rounds: number of measurements of each part, at least 20.
        threads: number of torch threads.
        eager: the same policy computed eagerly, where ``policy`` is deployed: operations inside programs cannot be counted.
    """
    if rounds < 20:
        raise ConfigError(f"A 99th percentile needs at least 20 rounds, got {rounds}.")
    eager, model, observation = eager or policy, policy.model.eval(), example(policy)
    depths = range(1, model.backbone.spec.depth + 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode(), policy.precision():
            parts = _parts(policy, observation)
            parts["chunk"] = acting(policy, Dense.by(SAMPLING), [observation])
            times = _in_turns(parts, rounds, policy.device)
            work, nfe = _work_of_parts(eager, observation), _nfe(eager, observation)
        cost = fit_cost(policy, observation, max(10, rounds // 4), eager)
    finally:
        torch.set_num_threads(before)
    middle = {name: float(np.median(ms)) for name, ms in times.items()}
    full = middle[f"prefix {depths[-1]}"] + middle[f"step {depths[-1]}"]

    return Profile(
        checkpoint=checkpoint,
        machine=processor(),
        threads=threads,
        base=max(middle["chunk"] - full, middle["embed"]),
        prefix=tuple(middle[f"prefix {depth}"] for depth in depths),
        step=tuple(max(0.0, middle.get(f"step {d}", 0.0) - middle.get(f"start {d}", 0.0)) / nfe for d in depths),
        jitter=float(np.percentile(times["chunk"], 99)) / middle["chunk"],
        chunks=rounds,
        versions=versions(),
        work=ChunkWork(
            work["embed"],
            tuple(work[f"prefix {depth}"] for depth in depths),
            tuple(work.get(f"step {depth}", Work()) * (1 / nfe) for depth in depths),
        ),
        cost=cost,
        device=device_name(str(policy.device)),
        dtype=policy.dtype,
        engine=model.engine,
        start=tuple(middle.get(f"start {depth}", 0.0) for depth in depths),
    )


def fit_cost(policy: Policy, observation: Observation, rounds: int, eager: Policy) -> CostModel:
    """What chunks of this policy cost here, from chunks of several depths, steps and batches.

    Args:
        policy: to be timed.
        observation: that it acts on.
        rounds: number of measurements of each chunk.
        eager: see ``profile``.
    """
    depths = sorted({policy.model.depths[0], policy.model.backbone.spec.depth})
    chunks = [(Dense(steps, depth=depth), [observation] * batch) for depth in depths for steps, batch in FITTED]
    times = _in_turns({str(place): acting(policy, *chunk) for place, chunk in enumerate(chunks)}, rounds, policy.device)
    return fit([count(eager, *chunk) for chunk in chunks], [float(np.median(each)) for each in times.values()])


def count(policy: Policy, compute: ComputePolicy, observations: Sequence[Observation]) -> Work:
    """What one call of an eager policy computes."""
    act = acting(policy, compute, observations)
    chunk = act()[0]
    return _work(act, policy, chunk.layer_passes + chunk.nfe + len(policy.views))


def acting(policy: Policy, compute: ComputePolicy, observations: Sequence[Observation]) -> Callable[[], list[Chunk]]:
    """A function that acts on these observations, always with the same noise."""
    return lambda: policy.act(observations, compute, generator=[Generator().manual_seed(0) for _ in observations])


def _parts(policy: Policy, observation: Observation) -> dict[str, Callable[[], object]]:
    """The parts of a chunk by name: "embed" and "prefix DEPTH".

    Where an exit was trained, also "start DEPTH", and "step DEPTH": the start and all evaluations.
    """
    model, batch = policy.model, policy.own(ObservationBatch.collate([observation]))
    embedded = policy.embed(batch)
    found: dict[str, Callable[[], object]] = {"embed": lambda: policy.embed(batch)}
    for depth in range(1, model.backbone.spec.depth + 1):
        found[f"prefix {depth}"] = lambda depth=depth: model.read(embedded, depth)  # type: ignore[misc]
        if depth in model.depths:
            prefix = model.read(embedded, depth)
            found[f"start {depth}"] = lambda prefix=prefix: model.decoder.start(  # type: ignore[misc]
                prefix, [Generator().manual_seed(0)], SAMPLING
            )
            found[f"step {depth}"] = lambda prefix=prefix: model.decoder.sample(  # type: ignore[misc]
                prefix, [Generator().manual_seed(0)], SAMPLING
            )
    return found


def _nfe(policy: Policy, observation: Observation) -> int:
    """Decoder evaluations of ``SAMPLING``; a decoder of tokens may need fewer than steps."""
    decoder, prefix = policy.model.decoder, policy.encode(policy.own(ObservationBatch.collate([observation])))
    tokens = decoder.tokens(decoder.solve(prefix, [Generator().manual_seed(0)], SAMPLING))
    return int(tokens.nfe[0]) if tokens else decoder.nfe(SAMPLING)


def _work_of_parts(policy: Policy, observation: Observation) -> dict[str, Work]:
    """What each of ``_parts`` computes, with all evaluations of "step DEPTH"."""
    nfe, found = _nfe(policy, observation), {}
    for name, part in _parts(policy, observation).items():
        kind, _, depth = name.partition(" ")
        layers = int(depth or 0)
        start = policy.model.decoder.start_passes(layers)
        passes = {"embed": len(policy.views), "prefix": layers, "start": start, "step": start + nfe * (layers + 1)}
        found[name] = _work(part, policy, passes[kind])
    return found


def _work(part: Callable[[], object], policy: Policy, passes: float) -> Work:
    """Counts operations, and the parameters of every module that runs, each time it does."""
    read = 0

    def add(module: nn.Module, *_: object) -> None:
        nonlocal read
        read += sum(weight.numel() * weight.element_size() for weight in module.parameters(recurse=False))

    counter = FlopCounterMode(display=False)
    # the counter follows gradients of what modules are given; views of weights, as of learned queries, have none to follow here
    learned = [weight for weight in policy.model.parameters() if weight.requires_grad]
    hooks = [module.register_forward_hook(add) for module in policy.model.modules() if not isinstance(module, nn.Embedding)]
    try:
        for weight in learned:
            weight.requires_grad_(False)
        with counter:
            part()
    finally:
        for weight in learned:
            weight.requires_grad_(True)
        for hook in hooks:
            hook.remove()
    return Work(passes, counter.get_total_flops() / 1e9, read / 1e9)


def _in_turns(parts: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of every part in every round, after three that do not count."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(-3, rounds):
        for name, part in parts.items():
            begin = _now(device)
            part()
            if turn >= 0:
                times[name].append(1e3 * (_now(device) - begin))
    return times


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
