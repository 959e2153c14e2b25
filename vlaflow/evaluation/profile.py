"""Timing the parts of a chunk on this machine, layer by layer, for budgets in milliseconds."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Generator

from vlaflow.compute.budget import Profile
from vlaflow.compute.dense import Dense
from vlaflow.data.batch import ObservationBatch
from vlaflow.errors import ConfigError
from vlaflow.flows.sampling import Sampling
from vlaflow.policies.base import Policy
from vlaflow.policies.example import example
from vlaflow.versions import device_name, machine, versions


def profile(policy: Policy, checkpoint: str, rounds: int = 100, threads: int = 1) -> Profile:
    """Time embedding, every layer's prefix and a decoder evaluation at every exit, in turns; medians.

    Args:
        policy: the policy to time.
        checkpoint: fingerprint of its checkpoint.
        rounds: number of measurements of each part, at least 20.
        threads: number of torch threads.
    """
    if rounds < 20:
        raise ConfigError(f"A 99th percentile needs at least 20 rounds, got {rounds}.")
    model, observation = policy.model.eval(), example(policy)
    depths = range(1, model.backbone.spec.depth + 1)
    batch = policy.own(ObservationBatch.collate([observation]))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode(), policy.precision():
            embedded = policy.embed(batch)
            prefixes = {depth: model.read(embedded, depth) for depth in depths}
            sampling = Sampling(4)
            parts: dict[str, Callable[[], object]] = {"embed": lambda: policy.embed(batch)}
            for depth in depths:
                parts[f"prefix {depth}"] = lambda depth=depth: model.read(embedded, depth)  # type: ignore[misc]
                if depth in model.depths:
                    parts[f"step {depth}"] = lambda depth=depth: model.decoder.sample(  # type: ignore[misc]
                        prefixes[depth], [Generator().manual_seed(0)], sampling
                    )
            parts["chunk"] = lambda: policy.act(observation, Dense.by(sampling), generator=Generator().manual_seed(0))
            times: dict[str, list[float]] = {name: [] for name in parts}
            for turn in range(-3, rounds):
                for name, part in parts.items():
                    begin = _now(policy.device)
                    part()
                    if turn >= 0:
                        times[name].append(1e3 * (_now(policy.device) - begin))
    finally:
        torch.set_num_threads(before)
    middle = {name: float(np.median(ms)) for name, ms in times.items()}
    with torch.inference_mode(), policy.precision():
        tokens = model.decoder.tokens(model.decoder.solve(prefixes[depths[-1]], [Generator().manual_seed(0)], sampling))
    each = tokens.nfe[0] if tokens else model.decoder.nfe(sampling)
    full = middle[f"prefix {depths[-1]}"] + middle[f"step {depths[-1]}"]
    return Profile(
        checkpoint=checkpoint,
        machine=machine(),
        threads=threads,
        base=max(middle["chunk"] - full, middle["embed"]),
        prefix=tuple(middle[f"prefix {depth}"] for depth in depths),
        step=tuple(middle.get(f"step {depth}", 0.0) / each for depth in depths),
        jitter=float(np.percentile(times["chunk"], 99)) / middle["chunk"],
        chunks=rounds,
        versions=versions(),
        device=device_name(str(policy.device)),
        dtype=policy.dtype,
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
