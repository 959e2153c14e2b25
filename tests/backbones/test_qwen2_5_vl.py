"""Qwen2.5-VL against transformers' own forward pass, on a small random model that is written to disk like a published one."""

import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from tests import helpers
from vlaflow.backbones.qwen2_5_vl import PATCH, QwenConfig
from vlaflow.backbones.qwen2_5_vl_processor import QwenReader
from vlaflow.data.batch import ObservationBatch
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.model import Model
from vlaflow.errors import CapabilityError, ConfigError, SpecError
from vlaflow.policies.asyncvla.policy import qwen3b, qwen3b_rater, tiny, tiny_rater
from vlaflow.policies.asyncvla.recipes import libero
from vlaflow.policies.recipe import DataSpec
from vlaflow.spec import Observation
from vlaflow.stacks.shared import SharedStack

transformers = pytest.importorskip("transformers")

ROUNDING = {"atol": 2e-5, "rtol": 1e-4}  # float32, sums in another order, three layers
VIEWS = {"front": (60, 90), "wrist": (75, 75)}  # 24 and 25 image tokens: more than one vision window each
SENTENCES = ("Open the drawer.", "Press the red button on top, then close the window.")
NAMES = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
SPECIAL = [f"<|{name}|>" for name in NAMES]
TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n"
    "{% if turn['content'] is string %}{{ turn['content'] }}{% else %}{% for part in turn['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model(folder, tied, text=None, vision=None):
    """A folder like those on the Hub: config, weights, tokenizer, image settings, chat template; of other sizes if asked."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(SENTENCES, trainer)
    tokenizer = transformers.Qwen2TokenizerFast(
        tokenizer_object=bpe, unk_token=None, pad_token=SPECIAL[0], eos_token=SPECIAL[2], additional_special_tokens=SPECIAL[3:]
    )
    tokenizer.save_pretrained(folder)
    ids = {name: bpe.token_to_id(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start", "vision_end")}
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 336,  # more rows than tokens, as published
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            "bos_token_id": 0,
            "eos_token_id": 2,
            **(text or {}),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            **(vision or {}),
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = transformers.Qwen2_5_VLForConditionalGeneration(config)
        for parameter in network.parameters():  # the small standard initialisation would hide errors
            parameter.data += 0.05 * torch.randn_like(parameter)
    network.save_pretrained(folder)
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("qwen"), tied=True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("untied"), tied=False)


def qwen_config(folder, **changes):
    options = {"state_dim": 4, "views": tuple(VIEWS), "min_pixels": 4 * PATCH, "max_pixels": 25 * PATCH, **changes}
    return QwenConfig(source=str(folder), **options)


def build(folder, **changes):
    return helpers.built(qwen_config(folder, **changes))


@pytest.fixture(scope="module")
def backbone(folder):
    return build(folder)


def observation(seed=0, instruction=SENTENCES[0], views=VIEWS):
    rng = np.random.default_rng(seed)
    images = {view: rng.integers(0, 256, (*size, 3), dtype=np.uint8) for view, size in views.items()}
    return Observation(images, rng.normal(size=4).astype(np.float32), instruction)


def observations():
    return [observation(i, sentence) for i, sentence in enumerate(SENTENCES)]


def theirs(folder):
    """transformers' own model."""
    return transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()


def write_placeholder(backbone):
    """Make the state token the embedding of its placeholder, so that transformers' forward sees the same input."""
    placeholder = backbone.processor.reader.tokenizer.convert_tokens_to_ids(backbone.config.state_token)
    with torch.no_grad():
        backbone.state.weight.zero_()
        backbone.state.bias.copy_(backbone.network.language_model.embed_tokens.weight[placeholder])


