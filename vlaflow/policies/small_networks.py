"""The small networks for LIBERO and Meta-World MT50, and their training: systems differ in decoder and exits, not in these.

One policy learns a suite, or all its tasks from one data set, from scratch on a CPU. Recipes: ``<system>.libero_small`` and
``<system>.mt50_small``.
"""

from __future__ import annotations

from dataclasses import replace

from vlaflow.backbones.tiny import TinyConfig
from vlaflow.policies.base import PolicyConfig
from vlaflow.policies.recipe import DataSpec, OptimConfig, TrainConfig
from vlaflow.policies.tiny import tiny_training

DEPTH = 6
HEADS, HEAD_DIM = 8, 32
EXITS = (2, 4, 6)
OPTIM = OptimConfig(learning_rate=6e-4, warmup_steps=500, weight_decay=0.05)


def small_backbone(data: DataSpec, *, suffix: int = 64) -> TinyConfig:
    """Six layers of width 256 over 16 tokens per view of 128 pixels.

    Args:
        data: one to eight views; LIBERO has two, Meta-World one.
        suffix: most tokens that the decoder adds.
    """
    width = HEADS * HEAD_DIM
    return TinyConfig(
        data.state_dim,
        data.views,
        image_size=128,
        cell=32,
        width=width,
        depth=DEPTH,
        heads=HEADS,
        ffn=4 * width,
        suffix=suffix,
    )


def small(policy: PolicyConfig, data: DataSpec, *, suffix: int = 64) -> PolicyConfig:
    """A demo's policy on the small backbone: chunks of 16, 8 executed.

    Actions reach from −1 to 1 between their 1st and 99th percentile: most rotations of LIBERO are close to zero in most frames,
    and a unit deviation would make their noise as important as the movement.
    """
    backbone = small_backbone(data, suffix=suffix)
    return replace(policy, backbone=backbone, action_normalisation="quantile", n_action_steps=8)


def small_training(policy: PolicyConfig, *, steps: int = 25_000, optim: OptimConfig = OPTIM) -> TrainConfig:
    """Batches of 64, images shifted by up to 6 pixels, averaged weights, pauses left out.

    Executed actions are not compared with the labels, which are the experts' answers to whatever the noise led to: LIBERO's
    experts hardly rotate the hand, so in relation to the range of these labels the recorder's noise would count as an
    intervention in 40 % of the frames.
    """
    return replace(
        tiny_training(policy, steps=steps, optim=optim),
        global_batch_size=64,
        ema_decay=0.999,
        shift=6,
        interventions=None,
        validation_fraction=0.04,
        validate_every=1000,
    )


def mt50(policy: PolicyConfig, data: DataSpec) -> PolicyConfig:
    """A demo's policy for all of Meta-World: four layers of width 192, trained twice as fast as six of 256.

    It reads 25 tokens of the central 160 pixels of images of 192, which show every goal (docs/mt50.md).
    """
    backbone = replace(small_backbone(data), image_size=160, margin=16, width=192, depth=4, heads=6, ffn=768)
    return replace(small(policy, data), backbone=backbone)


def mt50_training(policy: PolicyConfig) -> TrainConfig:
    """As ``small_training``; frames are kept as JPEGs, because raw ones of all fifty tasks take about 30 GB."""
    optim = replace(OPTIM, learning_rate=1e-3)
    return replace(small_training(policy, steps=12_000, optim=optim), frames="jpeg")
