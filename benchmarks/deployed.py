"""Milliseconds of a chunk by engine: eager, compiled by ``torch.compile``, and programs of ``vlaflow deploy``; one observation.

    python -m benchmarks.deployed
    python -m benchmarks.deployed --checkpoint runs/demo/rated --compute auto --compute refine
    python -m benchmarks.deployed --only "aoti f32" --no-compile

All ways take turns in one run. The notes say how far each chunk is from the eager one, and what share of this core's speed each
way reaches: the limit is the chunk's matrix products at the rate of a large one, measured in the same run. Everything is built
in a temporary folder, or in one of your own, from which a second run takes what is there; programs that were deployed before
are left alone. Building takes some minutes.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import tyro
from torch import Generator
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._timing import Case, report, say, seconds_in_turns
from benchmarks.latency import compiled, make_observation, random_policy
from vlaflow.compute.base import ComputePolicy
from vlaflow.compute.parse import parse_all
from vlaflow.compute.spelling import Checkpoint, Knobs
from vlaflow.engine import store
from vlaflow.engine.deploy import DeploymentPlan
from vlaflow.engine.fold import folded
from vlaflow.engine.store import COMPILERS
from vlaflow.errors import CapabilityError, DeploymentError
from vlaflow.policies.base import Policy
from vlaflow.policies.deployment import build
from vlaflow.policies.provenance import fingerprint
from vlaflow.spec import Observation

PRECISIONS = ("f32", "bf16")


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        checkpoint: a policy; by default the demo's, with random weights.
        compute: compute policies of the checkpoint, each measured with every engine; dense with ten and two steps by default.
        only: deployed ways, such as "aoti f32"; by default all that this machine can build.
        compile: also measure the prefix and the solver step under torch.compile.
        steps: solver steps, where a compute policy states none.
        rounds: chunks per way.
        programs: folder of the programs, used where they are there; a temporary one by default.
        json: file for the results.
    """

    checkpoint: Path | None = None
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
                    if store.find(fingerprint(folder), compiler) is None:
                        eager = Policy.from_pretrained(folder)
                        build(eager, folder, plan, say=lambda program, name=name: say(f"{name}: {program.key}"))
                        say(f"{name} was built in {time.perf_counter() - begin:.0f} s")
                    found[name] = Policy.from_pretrained(folder, engine=compiler)
            except (CapabilityError, DeploymentError) as error:
                say(f"{name} is left out: {error}")
    return found


def flops(policy: Policy, once: Callable[[Policy], object]) -> int:
    """Of the matrix products of one chunk after folding."""
    counter = FlopCounterMode(display=False)
    plain = Policy(policy.config, policy.action_spec, policy.stats, folded(policy.model))
    with counter:
        once(plain)
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
    observation = make_observation(policy)
    ways = deployed(folder, computes, len(observation.instruction.encode()), options.only, programs) | {"eager": policy}
    if options.compile:
        ways["torch.compile"] = compiled(policy)
    cases = [case(compute, observation, ways, options.rounds) for compute in computes]
    return report("deployed", options, cases, options.json)


def case(compute: ComputePolicy, observation: Observation, ways: Mapping[str, Policy], rounds: int) -> Case:
    """Chunks of one compute policy, every way in turns with a product that shows the core's speed."""

    def act(chosen: Policy) -> np.ndarray:
        return chosen.act(observation, compute, generator=Generator().manual_seed(0)).actions

    same = act(ways["eager"])
    apart = {name: float(np.abs(act(chosen) - same).max()) for name, chosen in ways.items()}
    arms: dict[str, Callable[[], object]] = {name: partial(act, chosen) for name, chosen in ways.items()}
    seconds = seconds_in_turns({**arms, "peak": peak()}, rounds, warmup=min(rounds, 5))
    rate = PEAK_FLOPS / float(np.median(seconds.pop("peak")))
    work = flops(ways["eager"], act)
    limit = 1e3 * work / rate
    notes = {"limit": f"{work / 1e6:.0f} MFLOP at {rate / 1e9:.0f} GFLOP/s in float32 take {limit:.2f} ms"}
    for name, each in seconds.items():
        p50, p99 = 1e3 * np.percentile(each, (50, 99))
        notes[name] = (
            f"p50 {p50:.2f} ms, p99/p50 {p99 / p50:.2f}, {limit / p50:.0%} of the limit, {apart[name]:.2g} robot units apart"
        )
    return Case(compute.name, "ms", {name: [1e3 * s for s in each] for name, each in seconds.items()}, notes)


if __name__ == "__main__":
    raise SystemExit(main())
