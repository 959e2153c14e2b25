"""Decoding many episodes of one file: it is opened once, and nobody gets frames of another episode or of an older file."""

import av
import numpy as np
import pytest

from tests.data.toyset import LENGTHS, VIEWS, cut_in_half, episode
from vlaflow.errors import DataError


def near(found, wanted):
    """Equal but for what H.264 loses; other episodes are 80 away."""
    return np.abs(found.astype(int) - wanted).mean() < 12


def test_a_file_of_many_episodes_is_opened_once(dataset, monkeypatch):
    """Opening it reads the index of all its episodes, so opening it for each would take time that grows with their square."""
    opened, really = [], av.open
    monkeypatch.setattr(av, "open", lambda path, *rest, **options: (opened.append(path), really(path, *rest, **options))[1])
    for number in (3, 1, 4, 2, 3):
        assert near(dataset.frames(number, "corner"), episode(number)[0]["corner"])
    assert len(opened) == 1


def test_two_that_decode_a_file_in_turns_do_not_disturb_each_other(dataset):
    one, other = (dataset.iter_frames(number, "image") for number in (1, 3))
    for found, later, wanted, after in zip(one, other, episode(1)[0]["image"], episode(3)[0]["image"], strict=False):
        assert near(found, wanted)
        assert near(later, after)
    assert near(dataset.frames(2, "image"), episode(2)[0]["image"])


def test_a_file_that_was_changed_is_opened_again(dataset):
    assert dataset.frames(1, "corner").shape == (LENGTHS[1], *VIEWS["corner"], 3)
    cut_in_half(dataset.video_paths(1)["observation.images.corner"])
    with pytest.raises(DataError, match="cannot be decoded"):
        dataset.frames(1, "corner")
