"""The kinds of foreign input that are fuzzed: a sound one, the damages it may suffer, and a use of it.

A use returns a digest of all that matters to what a policy would do, and raises a ``VlaflowError`` for what it refuses.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import msgpack
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests import helpers
from tests.data import toyset
from tests.fuzz import damage
from vlaflow.compute.budget import LADDER, PROFILE, Ladder, Profile, Rung, within
from vlaflow.compute.calibration import FOLDER, Calibration, ExitEffect, RiskTarget, load_exit
from vlaflow.compute.cost import ChunkWork, CostModel, Work
from vlaflow.compute.dense import Dense
from vlaflow.compute.early_exit import ExitPlan
from vlaflow.compute.sampler_choice import FILE, Candidate, SamplerCalibration
from vlaflow.compute.spelling import Checkpoint
from vlaflow.config import to_json
from vlaflow.data.check import check
from vlaflow.data.edit_survey import survey
from vlaflow.data.hub import needed
from vlaflow.data.lerobot import Dataset
from vlaflow.data.vqa import VqaDataset
from vlaflow.decoders.exits import ExitTraining
from vlaflow.errors import DataError
from vlaflow.evaluation import results
from vlaflow.evaluation.latency import Latency
from vlaflow.evaluation.rollout import EpisodeResult
from vlaflow.evaluation.statistics import Percentiles
from vlaflow.outputs import write_json
from vlaflow.policies.base import Policy
from vlaflow.reports import words
from vlaflow.serving.observation_keys import choose
from vlaflow.serving.openpi import OpenpiConversation
from vlaflow.serving.request_log import RequestEntry
from vlaflow.serving.server import PolicyServer, ServerConfig
from vlaflow.versions import processor


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Args:
        build: writes a sound one into an empty folder.
        use: reads it there; a digest.
        free: keys of JSON objects whose value may have several types, or any keys of its own.
        unsealed: patterns of files without checksums: a damaged one that can be read is another sound input.
        others: whether keys of JSON objects that are not known are ignored, as in the files of other programs.
    """

    build: Callable[[Path], None]
    use: Callable[[Path, str], str]
    free: frozenset[str] = frozenset()
    unsealed: tuple[str, ...] = ()
    others: bool = False


def content(folder):
    """The files of a folder that are not empty, by their paths within it."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size
    }


def damages(files: Mapping[str, bytes]) -> st.SearchStrategy:
    """Strategy: a damage of one of the files; files that describe something are damaged as often as those that hold much."""
    by_ending = {"json": damage.of_json, "parquet": damage.of_table, "safetensors": damage.of_tensors}
    by_ending |= {"jsonl": of_lines, "msgpack": of_message}
    by_file = []
    for file, inside in files.items():
        ending = file.rpartition(".")[2]
        by_file.append(by_ending.get(ending, damage.of_bytes)(file, inside))
    return st.one_of(*by_file)


def of_lines(file, inside):
    """Strategy: damages of a line, which is a JSON document, or of the bytes of a file of lines."""
    lines = inside.split(b"\n")
    return st.one_of(
        *(damage.of_json(f"{file}#{n}", line) for n, line in enumerate(lines) if line), damage.of_bytes(file, inside)
    )


def after(files: Mapping[str, bytes], hurt: tuple) -> tuple[str, bytes]:
    """The file that a damage concerns, and its bytes afterwards."""
    file, _, line = hurt[0].partition("#")
    if not line:
        return file, (damaged_message if file.endswith(".msgpack") else damage.damaged)(files[file], hurt)
    lines = files[file].split(b"\n")
    lines[int(line)] = damage.damaged(lines[int(line)], hurt)
    return file, b"\n".join(lines)


def digest(*parts) -> str:
    """A hash of arrays and JSON values."""
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        found.update(part.tobytes() if isinstance(part, np.ndarray) else json.dumps(part, default=str).encode())
    return found.hexdigest()


# -- data sets ---------------------------------------------------------------------------------------------------------------


def build_datasets(folder):
    lengths, views, tasks = (6, 5), {"image": (16, 16)}, ("push the puck", "open the drawer")
    old = toyset.VIEWS, toyset.LENGTHS, toyset.TASKS
    try:
        toyset.VIEWS, toyset.LENGTHS, toyset.TASKS = views, lengths, tasks
        toyset.write_v3(folder / "v3")
        (folder / "v21").mkdir()
        toyset.write_v21(folder / "v21")
    finally:
        toyset.VIEWS, toyset.LENGTHS, toyset.TASKS = old


def use_dataset(folder, file):
    """What training would see: rows, instructions, frames, meaning; and what editing would find does not matter."""
    root = folder / file.partition("/")[0]
    needed(root)
    with contextlib.suppress(DataError):
        survey(root)
    dataset = Dataset.open(root)
    columns = dataset.columns()
    found = check(dataset, 1, deep=True)
    if found.problems:
        raise DataError(found.problems[0])
    spec = to_json(dataset.action_spec) if dataset.action_spec else None
    frames = [dataset.frames(number, view) for view in dataset.views for number in dataset.numbers]
    told = [dataset.tasks[i] for i in columns.task.tolist()]
    return digest(columns.state, columns.action, columns.executed, told, dataset.fps, list(dataset.views), spec, *frames)


# -- checkpoints and what lies in them ---------------------------------------------------------------------------------------


def build_checkpoint(folder):
    helpers.policy().save_pretrained(folder)


def use_checkpoint(folder, file):
    """A chunk, and what it means."""
    policy = Policy.from_pretrained(folder)
    chunk = policy.act(helpers.observation(), Dense(2))
    return digest(chunk.actions, policy.n_action_steps, to_json(policy.action_spec))


def build_calibrations(folder):
    """Two checkpoints' measurements: one with a calibrated sampler, one with a ladder."""
    effect = ExitEffect(9, (0.5, 0.5), 2.0, 3.0, 3.0, 0.1, 0.2, 0.2, 0.0)
    plan = ExitPlan((1, 2, 3), sampling=Dense(2).sampling)
    made = Calibration("c", "d", plan, (0.5,), RiskTarget(0.1, 0.1, 0.05, "max_abs"), 9, effect, "vlaflow calibrate", {})
    for root in ("sampled", "laddered"):
        (folder / root / FOLDER).mkdir(parents=True)
        made.save(folder / root / FOLDER / "fast.json")
        write_json(folder / root / PROFILE, to_json(profile()))
    rungs = tuple(Rung(depth, nfe, 0.1 / nfe, 0.2 / nfe) for depth in (1, 2, 3) for nfe in (1, 2, 4))
    write_json(folder / "laddered" / FOLDER / LADDER, to_json(Ladder("c", "d", 9, rungs)))
    candidates = tuple(Candidate(f"dense:{n}", n, 3.0 * n, 1.0 * n, 2.0 * n, 1.0 / n) for n in (1, 2, 4))
    sampler = SamplerCalibration(
        "c", "d", "crps", candidates, "dense:4", None, 9, (), 0, 0, 0.0, processor(), "cpu", 1, "vlaflow calibrate", {}
    )
    sampler.save(folder / "sampled" / FOLDER / FILE)


