"""Fused layers compute what the networks compute, and nothing in a chunk waits for the device. On a CPU, so unrecorded."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import launches
from tests.backbones import test_emu3, test_molmo2
from tests.backbones.test_qwen2_5_vl import ROUNDING, observation, observations, write_model
from tests.backbones.test_qwen_policy import policy
from tests.helpers import policy as tiny_policy
from tests.reads import Reads
from vlaflow.compute.dense import Dense
from vlaflow.compute.doubts import AtRandom
from vlaflow.compute.refine import Refine
from vlaflow.data.batch import ObservationBatch
from vlaflow.engine.gpu import KEPT, Recent, fuse
from vlaflow.engine.gpu_vision import VisionPlan
from vlaflow.errors import CapabilityError
from vlaflow.flows.sampling import Sampling
from vlaflow.policies.engines import with_engine

pytest.importorskip("transformers")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A policy with weights large enough to show errors, and the same fused. Sentences differ in length, views in size."""
    made = policy(write_model(tmp_path_factory.mktemp("qwen"), tied=True))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return made, with_engine(made, "graphs")


@pytest.mark.parametrize(
    "compute",
    [
        Dense(3),
        Dense(2, solver="midpoint"),
        Refine(AtRandom(0.5), sampling=Sampling(2), inner=Dense(2)),
    ],
    ids=["dense", "midpoint", "refine"],
)
def test_chunks_are_those_of_the_networks(pair, compute):
    """Also for a batch with padding, twice in the same buffers, and for a shorter prefix in between."""
    eager, fused = pair
    for seen in (observations(), [observation()], observations()):
        wanted, made = (each.act(seen, compute) for each in (eager, fused))
        for one, other in zip(wanted, made, strict=True):
            torch.testing.assert_close(torch.from_numpy(other.actions), torch.from_numpy(one.actions), **ROUNDING)


