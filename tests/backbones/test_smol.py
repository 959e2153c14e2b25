"""SmolLM2's family against transformers' own forward pass, on a small random model; the published weights: make test-smol."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import helpers
from tests.backbones.smol import SENTENCES, TEXT, write_encoder, write_model
from tests.helpers import action_spec, count_layers, feature_stats
from vlaflow.backbones.smol import SmolConfig, smollm2_135m
from vlaflow.compute.early_exit import EarlyExit, ExitPlan
from vlaflow.data.batch import ObservationBatch
from vlaflow.decoders.exits import ExitTraining
from vlaflow.decoders.flow import FlowConfig
from vlaflow.errors import CapabilityError, ConfigError, SpecError
from vlaflow.nn.block import BlockConfig
from vlaflow.nn.stored import drawing, place_of, read_here, shared_later
from vlaflow.policies.base import Policy, PolicyConfig
from vlaflow.spec import Observation
from vlaflow.stacks.expert import ExpertConfig
from vlaflow.stacks.shared import SharedStack

transformers = pytest.importorskip("transformers")

ROUNDING = {"atol": 2e-5, "rtol": 1e-4}  # float32, sums in another order
VIEWS = ("front", "wrist")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("smol"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("siglip"))


def smol_config(folder, **changes):
    return SmolConfig(**{"state_dim": 4, "views": VIEWS, "source": str(folder), "image_size": 32, **changes})


def build(folder, **changes):
    return helpers.built(smol_config(folder, **changes))


@pytest.fixture(scope="module")
def backbone(folder):
    return build(folder)


def observation(seed=0):
    rng = np.random.default_rng(seed)
    images = {view: rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for view in VIEWS}
    return Observation(images, rng.normal(size=4).astype(np.float32), SENTENCES[seed % 2])


OBSERVED = ObservationBatch.collate([observation(0), observation(1)])


@torch.no_grad()
def test_every_layer_is_that_of_transformers(folder, backbone):
    """Two views, a state and instructions of different lengths: all hidden states and the logits agree."""
    prefix = helpers.embed(backbone, OBSERVED)
    mask_BP = prefix.padding_mask_BP
    assert not mask_BP.all()
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    out = theirs(inputs_embeds=prefix.hidden_BPW, attention_mask=mask_BP.long(), output_hidden_states=True)
    for depth in range(backbone.spec.depth):
        mine = backbone.run(prefix, depth).hidden_BPW
        torch.testing.assert_close(mine[mask_BP], out.hidden_states[depth][mask_BP], **ROUNDING)
    logits = backbone.name_ids(backbone.finish(backbone.run(prefix).hidden_BPW))
    torch.testing.assert_close(logits[mask_BP], out.logits[mask_BP], **ROUNDING)


@torch.no_grad()
def test_the_first_layers_are_those_of_the_whole_model(folder, backbone):
    """The policy of two layers of three computes what the whole one does before its third, and is recorded as one of two."""
    short = build(folder, layers=2)
    assert short.spec.depth == short.config.architecture["num_hidden_layers"] == 2
    short.load_state_dict({k: v for k, v in backbone.state_dict().items() if k in short.state_dict()})
    whole = backbone.run(helpers.embed(backbone, OBSERVED), 2).hidden_BPW
    assert torch.equal(short.run(helpers.embed(short, OBSERVED)).hidden_BPW, whole)


@torch.no_grad()
def test_images_and_state_stand_in_their_places(backbone):
    """Two views of 2 × 2 tokens and the state come between words; each is read, and nothing before it changes with it."""
    prompt = backbone.processor(OBSERVED)
    assert prompt.image_BP.sum(1).tolist() == [8, 8]
    place = {"front": int(prompt.image_BP[0].int().argmax()), "state": int(prompt.state_BP[0].int().argmax())}
    place["wrist"] = place["front"] + 4
    assert place["state"] == place["wrist"] + 4
    before = helpers.embed(backbone, OBSERVED).hidden_BPW
    for view in VIEWS:
        images = {**OBSERVED.images, view: 255 - OBSERVED.images[view]}
        changed = (helpers.embed(backbone, replace(OBSERVED, images=images)).hidden_BPW != before).any(-1)
        assert changed[0].nonzero().flatten().tolist() == list(range(place[view], place[view] + 4))
    moved = helpers.embed(backbone, replace(OBSERVED, state_BS=OBSERVED.state_BS + 1)).hidden_BPW
    assert (moved != before).any(-1)[0].nonzero().flatten().tolist() == [place["state"]]


@torch.no_grad()
def test_continuing_a_prefix_loses_nothing_and_company_changes_nothing(backbone):
    prefix = helpers.embed(backbone, OBSERVED)
    at_once, halves = backbone.run(prefix), backbone.run(backbone.run(prefix, 1))
    assert torch.equal(at_once.hidden_BPW, halves.hidden_BPW)
    suffix_BTW = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    together = SharedStack(32)(suffix_BTW, at_once)
    for row in range(2):
        single = backbone.run(helpers.embed(backbone, ObservationBatch.collate([observation(row)])))
        torch.testing.assert_close(together[row : row + 1], SharedStack(32)(suffix_BTW[row : row + 1], single), **ROUNDING)


@torch.no_grad()
def test_an_encoder_is_that_of_transformers_and_its_features_are_folded_to_cells(folder, encoder):
    """4 × 4 features of SigLIP become 2 × 2 tokens: each is projected from the four features of its own cell."""
    backbone = build(folder, vision=f"transformers:{encoder}", cell=16)
    vision, image_IHW3 = backbone.vision, OBSERVED.images["front"]
    theirs = transformers.SiglipVisionModel.from_pretrained(encoder).eval()
    pixels = transformers.SiglipImageProcessor.from_pretrained(encoder, size={"height": 32, "width": 32})(
        list(image_IHW3.numpy()), return_tensors="pt"
    )["pixel_values"]
    feature_INF = theirs(pixel_values=pixels).last_hidden_state.view(2, 4, 4, 24)
    corner_IF = feature_INF[:, :2, 2:].reshape(2, -1)
    torch.testing.assert_close(vision(image_IHW3)[:, 1], vision.project(corner_IF), **ROUNDING)
    assert len(vision.blocks) == 2
    with pytest.raises(ConfigError, match="reads no images of 48 × 48"):
        smol_config(folder, vision=f"transformers:{encoder}", image_size=48).build()
    with pytest.raises(ConfigError, match="cannot be folded"):
        smol_config(folder, vision=f"transformers:{encoder}", cell=4).build()


def test_an_encoder_without_image_settings_is_one_sentence(folder, encoder, tmp_path):
    copied = shutil.copytree(encoder, tmp_path / "copied")
    (copied / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"copied' is no vision model .* copy it again\.$"):
        smol_config(folder, vision=f"transformers:{copied}", cell=16).build()


@pytest.mark.parametrize("first", [True, False])
def test_layers_that_are_cut_off_are_not_read_and_an_encoder_is_sent(folder, encoder, first):
    """The language model's rows are read later; the borrowed encoder is opened by the process that sends it."""
    with shared_later(first), drawing():
        made = smol_config(folder, vision=f"transformers:{encoder}", cell=16, layers=2).build()
    assert all(place_of(p) for p in made.network.parameters())
    assert {p.is_meta for p in made.vision.parameters()} == {not first}
    read_here(made)
    whole = build(folder, vision=f"transformers:{encoder}", cell=16, layers=2)
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(made.network.state_dict()[name], tensor)
    assert made.config == whole.config


