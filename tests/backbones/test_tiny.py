"""The tiny backbone: views, stems, words, and continuing where it stopped."""

import dataclasses

import pytest
import torch

from tests import helpers
from vlaflow.backbones.tiny import TinyConfig
from vlaflow.data.batch import ObservationBatch
from vlaflow.errors import CapabilityError, ConfigError, SpecError

CONFIG = TinyConfig(state_dim=3, image_size=32, cell=16, width=32, depth=3, heads=2, ffn=64, text_bytes=32)


def observe(views=("image",), words=("Open", "Close a window"), size=32, state=3):
    generator = torch.Generator().manual_seed(0)
    images = {v: torch.randint(0, 256, (len(words), size, size, 3), generator=generator, dtype=torch.uint8) for v in views}
    return ObservationBatch(images, torch.randn(len(words), state, generator=generator), list(words))


def build(**changes):
    torch.manual_seed(0)
    return dataclasses.replace(CONFIG, **changes).build().eval()


@pytest.mark.parametrize("stem", ["conv", "patch"])
@pytest.mark.parametrize("views", [("image",), ("left", "right", "wrist")])
def test_every_view_has_its_tokens_and_is_looked_at(stem, views):
    backbone, seen = build(stem=stem, views=views), observe(views)
    prefix = backbone.run(helpers.embed(backbone, seen))
    assert prefix.hidden_BPW.shape[1] == 4 * len(views) + 2 + 1  # four cells a view, two text tokens, the state
    for view in views:
        other = dataclasses.replace(seen, images={**seen.images, view: 255 - seen.images[view]})
        assert not torch.allclose(backbone.run(helpers.embed(backbone, other)).hidden_BPW, prefix.hidden_BPW)


def test_views_do_not_share_a_place():
    backbone, seen = build(views=("left", "right")), observe(("left", "right"))
    swapped = dataclasses.replace(seen, images={"left": seen.images["right"], "right": seen.images["left"]})
    state = -1
    here = backbone.run(helpers.embed(backbone, seen)).hidden_BPW[:, state]
    assert not torch.allclose(here, backbone.run(helpers.embed(backbone, swapped)).hidden_BPW[:, state])


def test_layers_run_a_few_at_a_time_give_the_same_bits():
    backbone = build()
    start = helpers.embed(backbone, observe())
    whole, parts = backbone.run(start), backbone.run(backbone.run(backbone.run(start, 1), 2))
    assert whole.depth == parts.depth == 3
    assert torch.equal(whole.hidden_BPW, parts.hidden_BPW)
    assert all(torch.equal(a.key_CGPE, b.key_CGPE) for a, b in zip(whole.kv_cache, parts.kv_cache, strict=True))
    assert start.depth == 0


def test_a_longer_neighbour_changes_nothing():
    """Padding of the shorter sentence is hidden from every other token."""
    backbone, together = build(), observe()
    alone = ObservationBatch({"image": together.images["image"][:1]}, together.state_BS[:1], together.instructions[:1])
    first = backbone.run(helpers.embed(backbone, together)).hidden_BPW[0]
    single = backbone.run(helpers.embed(backbone, alone)).hidden_BPW[0]
    kept = torch.cat((first[:5], first[-1:]))  # four cells, its one text token, the state
    torch.testing.assert_close(kept, single, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("words", "other"), [("Öffne", "Offne"), ("", "a"), ("ab", "ba")])
def test_words_are_told_apart_to_the_byte(words, other):
    backbone = build()
    states = [backbone.run(helpers.embed(backbone, observe(words=(w,)))).hidden_BPW[0, -1] for w in (words, other)]
    assert not torch.allclose(*states)


def test_wrong_sizes_get_one_sentence():
    with pytest.raises(ConfigError, match="1 to 8 views"):
        dataclasses.replace(CONFIG, views=())
    with pytest.raises(ConfigError, match="multiple of cell"):
        dataclasses.replace(CONFIG, image_size=40)
    with pytest.raises(SpecError, match="state of length 3, got 5"):
        CONFIG.processor()(observe(state=5))
    backbone = build(suffix=4)
    prefix = helpers.embed(backbone, observe())
    with pytest.raises(
        ConfigError, match=r"adds 5 tokens .* has 4 positions for them\. In training: --set policy\.backbone\.suffix=5$"
    ):
        backbone.place(torch.zeros(1, 5, 32), prefix)
    with pytest.raises(CapabilityError, match="no language-model head"):
        backbone.answer_loss(prefix, torch.zeros(1, 1))


def test_the_demo_policy_has_the_size_its_docstring_states():
    from vlaflow.policies.asyncvla.policy import tiny
    from vlaflow.policies.recipe import DataSpec

    with torch.device("meta"):
        model = tiny(DataSpec(4, 4, ("image",))).build()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 1.0
    assert helpers.policy_config().build().rater is None


def test_a_margin_is_cut_off_and_the_rest_read_as_without_one():
    """Whatever is in the margin; and the policy asks for images that are larger by it."""
    plain, cut = build(), build(margin=8)
    wide, state = observe(size=48), helpers.embed(plain, observe()).hidden_BPW
    inner = dataclasses.replace(wide, images={"image": wide.images["image"][:, 8:40, 8:40]})
    black = {"image": torch.nn.functional.pad(inner.images["image"], (0, 0, 8, 8, 8, 8))}
    assert cut.views == {"image": 48}
    assert cut.config.input_size.side == 48
    found = helpers.embed(cut, wide).hidden_BPW
    assert found.shape == state.shape
    assert torch.equal(found, helpers.embed(plain, inner).hidden_BPW)
    assert torch.equal(found, helpers.embed(cut, dataclasses.replace(wide, images=black)).hidden_BPW)
