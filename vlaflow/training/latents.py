"""Latent action models in training runs: learning one from video, and the codes of one as something to learn."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from vlaflow.actions.latent import LatentActionModel, LatentConfig, Origin
from vlaflow.data import stats
from vlaflow.data.exclusions import intervened
from vlaflow.data.frames import FrameCache
from vlaflow.data.lerobot import Dataset
from vlaflow.data.pairs import FramePairs, chosen_view
from vlaflow.data.quality import InterventionRule
from vlaflow.data.transforms import Normalizer
from vlaflow.decoders.base import LatentCodes
from vlaflow.errors import ConfigError, SpecError
from vlaflow.policies.base import Policy
from vlaflow.policies.iflybot.codes import dataset_codes
from vlaflow.policies.recipe import TrainConfig, VideoSpec
from vlaflow.progress import Progress, progress
from vlaflow.training.card import latent_card
from vlaflow.training.options import Options, episodes_of, finish, overridden
from vlaflow.training.precision import training_threads
from vlaflow.training.stages import LatentStage
from vlaflow.training.trainer import Outcome, Trainer
from vlaflow.versions import command_line


def video_spec(dataset: Dataset) -> VideoSpec:
    """The shape of a data set of video, as recipes of latent action models take it.

    Raises:
        DataError: no camera.
    """
    chosen_view(dataset, None)
    return VideoSpec(tuple(dataset.views), dataset.columns().action.shape[1])


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
    config, options = overridden(config, options), options or Options()
    if config.latent is None:
        raise ConfigError(f"'{name}' does not train a latent action model.")
    if options.tokenizer is not None:
        raise ConfigError(f"A latent action model has no use for the action tokenizer {options.tokenizer}; leave it out.")
    for flag, given in (("--latent", options.latent), ("--vqa", options.vqa)):
        if given is not None:
            raise ConfigError(f"A latent action model learns from video alone; leave {flag} {given} out.")
    torch.set_num_threads(options.threads or training_threads())
    latent = config.latent
    train_episodes, held_episodes = episodes_of(dataset, config)
    cache = FrameCache.open(dataset, latent.model.image_size, [chosen_view(dataset, latent.view)])
    pairs = FramePairs(dataset, cache, latent.view, latent.gap_s, episodes=train_episodes)
    held: FramePairs | None = None
    if any(dataset.episodes[e].length > pairs.gap for e in held_episodes):
        held = FramePairs(dataset, cache, latent.view, latent.gap_s, episodes=held_episodes)
    elif held_episodes:
        sys.stderr.write(f"Held out: none of the {len(held_episodes)} episodes is longer than the gap; nothing is measured.\n")
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
    return finish(
        Trainer(stage, config, pairs, held, Path(out), identity=run, card=card, tracker=options.tracker, fresh=options.fresh)
    )


def codes_of(
    policy: Policy, dataset: Dataset, path: Path | str | None, rule: InterventionRule | None
) -> tuple[np.ndarray | None, dict[str, str]]:
    """Latent actions by row for a decoder that learns to name them, and the model they are from, for the run's identity.

    A code that tells of an intervention, which the observation did not foretell, is left out.
    """
    wanted = policy.config.decoder.latent_codes
    if wanted is None:
        if path is not None:
            raise ConfigError(f"This recipe's decoder names no latent actions, so it cannot use {path}; leave --latent out.")
        return None, {}
    if path is None:
        raise ConfigError(
            "This decoder learns to name latent actions; give it a latent action model with --latent (train one: vlaflow train "
            "iflybot.latent --dataset DIR --out DIR), or --set policy.decoder.teaches=false."
        )
    model = LatentActionModel.from_pretrained(path)
    fit_codes(model.config, wanted, str(path))
    with ExitStack() as stack:
        bar: Progress | None = None
        done = 0

        def tell(now: int, total: int) -> None:
            nonlocal bar, done
            bar = bar or stack.enter_context(progress(total, "Latent actions"))
            bar.advance(now - done)
            done = now

        codes = dataset_codes(model, dataset, progress=tell)
    before = np.concatenate(([0], np.cumsum(intervened(dataset, rule))))
    end_N = np.minimum(np.arange(len(dataset)) + codes.gap, len(dataset))
    foretold_N = before[end_N] == before[:-1]
    return np.where(foretold_N[:, None], codes.id_NK, -1), {"latent": model.fingerprint()}


def require_same_model(before: str | None, path: Path | str | None, policy_path: Path | str) -> None:
    """Refuse a latent action model whose codes are not those that a checkpoint has learned to name.

    Args:
        before: fingerprint of the checkpoint's; None where it is unknown.
        path: folder of the model; None for none.
        policy_path: the checkpoint.

    Raises:
        ConfigError: it is another one.
    """
    if before is None or path is None:
        return
    now = LatentActionModel.from_pretrained(path).fingerprint()
    if now != before:
        raise ConfigError(
            f"{policy_path} has learned to name the codes of the latent action model {before}, and {path} is {now}, whose "
            "codes mean something else. Give --latent the one it was trained with."
        )


def fit_codes(model: LatentConfig, wanted: LatentCodes, where: str, stage: str = "") -> None:
    """Refuse a decoder that names other codes than a latent action model has.

    Args:
        model: of the latent action model.
        wanted: by the policy's decoder.
        where: the model is from.
        stage: of a pipeline and a dot, before the keys that cure it.

    Raises:
        ConfigError: with the keys.
    """
    theirs, ours = (model.codes, model.book), (wanted.codes, wanted.book)
    if theirs != ours:
        key = f"--set {stage}policy.decoder.latent"
        raise ConfigError(
            f"{where} has {theirs[0]} codes of a book of {theirs[1]}, the decoder {ours[0]} of {ours[1]}. "
            f"Train the decoder for them: {key}.codes={theirs[0]} {key}.book={theirs[1]}"
        )
