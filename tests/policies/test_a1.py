"""A1's assemblies and recipes at full size, on the meta device, and small ones that act."""

import pytest
import torch

from vlaflow.policies.a1 import recipes
from vlaflow.policies.a1.policy import molmo_flow, molmo_regression, tiny_flow, tiny_regression
from vlaflow.policies.recipe import DataSpec
from vlaflow.training.optim import freeze, late_parameters

DATA = DataSpec(8, 7, ("front", "wrist"))


def test_the_published_sizes():
    """8.66 B pretrained parameters, an expert of 378 M over 36 layers (264 M over A1's 28 with half the K/V heads)."""
    with torch.device("meta"):
        flow = molmo_flow(DATA, source=None).build()
        regression = molmo_regression(DATA, source=None).build()
    assert sum(p.numel() for p in flow.decoder.stack.layers.parameters()) == pytest.approx(377.7e6, rel=1e-3)
    assert flow.depths == regression.depths == tuple(range(1, 37))
    assert (flow.backbone.spec.attention, regression.backbone.spec.attention) == ("causal", "full")
    assert regression.decoder.query.shape == (70, 4096)
    total = sum(p.numel() for p in flow.parameters())
    assert total == pytest.approx(9.03e9, rel=0.01)


@pytest.mark.parametrize("recipe", [recipes.libero, recipes.libero_mlp, recipes.vlabench, recipes.pretrain])
def test_the_recipes_name_parts_that_exist(recipe):
    config = recipe(DATA)
    make = molmo_regression if recipe is recipes.libero_mlp else molmo_flow
    with torch.device("meta"):
        model = make(DATA, source=None).build()
    freeze(model, config.optim)
    late = late_parameters(model, config.optim)
    language = list(model.backbone.network.language_model.parameters())
    assert [id(p) for _, p in late] == [id(p) for p in language]
    assert not any(p.requires_grad for p in model.backbone.network.vision_tower.parameters())
    assert all(p.requires_grad for p in model.decoder.parameters())


@pytest.mark.parametrize(("make", "millions"), [(tiny_flow, 2.24), (tiny_regression, 1.39)])
def test_the_demos_have_an_answer_at_every_layer(make, millions):
    model = make(DataSpec(4, 4, ("image",))).build()
    assert model.depths == (1, 2, 3, 4, 5, 6)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
