"""Right answers: what counts as one, the baselines, which questions are asked, and the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.training.small import new_policy, tiny_config, tiny_policy, write_dataset
from tests.training.test_run import arguments
from vlaflow.cli import eval_vqa
from vlaflow.cli import train as training
from vlaflow.data.image_cache import ImageCache, VqaSource
from vlaflow.data.vqa import Question, VqaDataset
from vlaflow.decoders.answers import Answer
from vlaflow.errors import CapabilityError, CheckpointError, ConfigError, DataError
from vlaflow.evaluation.statistics import wilson
from vlaflow.evaluation.vqa import AnswerConfig, AnsweredQuestion, ask, count, exchange, held_out, read, run
from vlaflow.policies.base import Policy
from vlaflow.policies.recipe import Base
from vlaflow.training.options import Options
from vlaflow.training.run import train_stage


def said(answer, text, kind="state", question="Open?", ended=True, blind=None):
    return AnsweredQuestion("n", kind, question, answer, text, ended, blind)


@pytest.mark.parametrize(
    ("answer", "text", "ended", "right"),
    [
        ("on the table", " On  the\nTable ", True, True),
        ("open", "opened", True, False),
        ("open", "open", False, False),  # nobody knows what would have followed
        ("Öffnen", "öffnen", True, True),
        ("open", "", True, False),
    ],
)
def test_an_answer_is_right_but_for_case_and_spaces_and_only_when_it_has_ended(answer, text, ended, right):
    assert said(answer, text, ended=ended).right is right
    assert replace(said(answer, "", blind=text), blind_ended=ended).right_blind is right


def test_accuracies_by_kind_in_closed_form():
    answered = [
        *(said("open", "open", blind="closed") for _ in range(6)),
        *(said("closed", "open", blind="closed") for _ in range(2)),
        *(said("two", "two", "count", "How many?", blind="two") for _ in range(3)),
        said("one", "one on", "count", "How many?", ended=False, blind="one"),
    ]
    state, number, everything = count(answered)
    assert (state.question_kind, state.questions, state.right, state.majority, state.blind, state.unended) == (
        "state",
        8,
        6,
        6,
        2,
        0,
    )
    assert (number.question_kind, number.questions, number.right, number.majority, number.blind) == ("count", 4, 3, 3, 4)
    assert number.unended == 1
    assert (everything.question_kind, everything.questions, everything.right, everything.majority) == ("all", 12, 9, 9)
    interval = wilson(9, 12)
    assert everything.interval == (interval.low, interval.high)
    assert everything.difference == pytest.approx((9 - 6) / 12)
    assert state.p_value == pytest.approx(2 * (1 + 8 + 28) / 2**8)  # six to two, of fair coins
    assert count([replace(each, blind=None) for each in answered])[0].p_value is None


def test_questions_about_one_episode_count_less_than_as_many_about_others():
    """Twelve questions right with the image and wrong without: of one group each, or of two episodes."""
    apart = [replace(said("open", "open", blind="closed"), group=f"episode {n}") for n in range(12)]
    together = [replace(each, group=f"episode {n % 2}") for n, each in enumerate(apart)]
    alone, grouped = (count(each)[-1] for each in (apart, together))
    assert (alone.right, alone.difference) == (grouped.right, grouped.difference) == (12, 1.0)
    assert alone.p_value == 2 / 2**12
    assert grouped.p_value == 2 / 2**2
    assert grouped.interval[0] < alone.interval[0]
    assert count([replace(each, group="") for each in apart]) == count(apart)


def test_the_most_frequent_answer_is_that_of_the_wording_and_not_of_the_kind():
    answered = [said("open", "", question="A?"), said("open", "", question="A?"), said("closed", "", question="B?")]
    assert count(answered)[-1].majority == 3


def test_images_are_exchanged_within_a_wording_and_never_for_the_same():
    questions = [Question(f"n{i}", (f"{i % 5}.png",), "A?" if i % 2 else "B?", "") for i in range(20)]
    questions.append(Question("alone", ("9.png",), "C?", ""))
    partner = exchange(questions, 0)
    for question, j in zip(questions[:-1], partner, strict=False):
        assert questions[j].question == question.question
        assert questions[j].images != question.images
    assert partner[-1] == -1
    assert not np.array_equal(partner, exchange(questions, 1))


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Dark and bright images, two of each brightness per episode."""
    root = tmp_path_factory.mktemp("vqa")
    lines = []
    for i in range(16):
        Image.fromarray(np.full((32, 32, 3), 30 if i % 2 else 220, np.uint8)).save(root / f"{i}.png")
        turns = [("human", "<image>\nDark or bright?"), ("gpt", "dark" if i % 2 else "bright")]
        record = {"id": i, "image": f"{i}.png", "kind": "light", "group": f"{i // 4}"}
        lines.append(json.dumps({**record, "conversations": [{"from": who, "value": text} for who, text in turns]}))
    (root / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return root


def test_a_policy_that_sees_is_told_from_one_that_does_not(asked, monkeypatch):
    """One names the brightness, and with exchanged images names theirs; one always says the same."""
    opened, policy = VqaDataset.open(asked), new_policy(tiny_config(policy=tiny_policy(answers=True)))
    source = VqaSource(opened, ImageCache.open(opened, 32), ("front",), 3)
    shown = []

    def reply(observation, limit):
        shown.extend(observation.images["front"][:, 0, 0, 0].tolist())
        return [Answer("Dark" if pixel < 128 else "bright", True) for pixel in observation.images["front"][:, 0, 0, 0].tolist()]

    monkeypatch.setattr(policy, "reply", reply)
    ticks = []
    seeing = count(ask(policy, source, AnswerConfig(batch_size=5), lambda done, total: ticks.append((done, total))))[-1]
    assert (seeing.questions, seeing.right, seeing.majority) == (16, 16, 8)
    partners = exchange(list(opened.questions), 0)
    assert shown[16:] == [shown[j] for j in partners]
    assert seeing.blind == sum(i % 2 == j % 2 for i, j in enumerate(partners))
    assert ticks[-1] == (32, 32)
    cut = [Answer("dark", False)]
    monkeypatch.setattr(policy, "reply", lambda observation, limit: cut * len(observation))
    unended = count(ask(policy, source, AnswerConfig()))[-1]
    assert (unended.right, unended.blind) == (0, 0)
    monkeypatch.setattr(policy, "reply", lambda observation, limit: [Answer("dark", True)] * len(observation))
    constant = count(ask(policy, source, AnswerConfig()))[-1]
    assert (constant.right, constant.blind, constant.difference, constant.p_value) == (8, 8, 0.0, 1.0)


def test_batches_do_not_change_answers(asked):
    policy = new_policy(tiny_config(policy=tiny_policy(answers=True)))
    policy.model.eval()
    opened = VqaDataset.open(asked)
    source = VqaSource(opened, ImageCache.open(opened, 32), ("front",), 3, range(6))
    one, many = (ask(policy, source, AnswerConfig(batch_size=size, limit=4)) for size in (1, 6))
    assert one == many


def test_an_interrupted_evaluation_is_continued_to_the_same_bytes(asked, tmp_path, monkeypatch):
    """Batches with and without the right image; only what was not answered is asked again, unless the settings are others."""
    new_policy(tiny_config(policy=tiny_policy(answers=True))).save_pretrained(tmp_path / "policy")
    config, reply = AnswerConfig(part="all", limit=3, batch_size=5), Policy.reply
    run(tmp_path / "policy", asked, config, tmp_path / "whole")
    calls = []

    def interrupted(*given):
        calls.append(len(given[1]))
        if sum(calls) > 21:  # within the second batch of exchanged images
            raise KeyboardInterrupt
        return reply(*given)

    monkeypatch.setattr(Policy, "reply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "policy", asked, config, tmp_path / "parts")
    calls.clear()
    with pytest.raises(ConfigError, match=r"answers\.jsonl belongs to an unfinished evaluation with seed = 0, not 1\."):
        run(tmp_path / "policy", asked, replace(config, seed=1), tmp_path / "parts")
    run(tmp_path / "policy", asked, config, tmp_path / "parts")
    assert calls == [5, 5, 1]
    whole, parts = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("whole", "parts"))
    assert whole == parts
    assert list(whole) == ["answers.json"]


def test_the_command_asks_what_training_held_out_and_writes_what_it_found(asked, tmp_path, capsys):
    dataset, out = write_dataset(tmp_path / "data"), tmp_path / "policy"
    more = ["--vqa", str(asked), "--set", "policy.backbone.answers=true", "--steps", "6", "--set", "vqa.held_out=0.25"]
    assert training.main([*arguments(dataset, out), *more]) == 0
    assert eval_vqa.main([str(out), "--vqa", str(asked), "--out", str(tmp_path / "a"), "--limit", "4", "--dtype", "bf16"]) == 0
    shown = capsys.readouterr().out
    assert "light" in shown
    results = read(tmp_path / "a/answers.json")
    opened = VqaDataset.open(asked)
    assert [each.name for each in results.per_question] == [opened.questions[i].name for i in opened.split(0.25)[1]]
    assert (results.overall.questions, results.part, results.limit, results.dtype) == (4, "held-out", 4, "bf16")
    assert results.questions_fingerprint == opened.fingerprint
    again = run(out, asked, AnswerConfig(part="all", blind=False, limit=4), tmp_path / "b")
    assert (again.overall.questions, again.overall.blind) == (16, None)
    other = replace(opened, questions=opened.questions[:5])
    assert held_out(out, other) == tuple(range(5))  # known by its fingerprint, so another set
    bare = new_policy(tiny_config())
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match="unknown which questions"):
        run(tmp_path / "bare", asked, AnswerConfig(), tmp_path / "c")
    with pytest.raises(CapabilityError, match="no language-model head"):
        run(tmp_path / "bare", asked, AnswerConfig(part="all"), tmp_path / "c")


