"""Answers of Qwen2.5-VL against transformers' own generation, and tokens after tokens."""

import pytest
import torch

from tests import helpers
from tests.backbones.test_qwen2_5_vl import OBSERVED, ROUNDING, build, observations, their_inputs, theirs, write_model
from tests.backbones.test_qwen2_5_vl import write_placeholder as write_state
from vlaflow.data.batch import ObservationBatch
from vlaflow.decoders.answers import greedy
from vlaflow.errors import SpecError
from vlaflow.nn.attention import causal_mask

pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("qwen"), tied=request.param)


@torch.no_grad()
def test_greedy_answers_are_those_of_transformers(folder):
    """Together with prompts of another length, with kept keys, they are what the model generates for each alone."""
    ours, model = build(folder), theirs(folder)
    write_state(ours)
    made = greedy(helpers.embed(ours, OBSERVED), ours.processor.end_id, limit=6)
    for row, seen in enumerate(observations()):
        prompt = ours.processor(ObservationBatch.collate([seen]))
        out = model.generate(
            **their_inputs(prompt), max_new_tokens=6, do_sample=False, eos_token_id=ours.processor.end_id, pad_token_id=0
        )
        said = out[0, prompt.id_BP.shape[1] :]
        assert made.id_BT[row][made.id_BT[row] >= 0].tolist() == said.tolist()
        assert bool(made.ended_B[row]) == (ours.processor.end_id in said.tolist())


def test_an_answer_says_its_words_again(folder):
    ours, said = build(folder), ["Open the drawer.", "close"]
    ids = ours.processor.answer_ids(said)
    assert ours.processor.answer_texts(ids) == said
    ids[0, 0] = ours.vocabulary
    with pytest.raises(SpecError, match="vocabulary ends at 335"):
        ours.answer_loss(helpers.embed(ours, OBSERVED), ids)


@torch.no_grad()
def test_tokens_after_written_ones_take_the_next_places(folder):
    """Tokens written in two passes, the second reading the first's keys, have the states of one causal pass."""
    ours = build(folder)
    said = ours.processor.answer_ids(["Open the drawer."])
    prefix, token_BTW = ours.run(helpers.embed(ours, OBSERVED)), ours.embed_ids(said).expand(2, -1, -1)
    t, depths, mask_TS = token_BTW.shape[1], (prefix.depth,), causal_mask(token_BTW.shape[1])
    (whole_BTW,), _ = ours.follow(token_BTW, prefix, depths, mask_TS)
    (first_BTW,), own = ours.follow(token_BTW[:, :2], prefix, depths, mask_TS[:2, :2])
    seen = prefix.reading(tuple(p.cat(new) for p, new in zip(prefix.kv_cache, own, strict=True)), 2)
    (rest_BTW,), _ = ours.follow(token_BTW[:, 2:], seen, depths, mask_TS[2:, 2:])
    torch.testing.assert_close(torch.cat((first_BTW, rest_BTW), 1), whole_BTW, **ROUNDING)
    here, there = (ours.rotation(seen, 2, t - 2), ours.rotation(prefix, 2, t))
    x_BHTE = torch.ones(2, 4, t, ours.spec.head_dim)
    expected = there(x_BHTE, x_BHTE[:, :2])[0][:, :, 2:]
    torch.testing.assert_close(here(x_BHTE[:, :, 2:], x_BHTE[:, :2, 2:])[0], expected)
