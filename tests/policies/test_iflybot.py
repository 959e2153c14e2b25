"""iFlyBot-VLA: codes of a whole data set, the assemblies at full size on the meta device, and small ones that act."""

import copy
from dataclasses import replace
from math import inf

import numpy as np
import pytest
import torch

from benchmarks.cost_model.shapes_of import flow_decoder
from tests import helpers
from tests.backbones.test_qwen2_5_vl import write_model
from tests.data.toyset import FPS, LENGTHS, write_v3
from tests.serving.live import request, serving
from vlaflow.actions.latent import LatentActionModel, LatentConfig, Origin
from vlaflow.actions.stored_latent import StoredLatentModel
from vlaflow.backbones.qwen2_5_vl import PATCH, QwenConfig
from vlaflow.compute.dense import Dense
from vlaflow.compute.doubts import BelowThreshold
from vlaflow.compute.early_exit import EarlyExit, ExitPlan
from vlaflow.compute.refine import Refine
from vlaflow.compute.two_stage import TwoStage
from vlaflow.data.lerobot import Dataset
from vlaflow.decoders.exits import ExitTraining
from vlaflow.errors import CapabilityError, DataError
from vlaflow.flows.sampling import Sampling
from vlaflow.nn.block import BlockConfig
from vlaflow.policies.base import Policy
from vlaflow.policies.iflybot import recipes
from vlaflow.policies.iflybot.codes import dataset_codes, model_pairs
from vlaflow.policies.iflybot.policy import qwen3b, tiny
from vlaflow.policies.recipe import DataSpec
from vlaflow.robot.client import Client
from vlaflow.spec import ActionPrefix
from vlaflow.stacks.expert import ExpertConfig
from vlaflow.training.optim import freeze, late_parameters

SMALL = LatentConfig(image_size=28, patch=4, width=16, heads=2, ffn=32, spatial=1, temporal=1, decoder=1, code_dim=4, book=16)
GAP = 9


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLAFLOW_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Dataset.open(write_v3(tmp_path_factory.mktemp("data") / "toy"))


def model(view="image", seed=0):
    return LatentActionModel.create(SMALL, Origin("", view, FPS, GAP / FPS, GAP), seed).eval()


def known(codes):
    """Rows that begin a pair, bool (N,)."""
    return codes.id_NK[:, 0] >= 0


def test_a_data_sets_codes_are_the_models_and_unknown_where_no_pair_begins(dataset, capsys):
    made = model()
    codes = dataset_codes(made, dataset)
    assert codes.id_NK.shape == (sum(LENGTHS), SMALL.codes)
    assert known(codes).sum() == sum(max(length - GAP, 0) for length in LENGTHS)
    assert (codes.id_NK[~known(codes)] == -1).all()
    pairs = model_pairs(made, dataset)
    wanted = made.codes(*pairs.frames(np.arange(len(pairs)))).numpy()
    assert np.array_equal(codes.id_NK[known(codes)], wanted)
    assert codes.gap == GAP
    assert "2 of 5 episodes are not longer than the gap" in capsys.readouterr().err


def test_codes_are_computed_once_per_model(dataset, monkeypatch):
    first = dataset_codes(model(), dataset)
    calls = []
    monkeypatch.setattr(
        LatentActionModel, "codes", lambda self, a, b: calls.append(1) or torch.zeros(len(a), 8, dtype=torch.long)
    )
    assert np.array_equal(dataset_codes(model(), dataset).id_NK, first.id_NK)
    assert not calls
    dataset_codes(model(seed=1), dataset)
    assert calls


def test_a_streams_codes_are_a_raw_caches_and_those_of_jpegs_their_own(dataset, tmp_path, monkeypatch):
    """A stream needs no cache, and JPEGs are other frames, so neither reads codes that were computed for the other."""
    made = model(seed=3)
    raw = dataset_codes(made, dataset).id_NK
    jpegs = model_pairs(made, dataset, storage="jpeg")
    found = dataset_codes(made, dataset, storage="jpeg").id_NK
    assert np.array_equal(found[jpegs.rows], made.codes(*jpegs.frames(np.arange(len(jpegs)))).numpy())
    assert not np.array_equal(found, raw)
    monkeypatch.setenv("VLAFLOW_CACHE", str(tmp_path))
    assert np.array_equal(dataset_codes(made, dataset, storage="stream").id_NK, raw)
    assert not list(tmp_path.glob("frames-*"))


def test_a_stored_model_is_opened_only_where_the_codes_are_missing(dataset, tmp_path, monkeypatch):
    """The same codes and fingerprint as the open model's; the second time there is no network at all."""
    model(seed=2).save_pretrained(tmp_path)
    made = LatentActionModel.from_pretrained(tmp_path)
    first = dataset_codes(StoredLatentModel.open(tmp_path), dataset)
    assert np.array_equal(first.id_NK, dataset_codes(made, dataset).id_NK)
    assert StoredLatentModel.open(tmp_path).fingerprint() == made.fingerprint()

    def opened(*_):
        raise AssertionError("the model was opened")

    monkeypatch.setattr(LatentActionModel, "from_pretrained", opened)
    assert np.array_equal(dataset_codes(StoredLatentModel.open(tmp_path), dataset).id_NK, first.id_NK)
    with pytest.raises(AssertionError, match="was opened"):
        dataset_codes(StoredLatentModel.open(tmp_path), dataset, view="corner")


