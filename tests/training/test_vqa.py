"""VQA co-training: which step is what, what it touches, and that a run continues to the bit."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.training.small import (
    CPU,
    SPEC,
    AskedSource,
    Cut,
    Memory,
    as_it_is,
    new_policy,
    tiny_config,
    tiny_policy,
    tiny_stats,
    weights,
)
from tests.training.test_run import arguments
from vlaflow.cli import train as command
from vlaflow.errors import CapabilityError, ConfigError, SpecError
from vlaflow.policies.a1.policy import tiny_flow
from vlaflow.policies.asyncvla.policy import tiny, tiny_rater
from vlaflow.policies.base import Policy
from vlaflow.policies.objectives import RaterObjective
from vlaflow.policies.recipe import Assets, DataSpec
from vlaflow.policies.stages import AnsweringStage, CoTraining, PolicyStage
from vlaflow.policies.vqa import VqaTraining
from vlaflow.spec import Observation
from vlaflow.training.divergence import DivergedError
from vlaflow.training.loader import Alternating, Loader, alternating
from vlaflow.training.metrics_log import read_log
from vlaflow.training.team import Team
from vlaflow.training.trainer import Trainer


def asking_config(share=0.5, vqa=None, **changes):
    asks = vqa or VqaTraining(share=share)
    return tiny_config(policy=tiny_policy(answers=True), vqa=asks, **changes)


def run(out, config, source=None, asked=None, held=None, **options):
    policy = new_policy(config)
    stage = AnsweringStage(PolicyStage(policy), policy, config.objective.vqa.weight)
    vqa = CoTraining(asked or AskedSource(), held, config.objective.vqa.share)
    return Trainer(stage, config, source or Memory(), None, out, vqa=vqa, tracker="none", **options).run()


# -- which step is what --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 99), st.integers(0, 500))
def test_of_the_first_n_steps_the_stated_share_is_on_questions(percent, n):
    """The largest whole number of steps that does not exceed it, at every n: neither kind ever has to wait."""
    mixed = Alternating(None, None, percent / 100)
    asked = [mixed.vqa_steps_before(s + 1) > mixed.vqa_steps_before(s) for s in range(n)]
    assert sum(asked) == n * percent // 100 == mixed.vqa_steps_before(n)


def test_actions_and_their_noise_are_those_of_a_run_without_questions():
    """Step after step, only with questions in between; and the questions walk epochs of their own."""
    config = asking_config(0.25)
    alone = Loader(Memory(), config, Team(), CPU, as_it_is)
    loader = alternating(Loader(Memory(), config, Team(), CPU, as_it_is), CoTraining(AskedSource(6), None, 0.25))
    plain = iter([alone.step(s)[0] for s in range(9)])
    names = []
    for step in range(12):
        (part,) = loader.step(step)
        if (step + 1) % 4:
            expected = next(plain)
            assert torch.equal(part.batch.action_BLD, expected.batch.action_BLD)
            assert torch.equal(part.batch.observation.images["front"], expected.batch.observation.images["front"])
            assert part.drawn.numbers == expected.drawn.numbers
        else:
            names += part.batch.names
    assert sorted(names) == sorted(2 * [f"q{i}" for i in range(6)])


def test_a_state_mask_never_makes_up_a_state_for_a_question():
    from vlaflow.data.augment import StateMask

    loader = alternating(
        Loader(Memory(), asking_config(state_mask=StateMask(0.1)), Team(), CPU, as_it_is), CoTraining(AskedSource(), None, 0.5)
    )
    assert not loader.step(1)[0].batch.observation.known_BS.any()


def test_questions_may_come_in_batches_of_another_size():
    config = asking_config(accumulate=2)
    loader = alternating(Loader(Memory(), config, Team(), CPU, as_it_is), CoTraining(AskedSource(), None, 0.5, batch_size=6))
    assert [[len(p.batch.observation) for p in loader.step(s)] for s in (0, 1)] == [[2, 2], [3, 3]]


# -- what a step touches -------------------------------------------------------------------------------------------------------


def expert_policy():
    config = tiny_flow(DataSpec(3, 2, ("front",)))
    backbone = replace(config.backbone, image_size=32, answers=True, depth=2)
    decoder = replace(config.decoder, chunk_size=4)
    exits = replace(config.exits, depths=(1, 2)) if config.exits else None
    return Policy.create(
        replace(config, backbone=backbone, decoder=decoder, exits=exits, n_action_steps=2), SPEC, tiny_stats(), 0
    )


@pytest.mark.parametrize("make", [lambda: new_policy(asking_config()), expert_policy], ids=["shared", "expert"])
def test_questions_touch_no_parameter_of_decoder_or_expert(make):
    """Not with a zero gradient, which would still move Adam's averages: with none at all. Actions leave the answers alone."""
    policy = make()
    policy.model.train()
    stage = AnsweringStage(PolicyStage(policy), policy, 1.0)
    batches = {"asked": AskedSource().batch(np.arange(4)), "acted": Memory().batch(np.arange(4))}
    touched = {}
    for name, batch in batches.items():
        policy.model.zero_grad(set_to_none=True)
        ready = stage.prepare(batch)
        terms = stage.loss(ready, stage.draw(ready, torch.Generator().manual_seed(0), torch.Generator()))
        terms.total.backward()
        touched[name] = {n for n, p in policy.model.named_parameters() if p.grad is not None}
        assert ("answer" in terms.parts) == (name == "asked")
    decoder = {n for n, _ in policy.model.named_parameters() if n.startswith("decoder.")}
    assert not touched["asked"] & decoder
    assert {"backbone.answer.weight", "backbone.stems.0.patches.project.weight"} <= touched["asked"]
    assert "backbone.answer.weight" not in touched["acted"]
    assert decoder & touched["acted"]


