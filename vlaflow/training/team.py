"""The processes that train together: who each of them is, and what they tell each other.

What one of them cannot do, all of them give up with the same sentence: a process that waited for one that has stopped would
wait for ever.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from vlaflow.errors import CheckpointError, VlaflowError

if TYPE_CHECKING:
    from accelerate import Accelerator

CPU = torch.device("cpu")
LONGEST = 2000
"""Bytes of a sentence that is passed on."""


@dataclass(frozen=True)
class Team:
    """One process of those that train together; by default there is no other.

    Args:
        rank: which one.
        world: how many there are.
        device: on which they exchange tensors.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = CPU

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes what is written once."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Over all processes; ``values`` is overwritten."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, number: int) -> list[int]:
        """Everyone's number, by rank."""
        if self.world == 1:
            return [number]
        row_R = torch.zeros(self.world, dtype=torch.long, device=self.device)
        row_R[self.rank] = number
        return self.sum(row_R).tolist()

    def wait(self) -> None:
        """Until all are here."""
        self.gather(0)

    def heard(self, text: str) -> str:
        """The first text, by rank, that is not empty; empty if none is."""
        if self.world == 1:
            return text
        own_B = torch.zeros(LONGEST, dtype=torch.uint8)
        spoken = text.encode()[:LONGEST]
        own_B[: len(spoken)] = torch.tensor(list(spoken), dtype=torch.uint8)
        all_RB = [torch.zeros(LONGEST, dtype=torch.uint8, device=self.device) for _ in range(self.world)]
        dist.all_gather(all_RB, own_B.to(self.device))
        said = (bytes(row_B.tolist()).rstrip(b"\0").decode(errors="ignore") for row_B in all_RB)
        return next((each for each in said if each), "")

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that fails for every process if it fails for one.

        Raises:
            VlaflowError: of this process.
            CheckpointError: with the words of the one that failed.
        """
        failed: VlaflowError | None = None
        try:
            yield
        except VlaflowError as error:
            failed = error
        said = self.heard(str(failed) if failed else "")
        if failed is not None:
            raise failed
        if said:
            raise CheckpointError(said)


def meet(**options: Any) -> Accelerator:
    """The place of this process among those that a launcher has started, in the weights' own precision (see ``precision``).

    Accelerate takes every process for the only one where there is no GPU, unless it is told to use the CPU.

    Args:
        options: of Accelerate's ``Accelerator``.
    """
    from accelerate import Accelerator

    return Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="no", **options)


def launched() -> tuple[int, int]:
    """Rank of this process and number of processes, as their launcher says before they have met."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


ALONE = Team()
