"""iFlyBot-VLA's training stages. Each recipe is a function of the data set's shape and returns one frozen config."""

from __future__ import annotations

from dataclasses import replace

from vlaflow.policies.base import PolicyConfig
from vlaflow.policies.iflybot.policy import full_latent, qwen3b, small, tiny, tiny_latent
from vlaflow.policies.objectives import LatentObjective, PolicyObjective
from vlaflow.policies.recipe import DataSpec, OptimConfig, ParameterGroup, Pipeline, TrainConfig
from vlaflow.policies.small_networks import OPTIM as SMALL_OPTIM
from vlaflow.policies.small_networks import small_training
from vlaflow.policies.tiny import OPTIM, tiny_training

LATENT_OPTIM = OptimConfig(learning_rate=1e-3, warmup_steps=100)


def demo() -> Pipeline:
    """iFlyBot-VLA on a few Meta-World tasks, its three stages one after the other, from scratch on a CPU.

    vlaflow train iflybot.demo --dataset runs/demo/dataset --out runs/iflybot

    With 2500 joint steps of AdamW at 1e-3 (two cores, AMD EPYC, AVX2, float32, 20 minutes in all), drawer-open,
    button-press-topdown, window-close from 50 demonstrations each: 117 of 120 episodes (seeds 1000 to 1039, 8 of 16 actions
    executed, five solver steps), where ``asyncvla.demo`` has 119 after as many training samples.
    """
    return Pipeline((latent, joint, fine))


def latent(data: DataSpec) -> TrainConfig:
    """iFlyBot-VLA's latent action model from a few Meta-World tasks' video, from scratch on a CPU.

    vlaflow train iflybot.latent --dataset runs/demo/dataset --out runs/iflybot/latent

    0.9 M parameters; on five Meta-World tasks, 50 demonstrations each, all 32 entries are used (perplexity 28.6), and on
    held-out episodes the codes reconstruct 76 % of the change in pixels and explain 0.83 of the mean action's variance
    (docs/log.md).
    Pairs are 0.2 s apart, the span of the demo's chunks of 16: at 80 frames per second whole episodes last about a second.
    """
    return TrainConfig(
        LatentObjective(tiny_latent(), data.views[0], gap_s=0.2),
        optim=LATENT_OPTIM,
        steps=1200,
        global_batch_size=32,
        ema_decay=0.99,
        validate_every=200,
        checkpoint_every=400,
    )


def joint(data: DataSpec) -> TrainConfig:
    """Second stage: the backbone learns codes and FAST tokens, an expert learns the actions; truncated gradients.

    vlaflow train iflybot.joint --dataset runs/demo/dataset --latent runs/iflybot/latent --out runs/iflybot/joint
    """
    return tiny_training(tiny(data), steps=700, optim=replace(OPTIM, final_fraction=0.3))


def fine(policy: PolicyConfig) -> TrainConfig:
    """Third stage: the flow's gradient reaches the backbone, and each observation is learned with five noise samples.

    vlaflow train iflybot.fine --policy runs/iflybot/joint --dataset runs/demo/dataset --latent runs/iflybot/latent --out DIR
    """
    optim = OptimConfig(learning_rate=3e-4, warmup_steps=50)
    return replace(tiny_training(_untruncated(policy), steps=500, optim=optim), validate_every=125, checkpoint_every=250)


def libero_small() -> Pipeline:
    """iFlyBot-VLA on LIBERO, its three stages one after the other, from scratch on a CPU.

    vlaflow train iflybot.libero_small --dataset runs/libero/object --out runs/libero/iflybot
    """
    return Pipeline((small_latent, small_joint, small_fine))


def small_latent(data: DataSpec) -> TrainConfig:
    """The latent action model of ``libero_small``; its pairs are 0.8 s apart, the span of 16 actions.

    vlaflow train iflybot.small_latent --dataset runs/libero/object --out runs/libero/latent
    """
    return replace(
        latent(data), objective=LatentObjective(tiny_latent(), data.views[0], gap_s=0.8), steps=2000, interventions=None
    )


