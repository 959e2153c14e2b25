"""Results as an evaluation would leave them, made up, for the report."""

import math

import numpy as np

from vlaflow.evaluation import results as r
from vlaflow.evaluation.language import KINDS
from vlaflow.evaluation.latency import Latency
from vlaflow.evaluation.rollout import EpisodeResult
from vlaflow.evaluation.statistics import Percentiles, wilson
from vlaflow.evaluation.videos import EpisodeVideo, VideoChunk

ENVS = ("metaworld/drawer-open-v3", "metaworld/button-press-topdown-v3", "metaworld/window-close-v3")
COMPUTES = ("dense", "refine", "refine-random")


def episodes(n=20, seed=0):
    random, found = np.random.default_rng(seed), []
    for e, env in enumerate(ENVS):
        for s in range(n):
            hard = random.random()
            for c, compute in enumerate(COMPUTES):
                ok = hard < (0.97, 0.95, 0.85)[e] - (0, -0.02, 0.04)[c]
                step = min(500, int(60 + 25 * e + 15 * random.standard_normal() + 330 * (hard > 0.8))) if ok else None
                steps, chunks = step or 500, math.ceil((step or 500) / 8)
                passes = chunks * (44, 72, 84)[c]
                found.append(
                    EpisodeResult(
                        env,
                        compute,
                        1000 + s,
                        "Open a drawer",
                        ok,
                        step,
                        steps,
                        chunks,
                        10 * chunks,
                        passes,
                        (0, 5, 8)[c] * chunks,
                    )
                )
    return found


def latency():
    parts = {
        "dense": {"prefix": 3.1, "first": 11.2, "other": 0.4},
        "refine": {"prefix": 3.1, "first": 11.3, "rater": 0.9, "refine": 8.4, "other": 0.4},
        "refine-random": {"prefix": 3.1, "first": 11.2, "refine": 11.1, "other": 0.4},
    }
    return [
        Latency(
            c,
            60,
            Percentiles(t := sum(p.values()), t * 1.3),
            {k: Percentiles(v, v * 1.4) for k, v in p.items()},
            p,
            t,
            44 + 30 * i,
            10.0 + 8 * i,
            0.25 * i,
        )
        for i, (c, p) in enumerate(parts.items())
    ]


def results():
    evaluations = r.count(episodes(), latency(), n_action_steps=8, max_steps=500, render="fast", solver_steps=10)
    counts = {"right": (5, 5, 5), "other": (5, 1, 4), "empty": (4, 0, 2)}
    language = tuple(
        r.LanguageResult(
            env, kind, {"right": "Open a drawer", "other": "Push and close a window", "empty": ""}[kind], 5, counts[kind][i],
            (wilson(counts[kind][i], 5).low, wilson(counts[kind][i], 5).high), (1000, 1001, 1002, 1003, 1004),
            (61,) * counts[kind][i] + (None,) * (5 - counts[kind][i]), 200,
        )
        for i, env in enumerate(ENVS)
        for kind in KINDS
    )  # fmt: skip
    return r.Results(
        evaluations=evaluations,
        minutes=r.Minutes(2.1, 1.4, 6.3, 0.9, None, 2.6).summed(),
        versions={"vlaflow": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "mujoco": "3.3.0"},
        command="vlaflow demo --out runs/demo",
        checkpoint="runs/demo/rater",
        fingerprint="0123456789abcdef",
        machine="A processor, 2 cores, Linux",
        overall=r.pool(evaluations),
        paired=r.compare(evaluations),
        latency=tuple(latency()),
        language=language,
        commands=("vlaflow record --env metaworld/drawer-open-v3 --out runs/demo/dataset", "vlaflow demo --out <runs>"),
    )


def log(steps=600):
    random = np.random.default_rng(1)
    return [
        {"step": s, "loss": 0.9 * math.exp(-s / 150) + 0.08 * (1 + 0.3 * random.random())}
        | ({"validation": {"loss": 0.9 * math.exp(-s / 150) + 0.1}} if s % 100 == 0 else {})
        for s in range(1, steps + 1)
    ]


def video_chunk(step=24, seed=3):
    random = np.random.default_rng(seed)
    draft = np.cumsum(random.normal(0, 0.15, (16, 4)), 0).clip(-1, 1)
    confidence = random.uniform(0.2, 0.98, 16)
    again = confidence < 0.5
    actions = np.where(again[:, None], draft + random.normal(0, 0.12, (16, 4)), draft).clip(-1, 1)
    rows = [tuple(tuple(float(v) for v in row) for row in a) for a in (actions, draft)]
    return VideoChunk(step, "seen.png", rows[0], rows[1], tuple(map(float, confidence)), tuple(map(bool, again)), 8)


def videos():
    found = []
    for env in ENVS:
        some = [e for e in episodes() if e.env == env and e.compute == "refine"]
        for success in (True, False):
            one = next((e for e in some if e.success == success), None)
            if one:
                found.append(EpisodeVideo(one, "video.mp4", 2, ("x", "y", "z", "gripper"), (video_chunk(0, 5), video_chunk())))
    return found


def write(out):
    import json

    from PIL import Image

    from vlaflow.config import to_json
    from vlaflow.evaluation.videos import caption, write_mp4

    r.write(results(), out / "results.json")
    folder = out / "videos"
    folder.mkdir(exist_ok=True)
    ramp = np.linspace(0, 255, 96, dtype=np.uint8)
    picture = np.stack([np.tile(ramp, (96, 1)), np.tile(ramp[:, None], (1, 96)), np.full((96, 96), 90, np.uint8)], -1)
    Image.fromarray(picture).save(folder / "seen.png")
    big = np.repeat(np.repeat(picture, 2, 0), 2, 1)
    write_mp4(
        [caption(np.roll(big, 4 * i, 1), "drawer-open-v3, refine, seed 1000", f"step {i}") for i in range(12)],
        folder / "video.mp4",
    )
    (folder / "videos.json").write_text(json.dumps([to_json(f) for f in videos()]))
