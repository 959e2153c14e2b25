"""Runs by recipe, in this process and in others: killed, ended by a signal, continued; the rater on a frozen policy."""

import os
import random
import shutil
import signal
import time
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from safetensors.torch import load_file

from tests.training import ranks
from tests.training.small import weights
from vlaflow.cli import train as command
from vlaflow.cli.main import main
from vlaflow.data.lerobot import Dataset
from vlaflow.errors import CheckpointError, ConfigError, SpecError
from vlaflow.flows.sampling import Sampling
from vlaflow.policies.base import Policy
from vlaflow.policies.provenance import newest_state
from vlaflow.policies.rater_stage import RaterStage
from vlaflow.training.metrics_log import read_log

SMALL = ("width=32", "depth=1", "heads=2", "ffn=64", "image_size=32", "text_bytes=32")
STEPS = 60


def arguments(dataset, out, *more):
    small = [word for value in SMALL for word in ("--set", f"policy.backbone.{value}")]
    small += ["--set", "policy.exits=none"]
    small += ["--set", "precision=fp32"]  # "auto" measures, and two processes may come to two formats
    own = ["--steps", str(STEPS), "--batch-size", "4", "--set", "checkpoint_every=7", "--set", "optim.warmup_steps=5"]
    places = ["--dataset", str(dataset), "--out", str(out)]
    return ["asyncvla.demo", *places, *own, *small, "--set", "validate_every=25", "--tracker", "none", "--no-calibrate", *more]


def run_command(words, said):
    with said.open("w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        status = main(["train", *words])
    raise SystemExit(status)


def start(dataset, out):
    """The command in a process of its own, once it has taken its first step; what it says is in a file next to ``out``."""
    process = ranks.forked().Process(target=run_command, args=(arguments(dataset, out), out.with_suffix(".txt")))
    process.start()
    log = out / "training/log.jsonl"
    while process.is_alive() and not (log.exists() and log.stat().st_size):
        time.sleep(0.002)
    return process


def end(process, number):
    """Send it a signal; returns its exit status."""
    os.kill(process.pid, number)
    process.join(60)
    return process.exitcode


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """A run that nobody interrupted."""
    out = tmp_path_factory.mktemp("trained") / "policy"
    assert command.main(arguments(dataset, out)) == 0
    return out


def same_end(a, b):
    """Policy and training state are the same bytes."""
    names = ["model.safetensors", *(f"training/step-{STEPS:06d}/{n}.safetensors" for n in ("weights", "average", "optimizer"))]
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def test_a_killed_run_continues_to_the_same_bytes(trained, dataset, tmp_path):
    """SIGKILL at a random instant, also in the middle of writing a checkpoint; printed so that a failure can be repeated."""
    for attempt in range(10):
        out = tmp_path / f"killed{attempt}"
        process, delay = start(dataset, out), random.uniform(0, 0.4)
        time.sleep(delay)
        if process.is_alive():
            status = end(process, signal.SIGKILL)
            break
    print(f"killed after {delay:.4f} s, newest state {newest_state(out)}")  # noqa: T201
    assert status == -signal.SIGKILL
    if (out / "config.json").exists():
        Policy.from_pretrained(out)
    assert command.main(arguments(dataset, out)) == 0
    assert same_end(trained, out)
    assert [entry["step"] for entry in read_log(out)] == list(range(1, STEPS + 1))


def test_sigterm_saves_says_how_to_go_on_and_exits_0(trained, dataset, tmp_path):
    out = tmp_path / "ended"
    process = start(dataset, out)
    status, said = end(process, signal.SIGTERM), out.with_suffix(".txt").read_text()
    assert status == 0, said
    step = read_log(out)[-1]["step"]
    assert step < STEPS
    assert f"Stopped by SIGTERM after step {step} of {STEPS}" in said
    assert "Run the same command again" in said
    assert newest_state(out)[0] == step
    assert command.main(arguments(dataset, out)) == 0
    assert same_end(trained, out)


def test_control_c_saves_and_exits_130(dataset, tmp_path):
    out = tmp_path / "ended"
    process = start(dataset, out)
    status, said = end(process, signal.SIGINT), out.with_suffix(".txt").read_text()
    assert status == 130, said
    assert "Stopped by SIGINT" in said
    assert newest_state(out) is not None


def test_the_card_says_what_it_is_and_how_to_repeat_it(trained):
    card = Policy.from_pretrained(trained).card
    for part in ("test arm", "x (m, delta)", "asyncvla.demo", f"Steps: {STEPS} of 4", "push the puck", "torch 2", "held out"):
        assert part in card


def test_the_rater_leaves_the_policy_untouched_to_the_bit(trained, dataset, tmp_path):
    out = tmp_path / "rated"
    places = ["--policy", str(trained), "--dataset", str(dataset), "--out", str(out)]
    assert (
        command.main(["asyncvla.rater", *places, "--steps", "3", "--batch-size", "4", "--tracker", "none", "--no-calibrate"])
        == 0
    )
    before, after = load_file(trained / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == {"rater"}
    state = load_file(out / "training/step-000003/optimizer.safetensors")
    assert state
    policy = Policy.from_pretrained(out)
    assert policy.model.rater is not None
    assert "Training of the policy" in policy.card
    assert "Training of the confidence rater" in policy.card


def test_a_rater_of_absolute_errors_keeps_their_scale(trained, dataset, tmp_path):
    """It is measured where it is not stated, and stated without absolute labels it is refused."""
    places = ["--policy", str(trained), "--dataset", str(dataset), "--out", str(tmp_path / "rated"), "--tracker", "none"]
    few = ["--steps", "1", "--batch-size", "4", "--no-calibrate", "--set", "sampling.steps=1"]
    with pytest.raises(ConfigError, match="add --set labels=absolute"):
        command.main(["asyncvla.rater", *places, *few, "--set", "rater.error_scale=0.1"])
    assert command.main(["asyncvla.rater", *places, *few, "--set", "labels=absolute"]) == 0
    assert Policy.from_pretrained(tmp_path / "rated").config.rater.error_scale > 0


def test_the_raters_backbone_gets_no_gradient(trained, dataset):
    from tests.training.small import Memory
    from vlaflow.policies.asyncvla.policy import tiny_rater

    policy = Policy.from_pretrained(trained)
    policy = policy.with_rater(tiny_rater(policy.config), 0)
    batch = Memory().batch(torch.arange(4).numpy())
    batch = type(batch)(
        batch.observation, batch.action_BLD.repeat(1, 4, 1), batch.valid_BL.repeat(1, 4), batch.episode_B, batch.frame_B
    )
    stage = RaterStage(policy, Sampling(2))
    ready = stage.prepare(batch)
    stage.loss(ready, stage.draw(ready, torch.Generator().manual_seed(0), torch.Generator())).total.backward()
    assert all(p.grad is None for p in policy.model.backbone.parameters())
    assert all(p.grad is None for p in policy.model.decoder.parameters())
    assert all(p.grad is not None for p in policy.model.rater.parameters())


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (["--policy", "nowhere"], ConfigError, "starts from scratch; leave --policy out"),
        (["--set", "optim.lerning_rate=1"], ConfigError, "did you mean 'learning_rate'"),
        (["--set", "steps"], ConfigError, "--set takes KEY=VALUE"),
        (["--set", 'policy.backbone.views=["frrnt"]'], SpecError, "frrnt"),
    ],
)
def test_wrong_arguments_are_one_sentence(dataset, tmp_path, change, kind, message):
    with pytest.raises(kind, match=message):
        command.main([*arguments(dataset, tmp_path / "p"), *change])


