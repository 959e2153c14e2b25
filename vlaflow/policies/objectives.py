"""What this package's training stages learn: a policy, a confidence rater on a frozen policy, or a latent action model.

    TrainConfig(PolicyObjective(tiny(data)), steps=1000)
    TrainConfig(PolicyObjective(policy, consistency=Consistency()), steps=1000)
    TrainConfig(RaterObjective(tiny_rater(policy)), steps=250)
    TrainConfig(LatentObjective(LatentConfig(), view="front"), steps=1200)

Each says what it needs, builds its networks and samples, and describes the checkpoint; the losses are in ``stages``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from vlaflow.actions.io import named_tokenizer, require_normalisation
from vlaflow.actions.latent import LatentActionModel, LatentConfig, Origin
from vlaflow.actions.nsvq import Replacement
from vlaflow.backbones.base import InputSize
from vlaflow.config import to_json
from vlaflow.data.lerobot import Dataset
from vlaflow.data.pairs import chosen_view
from vlaflow.data.reading import Reading
from vlaflow.data.source import Source
from vlaflow.data.vqa import VqaDataset
from vlaflow.decoders.rating import BaseRaterConfig
from vlaflow.errors import ConfigError
from vlaflow.flows.consistency import Consistency
from vlaflow.flows.sampling import Sampling
from vlaflow.nn.stored import is_shared_later, lay_as, without_memory
from vlaflow.policies.acting import open_actions, require_enough
from vlaflow.policies.base import Policy, PolicyConfig
from vlaflow.policies.card import latent_card, policy_card
from vlaflow.policies.consistency_stage import ConsistencyStage
from vlaflow.policies.dry_run import DryRun, acting, distilling, picturing, rating
from vlaflow.policies.latent_codes import codes_of, fit_codes, require_same_model
from vlaflow.policies.latent_pairs import Paired, action_normalizers, pairs_of
from vlaflow.policies.mixing import (
    Robots,
    alone,
    known_robots,
    mixture_identity,
    normalised_chunks,
    report_exclusions,
    report_jitter,
    require_kept,
    robots_of,
    samples_of,
    timed,
)
from vlaflow.policies.provenance import run_of
from vlaflow.policies.rater_stage import RaterStage, median_error
from vlaflow.policies.recipe import Assets, Base, EarlierStages, Objective, OpenedDataset, Setup, TrainConfig
from vlaflow.policies.stages import AnsweringStage, LatentStage, PolicyStage, Stage
from vlaflow.policies.vqa import VqaTraining, require_askable, vqa_of
from vlaflow.ranges import Count, NotNegative, Positive


@dataclass(frozen=True)
class PolicyObjective(Objective):
    """Backbone and decoder learn to act, from scratch or from the weights of a trained policy.

    Args:
        policy: the assembly.
        vqa: VQA co-training; None for none.
        consistency: learn to act as the trained policy does, in fewer solver steps; None to learn from the actions themselves.
    """

    policy: PolicyConfig
    vqa: VqaTraining | None = None
    consistency: Consistency | None = None

    @property
    def reads_rows(self) -> bool:
        """See ``Objective``; a teacher is read whole."""
        return self.consistency is None

    @property
    def names_codes(self) -> bool:
        """See ``Objective``."""
        return self.policy.decoder.latent_codes is not None

    @property
    def input_size(self) -> InputSize:
        """The backbone's."""
        return self.policy.backbone.input_size

    def used_assets(self, assets: Assets) -> Assets:
        """All of them."""
        return assets

    def with_assets(self, assets: Assets) -> PolicyObjective:
        """A VQA data set brings co-training along."""
        return replace(self, vqa=VqaTraining()) if assets.vqa and self.vqa is None else self

    def require(self, assets: Assets) -> None:
        """Questions and their config belong together."""
        if self.vqa is not None and assets.vqa is None:
            raise ConfigError("This recipe also learns from questions; name a set of them with --vqa, or --set vqa=none.")
        if self.vqa is None and assets.vqa is not None:
            raise ConfigError(f"vqa is none, so {assets.vqa} would not be looked at; leave --vqa out.")
        if assets.base is not None and assets.tokenizer is not None:
            raise _keeps_its_tokenizer(assets.tokenizer)

    def dry_run(self, policy: PolicyConfig | None, side: int) -> DryRun:
        """See ``Objective``."""
        return acting(self.policy, side) if self.consistency is None else distilling(self.policy, self.consistency, side)

    def check_plan(
        self, config: TrainConfig, dataset: Dataset, assets: Assets, before: EarlierStages, stage: str
    ) -> EarlierStages:
        """See ``Objective``."""
        if self.vqa is not None and assets.vqa is not None:
            require_askable(self.policy, VqaDataset.open(assets.vqa, self.vqa.turns))
        if before.policy is not None:
            self.policy.require_continues(before.policy, "the policy of the stage before", stage)
            require_kept(config, "The policy of the stage before")
        require_enough(config, dataset, self.policy.decoder.chunk_size, stage)
        wanted = self.policy.decoder.latent_codes
        if wanted is not None and before.latent is not None:
            fit_codes(before.latent, wanted, "The latent action model of this pipeline", stage)
        return replace(before, policy=self.policy)

    def open(self, root: Path | str, reading: Reading | None = None) -> Dataset:
        """See ``Objective``."""
        return open_actions(root, reading)

    def set_up(self, config: TrainConfig, dataset: Dataset, assets: Assets) -> Setup:
        """See ``Objective``."""
        return self.set_up_several(config, [alone(dataset)], assets)

    def set_up_several(self, config: TrainConfig, datasets: Sequence[OpenedDataset], assets: Assets) -> Setup:
        """See ``Objective``."""
        if assets.base is None:
            objective = self.timed(config, datasets)
            robots = robots_of(objective.policy, config, datasets)
            report_jitter(datasets, robots)
            policy, objective = objective._created(config, datasets, robots, assets.tokenizer)
            identity: dict[str, Any] = {}
        else:
            robots = known_robots(assets.base, config, datasets)
            policy, objective = self._continued(config, assets.base, assets.latent), self
            identity = assets.base.identity()
        report_exclusions(config, datasets, robots, policy)
        stage, what = self._stage(policy, assets.base)
        codes = []
        sources: dict[str, str] = {}
        for each in datasets:
            code_NK, latent = codes_of(policy, each.dataset, assets.latent, config.interventions, config.frames)
            codes.append(code_NK)
            identity |= latent
            if latent:
                sources["Latent actions"] = f"codes of {Path(str(assets.latent)).name}, fingerprint {latent['latent']}"
        samples = samples_of(policy, config, datasets, robots, codes)
        vqa = None
        if self.vqa is not None and assets.vqa is not None:
            vqa, trained, line = vqa_of(policy, self.vqa, assets.vqa)
            stage = AnsweringStage(stage, policy, self.vqa.weight)
            identity["vqa"] = to_json(trained)
            sources = {"VQA": line, **sources}
        identity |= mixture_identity(datasets, samples, robots.names if policy.robots else ())

        def card(training: Sequence[str]) -> str:
            return policy_card(policy, datasets, training, what, sources=sources, weights=samples.weights)

        return samples.setup(objective, stage, vqa, identity, card)

    def _stage(self, policy: Policy, base: Base | None) -> tuple[Stage, str]:
        """What trains it, and what that is called where it continues another policy."""
        if self.consistency is None:
            return PolicyStage(policy), "Further training of the policy"
        if base is None:
            raise ConfigError(
                "Consistency distillation starts from a trained policy. Use a recipe that continues one, such as "
                "asyncvla.consistency, with --policy, or leave consistency out."
            )
        return ConsistencyStage(policy, base.policy, self.consistency), "Consistency distillation of the policy"

    def timed(self, config: TrainConfig, datasets: Sequence[OpenedDataset]) -> PolicyObjective:
        """See ``Objective``."""
        return replace(self, policy=timed(self.policy, config, datasets))

    def create(self, config: TrainConfig, dataset: Dataset) -> Policy:
        """A new policy for a data set: normalisation and tokenizer fitted on its training episodes; no image is read."""
        datasets = [alone(dataset)]
        objective = self.timed(config, datasets)
        return objective._created(config, datasets, robots_of(objective.policy, config, datasets), None)[0]

    def _created(
        self, config: TrainConfig, datasets: Sequence[OpenedDataset], robots: Robots, tokenizer: Path | str | None
    ) -> tuple[Policy, PolicyObjective]:
        policy = self._with_tokenizer(config, datasets, robots, tokenizer)
        fitted = replace(self, policy=replace(policy, backbone=policy.backbone.resolved()))
        first = next(iter(robots.by_name.values()))
        several = robots.by_name if len(robots.by_name) > 1 or first.image_size is not None else None
        return Policy.create(fitted.policy, first.action_spec, first.stats, config.seed, robots=several), fitted

    def _continued(self, config: TrainConfig, base: Base, latent: Path | str | None) -> Policy:
        """A policy with the weights of another one; normalisation stays that one's."""
        if base.policy.model.rater is not None:
            raise ConfigError(
                f"{base.path} has a confidence rater, which would not fit the policy that comes of it; give --policy the "
                "checkpoint that the rater was trained for, and train another rater afterwards."
            )
        self.policy.require_continues(base.policy.config, base.path)
        require_same_model(run_of(base.folder).get("latent"), latent, base.path)
        own = base.policy
        with without_memory() if is_shared_later() else nullcontext():
            created = Policy.create(self.policy, own.action_spec, own.stats, config.seed, folder=base.folder, robots=own.robots)
        further = replace(created, card=own.card)
        try:
            further.model.load_state_dict(base.policy.model.state_dict())
            if is_shared_later():
                lay_as(further.model, base.policy.model)
        except RuntimeError as error:
            raise ConfigError(
                f"The networks of this config are not those of {base.path}, so they cannot start from its weights "
                f"({str(error).splitlines()[-1].strip()}). Leave out the --set that changes them."
            ) from error
        return further

    def _with_tokenizer(
        self, config: TrainConfig, datasets: Sequence[OpenedDataset], robots: Robots, file: Path | str | None
    ) -> PolicyConfig:
        """The assembly with the given tokenizer, or one fitted on the training episodes where its decoder needs one."""
        own, decoder = self.policy, self.policy.decoder
        if file is not None:
            decoder = decoder.with_tokenizer(named_tokenizer(file))
            # afterwards: no other normalisation gives a decoder without tokens a use for it
            require_normalisation(file, own.action_normalisation, own.action_clip, own.kept_actions)
        if decoder.unfitted:
            decoder = decoder.fitted(normalised_chunks(own, config, datasets, robots))
        return replace(own, decoder=decoder)


