"""Answers: their loss, what it refuses, greedy decoding, extra ids, and queries answered in one pass."""

import dataclasses

import pytest
import torch
from torch.nn import functional

from tests.backbones.test_tiny import CONFIG, build, observe
from vlaflow.backbones.language import speaking
from vlaflow.backbones.tiny import END, TinyConfig
from vlaflow.config import from_json, to_json
from vlaflow.data.batch import ObservationBatch
from vlaflow.decoders.answers import greedy
from vlaflow.errors import CapabilityError, ConfigError, SpecError

ROUNDING = {"atol": 1e-5, "rtol": 1e-4}  # float32, sums in another order


def speaker(**changes):
    return build(answers=True, **changes)


def test_the_loss_is_the_cross_entropy_of_each_token_after_those_before_it():
    """Token by token: the state before it, from a pass over nothing but the tokens before it."""
    backbone = speaker()
    prefix, ids = backbone.embed(observe(words=("Open",))), backbone.answer_ids(["left"])
    whole, losses = backbone.run(prefix), []
    for t in range(ids.shape[1]):
        state_BW = backbone.before_answer(whole)
        if t:
            token_BTW, _ = backbone.place(backbone.embed_ids(ids[:, :t]), whole)
            for index, memory in enumerate(whole.memory):
                causal = torch.ones(t, t, dtype=torch.bool).tril()
                token_BTW, _ = backbone.layer(index, token_BTW, None, memory, mask_TS=causal)
            state_BW = backbone.finish(token_BTW)[:, -1]
        losses.append(functional.cross_entropy(state_BW @ backbone.answer.weight.T, ids[:, t]))
    torch.testing.assert_close(backbone.answer_loss(prefix, ids), torch.stack(losses).mean(), **ROUNDING)


def test_answers_of_different_lengths_are_masked():
    """The batch's loss is the mean over all tokens, as if each answer had been alone; padding counts nothing."""
    backbone, words = speaker(), ("Open", "Close a window")
    answers, seen = ["no", "in the middle"], observe(words=words)
    together = backbone.answer_loss(backbone.embed(seen), backbone.answer_ids(answers))
    total, count = 0.0, 0
    for i, answer in enumerate(answers):
        alone = ObservationBatch({"image": seen.images["image"][i : i + 1]}, seen.state_BS[i : i + 1], [words[i]])
        ids = backbone.answer_ids([answer])
        total, count = total + backbone.answer_loss(backbone.embed(alone), ids) * ids.numel(), count + ids.numel()
    torch.testing.assert_close(together, total / count, **ROUNDING)


def test_padding_of_a_short_answer_is_hidden_from_whoever_reads_its_keys():
    backbone = speaker()
    memory = backbone.read(backbone.embed(observe()), backbone.answer_ids(["no", "maybe"])).memory
    assert len(memory) == backbone.spec.depth
    assert memory[0].mask_CP.sum(1).tolist() == [3, 6]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[-100, -100], [65, END]], "Answer 0 of the batch is empty"),
        ([[65, END, -100], [65, -100, END]], "has a hole"),
        ([[65, END + 1], [65, END]], "vocabulary ends at 256"),
    ],
)
def test_an_answer_that_cannot_be_learned_is_refused(ids, message):
    backbone = speaker()
    with pytest.raises(SpecError, match=message):
        backbone.answer_loss(backbone.embed(observe()), torch.tensor(ids))


def test_greedy_with_kept_keys_is_greedy_recomputed():
    """At every place the id is the most probable one of a pass over the whole answer so far."""
    backbone = speaker()
    prefix = backbone.embed(observe())
    made = greedy(prefix, limit=12)
    ids, ended = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, dtype=torch.bool)
    for _ in range(made.id_BT.shape[1]):
        passed = backbone.read(prefix, torch.cat((ids, torch.zeros(2, 1, dtype=torch.long)), 1))
        next_B = backbone.name_ids(passed.state_BTW[:, -1]).argmax(-1)
        ids = torch.cat((ids, next_B[:, None]), 1)
    for row in range(2):
        known = made.id_BT[row] >= 0
        assert torch.equal(made.id_BT[row][known], ids[row][known])
        ended[row] = END in made.id_BT[row].tolist()
    assert torch.equal(made.ended_B, ended)


