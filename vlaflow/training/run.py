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

import numpy as np
import torch

from vlaflow.actions.files import load_tokenizer
from vlaflow.actions.latent import LatentActionModel, Origin
from vlaflow.config import override
from vlaflow.data import stats
from vlaflow.data.frames import FrameCache
from vlaflow.data.lerobot import Dataset
from vlaflow.data.pairs import FramePairs, chosen_view
from vlaflow.data.stats import FeatureStats
from vlaflow.data.transforms import Normalizer
from vlaflow.data.windows import Windows, action_chunks, fewer_episodes, split_episodes
from vlaflow.decoders.latent_flow import LatentFlowConfig
from vlaflow.decoders.tokens import TokenConfig
from vlaflow.errors import ConfigError, SpecError
from vlaflow.policies.base import Policy
from vlaflow.policies.checkpoint import fingerprint, local_folder
from vlaflow.policies.iflybot.codes import dataset_codes
from vlaflow.policies.recipe import DataSpec, TrainConfig, VideoSpec
from vlaflow.progress import progress
from vlaflow.spec import ActionSpec
from vlaflow.training.card import latent_card, model_card
from vlaflow.training.journal import Tracker
from vlaflow.training.precision import training_threads
from vlaflow.training.recipes import Recipe, find_recipe
from vlaflow.training.stages import LatentStage, PolicyStage, RaterStage, Stage
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
        tokenizer: file of a fitted action tokenizer, for decoders of tokens; by default one is fitted.
        latent: folder of a latent action model, for decoders that learn to name its codes.
        threads: CPU threads; by default OMP_NUM_THREADS, or the physical cores.
    """

    overrides: Mapping[str, str] | None = None
    tracker: Tracker = "auto"
    fresh: bool = False
    command: str | None = None
    tokenizer: Path | str | None = None
    latent: Path | str | None = None
    threads: int | None = None


def train(
    recipe: str, dataset: Path | str, out: Path | str, *, policy: Path | str | None = None, options: Options | None = None
) -> Outcome:
    """Train by recipe; continues an unfinished run of the same recipe, data and config in ``out``.

    Args:
        recipe: name, e.g. "asyncvla.demo".
        dataset: folder of a LeRobot data set that states an action spec; for a latent action model any with video.
        out: folder of the checkpoint.
        policy: checkpoint to continue, for recipes that need one (raters, later stages).
        options: see ``Options``.

    Raises:
        VlaflowError: whatever the user can mend, in a sentence.
    """
    found = find_recipe(recipe)
    if found.several:
        if policy is not None:
            raise ConfigError(f"The recipe '{recipe}' starts from scratch; leave --policy out.")
        return train_pipeline(found, dataset, Path(out), options or Options())
    if found.from_video:
        if policy is not None:
            raise ConfigError(f"The recipe '{recipe}' starts from video alone; leave --policy out.")
        opened = Dataset.open(dataset, video=True)
        return train_latent(found.call(video_spec(opened)), opened, out, name=recipe, options=options)
    opened = Dataset.open(dataset)
    if found.continues:
        if policy is None:
            raise ConfigError(f"The recipe '{recipe}' continues a trained policy; name its checkpoint with --policy.")
        base = Policy.from_pretrained(policy)
        config = found.call(base.config)
        further = train_rater if config.rater is not None else train_further
        return further(base, config, opened, out, name=recipe, policy_path=policy, options=options)
    if policy is not None:
        raise ConfigError(f"The recipe '{recipe}' starts from scratch; leave --policy out, or choose one that continues.")
    return train_policy(found.call(data_spec(opened)), opened, out, name=recipe, options=options)


def train_pipeline(pipeline: Recipe, dataset: Path | str, out: Path, options: Options) -> Outcome:
    """Every stage of a pipeline, continued where it was left; each gets the checkpoints of the ones before it.

    Overrides name their stage first: {"joint.steps": "500"}.

    Raises:
        ConfigError: for an override that names no stage.
    """
    names = [stage.__name__ for stage in pipeline.call().stages]
    for key in options.overrides or ():
        if key.partition(".")[0] not in names:
            raise ConfigError(
                f"'{pipeline.name}' has several stages; say which '{key}' is for, e.g. --set {names[-1]}.{key}=..."
            )
    policy: Path | None = None
    for name in names:
        stage, folder = find_recipe(f"{pipeline.system}.{name}"), out if name == names[-1] else out / name
        own = {k.partition(".")[2]: v for k, v in (options.overrides or {}).items() if k.partition(".")[0] == name}
        mine = replace(options, overrides=own, latent=None if stage.from_video else options.latent)
        sys.stderr.write(f"Stage {names.index(name) + 1} of {len(names)}: {stage.name} into {folder}\n")
        outcome = train(stage.name, dataset, folder, policy=policy if stage.continues else None, options=mine)
        if outcome.signal is not None:
            break
        if stage.from_video:
            options = replace(options, latent=folder)
        else:
            policy = folder
    return outcome


def data_spec(dataset: Dataset) -> DataSpec:
    """The shape of a data set, as recipes take it."""
    spec, columns = _action_spec(dataset), dataset.columns()
    return DataSpec(columns.state.shape[1], spec.dim, tuple(dataset.views))


def video_spec(dataset: Dataset) -> VideoSpec:
    """The shape of a data set of video, as recipes of latent action models take it.

    Raises:
        DataError: no camera.
    """
    chosen_view(dataset, None)
    return VideoSpec(tuple(dataset.views), dataset.columns().action.shape[1])


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
    return _train(PolicyStage(policy), policy, config, dataset, Path(out), name=name, identity={}, options=options or Options())


def train_further(
    policy: Policy,
    config: TrainConfig,
    dataset: Dataset,
    out: Path | str,
    *,
    name: str,
    policy_path: Path | str,
    options: Options | None = None,
) -> Outcome:
    """Train a policy further, by a config whose networks have the same weights; normalisation stays the checkpoint's.

    Args:
        policy: the trained policy.
        config: a recipe's, with ``policy`` set.
        dataset: of the same robot.
        out: folder of the new checkpoint.
        name: the recipe's name, for the model card.
        policy_path: where the policy was opened.
        options: see ``Options``.

    Raises:
        ConfigError: when the config's networks are others than the checkpoint's.
    """
    config = _overridden(config, options)
    if config.policy is None:
        raise ConfigError(f"'{name}' does not train a policy.")
    policy.action_spec.require_match(_action_spec(dataset), f"checkpoint {policy_path}", f"data set {dataset.root}")
    if Path(out).resolve() == Path(policy_path).resolve():
        raise ConfigError(f"--out and --policy are both {out}; give the new checkpoint a folder of its own.")
    further = Policy.create(config.policy, policy.action_spec, policy.stats, config.seed)
    try:
        further.model.load_state_dict(policy.model.state_dict())
    except RuntimeError as error:
        raise ConfigError(
            f"The networks of '{name}' are not those of {policy_path}, so they cannot start from its weights "
            f"({str(error).splitlines()[-1].strip()}). Leave out the --set that changes them."
        ) from error
    base = {"policy": fingerprint(local_folder(policy_path))}
    return _train(
        PolicyStage(further), further, config, dataset, Path(out), name=name, identity=base, options=options or Options()
    )


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
    code_NK, latent = _codes(policy, dataset, options.latent)
    identity = {**identity, **latent}
    windows = Windows(dataset, cache, horizon, episodes=train_episodes, pause_rule=config.pauses, code_NK=code_NK)
    held = None
    if held_episodes:
        held = Windows(dataset, cache, horizon, episodes=held_episodes, pause_rule=config.pauses, code_NK=code_NK)
    command = options.command or command_line()

    def card(outcome: Outcome) -> str:
        counts = {"train": len(train_episodes), "held": len(held_episodes)}
        return model_card(policy, config, dataset, outcome, recipe=name, command=command, **counts)

    run = {"recipe": name, "data": dataset.fingerprint, **identity}
    return _finish(
        Trainer(stage, config, windows, held, out, identity=run, card=card, tracker=options.tracker, fresh=options.fresh)
    )


def train_latent(
    config: TrainConfig, dataset: Dataset, out: Path | str, *, name: str, options: Options | None = None
) -> Outcome:
    """Train a latent action model from a data set's video; actions are only read where the model has an action head.

    Args:
        config: a recipe's, with ``latent`` set.
        dataset: what to learn from.
        out: folder of the checkpoint.
        name: the recipe's name, for the model card.
        options: see ``Options``.

    Raises:
        DataError: no such view, or episodes that are all too short for the gap.
    """
    config, options = _overridden(config, options), options or Options()
    if config.latent is None:
        raise ConfigError(f"'{name}' does not train a latent action model.")
    if options.tokenizer is not None:
        raise ConfigError(f"A latent action model has no use for the action tokenizer {options.tokenizer}; leave it out.")
    torch.set_num_threads(options.threads or training_threads())
    latent = config.latent
    train_episodes, held_episodes = _episodes(dataset, config)
    cache = FrameCache.open(dataset, latent.model.image_size, [chosen_view(dataset, latent.view)])
    pairs = FramePairs(dataset, cache, latent.view, latent.gap_s, episodes=train_episodes)
    held = FramePairs(dataset, cache, latent.view, latent.gap_s, episodes=held_episodes) if held_episodes else None
    for which, one in (("For training", pairs), ("Held out", held)):
        if one is not None and one.short:
            sys.stderr.write(f"{which}: {one.left_out()}\n")
    action = None
    if latent.model.action_dim:
        found = dataset.columns().action.shape[1]
        if found != latent.model.action_dim:
            raise SpecError(
                f"latent.model.action_dim is {latent.model.action_dim}, but the actions of {dataset.root} have {found} "
                "dimensions."
            )
        action = Normalizer.from_stats(stats.compute(dataset, train_episodes)["action"], "mean_std")
    division = (config.validation_fraction, config.seed)
    origin = Origin(dataset.fingerprint, latent.view, dataset.fps, latent.gap_s, pairs.gap, *division)
    model = LatentActionModel.create(latent.model, origin, config.seed)
    stage = LatentStage(model, latent, config.steps, action)
    command = options.command or command_line()

    def card(outcome: Outcome) -> str:
        counts = {"train": len(train_episodes), "held": len(held_episodes)}
        return latent_card(model, config, dataset, outcome, recipe=name, command=command, **counts)

    run = {"recipe": name, "data": dataset.fingerprint}
    return _finish(
        Trainer(stage, config, pairs, held, Path(out), identity=run, card=card, tracker=options.tracker, fresh=options.fresh)
    )


def _finish(trainer: Trainer) -> Outcome:
    """Run it, saying first what it finds in its folder."""
    if trainer.aside is not None:
        sys.stderr.write(f"The old checkpoint is now {trainer.aside}.\n")
    if 0 < trainer.step < trainer.config.steps:
        sys.stderr.write(f"Continuing after step {trainer.step} of {trainer.config.steps}.\n")
    return trainer.run()


def _codes(policy: Policy, dataset: Dataset, path: Path | str | None) -> tuple[np.ndarray | None, dict[str, str]]:
    """Latent actions by row for a decoder that learns to name them, and the model they are from, for the run's identity."""
    decoder = policy.config.decoder
    wants = isinstance(decoder, LatentFlowConfig) and decoder.teaches
    if not wants:
        if path is not None:
            raise ConfigError(f"This recipe's decoder names no latent actions, so it cannot use {path}; leave --latent out.")
        return None, {}
    assert isinstance(decoder, LatentFlowConfig)
    if path is None:
        raise ConfigError(
            "This decoder learns to name latent actions; give it a latent action model with --latent (train one: vlaflow train "
            "iflybot.latent --dataset DIR --out DIR), or --set policy.decoder.teaches=false."
        )
    model = LatentActionModel.from_pretrained(path)
    theirs, ours = (model.config.codes, model.config.book), (decoder.latent.codes, decoder.latent.book)
    if theirs != ours:
        raise ConfigError(
            f"{path} has {theirs[0]} codes of a book of {theirs[1]}, the decoder {ours[0]} of {ours[1]}. "
            f"--set policy.decoder.latent.codes={theirs[0]} --set policy.decoder.latent.book={theirs[1]}"
        )
    with progress(len(dataset), "Latent actions") as bar:
        done = 0

        def tell(now: int, total: int) -> None:
            nonlocal done
            bar.advance(now - done)
            done = now

        codes = dataset_codes(model, dataset, progress=tell)
    return codes.id_NK, {"latent": model.fingerprint()}


