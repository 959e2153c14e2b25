"""Milliseconds from an observation to a chunk of actions: one observation, one thread, cached prefix against recomputing it.

    python -m benchmarks.latency
    python -m benchmarks.latency --checkpoint runs/demo/rated --compile
    python -m benchmarks.latency --checkpoint runs/a1/policy --compile --dataset runs/a1/dataset --compute exit:budget-0.4

Recomputing runs the same weights through the same layers and must give the same chunk; it only forgets the prefix's keys and
values after every solver step ("layers") or the image's tokens as well ("everything"). Random weights serve as well as
trained ones: no compute policy here looks at what it computes, except refinement, of which both outcomes are measured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Generator

from benchmarks._timing import Case, report, seconds_in_turns
from benchmarks.training import make_policy
from vlaflow.backbones.base import Prefix
from vlaflow.compute.base import ComputePolicy, Decoded, Group, Stopwatch
from vlaflow.compute.dense import Dense
from vlaflow.compute.doubts import BelowThreshold
from vlaflow.compute.parse import parse_all
from vlaflow.compute.refine import Refine
from vlaflow.compute.spelling import Checkpoint, Knobs
from vlaflow.config import override
from vlaflow.data.batch import ObservationBatch
from vlaflow.data.frame_source import open_few_frames
from vlaflow.data.lerobot import Dataset
from vlaflow.decoders.base import Conditioning
from vlaflow.decoders.model import Model
from vlaflow.flows.sampling import Sampling
from vlaflow.policies.asyncvla.policy import tiny, tiny_rater
from vlaflow.policies.base import Policy
from vlaflow.policies.provenance import fingerprint
from vlaflow.policies.recipe import DataSpec
from vlaflow.simulators.metaworld_tasks import ACTION, TASKS
from vlaflow.spec import Observation

SAME_CHUNK = 1e-4
"""Robot units. The recomputed prefix is the same to the bit; a compiled one rounds in another order."""


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        checkpoint: a policy; by default the demo's, with random weights and a random rater.
        compute: compute policies of the checkpoint to time next to the others, by the names of ``vlaflow eval``.
        dataset: where real observations come from, which early exits need; random pixels by default.
        only: leave out the ways that recompute the prefix and those that refine.
        set: changes to that default's config, e.g. backbone.width=384 backbone.heads=12.
        steps: solver steps.
        compile: also dense with its prefix and its solver step compiled (takes a minute or two, and a C++ compiler).
        threads: of torch.
        rounds: chunks per way.
        json: file for the results.
    """

    checkpoint: Path | None = None
    compute: tuple[str, ...] = ()
    dataset: Path | None = None
    only: bool = False
    set: tuple[str, ...] = ()
    steps: int = 10
    compile: bool = False
    threads: int = 1
    rounds: int = 200
    json: Path | None = None


@dataclass(frozen=True)
class Recomputed(ComputePolicy):
    """Dense without a cache: every solver step encodes the observation again.

    Args:
        steps: solver steps.
        encode: makes the whole prefix from the images up; None runs the layers again on the tokens at hand.
    """

    steps: int
    encode: Callable[[], Prefix] | None = None
    name = "recomputed"

    def decode(
        self,
        model: Model,
        prefix: Prefix,
        generators: Sequence[Generator],
        watch: Stopwatch,
        conditioning: Conditioning | None = None,
    ) -> Decoded:
        """See ``ComputePolicy``."""
        state = model.decoder.start(prefix, generators, Sampling(self.steps), conditioning)
        whole = prefix
        for _ in range(self.steps):
            with watch.part("prefix"):
                whole = self.encode() if self.encode else model.backbone.run(prefix)
            with watch.part("first"):
                state = model.decoder.advance(state, whole)
        passes = model.backbone.spec.depth * 2 * self.steps
        rows = torch.arange(prefix.batch, device=prefix.hidden_BPW.device)
        depth, each = (whole.depth,) * prefix.batch, (self.steps,) * prefix.batch
        return Decoded(model.decoder.finish(state), (Group(rows, whole),), depth, each, (passes,) * prefix.batch)


def make_observation(policy: Policy) -> Observation:
    """Random pixels at the size the policy reads, and a sentence of the demo."""
    rng = np.random.default_rng(0)
    sides = {view: size or 224 for view, size in policy.model.backbone.views.items()}
    images = {view: rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for view, side in sides.items()}
    return Observation(images, np.array(policy.stats["state"].mean, np.float32), TASKS["drawer-open-v3"].instruction)