@dataclass(frozen=True)
class RaterObjective(Objective):
    """A confidence rater learns on a trained policy, whose own weights stay as they are.

    Args:
        rater: its networks.
        labels: "relative", as published: an action's error between the smallest and the largest of its chunk; or "absolute":
            the error itself, on the scale ``rater.error_scale``, which by default is the median on training samples.
        draws: chunks per observation and step, which share its prefix.
        expected: label each action by the mean error over these draws instead of its own chunk's.
        sampling: of the chunks; those of the sampler whose chunks it will rate teach it most.
    """

    rater: BaseRaterConfig
    labels: Literal["relative", "absolute"] = "relative"
    draws: Count = 1
    expected: bool = False
    sampling: Sampling = field(default_factory=Sampling)

    def used_assets(self, assets: Assets) -> Assets:
        """The policy alone."""
        return Assets(assets.base)

    def require(self, assets: Assets) -> None:
        """Nothing but a policy."""
        if assets.vqa is not None:
            raise ConfigError("A rater learns no questions; leave --vqa out.")
        if assets.latent is not None:
            raise ConfigError("A rater learns no latent actions; leave --latent out.")
        if assets.tokenizer is not None:
            raise _keeps_its_tokenizer(assets.tokenizer)

    def dry_run(self, policy: PolicyConfig | None, side: int) -> DryRun:
        """See ``Objective``."""
        if policy is None:
            raise ConfigError("A rater is trained on a trained policy; name its checkpoint with --policy.")
        return rating(policy, self.rater, side, self.draws)

    def check_plan(
        self, config: TrainConfig, dataset: Dataset, assets: Assets, before: EarlierStages, stage: str
    ) -> EarlierStages:
        """See ``Objective``."""
        if before.policy is None:
            return before
        require_enough(config, dataset, before.policy.decoder.chunk_size, stage)
        return replace(before, policy=replace(before.policy, rater=self.rater))

    def open(self, root: Path | str, reading: Reading | None = None) -> Dataset:
        """See ``Objective``."""
        return open_actions(root, reading)

    def set_up(self, config: TrainConfig, dataset: Dataset, assets: Assets) -> Setup:
        """See ``Objective``; the same seed and fraction hold out the same episodes as the policy's training did."""
        return self.set_up_several(config, [alone(dataset)], assets)

    def set_up_several(self, config: TrainConfig, datasets: Sequence[OpenedDataset], assets: Assets) -> Setup:
        """See ``Objective``."""
        base = assets.base
        if base is None:
            raise ConfigError("A rater is trained on a trained policy; name its checkpoint with --policy.")
        if self.labels == "relative" and self.rater.error_scale is not None:
            raise ConfigError("rater.error_scale belongs to absolute labels; add --set labels=absolute, or leave it out.")
        robots = known_robots(base, config, datasets)
        samples = samples_of(base.policy, config, datasets, robots, [None] * len(datasets))
        objective = self._scaled(base.policy, samples.train, config.seed)
        policy = base.policy.with_rater(objective.rater, config.seed)
        report_exclusions(config, datasets, robots, policy)

        def card(training: Sequence[str]) -> str:
            return policy_card(policy, datasets, training, "Training of the confidence rater", weights=samples.weights)

        known = robots.names if policy.robots else ()
        identity = base.identity() | mixture_identity(datasets, samples, known)
        stage = RaterStage(policy, self.sampling, self.draws, expected=self.expected)
        return samples.setup(objective, stage, None, identity, card)

    def _scaled(self, policy: Policy, train: Source, seed: int) -> RaterObjective:
        """The objective with the scale of absolute labels, measured where it is not stated."""
        if self.labels == "relative" or self.rater.error_scale is not None:
            return self
        self.rater.with_error_scale(1.0)  # refused before anything is measured where there is no such scale
        return replace(self, rater=self.rater.with_error_scale(median_error(policy, train, self.sampling, seed)))


