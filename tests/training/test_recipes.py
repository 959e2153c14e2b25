"""Recipes found by name."""

import pytest
import torch

from vlaflow.errors import ConfigError
from vlaflow.policies.asyncvla.policy import smol
from vlaflow.policies.recipe import DataSpec
from vlaflow.training.recipes import find_recipe, list_recipes


def test_every_listed_recipe_can_be_called_and_says_what_it_is():
    recipes = list_recipes()
    assert {"asyncvla.demo", "asyncvla.rater"} <= set(recipes)
    for recipe in recipes.values():
        assert callable(recipe.call)
        assert recipe.summary


def test_the_signature_tells_whether_a_recipe_continues_a_policy():
    assert not find_recipe("asyncvla.demo").continues
    assert find_recipe("asyncvla.rater").continues


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("asyncvla.dmo", "'asyncvla' has no recipe 'dmo'; did you mean 'demo'"),
        ("asincvla.demo", "no recipe 'asincvla.demo'; did you mean 'asyncvla.demo'"),
        ("xyz", "valid names: .*asyncvla.demo"),
        ("asyncvla.TrainConfig", "has no recipe"),
    ],
)
def test_an_unknown_recipe_is_one_sentence(name, message):
    with pytest.raises(ConfigError, match=message):
        find_recipe(name)


def test_the_recipe_on_smollm2_has_the_size_that_it_states():
    config = smol(DataSpec(4, 4, ("corner",)), source=None)
    with torch.device("meta"):
        model = config.build()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(60e6, rel=0.01)
    assert find_recipe("asyncvla.smol").config(DataSpec(4, 4, ("corner",))).objective.policy.exits == config.exits
