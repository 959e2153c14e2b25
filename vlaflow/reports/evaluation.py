"""``report.html``: one page that holds everything, images and videos included, and asks no server for anything.

The page is filled from ``results.json`` and ``videos/`` and can be made again from them. Its layout is in
``templates/``, its plots in ``plots``; here is what it says in words.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from vlaflow.evaluation.language import KINDS
from vlaflow.evaluation.latency import PARTS
from vlaflow.evaluation.results import EARLY, Evaluation, Minutes, PairedTest, Results, read
from vlaflow.evaluation.run import RESULTS, VIDEOS
from vlaflow.evaluation.videos import EpisodeVideo, read_videos
from vlaflow.reports import plots, revision_plots

Log = Sequence[Mapping[str, Any]]


def write_report(out: Path, logs: Mapping[str, Log] | None = None, title: str | None = None) -> Path:
    """Make ``report.html`` from what an evaluation left in ``out``.

    Args:
        out: folder with ``results.json`` and, where videos were made, ``videos/``.
        logs: entries of training logs (step, loss, validation) by the name of the loss.
        title: of the page.

    Returns:
        the page's path.
    """
    page = render(read(out / RESULTS), out / VIDEOS, logs or {}, title)
    file, part = out / "report.html", out / f".report.html.{os.getpid()}"
    part.write_text(page)
    part.replace(file)
    return file


def render(results: Results, folder: Path, logs: Mapping[str, Log], title: str | None = None) -> str:
    """The page as text."""
    import jinja2

    videos = read_videos(folder)
    home = resources.files("vlaflow.reports").joinpath("templates")
    machine = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    machine.filters.update(percent=percent, short=plots.short, known=_known, chunks=_chunks_per_episode, points=signed)
    used = [part for part in (*PARTS, "other") if any(part in entry.parts for entry in results.latency)]
    revising = [e for e in results.evaluations if e.revised_per_chunk and sum(e.revised_per_chunk)]
    drawn = {
        "success": plots.success(results),
        "first_success": plots.first_success(results),
        "latency": plots.latency(results.latency),
        "losses": [(name, plots.loss(log, name)) for name, log in logs.items() if log],
        "revision": [revision_plots.tokens(results.revision), revision_plots.actions(results.revision)]
        if results.revision
        else [],
        "revised": revision_plots.revised(revising) if revising else "",
        "minutes": plots.minutes(results.minutes) if _steps(results.minutes) > 1 else "",
    }
    sections = ["Success", "Steps", "Latency"] + (["Tokens"] if results.revision or revising else [])
    sections += [name for name, there in (("Training", drawn["losses"]), ("Chunks", videos), ("Videos", videos)) if there]
    sections += (["Language"] if results.language else []) + ["Reproduce", "Caveats"]
    envs = len(results.envs)
    return machine.from_string(home.joinpath("evaluation.html").read_text()).render(
        title=title or f"{results.checkpoint} in {envs} environment{'s' if envs > 1 else ''}",
        css=_safe(home.joinpath("report.css").read_text()),
        headline=headline(results),
        tiles=_tiles(results),
        sections=sections,
        r=results,
        plots=_safe(drawn),
        parts=used,
        part_names=plots.PART_NAMES,
        early=results.evaluations[0].max_steps > EARLY,
        costs=costs(results),
        videos=[_video(video, folder) for video in videos],
        moments=[
            m for video in videos if video.episode.success or not _any_success(videos, video) for m in _moments(video, folder)
        ],
        kinds=KINDS,
        language={(entry.env, entry.told): entry for entry in results.language},
        commands=results.commands or (results.command,),
        minutes=_minutes(results.minutes),
        caveats=caveats(results),
    )


def headline(results: Results) -> list[str]:
    """What was found, in sentences that carry their uncertainty."""
    first, *others = results.overall
    n_envs = len(results.envs)
    where = plots.short(results.envs[0]) if n_envs == 1 else f"{n_envs} environments"
    found = [
        f"On {where} the {first.compute} policy succeeds in {first.successes} of {first.episodes} episodes "
        f"({_rate(first.successes, first.episodes)}; 95 % interval {percent(first.interval)})."
    ]
    for other in others:
        test = next(t for t in results.paired if (t.env, t.first, t.second) == ("all", first.compute, other.compute))
        found.append(f"{other.compute}: {other.successes} of {other.episodes}. {verdict(test)}")
    return found


def verdict(test: PairedTest) -> str:
    """A paired test in a sentence that does not say more than it found."""
    points = f"{signed(test.difference)} points [{signed(test.interval[0])}, {signed(test.interval[1])}]"
    apart = test.only_first + test.only_second
    if test.p_value < 0.05:
        return (
            f"Better than {test.first}: {points}, p = {test.p_value:.2g}."
            if test.difference > 0
            else (f"Worse than {test.first}: {points}, p = {test.p_value:.2g}.")
        )
    seeds = f"they disagree on {apart} of {test.both + test.neither + apart} episodes" if apart else "they never disagree"
    return f"No difference from {test.first} could be shown: {points}, {seeds}, p = {test.p_value:.2g}."


def costs(results: Results) -> list[str]:
    """What rating and regeneration cost, as shares of a chunk's time (claim C4)."""
    found = []
    for entry in results.latency:
        extra = [
            (plots.PART_NAMES[p], 100 * entry.mean_parts[p] / entry.mean) for p in ("rater", "refine") if p in entry.mean_parts
        ]
        if extra:
            shares = " and ".join(f"the {name} takes {share:.1f} %" for name, share in extra)
            base = next((b for b in results.latency if b.compute == "dense"), None)
            ratio = f" A chunk takes {entry.total.p50 / base.total.p50:.2f} times as long as a dense one (p50)." if base else ""
            found.append(f"{entry.compute}: {shares} of a chunk's time.{ratio}")
    found += [
        f"{entry.compute}: the prefix is not run at every step; its actions differ from those it would make then by "
        f"{entry.drift:.4f} on average (robot units)."
        for entry in results.latency
        if entry.drift is not None
    ]
    return found


