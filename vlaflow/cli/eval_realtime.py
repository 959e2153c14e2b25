"""``vlaflow eval-realtime --server ws://...``: episodes in real time, with simulated inference delays."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vlaflow.cli.arguments import parse_arguments
from vlaflow.packages import PAGES, require
from vlaflow.ranges import Count, NotNegative, Number, Seed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.table import Table

    from vlaflow.evaluation.realtime_results import RealtimeResults

Mode = Literal["wait", "switch", "ensemble", "commit"]
POLICY = ("checkpoint", "fingerprint", "dtype", "compute", "compute_settings", "guided", "n_action_steps")
"""Keys of a server's metadata that describe its policy."""


@dataclass(frozen=True)
class EvalRealtime:
    """Compare hand-overs between chunks with simulated inference delays; write results.json and report.html.

    Example: vlaflow eval-realtime --server ws://127.0.0.1:8000 --env metaworld/drawer-open-v3 --delay-ms 0 --delay-ms 200

    Start the server first: vlaflow serve CKPT. All modes use the same seeds, noise and delays.

    Args:
        env: suite/task, or a group; repeat the option for more.
        server: address of a vlaflow server.
        mode: wait (synchronous), switch (naive asynchronous), ensemble (temporal ensembling), commit (real-time chunking);
            repeat the option for more. All four when none is named.
        delay_ms: delay of a reply; repeat for more. 0 and 200 when none is named.
        jitter_ms: largest random addition to a delay.
        n_action_steps: actions executed before the next chunk is requested; the checkpoint's default if omitted.
        fade: actions over which a new chunk is faded in (switch and commit).
        episodes: number of environment seeds per environment, mode and delay.
        noise_seeds: episodes per environment seed, with other noise of the policy each; the intervals account for it.
        max_steps: limit of control steps per episode; the suite's by default.
        render: image quality; use the one the policy was trained with.
        seed: seed of the first episode; the others follow.
        workers: number of processes, each with its own connection.
        token: token of the server; by default the environment variable VLAFLOW_TOKEN.
        out: folder for results.json and report.html.
        fresh: discard an unfinished comparison in ``out``; without it, the same command continues one.
    """

    env: tuple[str, ...]
    server: str = "ws://127.0.0.1:8000"
    mode: tuple[Mode, ...] = ()
    delay_ms: tuple[NotNegative, ...] = ()
    jitter_ms: NotNegative = 0.0
    n_action_steps: Count | None = None
    fade: Number = 0
    episodes: Count = 20
    noise_seeds: Count = 1
    max_steps: Count | None = None
    render: Literal["fast", "exact"] = "fast"
    seed: Seed = 1000
    workers: Number = 1
    token: str | None = None
    out: Path = Path("runs/realtime-eval")
    fresh: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def main(argv: list[str]) -> int:
    """Run ``vlaflow eval-realtime ...``; returns the exit status."""
    a = parse_arguments(EvalRealtime, "vlaflow eval-realtime", argv, config=(tyro.conf.UseAppendAction,))
    require("websockets", "msgpack", *PAGES)

    from rich.console import Console

    from vlaflow.config import to_json
    from vlaflow.evaluation import realtime
    from vlaflow.evaluation.episode_log import EpisodeLog
    from vlaflow.evaluation.realtime_results import results
    from vlaflow.outputs import require_writable, storing
    from vlaflow.reports.realtime import write_page
    from vlaflow.robot.client import Client
    from vlaflow.simulators.base import expand_env_names
    from vlaflow.versions import versions

    envs = expand_env_names(a.env)
    modes = tuple(dict.fromkeys(a.mode)) or ("wait", "switch", "ensemble", "commit")
    delays = tuple(dict.fromkeys(a.delay_ms)) or (0.0, 200.0)
    config = realtime.RealtimeEvaluationConfig(a.n_action_steps, a.max_steps, a.jitter_ms, a.fade, a.render)
    jobs = realtime.plan(envs, modes, delays, a.episodes, a.seed, noise_seeds=a.noise_seeds)
    require_writable(a.out / "results.json", a.out / "report.html")
    token = a.token if a.token is not None else os.environ.get("VLAFLOW_TOKEN")
    with Client(a.server, token) as client:
        metadata = client.metadata
    settings = {
        "policy": {name: metadata.get(name) for name in POLICY},
        "envs": envs,
        "modes": modes,
        "delays_ms": delays,
        "episodes": a.episodes,
        "noise_seeds": a.noise_seeds,
        "first_seed": a.seed,
        "config": to_json(config),
        "versions": versions(),
    }
    with EpisodeLog(a.out, realtime.RealtimeEpisode, settings, fresh=a.fresh) as log:

        def play(left: Sequence[realtime.RealtimeJob], finished: Callable[[int, realtime.RealtimeEpisode], None]) -> None:
            realtime.evaluate(a.server, left, config, token=token, workers=a.workers, finished=finished)

        episodes = log.complete(jobs, play, "Evaluating")
        found = results(a.server, metadata, config, episodes)
        with storing(a.out, "The results", log.kept):
            found.write(a.out / "results.json")
            page = write_page(found, a.out / "report.html")
        log.remove()
    console = Console()
    console.print(table(found))
    console.print(f"Written: {a.out / 'results.json'} and {page}", soft_wrap=True)
    return 0


def table(found: RealtimeResults) -> Table:
    """Table of successes and jerk."""
    from rich import box
    from rich.table import Table

    grid = Table(
        "delay ms",
        "hand-over",
        "success",
        "95 % interval",
        "steps",
        "jerk",
        "idle",
        "late",
        box=box.SIMPLE,
        padding=0,
        title=f"{len(found.seeds) * len(found.noise_seeds)} episodes per environment, a new chunk requested after "
        f"{found.n_action_steps} actions, {found.rate_hz:g} Hz",
        title_style="",
        title_justify="left",
    )
    for cell in found.cells:
        low, high = cell.interval
        grid.add_row(
            f"{cell.delay_ms:g}",
            cell.mode,
            f"{cell.successes}/{cell.episodes}",
            f"{100 * low:.0f} to {100 * high:.0f} %",
            f"{cell.steps:g}" if cell.steps else "none",
            f"{cell.boundary_jerk[0]:.4f}" if cell.boundary_jerk else "none",
            f"{100 * cell.idle_share:.0f} %",
            f"{100 * cell.late_share:.0f} %",
            end_section=cell.mode == found.cells[-1].mode,
        )
    return grid
