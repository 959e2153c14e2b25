"""A small network trained in several layouts, by two processes (``ranks``) and by one.

``name`` is "qwen", a small Qwen2.5-VL, or "smol", a small Llama; their folders are next to those of the runs.

Every run takes six steps of the same recipe in two parts; what differs is who computes the parts and who holds the weights.
"""

import json
import os
import shutil
import signal
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor

from tests.backbones.smol import write_model as write_llama
from tests.backbones.test_qwen2_5_vl import write_model
from tests.training import ranks
from tests.training.small import SPEC, Cut, Ragged, tiny_config, tiny_stats
from vlaflow.backbones.qwen2_5_vl import PATCH, QwenConfig
from vlaflow.backbones.smol import SmolConfig
from vlaflow.decoders.flow import FlowConfig
from vlaflow.nn.block import BlockConfig
from vlaflow.nn.stored import shared_later
from vlaflow.policies.adapters import LoraConfig
from vlaflow.policies.base import Policy, PolicyConfig
from vlaflow.policies.objectives import PolicyObjective
from vlaflow.policies.stages import PolicyStage
from vlaflow.stacks.expert import ExpertConfig
from vlaflow.training import checkpoint
from vlaflow.training.team import launched
from vlaflow.training.trainer import Trainer

STACKS = ("shared", "expert")
LORA = LoraConfig(rank=2)
COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_reduce", "broadcast", "reduce_scatter_tensor", "gather", "scatter")


class Seen(Ragged):
    """Pictures of four image tokens."""

    def batch(self, indices):
        batch = super().batch(indices)
        rows = [np.random.default_rng([int(i), 3]).integers(0, 256, (56, 56, 3), np.uint8) for i in indices]
        return replace(batch, observation=replace(batch.observation, images={"front": torch.from_numpy(np.stack(rows))}))


@dataclass
class Killed(Seen):
    """The second process is killed when it asks for the samples of its step number ``at``."""

    at: int = 4
    asked: int = 0

    def batch(self, indices):
        self.asked += 1
        if self.asked == self.at and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(indices)


def trainer(
    out, stack="shared", source=None, *, name="qwen", shard=False, recompute=False, precision="fp32", lora=None, every=2
):
    """A run of six steps in ``out``, saved after every ``every``; the model's folder ``name`` is next to it."""
    folder = str(out.parent / name)
    if name == "qwen":
        backbone = QwenConfig(3, ("front",), folder, min_pixels=PATCH, max_pixels=4 * PATCH, recompute=recompute)
    else:
        backbone = SmolConfig(3, ("front",), folder, recompute=recompute, image_size=56, cell=8)
    expert = ExpertConfig(BlockConfig(32, heads=4, kv_heads=2, head_dim=16, ffn=48, norm="rms", gated=True))
    decoder = FlowConfig(action_dim=2, chunk_size=4, expert=expert if stack == "expert" else None)
    policy = PolicyConfig("asyncvla", backbone, decoder, n_action_steps=2)
    rank, world = launched()
    with shared_later(rank == 0 if shard and world > 1 and not lora else None):
        made = Policy.create(policy, SPEC, tiny_stats(), 0)
    config = tiny_config(
        objective=PolicyObjective(policy),
        accumulate=2,
        shift=0,
        ema_decay=0.9,
        validate_every=6,
        checkpoint_every=every,
        precision=precision,
        lora=lora,
    )
    return Trainer(PolicyStage(made), config, source or Seen(), Seen(9), out, tracker="none", shard=shard)


