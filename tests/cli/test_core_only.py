"""Every command, installed without extras, answers with its work or with one sentence that names the extra it needs."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.evaluation.conftest import make_policy
from tests.training import flybot
from tests.training.small import SPEC, tiny_policy, tiny_stats, write_dataset, write_questions
from vlaflow.cli import data
from vlaflow.cli.main import COMMANDS
from vlaflow.decoders.exits import ExitTraining
from vlaflow.policies.base import Policy

HERE = Path(__file__).parent
ENV = ("--env", "metaworld/drawer-open-v3")
WORKS = ""
CASES = {
    "version": (["--version"], WORKS),
    **{f"help of {name}": ([name, "--help"], WORKS) for name in COMMANDS},
    "demo": (["demo", "--out", "OUT/demo", "--quick"], "demo"),
    "record": (["record", *ENV, "--out", "OUT/record", "--episodes", "1"], "metaworld"),
    "record questions": (["record-vqa", *ENV, "--out", "OUT/record-vqa", "--episodes", "1"], "metaworld"),
    "train": (["train", "asyncvla.demo", "--dataset", "DATA", "--out", "OUT/policy", "--steps", "1"], "train"),
    "plan": (["plan", "asyncvla.demo"], WORKS),
    "train tokens": (["train", "dfm_vla.demo", "--dataset", "DATA", "--out", "OUT/policy", "--steps", "1"], "train"),
    "train a rater": (["train", "asyncvla.rater", "--policy", "CKPT", "--dataset", "DATA", "--out", "OUT/rated"], "train"),
    "train a latent action model": (["train", "iflybot.latent", "--dataset", "DATA", "--out", "OUT/latent"], "train"),
    "train a pipeline": (["train", "iflybot.demo", "--dataset", "DATA", "--out", "OUT/iflybot"], "train"),
    "calibrate": (["calibrate", "CKPT", "--dataset", "DATA", "--episodes", "all", "--frames", "8"], "viz"),
    "time": (["bench", "latency", "CKPT", "--rounds", "20"], WORKS),
    "evaluate": (["eval", "ROBOT", *ENV, "--episodes", "1", "--out", "OUT/eval"], "viz"),
    "repair data": (["data", "repair", "DATA", "--out", "OUT/repaired"], WORKS),
    "drop episodes": (["data", "drop", "DATA", "--episodes", "0", "--out", "OUT/dropped"], WORKS),
    "merge data": (["data", "merge", "DATA", "DATA", "--out", "OUT/merged"], WORKS),
    "rename columns": (["data", "rename", "DATA", "--camera", "front=top", "--out", "OUT/renamed"], WORKS),
    "export": (["export", "lerobot", "CKPT", "--out", "OUT/exported"], WORKS),
    "list claims": (["reproduce", "--list"], WORKS),
    "test a claim": (["reproduce", "C2", "--out", "OUT/claims"], "demo"),
    "check a policy of the Hub": (["check", "policy", "owner/policy"], "hub"),
    "evaluate answers": (["eval-vqa", "CKPT", "--vqa", "QUESTIONS", "--out", "OUT/eval-vqa", "--part", "all"], WORKS),
    "serve": (["serve", "CKPT", "--port", "0"], "serve"),
    "evaluate in real time": (["eval-realtime", *ENV, "--out", "OUT/rollout"], "serve"),
    "deploy": (["deploy", "CKPT", "--engine", "openvino"], "openvino"),
    "check an environment": (["check", "env", "metaworld/drawer-open-v3"], "metaworld"),
    "check a policy": (["check", "policy", "CKPT"], WORKS),
    "check a policy's inputs": (["check", "inputs", "CKPT", "--dataset", "DATA", "--episodes", "all", "--frames", "8"], WORKS),
    "upload data": (["data", "push", "DATA", "owner/name"], "hub"),
    "check data of the Hub": (["data", "check", "owner/name"], "hub"),
    "reproduce a claim": (["reproduce", "C6", "--out", "OUT/claims"], "demo"),
    "merge an evaluation": (["merge", "OUT/eval"], "viz"),
    "check data": (["data", "check", "DATA"], WORKS),
    "build a frame cache": (["data", "cache", "DATA", "--size", "8", "--frames", "jpeg", "--shard", "1/2"], WORKS),
    "draft an action spec": (["data", "spec", "DATA", "--out", "OUT/spec.json"], WORKS),
    "show data": (["data", "show", "DATA"], WORKS),
    "show data on a page": (["data", "show", "DATA", "--out", "OUT/page.html"], "viz"),
    "fit FAST": (["data", "fit-tokenizer", "DATA", "--out", "OUT/fast.json", "--chunk-size", "4"], "tokens"),
    "fit bins": (["data", "fit-tokenizer", "DATA", "--out", "OUT/bins.json", "--chunk-size", "4", "--kind", "bins"], WORKS),
    "compare tokenizers": (["data", "tokenizer-report", "DATA", "--out", "OUT/tokens.html", "--chunk-size", "4"], "viz"),
    "report on latent actions": (["data", "latent-report", "LATENT", "--dataset", "DATA", "--out", "OUT/latent.html"], "viz"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """By case; one process for all of them, for it imports torch."""
    root = tmp_path_factory.mktemp("core")
    places = {name: root / name.lower() for name in ("DATA", "CKPT", "ROBOT", "QUESTIONS", "LATENT", "OUT")}
    write_dataset(places["DATA"])
    plain = tiny_policy(answers=True)
    config = replace(plain, backbone=replace(plain.backbone, depth=2), exits=ExitTraining((1, 2)))
    Policy.create(config, SPEC, tiny_stats(), 0).save_pretrained(places["CKPT"])
    make_policy(rater=False).save_pretrained(places["ROBOT"])
    write_questions(places["QUESTIONS"])
    flybot.write_latent(places["LATENT"])
    places["OUT"].mkdir()

    def located(word):
        head, slash, rest = word.partition("/")
        return f"{places[head]}{slash}{rest}" if head in places else word

    commands = [[located(word) for word in arguments] for arguments, _ in CASES.values()]
    command = [sys.executable, "-m", "tests.commands"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(HERE / "bare"), str(HERE.parents[1])))}
    lines = "".join(json.dumps(words) + "\n" for words in commands)
    done = subprocess.run(command, input=lines, env=environment, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


def test_every_command_is_tried():
    """Each command, and each of those of ``vlaflow data``, with arguments that it accepts."""
    tried = {
        " ".join(arguments[: 2 if arguments[0] == "data" else 1])
        for arguments, _ in CASES.values()
        if "--help" not in arguments
    }
    of_data = re.findall(r'tyro\.conf\.subcommand\("([\w-]+)"\)', Path(data.__file__).read_text(encoding="utf-8"))
    assert len(of_data) >= 6
    assert {*COMMANDS, *(f"data {name}" for name in of_data)} - {"data"} <= tried


@pytest.mark.parametrize("case", CASES)
def test_a_command_works_or_names_the_extra_in_one_sentence(outcomes, case):
    found, extra = outcomes[case], CASES[case][1]
    if extra is WORKS:
        assert found["status"] == 0, found["said"]
    else:
        assert found["status"] == 2, found["said"]
        assert f"pip install 'vlaflow[{extra}]'" in found["said"]
        assert len(found["said"].strip().splitlines()) == 1
