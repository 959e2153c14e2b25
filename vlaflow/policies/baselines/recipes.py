"""What the four systems are compared with, on the same backbones. Only the decoder differs."""

from __future__ import annotations

from vlaflow.policies.baselines import policy
from vlaflow.policies.libero_small import small, small_training
from vlaflow.policies.recipe import DataSpec, TrainConfig
from vlaflow.policies.tiny import COEFFICIENTS, tiny_training


def fast_ar(data: DataSpec) -> TrainConfig:
    """FAST tokens one after the other (as π0-FAST), on a few Meta-World tasks, from scratch on a CPU.

    vlaflow train baselines.fast_ar --dataset runs/demo/dataset --out runs/baselines/ar
    """
    return tiny_training(policy.autoregressive(data), steps=3000)


def coefficients_ar(data: DataSpec) -> TrainConfig:
    """Cosine coefficients one after the other, otherwise as ``fast_ar``: the tokens of the decoders it is compared with.

    vlaflow train baselines.coefficients_ar --dataset runs/demo/dataset --out runs/baselines/coefficients

    Five Meta-World tasks, 2000 steps: 74 of 100 episodes, 62 with a tenth of the demonstrations (docs/log.md).
    """
    return tiny_training(policy.autoregressive(data, COEFFICIENTS), steps=3000)


def masked_diffusion(data: DataSpec) -> TrainConfig:
    """Cosine coefficients by masked discrete diffusion (as UD-VLA), otherwise as ``fast_ar``.

    vlaflow train baselines.masked_diffusion --dataset runs/demo/dataset --out runs/baselines/masked

    Five Meta-World tasks, 2000 steps: 37 of 100 episodes, 26 with a tenth of the demonstrations (docs/log.md).
    """
    return tiny_training(policy.masked(data), steps=3000)


def flow(data: DataSpec) -> TrainConfig:
    """Continuous flow matching, all tokens at one clock (as π0), otherwise as ``fast_ar``.

    vlaflow train baselines.flow --dataset runs/demo/dataset --out runs/baselines/flow

    Five Meta-World tasks, 2000 steps: 76 of 100 episodes, 63 with a tenth of the demonstrations (docs/log.md).
    """
    return tiny_training(policy.flow(data), steps=3000)


def oft_libero_small(data: DataSpec) -> TrainConfig:
    """One-pass L1 regression (as OpenVLA-OFT) on LIBERO from scratch on a CPU, with the networks of ``<system>.libero_small``.

    vlaflow train baselines.oft_libero_small --dataset runs/libero/object --out runs/libero/oft

    One query token per action, not per number, which would quadruple the decoder's cost.
    """
    return small_training(small(policy.regression(data), data))
