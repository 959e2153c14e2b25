"""A calibration: the measured thresholds of an early exit, what they were measured on, and what they do on other samples.

It lies in the checkpoint folder as ``calibration/NAME.json`` and is refused for anything but what it was made for. How it is
measured is in ``evaluation.calibrate``; the mathematics in ``thresholds``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from vlaflow.compute.distance import Metric
from vlaflow.compute.early_exit import EarlyExit, ExitPlan
from vlaflow.compute.spelling import Checkpoint, ComputeKind, Spelling
from vlaflow.compute.thresholds import Distribution
from vlaflow.config import from_json, to_json
from vlaflow.errors import CalibrationError, ConfigError, VlaflowError, nearest
from vlaflow.nn.precision import Dtype
from vlaflow.outputs import write_json
from vlaflow.ranges import AnyNumber, Count, NotNegative, Positive, Share
from vlaflow.strict import read_json
from vlaflow.text import as_typed

FOLDER = "calibration"
COMMAND = "vlaflow calibrate CKPT --dataset DIR"
AGAIN = f"Calibrate again: {COMMAND}"
Made = TypeVar("Made")
Calibrated = TypeVar("Calibrated", bound="Provenance")


def with_folder(cure: str, folder: Path) -> str:
    """A cure with the folder of the checkpoint in place of ``CKPT``, as it is typed in a shell."""
    return cure.replace(" CKPT", f" {as_typed(folder)}")  # as a word: a folder above may have this name


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """The cures of errors in the block name the folder of the checkpoint."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(with_folder(str(error), folder)) from error


def with_folder_of(cure: str, file: Path) -> str:
    """A cure with the folder of the checkpoint that a calibration lies in."""
    return with_folder(cure, next((each.parent for each in file.parents if each.name == FOLDER), file.parent))


class Provenance(Protocol):
    """What every calibration says of its origin."""

    @property
    def checkpoint(self) -> str:
        """Fingerprint of the checkpoint."""

    @property
    def dataset(self) -> str:
        """Fingerprint of the data set."""

    @property
    def dtype(self) -> Dtype:
        """What the networks computed in."""


def require_made_for(
    made: Provenance,
    where: str,
    again: str,
    *,
    checkpoint: str | None = None,
    dataset: str | None = None,
    dtype: Dtype | None = None,
) -> None:
    """Refuse a calibration that was made for anything else; what is None is not compared.

    Args:
        made: the calibration.
        where: its file, for the error.
        again: the cure, which ends with a command.
        checkpoint, dataset, dtype: what it is to be used with.

    Raises:
        CalibrationError: saying what differs and what to do.
    """
    if checkpoint not in (None, made.checkpoint):
        raise CalibrationError(f"{where} was made for checkpoint {made.checkpoint}, and this one is {checkpoint}. {again}")
    if dataset not in (None, made.dataset):
        raise CalibrationError(f"{where} was made on data set {made.dataset}, and this one is {dataset}. {again}")
    if dtype not in (None, made.dtype):
        raise CalibrationError(f"{where} was made in {made.dtype}, and this is {dtype}. {again} --dtype {dtype}")


OTHERWISE = "Give the new one a --name of its own, or remove that file."


def replaced(
    file: Path, load: Callable[[Path], Calibrated], *, checkpoint: str, dataset: str, dtype: Dtype
) -> Calibrated | None:
    """The calibration that a new one would replace, if it is still of use: of the same weights, and readable.

    Args:
        file: to be written.
        load: reads what is there.
        checkpoint, dataset, dtype: what the new one is made for.

    Raises:
        CalibrationError: it is of another data set.
    """
    try:
        before = load(file) if file.exists() else None
    except VlaflowError:
        return None
    if before is None:
        return None
    require_made_for(before, f"{file}, which this would replace,", OTHERWISE, dataset=dataset)
    return before if (before.checkpoint, before.dtype) == (checkpoint, dtype) else None


