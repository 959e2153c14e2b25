"""How long does a sharded run take to end after SIGTERM, and what of that is writing its training state?

    python -m benchmarks.ending
    python -m benchmarks.ending --layers 16 --width 1024

Two processes on a CPU (gloo) train a random Llama with ``--shard`` in steps of four parts each, and get the signal while a step
is under way. The time until both have saved is that of the part under way and of the writing; bytes over time tell how many
parameters would fit into 30 s on the same disk. The disk's cache is flushed, as in every checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import distributed as dist

from tests.backbones.smol import write_model
from tests.training.layouts import Seen
from tests.training.small import SPEC, tiny_config, tiny_stats
from vlaflow.backbones.smol import SmolConfig
from vlaflow.decoders.flow import FlowConfig
from vlaflow.nn.stored import shared_later
from vlaflow.policies.base import Policy, PolicyConfig
from vlaflow.policies.objectives import PolicyObjective
from vlaflow.policies.stages import PolicyStage
from vlaflow.training import checkpoint
from vlaflow.training.team import launched
from vlaflow.training.trainer import Trainer

PARTS, STEP = 8, 3
"""Parts of a step, half for each process, and the step in which the signal comes."""
MODULE = "benchmarks.ending"


@dataclass(frozen=True)
class Options:
    """What to train.

    Args:
        width: of the network's layers, a multiple of 64.
        layers: how many.
        processes: that share it.
        limit: seconds that a scheduler gives.
    """

    width: int = 512
    layers: int = 12
    processes: int = 2
    limit: float = 30.0


class Ended(Seen):
    """Sends its process a SIGTERM, once, while the step of that number is computed."""

    at: float | None = None
    trainer: Trainer

    def batch(self, indices: Any) -> Any:
        """Samples, which are asked for ahead of their step."""
        if self.at is None and self.trainer.step == STEP:
            self.at = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(indices)


def work(out: Path) -> None:
    """One of the processes: train, be ended, and leave what was measured."""
    torch.set_num_threads(1)
    rank, _ = launched()
    backbone = SmolConfig(3, ("front",), str(out / "model"), image_size=56, cell=8)
    policy = PolicyConfig("asyncvla", backbone, FlowConfig(action_dim=2, chunk_size=4), n_action_steps=2)
    with shared_later(rank == 0):
        made = Policy.create(policy, SPEC, tiny_stats(), 0)
    config = tiny_config(
        objective=PolicyObjective(policy), accumulate=PARTS, global_batch_size=PARTS, steps=100, shift=0, ema_decay=0.9
    )
    source, parameters = Ended(), sum(p.numel() for p in made.model.parameters())
    trainer = Trainer(PolicyStage(made), config, source, None, out / "run", tracker="none", shard=True)
    source.trainer = trainer
    publish, wrote = checkpoint.publish, []

    def timed(*arguments: Any, **options: Any) -> None:
        began = time.monotonic()
        publish(*arguments, **options)
        wrote.append(time.monotonic() - began)

    checkpoint.publish = timed
    outcome = trainer.run()
    ended = time.monotonic()
    assert outcome.signal == signal.SIGTERM
    files = (out / "run/training" / f"step-{outcome.step:06d}").glob(f"*-{rank + 1:05d}-of-*.safetensors")
    found = {
        "parameters": parameters,
        "bytes": sum(file.stat().st_size for file in files),
        "state": wrote[-1],
        "whole": ended - source.at if source.at else float("nan"),
        "step": outcome.seconds / max(outcome.step, 1),
    }
    (out / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = tyro.cli(Options, description=__doc__, args=argv)
    heads = options.width // 64
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        shape = {"hidden_size": options.width, "intermediate_size": 3 * options.width, "num_hidden_layers": options.layers}
        write_model(out / "model", **shape, num_attention_heads=heads, num_key_value_heads=heads)
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([*words, "-m", MODULE, "--work", temporary], env=environment, check=True)
        found = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(options.processes)]
    slowest = {key: float(np.max([each[key] for each in found])) for key in found[0]}
    rate = slowest["bytes"] / slowest["state"]
    state = slowest["bytes"] * options.processes / slowest["parameters"]
    left = options.limit - (slowest["whole"] - slowest["state"])
    fitting = left * rate * options.processes / state / 1e9
    columns = (
        "parameters",
        "processes",
        "state of each, MB",
        "a step, s",
        "SIGTERM to end, s",
        "of it writing, s",
        "MB/s of each",
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    times = " | ".join(f"{slowest[key]:.1f}" for key in ("step", "whole", "state"))
    sizes = f"{slowest['parameters'] / 1e6:.0f} M | {options.processes} | {slowest['bytes'] / 1e6:.0f}"
    print(f"| {sizes} | {times} | {rate / 1e6:.0f} |\n")
    print(f"{options.limit:.0f} s would be enough for {fitting:.2f} B parameters, {state:.0f} bytes of state each.")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]))
    else:
        raise SystemExit(main())
