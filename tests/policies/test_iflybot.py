"""iFlyBot-VLA's first stage as the others use it: codes of a whole data set."""

import numpy as np
import pytest
import torch

from tests.data.toyset import FPS, LENGTHS, write_v3
from vlaflow.actions.latent import LatentActionModel, LatentConfig, Origin
from vlaflow.data.lerobot import Dataset
from vlaflow.errors import DataError
from vlaflow.policies.iflybot.codes import dataset_codes, model_pairs

SMALL = LatentConfig(image_size=28, patch=4, width=16, heads=2, ffn=32, spatial=1, temporal=1, decoder=1, code_dim=4, book=16)
GAP = 9


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLAFLOW_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Dataset.open(write_v3(tmp_path_factory.mktemp("data") / "toy"))


def model(view="image", seed=0):
    return LatentActionModel.create(SMALL, Origin("", view, FPS, GAP / FPS, GAP), seed).eval()


def test_a_data_sets_codes_are_the_models_and_unknown_where_no_pair_begins(dataset, capsys):
    made = model()
    codes = dataset_codes(made, dataset)
    assert codes.id_NK.shape == (sum(LENGTHS), SMALL.codes)
    assert codes.known_N.sum() == sum(max(length - GAP, 0) for length in LENGTHS)
    assert (codes.id_NK[~codes.known_N] == -1).all()
    pairs = model_pairs(made, dataset)
    wanted = made.codes(*pairs.frames(np.arange(len(pairs)))).numpy()
    assert np.array_equal(codes.id_NK[codes.known_N], wanted)
    assert (codes.gap, codes.short) == (GAP, (1, 4))
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


def test_another_view_is_another_question(dataset):
    assert dataset_codes(model("corner"), dataset).known_N.any()
    assert not np.array_equal(dataset_codes(model(), dataset, view="corner").id_NK, dataset_codes(model(), dataset).id_NK)
    with pytest.raises(DataError, match="no view 'wrist'"):
        dataset_codes(model("wrist"), dataset)
