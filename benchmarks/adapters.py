"""What a training step holds in memory, and how long it takes: all weights, or adapters, in several number formats.

    python -m benchmarks.adapters
    python -m benchmarks.adapters --network qwen
    python -m benchmarks.adapters --source smollm2      # its real weights (docs/training.md)

A policy on SmolLM2-135M's language layers, eight by default, random unless a source is given; or on a random Qwen2.5-VL with
as many layers of 512 and a vision tower of four. Bytes are those of the tensors that there are after a step, without
activations. Times are taken in turns. Rows with bitsandbytes need that package.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Generator, nn

from benchmarks._timing import seconds_in_turns
from benchmarks.training import make_policy
from tests.backbones.smol import write_model
from tests.backbones.test_qwen2_5_vl import write_model as write_qwen
from vlaflow.backbones.pretrained import PretrainedConfig
from vlaflow.backbones.qwen2_5_vl import PATCH, QwenConfig
from vlaflow.backbones.smol import smollm2_135m
from vlaflow.data.batch import Batch, ObservationBatch
from vlaflow.nn.precision import autocast
from vlaflow.policies.adapters import LoraConfig, adapt
from vlaflow.policies.asyncvla.policy import smol
from vlaflow.policies.base import Policy, PolicyConfig
from vlaflow.policies.recipe import DataSpec, OptimConfig
from vlaflow.training.moments import MASTER, Masters, Moments
from vlaflow.training.optim import build_optimizer

CPU = torch.device("cpu")
VIEWS, SIDE = ("corner2",), 112


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        network: "smol" or "qwen".
        source: of smol's language model; None writes a random one with SmolLM2-135M's layers and a vocabulary of 320.
        layers: of it, an even number.
        rank: of the adapters.
        batch_size: observations per step.
        rounds: rounds of one step each.
        bf16: autocast.
    """

    network: Literal["smol", "qwen"] = "smol"
    source: str | None = None
    layers: int = 8
    rank: int = 16
    batch_size: int = 4
    rounds: int = 3
    bf16: bool = False


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        words: for the table.
        dtype: of the pretrained weights.
        adapters: in place of them.
        quantise: hold them in four bits.
        kind: of the optimiser.
    """

    words: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    adapters: bool = False
    quantise: Literal["nf4"] | None = None
    kind: Literal["adamw", "adamw8bit"] = "adamw"


ARMS = (
    Arm("all weights, float32"),
    Arm("all weights, bfloat16 with float32 masters", "bfloat16"),
    Arm("adapters, float32", adapters=True),
    Arm("adapters on bfloat16", "bfloat16", adapters=True),
)
BITS = (
    Arm("all weights, bfloat16 with masters, 8-bit moments", "bfloat16", kind="adamw8bit"),
    Arm("adapters on four bits, 8-bit moments", "bfloat16", adapters=True, quantise="nf4", kind="adamw8bit"),
)


def smol_policy(layers: int, source: str) -> PolicyConfig:
    """On the first layers of SmolLM2-135M."""
    return smol(DataSpec(4, 4, VIEWS), layers=layers, source=source)


def qwen_policy(layers: int, source: str) -> PolicyConfig:
    """On a small Qwen2.5-VL, with the same decoder and exits."""
    return replace(smol_policy(layers, source), backbone=QwenConfig(4, VIEWS, source, max_pixels=64 * PATCH))


NETWORKS: dict[str, Callable[[int, str], PolicyConfig]] = {"smol": smol_policy, "qwen": qwen_policy}


def written(options: Options, folder: Path) -> str:
    """A random network's folder."""
    if options.network == "smol":
        return str(write_model(folder, **smollm2_135m() | {"vocab_size": 320, "num_hidden_layers": options.layers}))
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    text = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "rope_parameters": rope}
    vision = {"depth": 4, "hidden_size": 256, "intermediate_size": 768, "num_heads": 4, "out_hidden_size": 512}
    return str(
        write_qwen(folder, True, {**text, "num_hidden_layers": options.layers}, {**vision, "fullatt_block_indexes": [1, 3]})
    )


def batch_of(policy: Policy, size: int) -> Batch:
    """Random samples."""
    rng = np.random.default_rng(1)
    images = {
        view: rng.integers(0, 256, (size, side or SIDE, side or SIDE, 3), np.uint8) for view, side in policy.views.items()
    }
    observation = ObservationBatch({v: torch.from_numpy(i) for v, i in images.items()}, torch.zeros(size, 4), ["open"] * size)
    action_BLD = torch.from_numpy(rng.normal(size=(size, policy.chunk_size, 4)).astype(np.float32))
    index_B = torch.arange(size)
    return Batch(observation, action_BLD, torch.ones(size, policy.chunk_size, dtype=torch.bool), index_B, index_B)


class Training:
    """A policy and its optimiser.

    Args:
        arm: how it trains.
        options: sizes.
        source: of the language model.
    """

    def __init__(self, arm: Arm, options: Options, source: str) -> None:
        config = NETWORKS[options.network](options.layers, source)
        assert isinstance(config.backbone, PretrainedConfig)
        self.policy = make_policy(replace(config, backbone=replace(config.backbone, dtype=arm.dtype)))
        self.batch, model = batch_of(self.policy, options.batch_size), self.policy.model
        if arm.adapters:
            adapt(model, LoraConfig(options.rank, quantise=arm.quantise), 0)
        self.masters, self.bf16 = Masters(model), options.bf16
        self.optimizer = build_optimizer(model, OptimConfig(kind=arm.kind), self.masters)
        self.generator = Generator().manual_seed(0)
        model.train()

    def step(self) -> None:
        """What the trainer does in a step."""
        model = self.policy.model
        model.zero_grad(set_to_none=True)
        with autocast(self.bf16, CPU):
            loss = self.policy.loss(self.policy.prepare(self.batch), self.generator, self.generator).total
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()

    def megabytes(self) -> dict[str, float]:
        """By kind; a 4-bit matrix with its scales."""
        model, moments = self.policy.model, Moments(self.optimizer, self.masters.of)
        parameters = list(model.parameters())
        scales = [p.quant_state.absmax for p in parameters if hasattr(p, "quant_state")]
        remembered = [moments.of(p) for p in parameters if p.requires_grad]
        found = {
            "weights": [*parameters, *scales],
            "masters": [own[MASTER] for own in remembered if MASTER in own],
            "gradients": [p.grad for p in parameters if p.grad is not None],
            "moments": [tensor for own in remembered for key, tensor in own.items() if key != MASTER],
        }
        return {kind: sum(t.numel() * t.element_size() for t in tensors) / 1e6 for kind, tensors in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = tyro.cli(Options, description=__doc__, args=argv)
    arms = ARMS + (BITS if importlib.util.find_spec("bitsandbytes") else ())
    with tempfile.TemporaryDirectory() as temporary:
        source = options.source or written(options, Path(temporary))
        trainings = {arm.words: Training(arm, options, source) for arm in arms}
    steps: dict[str, Callable[[], object]] = {words: training.step for words, training in trainings.items()}
    taken = seconds_in_turns(steps, options.rounds)
    first = np.array(taken[arms[0].words])
    print("| | train, million | weights, MB | masters | gradients | moments | together | time of a step, ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for words, training in trainings.items():
        count = sum(p.numel() for p in training.policy.model.parameters() if p.requires_grad) / 1e6
        found = training.megabytes()
        cells = [f"{count:.1f}", *(f"{value:.0f}" for value in found.values()), f"{sum(found.values()):.0f}"]
        print(f"| {words} | {' | '.join(cells)} | {np.median(np.array(taken[words]) / first):.2f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
