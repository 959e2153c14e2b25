"""What a recipe needs before it runs: memory per GPU by layout, steps and epochs, the frame cache, and hours.

Memory is exact to a few percent on one process (``memory``); how hours are estimated is said in ``Estimate.hours``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from vlaflow.data.resize import fitted
from vlaflow.policies.base import PolicyConfig
from vlaflow.policies.dry_run import DryRun
from vlaflow.policies.recipe import DataSpec, TrainConfig
from vlaflow.training.memory import Counts, Memory, StepCost, copies, count, measure, sharded

GIB = 2**30
OVERHEAD = 2 * GIB
"""Bytes per GPU for the CUDA context, libraries and fragmentation."""
UTILISATION = 0.4
"""Share of its peak that a GPU is assumed to compute at, as large models trained in bfloat16 reach."""
MOST_GPUS = 256


@dataclass(frozen=True)
class TrainingData:
    """The data set that a recipe is planned for; by default of LIBERO's shape, all four suites.

    Args:
        spec: dimensions and views.
        frames: in all.
        side: of its pictures in pixels.
        learned: frames of the episodes that a config trains with; None to take them from its shares.
    """

    spec: DataSpec = field(default_factory=lambda: DataSpec(8, 7, ("image", "wrist_image")))
    frames: int = 273_465
    side: int = 256
    learned: int | None = None


@dataclass(frozen=True)
class Machine:
    """What is there to train on.

    Args:
        gpus: how many.
        memory: GiB of each.
        tflops: peak of each in bfloat16; an H100's or H200's by default.
    """

    gpus: int = 8
    memory: float = 80.0
    tflops: float = 989.0


@dataclass(frozen=True)
class Layout:
    """One way to spread a step.

    Args:
        shard: the weights are shared out (``--shard``); else every GPU holds a copy.
        gpus: how many.
        part: observations that a GPU computes at a time.
        memory: what a GPU needs.
    """

    shard: bool
    gpus: int
    part: int
    memory: Memory

    def fits(self, gib: float) -> bool:
        """Whether a GPU of this size holds it, with ``OVERHEAD``."""
        return self.memory.total + OVERHEAD <= gib * GIB


@dataclass(frozen=True)
class Estimate:
    """A recipe on a machine.

    Args:
        config: the recipe's, with all changes.
        counts: numbers of the networks.
        step: activations and operations of ``part`` observations.
        part: observations that were measured at a time.
        machine: to train on.
        data: to train with.
    """

    config: TrainConfig
    counts: Counts
    step: StepCost
    part: int
    machine: Machine
    data: TrainingData

    @property
    def bf16(self) -> bool:
        """Whether training computes in bfloat16 on a GPU."""
        return self.config.precision != "fp32"

    def layout(self, shard: bool, gpus: int | None = None, part: int | None = None) -> Layout:
        """Memory of a layout; activations grow with the observations, autocast's copies of matrices do not."""
        gpus, part = gpus or self.machine.gpus, part or self.part
        rounded = min(2.0 * self.counts.matrices * self.bf16, self.step.activations)
        activations = rounded + (self.step.activations - rounded) * part / self.part
        averaged = self.config.ema_decay is not None
        if shard:
            memory = sharded(self.counts, gpus, averaged=averaged, bf16=self.bf16, activations=activations)
        else:
            memory = copies(self.counts, gpus, averaged=averaged, activations=activations)
        return Layout(shard, gpus, part, memory)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Copies and, where there are layers to share and several GPUs, shards."""
        several = self.machine.gpus > 1 and self.counts.largest > 0
        return tuple(self.layout(shard) for shard in ((False, True) if several else (False,)))

    def fitting(self) -> Layout | None:
        """The first layout that fits: of the fewest GPUs, then the largest parts, then copies; None up to ``MOST_GPUS``."""
        return next((each for each in self._tries() if each.fits(self.machine.memory)), None)

    def _tries(self) -> Iterator[Layout]:
        gpus = self.machine.gpus
        while gpus <= MOST_GPUS and self.config.global_batch_size % gpus == 0:
            part = min(self.part, self.config.global_batch_size // gpus)
            while part >= 1:
                if self.config.global_batch_size % (gpus * part) == 0:
                    yield self.layout(False, gpus, part)
                    if gpus > 1 and self.counts.largest:
                        yield self.layout(True, gpus, part)
                part //= 2
            gpus *= 2

    @property
    def epochs(self) -> float:
        """Passes over the frames of the training episodes."""
        return self.config.steps * self.config.global_batch_size / max(self.learned, 1)

    @property
    def learned(self) -> int:
        """Frames of the training episodes."""
        if self.data.learned is not None:
            return self.data.learned
        return round(self.data.frames * (1 - self.config.validation_fraction) * self.config.demonstrations)

    @property
    def cache(self) -> int:
        """Bytes of a raw frame cache, of pictures as large as the data set's largest."""
        size, side = self.config.objective.input_size, self.data.side
        height, width = fitted(side, side, size.side, size.area)
        return self.data.frames * len(self.data.spec.views) * height * width * 3

    @property
    def hours(self) -> float:
        """Products of all steps at ``UTILISATION`` of the peak; loading, exchange, validation and saving are not counted."""
        flops = self.step.flops / self.part * self.config.global_batch_size * self.config.steps
        return flops / (self.machine.gpus * self.machine.tflops * 1e12 * UTILISATION) / 3600


def estimate(config: TrainConfig, machine: Machine, data: TrainingData, policy: PolicyConfig | None = None) -> Estimate:
    """Count and measure a training stage without its weights.

    Args:
        config: the stage.
        machine: to train on.
        data: to train with.
        policy: the one that the stage continues.

    Raises:
        VlaflowError: the parts do not fit together, or a step cannot be split over the machine's GPUs.
    """

    def build() -> DryRun:
        return config.objective.dry_run(policy, data.side)

    part = config.global_batch_size // config.parts(machine.gpus)
    bf16 = config.precision != "fp32"
    return Estimate(config, count(build, config), measure(build, config, part, bf16=bf16), part, machine, data)


def needs(config: TrainConfig, data: TrainingData, policy: PolicyConfig | None = None) -> str:
    """A recipe's memory in a sentence, for its docstring: before activations, on one GPU and on eight that share it."""
    counts = count(lambda: config.objective.dry_run(policy, data.side), config)
    averaged, bf16 = config.ema_decay is not None, config.precision != "fp32"
    whole = copies(counts, 8, averaged=averaged).fixed
    numbers = f"{counts.parameters / 1e9:.2f} B parameters, {counts.trained / 1e9:.2f} B trained"
    if not counts.largest:
        return f"{numbers}; before activations {whole / GIB:.0f} GiB per GPU."
    shared = sharded(counts, 8, averaged=averaged, bf16=bf16).fixed
    return (
        f"{numbers}; before activations {whole / GIB:.0f} GiB per GPU as copies, {shared / GIB:.0f} GiB with --shard on eight."
    )
