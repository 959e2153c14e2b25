"""Every command that writes, with arguments small enough to try it hundreds of times.

A command runs in a copy of the folder that ``stock`` fills: a data set, a checkpoint, questions, a latent action model, shards.
"""

import importlib
import os
import pkgutil
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

import vlaflow
from tests.crashes.faults import attempt
from tests.training import flybot
from tests.training.small import write_questions
from vlaflow.actions.latent import LatentActionModel, Origin
from vlaflow.cli.main import main

ENV = ("--env", "obstacle/pass-v0")
SMALL = {
    "policy.backbone.image_size": 32,
    "policy.backbone.cell": 16,
    "policy.backbone.width": 16,
    "policy.backbone.heads": 2,
    "policy.backbone.ffn": 16,
    "policy.backbone.depth": 2,
    "policy.backbone.text_bytes": 96,
    "policy.backbone.answers": "true",
    "policy.decoder.chunk_size": 4,
    "policy.decoder.noise_samples": 1,
    "policy.n_action_steps": 2,
    "policy.exits.depths": "[1,2]",
    "policy.decoder.expert.block.width": 16,
    "policy.decoder.expert.block.heads": 2,
    "policy.decoder.expert.block.kv_heads": 2,
    "policy.decoder.expert.block.head_dim": 8,
    "policy.decoder.expert.block.ffn": 16,
    "global_batch_size": 4,
    "checkpoint_every": 1,
    "validate_every": 2,
    "validation_fraction": 0.5,
}
TRAIN = ("train", "a1.demo", "--dataset", "set", "--steps", "2", "--no-calibrate")
TRAIN += tuple(word for key, value in SMALL.items() for word in ("--set", f"{key}={value}"))
EVAL = ("eval", "policy", *ENV, "--episodes", "2", "--max-steps", "6", "--workers", "0", "--batch", "1")


@dataclass(frozen=True)
class Command:
    """A command that writes.

    Args:
        words: its arguments.
        out: what it makes, file or folder.
        journals: pattern of the files that it appends to, by their relative path.
        timed: pattern of the files that contain measured times in text; only that they exist is compared.
        stub: called before it, in its own process: replaces what takes long and writes nothing.
    """

    words: tuple[str, ...]
    out: str = "out"
    journals: str = "$^"
    timed: str = r"\.html$"
    stub: object = None

    def run(self):
        """Run it in this process; returns the exit status."""
        sys.argv = ["vlaflow", *self.words]
        Figure.savefig = _draw_nothing
        if self.stub is not None:
            self.stub()
        return main(list(self.words))


def _draw_nothing(figure, stream, **options):
    """Plots take seconds, and are in memory until they are written."""
    stream.write("<svg></svg>" if options["format"] == "svg" else b"PNG")


def _without_compiler():
    """Programs whose content does not matter, in a moment."""
    from vlaflow.engine import aoti, store
    from vlaflow.engine.store import Speed
    from vlaflow.policies import deployment

    os.environ["XDG_CACHE_HOME"] = str(Path.cwd() / "out")
    aoti.require_compiler = lambda: None
    aoti.build = lambda program, file, tuned: file.write_bytes(str(program.key).encode())
    aoti.load = lambda file: None
    store._require_private = lambda *places: None
    deployment._compared = lambda *given: Speed(1.0, 2.0, 0.0)


def _short_demo():
    """Steps that are over at once; its results are those of the stock."""
    from vlaflow.cli import demo
    from vlaflow.evaluation.prepared import RESULTS
    from vlaflow.outputs import write_text

    def results(settings, protocol, checkpoint, out, workers):
        write_text(out / RESULTS, Path("results", RESULTS).read_text())

    for step in ("_record", "_train", "_sampler", "_calibrate"):
        setattr(demo, step, lambda *given, **settings: None)
    demo._evaluate = results


def _short_claims():
    """Steps that are over at once, and a verdict on nothing."""
    from vlaflow.claims import row
    from vlaflow.cli import reproduce
    from vlaflow.outputs import write_text
    from vlaflow.reports import claims

    def nothing(claim, places, *, hours, commands):
        return row.Row(claim.name, "not seen", (), (), (), places.size, "", hours, "", commands, "", {})

    def page(claim, row, places):
        write_text(places.page(claim), "")
        return places.page(claim)

    reproduce._run = lambda words: None
    row.conclude, claims.write_page = nothing, page
    reproduce.arms_table = lambda row: ""


def _without_server():
    """Episodes that nobody plays, for a server that nobody runs."""
    from vlaflow.evaluation import realtime
    from vlaflow.robot import client

    class Client:
        metadata = dict.fromkeys(("system", "compute", "compute_settings", "guided", "checkpoint", "fingerprint", "dtype"), "")
        metadata["n_action_steps"] = 2

        def __init__(self, *given):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    def evaluate(server, jobs, config, *, token, workers, finished):
        for number, job in enumerate(jobs):
            outcome = (True, 3, 5, 2, 0, 0, 0, 1, 0.1, 0.1)
            finished(number, realtime.RealtimeEpisode(job.env, job.mode, job.delay_ms, job.seed, *outcome))

    client.Client, realtime.evaluate = Client, evaluate


