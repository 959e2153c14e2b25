"""From a recipe's name and a data set to a trained checkpoint: what ``vlaflow train`` and ``vlaflow demo`` call.

outcome = train("asyncvla.demo", "runs/demo/dataset", "runs/demo/policy")
outcome = train("asyncvla.rater", "runs/demo/dataset", "runs/demo/rated", policy="runs/demo/policy")
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vlaflow.actions.bins import BinsFit
from vlaflow.actions.fast import FastFit
from vlaflow.actions.files import load_tokenizer
from vlaflow.config import override
from vlaflow.data import stats
from vlaflow.data.frames import FrameCache
from vlaflow.data.lerobot import Dataset
from vlaflow.data.pictures import PictureCache, Questions
from vlaflow.data.questions import QuestionSet
from vlaflow.data.stats import FeatureStats
from vlaflow.data.transforms import Normalizer
from vlaflow.data.windows import Windows, action_chunks, fewer_episodes, split_episodes
from vlaflow.decoders.tokens import TokenConfig
from vlaflow.errors import ConfigError, SpecError
from vlaflow.policies.base import Policy
from vlaflow.policies.checkpoint import fingerprint, local_folder
from vlaflow.policies.recipe import DataSpec, QuestionTraining, TrainConfig
from vlaflow.spec import ActionSpec
from vlaflow.training.card import model_card
from vlaflow.training.journal import Tracker
from vlaflow.training.precision import training_threads
from vlaflow.training.recipes import find_recipe
from vlaflow.training.stages import AnsweringStage, PolicyStage, RaterStage, Stage
from vlaflow.training.trainer import Outcome, Trainer
from vlaflow.versions import command_line


@dataclass(frozen=True)
class Options:
    """What a run may be told besides recipe, data and place.

    Args:
        overrides: values by dotted key of the ``TrainConfig``, as text: {"optim.learning_rate": "3e-4"}.
        tracker: where the log goes besides ``training/log.jsonl``.
        fresh: start anew; an old checkpoint is moved aside.
        command: for the model card; the process's own command line by default.
        questions: file or folder of a question set to learn from beside (docs/qa.md).
        tokenizer: file of a fitted action tokenizer, for decoders of tokens; by default one is fitted.
        threads: CPU threads; by default OMP_NUM_THREADS, or the physical cores.
    """

    overrides: Mapping[str, str] | None = None
    tracker: Tracker = "auto"
    fresh: bool = False
    command: str | None = None
    questions: Path | str | None = None
    tokenizer: Path | str | None = None
    threads: int | None = None


def train(
    recipe: str, dataset: Path | str, out: Path | str, *, policy: Path | str | None = None, options: Options | None = None
) -> Outcome:
    """Train by recipe; continues an unfinished run of the same recipe, data and config in ``out``.

    Args:
        recipe: name, e.g. "asyncvla.demo".
        dataset: folder of a LeRobot data set that states an action spec.
        out: folder of the checkpoint.
        policy: checkpoint to continue, for recipes that need one (raters).
        options: see ``Options``.

    Raises:
        VlaflowError: whatever the user can mend, in a sentence.
    """
    found, opened = find_recipe(recipe), Dataset.open(dataset)
    if found.continues:
        if policy is None:
            raise ConfigError(f"The recipe '{recipe}' continues a trained policy; name its checkpoint with --policy.")
        base = Policy.from_pretrained(policy)
        return train_rater(base, found.call(base.config), opened, out, name=recipe, policy_path=policy, options=options)
    if policy is not None:
        raise ConfigError(f"The recipe '{recipe}' starts from scratch; leave --policy out, or choose a rater's recipe.")
    return train_policy(found.call(data_spec(opened)), opened, out, name=recipe, options=options)


def data_spec(dataset: Dataset) -> DataSpec:
    """The shape of a data set, as recipes take it."""
    spec, columns = _action_spec(dataset), dataset.columns()
    return DataSpec(columns.state.shape[1], spec.dim, tuple(dataset.views))


def train_policy(
    config: TrainConfig, dataset: Dataset, out: Path | str, *, name: str, options: Options | None = None
) -> Outcome:
    """Train backbone and decoder from scratch.

    Args:
        config: a recipe's, with ``policy`` set.
        dataset: what to learn from.
        out: folder of the checkpoint.
        name: the recipe's name, for the model card.
        options: see ``Options``.
    """
    config = _overridden(config, options)
    if config.policy is None:
        raise ConfigError(f"'{name}' trains a rater; give it a trained policy with --policy.")
    spec = _action_spec(dataset)
    train_episodes, _ = _episodes(dataset, config)
    if not dataset.columns().state.shape[1]:
        raise SpecError(f"{dataset.root} has no 'observation.state', which the policy reads. Record one, or add it.")
    measured = stats.compute(dataset, train_episodes)
    config = _with_tokenizer(config, dataset, measured["action"], train_episodes, options)
    assert config.policy is not None
    policy = Policy.create(config.policy, spec, measured, config.seed)
    stage: Stage = PolicyStage(policy)
    if config.questions is not None:
        stage = AnsweringStage(stage, policy, config.questions.weight)
    return _train(stage, policy, config, dataset, Path(out), name=name, identity={}, options=options or Options())


def train_rater(
    policy: Policy,
    config: TrainConfig,
    dataset: Dataset,
    out: Path | str,
    *,
    name: str,
    policy_path: Path | str,
    options: Options | None = None,
) -> Outcome:
    """Add a rater to a trained policy and train it; the policy's own weights stay as they are.

    Args:
        policy: the trained policy.
        config: a recipe's, with ``rater`` set.
        dataset: of the same robot; the same seed and fraction hold out the same episodes as the policy's training did.
        out: folder of the new checkpoint.
        name: the recipe's name, for the model card.
        policy_path: where the policy was opened.
        options: see ``Options``.
    """
    config = _overridden(config, options)
    if config.rater is None:
        raise ConfigError(f"'{name}' trains a policy from scratch; leave --policy out.")
    if options is not None and options.questions is not None:
        raise ConfigError("A rater learns no questions; leave --qa out.")
    policy.action_spec.require_match(_action_spec(dataset), f"checkpoint {policy_path}", f"data set {dataset.root}")
    if Path(out).resolve() == Path(policy_path).resolve():
        raise ConfigError(f"--out and --policy are both {out}; give the rated policy a folder of its own.")
    rated = policy.with_rater(config.rater, config.seed)
    base = {"policy": fingerprint(local_folder(policy_path))}
    return _train(RaterStage(rated), rated, config, dataset, Path(out), name=name, identity=base, options=options or Options())


def _train(
    stage: Stage,
    policy: Policy,
    config: TrainConfig,
    dataset: Dataset,
    out: Path,
    *,
    name: str,
    identity: Mapping[str, Any],
    options: Options,
) -> Outcome:
    torch.set_num_threads(options.threads or training_threads())
    train_episodes, held_episodes = _episodes(dataset, config)
    views = policy.model.backbone.views
    sizes = set(views.values())
    if len(sizes) > 1:
        raise ConfigError(f"All views must be read at one size to be cached, got {dict(views)}.")
    cache = FrameCache.open(dataset, sizes.pop(), list(views))
    horizon = policy.config.decoder.horizon
    windows = Windows(dataset, cache, horizon, episodes=train_episodes, pause_rule=config.pauses)
    held = None
    if held_episodes:
        held = Windows(dataset, cache, horizon, episodes=held_episodes, pause_rule=config.pauses)
    asked = _questions(policy, config, options.questions) if config.questions is not None else None
    command = options.command or command_line()

    def card(outcome: Outcome) -> str:
        counts = {"train": len(train_episodes), "held": len(held_episodes)}
        words = asked.words if asked is not None else ""
        return model_card(policy, config, dataset, outcome, recipe=name, command=command, questions=words, **counts)

    trainer = Trainer(
        stage,
        config,
        windows,
        held,
        out,
        questions=(asked.train, asked.held) if asked is not None else None,
        identity={"recipe": name, "data": dataset.fingerprint, **(asked.identity if asked is not None else {}), **identity},
        card=card,
        tracker=options.tracker,
        fresh=options.fresh,
    )
    if trainer.aside is not None:
        sys.stderr.write(f"The old checkpoint is now {trainer.aside}.\n")
    if 0 < trainer.step < config.steps:
        sys.stderr.write(f"Continuing after step {trainer.step} of {config.steps}.\n")
    return trainer.run()


@dataclass(frozen=True)
class _Asked:
    """The questions of a run: those to train on, those held out, and what to say of them."""

    train: Questions
    held: Questions | None
    words: str
    identity: Mapping[str, Any]


def _questions(policy: Policy, config: TrainConfig, path: Path | str | None) -> _Asked:
    asks, views = config.questions, policy.model.backbone.views
    assert asks is not None
    assert path is not None
    found = QuestionSet.open(path, asks.turns)
    pictures = PictureCache.open(found, next(iter(views.values())) or asks.size)
    state_dim = len(policy.stats["state"].mean)
    train, held = (
        Questions(found, pictures, tuple(views), state_dim, part) if part else None for part in found.split(asks.held_out)
    )
    assert train is not None  # a part of every set stays
    words = (
        f"{found.root.name}, {len(train)} for training, {len(held or ())} held out, on {asks.share:g} of the steps, "
        f"fingerprint {found.fingerprint}"
    )
    return _Asked(train, held, words, {"questions": found.fingerprint})


def _episodes(dataset: Dataset, config: TrainConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For training and held out."""
    train_episodes, held_episodes = split_episodes(dataset, config.validation_fraction, config.seed)
    return fewer_episodes(dataset, train_episodes, config.demonstrations, config.seed), held_episodes