def test_another_view_is_another_question(dataset):
    assert known(dataset_codes(model("corner"), dataset)).any()
    assert not np.array_equal(dataset_codes(model(), dataset, view="corner").id_NK, dataset_codes(model(), dataset).id_NK)
    with pytest.raises(DataError, match="no view 'wrist'"):
        dataset_codes(model("wrist"), dataset)


# -- assemblies ----------------------------------------------------------------------------------------------------------------

DATA = DataSpec(8, 7, ("head", "left", "right"))


def millions(module):
    return sum(p.numel() for p in module.parameters()) / 1e6


def full_size(chunk_size=30, noise_samples=1, truncate=True):
    """As published, with a FAST tokenizer that is fitted, for fitting needs data."""
    config = qwen3b(DATA, chunk_size=chunk_size, n_action_steps=chunk_size, source=None)
    decoder = config.decoder.fitted(helpers.chunks(chunk_size=chunk_size, dim=7))
    return replace(config, decoder=replace(decoder, truncate=truncate, flow=replace(decoder.flow, noise_samples=noise_samples)))


def test_the_published_sizes():
    """3.755 B pretrained parameters, an expert of 236 M over 36 layers, of which 9.5 M map keys and values."""
    with torch.device("meta"):
        model = full_size().build()
    flow = model.decoder.flow
    assert millions(model.backbone) == pytest.approx(3754.7, abs=0.1)
    assert millions(flow.stack) == pytest.approx(236.3, abs=0.1)
    assert millions(flow.stack.projections) == pytest.approx(9.47, abs=0.01)
    assert millions(flow.codec) == pytest.approx(3.19, abs=0.01)
    assert len(flow.stack.layers) == len(flow.stack.projections) == 36
    assert flow.stack.position.shape == (1 + 1 + 30, 1024)
    assert model.decoder.latent.embedding.weight.shape == (8, 2048)


@pytest.mark.parametrize(
    ("recipe", "chunk_size"),
    [(recipes.joint3b, 30), (recipes.libero, 7), (lambda data: recipes.fine3b(recipes.joint3b(data).objective.policy), 30)],
    ids=["joint3b", "libero", "fine3b"],
)
def test_the_recipes_name_parts_that_exist(recipe, chunk_size):
    """Everything trains from the first step; what a recipe says of the decoder is what the full size has."""
    config = recipe(DATA)
    decoder = config.objective.policy.decoder
    own = full_size(chunk_size, decoder.flow.noise_samples, decoder.truncate)
    assert replace(decoder, fast=None) == replace(own.decoder, fast=None)
    assert (decoder.fast.chunk_size, decoder.fast.action_dim, decoder.fast.tokenizer.vocabulary) == (chunk_size, 7, 2048)
    assert config.objective.policy.n_action_steps == chunk_size
    with torch.device("meta"):
        model = own.build()
    freeze(model, config.optim)
    assert not late_parameters(model, config.optim)
    assert all(p.requires_grad for p in model.parameters())


def test_the_third_stage_differs_from_the_second_in_truncation_and_noise_samples_alone():
    for joint, fine in ((recipes.joint, recipes.fine), (recipes.joint3b, recipes.fine3b)):
        before = joint(DATA).objective.policy
        after = fine(before).objective.policy
        assert (before.decoder.truncate, before.decoder.flow.noise_samples) == (True, 1)
        assert (after.decoder.truncate, after.decoder.flow.noise_samples) == (False, 5)
        flow = replace(after.decoder.flow, noise_samples=1)
        assert replace(after, decoder=replace(after.decoder, truncate=True, flow=flow)) == before


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """The published assembly around a small random Qwen2.5-VL."""
    pytest.importorskip("transformers")
    source = write_model(tmp_path_factory.mktemp("qwen"), tied=True)
    config = qwen3b(DataSpec(4, 4, ("image",)), chunk_size=6, n_action_steps=6)
    decoder = config.decoder
    block = BlockConfig(32, heads=2, kv_heads=2, head_dim=16, ffn=32, norm="rms")
    flow = replace(decoder.flow, expert=replace(decoder.flow.expert, block=block))
    backbone = QwenConfig(4, ("image",), str(source), min_pixels=PATCH, max_pixels=4 * PATCH, recompute=True)
    config = replace(
        config, backbone=backbone, decoder=replace(decoder, flow=flow, fast=replace(decoder.fast, tokenizer=helpers.FAST))
    )
    stats = {"state": helpers.feature_stats(4, 1), "action": helpers.feature_stats(4, 2)}
    return Policy.create(config, helpers.action_spec(), stats, 0)


