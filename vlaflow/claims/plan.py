"""The commands that test a claim, in order: record, train and calibrate, evaluate.

Everything but the evaluations is shared: claims of one folder use the same data sets and the same trainings. Folders are named
by the size of what they hold, so tests of several sizes can lie in one folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlaflow.claims.base import Claim, Training, TrialArm
from vlaflow.claims.benchmark import METAWORLD, Benchmark
from vlaflow.errors import ConfigError

CALIBRATION_FRAMES = 768
PARALLEL = ("record", "record-vqa", "eval")
"""Commands that take ``--workers``, on which their results do not depend."""


@dataclass(frozen=True)
class Size:
    """How large the test of a claim is.

    Args:
        training_seeds: number of trainings with different seeds.
        demonstrations: per task.
        episodes: environment seeds per task and arm, for each training seed.
        noise_seeds: episodes per environment seed.
        quick: a few training steps and episodes on one task, to check that everything works; says nothing about the claim.
    """

    training_seeds: int = 3
    demonstrations: int = 50
    episodes: int = 40
    noise_seeds: int = 1
    quick: bool = False

    def __post_init__(self) -> None:
        for name in ("training_seeds", "demonstrations", "episodes", "noise_seeds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")

    @property
    def seeds(self) -> range:
        """The training seeds."""
        return range(1 if self.quick else self.training_seeds)

    @property
    def recorded(self) -> int:
        """Demonstrations per task, also with ``quick``."""
        return 4 if self.quick else self.demonstrations

    @property
    def played(self) -> tuple[int, int]:
        """Environment seeds per task and arm, and episodes per environment seed, also with ``quick``."""
        return (2, 1) if self.quick else (self.episodes, self.noise_seeds)


@dataclass(frozen=True)
class Places:
    """The folders and files of tests of one size on one benchmark.

    Args:
        root: folder of all benchmarks; Meta-World's tests lie in it, those of others in folders of their own.
        size: see ``Size``.
        benchmark: the tasks.
    """

    root: Path
    size: Size = field(default_factory=Size)
    benchmark: Benchmark = METAWORLD

    @property
    def out(self) -> Path:
        """The benchmark's folder."""
        return self.root if self.benchmark == METAWORLD else self.root / self.benchmark.name.replace("/", "-")

    def command(self, claim: Claim) -> str:
        """The command that tests a claim here."""
        elsewhere = "" if self.benchmark == METAWORLD else f" --benchmark {self.benchmark.name}"
        return f"vlaflow reproduce {claim.name}{elsewhere} --out {self.root}"

    @property
    def envs(self) -> tuple[str, ...]:
        """The tasks."""
        return self.benchmark.envs[:1] if self.size.quick else self.benchmark.envs

    @property
    def dataset(self) -> Path:
        """Demonstrations."""
        return self.out / f"dataset-{self._recorded}"

    @property
    def vqa(self) -> Path:
        """Questions about images of the same tasks."""
        return self.out / ("vqa-quick" if self.size.quick else "vqa")

    def policy(self, training: str, seed: int) -> Path:
        """A checkpoint."""
        return self.out / "policies" / f"{training}-{self._recorded}-{seed}"

    def results(self, claim: Claim, training: str, seed: int) -> Path:
        """Results of the episodes, or answers, of a checkpoint."""
        episodes, noise = self.size.played
        return self.out / "results" / claim.name / f"{training}-{self._recorded}-{seed}-{episodes}x{noise}"

    def row(self, claim: Claim) -> Path:
        """The claim's row."""
        return self.out / f"{claim.name}.json"

    def page(self, claim: Claim) -> Path:
        """The claim's page."""
        return self.out / f"{claim.name}.html"

    @property
    def _recorded(self) -> str:
        return "quick" if self.size.quick else str(self.size.recorded)


def commands(claim: Claim, places: Places) -> Iterator[list[str]]:
    """The arguments of ``vlaflow`` for every step, in order, without the number of workers.

    Raises:
        ConfigError: the claim cannot be tested on the benchmark.
    """
    size, benchmark = places.size, places.benchmark
    benchmark.require(claim)
    tasks = [word for env in places.envs for word in ("--env", env)]
    episodes, noise = size.played
    yield ["record", *tasks, "--episodes", str(size.recorded), *benchmark.recording, "--out", str(places.dataset)]
    if claim.asks:
        number = ["--episodes", "4" if size.quick else "150"]
        yield ["record-vqa", *tasks, *number, "--out", str(places.vqa)]
    for seed in size.seeds:
        for name in claim.order():
            yield from _training(benchmark.training(claim.trainings[name]), name, places, seed)
    for seed in size.seeds:
        for name in claim.order():
            arms = [arm for arm in claim.arms.values() if arm.training == name]
            checkpoint, out = str(places.policy(name, seed)), ["--out", str(places.results(claim, name, seed))]
            if any(arm.compute is None for arm in arms):
                yield ["eval-vqa", checkpoint, "--vqa", str(places.vqa), *out]
            if computes := _computes(arms):
                counts = ["--episodes", str(episodes), "--noise-seeds", str(noise)]
                yield ["eval", checkpoint, *tasks, *computes, *counts, *_short_episodes(size), *out]


def _training(training: Training, name: str, places: Places, seed: int) -> Iterator[list[str]]:
    out, size = places.policy(name, seed), places.size
    settings = {**training.settings, "seed": str(seed)}
    steps = training.steps
    if size.quick:
        steps = 2
        settings |= {"global_batch_size": "8", "validation_fraction": "0.5"}
    given = [("--policy", training.after), ("--latent", training.latent)]
    assets = [word for option, need in given if need for word in (option, str(places.policy(need, seed)))]
    if training.vqa:
        assets += ["--vqa", str(places.vqa)]
    changes = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    number = ["--steps", str(steps)] if steps is not None else []
    sampler = [] if training.sampler else ["--no-calibrate"]
    yield ["train", training.recipe, "--dataset", str(places.dataset), *assets, "--out", str(out), *number, *changes, *sampler]
    frames = 16 if size.quick else CALIBRATION_FRAMES
    for calibration, options in training.calibrations.items():
        of_exits = [] if "--refine" in options else ["--no-ladder"]
        named = ["--name", calibration, *options, "--frames", str(frames), *of_exits]
        yield ["calibrate", str(out), "--dataset", str(places.dataset), *named]


def _computes(arms: Sequence[TrialArm]) -> list[str]:
    names = dict.fromkeys(arm.compute for arm in arms if arm.compute is not None)
    untrained = ["--any-training"] if any(arm.any_training for arm in arms) else []
    return [word for name in names for word in ("--compute", name)] + (untrained if names else [])


def _short_episodes(size: Size) -> list[str]:
    return ["--max-steps", "24"] if size.quick else []
