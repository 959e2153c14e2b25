"""Molmo2 against transformers' own forward pass, on a small random model that is written to disk like a published one."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests import helpers
from tests.helpers import action_spec, count_layers, feature_stats
from vlaflow.backbones.molmo2 import MolmoConfig, molmo2_8b
from vlaflow.backbones.molmo2_processor import ImagePatches
from vlaflow.compute.dense import Dense
from vlaflow.compute.early_exit import EarlyExit, ExitPlan
from vlaflow.data.batch import ObservationBatch
from vlaflow.decoders.exits import ExitTraining
from vlaflow.decoders.flow import FlowConfig
from vlaflow.errors import CapabilityError, ConfigError, SpecError
from vlaflow.nn.block import BlockConfig
from vlaflow.nn.stored import drawing, shared_later
from vlaflow.policies.base import Policy, PolicyConfig
from vlaflow.spec import Observation
from vlaflow.stacks.expert import ExpertConfig
from vlaflow.stacks.shared import SharedStack

transformers = pytest.importorskip("transformers")

ROUNDING = {"atol": 2e-5, "rtol": 1e-4}  # float32, sums in another order
VIEWS = ("front", "wrist")
SENTENCES = ("Open the drawer.", "Press the red button on top, then close the window.")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>", "<|image|>", "<|video|>"]
SPECIAL += [
    "<im_patch>",
    "<im_col>",
    "<im_start>",
    "<low_res_im_start>",
    "<frame_start>",
    "<im_end>",
    "<frame_end>",
    "<im_low>",
]
TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{% for part in turn['content'] %}"
    "{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 330,
    "additional_vocab_size": 6,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "image_size": [70, 70],  # five patches a side: pooling reaches over the border
}
ADAPTER = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vision_feature_layer": [2, 0],
    "text_hidden_size": 64,
    "intermediate_size": 48,
}


def write_model(folder, **text):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(SENTENCES, trainer)
    tokenizer = transformers.Qwen2TokenizerFast(
        tokenizer_object=bpe, unk_token=None, pad_token=SPECIAL[0], eos_token=SPECIAL[2], additional_special_tokens=SPECIAL[3:]
    )
    tokenizer.save_pretrained(folder)
    config = transformers.Molmo2Config(
        text_config={**TEXT, **text},
        vision_config=VISION,
        adapter_config=ADAPTER,
        image_patch_id=bpe.token_to_id("<im_patch>"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = transformers.Molmo2ForConditionalGeneration(config)
        for parameter in network.parameters():  # the small standard initialisation would hide errors
            parameter.data += 0.05 * torch.randn_like(parameter)
    network.save_pretrained(folder)
    settings = {"image_processor_type": "Molmo2ImageProcessor", "size": {"height": 70, "width": 70}, "pooling_size": [2, 2]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = {"processor_class": "Molmo2Processor", "image_use_col_tokens": True, "use_single_crop_col_tokens": False}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("molmo"))


def molmo_config(folder, **changes):
    return MolmoConfig(**{"state_dim": 4, "views": VIEWS, "source": str(folder), **changes})


def build(folder, **changes):
    return helpers.built(molmo_config(folder, **changes))


@pytest.fixture(scope="module")
def backbone(folder):
    torch.manual_seed(3)
    return build(folder)


def observation(seed=0):
    rng = np.random.default_rng(seed)
    images = {
        "front": rng.integers(0, 256, (70, 70, 3), dtype=np.uint8),
        "wrist": rng.integers(0, 256, (48, 60, 3), dtype=np.uint8),
    }
    return Observation(images, rng.normal(size=4).astype(np.float32), SENTENCES[seed % 2])


OBSERVED = ObservationBatch.collate([observation(0), observation(1)])


@cache
def theirs(folder):
    return transformers.Molmo2ForConditionalGeneration.from_pretrained(folder).eval()


@torch.no_grad()
def test_every_layer_is_that_of_transformers(folder):
    """Two views, instructions of different lengths, no state token: all hidden states and the logits agree."""
    ours = build(folder, state_token=None)
    prompt, (rows, columns) = ours.processor(OBSERVED), ours.processor.reader.image_processor.grid
    mask_BP = prompt.padding_mask_BP
    assert not mask_BP.all()
    assert (rows, columns) == (3, 3)
    out = theirs(folder)(
        input_ids=prompt.id_BP,
        attention_mask=mask_BP.long(),
        pixel_values=prompt.patches,
        image_token_pooling=prompt.pooled_VK,
        image_grids=torch.tensor([[rows, columns, 0, 0]] * 4),
        mm_token_type_ids=prompt.image_P.long().expand(2, -1),
        output_hidden_states=True,
    )
    prefix = helpers.embed(ours, OBSERVED)
    for depth in range(ours.spec.depth):
        mine = ours.run(prefix, depth).hidden_BPW
        torch.testing.assert_close(mine[mask_BP], out.hidden_states[depth][mask_BP], **ROUNDING)
    torch.testing.assert_close(
        ours.name_ids(ours.finish(ours.run(prefix).hidden_BPW))[mask_BP],
        out.logits[mask_BP],
        **ROUNDING,
    )


def test_patches_are_cut_row_by_row_and_pooled_by_neighbourhood():
    image_processor = ImagePatches(side=70)
    images = torch.from_numpy(np.stack([observation(i).images["front"] for i in range(2)]))
    patches = image_processor.patches(images)
    for image, row, column in ((0, 0, 0), (1, 2, 3), (0, 4, 4)):
        cut = images[image, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14].float()
        torch.testing.assert_close(patches[image, 5 * row + column], ((cut / 255 - 0.5) / 0.5).flatten(), rtol=0, atol=1e-6)
    assert image_processor.grid == (3, 3)
    pooled = image_processor.pooled(2)  # five patches a side and pools of two: the last row and column stand alone
    wanted = [[0, 1, 5, 6], [2, 3, 7, 8], [4, -1, 9, -1], [10, 11, 15, 16], [12, 13, 17, 18], [14, -1, 19, -1]]
    wanted += [[20, 21, -1, -1], [22, 23, -1, -1], [24, -1, -1, -1]]
    assert pooled[:9].tolist() == wanted
    assert pooled[9:].tolist() == [[i + 25 if i >= 0 else -1 for i in pool] for pool in wanted]
    assert ImagePatches().words.count("<im_patch>") == 14 * 14
    assert ImagePatches().patches(images).shape == (2, 27 * 27, 588)


@torch.no_grad()
def test_images_see_each_other_and_words_only_what_is_before(backbone):
    """The first view depends on the second; no word on a later one."""
    prefix = helpers.embed(backbone, OBSERVED)
    image_P = backbone.processor(OBSERVED).image_P
    first, last = int(image_P.nonzero()[0]), int(image_P.nonzero()[-1])
    changed = replace(OBSERVED, images={**OBSERVED.images, "wrist": 255 - OBSERVED.images["wrist"]})
    other = backbone.run(helpers.embed(backbone, changed)).hidden_BPW
    same = backbone.run(prefix).hidden_BPW
    assert not torch.allclose(other[:, first], same[:, first])
    assert torch.equal(other[:, :first], same[:, :first])
    words = replace(OBSERVED, instructions=["Open the window.", SENTENCES[1]])
    shorter = backbone.run(helpers.embed(backbone, words)).hidden_BPW
    torch.testing.assert_close(shorter[:, : last + 1], same[:, : last + 1], **ROUNDING)


@torch.no_grad()
def test_continuing_a_prefix_loses_nothing_and_company_changes_nothing(backbone):
    prefix = helpers.embed(backbone, OBSERVED)
    at_once, halves = backbone.run(prefix), backbone.run(backbone.run(prefix, 1))
    assert torch.equal(at_once.hidden_BPW, halves.hidden_BPW)
    suffix_BTW = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    together = SharedStack(64)(suffix_BTW, at_once)
    for row in range(2):
        alone = backbone.run(helpers.embed(backbone, ObservationBatch.collate([observation(row)])))
        torch.testing.assert_close(together[row : row + 1], SharedStack(64)(suffix_BTW[row : row + 1], alone), **ROUNDING)
        chosen = at_once.select(torch.tensor([row]))
        torch.testing.assert_close(together[row : row + 1], SharedStack(64)(suffix_BTW[row : row + 1], chosen), **ROUNDING)


@torch.no_grad()
def test_a_suffix_on_the_cached_prefix_is_the_whole_sequence_recomputed(folder, backbone):
    one = ObservationBatch.collate([observation(0)])
    prefix = helpers.embed(backbone, one)
    p, t = prefix.hidden_BPW.shape[1], 5
    suffix_BTW = torch.randn(1, t, 64, generator=torch.Generator().manual_seed(1))
    sees = torch.ones(p + t, p + t, dtype=torch.bool)
    sees[:p] = False
    sees[:p, :p] = prefix.mask_PP
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[None, None]
    whole = theirs(folder).model.language_model(
        inputs_embeds=torch.cat((prefix.hidden_BPW, suffix_BTW), 1), position_ids=torch.arange(p + t)[None], attention_mask=mask
    )
    torch.testing.assert_close(SharedStack(64)(suffix_BTW, backbone.run(prefix)), whole.last_hidden_state[:, p:], **ROUNDING)


def policy(folder, **changes):
    block = BlockConfig(48, 4, 2, 16, 64, norm="rms", gated=True)
    decoder = FlowConfig(
        4, chunk_size=6, padded_dim=8, masks="synchronous", expert=ExpertConfig(block, padded_state=8), head_layers=2
    )
    config = PolicyConfig("a1", molmo_config(folder, **changes), decoder, exits=ExitTraining((1, 2, 3)), n_action_steps=3)
    made = Policy.create(config, action_spec(4), {"state": feature_stats(4, 1), "action": feature_stats(4, 2)}, seed=0)
    made.model.eval()
    return made


def test_an_a1_policy_acts_leaves_early_and_opens_without_its_source(folder, tmp_path, monkeypatch):
    made = policy(folder, state_token=None)
    made.save_pretrained(tmp_path / "ckpt")
    again = Policy.from_pretrained(tmp_path / "ckpt")
    leave = EarlyExit(ExitPlan((1, 2, 3)), (np.inf, np.inf))
    for compute in (Dense(3), leave):
        chunks = [p.act(observation(), compute, generator=torch.Generator().manual_seed(0)) for p in (made, again)]
        assert np.array_equal(chunks[0].actions, chunks[1].actions)
    calls = count_layers(monkeypatch, made.model.backbone)
    assert made.act(observation(), leave, generator=torch.Generator().manual_seed(0)).layers == 2
    assert [index for index, _ in calls] == [0, 1]
    assert json.loads((tmp_path / "ckpt/config.json").read_text())["backbone"]["source"] is None


def test_answers_and_gradients_reach_the_language_model(folder):
    made = policy(folder, recompute=True)
    made.model.train()
    backbone = made.model.backbone
    answer = made.processor.backbone.answer_ids(["Done.", "It is open now"])
    loss = backbone.answer_loss(made.embed(OBSERVED), answer)
    loss.backward()
    assert loss.isfinite()
    assert backbone.language.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert backbone.state.weight.grad.abs().sum() > 0


def test_the_published_size():
    """8.66 B parameters; A1's expert would read 36 layers."""
    with torch.device("meta"):
        network = MolmoConfig(8, VIEWS, architecture=molmo2_8b(), padded_state=32).build()
    pretrained = sum(p.numel() for name, p in network.named_parameters() if not name.startswith("state."))
    assert pretrained == pytest.approx(8.66e9, rel=1e-3)
    assert network.spec.depth == 36