def observations(policy: Policy, dataset: Path, count: int = 200) -> list[Observation]:
    """Frames of a data set, spread evenly, in an order that mixes episodes; from a raw frame cache where there is one."""
    opened = Dataset.open(dataset)
    views = policy.model.backbone.views
    found = open_few_frames(opened, next(iter(views.values())), list(views), area=policy.config.backbone.input_size.area)
    rows = np.random.default_rng(0).permutation(np.linspace(0, len(opened) - 1, count).astype(int))
    columns, images = opened.columns(), found.gather(rows)
    return [
        Observation({view: images[view][i].numpy() for view in views}, columns.state[row], opened.tasks[int(columns.task[row])])
        for i, row in enumerate(rows)
    ]


def random_policy(changes: Sequence[str]) -> Policy:
    """The demo's policy with its rater, before any training."""
    config = override(tiny(DataSpec(ACTION.dim, ACTION.dim, ("corner2",))), dict(pair.split("=", 1) for pair in changes))
    policy = make_policy(config).with_rater(tiny_rater(config), 0)
    policy.model.eval()
    return policy


def compiled(policy: Policy) -> Policy:
    """A copy whose prefix and velocity are compiled; embedding and the solver loop stay as they are."""
    with torch.random.fork_rng(devices=[]):
        other = Policy(policy.config, policy.action_spec, policy.stats, copy.deepcopy(policy.model))
    other.model.backbone.run = torch.compile(other.model.backbone.run)  # type: ignore[method-assign]
    other.model.decoder.velocity = torch.compile(other.model.decoder.velocity)  # type: ignore[method-assign]
    return other


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    options = tyro.cli(Options, description=__doc__, args=argv)
    torch.set_num_threads(options.threads)
    policy = Policy.from_pretrained(options.checkpoint) if options.checkpoint else random_policy(options.set)
    steps = options.steps
    many = observations(policy, options.dataset) if options.dataset else [make_observation(policy)]
    seen = many[0]
    batch = ObservationBatch.collate([seen])
    ways: dict[str, tuple[Policy, ComputePolicy]] = {f"dense({steps})": (policy, Dense(steps))}
    if not options.only:
        ways |= {
            f"dense({steps}), layers recomputed": (policy, Recomputed(steps)),
            f"dense({steps}), everything recomputed": (policy, Recomputed(steps, lambda: policy.encode(batch))),
            f"dense({max(steps // 2, 1)})": (policy, Dense(max(steps // 2, 1))),
        }
    if options.checkpoint:
        home = Checkpoint(options.checkpoint, fingerprint(options.checkpoint))
        ways |= {c.name: (policy, c) for c in parse_all(options.compute, Knobs(steps), home)}
    if policy.model.rater is not None and not options.only:
        ways["refine, nothing rejected"] = (policy, Refine(BelowThreshold(0.0), Sampling(steps), Dense(steps)))
        ways["refine, some action rejected"] = (policy, Refine(BelowThreshold(1.0), Sampling(steps), Dense(steps)))
    if options.compile:
        ways[f"dense({steps}), torch.compile"] = (compiled(policy), Dense(steps))
    same = policy.act(seen, Dense(steps)).actions
    for name, (chosen, compute) in ways.items():
        if name.startswith(f"dense({steps})") and not np.allclose(chosen.act(seen, compute).actions, same, atol=SAME_CHUNK):
            raise SystemExit(f"'{name}' gives another chunk than dense({steps})")
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in ways}

    def arm(name: str) -> Callable[[], None]:
        chosen, compute = ways[name]

        def once() -> None:
            number = len(parts[name])  # so every way meets the same observations with the same noise
            chunk = chosen.act(many[number % len(many)], compute, generator=torch.Generator().manual_seed(number))
            parts[name].append(dict(chunk.milliseconds))

        return once

    seconds = seconds_in_turns({name: arm(name) for name in ways}, options.rounds, warmup=min(options.rounds, 5))
    medians = {
        f"parts of {name}": ", ".join(f"{part} {np.median([p[part] for p in each]):.2f} ms" for part in each[-1])
        for name, each in parts.items()
    }
    parameters = sum(p.numel() for p in policy.model.parameters()) / 1e6
    title = f"{parameters:.1f} M parameters, chunk of {policy.config.decoder.chunk_size}, batch 1"
    case = Case(title, "ms", {name: [s * 1e3 for s in each] for name, each in seconds.items()}, medians)
    return report("latency", options, [case], options.json)


if __name__ == "__main__":
    raise SystemExit(main())