def profile():
    work = ChunkWork(Work(1.0), (Work(1.0), Work(2.0), Work(3.0)), (Work(0.1), Work(0.2), Work(0.3)))
    return Profile("c", processor(), 1, 1.0, (1.0, 2.0, 3.0), (0.1, 0.2, 0.3), 1.5, 9, {}, work, CostModel(0.1, 0.1, 0.1))


@cache
def with_exits():
    config = helpers.policy_config()
    config = replace(config, backbone=replace(config.backbone, depth=3), exits=ExitTraining((1, 2, 3)))
    return Policy.create(
        config, helpers.action_spec(), {"state": helpers.feature_stats(4), "action": helpers.feature_stats(4)}, 0
    )


def use_calibrations(folder, file):
    """The exit, what fits two budgets, and a chunk computed with the exit."""
    checkpoint = Checkpoint(folder / file.partition("/")[0], "c")
    exit_ = load_exit(checkpoint, "fast")
    chosen = [str(within(checkpoint, ms)) for ms in (5.0, 100.0)]
    chunk = with_exits().act(helpers.observation(), exit_)
    return digest(chunk.actions, repr(exit_), chosen)


# -- results -----------------------------------------------------------------------------------------------------------------


def build_results(folder):
    episodes = [
        EpisodeResult("metaworld/drawer-open-v3", compute, seed, "open", seed != 1, None if seed == 1 else 9, 20, 3, 30, 60, 2)
        for compute in ("dense:2", "dense:4")
        for seed in range(4)
    ]
    times = Percentiles.of(np.arange(1.0, 9.0))
    parts, means = {"prefix": times, "other": times}, {"prefix": 4.5, "other": 4.5}
    latency = [Latency(compute, 8, times, parts, means, 9.0, 3.0, 2.0, 0.0) for compute in ("dense:2", "dense:4")]
    counted = results.count(episodes, latency, n_action_steps=4, max_steps=20, render="mujoco", solver_steps=2)
    made = results.Results(
        counted,
        results.Minutes(evaluate=1.0).summed(),
        {"vlaflow": "0"},
        "vlaflow eval",
        "runs/demo",
        "c",
        "a machine",
        results.pool(counted),
        results.compare(counted),
        tuple(latency),
    )
    results.write(made, folder / "results.json")


