"""vla-eval's own LIBERO benchmark drives our server: what ``make test-vla-eval`` runs, apart from ``make test``.

    make test-vla-eval ARGS="--env libero/object/0 --episodes 3"
    make test-vla-eval ARGS="--checkpoint runs/libero/policy --env libero/object/0"

Every episode is played twice: here as ``vlaflow eval --render exact`` plays it, and by ``vla-eval run`` in a process and an
environment of its own, with the benchmark and the simulator of the harness, against a server of the same policy. It prints a
table and ends with status 0 when all successes and numbers of steps agree and, where the policy sees images of 256 pixels,
every observation and action from the first stored state is equal to the bit. From later ones the stock simulator has drawn
other placements before it sets the state: other places of the fixtures, or rounding of 1e-16.

Without a checkpoint the policy plays what LIBERO's scripted experts do from the same stored states.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from tests.end_to_end.script import ScriptedPolicy, blank_policy, expert_actions
from tests.serving.live import serving
from vlaflow.compute.base import ComputePolicy
from vlaflow.compute.parse import parse
from vlaflow.compute.spelling import Knobs
from vlaflow.errors import CapabilityError, VlaflowError
from vlaflow.evaluation.rollout import EpisodeJob, RolloutConfig, one_thread, open_env, play, require_fit
from vlaflow.policies.base import Policy
from vlaflow.policies.seeds import FIRST_SEED
from vlaflow.serving.observation_keys import choose
from vlaflow.simulators.base import step_limit
from vlaflow.simulators.libero_tasks import TASKS
from vlaflow.spec import Chunk, Observation

SIZE = 256
"""Side of the harness's images."""
Seen = list[tuple[Observation, Chunk]]


@dataclass(frozen=True)
class Options:
    """What to compare.

    Args:
        checkpoint: folder of a policy trained on LIBERO; None for the scripts of the experts.
        compute: its compute policy.
        env: tasks; repeat for more.
        episodes: stored states per task, from the first.
        harness: Python of the harness's environment, which tools/setup-vla-eval.sh makes.
        out: where the results of the harness go; None for a folder that is removed.
    """

    checkpoint: Path | None = None
    compute: str = "dense"
    env: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    episodes: int = 2
    harness: Path = Path(".venv-vla-eval/bin/python")
    out: Path | None = None


@dataclass
class Played:
    """One episode: what the policy saw and did, and how it ended."""

    success: bool = False
    steps: int = 0
    seen: Seen = field(default_factory=list)


def played_here(policy: Policy, compute: ComputePolicy, name: str, episodes: int) -> list[Played]:
    """The episodes of one task as ``vlaflow eval`` plays them."""
    config, all_played = RolloutConfig(render="exact"), []
    require_fit(policy, "the policy", {name}, [compute], config)
    env = open_env(policy, name, "exact")
    for seed in range(FIRST_SEED, FIRST_SEED + episodes):
        if isinstance(policy, ScriptedPolicy):
            policy.write(TASKS[name.partition("/")[2]].instruction, seed, expert_actions(env, name, seed))
        seen: Seen = []
        result = play(
            policy, env, EpisodeJob(name, compute, seed), config, before=lambda _, *both, seen=seen: seen.append(both)
        )
        all_played.append(Played(result.success, result.steps, seen))
    return all_played


