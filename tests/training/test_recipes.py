"""Recipes found by name."""

import pytest

from vlaflow.errors import ConfigError
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
