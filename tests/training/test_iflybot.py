"""iFlyBot-VLA's later stages: learned with a latent action model, and continued from a checkpoint."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.backbones.test_qwen2_5_vl import write_model
from tests.training import flybot
from tests.training.flybot import break_down, same
from tests.training.small import SPEC, AskedSource, Memory, tiny_stats
from vlaflow.actions.latent import LatentActionModel
from vlaflow.backbones.qwen2_5_vl import PATCH, QwenConfig
from vlaflow.cli import train as command
from vlaflow.compute.dense import Dense
from vlaflow.data.lerobot import Dataset
from vlaflow.errors import CapabilityError, ConfigError, SpecError
from vlaflow.evaluation.check_policy import check_policy, fake_observations
from vlaflow.nn.block import BlockConfig
from vlaflow.policies.base import Policy
from vlaflow.policies.iflybot.codes import model_pairs
from vlaflow.policies.iflybot.policy import qwen3b
from vlaflow.policies.recipe import DataSpec
from vlaflow.policies.stages import AnsweringStage, PolicyStage
from vlaflow.training.metrics_log import read_log

# -- latent codes in batches ---------------------------------------------------------------------------------------------------


def test_batches_carry_the_codes_of_the_frames_they_begin_at(dataset, latent, tmp_path, monkeypatch):
    """By episode and frame, encoded here pair by pair; unknown in the last frames, which begin no pair."""
    batches, prepare = [], PolicyStage.prepare
    monkeypatch.setattr(PolicyStage, "prepare", lambda self, batch: batches.append(batch) or prepare(self, batch))
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
        (None, [], r"give it a latent action model with --latent .*iflybot\.latent --dataset /\S*dataset\S* --out DIR"),
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
    assert all(finding.passed for finding in findings)


# -- what a step touches -------------------------------------------------------------------------------------------------------


def test_questions_touch_no_parameter_of_decoder_or_expert_and_actions_no_language_head(joint):
    policy = Policy.from_pretrained(joint)
    policy.model.train()
    stage = AnsweringStage(PolicyStage(policy), policy, 1.0)
    acted = Memory().batch(np.arange(4))
    chunk = {"action_BLD": acted.action_BLD.repeat(1, 4, 1), "valid_BL": acted.valid_BL.repeat(1, 4)}
    acted = replace(acted, **chunk, code_BK=torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(0)))
    touched = {}
    for name, batch in (("asked", AskedSource().batch(np.arange(4))), ("acted", acted)):
        policy.model.zero_grad(set_to_none=True)
        ready = stage.prepare(batch)
        stage.loss(ready, stage.draw(ready, torch.Generator().manual_seed(0), torch.Generator())).total.backward()
        touched[name] = {n for n, p in policy.model.named_parameters() if p.grad is not None}
    decoder = {n for n, _ in policy.model.named_parameters() if n.startswith("decoder.")}
    assert {n.split(".")[1] for n in decoder} == {"latent", "flow", "fast"}
    assert not touched["asked"] & decoder
    assert "backbone.answer.weight" in touched["asked"]
    assert decoder <= touched["acted"]
    assert "backbone.answer.weight" not in touched["acted"]


# -- continuing a policy -------------------------------------------------------------------------------------------------------


def test_the_third_stage_starts_from_the_seconds_weights_to_the_bit(dataset, latent, joint, tmp_path):
    """One step at rate 0 leaves them; statistics and tokenizer are the checkpoint's, the decoder's changes the recipe's."""
    still = flybot.sets(("steps=1", "optim.learning_rate=0.0", "ema_decay=none", "demonstrations=0.3"))
    assert command.main(flybot.fine(dataset, tmp_path / "p", joint, latent, *still)) == 0
    before, after = load_file(joint / "model.safetensors"), load_file(tmp_path / "p/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert (joint / "stats.json").read_bytes() == (tmp_path / "p/stats.json").read_bytes()
    old, new = Policy.from_pretrained(joint).config, Policy.from_pretrained(tmp_path / "p").config
    assert (old.decoder.truncate, old.decoder.flow.noise_samples) == (True, 1)
    assert (new.decoder.truncate, new.decoder.flow.noise_samples) == (False, 5)
    unchanged = replace(new.decoder, truncate=True, flow=replace(new.decoder.flow, noise_samples=1))
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
    config = qwen3b(DataSpec(3, 2, ("front",)), chunk_size=4, n_action_steps=4)
    backbone = QwenConfig(3, ("front",), str(source), min_pixels=PATCH, max_pixels=4 * PATCH)
    block = BlockConfig(32, heads=2, kv_heads=2, head_dim=16, ffn=32, norm="rms")
    expert = replace(config.decoder.flow.expert, block=block)
    decoder = replace(config.decoder, fast=None, flow=replace(config.decoder.flow, expert=expert))
    second = Policy.create(replace(config, backbone=backbone, decoder=decoder), SPEC, tiny_stats(), 0)
    second.save_pretrained(tmp_path / "joint")
    third = flybot.places(dataset, tmp_path / "p", "--policy", tmp_path / "joint", "--latent", latent)
    assert command.main(["iflybot.fine3b", *third, "--steps", "1", "--batch-size", "8", "--set", "precision=fp32"]) == 0
    shutil.rmtree(tmp_path / "joint")
    shutil.rmtree(source)
    policy = Policy.from_pretrained(tmp_path / "p")
    assert policy.act(fake_observations(policy, 1)[0], Dense(2)).actions.shape == (4, 2)
