"""Emu3 against transformers' own forward pass, on a small random model that is written to disk like a published one."""

import json
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests import helpers
from tests.helpers import FAST, action_spec, count_layers, feature_stats
from vlaflow.backbones.emu3 import EmuConfig, emu3_8b
from vlaflow.compute.two_stage import TwoStage
from vlaflow.data.batch import ObservationBatch
from vlaflow.decoders.autoregressive import AutoregressiveConfig
from vlaflow.decoders.base import Targets
from vlaflow.decoders.discrete_flow import DiscreteFlowConfig
from vlaflow.decoders.masked_diffusion import MaskedDiffusionConfig
from vlaflow.decoders.token_metrics import EmbeddingMetric
from vlaflow.errors import CapabilityError, ConfigError, SpecError
from vlaflow.nn.stored import read_here, shared_later
from vlaflow.policies.base import Policy, PolicyConfig
from vlaflow.spec import Observation
from vlaflow.stacks.shared import SharedStack

transformers = pytest.importorskip("transformers")

ROUNDING = {"atol": 2e-5, "rtol": 1e-4}  # float32, sums in another order
VIEWS = ("front", "wrist")
SENTENCES = ("Open the drawer.", "Press the red button on top, then close the window.")
CODES = 16
NAMED = {
    "bos_token": "<|extra_203|>",
    "eos_token": "<|extra_204|>",
    "pad_token": "<|endoftext|>",
    "boi_token": "<|image start|>",
    "eoi_token": "<|image end|>",
    "image_token": "<image>",
    "image_wrapper_token": "<|image token|>",
    "eof_token": "<|extra_201|>",
}
SPECIAL = [*NAMED.values(), "<|extra_200|>", *(f"<|visual token {i:06d}|>" for i in range(CODES))]
TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 330,
    "attention_dropout": 0.0,
    "pad_token_id": 2,
}
VQ = {
    "codebook_size": CODES,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "hidden_size": 32,
    "attn_resolutions": [3],
}
SIDE = 32  # pixels: four codes a row


def write_model(folder):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(SENTENCES, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, extra_special_tokens=NAMED, **NAMED)
    tokenizer.save_pretrained(folder)
    config = transformers.Emu3Config(text_config=TEXT, vq_config=VQ, vocabulary_map=bpe.get_vocab())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = transformers.Emu3ForConditionalGeneration(config)
        for parameter in network.parameters():  # the small standard initialisation would hide errors
            parameter.data += 0.05 * torch.randn_like(parameter)
    network.save_pretrained(folder)
    transformers.Emu3ImageProcessor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("emu"))


def emu_config(folder, **changes):
    return EmuConfig(**{"state_dim": 4, "views": VIEWS, "source": str(folder), "pixels": SIDE * SIDE, **changes})


def build(folder, **changes):
    return helpers.built(emu_config(folder, **changes))


@pytest.fixture(scope="module")
def backbone(folder):
    return build(folder)


def observation(seed=0):
    rng = np.random.default_rng(seed)
    images = {view: rng.integers(0, 256, (48, 48, 3), dtype=np.uint8) for view in VIEWS}
    return Observation(images, rng.normal(size=4).astype(np.float32), SENTENCES[seed % 2])


OBSERVED = ObservationBatch.collate([observation(0), observation(1)])


def with_placeholders(backbone, prompt):
    """The ids as transformers takes them: one placeholder for every code and every end of a line."""
    reader = backbone.processor.reader
    placeholder = reader.tokenizer.convert_tokens_to_ids(reader.tokenizer.image_token)
    return prompt.id_BP.masked_fill(prompt.image_BP | (prompt.id_BP == reader.end_of_line), placeholder)


@cache
def theirs(folder):
    return transformers.Emu3ForConditionalGeneration.from_pretrained(folder).eval()