def test_an_answer_without_an_end_is_cut_at_the_limit_and_says_so():
    backbone, letters = speaker(), torch.zeros(END + 1, dtype=torch.bool)
    letters[ord("a") : ord("e")] = True
    made = greedy(backbone.embed(observe()), limit=5, allowed_V=letters)
    assert made.id_BT.shape == (2, 5)
    assert not made.ended_B.any()
    assert all(len(text) == 5 and set(text) <= set("abcd") for text in backbone.answer_texts(made.id_BT))
    letters[:] = False
    letters[END] = True
    made = greedy(backbone.embed(observe()), limit=5, allowed_V=letters)
    assert made.id_BT.tolist() == [[END], [END]]
    assert made.ended_B.all()
    assert backbone.answer_texts(made.id_BT) == ["", ""]


def test_it_learns_to_name_what_it_sees():
    """Dark and bright pictures, one question: after sixty steps both are named, and nothing else is said."""
    backbone, answers = speaker().train(), ["dark", "bright"]
    images = torch.stack([torch.full((32, 32, 3), value, dtype=torch.uint8) for value in (30, 220)])
    seen = ObservationBatch({"image": images}, torch.zeros(2, 3), ["How is it?"] * 2)
    optimizer, ids = torch.optim.AdamW(backbone.parameters(), 5e-3), backbone.answer_ids(answers)
    for _ in range(60):
        optimizer.zero_grad()
        backbone.answer_loss(backbone.embed(seen), ids).backward()
        optimizer.step()
    made = greedy(backbone.embed(seen), limit=10)
    assert backbone.answer_texts(made.id_BT) == answers
    assert made.ended_B.all()


def test_extra_ids_are_learned_and_read_like_any_other():
    """They come after the text's ids, may be mixed with them, and a wrong one costs as much as a wrong letter."""
    backbone = speaker(extra_ids=3)
    assert (backbone.text_vocabulary, backbone.vocabulary) == (END + 1, END + 4)
    ids = torch.tensor([[END + 1, END + 3, 65, END], [END + 2, END, -100, -100]])
    backbone.answer_loss(backbone.embed(observe()), ids).backward()
    assert backbone.answer.weight.grad[END + 1 :].abs().sum(1).gt(0).all()
    assert backbone.answer_texts(ids) == ["<+0><+2>A", "<+1>"]


def test_queries_are_answered_in_one_pass_and_see_each_other():
    """One loss for both ways to answer; a later query changes what an earlier one says, a later answer token never does."""
    backbone, query_TW = speaker(extra_ids=4), torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    prefix, ids = backbone.embed(observe()), torch.tensor([[257, 258, 259], [260, 257, 258]])
    passed = backbone.ask(prefix, query_TW)
    logits = passed.state_BTW @ backbone.answer.weight.T
    expected = functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    torch.testing.assert_close(backbone.score(passed, ids), expected, **ROUNDING)
    other = query_TW.clone()
    other[2] = -other[2]
    assert not torch.allclose(backbone.ask(prefix, other).state_BTW[:, 0], passed.state_BTW[:, 0])
    first, second = (backbone.read(prefix, torch.tensor([[65, 66, last]] * 2)).state_BTW for last in (67, 68))
    assert torch.equal(first, second)  # the last token names nothing
    assert [m.key_CGPE.shape[2] for m in passed.memory] == [3, 3, 3]


def test_a_backbone_without_answers_is_as_it_was():
    """The same weights from the same seed, a config of before still opens, and asking says what to set."""
    quiet, loud = build(), speaker()
    names = {name for name, _ in quiet.named_parameters()}
    assert {name for name, _ in loud.named_parameters()} - names == {"answer.weight"}
    assert all(torch.equal(p, loud.get_parameter(name)) for name, p in quiet.named_parameters())
    written = to_json(CONFIG)
    before = {key: value for key, value in written.items() if key not in ("answers", "extra_ids")}
    assert from_json(TinyConfig, before, "config.json") == CONFIG
    for asked in (lambda: greedy(quiet.embed(observe())), lambda: speaking(quiet), lambda: quiet.embed_ids(torch.zeros(1, 1))):
        with pytest.raises(CapabilityError, match=r"no language-model head.*policy\.backbone\.answers=true"):
            asked()


def test_impossible_limits_and_sizes_are_refused():
    backbone = speaker(suffix=4)
    with pytest.raises(ConfigError, match="limit cannot be 0"):
        greedy(backbone.embed(observe()), limit=0)
    with pytest.raises(ConfigError, match="raise 'suffix'"):
        backbone.answer_loss(backbone.embed(observe()), backbone.answer_ids(["a long", "answer"]))
    with pytest.raises(ConfigError, match="needs answers=true"):
        dataclasses.replace(CONFIG, extra_ids=2)