def co_trained(asked, tmp_path, *more):
    dataset, out = write_dataset(tmp_path / "data"), tmp_path / "policy"
    vqa = ["--vqa", str(asked), "--set", "policy.backbone.answers=true", "--steps", "2", "--set", "vqa.share=0.5"]
    assert training.main([*arguments(dataset, out), *vqa, *more]) == 0
    return dataset, out


def test_a_checkpoint_that_continues_another_has_learned_from_its_questions_too(asked, tmp_path):
    """What is held out of them is asked, whether a rater was added or the policy trained further, with questions or without."""
    dataset, out = co_trained(asked, tmp_path)
    opened = VqaDataset.open(asked)
    held = opened.split(0.1)[1]
    rater = ["asyncvla.rater", "--dataset", str(dataset), "--out", str(tmp_path / "rated"), "--policy", str(out)]
    assert training.main([*rater, "--tracker", "none", "--no-calibrate", "--steps", "1", "--batch-size", "4"]) == 0
    assert held_out(tmp_path / "rated", opened) == held
    base, folder = Policy.from_pretrained(out), out
    more = {"further": Options(tracker="none"), "again": Options({"vqa.held_out": "0.5"}, "none", vqa=asked)}
    for name, options in more.items():
        config = tiny_config(policy=base.config, steps=1)
        train_stage(config, dataset, tmp_path / name, name=name, base=Base.open(folder), options=options)
        folder = tmp_path / name
        assert held_out(folder, opened) == held
    assert len(opened.split(0.5)[1]) > len(held)