def test_a_folder_that_cannot_be_made_is_said_before_a_frame_is_decoded(dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "dataset", ignore=shutil.ignore_patterns(".cache"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be created \(.*is a file\)\. Choose another --out"):
        command.main(arguments(copy, tmp_path / "file/p"))
    assert not (copy / ".cache").exists()


def test_a_rater_needs_a_policy(dataset, tmp_path):
    with pytest.raises(ConfigError, match="name its checkpoint with --policy"):
        command.main(["asyncvla.rater", "--dataset", str(dataset), "--out", str(tmp_path / "p")])
    with pytest.raises(CheckpointError, match="nowhere"):
        command.main(["asyncvla.rater", "--dataset", str(dataset), "--out", str(tmp_path / "p"), "--policy", "nowhere/at/all"])


def test_a_rater_refuses_another_robots_data(trained, dataset, tmp_path, monkeypatch):
    opened = Dataset.open(dataset)
    other = type(opened.action_spec)(**{**vars(opened.action_spec), "robot": "other arm"})
    monkeypatch.setattr(Dataset, "open", classmethod(lambda cls, root, **_: opened))
    opened.action_spec = other
    with pytest.raises(SpecError, match="robot is 'test arm' in the first and 'other arm' in the second"):
        command.main(
            ["asyncvla.rater", "--dataset", str(dataset), "--out", str(tmp_path / "p"), "--policy", str(trained)],
        )


def test_the_same_command_gives_the_same_bytes(trained, dataset, tmp_path):
    assert command.main(arguments(dataset, tmp_path / "again")) == 0
    assert weights(tmp_path / "again") == weights(trained)
