"""Answers: their loss, what it refuses, and greedy decoding."""

import pytest
import torch
from torch.nn import functional

from tests import helpers
from tests.backbones.test_tiny import CONFIG, build, observe
from vlaflow.backbones.language import speaking
from vlaflow.backbones.tiny import END, TinyConfig
from vlaflow.config import from_json, to_json
from vlaflow.data.batch import ObservationBatch
from vlaflow.decoders.answers import greedy
from vlaflow.errors import CapabilityError, ConfigError, SpecError

WORDS = CONFIG.processor()
ROUNDING = {"atol": 1e-5, "rtol": 1e-4}  # float32, sums in another order


def speaker(**changes):
    return build(answers=True, **changes)


def test_the_loss_is_the_cross_entropy_of_each_token_after_those_before_it():
    """Token by token: the state before it, from a pass over nothing but the tokens before it."""
    backbone = speaker()
    prefix, ids = helpers.embed(backbone, observe(words=("Open",))), WORDS.answer_ids(["left"])
    whole, losses = backbone.run(prefix), []
    for t in range(ids.shape[1]):
        state_BW = backbone.before_answer(whole)
        if t:
            token_BTW, _ = backbone.place(backbone.embed_ids(ids[:, :t]), whole)
            for index, kv_cache in enumerate(whole.kv_cache):
                causal = torch.ones(t, t, dtype=torch.bool).tril()
                token_BTW, _ = backbone.layer(index, token_BTW, None, kv_cache, mask_TS=causal)
            state_BW = backbone.finish(token_BTW)[:, -1]
        losses.append(functional.cross_entropy(state_BW @ backbone.answer.weight.T, ids[:, t]))
    torch.testing.assert_close(backbone.answer_loss(prefix, ids), torch.stack(losses).mean(), **ROUNDING)


def test_answers_of_different_lengths_are_masked():
    """The batch's loss is the mean over all tokens, as if each answer had been alone; padding counts nothing."""
    backbone, words = speaker(), ("Open", "Close a window")
    answers, seen = ["no", "in the middle"], observe(words=words)
    together = backbone.answer_loss(helpers.embed(backbone, seen), WORDS.answer_ids(answers))
    total, count = 0.0, 0
    for i, answer in enumerate(answers):
        alone = ObservationBatch({"image": seen.images["image"][i : i + 1]}, seen.state_BS[i : i + 1], [words[i]])
        ids = WORDS.answer_ids([answer])
        total, count = total + backbone.answer_loss(helpers.embed(backbone, alone), ids) * ids.numel(), count + ids.numel()
    torch.testing.assert_close(together, total / count, **ROUNDING)


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
        backbone.answer_loss(helpers.embed(backbone, observe()), torch.tensor(ids))


def test_greedy_with_kept_keys_is_greedy_recomputed():
    """At every place the id is the most probable one of a pass over the whole answer so far."""
    backbone = speaker()
    prefix = helpers.embed(backbone, observe())
    made = greedy(prefix, END, limit=12)
    ids, ended = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, dtype=torch.bool)
    for _ in range(made.id_BT.shape[1]):
        state_BTW = backbone.read(prefix, torch.cat((ids, torch.zeros(2, 1, dtype=torch.long)), 1))
        next_B = backbone.name_ids(state_BTW[:, -1]).argmax(-1)
        ids = torch.cat((ids, next_B[:, None]), 1)
    for row in range(2):
        known = made.id_BT[row] >= 0
        assert torch.equal(made.id_BT[row][known], ids[row][known])
        ended[row] = END in made.id_BT[row].tolist()
    assert torch.equal(made.ended_B, ended)


def test_an_answer_without_an_end_is_cut_at_the_limit_and_says_so():
    backbone, letters = speaker(), torch.zeros(END + 1, dtype=torch.bool)
    letters[ord("a") : ord("e")] = True
    made = greedy(helpers.embed(backbone, observe()), END, limit=5, allowed_V=letters)
    assert made.id_BT.shape == (2, 5)
    assert not made.ended_B.any()
    assert all(len(text) == 5 and set(text) <= set("abcd") for text in WORDS.answer_texts(made.id_BT))
    letters[:] = False
    letters[END] = True
    made = greedy(helpers.embed(backbone, observe()), END, limit=5, allowed_V=letters)
    assert made.id_BT.tolist() == [[END], [END]]
    assert made.ended_B.all()
    assert WORDS.answer_texts(made.id_BT) == ["", ""]


def test_it_learns_to_name_what_it_sees():
    """Dark and bright images, one question: after sixty steps both are named, and nothing else is said."""
    backbone, answers = speaker().train(), ["dark", "bright"]
    images = torch.stack([torch.full((32, 32, 3), value, dtype=torch.uint8) for value in (30, 220)])
    seen = ObservationBatch({"image": images}, torch.zeros(2, 3), ["How is it?"] * 2)
    optimizer, ids = torch.optim.AdamW(backbone.parameters(), 5e-3), WORDS.answer_ids(answers)
    for _ in range(60):
        optimizer.zero_grad()
        backbone.answer_loss(helpers.embed(backbone, seen), ids).backward()
        optimizer.step()
    made = greedy(helpers.embed(backbone, seen), END, limit=10)
    assert WORDS.answer_texts(made.id_BT) == answers
    assert made.ended_B.all()


def test_a_backbone_without_answers_is_as_it_was():
    """The same weights from the same seed, a config of before still opens, and asking says what to set."""
    quiet, loud = build(), speaker()
    names = {name for name, _ in quiet.named_parameters()}
    assert {name for name, _ in loud.named_parameters()} - names == {"answer.weight"}
    assert all(torch.equal(p, loud.get_parameter(name)) for name, p in quiet.named_parameters())
    written = to_json(CONFIG)
    before = {key: value for key, value in written.items() if key != "answers"}
    assert from_json(TinyConfig, before, "config.json") == CONFIG
    for asked in (
        lambda: greedy(helpers.embed(quiet, observe()), END),
        lambda: speaking(quiet),
        lambda: quiet.embed_ids(torch.zeros(1, 1)),
    ):
        with pytest.raises(CapabilityError, match=r"no language-model head.*policy\.backbone\.answers=true"):
            asked()


def test_impossible_limits_and_sizes_are_refused():
    backbone = speaker(suffix=4)
    with pytest.raises(ConfigError, match="limit cannot be 0"):
        greedy(helpers.embed(backbone, observe()), END, limit=0)
    with pytest.raises(ConfigError, match=r"--set policy\.backbone\.suffix="):
        backbone.answer_loss(helpers.embed(backbone, observe()), WORDS.answer_ids(["a long", "answer"]))