def test_conversations_read_in_another_way_are_not_new(tmp_path):
    """Their first turns were trained on with the others."""
    root = tmp_path / "talks"
    root.mkdir()
    said = [("human", "Dark or bright?"), ("gpt", "dark"), ("human", "Really?"), ("gpt", "yes")]
    turns = [{"from": who, "value": text} for who, text in said]
    (root / "questions.jsonl").write_text("".join(json.dumps({"id": i, "conversations": turns}) + "\n" for i in range(8)))
    _, out = co_trained(root, tmp_path)
    with pytest.raises(ConfigError, match=r"learned from .* with turns=all.* Give --turns all"):
        run(out, root, AnswerConfig(turns="first"), tmp_path / "a")
    assert run(out, root, AnswerConfig(turns="first", part="all", limit=2), tmp_path / "a").overall.questions == 8


def test_damaged_results_and_impossible_requests_are_refused(tmp_path):
    with pytest.raises(DataError, match="There is no"):
        read(tmp_path / "answers.json")
    (tmp_path / "answers.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        read(tmp_path / "answers.json")
    (tmp_path / "answers.json").write_text('{"format": "vlaflow results 1"}')
    with pytest.raises(DataError, match="this version of vlaflow reads 'vlaflow answers 1'"):
        read(tmp_path / "answers.json")
    with pytest.raises(ConfigError, match="at least 1"):
        AnswerConfig(limit=0)