def use_results(folder, file):
    """All numbers, and the sentences about them."""
    found = results.read(folder / "results.json")
    said = [words.played(found), *words.too_few(found), words.step_limits(found.evaluations)]
    said += [words.percent(e.interval) + words.middle(e.first_success_steps) + words.short(e.env) for e in found.evaluations]
    said += [words.rate(each.successes, each.episodes) for each in found.overall]
    return digest(to_json(found), said)


# -- questions ---------------------------------------------------------------------------------------------------------------


def build_questions(folder):
    turns = [{"from": "human", "value": "<image>\nOpen?"}, {"from": "gpt", "value": "yes"}]
    records = [{"id": str(i), "image": "0.png", "conversations": turns, "kind": "state", "group": "a"} for i in range(3)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "list").mkdir()
    (folder / "list/questions.json").write_text(json.dumps(records))
    for name in ("0.png", "list/0.png"):
        (folder / name).write_bytes(b"")


def use_questions(folder, file):
    """Questions, answers, and which are held out."""
    root = folder / "list" if file.startswith("list/") else folder
    found = VqaDataset.open(root)
    return digest([vars(question) for question in found.questions], found.split(0.4), found.fingerprint)


# -- messages ----------------------------------------------------------------------------------------------------------------


def build_message(folder):
    seen = helpers.observation()

    def array(value):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": list(value.shape)}

    message = {
        "observation/image": array(seen.images["image"]),
        "observation/state": array(seen.state),
        "prompt": seen.instruction,
        "seed": 3,
        "deadline_ms": 1e6,
        "action_prefix": array(np.zeros((2, 4), np.float32)),
        "inference_delay": 1,
        "action_spec": to_json(helpers.action_spec().with_chunk_size(6)),
    }
    (folder / "message.msgpack").write_bytes(msgpack.packb(message))


def of_message(file, inside):
    """Strategy: damages of the fields of a message, and of its bytes."""
    document = msgpack.unpackb(inside, strict_map_key=False)
    place = st.sampled_from([list(each) for each in damage.places(document)])
    fields = st.tuples(st.just(file), st.just("set"), place, st.one_of(damage.values, st.binary(max_size=20)))
    return st.one_of(fields, fields, damage.of_bytes(file, inside))


def damaged_message(inside, hurt):
    if hurt[1] != "set":
        return damage.damaged(inside, hurt)
    document, path = msgpack.unpackb(inside, strict_map_key=False), hurt[2]
    value = hurt[3] if isinstance(hurt[3], bytes) else damage.real(hurt[3])
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        value = float(min(value, 10**300))
    if not path:
        document = value
    else:
        at = document
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
    try:
        return msgpack.packb(document, unicode_errors="surrogatepass")
    except (ValueError, OverflowError):  # nested too deep for the packer, or a number too large
        return b"\x91" * 1000 + b"\xc0"


@cache
def server():
    place = choose("metaworld", ("image",))
    return PolicyServer(with_exits(), Dense(2), ServerConfig(**place, port=0, warm_up=0))


def use_message(folder, file):
    """The chunk that the server would answer with."""
    frame = (folder / file).read_bytes()
    asked = OpenpiConversation(server())._read(frame, RequestEntry("fuzz", 1, 0.0))
    if isinstance(asked, bytes | str):
        return "reset"
    generator = torch.Generator().manual_seed(int(asked.seed or 0))
    chunk = server().policy.act(asked.observation, Dense(2), generator=generator, action_prefix=asked.action_prefix)
    return digest(chunk.actions)


KINDS = {
    "dataset": Kind(build_datasets, use_dataset, frozenset({"names"}), ("v21/*.mp4", "v21/*.parquet"), others=True),
    "checkpoint": Kind(build_checkpoint, use_checkpoint),
    "calibration": Kind(build_calibrations, use_calibrations),
    "results": Kind(build_results, use_results, frozenset({"versions"})),
    "questions": Kind(build_questions, use_questions, frozenset({"id", "image"}), others=True),
    "message": Kind(build_message, use_message, unsealed=("*.msgpack",)),
}


@dataclass
class Site:
    """A sound input in a folder, which is damaged and restored.

    Args:
        kind: of the input.
        folder: where it lies.
    """

    kind: Kind
    folder: Path

    def __post_init__(self):
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.kind.build(self.folder)
        self.files = content(self.folder)
        self.sound = {}

    def use(self, file):
        return self.kind.use(self.folder, file)

    def expected(self, file):
        """The digest of the sound input, as far as the file matters to it."""
        root = file.partition("/")[0]
        if root not in self.sound:
            self.sound[root] = self.use(file)
        return self.sound[root]


def for_damages(site, count, number):
    """A decorator: the function is called for so many damages of a site, the same ones for the same number."""
    chosen = settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    return lambda function: seed(number)(chosen(given(damages(site.files))(function)))