def test_the_published_assembly_sees_448_pixels(qwen):
    """256 tokens an image, by the processor's own rounding, whatever size the camera gives."""
    config = qwen3b(DataSpec(4, 4, ("image",))).backbone
    processor = copy.copy(qwen.processor.backbone)
    processor.size = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
    for side in (224, 448, 640):
        seen = replace(helpers.batch(1).observation, images={"image": torch.zeros(1, side, side, 3, dtype=torch.uint8)})
        prompt = processor(seen)
        assert prompt.grid_I3.tolist() == [[1, 448 // 14, 448 // 14]]
        assert int(prompt.image_BP.sum()) == 256


@pytest.mark.parametrize("truncate", [True, False])
def test_a_small_qwen_learns_and_acts(qwen, truncate):
    """Every parameter that can learn does, through layers whose activations are computed again."""
    qwen.model.decoder.config = replace(qwen.config.decoder, truncate=truncate)
    qwen.model.train()
    batch = replace(helpers.batch(), code_BK=torch.randint(32, (3, 8), generator=torch.Generator().manual_seed(0)))
    terms = qwen.loss(qwen.prepare(batch), *helpers.generators(2))
    assert set(terms.parts) == {"velocity", "latent", "fast"}
    qwen.model.zero_grad(set_to_none=True)
    terms.total.backward()
    still = {n for n, p in qwen.model.named_parameters() if p.grad is None}
    assert not still
    qwen.model.eval()
    chunk = qwen.act(helpers.observation(), Dense(5))
    assert chunk.actions.shape == (6, 4)
    assert np.isfinite(chunk.actions).all()


# -- what such a policy cannot do ----------------------------------------------------------------------------------------------


def small(**changes):
    config = tiny(DataSpec(4, 4, ("image",)))
    fast = replace(config.decoder.fast, tokenizer=helpers.FAST, chunk_size=6)
    decoder = replace(config.decoder, fast=fast, flow=replace(config.decoder.flow, chunk_size=6))
    backbone = replace(config.backbone, image_size=32, depth=2, width=32, heads=2, ffn=32)
    stats = {"state": helpers.feature_stats(4, 1), "action": helpers.feature_stats(4, 2)}
    config = replace(config, backbone=backbone, decoder=decoder, n_action_steps=3, **changes)
    made = Policy.create(config, helpers.action_spec(), stats, 0)
    made.model.eval()
    return made


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (Refine(BelowThreshold(0.5)), "regenerates parts of a chunk, which this checkpoint was not trained for"),
        (TwoStage(2, 2), "may revise every token, which a LatentFlowDecoder does not have"),
        (EarlyExit(ExitPlan((1, 2)), (inf,)), r"learned to answer only at \[2\]"),
    ],
)
def test_a_compute_policy_it_cannot_run_is_one_sentence(compute, message):
    with pytest.raises(CapabilityError, match=message):
        small().act(helpers.observation(), compute)


def test_with_exits_it_answers_at_every_depth():
    """Each depth reads the codes that depth names, never those of a depth before it."""
    made = small(exits=ExitTraining((1, 2)))
    chunk = made.act(helpers.observation(), EarlyExit(ExitPlan((1, 2), sampling=Sampling(2)), (inf,)))
    assert np.array_equal(chunk.actions, made.act(helpers.observation(), Dense(2)).actions)
    assert chunk.layers == 2


def test_committed_actions_are_continued_by_guidance_through_the_latent_tokens():
    made = small()
    given = ActionPrefix(np.random.default_rng(5).uniform(-0.9, 0.9, (4, 4)).astype(np.float32), 2)
    free, continued = (made.act(helpers.observation(), Dense(3), action_prefix=c).actions for c in (None, given))
    assert np.array_equal(continued[:2], given.actions[:2])
    assert (continued[2:] != free[2:]).any()


def test_it_is_served():
    made = small()
    with serving(made) as (_, address), Client(address) as client:
        reply = client.infer(request(1, seed=7))
    wanted = made.act(helpers.observation(1), Dense(3), generator=torch.Generator().manual_seed(7)).actions
    np.testing.assert_allclose(reply["actions"], wanted, atol=1e-6)


def test_the_cost_model_refuses_what_it_does_not_count():
    made = small()
    flow, spec = made.config.decoder.flow, made.model.backbone.spec
    with pytest.raises(CapabilityError, match="knows no time token"):
        flow_decoder(flow, spec)
    with pytest.raises(CapabilityError, match="knows no expert with projected keys and values"):
        flow_decoder(replace(flow, time_token=False), spec)
    plain = ExpertConfig(replace(flow.expert.block, kv_heads=spec.kv_heads, head_dim=spec.head_dim))
    assert flow_decoder(replace(flow, time_token=False, expert=plain), spec).tokens == 6