def require_same(file: Path, was: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Refuse to replace a calibration by one with other settings, so that no name means something else from then on.

    Raises:
        CalibrationError: naming the first setting that differs.
    """
    for name, value in now.items():
        if was.get(name) != value:
            raise CalibrationError(
                f"{file} was made with {name} {was.get(name)}, and this would replace it by one with {value}. {OTHERWISE}"
            )


def load_calibration(kind: type[Made], file: Path, command: str) -> Made:
    """Read a calibration of this kind strictly; ``command`` makes one.

    Raises:
        CalibrationError: there is none, with the nearest name, or it is no JSON.
        ConfigError: for a wrong key or value in it.
    """
    if not file.exists():
        others = sorted(each.stem for each in file.parent.glob("*.json"))
        hint = nearest(file.stem, others) if others else f"there are none yet: {with_folder_of(command, file)}"
        raise CalibrationError(f"There is no calibration {file}; {hint}")
    return from_json(kind, read_json(file, CalibrationError, "calibrate again."), str(file))


@dataclass(frozen=True)
class ShareTarget:
    """Thresholds by target shares of the exits.

    Args:
        distribution, budget, first_exit: see ``thresholds.exit_shares``.
        shares: the target, one per exit.
    """

    distribution: Distribution
    budget: float
    first_exit: bool
    shares: tuple[Share, ...]

    def share_above(self, deviation_N: np.ndarray) -> float | None:
        """None: no deviation is bounded."""
        return None


@dataclass(frozen=True)
class RiskTarget:
    """Thresholds by a bound on the risk; see ``thresholds.risk_controlled``.

    Args:
        max_deviation: ε, in the units of ``metric`` on normalised actions.
        risk: largest probability of more.
        error: probability that the guarantee fails.
        metric: how the deviation from the full depth is measured.
    """

    max_deviation: NotNegative
    risk: Share
    error: Share
    metric: Metric

    @property
    def shares(self) -> tuple[float, ...]:
        """Empty: the exits are taken as often as the risk allows."""
        return ()

    def share_above(self, deviation_N: np.ndarray) -> float | None:
        """Share of the chunks that deviate by more than ε, given all their deviations."""
        return float((deviation_N > self.max_deviation).mean())


@dataclass(frozen=True)
class ExitEffect:
    """What the thresholds did on samples that they were not made from.

    Args:
        samples: how many.
        shares: of the exits.
        layers, layer_passes, nfe: means per chunk.
        deviation: mean of the largest absolute difference to the full depth's chunk, in standard deviations of the actions.
        error, full_error: mean absolute distance to the demonstrated actions, of the chunk taken and of the full depth's.
        above: share of chunks above the risk target's ε; None for share targets.
    """

    samples: Count
    shares: tuple[Share, ...]
    layers: NotNegative
    layer_passes: NotNegative
    nfe: NotNegative
    deviation: NotNegative
    error: Positive
    full_error: Positive
    above: Share | None = None


@dataclass(frozen=True)
class Calibration:
    """Thresholds and their provenance.

    Args:
        checkpoint: fingerprint of the checkpoint.
        dataset: fingerprint of the data set.
        plan: exits, metric, sampling and warm start that were measured.
        thresholds: of every exit but the last, which is always taken; None is never.
        target: how they were chosen.
        samples: how many they were chosen from.
        effect: what they do on other samples.
        command: that made it.
        versions: of the software.
        dtype: what the networks computed in.
    """

    checkpoint: str
    dataset: str
    plan: ExitPlan
    thresholds: tuple[AnyNumber | None, ...]
    target: ShareTarget | RiskTarget
    samples: Count
    effect: ExitEffect
    command: str
    versions: dict[str, str]
    dtype: Dtype = "fp32"

    def require(
        self,
        where: str,
        *,
        checkpoint: str | None = None,
        dataset: str | None = None,
        plan: ExitPlan | None = None,
        dtype: Dtype | None = None,
    ) -> None:
        """Refuse to serve anything else; what is None is not compared.

        Raises:
            CalibrationError: saying what differs and what to do.
        """
        again = with_folder_of(AGAIN, Path(where))
        require_made_for(self, where, again, checkpoint=checkpoint, dataset=dataset, dtype=dtype)
        if plan is not None and plan != self.plan:
            names = ("depths", "metric", "sampling", "warm_start", "restart")
            name = next(n for n in names if getattr(plan, n) != getattr(self.plan, n))
            mine, wanted = getattr(self.plan, name), getattr(plan, name)
            raise CalibrationError(f"{where} was made with {name} {mine}, not {wanted}. {again}")

    def early_exit(self, label: str) -> EarlyExit:
        """The compute policy."""
        return EarlyExit(self.plan, (*(-inf if t is None else t for t in self.thresholds), inf), label)

    def save(self, file: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_json(file, to_json(self))

    @staticmethod
    def load(file: Path) -> Calibration:
        """Read strictly.

        Raises:
            CalibrationError: when there is no such calibration, with the nearest name, it is no JSON, or a threshold is no
                number.
            ConfigError: for a wrong key or value in it.
        """
        found = load_calibration(Calibration, file, COMMAND)
        if not all(t is None or isfinite(t) for t in found.thresholds):
            raise CalibrationError(f"{file} holds a threshold that is not finite ({list(found.thresholds)}); calibrate again.")
        return found


def load_exit(checkpoint: Checkpoint, name: str, dtype: Dtype = "fp32") -> EarlyExit:
    """The early exit ``CKPT/calibration/NAME.json``, refused when it was made for other weights or in another dtype."""
    file = checkpoint.folder / FOLDER / f"{name}.json"
    found = Calibration.load(file)
    found.require(str(file), checkpoint=checkpoint.fingerprint, dtype=dtype)
    return found.early_exit(f"exit:{name}")


def _parse(typed: Spelling) -> EarlyExit:
    typed.require(more=True, usage="an early exit is typed as exit:NAME.")
    checkpoint = typed.measured()
    if not typed.more:
        raise ConfigError("'exit' needs the name of a calibration, as in exit:NAME.")
    return load_exit(checkpoint, typed.more, typed.knobs.dtype)


EXIT = ComputeKind(_parse)
