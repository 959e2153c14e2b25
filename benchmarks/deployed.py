"""Milliseconds of a chunk by engine: eager, compiled by ``torch.compile``, and programs of ``vlaflow deploy``; batch 1.

    python -m benchmarks.deployed
    python -m benchmarks.deployed --checkpoint runs/demo/rated --dataset runs/demo/dataset --compute auto --compute refine
    python -m benchmarks.deployed --only "aoti f32" --no-compile

All compute policies and ways take turns in one run, on the same observation in each round. The notes say how far each chunk is
from the eager one, and what share of this core's speed each way reaches: the limit is the chunk's matrix products at the rate
of a large one, measured in the same run. Where the work depends on the observation (early exits, refinement), they also give
each amount of work by itself. Everything is built in a temporary folder, or in one of your own, from which a second run takes
what is there and still fits the sources; programs that were deployed before are left alone. Building takes some minutes.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import tyro
from torch import Generator
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._timing import Case, report, say, seconds_in_turns
from benchmarks.latency import compiled, make_observation, observations, random_policy
from vlaflow.compute.base import ComputePolicy
from vlaflow.compute.parse import parse_all
from vlaflow.compute.spelling import Checkpoint, Knobs
from vlaflow.engine import store
from vlaflow.engine.deploy import DeploymentPlan
from vlaflow.engine.fold import folded
from vlaflow.engine.store import COMPILERS, Compiler
from vlaflow.errors import CapabilityError, DeploymentError
from vlaflow.policies.base import Policy
from vlaflow.policies.deployment import build
from vlaflow.policies.provenance import fingerprint
from vlaflow.spec import Chunk, Observation

PRECISIONS = ("f32", "bf16")
FEW = 4
"""Different amounts of work that are told apart; autoregression has as many as there are lengths."""


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        checkpoint: a policy; by default the demo's, with random weights.
        dataset: where real observations come from, one a round; by default one of random pixels.
        compute: compute policies of the checkpoint, each measured with every engine; dense with ten and two steps by default.
        only: deployed ways, such as "aoti f32"; by default all that this machine can build.
        compile: also measure the prefix and the solver step under torch.compile.
        steps: solver steps, where a compute policy states none.
        rounds: chunks per way.
        programs: folder of the programs, used where they are there; a temporary one by default.
        json: file for the results.
    """

    checkpoint: Path | None = None
    dataset: Path | None = None
    compute: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    compile: bool = True
    steps: int = 10
    rounds: int = 200
    programs: Path | None = None
    json: Path | None = None


def deployed(
    folder: Path, computes: Sequence[ComputePolicy], length: int, only: Sequence[str], programs: Path
) -> dict[str, Policy]:
    """The policy by engine and precision, of which each has a folder of its own."""
    found = {}
    for compiler in COMPILERS:
        for precision in PRECISIONS:
            name = f"{compiler} {precision}"
            if only and name not in only:
                continue
            plan = DeploymentPlan(compiler, precision, computes, (1,), (length,))
            begin = time.perf_counter()
            try:
                with patch.dict(os.environ, XDG_CACHE_HOME=str(programs / precision)):
                    if not _built(fingerprint(folder), compiler):
                        eager = Policy.from_pretrained(folder)
                        build(eager, folder, plan, say=lambda program, name=name: say(f"{name}: {program.key}"))
                        say(f"{name} was built in {time.perf_counter() - begin:.0f} s")
                    found[name] = Policy.from_pretrained(folder, engine=compiler)
            except (CapabilityError, DeploymentError) as error:
                say(f"{name} is left out: {error}")
    return found


def _built(weights: str, compiler: Compiler) -> bool:
    """Whether there are programs that can be used; those of older sources are built again."""
    try:
        return store.find(weights, compiler) is not None
    except DeploymentError:
        return False


def flops(eager: Arm, number: int) -> int:
    """Of the matrix products of one chunk after folding."""
    policy = eager.policy
    plain = replace(eager, policy=Policy(policy.config, policy.action_spec, policy.stats, folded(policy.model)))
    with FlopCounterMode(display=False) as counter:
        plain.chunk(number)
    return counter.get_total_flops()


def peak() -> Callable[[], torch.Tensor]:
    """A matrix product large enough to run at the core's full speed in float32, 2²⁷ multiplications."""
    one, other = torch.randn(512, 512), torch.randn(512, 512)
    return lambda: torch.mm(one, other)


