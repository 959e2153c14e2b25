"""From a recipe's name and a data set to a trained checkpoint: what ``vlaflow train`` and ``vlaflow demo`` call."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlaflow.actions.io import load_tokenizer
from vlaflow.data import stats
from vlaflow.data.frames import FrameCache
from vlaflow.data.lerobot import Dataset
from vlaflow.data.stats import FeatureStats
from vlaflow.data.transforms import Normalizer
from vlaflow.data.windows import Windows, action_chunks
from vlaflow.errors import ConfigError, SpecError
from vlaflow.io import require_makeable
from vlaflow.packages import require
from vlaflow.policies.base import Policy
from vlaflow.policies.checkpoint import local_folder
from vlaflow.policies.provenance import ancestry, fingerprint, run_of
from vlaflow.policies.recipe import TrainConfig
from vlaflow.training.card import model_card
from vlaflow.training.latents import codes_of, require_same_model, train_latent, video_spec
from vlaflow.training.options import Options, data_spec, episodes_of, finish, overridden, require_enough, stated_spec
from vlaflow.training.pipeline import plan, start_over
from vlaflow.training.precision import training_threads
from vlaflow.training.recipes import Recipe, find_recipe
from vlaflow.training.stages import AnsweringStage, PolicyStage, RaterStage, Stage
from vlaflow.training.trainer import Outcome, Trainer
from vlaflow.training.vqa import vqa_of
from vlaflow.versions import command_line


def train(
    recipe: str, dataset: Path | str, out: Path | str, *, policy: Path | str | None = None, options: Options | None = None
) -> Outcome:
    """Train by recipe; continues an unfinished run of the same recipe, data and config in ``out``.

    >>> vlaflow.train("asyncvla.demo", "runs/demo/dataset", "runs/demo/policy")
    >>> vlaflow.train("asyncvla.rater", "runs/demo/dataset", "runs/demo/rated", policy="runs/demo/policy")

    Other values go into ``options``: ``vlaflow.training.options.Options({"optim.learning_rate": "3e-4"})``.

    Args:
        recipe: name, e.g. "asyncvla.demo".
        dataset: folder of a LeRobot data set that states an action spec; for a latent action model any with video.
        out: folder of the checkpoint.
        policy: checkpoint to continue, for recipes that need one (raters, later stages).
        options: see ``Options``.

    Raises:
        VlaflowError: whatever the user can fix, in a sentence.
    """
    found = find_recipe(recipe)
    require("accelerate", "psutil", what="Training")
    require_makeable(Path(out))
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
        VlaflowError: see ``pipeline.plan``; nothing is trained then.
    """
    stages = plan(pipeline, dataset, out, options)
    if options.fresh:
        start_over(stages)
    policy: Path | None = None
    latent: Path | None = None
    for number, stage in enumerate(stages, 1):
        recipe, mine = stage.recipe, replace(stage.options, latent=latent if stage.names_codes else None)
        sys.stderr.write(f"Stage {number} of {len(stages)}: {recipe.name} into {stage.folder}\n")
        outcome = train(recipe.name, dataset, stage.folder, policy=policy if recipe.continues else None, options=mine)
        if outcome.signal is not None:
            return replace(outcome, more=number < len(stages))
        if recipe.from_video:
            latent = stage.folder
        else:
            policy = stage.folder
    return outcome


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
    config = overridden(config, options)
    if config.policy is None:
        raise ConfigError(f"'{name}' trains a rater; give it a trained policy with --policy.")
    spec = stated_spec(dataset)
    train_episodes, _ = episodes_of(dataset, config)
    if not dataset.columns().state.shape[1]:
        raise SpecError(f"{dataset.root} has no 'observation.state', which the policy reads. Record one, or add it.")
    measured = stats.compute(dataset, train_episodes)
    config = _with_tokenizer(config, dataset, measured["action"], train_episodes, options)
    assert config.policy is not None
    policy = Policy.create(config.policy, spec, measured, config.seed)
    stage = _policy_stage(policy, config)
    return _train(stage, policy, config, dataset, Path(out), name=name, identity={}, options=options or Options())


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
    config = overridden(config, options)
    if config.policy is None:
        raise ConfigError(f"'{name}' does not train a policy.")
    _require_continuable(policy, dataset, Path(out), Path(policy_path), options)
    if policy.model.rater is not None:
        raise ConfigError(
            f"{policy_path} has a confidence rater, which would not fit the policy that comes of it; give --policy the "
            "checkpoint that the rater was trained for, and train another rater afterwards."
        )
    for key in ("state_normalisation", "action_normalisation"):
        ours, theirs = getattr(config.policy, key), getattr(policy.config, key)
        if ours != theirs:
            raise ConfigError(
                f"policy.{key} is '{ours}', but {policy_path} was trained with '{theirs}', which its weights take for granted. "
                "Leave out the --set that changes it."
            )
    before = run_of(local_folder(policy_path))
    require_same_model(before.get("latent"), (options or Options()).latent, policy_path)
    folder = local_folder(policy_path)
    further = Policy.create(config.policy, policy.action_spec, policy.stats, config.seed, folder=folder)
    further.card = policy.card
    try:
        further.model.load_state_dict(policy.model.state_dict())
    except RuntimeError as error:
        raise ConfigError(
            f"The networks of '{name}' are not those of {policy_path}, so they cannot start from its weights "
            f"({str(error).splitlines()[-1].strip()}). Leave out the --set that changes them."
        ) from error
    base = {"policy": fingerprint(folder), **ancestry(folder)}
    return _train(
        _policy_stage(further, config),
        further,
        config,
        dataset,
        Path(out),
        name=name,
        identity=base,
        options=options or Options(),
    )