def caveats(results: Results) -> list[str]:
    """What the numbers cannot say."""
    n = results.evaluations[0].episodes
    some = results.evaluations[0]
    width = max(100 * (e.interval[1] - e.interval[0]) for e in results.evaluations)
    found = [
        f"{n} episodes per environment: the intervals are up to {width:.0f} points wide. Intervals and p-values are for one "
        "trained checkpoint; another training seed would give another policy.",
        "Several pairs are compared and the p-values are not corrected for that.",
        f"Number of executed actions ({some.n_action_steps}), camera, image size and rendering "
        f"({some.render}) all move success "
        "rates: compare only numbers that agree in them.",
        "p99 of so few chunks is close to the slowest one seen.",
    ]
    if any(compute.startswith("refine") for compute in results.computes):
        found.append(
            "The rater learned relative errors: within a chunk a low rating says worse than its neighbours, not wrong. Some "
            "action of a perfect chunk can still be made anew."
        )
    if results.language:
        found.append(f"The language-swap test has n = {results.language[0].episodes} per cell and tells only large effects.")
    return found


def percent(interval: tuple[float, float]) -> str:
    """84 to 100 %, with a decimal where the interval is narrow."""
    low, high = (100 * side for side in interval)
    digits = 0 if high - low > 10 else 1
    return f"{low:.{digits}f} to {high:.{digits}f} %"


def signed(difference: float) -> str:
    """A difference of rates in points, with a true minus."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def _tiles(results: Results) -> list[dict[str, str]]:
    tiles = [
        {"value": _rate(o.successes, o.episodes), "label": f"success, {o.compute} ({o.successes} of {o.episodes})"}
        for o in results.overall
    ]
    first = results.latency[0]
    tiles.append(
        {"value": f"{first.total.p50:.1f} ms", "label": f"per chunk, {first.compute} p50 (p99 {first.total.p99:.1f} ms)"}
    )
    if _steps(results.minutes) > 1 and results.minutes.total is not None:
        tiles.append({"value": f"{results.minutes.total:.1f} min", "label": "for everything, on this machine"})
    return tiles


def _video(video: EpisodeVideo, folder: Path) -> dict[str, str]:
    e = video.episode
    outcome = f"success at step {e.first_success_step}" if e.success else f"no success in {e.steps} steps"
    return {
        "video": _data(folder / video.file, "video/mp4"),
        "text": f"{plots.short(e.env)}, {e.compute}, seed {e.seed}: {outcome}. One frame in {video.frame_every} steps.",
    }


def _moments(video: EpisodeVideo, folder: Path) -> list[dict[str, Any]]:
    e, found = video.episode, []
    for moment in video.moments:
        again = sum(moment.regenerated or ())
        detail = f"{e.compute}, seed {e.seed}, step {moment.step}"
        if moment.regenerated is not None:
            detail += f"; {again} of {len(moment.actions)} actions made anew"
        found.append(
            {
                "title": plots.short(e.env),
                "detail": detail,
                "image": _data(folder / moment.picture, "image/png"),
                "svg": _safe(plots.chunk(video, moment)),
            }
        )
    return found


def _any_success(videos: Sequence[EpisodeVideo], video: EpisodeVideo) -> bool:
    return any(other.episode.success for other in videos if other.episode.env == video.episode.env)


def _data(file: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def _safe(drawn: Any) -> Any:
    """Our own drawings, which need no escaping (matplotlib escapes the text in them)."""
    from markupsafe import Markup

    if isinstance(drawn, str):
        return Markup(drawn)  # noqa: S704
    if isinstance(drawn, dict):
        return {name: _safe(value) for name, value in drawn.items()}
    return [_safe(svg) if isinstance(svg, str) else (svg[0], _safe(svg[1])) for svg in drawn]


def _rate(successes: int, n: int) -> str:
    return f"{100 * successes / n:.1f} %".replace(".0 %", " %")


def _known(steps: Sequence[int | None]) -> list[int]:
    return sorted(step for step in steps if step is not None)


def _chunks_per_episode(entry: Evaluation) -> float:
    return sum(e.chunks for e in entry.per_episode) / entry.episodes


def _steps(minutes: Minutes) -> int:
    return sum(map(bool, minutes.steps.values()))


def _minutes(minutes: Minutes) -> str:
    parts = minutes.steps if minutes.total is None else {**minutes.steps, "total": minutes.total}
    return ", ".join(f"{name} {value:.1f}" for name, value in parts.items())