def small_joint(data: DataSpec) -> TrainConfig:
    """Second stage of ``libero_small``.

    vlaflow train iflybot.small_joint --dataset runs/libero/object --latent runs/libero/latent --out runs/libero/joint
    """
    return small_training(small(data), steps=3000, optim=replace(SMALL_OPTIM, final_fraction=0.3))


def small_fine(policy: PolicyConfig) -> TrainConfig:
    """Third stage of ``libero_small``.

    vlaflow train iflybot.small_fine --policy runs/libero/joint --dataset DIR --latent runs/libero/latent --out DIR
    """
    optim = replace(SMALL_OPTIM, learning_rate=6e-4)
    return small_training(_untruncated(policy), steps=1000, optim=optim)


def latent_full(data: DataSpec) -> TrainConfig:
    """The latent action model at the published size; any number of GPUs. No run has been made with it yet.

    accelerate launch -m vlaflow train iflybot.latent_full --dataset DIR --out DIR

    0.33 B parameters, 0.33 B trained; before activations 6 GiB per GPU.

    Sizes and the gap of one second as in iFlyBot-VLA's code; it states neither steps nor rates, so these are LAPA's: 100 000
    steps of 64, 1e-4.
    """
    return TrainConfig(
        LatentObjective(full_latent(), data.views[0], gap_s=1.0),
        optim=OptimConfig(learning_rate=1e-4, betas=(0.9, 0.99), weight_decay=0.0, warmup_steps=500, schedule="constant"),
        steps=100_000,
        global_batch_size=64,
        ema_decay=None,
        validate_every=2000,
        checkpoint_every=5000,
        precision="bf16",
    )


def joint3b(data: DataSpec) -> TrainConfig:
    """Second stage at the published size; GPUs of 80 GB, with --shard. No run has been made with it yet.

    accelerate launch -m vlaflow train iflybot.joint3b --dataset DIR --latent DIR --out DIR --shard

    4.00 B parameters, 4.00 B trained; before activations 75 GiB per GPU as copies, 11 GiB with --shard on eight.

    Constant 2e-6 for the language model with four observations per GPU (32 on eight) and no decay, as in the published code's
    defaults; ten times that for what begins at random, as in its second preset. The number of steps is not stated. No episode
    is held out.
    """
    return TrainConfig(
        PolicyObjective(qwen3b(data)),
        optim=OptimConfig(
            learning_rate=2e-5,
            weight_decay=0.0,
            warmup_steps=500,
            schedule="constant",
            groups=(ParameterGroup("backbone.network.", learning_rate=2e-6),),
        ),
        steps=200_000,
        global_batch_size=32,
        accumulate=8,
        ema_decay=None,
        validation_fraction=0.0,
        validate_every=5000,
        checkpoint_every=5000,
        precision="bf16",
    )


def fine3b(policy: PolicyConfig) -> TrainConfig:
    """Third stage at the published size; GPUs of 80 GB, with --shard. No run has been made with it yet.

    accelerate launch -m vlaflow train iflybot.fine3b --policy DIR --dataset DIR --latent DIR --out DIR --shard

    4.00 B parameters, 4.00 B trained; before activations 75 GiB per GPU as copies, 11 GiB with --shard on eight.
    """
    return TrainConfig(
        PolicyObjective(_untruncated(policy)),
        optim=OptimConfig(learning_rate=2e-6, weight_decay=0.0, warmup_steps=500, schedule="constant"),
        steps=50_000,
        global_batch_size=32,
        accumulate=8,
        ema_decay=None,
        validation_fraction=0.0,
        validate_every=5000,
        checkpoint_every=5000,
        precision="bf16",
    )


def libero(data: DataSpec) -> TrainConfig:
    """Second stage on LIBERO: chunks of seven, all executed. No run has been made with it yet.

    accelerate launch -m vlaflow train iflybot.libero --dataset DIR --latent DIR --out DIR --shard

    4.00 B parameters, 4.00 B trained; before activations 75 GiB per GPU as copies, 11 GiB with --shard on eight.
    """
    return replace(joint3b(data), objective=PolicyObjective(qwen3b(data, chunk_size=7, n_action_steps=7)))


def _untruncated(policy: PolicyConfig) -> PolicyConfig:
    return replace(policy, decoder=policy.decoder.untruncated(noise_samples=5))