def their_inputs(prompt):
    return {
        "input_ids": prompt.id_BP,
        "attention_mask": (prompt.id_BP >= 0 if prompt.padding_mask_BP is None else prompt.padding_mask_BP).long(),
        "mm_token_type_ids": prompt.image_BP.int(),
        "pixel_values": prompt.patches,
        "image_grid_thw": prompt.grid_I3,
    }


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_every_layer_is_that_of_transformers(folder, untied, tied):
    """Two views of different sizes and shapes, instructions of different lengths: all hidden states and the logits agree."""
    source = folder if tied else untied
    ours, batch = build(source), ObservationBatch.collate(observations())
    write_placeholder(ours)
    prompt = ours.processor(batch)
    mask_BP = prompt.padding_mask_BP
    assert not mask_BP.all()
    out = theirs(source)(**their_inputs(prompt), output_hidden_states=True)
    prefix = helpers.embed(ours, batch)
    for depth in range(ours.spec.depth):
        torch.testing.assert_close(
            ours.run(prefix, depth).hidden_BPW[mask_BP],
            out.hidden_states[depth][mask_BP],
            **ROUNDING,
        )
    last_BPW = ours.run(prefix).hidden_BPW
    torch.testing.assert_close(ours.finish(last_BPW)[mask_BP], out.hidden_states[-1][mask_BP], **ROUNDING)
    torch.testing.assert_close(ours.name_ids(ours.finish(last_BPW))[mask_BP], out.logits[mask_BP], **ROUNDING)


def test_the_prompt_is_that_of_the_models_own_processor(backbone):
    """The published processor class needs torchvision for videos only; without that check it reads the very same tokens."""

    class ForImages(transformers.Qwen2_5_VLProcessor):
        def check_argument_for_proper_class(self, argument_name, argument):
            return type(argument)

    reader, batch, c = backbone.processor.reader, ObservationBatch.collate(observations()), backbone.config
    processor = ForImages(reader.image_processor, reader.tokenizer, SimpleNamespace(), chat_template=TEMPLATE)
    turns = [
        [
            {"role": "system", "content": c.system},
            {"role": "user", "content": [*[{"type": "image"}] * 2, {"type": "text", "text": c.state_token + sentence}]},
        ]
        for sentence in SENTENCES
    ]
    expected = processor(
        text=[processor.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns],
        images=[[batch.images[view][i].numpy() for view in VIEWS] for i in range(2)],
        images_kwargs={"size": {"shortest_edge": c.min_pixels, "longest_edge": c.max_pixels}},
        padding=True,
        return_tensors="pt",
    )
    prompt = backbone.processor(batch)
    for name, value in their_inputs(prompt).items():
        torch.testing.assert_close(value.to(expected[name].dtype), expected[name], rtol=0, atol=0)


@torch.no_grad()
def test_a_prefix_continued_is_a_prefix_run_at_once(backbone):
    """Early exits stop anywhere; continuing must lose nothing, to the bit."""
    prefix = helpers.embed(backbone, ObservationBatch.collate(observations()))
    at_once, halves = backbone.run(prefix), backbone.run(backbone.run(prefix, 1))
    assert torch.equal(at_once.hidden_BPW, halves.hidden_BPW)
    assert all(torch.equal(a.key_CGPE, b.key_CGPE) for a, b in zip(at_once.kv_cache, halves.kv_cache, strict=True))


def suffix_reference(folder, prefix, suffix_BTW):
    """All tokens in one sequence through transformers' language model, with the mask written out."""
    p, t = prefix.hidden_BPW.shape[1], suffix_BTW.shape[1]
    sees = torch.ones(p + t, p + t, dtype=torch.bool).tril()
    sees[p:, p:] = True
    sees = sees.repeat(prefix.batch, 1, 1)
    sees[:, :, :p] &= prefix.padding_mask_BP[:, None, :]
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[:, None]
    language, prompt = theirs(folder).model.language_model, prefix.backbone.processor(OBSERVED)
    position_3BP, deltas_B1 = theirs(folder).model.get_rope_index(
        prompt.id_BP, prompt.image_BP.int(), prompt.grid_I3, attention_mask=prompt.padding_mask_BP.long()
    )
    # transformers' own continuation of positions: tokens so far + rope delta
    after_BT = prompt.padding_mask_BP.sum(1, keepdim=True) + deltas_B1 + torch.arange(t)
    out = language(
        inputs_embeds=torch.cat((prefix.hidden_BPW, suffix_BTW), 1),
        position_ids=torch.cat((position_3BP, after_BT.expand(3, -1, -1)), 2),
        attention_mask={"full_attention": mask},
    )
    return out.last_hidden_state[:, p:]


