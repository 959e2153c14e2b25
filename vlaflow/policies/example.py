"""An observation of the right shape for a policy, for timing it and for making its slow first chunks."""

from __future__ import annotations

import numpy as np

from vlaflow.policies.base import Policy
from vlaflow.spec import Observation


def example(policy: Policy) -> Observation:
    """Random pixels at the size the policy reads, its mean state and a short sentence."""
    random = np.random.default_rng(0)
    sides = {view: size or 224 for view, size in policy.views.items()}
    images = {view: random.integers(0, 256, (side, side, 3), dtype=np.uint8) for view, side in sides.items()}
    return Observation(images, np.array(policy.stats["state"].mean, np.float32), "Open a drawer")
