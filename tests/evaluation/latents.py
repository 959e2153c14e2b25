"""A small latent action model that knows nothing, and the toy data set it is measured on."""

import pytest

from tests.data.toyset import FPS, write_v3
from vlaflow.actions.latent import LatentActionModel, LatentConfig, Origin
from vlaflow.data.lerobot import Dataset

SMALL = LatentConfig(image_size=28, patch=4, width=16, heads=2, ffn=32, spatial=1, temporal=1, decoder=1, code_dim=4, book=16)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("VLAFLOW_CACHE", str(tmp_path / "cache"))
    return write_v3(tmp_path / "toy")


def saved(root, folder, held_out=0.3, own=True):
    dataset = Dataset.open(root, video=True)
    origin = Origin(dataset.fingerprint if own else "other", "image", FPS, 0.1, 2, held_out, 0)
    model = LatentActionModel.create(SMALL, origin, 0).eval()
    model.save_pretrained(folder)
    return model, dataset
