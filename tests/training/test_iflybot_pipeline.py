"""iFlyBot-VLA's stages as one command: interrupted, continued, restarted, asked questions, and refused."""

import json
import os
import shutil
import signal
import sys

import pytest

from tests.data.cases.build import renamed
from tests.training import flybot
from tests.training.flybot import STAGES, break_down, folder_of, same
from tests.training.small import write_dataset, write_questions
from vlaflow.actions.latent import LatentActionModel
from vlaflow.cli import train as command
from vlaflow.compute.dense import Dense
from vlaflow.errors import CapabilityError, ConfigError, VlaflowError
from vlaflow.evaluation.check_policy import fake_observations
from vlaflow.policies.base import Policy
from vlaflow.policies.provenance import newest_state, run_of
from vlaflow.training.metrics_log import read_log


def test_the_stages_lie_where_they_belong_and_each_learned_from_the_one_before(whole, capsys, dataset):
    model = LatentActionModel.from_pretrained(whole / "latent")
    for stage in STAGES:
        run = json.loads((newest_state(folder_of(whole, stage))[1] / "state.json").read_text())["run"]
        assert run["recipe"] == f"iflybot.{stage}"
        assert run.get("latent") == (None if stage == "latent" else model.fingerprint())
    assert Policy.from_pretrained(whole).card.startswith(Policy.from_pretrained(whole / "joint").card.rstrip())
    policy = Policy.from_pretrained(whole)
    assert policy.act(fake_observations(policy, 1)[0], Dense(5)).actions.shape == (16, 2)
    assert command.main(flybot.demo(dataset, whole)) == 0
    assert capsys.readouterr().out.rstrip().endswith(str(whole))


def test_a_pipeline_that_broke_down_in_every_stage_continues_where_it_was(whole, dataset, tmp_path, cut):
    out = tmp_path / "cut"
    for stage in STAGES:
        begun = cut(f"iflybot.{stage}", 3, break_down)
        with pytest.raises(RuntimeError, match="cut"):
            command.main(flybot.demo(dataset, out))
    cut(None, None, break_down)
    assert command.main(flybot.demo(dataset, out)) == 0
    assert begun == [(f"iflybot.{stage}", step) for stage in STAGES for step in (0, 1, 2, 3, 2, 3)]
    assert all(same(folder_of(whole, stage), folder_of(out, stage)) for stage in STAGES)


