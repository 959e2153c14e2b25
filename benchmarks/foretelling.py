"""Which measure of held-out frames ranks samplers as their success rates do?

    python -m benchmarks.foretelling CKPT --dataset DATA --results runs/eval

Every compute policy of the evaluations is measured on frames of the same task, from episodes that training held out (all of
a data set that was not trained on). Printed by task: Spearman's rank correlation of each measure with the success rate (1 is
the right order, small values first), and the successes of the sampler that the measure puts first.

Shape letters: C compute policies, E environments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro

from vlaflow.compute.parse import parse_all
from vlaflow.compute.spelling import Checkpoint, Knobs
from vlaflow.data.lerobot import Dataset
from vlaflow.errors import ConfigError
from vlaflow.evaluation.calibrate import held_out, sample
from vlaflow.evaluation.rank import rank_correlation
from vlaflow.evaluation.results import Evaluation, read
from vlaflow.evaluation.sampler_measures import MEASURES, SamplerMeasures, measure
from vlaflow.policies.base import Policy
from vlaflow.policies.provenance import fingerprint
from vlaflow.ranges import Count
from vlaflow.simulators.base import parse_env_name, simulator_spec
from vlaflow.text import shortened


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        checkpoint: folder of a policy.
        dataset: LeRobot data set with held-out episodes of the tasks.
        results: folders of evaluations of this checkpoint.
        frames: frames per task.
        draws: chunks per frame.
    """

    checkpoint: tyro.conf.Positional[Path]
    dataset: Path
    results: tuple[Path, ...] = field(default=())
    frames: Count = 192
    draws: Count = 2


SETTINGS = ("seeds", "noise_seeds", "n_action_steps", "max_steps", "render", "solver_steps")
"""In which evaluations of an environment must agree for their successes to be ranked."""


def evaluations(folders: Sequence[Path], mark: str) -> dict[str, list[Evaluation]]:
    """The evaluations by environment, of the compute policies that every environment has.

    Raises:
        ConfigError: an evaluation of another checkpoint, evaluations of an environment with different seeds or settings, or
            fewer than three compute policies to rank.
    """
    found: dict[str, dict[str, Evaluation]] = {}
    for folder in folders:
        results = read(folder / "results.json")
        if results.fingerprint != mark:
            raise ConfigError(f"{folder} evaluates another checkpoint. Leave it out, or name the checkpoint that it evaluates.")
        for each in results.evaluations:
            for name in SETTINGS:
                was = getattr(next(iter(found.get(each.env, {}).values()), each), name)
                if was != (now := getattr(each, name)):
                    raise ConfigError(
                        f"{folder} evaluates {each.env} with {name} {shortened(str(now))}, a folder before it with "
                        f"{shortened(str(was))}, so their successes cannot be ranked. Leave one of them out."
                    )
            found.setdefault(each.env, {})[each.compute] = each
    shared = [name for name in next(iter(found.values()), {}) if all(name in of for of in found.values())]
    if len(shared) < 3:
        raise ConfigError(
            f"Ranking needs three compute policies that were evaluated in every environment, not {len(shared)}. Evaluate more: "
            "vlaflow eval CKPT --compute dense:1 --compute dense:2 ..."
        )
    return {env: [of[name] for name in shared] for env, of in found.items()}


GEOMETRIC = "geometric_mean"
"""Of ``executed_error`` and ``implausibility``, each a mean over all frames; a calibration takes it episode by episode."""


def means(found: SamplerMeasures) -> dict[str, float]:
    """Means over the frames where a measure is defined, and the geometric mean."""
    values = found.means()
    return {**values, GEOMETRIC: float(np.sqrt(values["executed_error"] * values["implausibility"]))}


@dataclass(frozen=True)
class Ranking:
    """How one measure ranks C compute policies in E environments.

    Args:
        rank_E: rank correlation with the successes, by environment.
        together: that of the sums over environments.
        first_E: successes of the compute policy with the smallest value.
    """

    rank_E: tuple[float, ...]
    together: float
    first_E: tuple[int, ...]

    @staticmethod
    def of(value_EC: np.ndarray, success_EC: np.ndarray) -> Ranking:
        """Of values where smaller is better, and numbers of successes."""
        first_E = success_EC[np.arange(len(value_EC)), value_EC.argmin(1)]
        return Ranking(
            tuple(rank_correlation(-value_C, success_C) for value_C, success_C in zip(value_EC, success_EC, strict=True)),
            rank_correlation(-value_EC.sum(0), success_EC.sum(0)),
            tuple(int(each) for each in first_E),
        )

    @property
    def mean(self) -> float:
        """Mean over the environments."""
        return float(np.mean(self.rank_E))


def main(options: Options) -> None:
    """Print the table."""
    policy, dataset = Policy.from_pretrained(options.checkpoint), Dataset.open(options.dataset)
    mark = fingerprint(options.checkpoint)
    known = evaluations(options.results, mark)
    held = held_out(options.checkpoint, dataset)
    success_EC = np.array([[each.successes for each in group] for group in known.values()])
    rows_EC = []
    for env, group in known.items():
        suite, task = parse_env_name(env)
        own = [e for e in held if dataset.episode(e).task == simulator_spec(suite).tasks[task]]
        frames = sample(policy, dataset, own, options.frames)
        computes = parse_all(
            [each.compute for each in group], Knobs(group[0].solver_steps), Checkpoint(options.checkpoint, mark)
        )
        measured, _ = measure(policy, computes, frames, n_action_steps=group[0].n_action_steps, draws=options.draws)
        rows_EC.append([means(each) for each in measured])
    shared = [name for name in (*MEASURES, GEOMETRIC) if all(name in row for row_C in rows_EC for row in row_C)]
    rankings = {name: Ranking.of(np.array([[row[name] for row in row_C] for row_C in rows_EC]), success_EC) for name in shared}
    best = int(success_EC.max(1).sum())
    print(f"| measure | {' | '.join(known)} | mean of the tasks | all tasks together | successes of its first, best {best} |")
    print("|---|" + "---|" * (len(known) + 3))
    for name, found in sorted(rankings.items(), key=lambda item: -item[1].mean):
        cells = " | ".join(f"{each:.2f}" for each in (*found.rank_E, found.mean, found.together))
        print(f"| {name} | {cells} | {' + '.join(map(str, found.first_E))} = {sum(found.first_E)} |")


if __name__ == "__main__":
    main(tyro.cli(Options))
