"""Other pixels than in training are noticed before the first episode."""

import re
from typing import ClassVar

import pytest

from vlaflow.evaluation import images
from vlaflow.evaluation.images import unlike_training
from vlaflow.policies.provenance import rendered
from vlaflow.simulators.base import rendering_versions

ENVS = ["metaworld/drawer-open-v3"]
NOW = {"render": "fast", **rendering_versions(ENVS, "fast")}
LIBERO = {"render": "fast", "libero rendering": "fast 1"}


@pytest.mark.parametrize(
    ("learned", "words"),
    [
        ([], ""),
        ([NOW], ""),
        ([LIBERO, NOW], ""),
        ([LIBERO], ""),  # of another simulator
        ([{"render": "fast"}], r"'fast' \(of an earlier version\), and is evaluated on 'fast' \(metaworld rendering fast 2\)"),
        ([{**NOW, "metaworld rendering": "fast 1"}], r"'fast' \(metaworld rendering fast 1\)"),
        ([{"render": "exact", **rendering_versions(ENVS, "exact")}], r"'exact' \(.*exact 1\), and is evaluated on 'fast'"),
    ],
)
def test_images_that_are_rendered_otherwise_than_in_training_are_noticed(learned, words, monkeypatch, tmp_path):
    monkeypatch.setattr(images, "images_of", lambda folder: learned)
    found = unlike_training(tmp_path, ENVS, "fast")
    assert re.search(words, found) if words else not found


def test_a_data_set_says_how_its_images_were_rendered():
    class Recorded:
        provenance: ClassVar = {"render": "fast", "versions": {"torch": "2", "metaworld rendering": "fast 2"}}

    class Foreign:
        provenance: ClassVar = {}

    assert rendered(Recorded()) == {"render": "fast", "metaworld rendering": "fast 2"}
    assert rendered(Foreign()) == {}
