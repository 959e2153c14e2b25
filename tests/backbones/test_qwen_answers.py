"""Answers of Qwen2.5-VL against transformers' own generation, and ids appended to its vocabulary."""

import pytest
import torch

from tests.backbones.test_qwen2_5_vl import OBSERVED, ROUNDING, build, observations, their_inputs, theirs, write_model
from tests.backbones.test_qwen2_5_vl import write_placeholder as write_state
from vlaflow.data.batch import ObservationBatch
from vlaflow.decoders.answers import greedy
from vlaflow.errors import ConfigError, SpecError

pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("qwen"), tied=request.param)


@torch.no_grad()
def test_greedy_answers_are_those_of_transformers(folder):
    """Together with prompts of another length, with kept keys, they are what the model generates for each alone."""
    ours, model = build(folder), theirs(folder)
    write_state(ours)
    made = greedy(ours.embed(OBSERVED), limit=6)
    for row, seen in enumerate(observations()):
        prompt = ours.reader.read(ObservationBatch.collate([seen]), ours.config)
        out = model.generate(
            **their_inputs(prompt), max_new_tokens=6, do_sample=False, eos_token_id=ours.end_id, pad_token_id=0
        )
        said = out[0, prompt.id_BP.shape[1] :]
        assert made.id_BT[row][made.id_BT[row] >= 0].tolist() == said.tolist()
        assert bool(made.ended_B[row]) == (ours.end_id in said.tolist())


def test_extra_ids_leave_the_published_table_alone(folder):
    """Text keeps its logits, an answer may mix both kinds, and both get gradients; a checkpoint without them is as before."""
    plain, more = build(folder), build(folder, extra_ids=5)
    assert {n for n, _ in more.named_parameters()} - {n for n, _ in plain.named_parameters()} == {"appended.weight"}
    assert (more.text_vocabulary, more.vocabulary) == (336, 341)
    state_NW = torch.randn(2, 64)
    torch.testing.assert_close(more.name_ids(state_NW)[:, :336], plain.name_ids(state_NW), **ROUNDING)
    text = more.answer_ids(["Done"])[0]
    ids = torch.cat((torch.tensor([336, 340, 337]), text)).expand(2, -1)
    more.answer_loss(more.embed(OBSERVED), ids).backward()
    assert more.appended.weight.grad.abs().sum() > 0
    assert more.language.embed_tokens.weight.grad.abs().sum() > 0
    assert more.answer_texts(ids) == ["<+0><+4><+1>Done"] * 2
    assert plain.answer_texts(plain.answer_ids(["Open the drawer.", "close"])) == ["Open the drawer.", "close"]
    with pytest.raises(SpecError, match="vocabulary ends at 335"):
        plain.answer_loss(plain.embed(OBSERVED), ids)
    with pytest.raises(ConfigError, match="extra_ids is 0 or more"):
        build(folder, extra_ids=-1)