def _with_tokenizer(
    config: TrainConfig, dataset: Dataset, action: FeatureStats, episodes: Sequence[int], options: Options | None
) -> TrainConfig:
    """The config with the tokenizer of ``options``, or one fitted on the episodes where its decoder needs one."""
    policy, file = config.policy, options.tokenizer if options else None
    if policy is None or not isinstance(policy.decoder, TokenConfig):
        if file is not None:
            raise ConfigError(f"This recipe's decoder has no vocabulary, so it cannot use the tokenizer {file}.")
        return config
    decoder, mode = policy.decoder, policy.action_normalisation
    if file is not None:
        decoder = replace(decoder, tokenizer=load_tokenizer(Path(file), mode))
    elif isinstance(decoder.tokenizer, FastFit | BinsFit):
        chunks = torch.from_numpy(action_chunks(dataset, decoder.horizon, episodes))
        decoder = decoder.fitted(Normalizer.from_stats(action, mode).forward(chunks).numpy())
    return replace(config, policy=replace(policy, decoder=decoder))


def _overridden(config: TrainConfig, options: Options | None) -> TrainConfig:
    """The config with the run's own values; a question set brings ``QuestionTraining`` along, which they may change."""
    options = options or Options()
    if options.questions is not None and config.questions is None and config.policy is not None:
        config = replace(config, questions=QuestionTraining())
    config = override(config, options.overrides) if options.overrides else config
    if config.questions is not None and options.questions is None:
        raise ConfigError("This recipe also learns from questions; name a set of them with --qa, or --set questions=none.")
    if config.questions is None and options.questions is not None and config.policy is not None:
        raise ConfigError(f"questions is none, so {options.questions} would not be looked at; leave --qa out.")
    return config


def _action_spec(dataset: Dataset) -> ActionSpec:
    if dataset.action_spec is None:
        raise SpecError(
            f"{dataset.root} does not say what its actions mean, and a policy must know. "
            f"Add an action spec to its meta/info.json (docs/datasets.md), or open it with Dataset.open(root, action_spec=...)."
        )
    return dataset.action_spec
