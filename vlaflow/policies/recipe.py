"""What a recipe returns: one frozen config for one training stage, with nothing left to guess.

A ``TrainConfig`` says how the loop runs; its ``objective`` says what is learned. Recipes live next to their system
(``policies/<system>/recipes.py``) and are plain functions of the data set's shape and of the policy they continue. The
objectives of this package are in ``objectives``; ``training`` runs any of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from vlaflow.actions.latent import LatentConfig
from vlaflow.backbones.base import InputSize
from vlaflow.config import INLINE
from vlaflow.data.augment import Augment, StateMask
from vlaflow.data.filters import Filters
from vlaflow.data.frame_source import FrameStorage
from vlaflow.data.lerobot import Dataset
from vlaflow.data.mixture import Order
from vlaflow.data.quality import INTERVENTIONS, InterventionRule, PauseRule
from vlaflow.data.reading import Reading, missing_action
from vlaflow.data.source import MakeOrder, Source
from vlaflow.data.weights import DatasetEntry, Mixture
from vlaflow.data.windows import fewer_episodes, split_episodes
from vlaflow.errors import CapabilityError, DataError
from vlaflow.hub import origin
from vlaflow.policies.adapters import LoraConfig
from vlaflow.policies.base import Policy, PolicyConfig
from vlaflow.policies.checkpoint import home_of, local_folder
from vlaflow.policies.dry_run import DryRun
from vlaflow.policies.early_stop import EarlyStop
from vlaflow.policies.parts import require_even
from vlaflow.policies.policy_config import Normalisation
from vlaflow.policies.provenance import ancestry, fingerprint
from vlaflow.policies.stages import CoTraining, Stage
from vlaflow.ranges import Count, Fraction, NotNegative, Number, Positive, PositiveShare, Seed, Share, require_ranges


@dataclass(frozen=True)
class DataSpec:
    """The shape of a data set, or what several have in common, which a recipe fits its networks to.

    Args:
        state_dim, action_dim: 0 where it holds no states or no actions; of several data sets the largest.
        views: names of its camera views, at least one; of several data sets all that any of them has.
        no_action: what to do about it where it holds no actions, in a sentence.
    """

    state_dim: int
    action_dim: int
    views: tuple[str, ...]
    no_action: str = "The data set has none; choose another one."

    @staticmethod
    def of(*datasets: Path | str | DatasetEntry) -> DataSpec:
        """Of data sets on disk; only their meta folders are read.

        Raises:
            DataError: not a data set, or one without a camera.
        """
        found = [DataSpec._of_one(each) for each in datasets]
        views = dict.fromkeys(view for each in found for view in each.views)
        state, action = max(each.state_dim for each in found), max(each.action_dim for each in found)
        return DataSpec(state, action, tuple(views), found[0].no_action)

    @staticmethod
    def _of_one(given: Path | str | DatasetEntry) -> DataSpec:
        root, reading = (given.root, given.reading) if isinstance(given, DatasetEntry) else (given, None)
        dataset = Dataset.open(root, video=True, reading=reading)
        if not dataset.views:
            raise DataError(f"{dataset.root} has no camera. Choose a data set with at least one view.")
        state, action = (len(dataset.dimension_names(name)) for name in ("state", "action"))
        found = DataSpec(state, action, tuple(dataset.views))
        return found if action else replace(found, no_action=missing_action(dataset.root, dataset.features))


@dataclass(frozen=True)
class OpenedDataset:
    """One of several data sets of a training.

    Args:
        entry: as given.
        dataset: opened.
        label: its name, different from all others'.
    """

    entry: DatasetEntry
    dataset: Dataset
    label: str


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters whose name starts with ``prefix`` train at their own rate, later than the others, or not at all.

    With ``frozen_steps`` they stay as they are for so many optimiser steps and then join the schedule where it stands.

    The longest matching prefix wins; parameters that match none take the optimiser's own rate.
    """

    prefix: str
    learning_rate: NotNegative | None = None
    frozen: bool = False
    frozen_steps: Number = 0

    def __post_init__(self) -> None:
        require_ranges(self, "optim.groups.{}")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW or Muon with linear warm-up and a cosine (or constant) schedule.

    Weights in a smaller format than float32 are trained through float32 copies of them, so that no small step is lost.

    Args:
        kind: "adamw", or "muon" for the matrices of the layers and AdamW for all else, which learns small networks in fewer
            steps (docs/training.md). "adamw8bit" needs 2 bytes per weight for its moments instead of 8; "paged_adamw" and
            "paged_adamw8bit" let them move to host memory where the GPU's is short. These three need bitsandbytes.
        learning_rate: peak rate.
        warmup_steps: linear up to the peak; the first step has 1 / warmup_steps of it.
        schedule: after the warm-up.
        final_fraction: share of the peak that the cosine ends at.
        clip_norm: largest gradient norm; larger ones are scaled down. None only measures it.
    """

    kind: Literal["adamw", "muon", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = "adamw"
    learning_rate: NotNegative = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.01
    warmup_steps: Number = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    final_fraction: Share = 0.0
    clip_norm: Positive | None = 1.0
    groups: tuple[ParameterGroup, ...] = ()

    def __post_init__(self) -> None:
        require_ranges(self, "optim.{}")

    @property
    def packages(self) -> tuple[str, ...]:
        """What ``kind`` needs."""
        return () if self.kind in ("adamw", "muon") else ("bitsandbytes",)


@dataclass(frozen=True)
class Pipeline:
    """Several stages, each with what the ones before it have made.

    Args:
        stages: recipes; the last one's checkpoint is the whole's, the others lie in folders of their names inside it.
    """

    stages: tuple[Callable[..., TrainConfig], ...]


@dataclass(frozen=True)
class Base:
    """A trained policy that a stage continues.

    Args:
        policy: the policy.
        path: as the user gave it, for messages.
        folder: where it lies on disk.
    """

    policy: Policy
    path: str
    folder: Path

    @staticmethod
    def open(path: Path | str) -> Base:
        """From a checkpoint folder or a Hugging Face repository id.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        folder = home_of(local_folder(path))
        return Base(Policy.of_all_robots(folder), str(path), folder)

    def identity(self) -> dict[str, Any]:
        """What a run that continues it records about it, JSON data."""
        source = origin(self.folder)
        return {"policy": fingerprint(self.folder), **({"policy_source": source} if source else {}), **ancestry(self.folder)}


