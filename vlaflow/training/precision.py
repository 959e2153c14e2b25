"""Which number format a network computes in, and with how many threads. Weights and losses are float32 throughout.

bf16 autocast is worth it only where it is faster: on CUDA, and on CPUs that multiply it, which AMX does about nine times as
fast as float32, AVX512-BF16 on some processors faster and on others slower, and AVX2 fourteen times as slowly. So a CPU is
asked by training a small block for a second in both formats.
"""

from __future__ import annotations

import os
import time
from functools import cache
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from vlaflow.nn.block import Block, BlockConfig
from vlaflow.nn.precision import Dtype, autocast
from vlaflow.training.team import ALONE, Team

Precision = Literal["auto", "fp32", "bf16"]
FORMAT = "computes_in"
"""Key of the format in a run's identity."""
BUDGET_S = 1.0
"""Of the measurement."""
WORTH = 1.1
"""How many times as fast bf16 must be: below, what it rounds is not worth it, and the measurement is not sure of it."""
CLEAR = 1.2
"""Three rounds are enough where all of them are this factor off ``WORTH``, on one side."""


def chosen_format(precision: Precision, device: torch.device, team: Team = ALONE, before: str | None = None) -> Dtype:
    """What a recipe's ``precision`` means on this device.

    Args:
        precision: "auto" asks the device.
        device: of the networks.
        team: the processes that train together; the first one decides for all.
        before: the format of the run that is continued, which "auto" keeps; None for none.
    """
    if precision != "auto":
        return precision
    if before is not None:
        return "bf16" if before == "bf16" else "fp32"
    faster = team.is_first and bf16_is_faster(device)
    return "bf16" if max(team.gather(int(faster))) else "fp32"


def bf16_is_faster(device: torch.device) -> bool:
    """Whether training in bf16 autocast is faster than in float32; measured on a CPU, with the threads torch has now."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and speed_of_bf16(torch.get_num_threads()) >= WORTH


@cache
def speed_of_bf16(threads: int) -> float:
    """How many times as fast as in float32 a block trains in bf16 autocast on this CPU; takes at most ``BUDGET_S`` or so.

    The formats take turns, and their times are compared within a round: a machine's speed drifts.

    Args:
        threads: that torch computes with; it is only remembered by it.
    """
    cpu, generator, deadline = torch.device("cpu"), torch.Generator().manual_seed(0), time.monotonic() + BUDGET_S
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = Block(BlockConfig(width=192, heads=6, kv_heads=6, head_dim=32, ffn=768))
    x_BTW = torch.randn((16, 32, 192), generator=generator)
    for bf16 in (False, True):  # the first passes also set up what is kept between passes
        _seconds(block, x_BTW, cpu, bf16=bf16)
    ratios: list[float] = []
    while not ratios or (len(ratios) < 9 and time.monotonic() < deadline):
        if len(ratios) >= 3 and (min(ratios) > CLEAR * WORTH or max(ratios) < WORTH / CLEAR):
            break
        ratios.append(_seconds(block, x_BTW, cpu, bf16=False) / _seconds(block, x_BTW, cpu, bf16=True))
    return median(ratios)


def _seconds(block: Block, x_BTW: Tensor, device: torch.device, *, bf16: bool) -> float:
    """Of one forward and backward pass."""
    block.zero_grad(set_to_none=True)
    began = time.perf_counter()
    with autocast(bf16, device):
        loss = block(x_BTW)[0].float().square().mean()
    loss.backward()
    return time.perf_counter() - began


def has_amx() -> bool:
    """Whether this CPU has matrix tiles. The question is private in torch, so an answer may be lacking: then no."""
    try:
        return bool(torch.cpu._is_amx_tile_supported())
    except (AttributeError, RuntimeError):
        return False


def training_threads() -> int:
    """OMP_NUM_THREADS where it is set (launchers set it), else the physical cores this process may run on."""
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return max(int(os.environ["OMP_NUM_THREADS"]), 1)
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min(psutil.cpu_count(logical=False) or allowed, allowed), 1)
