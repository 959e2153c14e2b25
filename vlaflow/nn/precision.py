"""Computing in bfloat16: matrix products are rounded to it, while norms, losses and what is added up stay in float32.

Inference in "bf16" computes what training under bf16 autocast computes, to the bit. The matrices of the layers, nearly all of a
large network, are also stored in bfloat16, to which autocast rounds them anyway; everything else keeps its type.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch
from torch import nn

from vlaflow.errors import ConfigError, nearest

Dtype = Literal["fp32", "bf16"]
"""What networks compute in at inference; "fp32" keeps the types that a checkpoint's config states."""


def is_bf16(dtype: Dtype) -> bool:
    """Whether it is bfloat16.

    Raises:
        ConfigError: for an unknown name.
    """
    if dtype not in get_args(Dtype):
        raise ConfigError(f"There is no dtype '{dtype}'; {nearest(dtype, get_args(Dtype))}")
    return dtype == "bf16"


def autocast(bf16: bool, device: torch.device) -> AbstractContextManager[object]:
    """The context a forward pass runs in."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def round_matrices(layers: Iterable[nn.Module]) -> None:
    """Store the float32 matrices of these layers in bfloat16; autocast gives the same results with them."""
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear) and module.weight.dtype == torch.float32:
                module.to(torch.bfloat16)