PEAK_FLOPS = 2 * 512**3


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    options = tyro.cli(Options, description=__doc__, args=argv, config=(tyro.conf.UseAppendAction,))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.checkpoint or Path(temporary) / "policy"
        if options.checkpoint is None:
            random_policy(()).save_pretrained(folder)
        return measure(options, folder, options.programs or Path(temporary))


def measure(options: Options, folder: Path, programs: Path) -> int:
    """Build, time in turns, report."""
    policy = Policy.from_pretrained(folder)
    computes = parse_all(options.compute or ("dense", "dense:2"), Knobs(options.steps), Checkpoint(folder, fingerprint(folder)))
    many = observations(policy, options.dataset) if options.dataset else [make_observation(policy)]
    length = max(len(each.instruction.encode()) for each in many)
    ways = deployed(folder, computes, length, options.only, programs) | {"eager": policy}
    if options.compile:
        ways["torch.compile"] = compiled(policy)
    return report("deployed", options, cases(computes, many, ways, options.rounds), options.json)


@dataclass
class Arm:
    """One way of making one kind of chunk, for one observation after the other."""

    policy: Policy
    compute: ComputePolicy
    observations: Sequence[Observation]
    evaluations: list[int] = field(default_factory=list)

    def chunk(self, number: int) -> Chunk:
        """Of this observation."""
        seen = self.observations[number % len(self.observations)]
        return self.policy.act(seen, self.compute, generator=Generator().manual_seed(0))

    def __call__(self) -> None:
        """The next one, as timed."""
        self.evaluations.append(self.chunk(len(self.evaluations)).nfe)


def cases(
    computes: Sequence[ComputePolicy], many: Sequence[Observation], ways: Mapping[str, Policy], rounds: int
) -> list[Case]:
    """Chunks of every compute policy in every way, in turns with a product that shows the core's speed."""
    arms = {(compute.name, way): Arm(policy, compute, many) for compute in computes for way, policy in ways.items()}
    apart = {pair: _apart(arm, arms[pair[0], "eager"]) for pair, arm in arms.items()}
    named: dict[str, Callable[[], object]] = {f"{compute} {way}": arm for (compute, way), arm in arms.items()}
    seconds = seconds_in_turns({**named, "peak": peak()}, rounds, warmup=min(rounds, 5))
    rate = PEAK_FLOPS / float(np.median(seconds.pop("peak")))
    found = []
    for compute in computes:
        mine = {way: 1e3 * np.array(seconds[f"{compute.name} {way}"]) for way in ways}
        work = np.array(arms[compute.name, "eager"].evaluations[-rounds:])
        limit = _limits(arms[compute.name, "eager"], work, rate)
        notes = {"limit": f"{np.median(limit):.2f} ms for the matrix products at {rate / 1e9:.0f} GFLOP/s in float32"}
        for way, each in mine.items():
            share = float(np.median(limit / each))
            notes[way] = f"{_spread(each)}, {share:.0%} of the limit, {apart[compute.name, way]:.2g} robot units apart"
            if 1 < len(counts := sorted(set(work.tolist()))) <= FEW:
                for count in counts:
                    own = each[work == count]
                    notes[f"{way}, {count} evaluations"] = f"{_spread(own)}, {len(own)} chunks"
        found.append(Case(compute.name, "ms", {way: each.tolist() for way, each in mine.items()}, notes))
    if len(computes) == 1:
        return found
    names = [compute.name for compute in computes]
    return found + [Case(way, "ms", {name: [1e3 * s for s in seconds[f"{name} {way}"]] for name in names}) for way in ways]


def _spread(milliseconds: np.ndarray) -> str:
    p50, p99 = np.percentile(milliseconds, (50, 99))
    return f"p50 {p50:.2f} ms, p99/p50 {p99 / p50:.2f}"


def _apart(arm: Arm, eager: Arm) -> float:
    """Largest difference of chunks to the eager ones, over at most ten observations, in robot units."""
    numbers = range(min(len(arm.observations), 10))
    return max(float(np.abs(arm.chunk(n).actions - eager.chunk(n).actions).max()) for n in numbers)


def _limits(eager: Arm, work: np.ndarray, rate: float) -> np.ndarray:
    """Milliseconds of each round's matrix products at this rate, after folding; those of equal evaluations are counted once."""
    first = len(eager.evaluations) - len(work)
    cost = {count: flops(eager, first + int(np.argmax(work == count))) for count in set(work.tolist())}
    return np.array([1e3 * cost[count] / rate for count in work.tolist()])


if __name__ == "__main__":
    raise SystemExit(main())