@pytest.mark.parametrize("step", [1, 3])
def test_a_signal_ends_the_pipeline_in_its_stage(whole, dataset, tmp_path, cut, capsys, step):
    """Also in the stage's last step, when there is nothing of that stage left to cut short."""
    out = tmp_path / "ended"
    begun = cut("iflybot.joint", step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert command.main(flybot.demo(dataset, out)) == 0
    said = capsys.readouterr().out
    assert "Stopped by SIGTERM after step" in said
    assert "Run the same command again" in said
    assert {recipe for recipe, _ in begun} == {"iflybot.latent", "iflybot.joint"}
    assert not (out / "config.json").exists()
    cut(None, None, break_down)
    assert command.main(flybot.demo(dataset, out)) == 0
    assert same(whole, out)


def test_a_signal_in_the_very_last_step_changes_nothing(whole, dataset, tmp_path, cut, capsys):
    out = shutil.copytree(whole, tmp_path / "demo")
    for left in (out / "config.json", out / "training"):
        left.unlink() if left.is_file() else shutil.rmtree(left)
    cut("iflybot.fine", 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert command.main(flybot.demo(dataset, out)) == 0
    assert "Trained 4 steps" in capsys.readouterr().out
    assert same(whole, out)


def test_a_fresh_start_of_a_pipeline_keeps_nothing_and_loses_nothing(whole, dataset, tmp_path, cut, capsys):
    """The old checkpoints of all stages are moved aside together: a finished run's, then one's that was cut in stage one."""
    out = shutil.copytree(whole, tmp_path / "demo")
    cut("iflybot.latent", 3, break_down)
    with pytest.raises(RuntimeError, match="cut"):
        command.main(flybot.demo(dataset, out, "--fresh"))
    cut(None, None, break_down)
    assert command.main(flybot.demo(dataset, out, "--fresh")) == 0
    said = capsys.readouterr().err
    for number, held in ((1, STAGES), (2, STAGES[:1])):
        aside = tmp_path / f"demo.before-{number}"
        assert f"The old checkpoints are now in {aside}" in said
        assert [stage for stage in STAGES if newest_state(folder_of(aside, stage))] == list(held)
    assert all(same(folder_of(whole, stage), folder_of(out, stage)) for stage in STAGES)
    begun = cut(None, None, break_down)
    begun.clear()
    assert command.main(flybot.demo(dataset, out)) == 0
    assert not begun


def test_questions_reach_the_stages_that_have_words(dataset, tmp_path):
    root = write_questions(tmp_path / "vqa")
    shares = flybot.sets(("joint.vqa.share=0.5", "fine.vqa.share=0.5"))
    assert command.main(flybot.demo(dataset, tmp_path / "p", "--vqa", str(root), *shares)) == 0
    asked = {stage: sum("answer_loss" in e for e in read_log(folder_of(tmp_path / "p", stage))) for stage in STAGES}
    assert asked == {"latent": 0, "joint": 2, "fine": 2}
    alone = flybot.sets(("joint.vqa.share=0.5", "fine.vqa=none"))
    assert command.main(flybot.demo(dataset, tmp_path / "q", "--vqa", str(root), *alone)) == 0
    assert not any("answer_loss" in entry for entry in read_log(tmp_path / "q"))
    assert (tmp_path / "q/joint/model.safetensors").read_bytes() == (tmp_path / "p/joint/model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="learns from video alone; leave --vqa"):
        command.main(["iflybot.latent", *flybot.places(dataset, tmp_path / "l", "--vqa", root)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["joint.policy.backbone.answers=false"], r"no language-model head.*answers=true"),
        (["joint.policy.backbone.text_bytes=8"], r"has 15 bytes, the policy takes at most 8"),
    ],
)
def test_questions_that_do_not_fit_are_refused_before_anything_is_trained(dataset, tmp_path, change, message):
    root = write_questions(tmp_path / "vqa")
    with pytest.raises(VlaflowError, match=message):
        command.main(flybot.demo(dataset, tmp_path / "p", "--vqa", str(root), *flybot.sets(change)))
    with pytest.raises(VlaflowError, match=r"There is no .*nowhere"):
        command.main(flybot.demo(dataset, tmp_path / "p", "--vqa", str(tmp_path / "nowhere")))
    assert not (tmp_path / "p").exists()


def test_a_stage_may_name_no_codes(dataset, tmp_path):
    """The others still do."""
    assert command.main(flybot.demo(dataset, tmp_path / "p", "--set", "fine.policy.decoder.teaches=false")) == 0
    assert set(read_log(tmp_path / "p")[-1]["parts"]) == {"velocity"}
    assert "latent" in read_log(tmp_path / "p/joint")[-1]["parts"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--steps", "5"],
            r"'steps' names no stage of 'iflybot.demo', as --set fine\.steps=.* would .*its stages: latent, joint, fine",
        ),
        (["--batch-size", "5"], r"as --set fine\.global_batch_size=\.\.\. would \(also in place of --steps and --batch-size\)"),
        (["--set", "jiont.steps=5"], r"'jiont.steps' names no stage of .*; did you mean 'joint'\?"),
        (["--set", "latent=none"], "'latent' names no stage"),
        (["--set", "fine.stpes=5"], "Unknown key 'stpes' in --set; did you mean 'steps'"),
        (["--set", "fine.policy.decoder.fsat=none"], "did you mean 'fast'"),
        (["--set", "latent.model.book=16"], r"8 codes of a book of 16, .*--set joint\.policy\.decoder\.latent\.codes=8"),
        (["--hold-out-task", "push the pucl"], "no episode of the task 'push the pucl'.*did you mean 'push the puck'"),
        (["--set", 'fine.hold_out_tasks=["push the pucl"]'], "no episode of the task 'push the pucl'"),
        (["--set", "fine.chunk_s=0.5"], r"fine\.chunk_s=0\.5 has no effect\. .*all stages: --chunk-seconds 0\.5"),
        (["--set", "latent.chunk_s=0.5"], "has no chunks.*leave out --chunk-seconds"),
        (
            ["--set", "fine.policy.action_normalisation=identity"],
            r"fine\.policy\.action_normalisation is 'identity', but the policy of the stage before was trained with",
        ),
        (
            flybot.sets(("fine.policy.decoder.flow.chunk_size=8", "fine.policy.decoder.fast=none")),
            "makes chunks of 8 actions, but the policy of the stage before was trained with 16",
        ),
        (
            ["--set", "fine.normalisation.dataset.action_clip=1"],
            "The policy of the stage before keeps how its robots are normalised",
        ),
        (
            ["--set", "fine.policy.backbone.ffn=96"],
            r"networks of 'fine' are not those of the stage before \(backbone\.\S+: .*96, and .*64 there\).*--set fine\.policy",
        ),
        (["--set", "fine.policy.decoder.fast=none"], r"networks of 'fine' are not .*\(decoder\.fast\.\S+: none, and "),
        (["--latent", "runs/latent"], "trains a latent action model of its own; leave --latent out"),
        (["--policy", "runs/policy"], "starts from scratch; leave --policy out"),
    ],
)
def test_mistakes_are_answered_before_anything_is_trained(dataset, tmp_path, more, message):
    with pytest.raises(VlaflowError, match=message):
        command.main(flybot.demo(dataset, tmp_path / "p", *more))
    assert not (tmp_path / "p").exists()