def policy(folder, **changes):
    expert = ExpertConfig(BlockConfig(16, 4, 2, 8, 32, norm="rms", gated=True))
    config = PolicyConfig(
        "asyncvla",
        smol_config(folder, **changes),
        FlowConfig(4, chunk_size=6, expert=expert if changes else None),
        exits=ExitTraining((1, 2, 3)),
        n_action_steps=3,
    )
    stats = {"state": feature_stats(4, 1), "action": feature_stats(4, 2)}
    return Policy.create(config, action_spec(4), stats, seed=0)


@pytest.mark.parametrize("borrowed", [False, True], ids=["stem", "encoder"])
def test_a_policy_acts_exits_early_and_opens_without_its_source(folder, encoder, borrowed, tmp_path, monkeypatch):
    made = policy(folder, **({"vision": f"transformers:{encoder}"} if borrowed else {}))
    made.model.eval()
    made.save_pretrained(tmp_path / "ckpt")
    config = json.loads((tmp_path / "ckpt/config.json").read_text())["backbone"]
    assert config["source"] is None
    assert (config["encoder"] is None) == (not borrowed)
    if borrowed:
        config["vision"] = "transformers:moved away"
        text = json.loads((tmp_path / "ckpt/config.json").read_text())
        (tmp_path / "ckpt/config.json").write_text(json.dumps({**text, "backbone": config}))
    again = Policy.from_pretrained(tmp_path / "ckpt")
    chunks = [p.act(observation(), generator=torch.Generator().manual_seed(0)) for p in (made, again)]
    assert np.array_equal(chunks[0].actions, chunks[1].actions)
    calls = count_layers(monkeypatch, again.model.backbone)
    shallow = again.act(observation(), EarlyExit(ExitPlan((1, 2, 3)), (np.inf, np.inf)))
    assert shallow.layers < 3
    assert max(depth for depth, *_ in calls) < 2


def test_answers_are_learned(backbone):
    loss = backbone.answer_loss(helpers.embed(backbone, OBSERVED), backbone.processor.answer_ids(["Done.", "It is open now"]))
    assert loss.isfinite()


def test_the_published_size():
    """134.5 M parameters in the language model, its table counted once."""
    with torch.device("meta"):
        network = SmolConfig(8, VIEWS, architecture=smollm2_135m()).build()
    assert sum(p.numel() for p in network.language.parameters()) == pytest.approx(134.5e6, rel=1e-3)
    assert (network.spec.depth, network.head) == (30, None)
    assert SmolConfig(8, VIEWS, architecture=smollm2_135m()).rater_block().head_dim == 64


def test_wrong_input_is_one_sentence(folder, backbone, tmp_path):
    with pytest.raises(SpecError, match="plain words"):
        backbone.processor(replace(OBSERVED, instructions=["Open <filename>", "x"]))
    with pytest.raises(ConfigError, match="no SmolLM2 folder"):
        smol_config(tmp_path / "missing").build()
    with pytest.raises(ConfigError, match=r"layers must lie in 1\.\.3"):
        smol_config(folder, layers=4).build()
    with pytest.raises(ConfigError, match="power of two"):
        smol_config(folder, cell=12, image_size=48)
    with pytest.raises(ConfigError, match="'timm:NAME'"):
        smol_config(folder, vision="siglip").build()
    with pytest.raises(CapabilityError, match="no tokenizer"):
        SmolConfig(4, VIEWS, architecture=TEXT).processor()(OBSERVED)
    (tmp_path / "qwen").mkdir()
    for file in folder.iterdir():
        (tmp_path / "qwen" / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "qwen/config.json").write_text(json.dumps({**config, "architectures": ["Qwen2ForCausalLM"]}))
    with pytest.raises(ConfigError, match="is a Qwen2ForCausalLM"):
        smol_config(tmp_path / "qwen").build()