@torch.no_grad()
def test_the_prompt_is_that_of_transformers_own_processor(folder, backbone):
    """Ids, seen tokens and pixels of the published processor, with our area of the images."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    image_processor = transformers.Emu3ImageProcessor(min_pixels=SIDE * SIDE, max_pixels=SIDE * SIDE)
    processor = transformers.Emu3Processor(image_processor, tokenizer)
    images = [[observation(i).images[view] for view in VIEWS] for i in range(2)]
    texts = [sentence + "<image>" * len(VIEWS) for sentence in SENTENCES]
    expected = processor(images=images, text=texts, padding=True, padding_side="right", return_tensors="pt")
    prompt = backbone.processor(OBSERVED)
    assert torch.equal(with_placeholders(backbone, prompt), expected["input_ids"])
    assert torch.equal(prompt.padding_mask_BP.long(), expected["attention_mask"])
    assert torch.equal(prompt.patches, expected["pixel_values"])


@torch.no_grad()
def test_every_layer_is_that_of_transformers(folder):
    """Causal as pretrained, two views, instructions of different lengths: all hidden states and the logits agree."""
    ours = build(folder, attention="causal")
    prompt = ours.processor(OBSERVED)
    mask_BP = prompt.padding_mask_BP
    assert not mask_BP.all()
    out = theirs(folder)(
        input_ids=with_placeholders(ours, prompt),
        attention_mask=mask_BP.long(),
        position_ids=torch.arange(prompt.id_BP.shape[1])[None].expand(2, -1),
        pixel_values=prompt.patches,
        image_sizes=torch.tensor([[SIDE, SIDE]] * 4),
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


@torch.no_grad()
def test_image_codes_are_those_of_transformers_and_different_images_have_different_ones(folder, backbone):
    prompt = backbone.processor(OBSERVED)
    reader, code_IHW = backbone.processor.reader, backbone.codes(prompt.patches)
    codes = torch.nn.functional.pad(code_IHW + reader.first_code, (0, 1), value=reader.end_of_line).flatten(1)
    sizes = torch.tensor([[SIDE, SIDE]] * 4)
    assert torch.equal(codes.flatten(), theirs(folder).model.get_image_tokens(prompt.patches, sizes).long())
    assert codes.shape == (4, 4 * 5)
    assert len(torch.unique(codes)) > 3


@torch.no_grad()
def test_with_full_attention_words_see_the_images_after_them(backbone):
    same = backbone.run(helpers.embed(backbone, OBSERVED)).hidden_BPW
    changed = replace(OBSERVED, images={**OBSERVED.images, "wrist": 255 - OBSERVED.images["wrist"]})
    other = backbone.run(helpers.embed(backbone, changed)).hidden_BPW
    assert not torch.allclose(other[:, 1], same[:, 1])


@torch.no_grad()
def test_continuing_a_prefix_loses_nothing_and_company_changes_nothing(backbone):
    prefix = helpers.embed(backbone, OBSERVED)
    at_once, halves = backbone.run(prefix), backbone.run(backbone.run(prefix, 1))
    assert torch.equal(at_once.hidden_BPW, halves.hidden_BPW)
    suffix_BTW = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    together, jointly = SharedStack(64)(suffix_BTW, at_once), SharedStack.joint(suffix_BTW, prefix, 3)[0]
    for row in range(2):
        single = helpers.embed(backbone, ObservationBatch.collate([observation(row)]))
        alone = SharedStack(64)(suffix_BTW[row : row + 1], backbone.run(single))
        torch.testing.assert_close(together[row : row + 1], alone, **ROUNDING)
        joint = SharedStack.joint(suffix_BTW[row : row + 1], single, 3)[0]
        torch.testing.assert_close(jointly[row : row + 1], joint, **ROUNDING)


@torch.no_grad()
def test_a_joint_pass_is_the_whole_sequence_with_full_attention(folder, backbone):
    one = helpers.embed(backbone, ObservationBatch.collate([observation(0)]))
    p, t = one.hidden_BPW.shape[1], 5
    suffix_BTW = torch.randn(1, t, 64, generator=torch.Generator().manual_seed(1))
    whole = theirs(folder).model.text_model(
        inputs_embeds=torch.cat((one.hidden_BPW, suffix_BTW), 1),
        position_ids=torch.arange(p + t)[None],
        attention_mask=torch.zeros(1, 1, p + t, p + t),
    )
    torch.testing.assert_close(SharedStack.joint(suffix_BTW, one, 3)[0], whole.last_hidden_state[:, p:], **ROUNDING)


@torch.no_grad()
def test_cached_tokens_are_the_whole_causal_suffix(backbone):
    """Positions of single tokens follow the prefix and each other, rotations included."""
    prefix = backbone.run(helpers.embed(backbone, OBSERVED))
    suffix_BTW = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    whole = SharedStack(64).exits(suffix_BTW, prefix, (3,), mask)[0]
    cache = SharedStack.cache(prefix, 5)
    single = [SharedStack.extend(suffix_BTW[:, t : t + 1], prefix, cache) for t in range(5)]
    torch.testing.assert_close(torch.cat(single, 1), whole, **ROUNDING)


def policy(folder, decoder, **changes):
    stats = {"state": feature_stats(4, 1), "action": feature_stats(4, 2)}
    config = PolicyConfig("dfm_vla", emu_config(folder, **changes), decoder(4, FAST, chunk_size=6), n_action_steps=3)
    made = Policy.create(config, action_spec(4), stats, seed=0)
    made.model.eval()
    return made


@pytest.mark.parametrize("decoder", [DiscreteFlowConfig, AutoregressiveConfig])
def test_a_policy_acts_and_opens_without_its_source(folder, decoder, tmp_path, monkeypatch):
    made = policy(folder, decoder)
    made.save_pretrained(tmp_path / "ckpt")
    again = Policy.from_pretrained(tmp_path / "ckpt")
    config = json.loads((tmp_path / "ckpt/config.json").read_text())
    assert config["backbone"]["source"] is None
    assert "vocabulary_map" not in config["backbone"]["architecture"]
    chunks = [p.act(observation(), generator=torch.Generator().manual_seed(0)) for p in (made, again)]
    assert np.array_equal(chunks[0].actions, chunks[1].actions)
    assert not any("vqmodel.decoder" in name for name in made.model.state_dict())
    if decoder is DiscreteFlowConfig:
        calls = count_layers(monkeypatch, made.model.backbone)
        assert made.act(observation(), TwoStage(3, 1)).layer_passes == len(calls) == 3 * (1 + 4)


def test_action_tokens_begin_as_the_last_rows_of_text(folder):
    """Token i is read and named as id 300 − i is; without text_row the rows are random."""
    made = policy(folder, partial(DiscreteFlowConfig, text_row=300))
    decoder, backbone = made.model.decoder, made.model.backbone
    row_V = 300 - torch.arange(decoder.vocabulary)
    assert torch.equal(decoder.embedding.weight[: decoder.vocabulary], backbone.language.embed_tokens.weight[row_V])
    assert torch.equal(decoder.head.weight, backbone.head.weight[row_V])
    assert not decoder.head.bias.any()
    with pytest.raises(ConfigError, match=r"text_row must lie in \d+\.\.329"):
        policy(folder, partial(DiscreteFlowConfig, text_row=3))


@pytest.mark.parametrize(
    "decoder", [partial(DiscreteFlowConfig, attention="full"), AutoregressiveConfig, MaskedDiffusionConfig]
)
def test_tokens_stand_between_marks_that_begin_as_rows_of_text(folder, decoder):
    """The one in front is only read; the one behind is the end token, which is predicted too."""
    made = policy(folder, partial(decoder, text_row=300, marks=(310, 311)))
    decoder, backbone = made.model.decoder, made.model.backbone
    table, end = backbone.language.embed_tokens.weight, decoder.tokenizer.end
    assert torch.equal(decoder.embedding.weight[decoder.front], table[310])
    assert torch.equal(decoder.embedding.weight[end], table[311])
    assert torch.equal(decoder.head.weight[end], backbone.head.weight[311])
    chunk = made.act(observation(), generator=torch.Generator().manual_seed(0))
    assert chunk.actions.shape == (6, 4)
    targets = Targets(torch.zeros(2, 6, 4), torch.ones(2, 6, dtype=torch.bool))
    decoder.loss(made.encode(OBSERVED), targets, torch.Generator().manual_seed(0)).total.backward()
    assert decoder.embedding.weight.grad[decoder.front].any()
    with pytest.raises(ConfigError, match=r"marks must lie in 0\.\.329"):
        policy(folder, partial(DiscreteFlowConfig, marks=(310, 330)))


def test_frozen_distances_are_those_of_the_rows_of_text(folder):
    made = policy(folder, partial(DiscreteFlowConfig, text_row=300, metric=EmbeddingMetric(table="frozen")))
    decoder = made.model.decoder
    assert torch.equal(decoder.frozen_VW, decoder.embedding.weight[: decoder.vocabulary])


# -- weights in the layout of Emu3's own code ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def univla(folder, tmp_path_factory):
    """A folder like UniVLA's: other language weights in two files, no image tokenizer."""
    own = tmp_path_factory.mktemp("univla")
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "vqmodel" not in name:
            plain = (
                name.replace("model.text_model.", "model.")
                .replace("text_model.model.", "model.")
                .replace("text_model.lm", "lm")
            )
            weights[plain] = torch.randn(tensor.shape, generator=generator) * 0.1
    assert {"model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"} < {
        *weights
    }
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        save_file({name: weights[name] for name in part}, own / f"model-0000{number}-of-00002.safetensors")
    stated = {**TEXT, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "model_type": "Emu3", "architectures": ["Emu3MoE"]}
    (own / "config.json").write_text(json.dumps(stated))
    return own


