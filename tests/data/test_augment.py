"""Erasing, sharpening and masking do what they say, from their generator and nothing else."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from vlaflow.data.augment import Augment, StateMask, erase, sharpen
from vlaflow.errors import ConfigError


def images(batch=64, size=96, seed=0):
    return torch.randint(1, 256, (batch, size, size + 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("factor", [0.0, 1.0, 2.0, 3.5])
def test_sharpening_is_pillows_within_one_grey_level(factor):
    image = images(1)[0]
    ours = sharpen(image[None], torch.tensor([factor]))[0].numpy().astype(int)
    theirs = np.asarray(ImageEnhance.Sharpness(Image.fromarray(image.numpy())).enhance(factor)).astype(int)
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(ours[0] - theirs[0]).max() <= 1


def test_erasing_blackens_one_to_three_squares_of_the_asked_size():
    how = Augment()
    black = (erase(images(400), how, generator()) == 0).all(-1)
    shares = black.float().mean((1, 2)) * 96 * 104
    low, high = 20 / 336 * 96, 80 / 336 * 96
    assert float(shares.min()) >= (round(low) - 0.5) ** 2
    assert float(shares.max()) <= 3 * (high + 1) ** 2
    single = Augment(squares=(1, 1))
    for mask in (erase(images(50), single, generator()) == 0).all(-1):
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        sides = {int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1}
        assert len(sides) == 1  # a square
        assert int(mask.sum()) == sides.pop() ** 2


def test_half_of_the_images_are_touched_and_three_tenths_of_those_twice():
    before = images(2000, 24) // 16 + 120  # so that no sharpening reaches black
    after = Augment(sharpness=(3.0, 3.0))(before, generator())
    touched = (before != after).flatten(1).any(1)
    assert float(touched.float().mean()) == pytest.approx(0.5, abs=0.04)
    corner_black = (after == 0).all(-1).flatten(1).any(1)
    erased = float(corner_black[touched].float().mean())
    assert erased == pytest.approx(0.5 + 0.5 * 0.3, abs=0.05)


def test_same_seed_same_bytes():
    assert torch.equal(Augment()(images(), generator()), Augment()(images(), generator()))
    assert not torch.equal(Augment()(images(), generator()), Augment()(images(), generator(2)))


def test_a_whole_state_is_hidden_or_none_of_it():
    known = StateMask(0.3)(4000, 5, generator())
    assert set(known.sum(1).tolist()) == {0, 5}
    assert float(known[:, 0].float().mean()) == pytest.approx(0.7, abs=0.03)
    single = StateMask(0.3, "dimension")(4000, 5, generator())
    assert set(single.sum(1).tolist()) == {0, 1, 2, 3, 4, 5}
    assert float(single.float().mean()) == pytest.approx(0.7, abs=0.02)
    assert StateMask(0.0)(10, 3, generator()).all()
    assert not StateMask(1.0)(10, 3, generator()).any()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: StateMask(1.5),
        lambda: Augment(probability=-1),
        lambda: Augment(squares=(0, 1)),
        lambda: Augment(side=(0.5, 0.2)),
        lambda: Augment(sharpness=(3, 2)),
    ],
)
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ConfigError):
        wrong()
