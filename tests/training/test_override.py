"""Values of a recipe set from the command line."""

import pytest

from tests.training.small import tiny_config
from vlaflow.config import override
from vlaflow.errors import ConfigError


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("optim.learning_rate", "3e-4", 3e-4),
        ("steps", "12", 12),
        ("ema_decay", "none", None),
        ("ema_decay", "0.5", 0.5),
        ("optim.schedule", "constant", "constant"),
        ("optim.betas", "[0.8, 0.9]", (0.8, 0.9)),
        ("policy.backbone.views", '["a", "b"]', ("a", "b")),
        ("policy.decoder.masks", "synchronous", "synchronous"),
        ("pauses", "null", None),
        ("optim.clip_norm", "none", None),
    ],
)
def test_a_value_is_read_as_its_fields_type(key, text, expected):
    found = override(tiny_config(), {key: text})
    found = found.objective if key.startswith("policy.") else found
    for name in key.split("."):
        found = getattr(found, name)
    assert found == expected


def test_the_original_is_untouched():
    config = tiny_config()
    override(config, {"optim.learning_rate": "1.0"})
    assert config == tiny_config()


@pytest.mark.parametrize("order", [("width", "heads"), ("heads", "width")])
def test_values_that_only_fit_together_come_in_any_order(order):
    """Three heads do not divide a width of 32, nor two a width of 33 that three do."""
    values = {"width": "33", "heads": "3"}
    config = override(tiny_config(), {f"policy.backbone.{name}": values[name] for name in order})
    assert (config.objective.policy.backbone.width, config.objective.policy.backbone.heads) == (33, 3)


def test_nested_groups_are_given_as_json():
    config = override(tiny_config(), {"optim.groups": '[{"prefix": "backbone.", "frozen": true}]'})
    assert config.optim.groups[0].frozen


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("optim.learning_rat", "1", "did you mean 'learning_rate'"),
        ("optm.learning_rate", "1", "did you mean 'optim'"),
        ("steps", "many", "must be int, got 'many'"),
        ("steps", "1.5", "must be int"),
        ("optim.learning_rate", "fast", "must be a number"),
        ("optim.schedule", "cosin", "did you mean 'cosine'"),
        ("steps.more", "1", "is 6, not a group"),
        ("policy.rater.depth", "1", r"'policy.rater' is not set in this recipe.* cannot be set\.$"),
        ("lora.rank", "8", r"'lora' is not set in this recipe, .* Set it as well: --set 'lora=\{\}'$"),
        (
            "state_mask.what",
            "whole",
            r"'state_mask' is not set.* cannot be set\. Set it as well: --set 'state_mask=\{\"probability\": \.\.\.\}'$",
        ),
        ("state_mask.probability", "0.8", r" Set it as well: --set 'state_mask=\{\"probability\": 0\.8\}'$"),
        ("policee.n_action_steps", "1", "did you mean 'policy'"),
        ("policy.n_action_stpes", "1", "did you mean 'n_action_steps'"),
        ("objective.policy.n_action_steps", "1", "Unknown key 'objective'"),
        ("global_batch_size", "0", "at least 1"),
        ("optim.betas", "[0.9, 1.0]", r"'optim.betas\[1\]' in --set must be in \[0, 1\), got 1.0"),
        ("optim.clip_norm", "0", "must be above 0, got 0"),
        ("optim.eps", "0", "must be above 0, got 0"),
        ("optim.groups", '[{"prefix": "decoder.", "learning_rate": -1e-3}]', r"learning_rate' in --set must be at least 0"),
        ("optim.groups", '[{"prefix": "decoder.", "frozen_steps": -1}]', r"frozen_steps' in --set must be at least 0"),
        ("lora", '{"learning_rate": -1e-3}', r"'lora.learning_rate' in --set must be at least 0"),
        ("lora", '{"alpha": 0}', r"'lora.alpha' in --set must be above 0"),
        ("max_excluded", "0", "must be above 0 and at most 1, got 0"),
        ("demonstrations", "0", "must be above 0 and at most 1, got 0"),
        ("chunk_s", "0", "must be above 0, got 0"),
    ],
)
def test_a_wrong_key_or_value_is_one_sentence(key, text, message):
    with pytest.raises(ConfigError, match=message):
        override(tiny_config(), {key: text})


def test_what_is_not_set_can_be_set_with_the_option_that_the_error_names():
    config = override(tiny_config(), {"stop.patience": "2", "stop": "{}", "lora": "{}", "lora.rank": "8"})
    assert (config.stop.patience, config.lora.rank) == (2, 8)
