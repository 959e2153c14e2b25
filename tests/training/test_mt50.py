"""The recipe for Meta-World's fifty tasks, from data to an action: its checkpoint knows what part of an image it reads."""

import numpy as np
import torch

from tests.training.small import SPEC
from vlaflow.cli import train as command
from vlaflow.policies.base import Policy
from vlaflow.spec import Observation

SMALL = ("image_size=32", "margin=8", "cell=16", "width=32", "depth=1", "heads=2", "ffn=32")
SHORT = ("policy.exits=none", "validation_fraction=0.34", "max_excluded=1")


def test_a_policy_trained_on_the_centre_of_the_images_acts_on_it(dataset, tmp_path):
    """Frames are stored with their margin, as JPEGs; acting does not depend on the margin."""
    changes = [word for key in SMALL for word in ("--set", f"policy.backbone.{key}")]
    changes += [word for key in SHORT for word in ("--set", key)]
    recipe = ["asyncvla.mt50_small", "--dataset", str(dataset), "--out", str(tmp_path / "out")]
    assert command.main([*recipe, "--steps", "2", "--batch-size", "4", "--no-calibrate", *changes]) == 0
    policy = Policy.from_pretrained(tmp_path / "out")
    (view,) = policy.views
    assert policy.views == {view: 48}
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    framed = np.zeros_like(image)
    framed[8:40, 8:40] = image[8:40, 8:40]

    def actions(picture):
        state = np.zeros(policy.processor.state.dim, np.float32)
        generator = torch.Generator().manual_seed(0)
        return policy.act(Observation({view: picture}, state, "Push the puck to a goal"), generator=generator).actions

    assert actions(image).shape == (16, SPEC.dim)
    np.testing.assert_array_equal(actions(image), actions(framed))
    assert not np.array_equal(actions(image), actions(255 - image))
