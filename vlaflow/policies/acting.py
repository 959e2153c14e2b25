"""What every objective that learns from recorded actions shares: the data set opened strictly, and its chunks as samples."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from vlaflow.data.draft import with_spec
from vlaflow.data.exclusions import Exclusions, exclusions
from vlaflow.data.filters import Filtered, filtered
from vlaflow.data.frame_source import FrameSource, FrameStorage, open_frames
from vlaflow.data.lerobot import Dataset
from vlaflow.data.reading import Reading
from vlaflow.data.windows import Windows
from vlaflow.errors import ConfigError, SpecError
from vlaflow.policies.base import Policy, PolicyConfig
from vlaflow.policies.provenance import left_out_by, run_of
from vlaflow.policies.recipe import Base, TrainConfig
from vlaflow.spec import ActionSpec
from vlaflow.text import shortened


def open_actions(root: Path | str, reading: Reading | None = None) -> Dataset:
    """Open a data set of actions; where it does not say what they mean, a spec is drafted (``data.draft``) and noted.

    Raises:
        DataError: it is none, or holds no actions.
    """
    return with_spec(Dataset.open(root, reading=reading))


def stated_spec(dataset: Dataset) -> ActionSpec:
    """The data set's action spec.

    Raises:
        SpecError: it states none.
    """
    if dataset.action_spec is None:
        raise SpecError(
            f"{dataset.root} does not say what its actions mean, and a policy must know. "
            f"Write one (vlaflow data spec {dataset.root} --out FILE{dataset.reading.options}) and give it with "
            "--action-spec FILE."
        )
    return dataset.action_spec


def as_trained(config: TrainConfig, base: Base, data: str, overrides: Iterable[str]) -> TrainConfig:
    """The config with the rules for pauses and interventions by which the policy was trained that it continues.

    Those of other data may mean nothing here, so they are kept where the data are the same.

    Args:
        config: of a stage that continues the policy.
        base: the policy.
        data: fingerprint of what the stage learns from.
        overrides: keys that were set, which stay.
    """
    rules, stated = left_out_by(base.folder), {key.partition(".")[0] for key in overrides}
    if rules is None or run_of(base.folder).get("data") != data:
        return config
    return replace(config, **{each.name: getattr(rules, each.name) for each in fields(rules) if each.name not in stated})


def require_enough(config: TrainConfig, dataset: Dataset, chunk_size: int, stage: str = "") -> Exclusions:
    """How much of the training episodes the config's rules leave out of the loss.

    Args:
        config: the rules, and the largest share they may leave out.
        dataset: what to learn from.
        chunk_size: actions per chunk.
        stage: of a pipeline and a dot, before the keys that the error suggests.

    Raises:
        ConfigError: they leave out more.
    """
    found = exclusions(dataset, config.episodes(dataset)[0], chunk_size, config.pauses, config.interventions)
    if found.total > config.max_excluded:
        keys = {"pauses": found.paused, "interventions": found.intervened}
        largest = max(keys, key=lambda key: keys[key] or 0.0)
        raise ConfigError(
            f"The rules for pauses and interventions leave {found.total:.1%} of the actions of {dataset.root} out of the loss "
            f"({found.shares}), more than max_excluded = {config.max_excluded:g} allows. Keep these actions with --set "
            f"{stage}{largest}=none, or train on the rest with --set {stage}max_excluded=1."
        )
    return found


def print_exclusions(config: TrainConfig, dataset: Dataset, chunk_size: int, name: str = "") -> None:
    """Print what ``require_enough`` found, or raise what it raises; with the data set's name where there are several."""
    found = require_enough(config, dataset, chunk_size)
    before = f"{name}: " if name else ""
    if found.shares:
        sys.stderr.write(f"{before}Left out of the loss, as shares of the actions: {found.shares}.\n")
    if words := filtered(dataset, config.filters).words(config.episodes(dataset)[0], dataset):
        sys.stderr.write(f"{before}{words}.\n")


def chunks_of(
    config: TrainConfig,
    dataset: Dataset,
    chunk_size: int,
    frames: FrameSource,
    code_NK: np.ndarray | None = None,
) -> tuple[Windows, Windows | None]:
    """The chunks of the episodes for training, and those of the held-out ones.

    Args:
        config: which episodes, and the rules for what is left out.
        dataset: the data set.
        chunk_size: actions per chunk.
        frames: at the size the policy sees.
        code_NK: latent action codes by row.
    """
    found = None if config.filters is None else filtered(dataset, config.filters)

    def cut(frames: FrameSource, episodes: tuple[int, ...], left_out: Filtered | None) -> Windows:
        rule = config.interventions
        return Windows(
            dataset, frames, chunk_size, episodes, config.pauses, intervention_rule=rule, code_NK=code_NK, filtered=left_out
        )

    train, held = config.episodes(dataset)
    return cut(frames, train, found), cut(frames.for_few(), held, found and found.outliers_alone()) if held else None


def require_readable(policy: PolicyConfig, dataset: Dataset) -> None:
    """Refuse a data set with an instruction that the backbone cannot read, before anything is trained.

    Raises:
        SpecError: with its episode, and the size that would do.
    """
    limit = policy.backbone.longest_instruction
    if limit is None:
        return
    columns = dataset.columns()
    number_T, row_T = np.unique(columns.task, return_index=True)
    size_T = [len(dataset.tasks[task].encode()) for task in number_T]
    longest = int(np.argmax(size_T))
    if size_T[longest] > limit.size:
        task, needed = dataset.tasks[number_T[longest]], -(-size_T[longest] // 32) * 32
        shown = shortened(task)
        raise SpecError(
            f"The instruction '{shown}' of episode {columns.episode[row_T[longest]]} of {dataset.root} has {size_T[longest]} "
            f"bytes, and the policy reads at most {limit.size}. For a new policy: --set policy.backbone.{limit.key}={needed}"
        )


def policy_frames(
    storage: FrameStorage, policy: Policy, dataset: Dataset, views: Sequence[str], side: int | None = None
) -> FrameSource:
    """A data set's frames at the size that a policy reads.

    Args:
        storage: where they come from.
        policy: the policy.
        dataset: the data set.
        views: of the policy that the data set has.
        side: of squares in pixels that pictures are brought to where the policy reads any size; None keeps their shape.

    Raises:
        ConfigError: views of several sizes.
    """
    sizes = set(policy.model.backbone.views.values())
    if len(sizes) > 1:
        raise ConfigError(f"All views must be read at one size to be stored, got {dict(policy.model.backbone.views)}.")
    return open_frames(storage, dataset, sizes.pop() or side, views, area=policy.config.backbone.input_size.area)
