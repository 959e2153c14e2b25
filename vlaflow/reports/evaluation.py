"""``report.html`` of an evaluation: one self-contained page, including images and videos.

It opens with a video of the robot, the success rate and the latency; repetitive tables are folded. The page is made from
``results.json`` and ``videos/`` and can be made again at any time. Its layout is in ``templates/evaluation.html``, its plots in
``evaluation_plots``, its text and tables here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from vlaflow.evaluation.groups import GroupMean, GroupRate
from vlaflow.evaluation.language import KINDS
from vlaflow.evaluation.latency import PARTS
from vlaflow.evaluation.prepared import RESULTS, VIDEOS
from vlaflow.evaluation.results import Evaluation, Minutes, Overall, PairedTest, Results, Within, read
from vlaflow.evaluation.videos import EpisodeVideo, read_videos
from vlaflow.reports import evaluation_plots as plots
from vlaflow.reports import page, revision_plots
from vlaflow.reports.monitor_plots import monitor
from vlaflow.reports.page import Figure, Table
from vlaflow.reports.words import NOTABLE, percent, played, rate, short, signed, step_limits, too_few
from vlaflow.versions import version_list

Log = Sequence[Mapping[str, Any]]
PAGE = "report.html"


def write_report(out: Path, logs: Mapping[str, Log] | None = None, title: str | None = None) -> Path:
    """Write ``report.html`` from the results of an evaluation in ``out``.

    Args:
        out: folder with ``results.json`` and, if videos were recorded, ``videos/``.
        logs: entries of training logs (step, loss, validation) by the name of the loss.
        title: title of the page.

    Returns:
        The path of the page.
    """
    return page.write(out / PAGE, "evaluation.html", **values(read(out / RESULTS), out / VIDEOS, logs or {}, title))


def values(results: Results, folder: Path, logs: Mapping[str, Log], title: str | None = None) -> dict[str, Any]:
    """The values of the template."""
    videos, first, envs = read_videos(folder), results.evaluations[0], len(results.envs)
    lead = next((video for video in videos if video.episode.success), videos[0] if videos else None)
    revising = [e for e in results.evaluations if e.revised_per_chunk and sum(e.revised_per_chunk)]
    shown: dict[str, Any] = {
        "title": title or f"{results.checkpoint} in {envs} environment{'s' if envs > 1 else ''}",
        "headline": headline(results),
        "tile_entries": tiles(results),
        "lead_clip": _clip(lead, folder) if lead else None,
        "more_clips": [_clip(video, folder) for video in videos if video is not lead],
        "protocol": f"{played(results)}, the same for every compute policy; {first.n_action_steps} actions of each chunk "
        f"executed; at most {step_limits(results.evaluations)} steps; the first success ends the episode.",
        "success": Figure(plots.success(results)),
        "success_table": success_table(results),
        "too_few": too_few(results),
        "paired": paired(results),
        "latency_protocol": f"{results.latency[0].chunks} chunks per compute policy, in turns on the same observations, with "
        f"one process and one thread on an idle machine, {results.machine}. The prefix is encoded once per observation.",
        "latency": Figure(plots.latency(results.latency)),
        "latency_table": latency_table(results),
        "costs": costs(results),
        "early": sorted({w.max_steps for e in results.evaluations for w in earlier(e)}),
        "first_success": Figure(plots.first_success(results)),
        "steps_table": steps_table(results),
        "revised": Figure(revision_plots.revised(revising)) if revising else None,
        "revision": revision(results),
        "monitor": monitor(results),
        "losses": [Figure(plots.loss(log, name), f"{name}.") for name, log in logs.items() if log],
        "chunks": [m for video in videos if _telling(video, videos) for m in _chunks(video, folder)],
        "language": language(results),
        "minutes": Figure(plots.minutes(results.minutes)) if _steps(results.minutes) > 1 else None,
        "commands": results.commands or (results.command,),
        "fact_entries": facts(results),
        "caveats": caveats(results),
    }
    optional = {"Videos": "more_clips", "Tokens": "revision", "Monitor": "monitor", "Training": "losses"}
    optional |= {"Chunks": "chunks", "Language": "language"}
    order: tuple[str, ...] = ("Success", "Latency", "Videos", "Steps", "Tokens", "Monitor", "Training", "Chunks", "Language")
    order += ("Reproduce", "Limits")
    shown["sections"] = [
        name for name in order if name not in optional or shown[optional[name]] or (name == "Tokens" and revising)
    ]
    return shown


def headline(results: Results) -> list[str]:
    """The main results in sentences, with their uncertainty."""
    first, *others = results.overall
    n_envs = len(results.envs)
    where = short(results.envs[0]) if n_envs == 1 else f"{n_envs} environments"
    found = [
        f"On {where} the {first.compute} policy succeeds in {first.successes} of {first.episodes} episodes "
        f"({rate(first.successes, first.episodes)}; 95 % interval {percent(first.interval)})."
    ]
    for other in others:
        test = next(t for t in results.paired if (t.env, t.first, t.second) == ("all", first.compute, other.compute))
        found.append(f"{other.compute}: {other.successes} of {other.episodes}. {verdict(test)}")
    return found + [
        f"Mean of the {len(mean.groups)} groups of {mean.suite}, {overall.compute}: {100 * mean.mean:.1f} % "
        f"(95 % interval {percent(mean.interval)})."
        for overall in results.overall
        for mean in overall.by_group
    ]


def verdict(test: PairedTest) -> str:
    """The result of a paired test in a sentence that does not overstate it."""
    points = f"{signed(test.difference)} points [{signed(test.interval[0])}, {signed(test.interval[1])}]"
    apart = test.only_first + test.only_second
    if test.p_value < NOTABLE:
        return f"{'Better' if test.difference > 0 else 'Worse'} than {test.first}: {points}, p = {test.p_value:.2g}."
    seeds = f"they disagree on {apart} of {test.both + test.neither + apart} episodes" if apart else "they never disagree"
    return f"No significant difference from {test.first}: {points}, {seeds}, p = {test.p_value:.2g}."


def tiles(results: Results) -> list[tuple[str, str]]:
    """The main numbers: success with its interval, latency, and the total time."""
    found = [
        (
            rate(o.successes, o.episodes),
            f"success, {o.compute}: {o.successes} of {o.episodes} episodes, 95 % interval {percent(o.interval)}",
        )
        for o in results.overall
    ]
    first = results.latency[0]
    found.append((f"{first.total.p50:.1f} ms", f"per chunk, {first.compute} p50 (p99 {first.total.p99:.1f} ms)"))
    if _steps(results.minutes) > 1 and results.minutes.total is not None:
        found.append((f"{results.minutes.total:.1f} min", "in total, on this machine"))
    return found


def success_table(results: Results) -> Table:
    """Success rates: a row per environment, a column per compute policy."""
    rows: list[list[page.Cell]] = [[env, *_rates([results.of(env, c) for c in results.computes])] for env in results.envs]
    early = list(dict.fromkeys(w.protocol for e in results.evaluations for w in earlier(e)))
    if len(results.envs) > 1:
        rows.append(["all", *_rates(results.overall)])
        rows.append(["mean over environments", *(f"{100 * o.mean_over_envs:.1f} %" for o in results.overall)])
        for protocol in early:
            counts = [(o.within.get(protocol), o.episodes) for o in results.overall]
            rows.append([f"all, within {protocol}'s limits", *("–" if k is None else f"{k}/{n}" for k, n in counts)])
    for means in zip(*(overall.by_group for overall in results.overall), strict=True):
        rows += _group_rows(means, early)
    return Table(("environment", *results.computes), rows, totals=(len(results.envs),))


def _group_rows(means: Sequence[GroupMean], early: Sequence[str]) -> list[list[page.Cell]]:
    """The groups of a suite and their mean, of every compute policy."""
    suite = means[0].suite
    groups = zip(*(mean.groups for mean in means), strict=True)
    rows = [[f"{suite}/{same[0].group}, {same[0].envs} tasks", *_rates(same)] for same in groups]
    rows.append([f"mean of {suite}'s groups", *((f"{100 * m.mean:.1f} %", percent(m.interval)) for m in means)])
    for protocol in early:
        shares = [mean.within.get(protocol) for mean in means]
        texts = ["–" if share is None else f"{100 * share:.1f} %" for share in shares]
        rows.append([f"mean of {suite}'s groups, within {protocol}'s limits", *texts])
    return rows


def _rates(entries: Sequence[Evaluation | Overall | GroupRate]) -> list[page.Cell]:
    return [(f"{e.successes}/{e.episodes}", percent(e.interval)) for e in entries]


def paired(results: Results) -> dict[str, Any] | None:
    """The paired tests, with a sentence on how many of them are notable."""
    if not results.paired:
        return None
    notable = [t for t in results.paired if t.p_value < NOTABLE]
    n = len(results.paired)
    summary = f"{n} paired test{'s' if n > 1 else ''}: {len(notable) or 'none'} with p below {NOTABLE:g}"
    rows: list[list[page.Cell]] = [
        [
            short(t.env),
            f"{t.first}, {t.second}",
            *(str(count) for count in (t.both, t.only_first, t.only_second, t.neither)),
            (signed(t.difference), f"{signed(t.interval[0])} to {signed(t.interval[1])}"),
            f"{t.p_value:.2g}",
        ]
        for t in results.paired
    ]
    repeated = any(max(e.noise_seeds) for e in results.evaluations)
    method = (
        "p: exact permutation test over environment seeds; interval of the difference: Newcombe's method 10, 95 %, with the "
        "effective number of pairs."
        if repeated
        else "p: exact McNemar test; interval of the difference: Newcombe's method 10, 95 %."
    )
    heads = ("environment", "compared", "both", "only the first", "only the second", "neither", "difference, points", "p")
    overall = next((i for i, t in enumerate(results.paired) if t.env == "all"), 0)
    table = Table(heads, rows, (0, 1), (overall,) if overall else ())
    return {"summary": summary, "notable": bool(notable), "method": method, "table": table}


def latency_table(results: Results) -> Table:
    """Milliseconds by part, and the amount of computation."""
    parts = [part for part in (*PARTS, "other") if any(part in entry.parts for entry in results.latency)]
    rows = [
        [
            e.compute,
            f"{e.total.p50:.1f}",
            f"{e.total.p99:.1f}",
            *(f"{e.parts[part].p50:.1f}" if part in e.parts else "–" for part in parts),
            f"{e.layer_passes:.1f}",
            f"{e.nfe:.1f}",
            f"{100 * e.regenerated_share:.0f} %",
        ]
        for e in results.latency
    ]
    names = [f"{plots.PART_NAMES[part]}, ms" for part in parts]
    counts = ("layer passes", "network evaluations", "regenerated")
    return Table(("compute", "p50, ms", "p99, ms", *names, *counts), rows, dense=True)


def earlier(entry: Evaluation) -> list[Within]:
    """Published evaluations that stop before this one."""
    return [w for w in entry.within if w.max_steps < entry.max_steps]


def steps_table(results: Results) -> Table:
    """Number of steps to success."""
    early = list(dict.fromkeys(w.protocol for e in results.evaluations for w in earlier(e)))
    rows = []
    for e in results.evaluations:
        known = [step for step in e.first_success_steps if step is not None]
        three = (f"{median(known):g}", min(known), max(known)) if known else ("–", "–", "–")
        counts = {w.protocol: f"{w.successes}/{e.episodes} by step {w.max_steps}" for w in e.within}
        within = [counts.get(protocol, "–") for protocol in early]
        chunks = sum(p.chunks for p in e.per_episode) / e.episodes
        rows.append([short(e.env), e.compute, *map(str, three), *within, f"{chunks:.1f}"])
    within = [f"success within {protocol}'s limit" for protocol in early]
    heads = ("environment", "compute", "median step of success", "earliest", "latest", *within, "chunks per episode")
    return Table(heads, rows, (0, 1))


def revision(results: Results) -> dict[str, Any] | None:
    """One chunk of tokens, from noise to the final actions."""
    found = results.revision
    if found is None:
        return None
    ends = " Steps right of the dotted line are deterministic." if found.settling else ""
    text = (
        f"One chunk ({found.compute}, “{found.instruction}”) from noise to the final tokens. Each square is a token, "
        "darker for a higher probability; an orange dot marks a token changed by this step; small squares are end tokens."
        f"{ends} Below: the decoded actions, step by step."
    )
    return {"text": text, "figures": [Figure(revision_plots.tokens(found)), Figure(revision_plots.actions(found))]}


def language(results: Results) -> dict[str, Any] | None:
    """The language-swap test."""
    if not results.language:
        return None
    of = {(entry.env, entry.condition): entry for entry in results.language}
    rows: list[list[page.Cell]] = [
        [
            env,
            *((f"{of[env, k].successes}/{of[env, k].episodes}", percent(of[env, k].interval)) for k in KINDS),
            of[env, "other"].instruction,
        ]
        for env in results.envs
    ]
    text = (
        f"{results.computes[0]} on the same seeds with the right instruction, another task's, or none. A success is the "
        f"environment's own task within {results.language[0].max_steps} steps. A policy that succeeds with any instruction "
        "ignores it."
    )
    return {"text": text, "table": Table(("environment", *KINDS, "the other instruction"), rows, (0, 1 + len(KINDS)))}


def facts(results: Results) -> dict[str, str]:
    """What is needed to reproduce the evaluation."""
    first = results.evaluations[0]
    return {
        "checkpoint": f"{results.checkpoint}, content {results.fingerprint}, computed in {results.dtype}, {results.engine}",
        "seeds": f"{', '.join(map(str, dict.fromkeys(first.seeds)))}; the noise of chunk k of an episode is drawn from "
        f"{'(seed, k, noise seed)' if max(first.noise_seeds) else '(seed, k)'}",
        "settings": f"{first.solver_steps} solver steps per round where the compute policy states none, "
        f"{first.n_action_steps} actions executed per chunk, at most {step_limits(results.evaluations)} steps, "
        f"{first.render} rendering",
        "machine": results.machine,
        "minutes": _minutes(results.minutes),
        "versions": version_list(results.versions),
    }


def costs(results: Results) -> list[str]:
    """Cost of rating and regeneration, as shares of a chunk's time (claim C4)."""
    found = []
    for entry in results.latency:
        extra = [
            (plots.PART_NAMES[p], 100 * entry.mean_parts[p] / entry.mean) for p in ("rater", "refine") if p in entry.mean_parts
        ]
        if extra:
            shares = " and ".join(f"the {name} takes {share:.1f} %" for name, share in extra)
            base = next((b for b in results.latency if b.compute == results.computes[0]), None)
            ratio = (
                f" A chunk takes {entry.total.p50 / base.total.p50:.2f} times as long as with {base.compute} (p50)."
                if base
                else ""
            )
            found.append(f"{entry.compute}: {shares} of a chunk's time.{ratio}")
    found += [
        f"{entry.compute}: the prefix is not recomputed at every step, which changes the actions by "
        f"{entry.drift:.4f} on average (robot units)."
        for entry in results.latency
        if entry.drift is not None
    ]
    return found


