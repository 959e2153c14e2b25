"""The row of a claim: what was measured, with intervals and seeds, and the verdict. Written and read strictly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from vlaflow.claims.base import Claim, TrialArm
from vlaflow.claims.plan import Places, Size
from vlaflow.claims.verdict import ArmRow, Finding, Measured, Verdict, arm_row, findings, overall
from vlaflow.compute.parse import parse
from vlaflow.compute.spelling import DEFAULTS, Checkpoint
from vlaflow.evaluation import results, vqa
from vlaflow.evaluation.prepared import RESULTS
from vlaflow.evaluation.results import Evaluation, Results, read_as
from vlaflow.evaluation.vqa import AnswerResults
from vlaflow.outputs import write_json
from vlaflow.policies.provenance import fingerprint
from vlaflow.versions import command_line

FORMAT = "vlaflow claim 2"


@dataclass(frozen=True)
class Row:
    """The content of ``CLAIM.json``.

    Args:
        claim: name of the claim.
        verdict: "held", "refuted" or "not seen".
        arms: in the order of the claim.
        findings: its effects.
        envs: the tasks.
        size: see ``Size``.
        benchmark: its name.
        hours: time spent on all commands of this row, including trainings that other rows share.
        command, commands: the command that wrote this file, and those that it ran.
        machine, versions: where and with what the arms were measured; several where they were measured on several.
        format: of this file.
    """

    claim: str
    verdict: Verdict
    arms: tuple[ArmRow, ...]
    findings: tuple[Finding, ...]
    envs: tuple[str, ...]
    size: Size
    benchmark: str
    hours: float
    command: str
    commands: tuple[str, ...]
    machine: str
    versions: dict[str, str]
    format: str = field(default=FORMAT)


def conclude(claim: Claim, places: Places, *, hours: float, commands: tuple[str, ...]) -> Row:
    """Read the results of all arms and judge the claim.

    Raises:
        DataError: results are missing, damaged or cannot be paired.
    """
    size, files = places.size, _files(claim, places)
    measured = {name: _measured(claim, arm, places) for name, arm in claim.arms.items()}
    found = findings(claim, measured)
    return Row(
        claim=claim.name,
        verdict=overall(found),
        arms=tuple(arm_row(name, one) for name, one in measured.items()),
        findings=found,
        envs=places.envs,
        size=size,
        benchmark=places.benchmark.name,
        hours=hours,
        command=command_line(),
        commands=commands,
        machine=_each(file.machine for file in files),
        versions={name: _each(file.versions[name] for file in files if name in file.versions) for name in _names(files)},
    )


def write(row: Row, file: Path) -> None:
    """Write the file, whole or not at all."""
    write_json(file, asdict(row), indent=1, finite=True)


def read(claim: Claim, places: Places) -> Row:
    """Read a claim's row strictly.

    Raises:
        DataError, ConfigError: see ``results.read_as``.
    """
    return read_as(Row, places.row(claim), FORMAT, places.command(claim))


def _files(claim: Claim, places: Places) -> list[Results | AnswerResults]:
    """The results of all trainings."""
    found: list[Results | AnswerResults] = []
    for training, answers in dict.fromkeys((arm.training, arm.compute is None) for arm in claim.arms.values()):
        for seed in places.size.seeds:
            folder = places.results(claim, training, seed)
            found.append(vqa.read(folder / vqa.FILE) if answers else results.read(folder / RESULTS))
    return found


def _names(files: Sequence[Results | AnswerResults]) -> list[str]:
    """Of all packages that any of them names."""
    return list(dict.fromkeys(name for file in files for name in file.versions))


def _each(values: Iterable[str]) -> str:
    """All different values, in words."""
    return " and ".join(dict.fromkeys(values))


def _measured(claim: Claim, arm: TrialArm, places: Places) -> Measured:
    seeds = places.size.seeds
    if arm.compute is None:
        return Measured({key: value for seed in seeds for key, value in _answers(claim, arm, places, seed).items()})
    by_seed = {seed: _evaluations(claim, arm, places, seed) for seed in seeds}
    episodes = [entry for entries in by_seed.values() for entry in entries]
    times = [entry.latency_ms.p50 for entry in episodes if entry.latency_ms]
    return Measured(
        {key: value for seed, entries in by_seed.items() for key, value in _successes(seed, entries).items()},
        float(np.mean(times)) if times else None,
        float(np.mean([entry.layer_passes_per_chunk for entry in episodes])),
    )


def _evaluations(claim: Claim, arm: TrialArm, places: Places, seed: int) -> list[Evaluation]:
    """The arm's entry of every task."""
    folder = places.policy(arm.training, seed)
    assert arm.compute is not None
    name = parse(arm.compute, DEFAULTS, Checkpoint(folder, fingerprint(folder))).name
    found = results.read(places.results(claim, arm.training, seed) / RESULTS)
    return [found.of(env, name) for env in found.envs]


def _successes(seed: int, entries: list[Evaluation]) -> dict[tuple[int, str], tuple[bool, ...]]:
    found: dict[tuple[int, str], tuple[bool, ...]] = {}
    for entry in entries:
        for episode in entry.per_episode:
            key = (seed, f"{episode.env} {episode.seed}")
            found[key] = (*found.get(key, ()), episode.success)
    return found


def _answers(claim: Claim, arm: TrialArm, places: Places, seed: int) -> dict[tuple[int, str], tuple[bool, ...]]:
    answered = vqa.read(places.results(claim, arm.training, seed) / vqa.FILE).per_question
    found: dict[tuple[int, str], tuple[bool, ...]] = {}
    for number, one in enumerate(answered):
        key = (seed, one.group or f"{number} {one.name}")
        found[key] = (*found.get(key, ()), one.right)
    return found