OBSERVED = ObservationBatch.collate(observations())


@torch.no_grad()
def test_a_suffix_on_the_cached_prefix_is_the_whole_sequence_recomputed(folder, backbone):
    """Actions see the whole prefix and each other; the prefix never sees them, so its keys and values stay exact."""
    prefix = helpers.embed(backbone, OBSERVED)
    suffix_BTW = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    cached_BTW = SharedStack(64)(suffix_BTW, backbone.run(prefix))
    torch.testing.assert_close(cached_BTW, suffix_reference(folder, prefix, suffix_BTW), **ROUNDING)


@torch.no_grad()
def test_noise_samples_share_one_prefix(backbone):
    """Three noise samples of two observations are what six single calls give, on keys and values for two."""
    prefix = backbone.run(helpers.embed(backbone, OBSERVED))
    suffix_BTW = torch.randn(6, 4, 64, generator=torch.Generator().manual_seed(2))
    together_BTW = SharedStack(64)(suffix_BTW, prefix)
    for draw in range(3):
        torch.testing.assert_close(together_BTW[draw::3], SharedStack(64)(suffix_BTW[draw::3], prefix), **ROUNDING)
    assert all(m.key_CGPE.shape[0] == 2 for m in prefix.kv_cache)


@torch.no_grad()
def test_company_changes_nothing(backbone):
    """Padding next to a longer instruction leaves the actions' hidden states as they were alone."""
    suffix_BTW = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(3))
    together_BTW = SharedStack(64)(suffix_BTW, backbone.run(helpers.embed(backbone, OBSERVED)))
    for i, one in enumerate(observations()):
        alone = backbone.run(helpers.embed(backbone, ObservationBatch.collate([one])))
        assert alone.padding_mask_BP is None
        torch.testing.assert_close(together_BTW[i : i + 1], SharedStack(64)(suffix_BTW[i : i + 1], alone), **ROUNDING)


@torch.no_grad()
def test_state_and_views_are_seen(folder, backbone):
    """Another state or another image in either view gives another prefix; without views it still reads the rest."""
    last_W = backbone.run(helpers.embed(backbone, OBSERVED)).hidden_BPW[1, -1]
    changed = replace(OBSERVED, state_BS=OBSERVED.state_BS + 1)
    assert not torch.allclose(backbone.run(helpers.embed(backbone, changed)).hidden_BPW[1, -1], last_W)
    for view in VIEWS:
        changed = replace(OBSERVED, images={**OBSERVED.images, view: 255 - OBSERVED.images[view]})
        assert not torch.allclose(backbone.run(helpers.embed(backbone, changed)).hidden_BPW[1, -1], last_W)
    blind = QwenConfig(4, (), architecture=backbone.config.architecture).build()
    blind.processor = qwen_config(folder, views=()).processor()
    assert blind.run(helpers.embed(blind, replace(OBSERVED, images={}))).hidden_BPW.isfinite().all()


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_answer_loss_is_that_of_transformers(folder, untied, tied):
    """Answers of different lengths after prompts of different lengths; the end of the turn is a target too."""
    source = folder if tied else untied
    ours = build(source)
    write_placeholder(ours)
    answer_BT = ours.processor.answer_ids(["Done.", "The drawer is open now"])
    prompt = ours.processor(OBSERVED)
    rows = []
    for i in range(2):
        asked, answered = prompt.id_BP[i][prompt.padding_mask_BP[i]], answer_BT[i][answer_BT[i] >= 0]
        rows.append((torch.cat((asked, answered)), torch.cat((torch.full_like(asked, -100), answered))))
    pad = nn.utils.rnn.pad_sequence
    ids = pad([row[0] for row in rows], batch_first=True)
    inputs = {
        **their_inputs(prompt),
        "input_ids": ids,
        "attention_mask": pad([torch.ones_like(row[0]) for row in rows], batch_first=True),
        "mm_token_type_ids": (ids == ours.network.config.image_token_id).int(),
    }
    labels = pad([row[1] for row in rows], batch_first=True, padding_value=-100)
    expected = theirs(source)(**inputs, labels=labels).loss
    torch.testing.assert_close(ours.answer_loss(helpers.embed(ours, OBSERVED), answer_BT), expected, **ROUNDING)


