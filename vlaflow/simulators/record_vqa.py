"""Recording a VQA data set: images from episodes of scripted experts, with questions and true answers.

Episodes are found and repeated as in ``record``, but with other seeds, so no image comes from a recorded demonstration or an
evaluation. The gripper first visits some random points, then the expert does the task. Questions are asked about a number of
evenly spaced frames (``scenes.ask``).

A balanced random subset of these candidates is kept: in every environment, each question occurs equally often with each of its
answers, at most ``most`` times. So a model that knows only the question, or also the environment, is no better than chance.
The question of what stands on the table has one answer per environment, so it is balanced over all environments. A question
with only one answer is dropped, and the README of the data set lists it.

The format is that of ``data.vqa``; "group" is the episode, so that whole episodes are held out. The same config gives the same
bytes with any number of workers.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlaflow.errors import ConfigError, DataError, nearest
from vlaflow.outputs import AGAIN, require_writable_folder, storing, whole_folder, write_json, write_text
from vlaflow.simulators.base import RANDOM_START, cached, expand_env_names, simulator_spec
from vlaflow.simulators.experts import Noise
from vlaflow.simulators.record import RecordConfig, RecordJob, find_episode
from vlaflow.simulators.scenes import KINDS, USUAL, Margins, VqaItem, ask, facts_of
from vlaflow.simulators.workers import Progress, iterate_jobs
from vlaflow.versions import versions

FIRST_RUN = 4001
"""First ``run`` of ``record.episode_seed`` for VQA data sets; recordings end at 4000."""
EVERYWHERE = ("what",)
"""Kinds of question that are balanced over all environments together."""


@dataclass(frozen=True)
class VqaRecordingConfig:
    """What to record.

    Args:
        envs: "suite/task" or groups; all of one suite.
        episodes: episodes per environment.
        frames: frames per episode with questions.
        kinds: kinds of question, see ``scenes.KINDS``.
        most: largest number of questions with the same wording and answer in one environment.
        size, render: size and rendering quality of the images, as in ``record.RecordConfig``.
        seed: 0 to 199; another seed gives other episodes.
        wander: random points that the gripper visits before the expert begins.
        noise: disturbance of the expert.
        margins: how clear an answer must be.
    """

    envs: tuple[str, ...]
    episodes: int = 50
    frames: int = 16
    kinds: tuple[str, ...] = USUAL
    most: int = 150
    size: int | None = 96
    render: Any = "fast"
    seed: int = 0
    wander: int = 4
    noise: Noise = field(default_factory=Noise)
    margins: Margins = field(default_factory=Margins)

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise ConfigError(f"There is no kind of question '{kind}'; {nearest(kind, KINDS)}")
        if not 0 <= self.seed < 200:
            raise ConfigError(f"seed must lie in 0..199, got {self.seed}.")
        if self.frames < 1 or self.most < 1 or not 0 <= self.wander <= 10:
            raise ConfigError(
                f"frames and most must be at least 1 and wander lie in 0..10, got {self.frames}, {self.most}, {self.wander}."
            )
        self.episode_config()

    def episode_config(self) -> RecordConfig:
        """Settings for finding episodes."""
        return RecordConfig(self.envs, self.episodes, self.size, self.render, noise=(self.noise,))


@dataclass(frozen=True)
class SampledFrame:
    """One frame of an episode, with its questions."""

    env: str
    episode: int
    seed: int
    step: int
    image: str
    items: tuple[VqaItem, ...]


@dataclass(frozen=True)
class VqaRecordingSummary:
    """The result of ``record_vqa``.

    Args:
        root: folder of the data set.
        counts: number of questions by kind, wording and answer.
        dropped: wordings with only one answer, by environment.
        images: number of images written.
    """

    root: Path
    counts: Mapping[str, Mapping[str, Mapping[str, int]]]
    dropped: Mapping[str, Sequence[str]]
    images: int

    @property
    def questions(self) -> int:
        """Total number of questions."""
        return sum(n for wordings in self.counts.values() for answers in wordings.values() for n in answers.values())


def record_vqa(
    config: VqaRecordingConfig, out: Path, workers: int = 2, progress: Progress | None = None
) -> VqaRecordingSummary:
    """Record and write a VQA data set.

    Args:
        config: what to record.
        out: folder of the data set; it is created only when complete.
        workers: processes; 0 records in this one.
        progress: called as ``progress(done, total)`` after each episode.

    Raises:
        ConfigError: for an unknown environment or several suites at once, or an ``out`` that cannot be created.
        CapabilityError: for an environment without questions.
        DataError: when ``out`` exists, an expert keeps failing, no question has two answers, or the disk is full.
    """
    names = expand_env_names(config.envs)
    suites = {name.partition("/")[0] for name in names}
    if len(suites) > 1:
        raise ConfigError(f"A VQA data set contains one robot, but these are several suites: {', '.join(sorted(suites))}.")
    if out.exists():
        raise DataError(f"{out} exists already. Choose another --out, or remove it first.")
    side = config.size or simulator_spec(suites.pop()).size[config.render]
    jobs = [RecordJob(name, episode) for name in names for episode in range(config.episodes)]
    require_writable_folder(out.parent)
    with whole_folder(out, "The questions") as partial:
        for name in names:
            (partial / _folder(name)).mkdir(parents=True)
        work = functools.partial(_sample_frames, config=config, size=side, root=partial)
        frames = [frame for episode in iterate_jobs(work, jobs, workers, progress=progress) for frame in episode]
        kept, dropped = balance(frames, config)
        if not kept:
            raise DataError(f"No question about {', '.join(names)} has two answers. Record more episodes, or other tasks.")
        shown = {frame.image for frame, _ in kept}
        for frame in frames:
            if frame.image not in shown:
                (partial / frame.image).unlink()
        counts = _count(kept)
        write_text(partial / "questions.jsonl", "".join(_line(frame, item) for frame, item in kept))
        meta = _metadata(config, side, frames, counts, dropped)
        write_json(partial / "metadata.json", meta, indent=1)
        write_text(partial / "README.md", _readme(meta, len(shown)))
    return VqaRecordingSummary(out, counts, dropped, len(shown))


def balance(
    frames: Sequence[SampledFrame], config: VqaRecordingConfig
) -> tuple[list[tuple[SampledFrame, VqaItem]], dict[str, list[str]]]:
    """The questions to keep, in the order of the frames, and the wordings with only one answer, by environment."""
    pools: dict[tuple[str, str], dict[str, list[tuple[int, int]]]] = {}
    for i, frame in enumerate(frames):
        for j, item in enumerate(frame.items):
            where = "all environments" if item.kind in EVERYWHERE else frame.env
            pools.setdefault((where, item.question), {}).setdefault(item.answer, []).append((i, j))
    kept: list[tuple[int, int]] = []
    dropped: dict[str, list[str]] = {}
    for (where, question), answers in pools.items():
        if len(answers) < 2:
            dropped.setdefault(where, []).append(question)
            continue
        number = min(config.most, *(len(places) for places in answers.values()))
        for answer, places in answers.items():
            salt = zlib.crc32(f"{where}\0{question}\0{answer}".encode())
            order = np.random.default_rng([config.seed, salt]).permutation(len(places))
            kept += [places[k] for k in order[:number]]
    return [(frames[i], frames[i].items[j]) for i, j in sorted(kept)], dropped


def _sample_frames(job: RecordJob, config: VqaRecordingConfig, size: int, root: Path) -> list[SampledFrame]:
    """Sample frames of one episode and ask about them; runs in a worker."""
    from PIL import Image

    env: Any = cached(job.env, render=config.render, size=size)
    env.restart(0)
    facts_of(env)  # fails before the expert plays
    found = find_episode(job.env, job.episode, config.episode_config(), FIRST_RUN + config.seed, size, wander=config.wander)
    env.restart(found.seed, RANDOM_START)
    chosen = set(np.linspace(0, len(found.steps) - 1, min(config.frames, len(found.steps))).round().astype(int).tolist())
    frames = []
    for number, step in enumerate(found.steps):
        if number in chosen:
            image = f"{_folder(job.env)}/{job.episode:05d}-{number:03d}.png"
            with storing(root.parent, "The questions", AGAIN):
                Image.fromarray(env.render()).save(root / image)
            items = tuple(each for each in ask(facts_of(env), config.margins) if each.kind in config.kinds)
            frames.append(SampledFrame(job.env, job.episode, found.seed, number, image, items))
        env.advance(step.executed)
    return frames


def _folder(env: str) -> str:
    return f"images/{env.partition('/')[2]}"


def _line(frame: SampledFrame, item: VqaItem) -> str:
    task = frame.env.partition("/")[2]
    record = {
        "id": f"{task}-{frame.episode}-{frame.step}-{item.kind}-{zlib.crc32(item.question.encode()):08x}",
        "image": frame.image,
        "conversations": [{"from": "human", "value": f"<image>\n{item.question}"}, {"from": "gpt", "value": item.answer}],
        "kind": item.kind,
        "group": f"{frame.env}, seed {frame.seed}",
        "env": frame.env,
        "seed": frame.seed,
        "step": frame.step,
    }
    return json.dumps(record) + "\n"


def _count(kept: Sequence[tuple[SampledFrame, VqaItem]]) -> dict[str, dict[str, dict[str, int]]]:
    """Questions by kind, wording and answer, sorted by name within the order of the kinds."""
    numbers = Counter((item.kind, item.question, item.answer) for _, item in kept)
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for kind, question, answer in sorted(numbers, key=lambda key: (list(KINDS).index(key[0]), *key[1:])):
        counts.setdefault(kind, {}).setdefault(question, {})[answer] = numbers[kind, question, answer]
    return counts


def _metadata(
    config: VqaRecordingConfig,
    side: int,
    frames: Sequence[SampledFrame],
    counts: Mapping[str, Any],
    dropped: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    seeds: dict[str, list[int]] = {}
    for frame in frames:
        seeds.setdefault(frame.env, []).append(frame.seed)
    return {
        "how": "images along scripted experts' episodes; answers from the simulator's state; answers balanced by wording",
        "size": side,
        "render": config.render,
        "seed": config.seed,
        "episodes": config.episodes,
        "frames": config.frames,
        "most": config.most,
        "wander": config.wander,
        "noise": asdict(config.noise),
        "margins": asdict(config.margins),
        "kinds": {kind: KINDS[kind] for kind in counts},
        "counts": counts,
        "dropped": dropped,
        "seeds": {env: list(dict.fromkeys(own)) for env, own in seeds.items()},
        "versions": versions(),
    }


def _readme(meta: Mapping[str, Any], images: int) -> str:
    total = sum(n for wordings in meta["counts"].values() for answers in wordings.values() for n in answers.values())
    lines = [
        "# Questions about simulated scenes",
        "",
        f"{total} questions about {images} images of {meta['size']} × {meta['size']} pixels ({meta['render']} rendering), "
        f"recorded with vlaflow {meta['versions']['vlaflow']}, seed {meta['seed']}. Environments: {', '.join(meta['seeds'])}.",
        "",
        "`questions.jsonl` is in LLaVA's conversation layout; `metadata.json` states seeds, margins, counts and versions.",
        "Answers come from the simulator's state. In every environment each wording has as many questions with one answer as",
        "with any other, so always giving the most frequent answer is right as often as chance.",
        "",
        "| kind | wording | answers |",
        "|---|---|---|",
    ]
    for kind, wordings in meta["counts"].items():
        for question, answers in wordings.items():
            lines.append(f"| {kind} | {question} | {', '.join(f'{answer}: {n}' for answer, n in answers.items())} |")
    if meta["dropped"]:
        lines += ["", "Left out, because only one answer occurred:", ""]
        lines += [f"- {where}: {' '.join(questions)}" for where, questions in meta["dropped"].items()]
    return "\n".join(lines) + "\n"
