"""A whole evaluation: paired episodes, language swap, latency, videos, and the files that hold them; or a shard of one.

``vlaflow eval``, the demo and ``evaluate`` all call ``run``; the parts are documented in their own modules.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from vlaflow.compute.spelling import Knobs
from vlaflow.config import from_json, to_json
from vlaflow.engine.deploy import Engine
from vlaflow.errors import CheckpointError
from vlaflow.evaluation.config import EvaluationConfig
from vlaflow.evaluation.episode_log import EpisodeLog
from vlaflow.evaluation.prepared import prepare, require_place
from vlaflow.evaluation.results import Results
from vlaflow.evaluation.rollout import EpisodeResult, RolloutConfig
from vlaflow.evaluation.shards import Shard, read_shards, require_same
from vlaflow.nn.precision import Dtype
from vlaflow.outputs import storing
from vlaflow.policies.seeds import FIRST_SEED
from vlaflow.simulators.base import Render
from vlaflow.versions import command_line

Report = Callable[[Path], object]
"""Writes a page about the results in a folder."""


def evaluate(
    checkpoint: Path | str,
    env: str | Sequence[str],
    out: Path | str,
    *,
    compute: str | Sequence[str] = (),
    episodes: int = 20,
    first_seed: int = FIRST_SEED,
    noise_seeds: int = 1,
    solver_steps: int = 10,
    n_action_steps: int | None = None,
    max_steps: int | None = None,
    render: Render = "fast",
    device: str = "cpu",
    dtype: Dtype = "fp32",
    engine: Engine = "eager",
    batch: int = 4,
    videos: bool = True,
    workers: int = 0,
    fresh: bool = False,
) -> Results:
    """Evaluate a checkpoint in simulation; writes ``results.json`` and ``videos/`` into ``out``.

    Every compute policy plays the same seeds, so that they can be compared in pairs. An evaluation that was interrupted
    continues when it is called again with the same arguments.

    >>> results = vlaflow.evaluate("runs/demo/rated", "metaworld/drawer-open-v3", "runs/eval", compute=("dense", "refine"))
    >>> results.of("metaworld/drawer-open-v3", "refine").successes
    20

    Args:
        checkpoint: folder or Hub repository.
        env: environments or groups of them: "metaworld/drawer-open-v3", "metaworld/easy".
        out: folder of the results.
        compute: names of compute policies as ``vlaflow eval --compute`` takes them: "dense:2", "exit:NAME", "budget:20"; by
            default "auto" if the checkpoint's sampler was calibrated, else "dense".
        episodes: environment seeds per environment and compute policy.
        first_seed: the first environment seed; the others follow.
        noise_seeds: episodes per environment seed, with other noise of the policy each; intervals and tests account for it.
        solver_steps: of the decoder, for compute policies whose name states no number.
        n_action_steps: actions executed per chunk; None takes the checkpoint's own.
        max_steps: steps after which an episode is cut off; None takes the suite's.
        render: image quality; use the one the policy was trained with.
        device: where the networks run.
        dtype: what they compute in; "bf16" halves the memory of their layers.
        engine: what computes them; see ``policies.engines.with_engine``.
        batch: episodes that a process plays together, with one batched call of the policy.
        videos: whether to record a success and a failure per environment.
        workers: processes; 0 plays every episode in this one. Scripts that ask for more need the usual
            ``if __name__ == "__main__":``. The results are the same with any number.
        fresh: discard an unfinished evaluation in ``out`` instead of continuing it.

    Returns:
        What ``results.json`` holds. ``vlaflow.reports.evaluation.write_report(out)`` makes a page of it.

    Raises:
        VlaflowError: see ``run``, which takes an ``EvaluationConfig`` with the remaining settings.
    """
    config = EvaluationConfig(
        envs=(env,) if isinstance(env, str) else tuple(env),
        computes=(compute,) if isinstance(compute, str) else tuple(compute),
        episodes=episodes,
        first_seed=first_seed,
        noise_seeds=noise_seeds,
        knobs=Knobs(solver_steps, device=device, dtype=dtype),
        rollout=RolloutConfig(n_action_steps, max_steps, render, device, batch, dtype, engine),
        videos=videos,
        workers=workers,
    )
    return run(checkpoint, config, Path(out), fresh=fresh)


def run(
    checkpoint: Path | str,
    config: EvaluationConfig,
    out: Path,
    *,
    fresh: bool = False,
    report: Report | None = None,
) -> Results:
    """Measure, and write ``results.json`` and ``videos/`` into ``out``.

    Every finished episode is kept in ``episodes.jsonl`` until the results are written. An evaluation that was interrupted
    continues from there and comes to the same results, measured times aside.

    Args:
        checkpoint: folder or Hub repository.
        config: what to measure.
        out: folder.
        fresh: discard an unfinished evaluation in ``out`` instead of continuing it.
        report: called with ``out`` when the results are written, e.g. ``vlaflow.reports.evaluation.write_report``; if it fails,
            the finished episodes are kept.

    Raises:
        VlaflowError: before the first episode, when the parts do not fit together, ``out`` cannot be written, or it holds an
            unfinished evaluation with other settings.
        DataError: the disk is full; finished episodes are kept.
    """
    work = prepare(checkpoint, config)
    require_place(out, work.config)
    with EpisodeLog(out, EpisodeResult, work.settings, fresh=fresh) as log:
        played = work.play(log, work.blocks)
        with storing(out, "The results", log.kept):
            found = work.conclude(out, played, minutes=lambda: log.spent / 60)
            if report is not None:
                report(out)
        log.remove()
    return found


def play_shard(checkpoint: Path | str, config: EvaluationConfig, out: Path, shard: Shard, *, fresh: bool = False) -> int:
    """Play one shard's episodes, and keep them in ``out``; ``merge`` makes the results of all shards.

    Returns:
        How many episodes the shard consists of.

    Raises:
        VlaflowError: as ``run``.
    """
    work = prepare(checkpoint, config)
    about = {"checkpoint": work.checkpoint, "config": to_json(work.config), "command": command_line()}
    with EpisodeLog(out, EpisodeResult, work.settings, about=about, name=shard.file, fresh=fresh) as log:
        return len(work.play(log, shard.of_blocks(work.blocks)))


def merge(
    folder: Path,
    *,
    checkpoint: Path | str | None = None,
    workers: int | None = None,
    device: str | None = None,
    report: Report | None = None,
) -> Results:
    """Put all shards together: measure latency, record videos, and write what ``run`` would have written.

    Args:
        folder: holds the shards' logs; they are removed when the results are written.
        checkpoint: its path on this machine; by default the first shard's.
        workers: processes for the videos; by default as many as the first shard had.
        device: where the networks run; by default as for the first shard.
        report: see ``run``.

    Raises:
        VlaflowError: shards that are missing, unfinished, still running or of another evaluation, checkpoint or version.
    """
    shards = read_shards(folder)
    config = from_json(EvaluationConfig, shards.about["config"], str(shards.files[0]))
    config = replace(config, workers=config.workers if workers is None else workers)
    if device is not None:
        config = config.on(device)
    where = shards.about["checkpoint"] if checkpoint is None else checkpoint
    try:
        work = prepare(where, config)
    except CheckpointError as error:
        if checkpoint is not None:
            raise
        raise CheckpointError(
            f"The shards in {folder} were played with {where}, which cannot be opened here. If it lies elsewhere: "
            f"vlaflow merge {folder} --checkpoint DIR ({error})"
        ) from error
    settings = json.loads(json.dumps(work.settings))
    require_same(shards.settings, settings, str(shards.files[0]), "this machine would play it")
    played = shards.episodes(work.blocks)
    require_place(folder, config)
    began = time.monotonic()
    with storing(folder, "The results", "the shards' logs are untouched. Make room, and merge them again"):
        found = work.conclude(
            folder,
            played,
            minutes=lambda: (shards.seconds + time.monotonic() - began) / 60,
            machines=shards.machines,
            commands=shards.commands,
        )
        if report is not None:
            report(folder)
    for file in shards.files:
        file.unlink()
    return found