# -- at full size --------------------------------------------------------------------------------------------------------


def test_asyncvla_3b_has_the_published_size():
    """AsyncVLA §4: 4.08 B in all, 308 M of it the rater; EO-1's head has 16.98 M, its backbone 3.755 B."""
    config = qwen3b(DataSpec(8, 7, ("agent", "wrist")), source=None)
    with torch.device("meta"):
        model = replace(config, rater=qwen3b_rater(config)).build()

    def count(module):
        return sum(p.numel() for p in module.parameters())

    head = count(model.decoder) + count(model.backbone.state)
    assert count(model.backbone.network) == 3_754_622_976
    assert head == 16_984_096
    assert count(model.rater) == pytest.approx(308.4e6, rel=5e-4)
    assert count(model) == pytest.approx(4.080e9, rel=1e-4)


def test_the_recipe_names_parts_that_exist(backbone):
    """A learning rate for a misspelt prefix would silently be the default one."""
    recipe = libero(DataSpec(8, 7, ("agent", "wrist")))
    names = [n for n, _ in Model(backbone, FlowConfig(7).build(backbone.spec)).named_parameters()]
    for group in recipe.optim.groups:
        assert any(n.startswith(group.prefix) for n in names), group.prefix


# -- what a user can fix ------------------------------------------------------------------------------------------------


def test_without_transformers_it_says_what_to_install(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CapabilityError, match="pip install 'vlaflow\\[vlm\\]'"):
        qwen_config(folder).build()


def test_wrong_input_is_one_sentence(folder, backbone):
    with pytest.raises(SpecError, match="state of length 4, got 5"):
        backbone.processor(replace(OBSERVED, state_BS=torch.zeros(2, 5)))
    with pytest.raises(SpecError, match="plain words"):
        backbone.processor(replace(OBSERVED, instructions=["open", "close <|image_pad|>"]))
    for token in ("<|nowhere|>", "e"):  # no token at all, and a letter of every sentence
        with pytest.raises(ConfigError, match="one token"):
            qwen_config(folder, state_token=token).processor()(OBSERVED)
    with pytest.raises(ConfigError, match="either 'source'"):
        QwenConfig(4, ("front",))
    with pytest.raises(ConfigError, match="raise it"):
        qwen_config(folder, state_dim=33)
    with pytest.raises(ConfigError, match="must lie between"):
        qwen_config(folder, min_pixels=100)
    with pytest.raises(CapabilityError, match="no tokenizer"):
        QwenConfig(4, ("front",), architecture=backbone.config.architecture).processor()(OBSERVED)


def test_a_folder_that_is_no_model_is_named(tmp_path, folder):
    with pytest.raises(ConfigError, match=r"'.*missing' is no Qwen2\.5-VL"):
        qwen_config(tmp_path / "missing").build()
    shutil.copytree(folder, tmp_path / "mute")
    (tmp_path / "mute" / "chat_template.json").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        QwenReader.open(str(tmp_path / "mute"))


def test_each_rater_is_as_wide_as_the_states_it_reads():
    for policy, rater in (
        (tiny(DataSpec(4, 4, ("image",))), tiny_rater),
        (qwen3b(DataSpec(4, 4, ("image",)), source=None), qwen3b_rater),
    ):
        with torch.device("meta"):
            assert rater(policy).block.width == policy.backbone.build().spec.width