def _episodes(dataset: Dataset, config: TrainConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For training and held out."""
    train_episodes, held_episodes = split_episodes(dataset, config.validation_fraction, config.seed)
    return fewer_episodes(dataset, train_episodes, config.demonstrations, config.seed), held_episodes


def _with_tokenizer(
    config: TrainConfig, dataset: Dataset, action: FeatureStats, episodes: Sequence[int], options: Options | None
) -> TrainConfig:
    """The config with the tokenizer of ``options``, or one fitted on the episodes where its decoder needs one."""
    policy, file = config.policy, options.tokenizer if options else None
    if policy is None or not isinstance(policy.decoder, TokenConfig | LatentFlowConfig):
        if file is not None:
            raise ConfigError(f"This recipe's decoder has no vocabulary, so it cannot use the tokenizer {file}.")
        return config
    decoder, mode = policy.decoder, policy.action_normalisation
    if file is not None:
        decoder = decoder.with_tokenizer(load_tokenizer(Path(file), mode))
    elif decoder.unfitted:
        chunks = torch.from_numpy(action_chunks(dataset, decoder.horizon, episodes))
        decoder = decoder.fitted(Normalizer.from_stats(action, mode).forward(chunks).numpy())
    return replace(config, policy=replace(policy, decoder=decoder))


def _overridden(config: TrainConfig, options: Options | None) -> TrainConfig:
    return override(config, options.overrides) if options and options.overrides else config


def _action_spec(dataset: Dataset) -> ActionSpec:
    if dataset.action_spec is None:
        raise SpecError(
            f"{dataset.root} does not say what its actions mean, and a policy must know. "
            f"Add an action spec to its meta/info.json (docs/datasets.md), or open it with Dataset.open(root, action_spec=...)."
        )
    return dataset.action_spec
