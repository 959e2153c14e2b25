"""The commands that test a claim, in order: record, train and calibrate, evaluate.

Everything but the evaluations is shared: claims of one folder use the same data sets and the same trainings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlaflow.claims.base import Claim, Training, TrialArm
from vlaflow.errors import ConfigError

CALIBRATION_FRAMES = 768


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


@dataclass(frozen=True)
class Places:
    """The folders and files of a test."""

    out: Path

    @property
    def dataset(self) -> Path:
        """Demonstrations."""
        return self.out / "dataset"

    @property
    def vqa(self) -> Path:
        """Questions about images of the same tasks."""
        return self.out / "vqa"

    def policy(self, training: str, seed: int) -> Path:
        """A checkpoint."""
        return self.out / "policies" / f"{training}-{seed}"

    def results(self, claim: Claim, training: str, seed: int) -> Path:
        """Results of the episodes, or answers, of a checkpoint."""
        return self.out / "results" / claim.name / f"{training}-{seed}"

    def row(self, claim: Claim) -> Path:
        """The claim's row."""
        return self.out / f"{claim.name}.json"

    def page(self, claim: Claim) -> Path:
        """The claim's page."""
        return self.out / f"{claim.name}.html"


def envs(claim: Claim, size: Size) -> tuple[str, ...]:
    """The tasks."""
    return claim.envs[:1] if size.quick else claim.envs


def commands(claim: Claim, places: Places, size: Size, workers: int) -> Iterator[list[str]]:
    """The arguments of ``vlaflow`` for every step, in order."""
    tasks = [word for env in envs(claim, size) for word in ("--env", env)]
    demonstrations = 4 if size.quick else size.demonstrations
    episodes, noise = (2, 1) if size.quick else (size.episodes, size.noise_seeds)
    of_workers = ["--workers", str(workers)]
    yield ["record", *tasks, "--episodes", str(demonstrations), "--out", str(places.dataset), *of_workers]
    if claim.asks:
        number = ["--episodes", "4" if size.quick else "150"]
        yield ["record-vqa", *tasks, *number, "--out", str(places.vqa), *of_workers]
    for seed in size.seeds:
        for name in claim.order():
            yield from _training(claim.trainings[name], name, places, seed, size)
    for seed in size.seeds:
        for name in claim.order():
            arms = [arm for arm in claim.arms.values() if arm.training == name]
            checkpoint, out = str(places.policy(name, seed)), ["--out", str(places.results(claim, name, seed))]
            if any(arm.compute is None for arm in arms):
                yield ["eval-vqa", checkpoint, "--vqa", str(places.vqa), *out]
            if computes := _computes(arms):
                counts = ["--episodes", str(episodes), "--noise-seeds", str(noise)]
                yield ["eval", checkpoint, *tasks, *computes, *counts, *_short_episodes(size), *out, *of_workers]


def _training(training: Training, name: str, places: Places, seed: int, size: Size) -> Iterator[list[str]]:
    out = places.policy(name, seed)
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
        named = ["--name", calibration, *options, "--frames", str(frames), "--no-ladder"]
        yield ["calibrate", str(out), "--dataset", str(places.dataset), *named]


def _computes(arms: Sequence[TrialArm]) -> list[str]:
    names = dict.fromkeys(arm.compute for arm in arms if arm.compute is not None)
    untrained = ["--any-training"] if any(arm.any_training for arm in arms) else []
    return [word for name in names for word in ("--compute", name)] + (untrained if names else [])


def _short_episodes(size: Size) -> list[str]:
    return ["--max-steps", "24"] if size.quick else []
