"""Interventions in training: latent codes that tell of one are not learned."""

import numpy as np

from tests.training import flybot
from vlaflow.actions.latent import LatentActionModel
from vlaflow.cli import train as command
from vlaflow.data.lerobot import Dataset
from vlaflow.data.quality import INTERVENTIONS
from vlaflow.policies.base import Policy
from vlaflow.policies.iflybot.codes import model_pairs
from vlaflow.policies.latent_codes import codes_of


def test_codes_that_tell_of_an_intervention_are_left_out(dataset, tmp_path, monkeypatch):
    """Those of the pairs that reach over it; the others stay."""
    latent = flybot.write_latent(tmp_path / "latent")
    assert command.main(flybot.joint(dataset, tmp_path / "p", latent)) == 0
    policy, opened = Policy.from_pretrained(tmp_path / "p"), Dataset.open(dataset)
    all_NK, _ = codes_of(policy, opened, latent, None)
    intervened_N = np.zeros(len(opened), bool)
    intervened_N[5] = True
    monkeypatch.setattr("vlaflow.policies.latent_codes.intervened", lambda *_: intervened_N)
    some_NK, _ = codes_of(policy, opened, latent, INTERVENTIONS)
    gap = model_pairs(LatentActionModel.from_pretrained(latent), opened).gap
    over = list(range(6 - gap, 6))
    assert (all_NK[over] >= 0).all()
    assert (some_NK[over] == -1).all()
    assert np.array_equal(np.delete(some_NK, over, 0), np.delete(all_NK, over, 0))