@dataclass(frozen=True)
class Assets:
    """What a stage may be given besides its data set.

    Args:
        base: trained policy to continue.
        vqa: file or folder of a VQA data set for co-training (docs/vqa.md).
        tokenizer: file of a fitted action tokenizer.
        latent: folder of a latent action model.
    """

    base: Base | None = None
    vqa: Path | str | None = None
    tokenizer: Path | str | None = None
    latent: Path | str | None = None


@dataclass(frozen=True)
class EarlierStages:
    """What the stages of a pipeline before the present one will have made, known before any of them runs."""

    policy: PolicyConfig | None = None
    latent: LatentConfig | None = None


@dataclass(frozen=True)
class Setup:
    """A stage that is ready to train.

    Args:
        objective: as given, with what only the data could decide, such as a fitted tokenizer.
        stage: the networks and their loss.
        train: samples to learn from.
        held: held-out samples, or None.
        vqa: questions to learn from in turns with the samples, or None.
        identity: JSON data that must be the same for a run to be continued, besides recipe, data set and config.
        card: the checkpoint's README.md, given the lines about this training.
        order: how training goes through the samples.
        held_each: held-out samples of each of several data sets, with its weight, in place of ``held``.
    """

    objective: Objective
    stage: Stage
    train: Source
    held: Source | None
    vqa: CoTraining | None
    identity: Mapping[str, Any]
    card: Callable[[Sequence[str]], str]
    order: MakeOrder = Order
    held_each: Mapping[str, tuple[Source, float]] = field(default_factory=dict)