def test_the_weight_scales_the_loss_and_not_what_is_logged():
    policy = new_policy(asking_config())
    batch = AskedSource().batch(np.arange(4))
    stages = [AnsweringStage(PolicyStage(policy), policy, weight) for weight in (1.0, 3.0)]
    one, three = (stage.loss(ready := stage.prepare(batch), stage.draw(ready, None, None)) for stage in stages)
    torch.testing.assert_close(three.total, 3 * one.total)
    assert one.parts["answer"] == three.parts["answer"]
    torch.testing.assert_close(one.total.detach(), policy.answer_loss(policy.prepare_answers(batch)).detach())


# -- runs ----------------------------------------------------------------------------------------------------------------------


def test_a_run_that_broke_down_continues_to_the_same_bytes(tmp_path):
    config = asking_config(0.4, steps=12, checkpoint_every=3)
    run(tmp_path / "whole", config)
    with pytest.raises(RuntimeError, match="cut"):
        run(tmp_path / "cut", config, asked=Cut(AskedSource(), 3))
    run(tmp_path / "cut", config)
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")
    for name in ("weights", "average", "optimizer"):
        file = f"training/step-000012/{name}.safetensors"
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()
    logs = [
        [{k: v for k, v in e.items() if k not in ("seconds", "samples_per_second")} for e in read_log(tmp_path / name)]
        for name in ("whole", "cut")
    ]
    assert json.dumps(logs[0]) == json.dumps(logs[1])


def test_the_log_keeps_the_two_losses_apart(tmp_path):
    outcome = run(tmp_path / "p", asking_config(0.5), held=AskedSource(5))
    entries = read_log(tmp_path / "p")
    assert ["answer_loss" in e for e in entries] == [False, True] * 3
    assert all(("loss" in e) != ("answer_loss" in e) and e["samples_per_second"] > 0 for e in entries)
    assert set(entries[2]["validation"]) == {"answer"}
    assert outcome.loss == pytest.approx(np.mean([e["loss"] for e in entries if "loss" in e]))


def test_both_are_learned(tmp_path):
    """Eight samples, two answers: the actions' loss falls, and both answers are right."""
    config = asking_config(
        0.5, steps=80, global_batch_size=8, shift=0, ema_decay=0.9, checkpoint_every=1000, validate_every=1000
    )
    run(tmp_path / "p", replace(config, optim=replace(config.optim, learning_rate=1e-2)), Memory(8))
    losses = [e["loss"] for e in read_log(tmp_path / "p") if "loss" in e]
    assert sum(losses[-10:]) / 10 < 0.75 * sum(losses[:3]) / 3
    policy = Policy.from_pretrained(tmp_path / "p")
    seen = [Observation({"front": np.full((32, 32, 3), v, np.uint8)}, np.ones(3, np.float32), "How is it?") for v in (40, 210)]
    assert [(a.text, a.ended) for a in policy.answer(seen)] == [("dark", True), ("bright", True)]
    assert [(a.text, a.ended) for a in policy.answer(seen, limit=3)] == [("dar", False), ("bri", False)]


