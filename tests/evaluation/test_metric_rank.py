"""How well a distance between tokens foretells the change of a chunk."""

import numpy as np
import pytest
import torch

from tests import helpers
from vlaflow.actions.bins import BinsFit
from vlaflow.decoders.token_metrics import SlotMetric
from vlaflow.evaluation.tokenizer_report import Material, id_distance, metric_rank


def test_a_distance_by_slot_ranks_replacements_by_the_slot_that_they_are_in():
    """Bins of one dimension are wider than those of another: values rank the changes that they make, ids do not."""
    width_D = np.array([1.0, 0.5, 0.1, 0.05], np.float32)
    bins = BinsFit(8).fit(helpers.chunks() * width_D)
    chunks = Material(helpers.chunks() * width_D, helpers.chunks(400, seed=1) * width_D, None)
    values_SVV = SlotMetric(spread=(1.0,) * bins.slots).distance(torch.empty(bins.vocabulary, 1), bins).numpy()
    assert metric_rank(bins, chunks, values_SVV) == pytest.approx(1, abs=1e-3)
    by_id_VV = id_distance(bins)
    assert metric_rank(bins, chunks, by_id_VV) < 0.8
    assert metric_rank(bins, chunks, np.stack([by_id_VV] * bins.slots)) == metric_rank(bins, chunks, by_id_VV)