@pytest.mark.parametrize("family", [test_molmo2, test_emu3], ids=["norms of heads", "no biases"])
def test_layers_of_other_families_are_fused(family, tmp_path_factory):
    """Molmo2's, which norm queries and keys, and Emu3's: prefix, suffix behind it, and the prefix continued in two parts."""
    backbone = family.build(family.write_model(tmp_path_factory.mktemp("other"))).eval()
    fused = fuse(backbone, 4)
    suffix_BTW = torch.randn(2, 4, backbone.spec.width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = []
        for each in (backbone, fused):
            prefix = each.run(each.run(each.blank(2, 56), 1))
            found.append([prefix.hidden_BPW, *each.follow(suffix_BTW, prefix, (1, each.spec.depth))[0]])
    torch.testing.assert_close(found[1], found[0], **ROUNDING)


def test_in_bfloat16_both_round_alike(pair):
    """Products are rounded in another order: by less than deployed programs may (``engine.deploy.TOLERANCE``)."""
    wanted, made = (replace(each, dtype="bf16").act(observations(), Dense(3)) for each in pair)
    for one, other in zip(wanted, made, strict=True):
        torch.testing.assert_close(torch.from_numpy(other.actions), torch.from_numpy(one.actions), rtol=0, atol=0.05)


@pytest.mark.skipif(not hasattr(torch.nn.functional, "scaled_mm"), reason="this torch has no products of float8")
def test_float8_stays_near(pair):
    """Three bits of mantissa in every factor: some hundredths of a deviation, and not what the networks compute."""
    eager, _ = pair
    rounded = with_engine(replace(eager, model=copy.deepcopy(eager.model)), "graphs-fp8")
    assert rounded.model.engine.endswith("in float8")
    spread = np.array(eager.stats["action"].std)
    for one, other in zip(*(each.act(observations(), Dense(3)) for each in (eager, rounded)), strict=True):
        apart = np.abs(one.actions - other.actions) / spread
        assert 1e-4 < apart.max() < 0.25


def test_image_tokens_are_those_of_the_tower(pair):
    """Images of two sizes, each with windows that are cut off at its borders, in one batch."""
    inputs = pair[0].processor(ObservationBatch.collate(observations()))
    with torch.no_grad():
        wanted, made = (each.model.backbone.image_features(inputs) for each in pair)
    torch.testing.assert_close(made, wanted, **ROUNDING)


@pytest.mark.parametrize("sizes", [((18, 18), (18, 18)), ((4, 10),), ((2, 2), (18, 6), (2, 2))])
def test_windows_hold_every_patch_once_and_images_only_their_own(sizes):
    plan = VisionPlan.of(sizes, 2, 4, CPU)
    count = sum(rows * columns for rows, columns in sizes)
    assert sorted(plan.order_N.tolist()) == list(range(count))
    assert sum(groups * length for _, groups, length in plan.windows) == count
    assert max(length for *_, length in plan.windows) <= 64
    assert plan.whole_N[plan.windowed_N].tolist() == list(range(count))
    owner_N = torch.repeat_interleave(torch.tensor([rows * columns for rows, columns in sizes]))
    for spans, order_N in ((plan.windows, plan.order_N), (plan.images, plan.order_N[plan.whole_N])):
        for first, groups, length in spans:
            owners = owner_N[order_N[first : first + groups * length]].view(groups, length)
            assert (owners == owners[:, :1]).all()


def test_no_step_of_a_chunk_waits_for_the_device(pair):
    """From inputs on the device to actions there; the grid of the images is on the CPU, and the noise comes from there."""
    _, fused = pair
    inputs = fused.processor(ObservationBatch.collate([observation()]))
    with torch.inference_mode(), Reads(on_host=[inputs.grid_I3]) as reads:
        prefix = fused.model.read(fused.model.embed(inputs))
        fused.model.decoder.sample(prefix, [torch.Generator().manual_seed(0)], Sampling(2))
    assert not reads.found


def test_launches_depend_on_neither_layers_nor_steps(tmp_path):
    found = []
    for size in ("2", "3"):
        sizes = ["--layers", size, "--vision-layers", size, "--steps", size, "--side", "3"]
        assert launches.main([*sizes, "--json", str(tmp_path / "counts.json")]) == 0
        chunk = json.loads((tmp_path / "counts.json").read_text())["cases"][-1]
        found.append([chunk["arms"][way]["median"] for way in ("fused", "eager")])
    assert found[0][0] == found[1][0] < 30
    assert found[0][1] < found[1][1]


def test_a_prefix_whose_buffers_were_given_away_is_refused(pair):
    _, fused = pair
    with torch.inference_mode():
        first, second = (fused.encode(ObservationBatch.collate([observation()])) for _ in range(2))
        generators = [torch.Generator().manual_seed(0)]
        fused.model.decoder.sample(second, generators, Sampling(1))
        with pytest.raises(CapabilityError, match="later observation has overwritten"):
            fused.model.decoder.sample(first, generators, Sampling(1))


def test_buffers_serve_inference_mode_and_its_absence(pair):
    """Guidance acts without inference mode, in buffers that may have been made in it."""
    _, fused = pair
    batch = ObservationBatch.collate([observation()])
    with torch.inference_mode():
        wanted = fused.encode(batch).hidden_BPW.clone()
    with torch.no_grad():
        assert torch.equal(fused.encode(batch).hidden_BPW, wanted)


def test_the_networks_own_matrices_are_views_of_the_merged_ones(pair):
    """So that a fused model takes no more memory, and gradients and noise samples, which run as ever, see the same weights."""
    eager, fused = pair
    attention, merged = eager.model.backbone.language.layers[0].self_attn, fused.model.backbone.fused[0].qkv.weight_OI
    assert attention.q_proj.weight.data_ptr() == merged.data_ptr()
    assert attention.v_proj.weight.untyped_storage().data_ptr() == merged.untyped_storage().data_ptr()


def test_networks_of_another_kind_are_refused():
    with pytest.raises(CapabilityError, match="A TinyBackbone has no fused layers"):
        with_engine(tiny_policy(), "graphs")


def test_only_the_shapes_used_last_are_kept():
    kept = Recent()
    for number in [*range(KEPT), 0, KEPT]:
        kept.fetch(number, object)
    assert list(kept) == [*range(2, KEPT), 0, KEPT]