def test_univlas_weights_take_the_place_of_the_language_model(folder, univla, tmp_path):
    """Layer by layer those of its files, with the image tokenizer of the other folder, and the checkpoint needs neither."""
    made = policy(folder, partial(DiscreteFlowConfig, text_row=300), language=str(univla))
    backbone, plain = made.model.backbone, build(folder)
    given = {name: t for file in univla.glob("*.safetensors") for name, t in load_file(file).items()}
    assert torch.equal(backbone.head.weight, given["lm_head.weight"])
    for name, tensor in backbone.language.state_dict().items():
        assert torch.equal(tensor, given[f"model.{name}"])
    for name, tensor in backbone.network.vqmodel.state_dict().items():
        assert torch.equal(tensor, plain.network.vqmodel.state_dict()[name])
    made.save_pretrained(tmp_path)
    again = Policy.from_pretrained(tmp_path)
    assert again.config.backbone.language is None
    with torch.no_grad():
        assert torch.equal(again.encode(OBSERVED).hidden_BPW, made.encode(OBSERVED).hidden_BPW)


@pytest.mark.parametrize("first", [True, False])
def test_weights_that_processes_will_share_are_left_in_their_files(folder, univla, first):
    """Rows of text that action tokens begin as are read; the process that is sent what is drawn holds nothing."""
    decoder = partial(DiscreteFlowConfig, text_row=300)
    whole = policy(folder, decoder, language=str(univla))
    with shared_later(first):
        made = policy(folder, decoder, language=str(univla))
    assert all(p.is_meta for p in made.model.backbone.parameters())
    assert all(p.is_meta is not first for p in made.model.decoder.parameters())
    if first:
        assert torch.equal(made.model.decoder.head.weight, whole.model.decoder.head.weight)
        read_here(made.model)
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(made.model.state_dict()[name], tensor)


