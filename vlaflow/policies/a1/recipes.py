"""A1's training stages. Each recipe is a function of the data set's shape and returns one frozen config."""

from __future__ import annotations

from dataclasses import replace

from vlaflow.data.augment import Augment, StateMask
from vlaflow.data.filters import Filters
from vlaflow.data.weights import named_mixture
from vlaflow.policies.a1.policy import molmo_flow, molmo_regression, small_flow, tiny_flow, tiny_regression
from vlaflow.policies.objectives import PolicyObjective
from vlaflow.policies.recipe import DataSpec, OptimConfig, ParameterGroup, TrainConfig
from vlaflow.policies.small_networks import small_training
from vlaflow.policies.tiny import tiny_training


def demo(data: DataSpec) -> TrainConfig:
    """A1 with flow matching on a few Meta-World tasks, from scratch on a CPU; answers at every depth.

    vlaflow train a1.demo --dataset runs/demo/dataset --out runs/a1/policy

    2.2 M parameters. With 3000 steps of AdamW at 1e-3 (two cores, AMD EPYC, AVX2, float32, 9 minutes), five Meta-World tasks,
    two of them hard, from 50 demonstrations each: 151 of 200 episodes (seeds 1000 to 1039, 8 of 16 actions executed, dense),
    without exits 168. Muon reaches the held-out loss of AdamW in a third of the steps (docs/log.md).
    """
    return tiny_training(tiny_flow(data), steps=1000)


def demo_mlp(data: DataSpec) -> TrainConfig:
    """A1 with L1 regression on a few Meta-World tasks, from scratch on a CPU; answers at every depth.

    vlaflow train a1.demo_mlp --dataset runs/demo/dataset --out runs/a1/mlp

    1.4 M parameters. With 3000 steps of AdamW at 1e-3 (one core of the same machine, 10 minutes), the same tasks and seeds:
    166 of 200 episodes.
    """
    return tiny_training(tiny_regression(data), steps=1000)


def libero_small(data: DataSpec) -> TrainConfig:
    """A1 with flow matching on LIBERO from scratch on a CPU; answers at depths 2, 3 and 4.

    vlaflow train a1.libero_small --dataset runs/libero/object --out runs/libero/a1
    """
    return small_training(small_flow(data))


def libero(data: DataSpec) -> TrainConfig:
    """A1 with flow matching fine-tuned on LIBERO, with the published numbers; four GPUs of 80 GB or more, with --shard.

    accelerate launch -m vlaflow train a1.libero --dataset DIR --out DIR --shard

    9.05 B parameters, 8.58 B trained; before activations 161 GiB per GPU as copies, 28 GiB with --shard on eight.

    Batch 128, 50 000 steps, the language model at 5e-6 after 1000 frozen steps of a warm-up of 2000, the action networks at
    5e-5, the vision tower and its connector frozen, cosine to a tenth, erased and sharpened images, no state masking; one
    random exit per step; 1st and 99th percentile to −1 and 1; no episode is held out. No run has been made with it yet.
    """
    return TrainConfig(
        PolicyObjective(molmo_flow(data)),
        optim=OptimConfig(
            learning_rate=5e-5,
            betas=(0.9, 0.95),
            eps=1e-6,
            weight_decay=0.0,
            warmup_steps=2000,
            final_fraction=0.1,
            clip_norm=1.0,
            groups=(
                ParameterGroup("backbone.network.vision_tower.", frozen=True),
                ParameterGroup("backbone.network.multi_modal_projector.", frozen=True),
                ParameterGroup("backbone.network.language_model.", learning_rate=5e-6, frozen_steps=1000),
            ),
        ),
        steps=50_000,
        global_batch_size=128,
        accumulate=8,
        ema_decay=None,
        augment=Augment(),
        validation_fraction=0.0,
        validate_every=2000,
        checkpoint_every=5000,
        precision="bf16",
    )


def libero_mlp(data: DataSpec) -> TrainConfig:
    """A1 with L1 regression fine-tuned on LIBERO; otherwise as ``libero``. No run has been made with it yet.

    accelerate launch -m vlaflow train a1.libero_mlp --dataset DIR --out DIR --shard

    8.81 B parameters, 8.34 B trained; before activations 157 GiB per GPU as copies, 29 GiB with --shard on eight.
    """
    return replace(libero(data), objective=PolicyObjective(molmo_regression(data)))


def vlabench(data: DataSpec) -> TrainConfig:
    """A1 with flow matching fine-tuned on VLABench: chunks of 50, batch 64. No run has been made with it yet.

    accelerate launch -m vlaflow train a1.vlabench --dataset DIR --out DIR --shard

    9.05 B parameters, 8.58 B trained; before activations 161 GiB per GPU as copies, 28 GiB with --shard on eight.
    """
    policy = molmo_flow(data, chunk_size=50, n_action_steps=5)
    return replace(libero(data), objective=PolicyObjective(policy), global_batch_size=64)


def pretrain(data: DataSpec) -> TrainConfig:
    """A1's pretraining: batch 1024, 200 000 steps, half of the states masked. No run has been made with it yet.

    accelerate launch -m vlaflow train a1.pretrain --dataset droid=DIR --dataset agibot=DIR --out DIR --shard

    Every data set counts the same, and within one every robot does; nothing is normalised, as in the paper. Static
    frames, slow segments, idle prefixes and outliers are left out by our rules.

    9.05 B parameters, 8.58 B trained; before activations 161 GiB per GPU as copies, 28 GiB with --shard on eight.
    """
    policy = replace(
        molmo_flow(data, chunk_size=50), state_normalisation="identity", action_normalisation="identity", kept_actions=()
    )
    return replace(
        libero(data),
        objective=PolicyObjective(policy),
        global_batch_size=1024,
        accumulate=16,
        steps=200_000,
        mixture=named_mixture("robots"),
        filters=Filters(),
        state_mask=StateMask(0.5),
        augment=Augment(),
    )
