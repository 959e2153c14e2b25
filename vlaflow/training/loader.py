"""What a training step gets: its samples and its randomness, both pure functions of (seed, step, part).

So a run has no position to save but the step number, and a resumed run sees exactly what it would have seen. A step's parts are
numbered over all processes: two parts are the same on one process, one after the other, and on two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import torch
from torch import Generator, Tensor

from vlaflow.data.mixture import Order
from vlaflow.data.source import MakeOrder, Ready, Sample, Source
from vlaflow.data.transforms import RandomShift
from vlaflow.policies.parts import require_even
from vlaflow.policies.processor import Drawn
from vlaflow.policies.recipe import TrainConfig
from vlaflow.policies.stages import CoTraining
from vlaflow.training.team import Team

AHEAD = 16
"""Steps whose samples are announced."""


@dataclass(frozen=True)
class StepPart:
    """One part of a step's batch, which one process computes at a time.

    Args:
        batch: the samples, on the CPU; what a loss that explodes is traced to.
        targets: number of terms that their loss averages over.
        ready: the same as the loss takes them, on the device.
        drawn: everything random in the loss, on the device.
    """

    batch: Sample
    targets: int
    ready: Ready
    drawn: Drawn

    @staticmethod
    def of(batch: Sample, stage: PreparesSamples, generator: Generator, shared: Generator, device: torch.device) -> StepPart:
        """Prepare samples, draw for them, and start both on their way to the device."""
        ready = stage.prepare(batch)
        drawn = stage.draw(ready, generator, shared)
        return StepPart(batch, batch.targets, ready.to(device, non_blocking=True), drawn.to(device, non_blocking=True))


class PreparesSamples(Protocol):
    """What a loader needs of a stage; see ``policies.stages.Stage``."""

    def prepare(self, batch: Any) -> Ready:
        """What the loss takes of a batch."""

    def draw(self, batch: Any, generator: Generator, shared: Generator) -> Drawn:
        """Everything random in the loss on it."""


def mix(*numbers: int | str) -> int:
    """A seed below 2⁶³ that differs whenever any of the numbers does."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Loader:
    """The parts of every step.

    A step's ``global_batch_size`` samples are split into ``parts`` parts of equal size; every process takes as many of them and
    uses them one after another. With ``ahead`` (the default next to a GPU) a thread loads the next step meanwhile,
    which changes no sample: a step's content does not depend on when it is loaded. The thread also prepares the samples, draws
    what is random in their loss, and starts the copies to the device, from pinned memory.

    The samples of the next ``AHEAD`` steps are announced, so that a stream decodes them meanwhile.

    Args:
        seed: of order, changes and losses; by default that of the config.

    Attributes:
        thread: which loads ahead; None for none.
    """

    def __init__(
        self,
        source: Source,
        config: TrainConfig,
        team: Team,
        device: torch.device,
        stage: PreparesSamples,
        *,
        parts: int | None = None,
        seed: int | None = None,
        ahead: bool | None = None,
        order: MakeOrder = Order,
        thread: ThreadPoolExecutor | None = None,
    ) -> None:
        self.source, self.config, self.team, self.device, self.stage = source, config, team, device, stage
        self.parts, self.seed = parts or config.parts(team.world), config.seed if seed is None else seed
        self.order = order(len(source), config.global_batch_size, self.seed)
        self.shift = RandomShift(config.shift)
        # Next to a model on the CPU a loading thread only takes its cores away: loading is one hundredth of a step there.
        ahead = device.type != "cpu" if ahead is None else ahead
        self.thread = thread or (ThreadPoolExecutor(1, "loader") if ahead else None)
        self._next: tuple[int, Future[list[StepPart]]] | None = None
        self._announced = 0

    def step(self, step: int) -> list[StepPart]:
        """The parts of step 0, 1, 2, ..."""
        if self.thread is None:
            return self._load(step)
        parts = self._next[1].result() if self._next and self._next[0] == step else self._load(step)
        self._next = (step + 1, self.thread.submit(self._load, step + 1))
        return parts

    def close(self) -> None:
        """End the loading thread."""
        if self.thread is not None:
            self.thread.shutdown(wait=True, cancel_futures=True)

    def _load(self, step: int) -> list[StepPart]:
        c, parts = self.config, []
        for later in range(max(step, self._announced), min(step + AHEAD, c.steps)):
            self.order.expect(np.concatenate(list(self._own(later).values())))
        self._announced = max(self._announced, step + AHEAD)
        for number, indices in self._own(step).items():

            def own(what: str, number: int = number) -> Generator:
                return Generator().manual_seed(mix(what, self.seed, step, 0, number))

            batch = self.source.batch(indices)
            if c.shift:
                batch = self._changed(batch, self.shift, own("shift"))
            if c.augment is not None:
                batch = self._changed(batch, c.augment, own("augment"))
            if c.state_mask is not None:
                samples, dimensions = batch.observation.state_BS.shape
                known_BS = c.state_mask(samples, dimensions, own("state mask"))
                batch = replace(batch, observation=replace(batch.observation, known_BS=known_BS))
            shared = Generator().manual_seed(mix("shared", self.seed, step))
            parts.append(StepPart.of(batch, self.stage, own("loss"), shared, self.device))
        return parts

    def _own(self, step: int) -> dict[int, np.ndarray]:
        """The samples of this process's parts of a step, by number of the part."""
        count = self.parts // self.team.world
        first, split = self.team.rank * count, np.split(self.order.indices(step), self.parts)
        return {number: split[number] for number in range(first, first + count)}

    def _changed(self, batch: Sample, change: Callable[[Tensor, Generator], Tensor], generator: Generator) -> Sample:
        images = {view: change(image, generator) for view, image in batch.observation.images.items()}
        return replace(batch, observation=replace(batch.observation, images=images))