class Objective(ABC):
    """What a training stage learns; a frozen dataclass whose fields ``--set`` reaches without a prefix.

    A recipe of another package may bring one of its own: the trainer knows only these methods.
    """

    makes: ClassVar[Literal["policy", "latent"]] = "policy"
    """What its checkpoint is to the later stages of a pipeline."""

    @property
    def reads_rows(self) -> bool:
        """Whether processes that share its networks may read their own rows of pretrained weights instead of all of them.

        They may where all of its networks train and nothing looks at their weights before (``nn.stored``); by default not.
        """
        return False

    @property
    def names_codes(self) -> bool:
        """Whether it needs a latent action model, whose codes it learns to name."""
        return False

    def check(self, config: TrainConfig) -> None:  # noqa: B027 — most objectives follow every value
        """Refuse values of the config around it that it cannot follow, with a ``ConfigError``; by default none."""

    @property
    def input_size(self) -> InputSize:
        """The size that frames are stored at for it; by default as recorded, or as the policy that it continues reads them."""
        return InputSize()

    @abstractmethod
    def used_assets(self, assets: Assets) -> Assets:
        """The part of a pipeline's assets that concerns this stage."""

    def with_assets(self, assets: Assets) -> Self:
        """The objective with what the assets bring along, before ``--set`` is applied; by default nothing."""
        return self

    @abstractmethod
    def require(self, assets: Assets) -> None:
        """Refuse assets that it cannot use, and demand those that it cannot do without.

        Raises:
            ConfigError: with the option to give or to leave out.
        """

    @abstractmethod
    def check_plan(
        self, config: TrainConfig, dataset: Dataset, assets: Assets, before: EarlierStages, stage: str
    ) -> EarlierStages:
        """What will be there after this stage of a pipeline; raises what can be known to be wrong before any stage runs.

        Args:
            config: the whole config.
            dataset: as ``open`` opened it.
            assets: this stage's.
            before: what the stages before it make.
            stage: its name and a dot, before keys that a message names.
        """

    def dry_run(self, policy: PolicyConfig | None, side: int) -> DryRun:
        """Networks and loss without data or weights, made where the caller has torch make tensors (``vlaflow plan``).

        Args:
            policy: the one that is continued.
            side: of the data set's pictures in pixels.

        Raises:
            CapabilityError: by default; an objective whose memory is to be planned overrides it.
            ConfigError: it needs a policy to continue.
        """
        raise CapabilityError(f"{type(self).__name__} does not say what its training step computes (dry_run).")

    def timed(self, config: TrainConfig, datasets: Sequence[OpenedDataset]) -> Self:
        """The objective with chunks of the config's duration at the data sets' rates; by default as it is."""
        return self

    @abstractmethod
    def open(self, root: Path | str, reading: Reading | None = None) -> Dataset:
        """Open a data set to learn from.

        Args:
            root: its folder, or its name on the Hub.
            reading: names of its columns and cameras; None for LeRobot's.

        Raises:
            VlaflowError: it lacks something that the objective learns from.
        """

    @abstractmethod
    def set_up(self, config: TrainConfig, dataset: Dataset, assets: Assets) -> Setup:
        """Networks, loss and samples.

        Args:
            config: the whole config.
            dataset: as ``open`` opened it.
            assets: as ``require`` accepted them.

        Raises:
            VlaflowError: when the parts do not fit together.
        """

    def set_up_several(self, config: TrainConfig, datasets: Sequence[OpenedDataset], assets: Assets) -> Setup:
        """The same for several data sets at once, mixed as the config says.

        Raises:
            CapabilityError: by default: the objective learns from one data set.
            VlaflowError: as ``set_up``.
        """
        raise CapabilityError(f"A {type(self).__name__} learns from one data set; give --dataset once.")


