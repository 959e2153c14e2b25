"""iFlyBot-VLA's training stages. Each recipe is a function of the data set's shape and returns one frozen config."""

from __future__ import annotations

from vlaflow.policies.iflybot.policy import full_latent, tiny_latent
from vlaflow.policies.recipe import LatentTraining, OptimConfig, TrainConfig, VideoSpec


def latent(data: VideoSpec) -> TrainConfig:
    """iFlyBot-VLA's latent action model from a few Meta-World tasks' video, from scratch on a CPU.

    vlaflow train iflybot.latent --dataset runs/demo/dataset --out runs/iflybot/latent

    0.9 M parameters; on five Meta-World tasks, 50 demonstrations each, all 32 entries are used (perplexity 28.6), and on
    held-out episodes the codes bring back 76 % of the change in pixels and tell 0.83 of the mean action's variance (log).
    Pairs are 0.2 s apart, the span of the demo's chunks of 16: at 80 frames per second whole episodes last about a second.
    """
    return TrainConfig(
        policy=None,
        latent=LatentTraining(tiny_latent(), data.views[0], gap_s=0.2),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=100),
        steps=1200,
        batch_size=32,
        ema_decay=0.99,
        validate_every=200,
        checkpoint_every=400,
    )


def latent_full(data: VideoSpec) -> TrainConfig:
    """The latent action model at the published size; several GPUs. No run has been made with it yet.

    accelerate launch -m vlaflow train iflybot.latent_full --dataset DIR --out DIR

    Sizes and the gap of one second as in iFlyBot-VLA's code; it states neither steps nor rates, so these are LAPA's: 100 000
    steps of 64 in all (divide ``batch_size`` by the number of GPUs), 1e-4.
    """
    return TrainConfig(
        policy=None,
        latent=LatentTraining(full_latent(), data.views[0], gap_s=1.0),
        optim=OptimConfig(learning_rate=1e-4, betas=(0.9, 0.99), weight_decay=0.0, warmup_steps=500, schedule="constant"),
        steps=100_000,
        batch_size=64,
        ema_decay=None,
        validate_every=2000,
        checkpoint_every=5000,
        precision="bf16",
    )