def played_there(policy: Policy, compute: ComputePolicy, name: str, options: Options, out: Path) -> list[Played]:
    """The same as the harness plays them, against a server in this process."""
    task = TASKS[name.partition("/")[2]]
    all_seen: list[Seen] = []

    def record(entry: Any) -> None:
        if entry.outcome == "reset":  # the harness said hello, began an episode or ended one
            all_seen.append([])
        elif entry.chunk is not None:
            all_seen[-1].append((entry.observation, entry.chunk))

    with serving(policy, compute, place=choose("vla-eval-libero", tuple(policy.model.backbone.views))) as (server, address):
        server.request_log.observer = record
        benchmark = {
            "benchmark": "vla_eval.benchmarks.libero.benchmark:LIBEROBenchmark",
            "episodes_per_task": options.episodes,
            "max_steps": step_limit(name),
            "tasks": [task.instruction],
            "params": {"suite": task.suite, "seed": FIRST_SEED},
        }
        config = {"server": {"url": address, "timeout": 300}, "output_dir": str(out), "benchmarks": [benchmark]}
        (out / "config.yaml").write_text(json.dumps(config))
        command = [str(options.harness), "-m", "vla_eval.cli.main", "run", "--no-docker", "--config", str(out / "config.yaml")]
        with (out / "log.txt").open("w") as log:
            ended = subprocess.run(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=_surroundings(), check=False)
    if ended.returncode:
        raise SystemExit(f"vla-eval ended with status {ended.returncode}:\n{(out / 'log.txt').read_text()[-3000:]}")
    told = outcomes(out)
    seen = [each for each in all_seen if each]
    if len(told) != len(seen):
        raise SystemExit(f"vla-eval reports {len(told)} episodes of {name}, the server saw {len(seen)}.")
    return [Played(success, steps, each) for (success, steps), each in zip(told, seen, strict=True)]


def _surroundings() -> dict[str, str]:
    """The environment variables of the harness: one thread, as in the workers of ``vlaflow eval``."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def outcomes(out: Path) -> list[tuple[bool, int]]:
    """(success, steps) of the episodes in the harness's own results."""
    (file,) = out.glob("*_aggregate.json")
    (task,) = json.loads(file.read_text())["tasks"]
    failed = [each["failure_detail"] for each in task["episodes"] if each.get("failure_reason")]
    if failed:
        raise SystemExit(f"vla-eval could not play {len(failed)} episodes: {failed[0]}")
    return [(each["metrics"]["success"], each["steps"]) for each in sorted(task["episodes"], key=lambda e: e["episode_id"])]


def differences(here: Played, there: Played) -> list[str]:
    """What the policy saw or did differently, in words."""
    if len(here.seen) != len(there.seen):
        return [f"{len(here.seen)} and {len(there.seen)} chunks"]
    largest: dict[str, float] = {}
    for (observation, chunk), (other, answer) in zip(here.seen, there.seen, strict=True):
        pairs = {view: (image.astype(int), other.images[view]) for view, image in observation.images.items()}
        pairs |= {"state": (observation.state, other.state), "actions": (chunk.actions, answer.actions)}
        pairs["instruction"] = (np.array(observation.instruction == other.instruction, int), np.array(1))
        for what, (ours, theirs) in pairs.items():
            largest[what] = max(largest.get(what, 0.0), float(np.abs(ours - theirs).max()))
    return [f"{what} by up to {most:.3g}" for what, most in largest.items() if most]


def main() -> int:
    """Play everything twice; the exit status is 1 if something that must agree does not."""
    options = tyro.cli(Options, description=__doc__)
    try:
        if not options.harness.exists():
            raise CapabilityError(f"There is no {options.harness}: tools/setup-vla-eval.sh makes it.")
        policy = blank_policy("libero", SIZE) if options.checkpoint is None else Policy.from_pretrained(options.checkpoint)
        compute = parse(options.compute, Knobs(10), None)
        exact = set(policy.model.backbone.views.values()) == {SIZE}
        wrong = False
        sys.stdout.write("| task | stored state | vlaflow eval | vla-eval | what differs |\n|---|---|---|---|---|\n")
        with tempfile.TemporaryDirectory() as scratch, one_thread():
            for name in options.env or ("libero/object/0",):
                out = (options.out or Path(scratch)).absolute() / name.replace("/", "-")
                out.mkdir(parents=True)
                here = played_here(policy, compute, name, options.episodes)
                there = played_there(policy, compute, name, options, out)
                for state, (ours, theirs) in enumerate(zip(here, there, strict=True)):
                    found = differences(ours, theirs)
                    ends = [f"{'success' if p.success else 'failure'} after {p.steps}" for p in (ours, theirs)]
                    wrong |= ends[0] != ends[1] or (exact and state == 0 and bool(found))
                    said = ", ".join(found) or "nothing"
                    sys.stdout.write(f"| {name} | {state} | {ends[0]} | {ends[1]} | {said} |\n")
                    sys.stdout.flush()
    except VlaflowError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
