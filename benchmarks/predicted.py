"""Predicted against measured milliseconds of a chunk: how far a cost fitted to some policies holds for others.

    python -m benchmarks.predicted

Policies differ in views, chunk size, solver steps, depth, width and batch. A cost model (``vlaflow.compute.cost``) is fitted to
policies of which each differs from the demo's in one of these, and predicts others that differ in several. The weights are
random, since times do not depend on them; all policies take turns, so that a slow minute slows all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from benchmarks._timing import Case, report, seconds_in_turns
from benchmarks.latency import make_observation
from benchmarks.training import make_policy
from vlaflow.compute.cost import CostModel, Work, fit
from vlaflow.compute.dense import Dense
from vlaflow.config import override
from vlaflow.evaluation.profile import acting, count
from vlaflow.policies.asyncvla.policy import tiny
from vlaflow.policies.base import Policy
from vlaflow.policies.recipe import DataSpec
from vlaflow.simulators.metaworld_tasks import ACTION


@dataclass(frozen=True)
class Options:
    """How long to measure.

    Args:
        rounds: chunks of each policy.
        json: file for the results.
    """

    rounds: int = 30
    json: Path | None = None


@dataclass(frozen=True)
class Shape:
    """A policy of the demo's kind, and what it is asked for."""

    views: int = 1
    chunk: int = 16
    steps: int = 10
    depth: int = 4
    width: int = 128
    batch: int = 1

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in vars(self).items())

    def policy(self) -> Policy:
        """With random weights."""
        sizes = {
            "backbone.depth": self.depth,
            "backbone.width": self.width,
            "backbone.heads": self.width // 32,
            "backbone.ffn": 4 * self.width,
            "decoder.chunk_size": self.chunk,
        }
        views = tuple(f"view{number}" for number in range(self.views))
        changes = {name: str(value) for name, value in sizes.items()} | {"exits": "none"}
        made = make_policy(override(tiny(DataSpec(ACTION.dim, ACTION.dim, views)), changes))
        made.model.eval()
        return made


FITTED = (
    Shape(),
    Shape(views=2),
    Shape(views=4),
    Shape(chunk=8),
    Shape(chunk=32),
    Shape(steps=1),
    Shape(steps=4),
    Shape(depth=2),
    Shape(depth=8),
    Shape(width=64),
    Shape(width=256),
    Shape(width=384),
    Shape(batch=2),
    Shape(batch=4),
    Shape(batch=8),
)
HELD_OUT = (
    Shape(2, 32, 4, 6, 192, 2),
    Shape(3, 8, 5, 3, 256, 4),
    Shape(2, 16, 2, 8, 192),
    Shape(1, 50, 10, 6, 192),
    Shape(3, 16, 10, 6, 256),
    Shape(2, 50, 5, 4, 128, 8),
    Shape(1, 24, 8, 5, 320),
    Shape(4, 32, 3, 2, 64, 4),
    Shape(2, 16, 10, 4, 192, 4),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, fit, predict and report."""
    options = tyro.cli(Options, description=__doc__, args=argv)
    torch.set_num_threads(1)
    arms, works = {}, dict[Shape, Work]()
    for shape in (*FITTED, *HELD_OUT):
        policy = shape.policy()
        asked = Dense(shape.steps), [make_observation(policy)] * shape.batch
        arms[str(shape)], works[shape] = acting(policy, *asked), count(policy, *asked)
    seconds = seconds_in_turns(arms, options.rounds, warmup=3)
    found = [Measured(shape, work, [1e3 * s for s in seconds[str(shape)]]) for shape, work in works.items()]
    fitted, held_out = found[: len(FITTED)], found[len(FITTED) :]
    cost = fit([each.work for each in fitted], [each.median for each in fitted])
    return report("predicted", options, [case("fitted", fitted, cost), case("held out", held_out, cost)], options.json)


@dataclass(frozen=True)
class Measured:
    """Chunks of a shape, in milliseconds."""

    shape: Shape
    work: Work
    milliseconds: Sequence[float]

    @property
    def median(self) -> float:
        """Of the rounds."""
        return float(np.median(self.milliseconds))


def case(name: str, measured: Sequence[Measured], cost: CostModel) -> Case:
    """The chunks of some shapes, and what the cost model says of each."""
    terms = f"{cost.chunk:.2f} ms a chunk, {cost.layer_pass:.3f} ms a pass, {cost.gflop:.1f} ms per 10⁹ operations"
    notes, off = {"cost": f"{terms}, {cost.gigabyte:.0f} ms per 10⁹ bytes of weights"}, list[float]()
    for each in measured:
        predicted = cost.milliseconds(each.work)
        off.append(predicted / each.median - 1)
        notes[str(each.shape)] = f"measured {each.median:.1f} ms, predicted {predicted:.1f} ms ({off[-1]:+.0%})"
    notes["off"] = f"{np.mean(np.abs(off)):.1%} on average, {max(off, key=abs):+.1%} at worst"
    return Case(name, "ms", {str(each.shape): each.milliseconds for each in measured}, notes)


if __name__ == "__main__":
    raise SystemExit(main())
