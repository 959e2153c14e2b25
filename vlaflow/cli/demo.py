"""``vlaflow demo``: record, train, calibrate, evaluate and report; each step is printed as a command of its own.

Finished steps are recorded in ``demo.json``, so the same command continues an interrupted demo.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from vlaflow.cli.arguments import parse_arguments
from vlaflow.cli.demo_plans import CALIBRATION, PLANS, DemoRecord, Plan, Protocol
from vlaflow.errors import ConfigError, DataError
from vlaflow.outputs import make_folder, require_makeable, write_json
from vlaflow.packages import PAGES, require
from vlaflow.ranges import Count, Number
from vlaflow.simulators.base import expand_env_names
from vlaflow.strict import read_json, require_form

if TYPE_CHECKING:
    from vlaflow.evaluation.results import Minutes, Results


@dataclass(frozen=True)
class Demo:
    """Train and evaluate an AsyncVLA policy from scratch and write a report, on two CPU cores.

    Example: vlaflow demo --out runs/demo

    Three tasks of Meta-World take some ten minutes, three of LIBERO-Object some forty, and all fifty of Meta-World about three
    hours.

    Run the same command again to continue after an interruption.

    Args:
        plan: the tasks: three of Meta-World, three of LIBERO-Object, or Meta-World's fifty.
        out: folder for the data set, the checkpoints, results.json and report.html; runs/demo, runs/libero-demo or runs/mt50 by
            default.
        episodes: demonstrations per task; 50, or 40 of LIBERO, by default.
        eval_episodes: episodes per task and compute policy; 20, or 10 of LIBERO and of the fifty, by default.
        steps: training steps of the policy; the plan's by default.
        workers: processes for recording and evaluation; one per core is best.
        quick: a few steps on one task, to check that everything works; the policy does not learn.
    """

    plan: Literal["metaworld", "libero", "mt50"] = "metaworld"
    out: Path | None = None
    episodes: Count | None = None
    eval_episodes: Count | None = None
    steps: Count | None = None
    workers: Number = 2
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


@dataclass(frozen=True)
class Settings:
    """Settings that determine the demo's result; fixed once a demo has been started in a folder."""

    plan: str
    envs: tuple[str, ...]
    episodes: int
    noise: tuple[float, ...]
    noise_memory: tuple[float, ...]
    eval_episodes: int
    steps: int | None
    rater_steps: int | None
    batch_size: int | None
    max_steps: int | None
    latency_chunks: int
    language_episodes: int
    solver_steps: int
    frames: int
    sampler_frames: int
    validation_fraction: float | None
    size: int | None

    @staticmethod
    def of(arguments: Demo) -> Settings:
        """The settings for these arguments."""
        plan = PLANS[arguments.plan]
        noise = plan.noise, plan.noise_memory
        if arguments.quick:
            first, language = tuple(expand_env_names(plan.envs)[:1]), min(plan.language_episodes, 1)
            return Settings(arguments.plan, first, 4, *noise, 2, 4, 2, 8, 40, 2, language, 2, 16, 8, 0.5, plan.size)
        eval_episodes = arguments.eval_episodes or plan.eval_episodes
        return Settings(
            arguments.plan,
            plan.envs,
            arguments.episodes or plan.episodes,
            *noise,
            eval_episodes,
            arguments.steps or plan.steps,
            plan.rater_steps,
            None,
            None,
            60,
            min(plan.language_episodes, eval_episodes),
            10,
            512,
            96,
            None,
            plan.size,
        )


def main(argv: list[str]) -> int:
    """Run ``vlaflow demo ...``; returns the exit status."""
    arguments = parse_arguments(Demo, "vlaflow demo", argv)
    plan, settings = PLANS[arguments.plan], Settings.of(arguments)
    require(*plan.packages, "accelerate", "psutil", *PAGES, what="The demo", extra=plan.extra)
    out = arguments.out or Path(plan.out)
    log = DemoLog(out, settings)
    dataset, policy, final = out / "dataset", out / "policy", out / plan.final
    commands = equivalent(settings, plan, out, arguments.workers)

    with log.step("record", commands["record"]) as due:
        if due:
            _record(settings, dataset, arguments.workers)
    stages: list[tuple[str, str, Path | None, Path, int | None]] = [("train", plan.policy, None, policy, settings.steps)]
    if plan.rater:
        stages.append(("rater", plan.rater, policy, final, settings.rater_steps))
    for step, recipe, source, goal, steps in stages:
        with log.step(step, commands[step]) as due:
            overrides = {
                "steps": steps,
                "global_batch_size": settings.batch_size,
                "validation_fraction": settings.validation_fraction,
            }
            stopped = _train(recipe, dataset, goal, policy=source, overrides=overrides, command=commands[step]) if due else None
            if stopped is not None:
                log.leave()
                return stopped
    with log.step("calibrate", commands["calibrate"]) as due:
        if due:
            _sampler(settings, final, dataset)
            _calibrate(settings, final, dataset)
    for protocol in plan.protocols:
        with log.step(protocol.step, commands[protocol.step]) as due:
            if due:
                _evaluate(settings, protocol, final, out, arguments.workers)
    return _report(out, log, plan, settings, tuple(commands.values()))


