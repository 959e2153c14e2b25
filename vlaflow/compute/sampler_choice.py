"""Which compute policy samples a checkpoint's chunks: what was measured, how one was chosen, and the provenance of both.

It lies in the checkpoint folder as ``calibration/sampler.json``; ``auto`` reads it (``compute.auto``) and ``budget:MS`` chooses
among the same candidates. How they are measured is in ``evaluation.calibrate_sampler``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

from vlaflow.compute.calibration import FOLDER, with_folder
from vlaflow.compute.spelling import Checkpoint
from vlaflow.config import from_json, to_json
from vlaflow.errors import CalibrationError, ConfigError
from vlaflow.nn.precision import Dtype
from vlaflow.outputs import write_json
from vlaflow.ranges import NotNegative, Number, Share
from vlaflow.strict import read_json
from vlaflow.versions import device_name, processor

FILE = "sampler.json"
FAILURES = "failures"
"""Criterion of a calibration in simulation."""
TOLERANCE = 0.2
"""Log ratio below which two scores on frames count as equal: no success rate differed with so little (docs/sampling.md)."""
AGAIN = "Calibrate: vlaflow calibrate CKPT --dataset DIR --sampler"


@dataclass(frozen=True)
class Candidate:
    """One compute policy and what was measured of it.

    Args:
        compute: as on the command line.
        nfe, layer_passes: means per chunk.
        p50, p99: milliseconds per chunk.
        score: what the choice is made by, smaller is better: see ``SamplerCalibration.criterion``.
        behind: how far it is behind the best candidate: mean log ratio of the scores on frames, difference of failure rates.
        standard_error: of ``behind``; 0 for the best candidate.
        measures: everything that was measured on held-out frames, by name (``evaluation.sampler_measures``).
        episodes, successes: of a calibration in simulation.
        reason: why it was not eligible; empty for eligible candidates.
    """

    compute: str
    nfe: NotNegative
    layer_passes: NotNegative
    p50: NotNegative
    p99: NotNegative
    score: float
    behind: float = 0.0
    standard_error: NotNegative = 0.0
    measures: dict[str, float] = field(default_factory=dict)
    episodes: Number = 0
    successes: Number = 0
    reason: str = ""


@dataclass(frozen=True)
class CalibrationEpisodes:
    """Episodes that a sampler was chosen on, so that its success cannot be measured on them.

    Args:
        envs: environments; none for a choice on held-out frames.
        first_seed, seeds: their seeds are ``first_seed`` … ``first_seed + seeds - 1``.
    """

    envs: tuple[str, ...]
    first_seed: Number
    seeds: Number

    def require_unseen(self, envs: Collection[str], first_seed: int, episodes: int) -> None:
        """Refuse to report success rates on these episodes, under whatever name the sampler is run.

        Raises:
            ConfigError: naming seeds that are free.
        """
        shared = set(envs) & set(self.envs)
        if shared and first_seed < self.first_seed + self.seeds and self.first_seed < first_seed + episodes:
            raise ConfigError(
                f"This checkpoint's sampler was chosen on seeds {self.first_seed} to {self.first_seed + self.seeds - 1} of "
                f"{min(shared)}, so success cannot be measured on them. Evaluate other seeds: --seed "
                f"{self.first_seed + self.seeds}."
            )


@dataclass(frozen=True)
class SamplerCalibration:
    """All candidates, the chosen one, and what the choice was made from.

    Args:
        checkpoint: fingerprint.
        dataset: fingerprint of the data set; empty for a calibration in simulation alone.
        criterion: name of the score: a measure on held-out frames, or "failures", the share of episodes that failed.
        candidates: in the order in which they were tried.
        choice: ``compute`` of the chosen one.
        budget_ms: the 99th percentile had to stay within it; None for no limit.
        frames: held-out frames measured.
        envs: environments of a calibration in simulation.
        first_seed, seeds: its seeds are ``first_seed`` … ``first_seed + seeds - 1``.
        two_groups: share of held-out frames whose draws fall into two groups that are far apart.
        machine, device, threads: where milliseconds were measured; with one thread of the CPU (``evaluation.latency``).
        command, versions: that made it.
        dtype: what the networks computed in.
    """

    checkpoint: str
    dataset: str
    criterion: str
    candidates: tuple[Candidate, ...]
    choice: str
    budget_ms: NotNegative | None
    frames: Number
    envs: tuple[str, ...]
    first_seed: Number
    seeds: Number
    two_groups: Share
    machine: str
    device: str
    threads: Number
    command: str
    versions: dict[str, str]
    dtype: Dtype = "fp32"

    @property
    def chosen(self) -> Candidate:
        """The candidate that ``auto`` stands for."""
        return next(each for each in self.candidates if each.compute == self.choice)

    @property
    def tolerance(self) -> float:
        """Difference of ``behind`` that does not count: none for episodes."""
        return 0.0 if self.criterion == FAILURES else TOLERANCE

    def here(self, device: str, threads: int, dtype: Dtype) -> bool:
        """Whether its milliseconds hold for this machine, device, number of threads and dtype."""
        now = (processor(), device_name(device), threads, dtype)
        return (self.machine, self.device, self.threads, self.dtype) == now

    @property
    def episodes(self) -> CalibrationEpisodes:
        """What the choice was made from, if not from held-out frames alone."""
        return CalibrationEpisodes(self.envs, self.first_seed, self.seeds)

    def save(self, file: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_json(file, to_json(self), finite=True)


def choose(candidates: Sequence[Candidate], budget_ms: float | None, tolerance: float = 0.0) -> Candidate:
    """The cheapest candidate whose score is within one standard error, or the tolerance, of the best that fits.

    This is the rule by which Breiman et al. (1984, §3.4.3) prune trees: of settings that the measurement cannot tell apart, the
    cheapest one. The cheapest runs the fewest layers; measured times vary, and the same scores should give the same choice.

    Args:
        candidates: with ``behind`` and ``standard_error`` against the best eligible one.
        budget_ms: largest 99th percentile; None for no limit.
        tolerance: difference of ``behind`` that does not count.

    Raises:
        CalibrationError: when none fits, saying what the fastest takes.
    """
    limit = inf if budget_ms is None else budget_ms
    fitting = [each for each in candidates if not each.reason and each.p99 <= limit]
    if not fitting:
        able = [each for each in candidates if not each.reason]
        fastest = min(able or candidates, key=lambda each: each.p99)
        raise CalibrationError(
            f"Nothing fits {limit:g} ms here; the fastest, {fastest.compute}, takes {fastest.p99:.1f} ms at p99. Allow more."
        )
    best = min(fitting, key=lambda each: (each.score, each.layer_passes))
    near = [each for each in fitting if each.behind - best.behind <= max(each.standard_error, tolerance)]
    return min([*near, best], key=lambda each: (each.layer_passes, each.score))


def load(checkpoint: Checkpoint) -> SamplerCalibration | None:
    """The calibration in the checkpoint folder; None where there is none.

    Raises:
        CalibrationError: for a damaged file, or one that was made for other weights.
        ConfigError: for a wrong key or value in it.
    """
    file = checkpoint.folder / FOLDER / FILE
    if not file.exists():
        return None
    again = with_folder(AGAIN, checkpoint.folder)
    found = from_json(SamplerCalibration, read_json(file, CalibrationError, f"it is damaged. {again}"), str(file))
    if found.checkpoint != checkpoint.fingerprint:
        raise CalibrationError(
            f"{file} was made for checkpoint {found.checkpoint}, and this one is {checkpoint.fingerprint}. {again}"
        )
    if found.choice not in {each.compute for each in found.candidates}:
        raise CalibrationError(f"{file} chooses {found.choice}, which is no candidate in it. {again}")
    return found
