"""What the four systems are compared with, on the demo's backbone. Only the decoder differs."""

from __future__ import annotations

from vlaflow.policies.baselines import policy
from vlaflow.policies.recipe import DataSpec, TrainConfig
from vlaflow.policies.tiny_tokens import tiny_training


def fast_ar(data: DataSpec) -> TrainConfig:
    """FAST tokens one after the other (as π0-FAST), on a few Meta-World tasks, from scratch on a CPU.

    vlaflow train baselines.fast_ar --dataset runs/demo/dataset --out runs/baselines/ar
    """
    return tiny_training(policy.autoregressive(data))


def masked_diffusion(data: DataSpec) -> TrainConfig:
    """FAST tokens by masked discrete diffusion (as UD-VLA), otherwise as ``fast_ar``.

    vlaflow train baselines.masked_diffusion --dataset runs/demo/dataset --out runs/baselines/masked
    """
    return tiny_training(policy.masked(data))


def flow(data: DataSpec) -> TrainConfig:
    """Continuous flow matching, all tokens at one clock (as π0), otherwise as ``fast_ar``.

    vlaflow train baselines.flow --dataset runs/demo/dataset --out runs/baselines/flow
    """
    return tiny_training(policy.flow(data))