class DemoLog:
    """The finished steps of a demo and their durations.

    Raises:
        ConfigError: the demo in the folder has other settings, or the folder cannot be created.
    """

    def __init__(self, out: Path, settings: Settings) -> None:
        require_makeable(out)
        self.file, self._left = out / "demo.json", False
        self.done: list[str] = []
        self.seconds: dict[str, float] = {}
        plain = json.loads(json.dumps(asdict(settings)))
        if self.file.exists():
            known = read_json(self.file, DataError, f"it is damaged. Delete {out}, or choose another --out.")
            require_form(DemoRecord, known, str(self.file), DataError)
            before, self.done, self.seconds = known["settings"], known["done"], known["seconds"]
            for name, value in plain.items():
                if before.get(name) != value:
                    raise ConfigError(
                        f"The demo in {out} was started with {name} = {before.get(name)}, not {value}. "
                        f"Continue it with the same options, or choose another --out."
                    )
        elif out.exists() and any(out.iterdir()):
            raise ConfigError(f"{out} is not empty and contains no demo. Choose another --out.")
        self._settings = plain
        make_folder(out)
        self._save()

    @contextmanager
    def step(self, name: str, command: str) -> Iterator[bool]:
        """Print the command of a step, time the step and record it as done; yields whether it still has to run."""
        due = name not in self.done
        _print(f"\n$ {command}" + ("" if due else "   (done before)"))
        began = time.monotonic()
        try:
            yield due
            if due and not self._left:
                self.done.append(name)
        finally:
            if due:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
                self._save()

    def leave(self) -> None:
        """Mark the current step as stopped before it was done."""
        self._left = True

    def minutes(self) -> Minutes:
        """Minutes by step, with the installation as measured by ``make demo``; writing the page is not counted."""
        from vlaflow.evaluation.results import Minutes

        spent: dict[str, float] = {}
        for name, seconds in self.seconds.items():
            step = name.partition(" ")[0]  # "evaluate evo1"
            spent[step] = spent.get(step, 0.0) + seconds / 60
        return Minutes(install=_install_minutes(), **spent).summed()

    def _save(self) -> None:
        write_json(self.file, {"settings": self._settings, "done": self.done, "seconds": self.seconds}, indent=1)


def equivalent(settings: Settings, plan: Plan, out: Path, workers: int) -> dict[str, str]:
    """The equivalent command of every step."""
    dataset, policy, final = (str(out / name) for name in ("dataset", "policy", plan.final))
    envs = [word for env in settings.envs for word in ("--env", env)]
    batch = ["--batch-size", settings.batch_size] if settings.batch_size else []
    held = ["--set", f"validation_fraction={settings.validation_fraction}"] if settings.validation_fraction else []

    def command(*words: Any) -> str:
        return shlex.join(["vlaflow", *map(str, words)])

    def steps(n: int | None) -> list[Any]:
        return ["--steps", n] if n else []

    def evaluate(protocol: Protocol) -> str:
        limit = settings.max_steps or protocol.max_steps
        return command(
            *("eval", final, *envs, *(word for name in protocol.computes for word in ("--compute", name))),
            *("--episodes", settings.eval_episodes),
            *(["--seed", protocol.first_seed] if protocol.name else []),
            *(["--max-steps", limit] if limit else []),
            *([] if settings.solver_steps == 10 else ["--steps", settings.solver_steps]),
            *(["--no-videos"] if protocol.name else ["--language", settings.language_episodes]),
            *("--out", out / protocol.name, "--workers", workers),
        )

    def rater(recipe: str) -> str:
        return command(
            *("train", recipe, "--policy", policy, "--dataset", dataset, "--out", final),
            *(*steps(settings.rater_steps), *batch, *held),
            "--no-calibrate",
        )

    return {
        "record": command(
            *("record", *envs, "--episodes", settings.episodes),
            *(word for noise in settings.noise for word in ("--noise", noise)),
            *(word for memory in settings.noise_memory for word in ("--noise-memory", memory)),
            *(["--size", settings.size] if settings.size else []),
            *("--out", dataset, "--workers", workers),
        ),
        "train": command(
            *("train", plan.policy, "--dataset", dataset, "--out", policy, *steps(settings.steps), *batch, *held),
            "--no-calibrate",
        ),
        **({"rater": rater(plan.rater)} if plan.rater else {}),
        "calibrate": command("calibrate", final, "--dataset", dataset, "--sampler", "--frames", settings.sampler_frames)
        + " && "
        + command(
            *("calibrate", final, "--dataset", dataset, "--name", CALIBRATION),
            *("--frames", settings.frames, "--no-ladder"),
        ),
        **{protocol.step: evaluate(protocol) for protocol in plan.protocols},
    }


