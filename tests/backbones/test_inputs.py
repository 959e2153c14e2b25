"""Inputs are made on the CPU, and a network that has them fetches nothing back from its device."""

import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch

from tests import helpers
from tests.backbones import test_emu3 as emu3
from tests.backbones import test_molmo2 as molmo2
from tests.backbones import test_qwen2_5_vl as qwen
from tests.backbones import test_smol as smol
from vlaflow.backbones.inputs import Inputs
from vlaflow.backbones.qwen2_5_vl import qwen2_5_vl_3b
from vlaflow.backbones.qwen2_5_vl_processor import patch_positions, token_positions
from vlaflow.backbones.tiny import TinyConfig
from vlaflow.data.batch import ObservationBatch

transformers = pytest.importorskip("transformers")

TINY = TinyConfig(4, ("image",), image_size=16, cell=8, width=32, depth=1, heads=2, ffn=64, text_bytes=32)
FAMILIES = {
    "tiny": (lambda folder: TINY, helpers.batch(2).observation),
    "qwen": (lambda folder: qwen.qwen_config(qwen.write_model(folder, tied=True)), qwen.OBSERVED),
    "molmo2": (lambda folder: molmo2.molmo_config(molmo2.write_model(folder)), molmo2.OBSERVED),
    "smol": (lambda folder: smol.smol_config(smol.write_model(folder)), smol.OBSERVED),
    "emu3": (lambda folder: emu3.emu_config(emu3.write_model(folder)), emu3.OBSERVED),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A network, its processor, and two observations whose instructions differ in length."""
    make, observed = FAMILIES[request.param]
    config = make(tmp_path_factory.mktemp(request.param))
    return config.build().eval(), config.processor(), observed


def tensors(inputs):
    """By field: every tensor, those of mappings too."""
    for field in fields(Inputs):
        value = getattr(inputs, field.name)
        for one in value.values() if isinstance(value, dict) else [value] if value is not None else []:
            yield field.name, one


@torch.no_grad()
def test_a_missing_view_is_seen_by_nothing_and_its_neighbours_lose_nothing(family):
    """Whatever its pixels are, in no layer, and next to an observation that has all views."""
    backbone, processor, observed = family
    last = list(observed.images)[-1]
    shown = {view: torch.tensor([view != last, True]) for view in observed.images}

    def read(observation):
        prefix = backbone.run(backbone.embed(processor(observation)))
        return prefix.hidden_BPW, prefix.padding_mask_BP

    whole_BPW, padding_BP = read(observed)
    missing_BPW, mask_BP = read(replace(observed, shown=shown))
    image = observed.images[last].clone()
    image[0] = 255 - image[0]
    again_BPW, _ = read(replace(observed, shown=shown, images={**observed.images, last: image}))
    assert mask_BP[0].sum() < padding_BP[0].sum()
    assert torch.equal(mask_BP[1], padding_BP[1])
    assert missing_BPW.isfinite().all()
    assert torch.allclose(missing_BPW[0][mask_BP[0]], again_BPW[0][mask_BP[0]], atol=1e-5)
    assert torch.allclose(missing_BPW[1][mask_BP[1]], whole_BPW[1][mask_BP[1]], atol=1e-5)
    assert not torch.allclose(missing_BPW[0][mask_BP[0]], whole_BPW[0][mask_BP[0]], atol=1e-5)


@torch.no_grad()
def test_embed_fetches_nothing_from_the_device(family):
    """On the meta device no tensor has values, so whatever asks for one (item, tolist, cpu, a mask as an index) raises."""
    backbone, processor, observed = family
    inputs = processor(observed)
    expected = backbone.embed(inputs)
    prefix = backbone.to("meta").embed(inputs.to("meta"))
    assert prefix.hidden_BPW.device.type == "meta"
    assert prefix.hidden_BPW.shape == expected.hidden_BPW.shape
    assert prefix.padding_mask_BP is not None


def test_inputs_are_on_the_cpu_and_image_grids_stay_there(family):
    _, processor, observed = family
    inputs = processor(observed)
    assert {tensor.device.type for _, tensor in tensors(inputs)} == {"cpu"}
    assert {name for name, tensor in tensors(inputs.to("meta")) if tensor.device.type == "cpu"} <= {"grid_I3"}
    assert len(inputs) == 2


def test_no_padding_no_mask(family):
    """The mask is None where no row is padded: attention without one is faster, and nothing has to look at the device."""
    _, processor, observed = family
    alone = ObservationBatch({v: i[:1] for v, i in observed.images.items()}, observed.state_BS[:1], observed.instructions[:1])
    inputs = processor(alone)
    assert inputs.padding_mask_BP is None


@pytest.mark.parametrize("seed", range(4))
def test_positions_are_those_of_qwen(seed):
    """Images of any shape between words of any number, against transformers' own loop over tokens."""
    from transformers.vision_utils import get_vision_position_ids

    rng = torch.Generator().manual_seed(seed)
    grid_I3 = torch.cat((torch.ones(4, 1, dtype=torch.long), 2 * torch.randint(1, 6, (4, 2), generator=rng)), 1)
    rows = []
    for images in (grid_I3[:2], grid_I3[2:]):
        row = [False] * int(torch.randint(1, 5, (), generator=rng))
        for _, high, wide in images.tolist():
            row += [True] * (high * wide // 4) + [False] * int(torch.randint(1, 5, (), generator=rng))
        rows.append(torch.tensor(row))
    image_BP = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    attention_BP = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    with torch.device("meta"):
        theirs = transformers.Qwen2_5_VLModel(transformers.Qwen2_5_VLConfig(**qwen2_5_vl_3b()))
    expected_3BP, _ = theirs.get_rope_index(image_BP.long(), image_BP.int(), grid_I3, attention_mask=attention_BP.long())
    found_3BP = token_positions(image_BP, grid_I3[:, 1:] // 2)
    assert torch.equal(found_3BP[:, attention_BP], expected_3BP[:, attention_BP])
    assert torch.equal(patch_positions(grid_I3, 2), get_vision_position_ids(grid_I3, 2))


def test_qwen_needs_no_transformers_that_knows_other_models(tmp_path):
    """A version in which Molmo2 and Emu3 are missing builds, reads and embeds."""
    folder = qwen.write_model(tmp_path, tied=True)
    code = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("transformers.models.molmo2", "transformers.models.emu3")):
            raise ImportError(name)
sys.meta_path.insert(0, Missing())
from tests import helpers
from tests.backbones import test_qwen2_5_vl as qwen
from tests.backbones import test_smol as smol
from pathlib import Path
assert helpers.embed(qwen.build(Path({str(folder)!r})), qwen.OBSERVED).hidden_BPW.isfinite().all()
assert not [name for name in sys.modules if name.startswith("transformers.models.molmo2")]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