def test_a_folder_without_univlas_weights_is_one_sentence(folder, univla, tmp_path):
    with pytest.raises(ConfigError, match="is no Emu3 in the layout of its own code"):
        build(folder, language=str(tmp_path))
    (tmp_path / "config.json").write_text((univla / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"'model\.text_model\..*policy\.backbone\.language"):
        build(folder, language=str(tmp_path))


def test_the_output_projection_has_a_row_per_action_token_and_the_image_tokenizer_stays_as_it_is(folder):
    made = policy(folder, DiscreteFlowConfig, recompute=True)
    made.model.train()
    decoder = made.model.decoder
    assert decoder.head.weight.shape == (FAST.vocabulary, 64)
    prefix = made.encode(OBSERVED)
    targets = Targets(torch.zeros(2, 6, 4), torch.ones(2, 6, dtype=torch.bool))
    decoder.loss(prefix, targets, torch.Generator().manual_seed(0)).total.backward()
    backbone = made.model.backbone
    assert backbone.language.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert backbone.language.embed_tokens.weight.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in backbone.network.vqmodel.parameters())


def test_answers_are_learned(folder, backbone):
    loss = backbone.answer_loss(helpers.embed(backbone, OBSERVED), backbone.processor.answer_ids(["Done.", "It is open now"]))
    assert loss.isfinite()


def test_the_published_size():
    """8.49 B parameters in text model and head; the frozen image encoder adds 0.1 B."""
    with torch.device("meta"):
        network = EmuConfig(8, VIEWS, architecture=emu3_8b()).build()
    text = sum(p.numel() for p in network.language.parameters()) + sum(p.numel() for p in network.head.parameters())
    assert text == pytest.approx(8.49e9, rel=1e-3)
    assert network.spec.depth == 32
    assert sum(p.numel() for p in network.network.vqmodel.parameters()) < 0.2e9


def test_wrong_input_is_one_sentence(folder, backbone, tmp_path):
    with pytest.raises(SpecError, match="state of length 4, got 3"):
        backbone.processor(replace(OBSERVED, state_BS=OBSERVED.state_BS[:, :3]))
    with pytest.raises(SpecError, match="plain words"):
        backbone.processor(replace(OBSERVED, instructions=["<|image start|>", "x"]))
    with pytest.raises(ConfigError, match="no Emu3 folder"):
        emu_config(tmp_path / "missing").build()
    with pytest.raises(CapabilityError, match="no tokenizer"):
        EmuConfig(4, VIEWS, architecture=backbone.config.architecture).processor()(OBSERVED)
    with pytest.raises(ConfigError, match="either 'source'"):
        EmuConfig(4, VIEWS)
    wide = replace(OBSERVED, images={**OBSERVED.images, "wrist": OBSERVED.images["wrist"][:, :, :40]})
    with pytest.raises(ConfigError, match="views of one shape"):
        helpers.embed(backbone, wide)