@dataclass(frozen=True)
class TrainConfig:
    """One training stage.

    Args:
        objective: what is learned. On a command line its fields have no prefix: ``--set policy.n_action_steps=4``.
        lora: adapters to train in place of the pretrained weights; None trains these.
        steps: optimiser steps.
        global_batch_size: observations per optimiser step, over all processes and parts.
        accumulate: parts that a step is split into over all processes, at least; see ``parts``.
        ema_decay: of the weight average that checkpoints hold; None keeps the last weights.
        shift: largest random image shift in pixels; 0 for none.
        augment: erased and sharpened images; None for none.
        state_mask: hidden proprioceptive states; None for none.
        pauses: which actions count as pauses and are left out of the loss; None keeps all.
        interventions: where a data set that keeps executed actions departs from the noted ones, so that those noted afterwards
            are left out of the loss; None keeps all.
        filters: which frames begin no chunk, and which are outliers; None for none.
        max_excluded: largest share of the training actions that these two may leave out, in (0, 1]; above it training is
            refused.
        demonstrations: share of each task's training episodes that is used; the held-out ones stay the same.
        validation_fraction: share of the episodes held out, spread over the tasks; see ``windows.split_episodes``.
        hold_out_tasks: instructions whose episodes are all held out, in place of that share.
        mixture: how several data sets share the samples of a step; nothing for one.
        frames: where frames come from: a cache of raw ones or of JPEGs, or a stream, which decodes them as they are needed.
        normalisation: of the robots of several data sets, by a data set's name, where it differs from the policy's.
        chunk_s: duration of a chunk in seconds, from which each robot's chunk size follows by its rate; None for the chunk size
            of the policy, whatever the rate.
        validate_every, checkpoint_every: steps.
        stop: when to end before the last step; None for never.
        precision: "auto" is bf16 autocast where that is faster: on CUDA, and on CPUs by measurement (``training.precision``).
        seed: of weights, data order and noise.
    """

    objective: Objective = field(metadata=INLINE)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig | None = None
    steps: Count = 1000
    global_batch_size: Count = 64
    accumulate: Count = 1
    ema_decay: Fraction | None = 0.998
    shift: Number = 0
    augment: Augment | None = None
    state_mask: StateMask | None = None
    pauses: PauseRule | None = None
    interventions: InterventionRule | None = INTERVENTIONS
    filters: Filters | None = None
    max_excluded: PositiveShare = 0.5
    demonstrations: PositiveShare = 1.0
    validation_fraction: Fraction = 0.06
    hold_out_tasks: tuple[str, ...] = ()
    mixture: Mixture = field(default_factory=Mixture)
    frames: FrameStorage = "raw"
    normalisation: dict[str, Normalisation] = field(default_factory=dict)
    chunk_s: Positive | None = None
    validate_every: Count = 250
    checkpoint_every: Count = 500
    stop: EarlyStop | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: Seed = 0

    def __post_init__(self) -> None:
        require_ranges(self)
        self.objective.check(self)
        self.parts()

    def episodes(self, dataset: Dataset) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The episodes of a data set for training, and those held out."""
        train, held = split_episodes(dataset, self.validation_fraction, self.seed, self.hold_out_tasks)
        return fewer_episodes(dataset, train, self.demonstrations, self.seed), held

    def parts(self, processes: int = 1, before: int = 1) -> int:
        """How many parts of equal size a step is split into; each process takes as many of them.

        Every part has noise of its own, so a run gives the same losses however its parts are spread over processes.

        Args:
            processes: that train together.
            before: parts of an earlier attempt of the run, which are only ever split further.

        Returns:
            The smallest multiple of ``accumulate``, ``processes`` and ``before``.

        Raises:
            ConfigError: ``global_batch_size`` cannot be split so.
        """
        parts = math.lcm(self.accumulate, processes, before)
        why = f"accumulate {self.accumulate}" + (f" on {processes} processes" if processes > 1 else "")
        require_even(self.global_batch_size, parts, "global_batch_size", why, before)
        return parts
