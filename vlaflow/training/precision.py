"""Which number format a network computes in, and with how many threads. Weights and losses are float32 throughout.

bf16 is worth it only where the hardware multiplies it: on CUDA, and on CPUs with AMX (3 times the training speed of
float32). On a CPU without AMX it is emulated, 1.6 times slower with AVX512-BF16 and 14 times with AVX2.
"""

from __future__ import annotations

import os
from typing import Literal

import torch


def has_amx() -> bool:
    """Whether this CPU has matrix tiles. The question is private in torch, so an answer may be lacking: then no."""
    try:
        return bool(torch.cpu._is_amx_tile_supported())
    except (AttributeError, RuntimeError):
        return False


def use_bf16(precision: Literal["auto", "fp32", "bf16"], device: torch.device) -> bool:
    """What a recipe's ``precision`` means on this device."""
    if precision == "auto":
        return torch.cuda.is_bf16_supported() if device.type == "cuda" else device.type == "cpu" and has_amx()
    return precision == "bf16"


def training_threads() -> int:
    """OMP_NUM_THREADS where it is set (launchers set it), else the physical cores this process may run on."""
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return max(int(os.environ["OMP_NUM_THREADS"]), 1)
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min(psutil.cpu_count(logical=False) or allowed, allowed), 1)
