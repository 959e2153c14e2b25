"""The single choices behind a fast train step on a CPU, one at a time: precision, attention, activation, norm, optimizer.

    python -m benchmarks.operations
    ONEDNN_MAX_CPU_ISA=AVX2 python -m benchmarks.operations    # matrix products as an older CPU would do them

This is what the precision rule rests on (docs/decisions/003): bf16 pays only where the CPU multiplies it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional

from benchmarks._timing import Case, report, seconds_in_turns

Operation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        batch, tokens, width, heads: of the hidden states.
        parameters: millions, for the optimizer.
        threads: of torch.
        rounds: rounds.
        json: file for the results.
    """

    batch: int = 64
    tokens: int = 64
    width: int = 192
    heads: int = 6
    parameters: float = 2.2
    threads: int = 1
    rounds: int = 15
    json: Path | None = None


def plain_attention(qkv: Tensor) -> Tensor:
    """Softmax between two matrix products, (3, B, H, T, E) → (B, H, T, E)."""
    query, key, value = qkv
    return (query * query.shape[-1] ** -0.5 @ key.mT).softmax(-1) @ value


def fused_attention(qkv: Tensor) -> Tensor:
    """PyTorch's own."""
    return functional.scaled_dot_product_attention(*qkv)


def forward_and_back(operation: Operation, shape: Sequence[int], dtype: torch.dtype) -> Callable[[], None]:
    """The operation with its gradient."""
    x = torch.randn(*shape, dtype=dtype, requires_grad=True)
    slope = torch.randn_like(operation(x))

    def run() -> None:
        x.grad = None
        operation(x).backward(slope)

    return run


def optimizer_step(millions: float, width: int, *, fused: bool, foreach: bool) -> Callable[[], object]:
    """AdamW on square matrices that have a gradient."""
    count = max(int(millions * 1e6 / width**2), 1)
    weights = [nn.Parameter(torch.randn(width, width)) for _ in range(count)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return torch.optim.AdamW(weights, fused=fused, foreach=foreach).step


def groups(o: Options) -> dict[str, dict[str, Callable[[], object]]]:
    """What is compared with what."""
    hidden, inner = (o.batch, o.tokens, o.width), (o.batch, o.tokens, 4 * o.width)
    heads = (3, o.batch, o.heads, o.tokens, o.width // o.heads)
    formats = {"float32": torch.float32, "bf16": torch.bfloat16}

    def of(operation: Callable[[torch.dtype], Operation], shape: Sequence[int], *kinds: str) -> dict[str, Callable[[], object]]:
        return {kind: forward_and_back(operation(formats[kind]), shape, formats[kind]) for kind in kinds or formats}

    found: dict[str, dict[str, Callable[[], object]]] = {
        f"linear {o.width} → {4 * o.width}": of(lambda d: nn.Linear(o.width, 4 * o.width, dtype=d), hidden)
    }
    for kind, dtype in formats.items():
        found[f"attention, {kind}"] = {
            "two matrix products": forward_and_back(plain_attention, heads, dtype),
            "scaled_dot_product_attention": forward_and_back(fused_attention, heads, dtype),
        }
        found[f"activation, {kind}"] = {
            "erf-GELU": forward_and_back(functional.gelu, inner, dtype),
            "tanh-GELU": forward_and_back(lambda x: functional.gelu(x, approximate="tanh"), inner, dtype),
        }
        found[f"norm, {kind}"] = {
            "LayerNorm": forward_and_back(nn.LayerNorm(o.width, dtype=dtype), hidden, dtype),
            "RMSNorm": forward_and_back(nn.RMSNorm(o.width, eps=1e-6, dtype=dtype), hidden, dtype),
        }
    found[f"AdamW, {o.parameters} M parameters"] = {
        "fused": optimizer_step(o.parameters, o.width, fused=True, foreach=False),
        "foreach": optimizer_step(o.parameters, o.width, fused=False, foreach=True),
        "loop": optimizer_step(o.parameters, o.width, fused=False, foreach=False),
    }
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    options = tyro.cli(Options, description=__doc__, args=argv)
    torch.set_num_threads(options.threads)
    cases = []
    for name, arms in groups(options).items():
        seconds = seconds_in_turns(arms, options.rounds, warmup=2)
        cases.append(Case(name, "ms", {way: [s * 1e3 for s in each] for way, each in seconds.items()}))
    return report("operations", options, cases, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
