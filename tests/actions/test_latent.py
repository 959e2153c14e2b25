"""The latent action model: what may reach what, and files."""

import json
from dataclasses import replace

import pytest
import torch

from tests import helpers
from vlaflow.actions.latent import LatentActionModel, LatentConfig, Origin
from vlaflow.errors import CheckpointError, ConfigError, SpecError
from vlaflow.policies.iflybot.policy import full_latent, tiny_latent

SMALL = LatentConfig(image_size=28, patch=4, width=16, heads=2, ffn=32, spatial=1, temporal=1, decoder=2, code_dim=4, book=16)
ORIGIN = Origin("0123", "image", 10.0, 0.2, 2, 0.1, 3)


def model(config=SMALL, seed=0):
    return LatentActionModel.create(config, ORIGIN, seed).eval()


def frames(seed=0, count=3, size=28):
    return torch.randint(0, 256, (count, size, size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_the_earlier_frames_features_do_not_depend_on_the_later_frame():
    made = model()
    patches = [made.patches(frames(seed).float() / 127.5 - 1) for seed in (0, 1, 2)]
    first, later = made.encoder.features(patches[0], patches[1])
    again, other = made.encoder.features(patches[0], patches[2])
    assert torch.equal(first, again)
    assert not torch.allclose(later, other, atol=1e-3)


def test_the_later_frames_features_depend_on_the_earlier_frame():
    made = model()
    patches = [made.patches(frames(seed).float() / 127.5 - 1) for seed in (0, 1, 2)]
    _, later = made.encoder.features(patches[0], patches[1])
    _, other = made.encoder.features(patches[2], patches[1])
    assert not torch.allclose(later, other, atol=1e-4)


class Fixed(torch.nn.Module):
    """A book that says the same whatever it is shown."""

    def forward(self, x_BKE, noise_BKE=None):
        return torch.ones_like(x_BKE), torch.zeros(x_BKE.shape[:2], dtype=torch.long)


def test_the_decoders_gradient_does_not_reach_the_encoder_through_the_first_frame():
    """With codes that depend on nothing, neither the encoder nor the patch embedding that both share gets a gradient."""
    made = model()
    made.book = Fixed()
    made(frames(0), frames(1)).later_BHW3.square().mean().backward()
    assert all(p.grad is None for p in (*made.encoder.parameters(), *made.patches.parameters()))
    assert all(p.grad is not None for p in made.decoder.parameters())


def test_every_parameter_learns():
    made = model(replace(SMALL, action_dim=2)).train()
    passed = made(frames(0), frames(1), made.draw(3, torch.Generator().manual_seed(0)))
    (passed.later_BHW3.square().mean() + passed.action_BD.square().mean()).backward()
    assert not [name for name, p in made.named_parameters() if p.grad is None]


def test_the_later_frame_reaches_the_decoder_through_the_codes_alone():
    """Two later frames with the same codes are decoded to the same image."""
    made = model()
    made.book = Fixed()
    one, other = (made(frames(0), frames(seed)).later_BHW3 for seed in (1, 2))
    assert torch.equal(one, other)


def test_other_codes_make_another_frame():
    made = model()
    one, other = (made.apply_codes(frames(0), torch.full((3, 8), code)) for code in (0, 5))
    assert (one != other).any()


def test_codes_are_ids_that_a_language_model_can_be_taught():
    made = model().train()
    id_BK = made.codes(frames(0), frames(1))
    assert id_BK.shape == (3, SMALL.codes) == (3, 8)
    assert id_BK.dtype == torch.int64
    assert id_BK.min() >= 0
    assert id_BK.max() < SMALL.book
    logits = torch.zeros(3, 8, SMALL.book, requires_grad=True)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), id_BK.flatten()).backward()
    assert logits.grad is not None


def test_codes_do_not_depend_on_the_batch():
    made = model()
    together = made.codes(frames(0), frames(1))
    alone = [made.codes(frames(0)[i : i + 1], frames(1)[i : i + 1]) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_evaluation_decodes_the_entries_themselves():
    """What a pass in evaluation mode makes is what ``apply_codes`` makes of the pair's codes, to a rounding of pixels."""
    made = model()
    with torch.no_grad():
        passed = made(frames(0), frames(1))
    assert torch.equal(passed.id_BK, made.codes(frames(0), frames(1)))
    image = ((passed.later_BHW3 + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(image, made.apply_codes(frames(0), passed.id_BK))


def test_a_saved_model_is_the_same_model(tmp_path):
    made = model(replace(SMALL, action_dim=2))
    made.save_pretrained(tmp_path / "m", card="about it")
    again = LatentActionModel.from_pretrained(tmp_path / "m")
    assert (again.config, again.origin) == (made.config, made.origin)
    assert not again.training
    assert again.fingerprint() == made.fingerprint()
    assert torch.equal(again.codes(frames(0), frames(1)), made.codes(frames(0), frames(1)))
    assert (tmp_path / "m/README.md").read_text() == "about it"
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_the_fingerprint_is_that_of_weights_and_origin():
    made, other = model(), LatentActionModel.create(SMALL, replace(ORIGIN, gap=3), 0)
    assert made.fingerprint() == model().fingerprint()
    assert len({made.fingerprint(), other.fingerprint(), model(seed=1).fingerprint()}) == 3


def test_a_folder_of_something_else_is_refused(tmp_path):
    helpers.policy().save_pretrained(tmp_path / "policy")
    with pytest.raises(ConfigError, match=r"'config\.kind' in .* must be 'LatentFile'"):
        LatentActionModel.from_pretrained(tmp_path / "policy")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        LatentActionModel.from_pretrained(tmp_path / "nothing")


def test_weights_of_another_size_are_refused(tmp_path):
    model().save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["model"]["book"] = 8
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"'book.entry_VE' in .* has shape \(16, 4\), but config.json requires \(8, 4\)"):
        LatentActionModel.from_pretrained(tmp_path / "m")


def test_frames_of_another_size_are_refused():
    with pytest.raises(SpecError, match="needs frames of 28x28 pixels, got 32x32"):
        model().codes(frames(0, size=32), frames(1, size=32))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"patch": 5}, "multiple of patch 5"),
        ({"heads": 3}, "multiple of heads 3"),
        ({"book": 1}, "must have 2 to 32767 entries"),
        ({"grid": (0, 8)}, "at least 1"),
        ({"grid": (5, 2)}, "finer than the 4x4 positions that are pooled"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **wrong)


@pytest.mark.parametrize(("config", "millions"), [(tiny_latent(), 0.9), (full_latent(), 325.6)])
def test_the_presets_have_the_stated_size(config, millions):
    with torch.device("meta"):
        made = LatentActionModel(config, ORIGIN)
    assert sum(p.numel() for p in made.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert (config.codes, config.book) == (8, 32)
