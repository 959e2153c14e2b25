"""iFlyBot-VLA's later stages: learned with a latent action model, continued from a checkpoint, and all as one command."""

import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.backbones.test_qwen2_5_vl import write_model
from tests.training import flybot
from tests.training.small import SPEC, Asked, Memory, tiny_stats, weights
from vlaflow.actions.latent import LatentActionModel
from vlaflow.backbones.qwen2_5_vl import PATCH, QwenConfig
from vlaflow.cli import train as command
from vlaflow.compute.dense import Dense
from vlaflow.data.lerobot import Dataset
from vlaflow.errors import CapabilityError, ConfigError, SpecError, VlaflowError
from vlaflow.evaluation.check_policy import check_policy, fake_observations
from vlaflow.nn.block import BlockConfig
from vlaflow.policies.base import Policy
from vlaflow.policies.iflybot.codes import model_pairs
from vlaflow.policies.iflybot.policy import qwen3b
from vlaflow.policies.provenance import newest_state
from vlaflow.policies.recipe import DataSpec
from vlaflow.policies.stages import AnsweringStage, PolicyStage
from vlaflow.training.journal import read_log
from vlaflow.training.trainer import Trainer

STAGES = ("latent", "joint", "fine")


def folder_of(out, stage):
    return out if stage == "fine" else out / stage


def same(a, b):
    """Weights and training state are the same bytes."""
    (step, state_a), (other, state_b) = newest_state(a), newest_state(b)
    files = sorted(f.name for f in state_a.glob("*.safetensors"))
    return (
        step == other
        and weights(a) == weights(b)
        and all((state_a / name).read_bytes() == (state_b / name).read_bytes() for name in files)
    )


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    return flybot.write_latent(tmp_path_factory.mktemp("flybot") / "latent")


@pytest.fixture(scope="module")
def joint(dataset, latent, tmp_path_factory):
    out = tmp_path_factory.mktemp("flybot") / "joint"
    assert command.main(flybot.joint(dataset, out, latent)) == 0
    return out


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """All three stages, and nobody interrupted them."""
    out = tmp_path_factory.mktemp("flybot") / "demo"
    assert command.main(flybot.demo(dataset, out)) == 0
    return out


@pytest.fixture
def cut(monkeypatch):
    """A run of a recipe breaks down before a step; returns the (recipe, step) of all steps begun."""
    begun, one_step = [], Trainer._one_step

    def at(recipe, step, how):
        def watched(self, stop):
            mine = (self.identity["recipe"], self.step)
            begun.append(mine)
            if mine == (recipe, step):
                how()
            return one_step(self, stop)

        monkeypatch.setattr(Trainer, "_one_step", watched)
        return begun

    return at


def break_down():
    raise RuntimeError("cut")


# -- latent codes in batches ---------------------------------------------------------------------------------------------------


def test_batches_carry_the_codes_of_the_frames_they_begin_at(dataset, latent, tmp_path, monkeypatch):
    """By episode and frame, encoded here pair by pair; unknown in the last frames, which begin no pair."""
    batches, loss = [], PolicyStage.loss
    monkeypatch.setattr(PolicyStage, "loss", lambda self, batch, *rest: batches.append(batch) or loss(self, batch, *rest))
    assert command.main(flybot.joint(dataset, tmp_path / "p", latent)) == 0
    model, opened = LatentActionModel.from_pretrained(latent), Dataset.open(dataset)
    pairs = model_pairs(model, opened)
    columns = opened.columns()
    known = {
        (int(columns.episode[row]), int(columns.frame[row])): model.codes(*pairs.frames(np.array([i])))[0].tolist()
        for i, row in enumerate(pairs.rows)
    }
    unknown = [-1] * model.config.codes
    seen = set()
    for batch in batches:
        for episode, frame, code in zip(batch.episode_B.tolist(), batch.frame_B.tolist(), batch.code_BK.tolist(), strict=True):
            length = opened.episodes[episode].length
            assert ((episode, frame) in known) == (frame < length - pairs.gap)
            assert code == known.get((episode, frame), unknown)
            seen.add((episode, frame))
    assert any(key not in known for key in seen)
    assert any(key in known for key in seen)