@dataclass(frozen=True)
class LatentObjective(Objective):
    """A latent action model learns from video alone; actions are only read where it has an action head.

    Args:
        model: the networks.
        view: the camera view it looks at.
        gap_s: time between the frames of a pair in seconds; pairs that would cross the end of an episode are not formed.
        replacement: of codebook entries that are hardly used.
        action_weight: of the action head's squared error (normalised actions) relative to that of the pixels (in [−1, 1]).
    """

    model: LatentConfig
    view: str
    gap_s: Positive = 1.0
    replacement: Replacement = field(default_factory=Replacement)
    action_weight: NotNegative = 0.01
    makes: ClassVar[Literal["policy", "latent"]] = "latent"

    def check(self, config: TrainConfig) -> None:
        """See ``Objective``."""
        if config.shift or config.augment or config.state_mask or config.pauses or config.filters:
            raise ConfigError(
                "A latent action model's frames are taken as they are: leave out shift, augment, state_mask, pauses, filters."
            )
        if config.chunk_s is not None or config.normalisation:
            raise ConfigError(
                "A latent action model has no chunks and no normalisation to choose: leave out --chunk-seconds (chunk_s) and "
                "normalisation."
            )

    @property
    def input_size(self) -> InputSize:
        """The model's."""
        return InputSize(self.model.image_size)

    def used_assets(self, assets: Assets) -> Assets:
        """None."""
        return Assets()

    def require(self, assets: Assets) -> None:
        """Nothing."""
        if assets.base is not None:
            raise ConfigError("A latent action model starts from video alone; leave --policy out.")
        if assets.tokenizer is not None:
            raise ConfigError(f"A latent action model has no use for the action tokenizer {assets.tokenizer}; leave it out.")
        for flag, given in (("--latent", assets.latent), ("--vqa", assets.vqa)):
            if given is not None:
                raise ConfigError(f"A latent action model learns from video alone; leave {flag} {given} out.")

    def dry_run(self, policy: PolicyConfig | None, side: int) -> DryRun:
        """See ``Objective``."""
        return picturing(self.model)

    def check_plan(
        self, config: TrainConfig, dataset: Dataset, assets: Assets, before: EarlierStages, stage: str
    ) -> EarlierStages:
        """See ``Objective``."""
        return replace(before, latent=self.model)

    def open(self, root: Path | str, reading: Reading | None = None) -> Dataset:
        """See ``Objective``."""
        return Dataset.open(root, video=True, reading=reading)

    def set_up(self, config: TrainConfig, dataset: Dataset, assets: Assets) -> Setup:
        """See ``Objective``; a view that is missing and episodes that are all too short for the gap are a ``DataError``."""
        return self.set_up_several(config, [alone(dataset)], assets)

    def set_up_several(self, config: TrainConfig, datasets: Sequence[OpenedDataset], assets: Assets) -> Setup:
        """See ``Objective``; a data set without the view shows its first one, but one of them must have it."""
        if not any(self.view in each.dataset.views for each in datasets):
            chosen_view(datasets[0].dataset, self.view)
        samples, first = pairs_of(Paired(self.view, self.gap_s, self.model.image_size), config, datasets)
        others = tuple(each.dataset.fingerprint for each in datasets[1:])
        dataset = datasets[0].dataset
        origin = Origin(
            dataset.fingerprint,
            self.view,
            dataset.fps,
            self.gap_s,
            first.gap,
            config.validation_fraction,
            config.seed,
            others,
            config.hold_out_tasks,
        )
        action = action_normalizers(self.model.action_dim, config, datasets)
        model = LatentActionModel.create(self.model, origin, config.seed)
        stage = LatentStage(model, self.replacement, config.steps, action, self.action_weight)

        def card(training: Sequence[str]) -> str:
            return latent_card(model, datasets, training)

        return samples.setup(self, stage, None, mixture_identity(datasets, samples), card)


def _keeps_its_tokenizer(given: Path | str) -> ConfigError:
    return ConfigError(f"A checkpoint keeps the tokenizer it was trained with; leave --tokenizer {given} out.")