def _require_continuable(policy: Policy, dataset: Dataset, out: Path, policy_path: Path, options: Options | None) -> None:
    """Refuse what no stage that starts from a checkpoint can use."""
    policy.action_spec.require_match(stated_spec(dataset), f"checkpoint {policy_path}", f"data set {dataset.root}")
    if out.resolve() == policy_path.resolve():
        raise ConfigError(f"--out and --policy are both {out}; give the new checkpoint a folder of its own.")
    if options is not None and options.tokenizer is not None:
        raise ConfigError(f"A checkpoint keeps the tokenizer it was trained with; leave --tokenizer {options.tokenizer} out.")


def _policy_stage(policy: Policy, config: TrainConfig) -> Stage:
    stage = PolicyStage(policy)
    return stage if config.vqa is None else AnsweringStage(stage, policy, config.vqa.weight)


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
    config = overridden(config, options)
    if config.rater is None:
        raise ConfigError(f"'{name}' trains a policy from scratch; leave --policy out.")
    if options is not None and options.vqa is not None:
        raise ConfigError("A rater learns no questions; leave --vqa out.")
    if options is not None and options.latent is not None:
        raise ConfigError("A rater learns no latent actions; leave --latent out.")
    _require_continuable(policy, dataset, Path(out), Path(policy_path), options)
    rated = policy.with_rater(config.rater, config.seed)
    base = {"policy": fingerprint(local_folder(policy_path)), **ancestry(local_folder(policy_path))}
    return _train(
        RaterStage(rated),
        rated,
        config,
        dataset,
        Path(out),
        name=name,
        identity=base,
        options=options or Options(),
    )


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
    chunk_size = policy.config.decoder.chunk_size
    excluded = require_enough(config, dataset, chunk_size)
    if excluded.shares:
        sys.stderr.write(f"Left out of the loss, as shares of the actions: {excluded.shares}.\n")
    train_episodes, held_episodes = episodes_of(dataset, config)
    views = policy.model.backbone.views
    sizes = set(views.values())
    if len(sizes) > 1:
        raise ConfigError(f"All views must be read at one size to be cached, got {dict(views)}.")
    cache = FrameCache.open(dataset, sizes.pop(), list(views))
    code_NK, latent = (
        codes_of(policy, dataset, options.latent, config.interventions) if config.policy is not None else (None, {})
    )
    identity = {**identity, **latent}
    cut = functools.partial(
        Windows, dataset, cache, chunk_size, pause_rule=config.pauses, intervention_rule=config.interventions, code_NK=code_NK
    )
    windows = cut(episodes=train_episodes)
    held = None
    if held_episodes:
        held = cut(episodes=held_episodes)
    own = vqa_of(policy, config, options.vqa) if config.vqa is not None else None
    command = options.command or command_line()

    def card(outcome: Outcome) -> str:
        counts = {"train": len(train_episodes), "held": len(held_episodes)}
        sources = {"VQA": own.words} if own is not None else {}
        if latent and options.latent is not None:
            sources["Latent actions"] = f"codes of {Path(options.latent).name}, fingerprint {latent['latent']}"
        return model_card(policy, config, dataset, outcome, recipe=name, command=command, sources=sources, **counts)

    run = {"recipe": name, "data": dataset.fingerprint, **identity, **(own.identity if own else {})}
    return finish(
        Trainer(
            stage,
            config,
            windows,
            held,
            out,
            vqa=(own.train, own.held) if own else None,
            identity=run,
            card=card,
            tracker=options.tracker,
            fresh=options.fresh,
        )
    )


def _with_tokenizer(
    config: TrainConfig, dataset: Dataset, action: FeatureStats, episodes: Sequence[int], options: Options | None
) -> TrainConfig:
    """The config with the tokenizer of ``options``, or one fitted on the episodes where its decoder needs one."""
    policy, file = config.policy, options.tokenizer if options else None
    assert policy is not None  # train_policy has seen to it
    decoder = policy.decoder
    mode = policy.action_normalisation
    if file is not None:
        decoder = decoder.with_tokenizer(load_tokenizer(Path(file), mode))
    elif decoder.unfitted:
        chunks = torch.from_numpy(action_chunks(dataset, decoder.chunk_size, episodes))
        decoder = decoder.fitted(Normalizer.from_stats(action, mode).forward(chunks).numpy())
    return replace(config, policy=replace(policy, decoder=decoder))