COMMANDS = {
    "record": Command(("record", *ENV, "--episodes", "2", "--size", "16", "--workers", "0", "--out", "out")),
    "train": Command((*TRAIN, "--tracker", "none", "--out", "out"), journals=r"log\.jsonl$"),
    "train, with TensorBoard": Command((*TRAIN, "--tracker", "tensorboard", "--out", "out"), journals=r"log\.jsonl$|tfevents"),
    "train, with calibration": Command(
        (*(word for word in TRAIN if word != "--no-calibrate"), "--tracker", "none", "--out", "out"), journals=r"log\.jsonl$"
    ),
    "calibrate": Command(("calibrate", "policy", "--dataset", "set", "--frames", "8", "--name", "x"), out="policy/calibration"),
    "calibrate --sampler": Command(
        (
            "calibrate",
            "policy",
            "--dataset",
            "set",
            "--frames",
            "8",
            "--sampler",
            "--compute",
            "dense:1",
            "--compute",
            "dense:2",
        ),
        out="policy/calibration",
    ),
    "calibrate --sampler --env": Command(
        (
            *("calibrate", "policy", "--dataset", "set", "--frames", "8", "--sampler", "--compute", "dense:1"),
            *("--compute", "dense:2", *ENV, "--rollouts", "4", "--workers", "0"),
        ),
        out="policy/calibration",
        journals=r"episodes\.jsonl$",
    ),
    "bench": Command(("bench", "latency", "policy", "--rounds", "20"), out="policy/latency.json", timed=r"latency\.json$"),
    "deploy": Command(("deploy", "policy", "--compute", "dense"), stub=_without_compiler),
    "eval": Command((*EVAL, "--compute", "dense:1", "--out", "out"), journals=r"episodes\.jsonl$"),
    "eval --shard": Command((*EVAL, "--shard", "1/2", "--out", "out"), journals=r"shard-1-of-2\.jsonl$", timed=r"\.jsonl$"),
    "merge": Command(("merge", "shards", "--workers", "0"), out="shards"),
    "eval-vqa": Command(
        ("eval-vqa", "policy", "--vqa", "questions", "--part", "all", "--out", "out"), journals=r"answers\.jsonl$"
    ),
    "eval-realtime": Command(
        ("eval-realtime", *ENV, "--episodes", "1", "--out", "out"), journals=r"episodes\.jsonl$", stub=_without_server
    ),
    "record-vqa": Command(
        ("record-vqa", "--env", "metaworld/drawer-open-v3", "--episodes", "2", "--workers", "0", "--size", "32", "--out", "out")
    ),
    "export": Command(("export", "lerobot", "policy", "--out", "out")),
    "demo": Command(("demo", "--quick", "--out", "out"), stub=_short_demo),
    "reproduce": Command(("reproduce", "C6", "--quick", "--out", "out"), timed=r"\.html$|steps\.json$", stub=_short_claims),
    "data show": Command(("data", "show", "set", "--out", "out.html"), out="out.html"),
    "data show, as a picture": Command(("data", "show", "set", "--out", "out.png"), out="out.png"),
    "data spec": Command(("data", "spec", "set", "--out", "out.json"), out="out.json"),
    "data repair": Command(("data", "repair", "set", "--out", "out")),
    "data drop": Command(("data", "drop", "set", "--episodes", "0", "--out", "out")),
    "data merge": Command(("data", "merge", "set", "set", "--out", "out")),
    "data rename": Command(("data", "rename", "set", "--camera", "above=top", "--out", "out")),
    "data fit-tokenizer": Command(
        ("data", "fit-tokenizer", "set", "--out", "out.json", "--kind", "bins", "--chunk-size", "4"), out="out.json"
    ),
    "data tokenizer-report": Command(
        ("data", "tokenizer-report", "set", "--out", "out.html", "--chunk-size", "4"), out="out.html"
    ),
    "data latent-report": Command(("data", "latent-report", "latent", "--dataset", "set", "--out", "out.html"), out="out.html"),
}
TIMES = {"seconds", "minutes", "hours", "latency", "latency_ms", "samples_per_second", "measured", "p50", "p99"}
"""Measured times, by their keys in JSON."""


def warm_up():
    """Import what the commands import, once for all forks."""
    import accelerate.tracking
    import matplotlib.pyplot
    import torch.utils.tensorboard

    for module in pkgutil.walk_packages(vlaflow.__path__, "vlaflow."):
        if not re.search(r"__main__|libero|openvino|metaworld", module.name):
            importlib.import_module(module.name)
    for each in (accelerate.tracking, matplotlib.pyplot, torch.utils.tensorboard):
        assert each


def stock(folder, *, results=True):
    """Fill a folder with what the commands read; ``demo`` needs ``results`` when it comes to its end."""
    evaluation = [Command((*EVAL, "--compute", "dense:1", "--no-videos", "--out", "results"))] if results else []

    def build():
        for command in (
            Command(("record", *ENV, "--episodes", "4", "--size", "32", "--workers", "0", "--out", "set")),
            Command((*TRAIN, "--tracker", "none", "--out", "policy")),
            Command((*EVAL, "--compute", "dense:1", "--shard", "1/1", "--out", "shards")),
            *evaluation,
        ):
            if status := command.run():
                return status
        write_questions(Path("questions"))
        LatentActionModel.create(flybot.SMALL, Origin("", "above", 10.0, 0.2, 2), 0).eval().save_pretrained("latent")
        return 0

    found = attempt(build, folder)
    assert found.status == 0, found.err
    return folder


def fresh_copy(source, place):
    """The folder in which a command runs."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source, place)
    return place
