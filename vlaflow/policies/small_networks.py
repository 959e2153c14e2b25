"""The small networks for LIBERO and Meta-World MT50, and their training: systems differ in decoder and exits, not in these.

One policy learns a suite, or all its tasks from one data set, from scratch on a CPU. Recipes: ``<system>.libero_small`` and
``<system>.mt50_small``.
"""

from __future__ import annotations

from dataclasses import replace

from vlaflow.backbones.tiny import TinyConfig
from vlaflow.data.quality import InterventionRule
from vlaflow.policies.base import PolicyConfig
from vlaflow.policies.recipe import DataSpec, OptimConfig, TrainConfig
from vlaflow.policies.tiny import tiny_training

HEADS, HEAD_DIM = 6, 32
DEPTH = 4
EXITS = (2, 3, 4)
MISJUDGED = InterventionRule(threshold=0.4, steps=9, least=0.4)
"""LIBERO's experts hardly rotate the hand: without a least difference, noise would count as an intervention in 40 % of the
frames."""
OPTIM = OptimConfig("muon", learning_rate=2e-3, warmup_steps=100)


def small_backbone(data: DataSpec, *, image_size: int = 128, margin: int = 0, suffix: int = 64) -> TinyConfig:
    """Four layers of width 192 over a token per 32 × 32 pixels: 16 per view of LIBERO.

    Six layers of width 256 take twice as long per sample.

    Args:
        data: one to eight views; LIBERO has two, Meta-World one.
        image_size, margin: of every view.
        suffix: most tokens that the decoder adds.
    """
    width = HEADS * HEAD_DIM
    return TinyConfig(
        data.state_dim,
        data.views,
        image_size=image_size,
        margin=margin,
        cell=32,
        width=width,
        depth=DEPTH,
        heads=HEADS,
        ffn=4 * width,
        suffix=suffix,
    )


def small(policy: PolicyConfig, data: DataSpec, *, image_size: int = 128, margin: int = 0, suffix: int = 64) -> PolicyConfig:
    """A demo's policy on the small backbone: chunks of 16, 8 executed.

    Actions reach from −1 to 1 between their 1st and 99th percentile: most rotations of LIBERO are close to zero in most frames,
    and a unit deviation would make their noise as important as the movement.
    """
    backbone = small_backbone(data, image_size=image_size, margin=margin, suffix=suffix)
    return replace(policy, backbone=backbone, action_normalisation="quantile", n_action_steps=8)


def small_training(policy: PolicyConfig, *, steps: int = 4000, optim: OptimConfig = OPTIM) -> TrainConfig:
    """As a demo's, with images shifted by at most one pixel and a longer average.

    A pixel is 6 mm on LIBERO's table, and objects are placed within a few centimetres: with shifts of up to 6 pixels, a policy
    for LIBERO-Goal did not look at the first view (docs/log.md). Experts that misjudge count as interventions
    (`MISJUDGED`), noise does not.
    """
    return replace(
        tiny_training(policy, steps=steps, optim=optim),
        ema_decay=0.999,
        shift=1,
        interventions=MISJUDGED,
        validation_fraction=0.04,
        validate_every=1000,
    )


def mt50(policy: PolicyConfig, data: DataSpec) -> PolicyConfig:
    """A demo's policy for all of Meta-World: 25 tokens of the central 160 pixels of images of 192, which show every goal."""
    return small(policy, data, image_size=160, margin=16)


def mt50_training(policy: PolicyConfig) -> TrainConfig:
    """As ``small_training``; frames are kept as JPEGs, because raw ones of all fifty tasks take about 30 GB.

    Meta-World's experts do not misjudge in ``make mt50``, and lasting noise alone would count in some frames. The largest shift
    is that of the policy in docs/mt50.md; a smaller one has not been tried.
    """
    return replace(small_training(policy, steps=12_000), frames="jpeg", interventions=None, shift=6)