def test_wrong_input_is_one_sentence(folder, backbone, tmp_path):
    with pytest.raises(SpecError, match="state of length 4, got 3"):
        backbone.processor(replace(OBSERVED, state_BS=OBSERVED.state_BS[:, :3]))
    with pytest.raises(SpecError, match="plain words"):
        backbone.processor(replace(OBSERVED, instructions=["<|image|>", "x"]))
    with pytest.raises(ConfigError, match="no Molmo2 folder"):
        molmo_config(tmp_path / "missing").build()
    with pytest.raises(ConfigError, match="used once"):
        molmo_config(folder, state_token="drawer").processor()(OBSERVED)
    with pytest.raises(CapabilityError, match="no tokenizer"):
        MolmoConfig(4, VIEWS, architecture=backbone.config.architecture).processor()(OBSERVED)
    olmo = json.loads(json.dumps(backbone.config.architecture))
    olmo["text_config"]["qk_norm_type"] = "olmo"
    with pytest.raises(ConfigError, match="4B, 8B"):
        MolmoConfig(4, VIEWS, architecture=olmo).build()
    with pytest.raises(ConfigError, match="either 'source'"):
        MolmoConfig(4, VIEWS)


def test_an_answer_holds_what_the_head_can_name(folder):
    """The table of embeddings has more rows than the head; the ids of the answers are the head's."""
    backbone = build(folder)
    assert backbone.language.embed_tokens.weight.shape[0] > backbone.vocabulary
    assert backbone.name_ids(torch.randn(2, backbone.spec.width)).shape == (2, backbone.vocabulary)
    with pytest.raises(SpecError, match=f"vocabulary ends at {backbone.vocabulary - 1}"):
        backbone.answer_loss(helpers.embed(backbone, OBSERVED), torch.full((2, 1), backbone.vocabulary))


@torch.no_grad()
def test_with_full_attention_the_first_word_sees_the_last(folder):
    ours = build(folder, attention="full")
    same = ours.run(helpers.embed(ours, OBSERVED)).hidden_BPW
    other = replace(OBSERVED, state_BS=OBSERVED.state_BS + 1)
    assert not torch.allclose(ours.run(helpers.embed(ours, other)).hidden_BPW[:, 0], same[:, 0])


@pytest.mark.parametrize("first", [True, False])
def test_a_model_whose_weights_are_put_together_is_opened_by_the_first_process_alone(folder, first):
    """Its queries, keys and values are one tensor of the file, so no process could read its own rows."""
    with shared_later(first), drawing():
        made = molmo_config(folder).build()
    assert all(p.is_meta is not first for p in made.parameters())
    if first:
        assert torch.equal(made.language.embed_tokens.weight, build(folder).language.embed_tokens.weight)