def caveats(results: Results) -> list[str]:
    """Limits of the results."""
    n = results.evaluations[0].episodes
    some = results.evaluations[0]
    width = max(100 * (e.interval[1] - e.interval[0]) for e in results.evaluations)
    found = [
        f"{n} episodes per environment: the intervals are up to {width:.0f} points wide. Intervals and p-values are for one "
        "trained checkpoint; a policy trained with another seed would differ.",
        "Several pairs are compared, and the p-values are not corrected for this.",
        f"Number of executed actions ({some.n_action_steps}), camera, image size and rendering ({some.render}) all affect "
        "success rates: compare only results with the same settings.",
        "With so few chunks, p99 is close to the slowest one.",
    ]
    if any("rater" in entry.parts for entry in results.latency):
        found.append(
            "A rater learns relative errors unless it was trained with labels=absolute: a low rating then means worse than the "
            "other actions of the chunk, not wrong, and some action of a perfect chunk can still be regenerated."
        )
    if results.language:
        found.append(f"The language-swap test has n = {results.language[0].episodes} per cell and detects only large effects.")
    return found


def _clip(video: EpisodeVideo, folder: Path) -> dict[str, str]:
    e = video.episode
    outcome = f"success at step {e.first_success_step}" if e.success else f"no success in {e.steps} steps"
    return {
        "source": page.data_url((folder / video.file).read_bytes(), "video/mp4"),
        "text": f"{short(e.env)}, {e.compute}, {e.seed_label}: {outcome}. One frame in {video.frame_every} steps.",
    }


def _chunks(video: EpisodeVideo, folder: Path) -> list[dict[str, Any]]:
    e, found = video.episode, []
    for chunk in video.chunks:
        detail = f"{e.compute}, {e.seed_label}, step {chunk.step}"
        if chunk.regenerated is not None:
            detail += f"; {sum(chunk.regenerated)} of {len(chunk.actions)} actions regenerated"
        found.append(
            {
                "title": short(e.env),
                "detail": detail,
                "image": page.data_url((folder / chunk.image).read_bytes(), "image/png"),
                "svg": plots.chunk(video, chunk),
            }
        )
    return found


def _telling(video: EpisodeVideo, videos: Sequence[EpisodeVideo]) -> bool:
    """Whether to show the chunks of a video: those of a success, or of a failure if the environment has no success."""
    return video.episode.success or not any(f.episode.success for f in videos if f.episode.env == video.episode.env)


def _steps(minutes: Minutes) -> int:
    return sum(map(bool, minutes.steps.values()))


def _minutes(minutes: Minutes) -> str:
    parts = minutes.steps if minutes.total is None else {**minutes.steps, "total": minutes.total}
    return ", ".join(f"{name} {value:.1f}" for name, value in parts.items())