def _record(settings: Settings, dataset: Path, workers: int) -> None:
    from vlaflow.simulators.experts import noises
    from vlaflow.simulators.record import RecordConfig, record_with_progress
    from vlaflow.simulators.recording import sweep_finished

    if dataset.exists():  # complete, but the demo was killed before it knew
        sweep_finished(dataset)
        return
    noise = noises(settings.noise, settings.noise_memory)
    record_with_progress(RecordConfig(settings.envs, settings.episodes, settings.size, noise=noise), dataset, workers)


def _train(
    recipe: str, dataset: Path, out: Path, *, policy: Path | None, overrides: Mapping[str, float | None], command: str
) -> int | None:
    """Train; returns an exit status if a signal ended it early, else None."""
    from vlaflow.training.run import Options, train

    texts = {key: str(value) for key, value in overrides.items() if value}
    outcome = train(recipe, dataset, out, policy=policy, options=Options(texts, command=command))
    if outcome.signal is None:
        return None
    _print(
        f"Stopped after step {outcome.step} of {outcome.steps}; everything is saved. Run the same command again to continue."
    )
    return 130 if outcome.signal == signal.SIGINT else 0


def _sampler(settings: Settings, checkpoint: Path, dataset: Path) -> None:
    from vlaflow.evaluation.calibrate_sampler import SamplerRequest, run
    from vlaflow.reports.sampler import write_page

    chunks = min(settings.latency_chunks, SamplerRequest.latency_chunks)
    run(checkpoint, dataset, SamplerRequest(frames=settings.sampler_frames, latency_chunks=chunks), report=write_page)


def _calibrate(settings: Settings, checkpoint: Path, dataset: Path) -> None:
    from vlaflow.evaluation.calibrate import ByShares, Request, run
    from vlaflow.reports.calibration import write_page

    made = run(checkpoint, dataset, Request(CALIBRATION, ByShares(), frames=settings.frames, ladder=False))
    write_page(made.calibration, made.table, made.file.with_suffix(".html"))


def _evaluate(settings: Settings, protocol: Protocol, checkpoint: Path, out: Path, workers: int) -> None:
    from vlaflow.compute.spelling import Knobs
    from vlaflow.evaluation.config import EvaluationConfig
    from vlaflow.evaluation.rollout import RolloutConfig
    from vlaflow.evaluation.run import run
    from vlaflow.reports.evaluation import write_report

    config = EvaluationConfig(
        envs=settings.envs,
        computes=protocol.computes,
        episodes=settings.eval_episodes,
        first_seed=protocol.first_seed,
        knobs=Knobs(settings.solver_steps),
        rollout=RolloutConfig(max_steps=settings.max_steps or protocol.max_steps),
        latency_chunks=settings.latency_chunks,
        language_episodes=0 if protocol.name else settings.language_episodes,
        videos=not protocol.name,
        workers=workers,
    )
    run(checkpoint, config, out / protocol.name, report=write_report if protocol.name else None)


def _report(out: Path, log: DemoLog, plan: Plan, settings: Settings, commands: tuple[str, ...]) -> int:
    from rich.console import Console

    from vlaflow.cli.eval import table
    from vlaflow.evaluation import results
    from vlaflow.evaluation.prepared import RESULTS
    from vlaflow.reports.evaluation import write_report
    from vlaflow.training.metrics_log import read_log
    from vlaflow.versions import command_line

    minutes = log.minutes()
    found: Results = replace(results.read(out / RESULTS), minutes=minutes, command=command_line(), commands=commands)
    results.write(found, out / RESULTS)
    logs = {"velocity error, squared": read_log(out / "policy")}
    if plan.rater:
        logs["rating error, squared"] = read_log(out / plan.final)
    count = len(found.envs)
    tasks = f"{count} {plan.title} task{'s' if count > 1 else ''}"
    page = write_report(out, logs, f"AsyncVLA on {tasks}: from nothing to evaluated in {minutes.total or 0:.1f} minutes")
    console = Console()
    console.print()
    console.print(table(found))
    spent = asdict(minutes)
    console.print("minutes: " + ", ".join(f"{name} {value:.1f}" for name, value in spent.items() if value is not None))
    console.print(f"\nOpen {page}", soft_wrap=True)
    return 0


def _install_minutes() -> float | None:
    """Installation time measured by ``make demo``, from an environment variable or a file in the virtual environment."""
    text = os.environ.get("VLAFLOW_INSTALL_SECONDS", "")
    left = Path(sys.prefix) / ".vlaflow-install-seconds"
    if not text and left.exists():
        text = left.read_text()
    try:
        return float(text) / 60
    except ValueError:
        return None


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
