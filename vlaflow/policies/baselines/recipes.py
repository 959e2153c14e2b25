"""What the four systems are compared with, on the same backbones. Only the decoder differs."""

from __future__ import annotations

from dataclasses import replace

from vlaflow.policies.adapters import LoraConfig
from vlaflow.policies.asyncvla import recipes as asyncvla
from vlaflow.policies.baselines import policy
from vlaflow.policies.dfm_vla import recipes as dfm_vla
from vlaflow.policies.objectives import PolicyObjective
from vlaflow.policies.recipe import DataSpec, OptimConfig, TrainConfig
from vlaflow.policies.small_networks import mt50, mt50_training, small, small_training
from vlaflow.policies.tiny import COEFFICIENTS, tiny_training


def fast_ar(data: DataSpec) -> TrainConfig:
    """FAST tokens one after the other (as π0-FAST), on a few Meta-World tasks, from scratch on a CPU.

    vlaflow train baselines.fast_ar --dataset runs/demo/dataset --out runs/baselines/ar
    """
    return tiny_training(policy.autoregressive(data), steps=900)


def coefficients_ar(data: DataSpec) -> TrainConfig:
    """Cosine coefficients one after the other, otherwise as ``fast_ar``: the tokens of the decoders it is compared with.

    vlaflow train baselines.coefficients_ar --dataset runs/demo/dataset --out runs/baselines/coefficients

    Five Meta-World tasks, 2000 steps of AdamW at 1e-3: 74 of 100 episodes, 62 with a tenth of the demonstrations (docs/log.md).
    """
    return tiny_training(policy.autoregressive(data, COEFFICIENTS), steps=900)


def masked_diffusion(data: DataSpec) -> TrainConfig:
    """Cosine coefficients by masked discrete diffusion (as UD-VLA), otherwise as ``fast_ar``.

    vlaflow train baselines.masked_diffusion --dataset runs/demo/dataset --out runs/baselines/masked

    Five Meta-World tasks, 2000 steps of AdamW at 1e-3: 37 of 100 episodes, 26 with a tenth of the demonstrations (docs/log.md).
    """
    return tiny_training(policy.masked(data), steps=900)


def flow(data: DataSpec) -> TrainConfig:
    """Continuous flow matching, all tokens at one clock (as π0), otherwise as ``fast_ar``.

    vlaflow train baselines.flow --dataset runs/demo/dataset --out runs/baselines/flow

    Five Meta-World tasks, 2000 steps of AdamW at 1e-3: 76 of 100 episodes, 63 with a tenth of the demonstrations (docs/log.md).
    """
    return tiny_training(policy.flow(data), steps=900)


def oft(data: DataSpec) -> TrainConfig:
    """One-pass L1 regression (as OpenVLA-OFT), one query token per action, otherwise as ``fast_ar``.

    vlaflow train baselines.oft --dataset runs/demo/dataset --out runs/baselines/oft
    """
    return tiny_training(policy.regression(data), steps=900)


def oft_smol(data: DataSpec) -> TrainConfig:
    """The same on the first layers of SmolLM2-135M, otherwise as ``asyncvla.smol``.

    vlaflow train baselines.oft_smol --dataset runs/demo/dataset --out runs/baselines/oft-smol
    """
    return replace(asyncvla.smol(data), objective=PolicyObjective(policy.smol_regression(data)))


def oft3b(data: DataSpec) -> TrainConfig:
    """One-pass L1 regression on Qwen2.5-VL-3B with OpenVLA-OFT's numbers; eight GPUs. No run has been made with it yet.

    accelerate launch -m vlaflow train baselines.oft3b --dataset DIR --out DIR

    3.85 B parameters, 0.10 B trained; before activations 16 GiB per GPU as copies, 4 GiB with --shard on eight.

    Adapters of rank 32, batch 64, 5e-4, 150 000 steps, no episode held out. OpenVLA-OFT divides the rate by ten after 100 000
    steps, where this follows a cosine to a tenth; its vision-language model is OpenVLA-7B, its images are cropped.
    """
    return TrainConfig(
        PolicyObjective(policy.qwen_regression(data)),
        optim=OptimConfig(learning_rate=5e-4, betas=(0.9, 0.999), weight_decay=0.0, warmup_steps=0, final_fraction=0.1),
        lora=LoraConfig(rank=32, alpha=16.0),
        steps=150_000,
        global_batch_size=64,
        accumulate=8,
        ema_decay=None,
        validation_fraction=0.0,
        checkpoint_every=5000,
        precision="bf16",
    )


def fast_ar_emu3(data: DataSpec) -> TrainConfig:
    """UniVLA's decoder at its size: batch 192, 8000 steps; otherwise as ``dfm_vla.libero``. No run has been made with it yet.

    accelerate launch -m vlaflow train baselines.fast_ar_emu3 --dataset DIR --out DIR --shard

    8.61 B parameters, 8.50 B trained; before activations 159 GiB per GPU as copies, 30 GiB with --shard on eight.
    """
    objective = PolicyObjective(policy.emu3_autoregressive(data))
    return replace(dfm_vla.libero(data), objective=objective, steps=8000, global_batch_size=192)


def masked_emu3(data: DataSpec) -> TrainConfig:
    """UD-VLA's decoder, for actions alone, at its size: batch 64, 48 000 steps; otherwise as ``dfm_vla.libero``. No run yet.

    accelerate launch -m vlaflow train baselines.masked_emu3 --dataset DIR --out DIR --shard

    8.61 B parameters, 8.50 B trained; before activations 159 GiB per GPU as copies, 30 GiB with --shard on eight.
    """
    objective = PolicyObjective(policy.emu3_masked(data))
    return replace(dfm_vla.libero(data), objective=objective, steps=48_000, global_batch_size=64, accumulate=8)


def oft_libero_small(data: DataSpec) -> TrainConfig:
    """One-pass L1 regression (as OpenVLA-OFT) on LIBERO from scratch on a CPU, with the networks of ``<system>.libero_small``.

    vlaflow train baselines.oft_libero_small --dataset runs/libero/object --out runs/libero/oft

    One query token per action, not per number, which would quadruple the decoder's cost. One core (AMD EPYC, bf16), 39 minutes;
    LIBERO-Object from 50 demonstrations per task: 96 of 100 episodes (docs/libero-policies.md).
    """
    return small_training(small(policy.regression(data), data))


def oft_mt50_small(data: DataSpec) -> TrainConfig:
    """The same on the fifty tasks of Meta-World, with the networks of ``<system>.mt50_small``.

    vlaflow train baselines.oft_mt50_small --dataset runs/mt50/dataset --out runs/mt50/oft
    """
    return mt50_training(mt50(policy.regression(data), data))


def flow_mt50_small(data: DataSpec) -> TrainConfig:
    """Continuous flow matching, all tokens at one clock (as π0), otherwise as ``oft_mt50_small``.

    vlaflow train baselines.flow_mt50_small --dataset runs/mt50/dataset --out runs/mt50/flow
    """
    return mt50_training(mt50(policy.flow(data), data))