def test_two_processes_see_the_same_codes_and_train_together(together):
    """One makes the table of a cache that was empty, the other reads it; parameters without a gradient hold nobody up."""
    ranks = [load_file(together / f"flybot/rank-{rank}.safetensors") for rank in (0, 1)]
    assert torch.equal(ranks[0]["code_NK"], ranks[1]["code_NK"])
    opened = Dataset.open(together / "flybot/dataset")
    model = LatentActionModel.from_pretrained(together / "flybot/latent")
    pairs = model_pairs(model, opened)
    wanted = model.codes(*pairs.frames(np.arange(len(pairs))))
    assert torch.equal(ranks[0]["code_NK"][torch.from_numpy(pairs.rows)], wanted)
    assert [entry["step"] for entry in read_log(together / "flybot/policy")] == [1, 2, 3, 4]


def test_a_run_belongs_to_its_latent_action_model(dataset, latent, joint, tmp_path):
    other = flybot.write_latent(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=r"was trained with latent = "):
        command.main(flybot.joint(dataset, joint, other))
    assert command.main(flybot.joint(dataset, joint, latent)) == 0
    card = Policy.from_pretrained(joint).card
    assert f"- Latent actions: codes of latent, fingerprint {LatentActionModel.from_pretrained(latent).fingerprint()}" in card


@pytest.mark.parametrize(
    ("codes", "change", "message"),
    [
        (None, [], "learns to name latent actions; give it a latent action model with --latent"),
        ({"grid": (2, 2)}, [], r"has 4 codes of a book of 32, the decoder 8 of 32.*decoder.latent.codes=4"),
        ({"book": 16}, [], r"has 8 codes of a book of 16, the decoder 8 of 32.*decoder.latent.book=16"),
        ({}, ["policy.decoder.teaches=false"], "names no latent actions.*leave --latent out"),
        (
            None,
            ["policy.decoder.teaches=false", "policy.decoder.latent.answer=autoregressive"],
            "cannot be left untaught; use answer='parallel'",
        ),
    ],
)
def test_codes_that_do_not_fit_are_one_sentence(dataset, tmp_path, codes, change, message):
    model = None if codes is None else flybot.write_latent(tmp_path / "latent", **codes)
    with pytest.raises(ConfigError, match=message):
        command.main(flybot.joint(dataset, tmp_path / "p", model, *flybot.sets(change)))
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        (("sees=prefix+latent",), {}),
        (("latent.answer=autoregressive",), {}),
        (("latent.answer=autoregressive", "sees=prefix+latent", "truncate=false"), {}),
        (("fast=none",), {}),
        (("teaches=false",), None),
        (("latent.book=16",), {"book": 16}),
        (("latent.book=64",), {"book": 64}),
        (("latent.codes=4",), {"grid": (2, 2)}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
def test_every_variant_is_one_override_away_and_runs(dataset, tmp_path, change, codes):
    """A few steps, a checkpoint, and every promise of it kept."""
    model = None if codes is None else flybot.write_latent(tmp_path / "latent", **codes)
    changes = flybot.sets(change, "policy.decoder.")
    assert command.main(flybot.joint(dataset, tmp_path / "p", model, *changes, "--set", "steps=2")) == 0
    parts = read_log(tmp_path / "p")[-1]["parts"]
    taught = {"velocity", "latent", "fast"} - ({"fast"} if "fast=none" in change else set())
    assert set(parts) == ({"velocity"} if codes is None else taught)
    findings = check_policy(tmp_path / "p", observations=2)
    assert [f.compute for f in findings[:2]] == ["any", "dense"]
    assert all(finding.kept for finding in findings)


# -- what a step touches -------------------------------------------------------------------------------------------------------


def test_questions_touch_no_parameter_of_decoder_or_expert_and_actions_no_language_head(joint):
    policy = Policy.from_pretrained(joint)
    policy.model.train()
    stage = AnsweringStage(PolicyStage(policy), policy, 1.0)
    acted = Memory().batch(np.arange(4))
    chunk = {"action_BLD": acted.action_BLD.repeat(1, 4, 1), "valid_BL": acted.valid_BL.repeat(1, 4)}
    acted = replace(acted, **chunk, code_BK=torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(0)))
    touched = {}
    for name, batch in (("asked", Asked().batch(np.arange(4))), ("acted", acted)):
        policy.model.zero_grad(set_to_none=True)
        stage.loss(batch, torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)).total.backward()
        touched[name] = {n for n, p in policy.model.named_parameters() if p.grad is not None}
    decoder = {n for n, _ in policy.model.named_parameters() if n.startswith("decoder.")}
    assert {n.split(".")[1] for n in decoder} == {"latent", "flow", "fast"}
    assert not touched["asked"] & decoder
    assert "backbone.answer.weight" in touched["asked"]
    assert decoder <= touched["acted"]
    assert "backbone.answer.weight" not in touched["acted"]


