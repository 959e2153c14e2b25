"""What a processor can do at most: multiply-adds per second by number format, and bytes per second from its memory.

The presets are the manufacturers' figures without sparsity. No program reaches them: hand-tuned kernels come to 70 to 80 % on
whole policies, compiled PyTorch to about half. So a roofline time is what no program can beat, not what one should expect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlaflow.errors import ConfigError, nearest


@dataclass(frozen=True)
class NumberFormat:
    """How weights and the numbers between operations are stored.

    Args:
        name: for tables, and the key of a processor's peak.
        weight: bytes of a weight.
        number: bytes of an activation, a key or a value.
    """

    name: str
    weight: int
    number: int


FLOAT32 = NumberFormat("float32", 4, 4)
BFLOAT16 = NumberFormat("bfloat16", 2, 2)
FLOAT8 = NumberFormat("float8", 1, 2)
"""Products in float8, everything between them in bfloat16, as in serving libraries."""


@dataclass(frozen=True)
class Hardware:
    """One processor.

    Args:
        name: for tables.
        peak: floating-point operations per second of dense matrix products, two per multiply-add, by number format.
        bandwidth: bytes per second between processor and memory.
    """

    name: str
    peak: Mapping[str, float]
    bandwidth: float

    def milliseconds(self, flops: float, moved: float, numbers: NumberFormat) -> float:
        """The roofline: as long as the arithmetic takes or as the memory takes, whichever is longer.

        Args:
            flops: operations of the products.
            moved: bytes read and written.
            numbers: the format of the products.

        Raises:
            ConfigError: for a format that the processor has no figure for.
        """
        if numbers.name not in self.peak:
            raise ConfigError(f"{self.name} has no peak for {numbers.name}; {nearest(numbers.name, self.peak)}")
        return 1e3 * max(flops / self.peak[numbers.name], moved / self.bandwidth)


H200 = Hardware("H200", {"float32": 67e12, "bfloat16": 989e12, "float8": 1979e12}, 4.8e12)
"""NVIDIA H200 SXM data sheet (2024), whose tensor figures (1979, 3958) are with 2:4 sparsity and are halved here.

float32 is that of the vector units (TF32 would be 494e12).
"""
RTX_4090 = Hardware("RTX 4090", {"float32": 82.6e12, "bfloat16": 165.2e12, "float8": 330.3e12}, 1.008e12)
"""NVIDIA Ada architecture white paper (2022), appendix: dense tensor figures with float32 accumulation.

float32 is that of the vector units, and TF32 has the same peak.
"""
