"""Recipes found by name."""

from dataclasses import replace

import pytest
import torch

from vlaflow.config import override
from vlaflow.data.weights import named_mixture
from vlaflow.errors import ConfigError
from vlaflow.policies.asyncvla.policy import qwen3b, smol
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


@pytest.mark.parametrize(
    "name",
    [
        *("asyncvla.libero", "a1.libero", "a1.libero_mlp", "a1.vlabench", "a1.pretrain", "dfm_vla.libero", "dfm_vla.calvin"),
        *("iflybot.joint3b", "iflybot.libero", "baselines.oft3b", "baselines.fast_ar_emu3", "baselines.masked_emu3"),
    ],
)
def test_recipes_with_published_numbers_hold_nothing_out_and_say_so(name):
    recipe = find_recipe(name)
    config = recipe.config(DataSpec(8, 7, ("front", "wrist")))
    assert config.validation_fraction == 0
    assert config.precision == "bf16"


def test_the_recipe_for_a_robot_of_ones_own_fits_adapters_or_everything():
    """Its exits are those of the backbone, and the parts whose rates it names are there (asyncvla.robot3b)."""
    data = DataSpec(7, 7, ("front", "wrist"))
    config = find_recipe("asyncvla.robot3b").config(data)
    assert config.lora is not None
    whole = override(config, {"lora": "none", "optim.kind": "paged_adamw8bit"})
    assert (whole.lora, whole.ema_decay) == (None, None)
    policy = config.objective.policy
    with torch.device("meta"):
        model = replace(qwen3b(data, chunk_size=16, source=None, dtype="bfloat16"), exits=policy.exits).build()
    assert model.depths == (18, 27, 36)
    adapted = sum(config.lora.rank * (part.in_features + part.out_features) for part in model.backbone.adapted)
    free = sum(p.numel() for part in (model.decoder, model.backbone.state) for p in part.parameters())
    assert adapted + free == pytest.approx(47e6, rel=0.02)


@pytest.mark.parametrize(
    ("name", "modes", "clip", "kept"),
    [
        ("asyncvla.pretrain", "mean_std", None, ()),
        ("a1.libero", "quantile", None, ("gripper",)),
        ("a1.pretrain", "identity", None, ()),
        ("dfm_vla.libero", "quantile", 1.0, ()),
    ],
)
def test_recipes_at_full_size_normalise_as_their_papers_say(name, modes, clip, kept):
    config = find_recipe(name).config(DataSpec(4, 4, ("corner",)), None)
    policy = config.objective.policy
    assert (policy.action_normalisation, policy.action_clip, policy.kept_actions) == (modes, clip, kept)


def test_pretraining_recipes_mix_as_their_papers_say():
    data = DataSpec(4, 4, ("corner",))
    assert find_recipe("a1.pretrain").config(data, None).mixture == named_mixture("robots")
    assert find_recipe("asyncvla.pretrain").config(data, None).mixture.weights["bridge"] == 24.14