# -- continuing a policy -------------------------------------------------------------------------------------------------------


def test_the_third_stage_starts_from_the_seconds_weights_to_the_bit(dataset, latent, joint, tmp_path):
    """One step at rate 0 leaves them; statistics and tokenizer are the checkpoint's, truncation and draws the recipe's."""
    still = flybot.sets(("steps=1", "optim.learning_rate=0.0", "ema_decay=none", "demonstrations=0.3"))
    assert command.main(flybot.fine(dataset, tmp_path / "p", joint, latent, *still)) == 0
    before, after = load_file(joint / "model.safetensors"), load_file(tmp_path / "p/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert (joint / "stats.json").read_bytes() == (tmp_path / "p/stats.json").read_bytes()
    old, new = Policy.from_pretrained(joint).config, Policy.from_pretrained(tmp_path / "p").config
    assert (old.decoder.truncate, old.decoder.flow.draws) == (True, 1)
    assert (new.decoder.truncate, new.decoder.flow.draws) == (False, 5)
    unchanged = replace(new.decoder, truncate=True, flow=replace(new.decoder.flow, draws=1))
    assert replace(new, decoder=unchanged) == old


def test_the_card_tells_both_stages_stories(dataset, latent, joint, tmp_path):
    assert command.main(flybot.fine(dataset, tmp_path / "p", joint, latent)) == 0
    card = Policy.from_pretrained(tmp_path / "p").card
    assert card.startswith(Policy.from_pretrained(joint).card.rstrip())
    first, further = card.split("## Further training of the policy")
    assert "Recipe: iflybot.joint" in first
    for part in ("Recipe: iflybot.fine", "Steps: 4 of 4", "Latent actions: codes of latent", "Data: dataset, 6 episodes"):
        assert part in further


def test_a_third_stage_that_broke_down_continues_to_the_same_bytes(dataset, latent, joint, tmp_path, cut):
    assert command.main(flybot.fine(dataset, tmp_path / "whole", joint, latent)) == 0
    begun = cut("iflybot.fine", 3, break_down)
    with pytest.raises(RuntimeError, match="cut"):
        command.main(flybot.fine(dataset, tmp_path / "cut", joint, latent))
    cut("iflybot.fine", None, break_down)
    assert command.main(flybot.fine(dataset, tmp_path / "cut", joint, latent)) == 0
    assert [step for _, step in begun] == [0, 1, 2, 3, 2, 3]
    assert same(tmp_path / "whole", tmp_path / "cut")
    other = tmp_path / "joint"
    assert command.main(flybot.joint(dataset, other, latent, "--set", "seed=1")) == 0
    with pytest.raises(ConfigError, match="was trained with policy = "):
        command.main(flybot.fine(dataset, tmp_path / "cut", other, latent))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            flybot.sets(["policy.decoder.latent.codes=4"]),
            "are not those of .* cannot start from its weights .*latent.embedding",
        ),
        (flybot.sets(["policy.decoder.fast=none"]), r"are not those of .*decoder\.fast"),
        (flybot.sets(["policy.backbone.answers=false"]), r"are not those of .*backbone\.answer"),
        (
            flybot.sets(["policy.action_normalisation=min_max"]),
            "was trained with 'mean_std', which its weights take for granted",
        ),
        (["--tokenizer", "fitted.json"], "keeps the tokenizer it was trained with; leave --tokenizer"),
    ],
)
def test_another_network_is_one_sentence(dataset, latent, joint, tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        command.main(flybot.fine(dataset, tmp_path / "p", joint, latent, *more))
    assert not (tmp_path / "p").exists()


def test_another_policy_place_or_robot_is_one_sentence(dataset, latent, joint, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"--out and --policy are both .*; give the new checkpoint a folder of its own"):
        command.main(flybot.fine(dataset, joint, joint, latent))
    other = flybot.write_latent(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=r"has learned to name the codes of the latent action model \w+, and .*other is"):
        command.main(flybot.fine(dataset, tmp_path / "p", joint, other))
    with pytest.raises(ConfigError, match="name its checkpoint with --policy"):
        command.main(["iflybot.fine", *flybot.places(dataset, tmp_path / "p")])
    with pytest.raises(ConfigError, match="starts from scratch; leave --policy out"):
        command.main(flybot.demo(dataset, tmp_path / "p", "--policy", str(joint)))
    rater = ["asyncvla.rater", *flybot.places(dataset, tmp_path / "rated", "--policy", joint), "--steps", "1"]
    assert command.main([*rater, "--batch-size", "4"]) == 0  # names no codes, so needs no latent action model
    with pytest.raises(ConfigError, match="A rater learns no latent actions"):
        command.main([*rater, "--latent", str(latent)])
    with pytest.raises(ConfigError, match="has a confidence rater, which would not fit"):
        command.main(flybot.fine(dataset, tmp_path / "p", tmp_path / "rated", latent))
    opened = Dataset.open(dataset)
    opened.action_spec = replace(opened.action_spec, robot="other arm")
    monkeypatch.setattr(Dataset, "open", classmethod(lambda cls, root, **_: opened))
    with pytest.raises(SpecError, match="robot is 'test arm' in the first and 'other arm' in the second"):
        command.main(flybot.fine(dataset, tmp_path / "p", joint, latent))
    assert not (tmp_path / "p").exists()


def test_a_policy_without_latent_actions_has_no_third_stage(dataset, latent, tmp_path):
    plain = ["asyncvla.demo", *flybot.places(dataset, tmp_path / "plain"), "--steps", "1", "--batch-size", "2"]
    small = [f"policy.backbone.{key}" for key in flybot.BACKBONE]
    assert command.main([*plain, *flybot.sets((*small, "policy.exits=none"))]) == 0
    with pytest.raises(CapabilityError, match=r"continues a policy of iflybot\.joint"):
        command.main(flybot.fine(dataset, tmp_path / "p", tmp_path / "plain", latent))


def test_a_pretrained_backbone_keeps_its_tokenizer_and_image_settings(dataset, latent, tmp_path):
    """The checkpoint of the third stage opens and acts without the second's."""
    pytest.importorskip("transformers")
    source = write_model(tmp_path / "qwen", tied=True)
    config = qwen3b(DataSpec(3, 2, ("front",)), horizon=4, execute=4)
    backbone = QwenConfig(3, ("front",), str(source), min_pixels=PATCH, max_pixels=4 * PATCH)
    block = BlockConfig(32, heads=2, kv_heads=2, head_dim=16, ffn=32, norm="rms")
    expert = replace(config.decoder.flow.expert, block=block)
    decoder = replace(config.decoder, fast=None, flow=replace(config.decoder.flow, expert=expert))
    second = Policy.create(replace(config, backbone=backbone, decoder=decoder), SPEC, tiny_stats(), 0)
    second.save_pretrained(tmp_path / "joint")
    third = flybot.places(dataset, tmp_path / "p", "--policy", tmp_path / "joint", "--latent", latent)
    assert command.main(["iflybot.fine3b", *third, "--steps", "1", "--batch-size", "2", "--set", "precision=fp32"]) == 0
    shutil.rmtree(tmp_path / "joint")
    shutil.rmtree(source)
    policy = Policy.from_pretrained(tmp_path / "p")
    assert policy.act(fake_observations(policy, 1)[0], Dense(2)).actions.shape == (4, 2)


# -- all stages ----------------------------------------------------------------------------------------------------------------


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


def test_a_signal_to_one_process_ends_the_run_in_all_of_them(together):
    """Or one would wait for the other in the next stage."""
    told = [load_file(together / f"ended/of-0/rank-{rank}.safetensors") for rank in (0, 1)]
    assert [(int(t["signal"]), int(t["step"])) for t in told] == [(signal.SIGTERM, 2)] * 2


def test_a_signal_in_the_very_last_step_changes_nothing(whole, dataset, tmp_path, cut, capsys):
    out = shutil.copytree(whole, tmp_path / "demo")
    for left in (out / "config.json", out / "training"):
        left.unlink() if left.is_file() else shutil.rmtree(left)
    cut("iflybot.fine", 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert command.main(flybot.demo(dataset, out)) == 0
    assert "Trained 4 steps" in capsys.readouterr().out
    assert same(whole, out)


def test_started_anew_a_pipeline_keeps_nothing_and_loses_nothing(whole, dataset, tmp_path, cut, capsys):
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


def write_questions(root):
    root.mkdir()
    for i in range(8):
        Image.fromarray(np.full((32, 32, 3), 30 * i, np.uint8)).save(root / f"{i}.png")
    said = [{"from": "human", "value": "<image>\nDark or bright?"}, {"from": "gpt", "value": "dark"}]
    lines = [json.dumps({"id": i, "image": f"{i}.png", "conversations": said}) for i in range(8)]
    (root / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return root


def test_questions_reach_the_stages_that_have_words(dataset, tmp_path):
    root = write_questions(tmp_path / "questions")
    shares = flybot.sets(("joint.questions.share=0.5", "fine.questions.share=0.5"))
    assert command.main(flybot.demo(dataset, tmp_path / "p", "--qa", str(root), *shares)) == 0
    asked = {stage: sum("answer_loss" in e for e in read_log(folder_of(tmp_path / "p", stage))) for stage in STAGES}
    assert asked == {"latent": 0, "joint": 2, "fine": 2}
    alone = flybot.sets(("joint.questions.share=0.5", "fine.questions=none"))
    assert command.main(flybot.demo(dataset, tmp_path / "q", "--qa", str(root), *alone)) == 0
    assert not any("answer_loss" in entry for entry in read_log(tmp_path / "q"))
    assert (tmp_path / "q/joint/model.safetensors").read_bytes() == (tmp_path / "p/joint/model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="learns from video alone; leave --qa"):
        command.main(["iflybot.latent", *flybot.places(dataset, tmp_path / "l", "--qa", root)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["joint.policy.backbone.answers=false"], r"no language-model head.*answers=true"),
        (["joint.policy.backbone.text_bytes=8"], r"has 15 bytes, the policy takes at most 8"),
    ],
)
def test_questions_that_do_not_fit_are_refused_before_anything_is_trained(dataset, tmp_path, change, message):
    root = write_questions(tmp_path / "questions")
    with pytest.raises(VlaflowError, match=message):
        command.main(flybot.demo(dataset, tmp_path / "p", "--qa", str(root), *flybot.sets(change)))
    with pytest.raises(VlaflowError, match=r"There is no .*nowhere"):
        command.main(flybot.demo(dataset, tmp_path / "p", "--qa", str(tmp_path / "nowhere")))
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
        (["--batch-size", "5"], r"as --set fine\.batch_size=\.\.\. would \(also in place of --steps and --batch-size\)"),
        (["--set", "jiont.steps=5"], r"'jiont.steps' names no stage of .*; did you mean 'joint'\?"),
        (["--set", "latent=none"], "'latent' names no stage"),
        (["--set", "fine.stpes=5"], "Unknown key 'stpes' in --set; did you mean 'steps'"),
        (["--set", "fine.policy.decoder.fsat=none"], "did you mean 'fast'"),
        (["--set", "latent.model.book=16"], r"8 codes of a book of 16, .*--set joint\.policy\.decoder\.latent\.codes=8"),
        (["--latent", "runs/latent"], "trains a latent action model of its own; leave --latent out"),
        (["--policy", "runs/policy"], "starts from scratch; leave --policy out"),
    ],
)
def test_mistakes_are_answered_before_anything_is_trained(dataset, tmp_path, more, message):
    with pytest.raises(VlaflowError, match=message):
        command.main(flybot.demo(dataset, tmp_path / "p", *more))
    assert not (tmp_path / "p").exists()


def test_a_folder_of_another_recipe_is_refused_before_anything_is_trained(dataset, joint, tmp_path):
    with pytest.raises(ConfigError, match=r"holds a checkpoint of iflybot.joint, where that of iflybot.fine is to be"):
        command.main(flybot.demo(dataset, joint))
    assert not (joint / "latent").exists()