def test_a_loss_that_is_not_finite_names_its_questions(tmp_path):
    config = asking_config(0.5)
    policy = new_policy(config)
    with torch.no_grad():
        policy.model.backbone.answer.weight.fill_(float("nan"))
    stage = AnsweringStage(PolicyStage(policy), policy, 1.0)
    with pytest.raises(DivergedError, match=r"at step 2 of 6. Its samples: questions q\d+, q\d+"):
        Trainer(stage, config, Memory(), None, tmp_path / "p", vqa=CoTraining(AskedSource(), None, 0.5), tracker="none").run()


# -- the command ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    root = tmp_path_factory.mktemp("vqa")
    lines = []
    for i in range(8):
        Image.fromarray(np.full((32, 32, 3), 30 * i, np.uint8)).save(root / f"{i}.png")
        turns = [("human", "<image>\nDark or bright?"), ("gpt", "bright" if i > 3 else "dark")]
        said = [{"from": who, "value": text} for who, text in turns]
        lines.append(json.dumps({"id": i, "image": f"{i}.png", "conversations": said, "kind": "light"}))
    (root / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return root


def test_the_command_trains_on_both_and_the_card_says_so(dataset, asked, tmp_path):
    out = tmp_path / "p"
    more = ["--vqa", str(asked), "--set", "policy.backbone.answers=true", "--set", "vqa.share=0.5", "--steps", "8"]
    assert command.main([*arguments(dataset, out), *more]) == 0
    assert sum("answer_loss" in e for e in read_log(out)) == 4
    assert "answer" in read_log(out)[-1]["validation"]
    card = Policy.from_pretrained(out).card
    assert "7 for training, 1 held out, on 0.5 of the steps" in card
    lines = (asked / "questions.jsonl").read_text()
    (asked / "questions.jsonl").write_text(lines + lines.splitlines()[0] + "\n")
    with pytest.raises(ConfigError, match=r"was trained with vqa\.fingerprint = "):
        command.main([*arguments(dataset, out), *more])


def test_what_does_not_fit_is_one_sentence(dataset, asked, tmp_path):
    given = arguments(dataset, tmp_path / "p")
    with pytest.raises(CapabilityError, match=r"no language-model head.*answers=true"):
        command.main([*given, "--vqa", str(asked)])
    with pytest.raises(ConfigError, match=r"vqa is none, so .* would not be looked at"):
        command.main([*given, "--vqa", str(asked), "--set", "vqa=none"])
    with pytest.raises(ConfigError, match="name a set of them with --vqa"):
        command.main([*given, "--set", 'vqa={"share": 0.5}'])
    wordy = shutil.copytree(asked, tmp_path / "wordy")  # than the instructions, which are looked at first
    lines = wordy / "questions.jsonl"
    lines.write_text(lines.read_text().replace("Dark or", "Is it dark or"))
    for short, message in (("text_bytes=16", "text_bytes"), ("suffix=4", "suffix")):
        small = ["--set", "policy.backbone.answers=true", "--set", f"policy.backbone.{short}"]
        small += ["--set", "policy.decoder.chunk_size=4", "--set", "policy.n_action_steps=4"]  # as many tokens as positions
        with pytest.raises(SpecError, match=rf"of question '.*' in .* bytes, the policy takes at most .*\.{message}"):
            command.main([*given, "--vqa", str(wordy), *small])
    assert not (tmp_path / "p").exists()
    for wrong in ({"share": 0.0}, {"share": 1.0}, {"held_out": 1.0}, {"weight": 0.0}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match="vqa"):
            VqaTraining(**wrong)
    with pytest.raises(ConfigError, match="name a set of them with --vqa"):
        asking_config().objective.require(Assets())
    rater = tiny_rater(tiny(DataSpec(3, 2, ("front",))))
    with pytest.raises(ConfigError, match="A rater learns no questions"):
        RaterObjective(rater).require(Assets(vqa=asked))
