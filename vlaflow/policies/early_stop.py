"""When a training ends before its last step, because it no longer improves."""

from __future__ import annotations

from dataclasses import dataclass

from vlaflow.ranges import Count


@dataclass(frozen=True)
class EarlyStop:
    """End a training that no longer improves on held-out episodes; its checkpoint holds the best weights, not the last ones.

    Args:
        patience: validations in a row without an improvement after which training ends.
        measure: what has to fall: "loss", or the name of another term of the held-out loss as ``training/log.jsonl`` has it.
    """

    patience: Count = 5
    measure: str = "loss"
