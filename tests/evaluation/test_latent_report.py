"""The measures of a latent action model in closed form, and the page that shows them."""

import numpy as np
import pytest

from tests.evaluation.latents import saved
from vlaflow.errors import SpecError
from vlaflow.evaluation import latent_report


def test_usage_of_evenly_used_entries():
    id_MK = np.array([[0, 1], [1, 0], [2, 3], [3, 2]])
    found = latent_report.usage(id_MK, 8)
    assert found.perplexity == pytest.approx(4)
    assert (found.used, found.distinct, found.pairs) == (4, 4, 4)
    assert np.allclose(found.share_V, [0.25] * 4 + [0] * 4)
    assert np.allclose(found.place_perplexity, [4, 4])


def test_a_line_is_explained_and_noise_is_not():
    rng = np.random.default_rng(0)
    x, new_x = rng.normal(size=(400, 3)), rng.normal(size=(200, 3))
    weight, noise = rng.normal(size=(3, 2)), rng.normal(size=(400, 2))
    assert latent_report.explained(x, x @ weight, new_x, new_x @ weight) == pytest.approx([1, 1], abs=1e-3)
    assert (latent_report.explained(x, noise, new_x, rng.normal(size=(200, 2))) < 0.02).all()


def test_a_dimension_that_stands_still_has_no_share():
    """Neither 1, which padding would get, nor the minus millions of a residual over no variance."""
    rng = np.random.default_rng(0)
    x, new_x = rng.normal(size=(400, 3)), rng.normal(size=(200, 3))
    for stays in (0.0, 0.3):
        y, new_y = np.full((400, 2), stays, np.float32), np.full((200, 2), stays, np.float32)
        y[:, 0], new_y[:, 0] = x[:, 0], new_x[:, 0]
        found = latent_report.explained(x, y, new_x, new_y)
        assert found == pytest.approx([1, np.nan], abs=1e-3, nan_ok=True)
        y[:, 1] += rng.normal(size=400)  # it moved in training
        assert np.isnan(latent_report.explained(x, y, new_x, new_y)[1])


def test_a_model_that_ignores_its_codes_does_as_well_with_other_ones(root, tmp_path):
    """Its decoder says mid-grey, whatever it is shown."""
    model, dataset = saved(root, tmp_path / "m")
    model.decoder.leave.weight.data.zero_()
    model.decoder.leave.bias.data.zero_()
    _, held = latent_report.encode_pairs(model, dataset)
    found = latent_report.pixels(model, held)
    earlier, later = (frames.double() / 255 for frames in held.pairs.frames(held.index_M))
    assert found.copy == pytest.approx((earlier - later).square().mean().item(), rel=1e-5)
    assert found.decoded == found.other == pytest.approx((later - 128 / 255).square().mean().item(), rel=1e-5)
    assert found.explained == pytest.approx(1 - found.decoded / found.copy)


def test_training_and_held_out_episodes_are_apart_and_divided_as_in_training(root, tmp_path):
    from vlaflow.data.windows import split_episodes

    model, dataset = saved(root, tmp_path / "m")
    train, held = latent_report.encode_pairs(model, dataset)
    assert (train.pairs.episodes, held.pairs.episodes) == split_episodes(dataset, 0.3, 0)


def test_data_of_which_nothing_was_held_out_is_refused_unless_it_is_new(root, tmp_path):
    with pytest.raises(SpecError, match="training held out no episode"):
        latent_report.encode_pairs(*saved(root, tmp_path / "m", held_out=0.0))
    assert latent_report.encode_pairs(*saved(root, tmp_path / "n", held_out=0.0, own=False))