class Alternating:
    """Some steps are taken on questions, all others on actions, each from its own loader.

    Of the first n steps, floor(n · share) are on questions, for every n: the two are as evenly mixed as whole steps allow.
    Which of its own steps a loader is at follows from the step's number alone, so nothing needs to be saved, and the actions'
    samples are the same, in the same order, as without questions.

    Args:
        acting: loader of the actions.
        asking: loader of the questions.
        share: of the steps on questions, in (0, 1).
    """

    def __init__(self, acting: Loader, asking: Loader, share: float) -> None:
        self.acting, self.asking, self.share = acting, asking, Fraction(str(share))

    def vqa_steps_before(self, step: int) -> int:
        """How many of the steps 0 .. step − 1 are on questions."""
        return int(step * self.share)

    def step(self, step: int) -> list[StepPart]:
        """The parts of step 0, 1, 2, ...: all actions or all questions."""
        asked = self.vqa_steps_before(step)
        return self.asking.step(asked) if self.vqa_steps_before(step + 1) > asked else self.acting.step(step - asked)

    def close(self) -> None:
        """End the loading thread, which both share."""
        self.acting.close()
        self.asking.close()


def alternating(acting: Loader, vqa: CoTraining) -> Alternating:
    """Actions and questions in turns: state masks are for actions, everything else holds for both."""
    if vqa.batch_size is not None:
        require_even(vqa.batch_size, acting.parts, "vqa.batch_size", "as many as a step on actions")
    config = replace(
        acting.config,
        global_batch_size=vqa.batch_size or acting.config.global_batch_size,
        state_mask=None,
    )
    seed, where = mix("questions", acting.seed), (acting.team, acting.device, acting.stage)
    asking = Loader(vqa.train, config, *where, parts=acting.parts, seed=seed, thread=acting.thread)
    return Alternating(acting, asking, vqa.share)


class Held:
    """The held-out samples that validation measures: always the same ones, with the same noise, so curves compare.

    Args:
        source: held-out samples.
        batch_size: of the measurement.
        seed: of the noise.
        limit: most batches; where there are more samples, evenly spaced ones are taken.
    """

    def __init__(self, source: Source, batch_size: int, seed: int, limit: int = 16) -> None:
        self.source, self.seed = source, seed
        count = min(len(source), batch_size * limit)
        chosen = np.unique(np.linspace(0, len(source) - 1, count).round().astype(np.int64))
        self.batches = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]

    def parts(self, team: Team, device: torch.device, stage: PreparesSamples) -> Iterator[tuple[StepPart, bool]]:
        """The batches of one process, and whether each counts.

        Every process gets equally many, as sharded models need; the surplus ones are repetitions that do not count.
        """
        total = len(self.batches)
        for number in range(team.rank, -(-total // team.world) * team.world, team.world):
            generator = Generator().manual_seed(mix("validation", self.seed, number % total))
            shared = Generator().manual_seed(mix("shared validation", self.seed))
            batch = self.source.batch(self.batches[number % total])
            yield StepPart.of(batch, stage, generator, shared, device), number < total


def held_out_losses(
    held: Mapping[str, tuple[Held, float]], questions: Held | None, measure: Callable[[Held], dict[str, float]]
) -> dict[str, float]:
    """Losses on the held-out samples, and "answer", the language-model loss on the held-out questions.

    Of several data sets these are the means by their weights, and "loss@NAME" is the loss on each.

    Args:
        held: samples of each data set, with its weight; of the only one, without a name.
        questions: None where there are none.
        measure: the losses on some of them.
    """
    found: dict[str, float] = {}
    total = sum(weight for _, weight in held.values())
    for name, (samples, weight) in held.items():
        measured = measure(samples)
        for term, value in measured.items():
            found[term] = found.get(term, 0.0) + value * (weight / total)
        if name:
            found[f"loss@{name}"] = measured["loss"]
    if questions is not None:
        found["answer"] = measure(questions)["answer"]
    return found