class Watch:
    """What this process gathers: the most bytes of layers at a time, and the bytes it is sent while a checkpoint is written."""

    def __init__(self, monkeypatch):
        self.layers, self.saved = 0, []
        self._sizes: dict[FSDPParamGroup, int] = {}
        self._gathered: set[FSDPParamGroup] = set()
        for name in ("unshard", "reshard"):
            self._around(monkeypatch, name)
        publish = checkpoint.publish

        def counted(*args, **kwargs):
            with pytest.MonkeyPatch.context() as inner:
                sent = self._count(inner)
                publish(*args, **kwargs)
            self.saved.append(sum(sent))

        monkeypatch.setattr(checkpoint, "publish", counted)

    def _around(self, monkeypatch, name):
        original = getattr(FSDPParamGroup, name)

        def watched(group, *args, **kwargs):
            original(group, *args, **kwargs)
            self._sizes[group] = sum(4 * p._orig_size.numel() for p in group.fsdp_params)
            there = group.is_unsharded or group._all_gather_result is not None
            (self._gathered.add if there else self._gathered.discard)(group)
            self.layers = max(self.layers, sum(self._sizes[g] for g in self._gathered if g._module_fqn))

        monkeypatch.setattr(FSDPParamGroup, name, watched)

    def largest(self, root):
        """Bytes of the largest layer, or of the root."""
        return max(size for group, size in self._sizes.items() if bool(group._module_fqn) != root)

    def _count(self, monkeypatch):
        sent = []

        def size(given):
            if isinstance(given, torch.Tensor):
                return given.numel() * given.element_size()
            return sum(map(size, given)) if isinstance(given, list | tuple) else 0

        for name in COLLECTIVES:
            original = getattr(dist, name)

            def counted(first, *args, original=original, **kwargs):
                sent.append(size(first))
                return original(first, *args, **kwargs)

            monkeypatch.setattr(dist, name, counted)
        full = DTensor.full_tensor
        monkeypatch.setattr(DTensor, "full_tensor", lambda tensor, **k: sent.append(size(tensor)) or full(tensor, **k))
        return sent


def compare(out, name):
    """Both stacks as copies and sharded; with recomputation and in bfloat16; one run that breaks down after four steps; and
    last one whose second process is killed in its fourth step.
    """
    for stack in STACKS:
        trainer(out / f"copies-{stack}", stack, name=name, every=6).run()
        with pytest.MonkeyPatch.context() as monkeypatch:
            watch = Watch(monkeypatch)
            run = trainer(out / f"sharded-{stack}", stack, name=name, shard=True)
            built = sum(4 * p.numel() for p in run.stage.module.parameters() if not p.is_meta)
            run.run()
        sizes = {"layers": watch.layers, "layer": watch.largest(False), "root": watch.largest(True), "saved": watch.saved}
        sizes["built"] = built
        sizes["all"] = sum(4 * p.numel() for p in run.stage.module.parameters())
        (out / f"sharded-{stack}/rank-{run.team.rank}.json").write_text(json.dumps(sizes))
    trainer(out / "recomputed", "expert", name=name, shard=True, recompute=True, every=6).run()
    trainer(out / "sharded-lora", name="smol", lora=LORA, shard=True).run()
    trainer(out / "rounded", "shared", name=name, shard=True, precision="bf16", every=6).run()
    with pytest.raises(RuntimeError, match="cut"):
        trainer(out / "moved", source=Cut(Seen(), at=4), name=name, shard=True).run()
    trainer(out / "killed", source=Killed(), name=name, shard=True).run()


def finish(out, name):
    """Go on with the run that was moved, and with a copy of the one that was killed."""
    trainer(out / "moved", name=name, shard=True).run()
    trainer(out / "killed-again", name=name, shard=True).run()


def everything(out, name="qwen"):
    """All runs, in order: one process, two, the moved one on one process again and on two, after the kill on one and on two."""
    write_model(out / "qwen", tied=True, vision={"depth": 1, "fullatt_block_indexes": [0]})
    write_llama(out / "smol", head_dim=16)  # the expert's, as qwen has
    for stack in STACKS:
        trainer(out / f"one-{stack}", stack, name=name, every=6).run()
    trainer(out / "one-lora", name="smol", lora=LORA).run()
    assert ranks.launch(compare, out, name)[1] == -signal.SIGKILL, ranks.failures(out)
    shutil.copytree(out / "killed", out / "killed-again")
    with pytest.raises(RuntimeError, match="cut"):  # goes on after step 2, with two parts a step, and breaks down after step 4
        trainer(out / "moved", source=Cut(Seen(), at=6), name=name).run()
    assert ranks.launch(finish, out, name) == [0, 0], ranks.failures(out)
    trainer(out / "killed", name=name).run()