def test_data_sets_that_cannot_be_mixed_are_refused_before_anything_is_trained(dataset, tmp_path):
    other = write_dataset(tmp_path / "other")
    for more, message in (
        ([f"{other}:0.5"], "has no weight, but others have"),
        ([str(other), "--mixture", "all"], "no mixture"),
    ):
        with pytest.raises(ConfigError, match=message):
            command.main(flybot.demo(dataset, tmp_path / "p", "--dataset", *more))
    assert not (tmp_path / "p").exists()


def test_what_is_said_of_the_data_holds_for_all_stages(dataset, tmp_path):
    """The task is new to every stage, and only policies have chunks."""
    said = ["--hold-out-task", "push the puck", "--frames", "jpeg", "--chunk-seconds", "0.5", "--set", "seed=3"]
    assert command.main(flybot.demo(dataset, tmp_path / "p", *said, "--set", "latent.seed=4")) == 0
    configs = [run_of(folder_of(tmp_path / "p", stage))["config"] for stage in STAGES]
    assert [config["hold_out_tasks"] for config in configs] == [["push the puck"]] * 3
    assert [config["frames"] for config in configs] == ["jpeg"] * 3
    assert [config["chunk_s"] for config in configs] == [None, 0.5, 0.5]
    assert [config["seed"] for config in configs] == [4, 3, 3]
    assert Policy.from_pretrained(tmp_path / "p").chunk_size == 5


def test_a_pipeline_that_is_continued_reads_its_data_as_it_began(dataset, tmp_path, cut):
    """Also in the stages that had not begun."""
    shutil.copytree(dataset, tmp_path / "theirs")
    renamed(tmp_path / "theirs", action="actions")
    cut("iflybot.latent", 3, break_down)
    given = flybot.demo(tmp_path / "theirs", tmp_path / "p")
    with pytest.raises(RuntimeError, match="cut"):
        command.main([*given, "--key", "action=actions", "--view", "top=front"])
    cut(None, None, break_down)
    assert command.main(given) == 0
    assert list(Policy.from_pretrained(tmp_path / "p").views) == ["top"]


def test_a_folder_of_another_recipe_is_refused_before_anything_is_trained(dataset, joint, tmp_path):
    with pytest.raises(ConfigError, match=r"holds a checkpoint of iflybot.joint, where that of iflybot.fine is to be"):
        command.main(flybot.demo(dataset, joint))
    assert not (joint / "latent").exists()


def test_a_package_that_a_later_stage_needs_is_asked_for_before_anything_is_trained(dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(CapabilityError, match=r"stage 'joint' .* 'tokenizers', .* pip install 'vlaflow\[tokens\]'"):
        command.main(flybot.demo(dataset, tmp_path / "p"))
    assert not (tmp_path / "p").exists()
