"""The codes of a latent action model as something for a policy to learn: which ones, and whether they fit its decoder.

What a whole data set's codes are is worked out in ``iflybot.codes``; the model itself is learned by ``LatentObjective``.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np

from vlaflow.actions.latent import LatentConfig
from vlaflow.actions.stored_latent import StoredLatentModel
from vlaflow.data.exclusions import intervened
from vlaflow.data.frame_source import FrameStorage
from vlaflow.data.lerobot import Dataset
from vlaflow.data.quality import InterventionRule
from vlaflow.decoders.base import LatentCodes
from vlaflow.errors import ConfigError
from vlaflow.policies.base import Policy
from vlaflow.policies.iflybot.codes import dataset_codes
from vlaflow.progress import Progress, progress


def codes_of(
    policy: Policy,
    dataset: Dataset,
    path: Path | str | None,
    rule: InterventionRule | None,
    storage: FrameStorage = "raw",
) -> tuple[np.ndarray | None, dict[str, str]]:
    """Latent actions by row for a decoder that learns to name them, and the model they are from, for the run's identity.

    Codes are computed once per model and data set and kept next to it; where they are, the model itself is not opened. A code
    of a pair that spans an intervention, which the observation could not predict, is left out.
    """
    wanted = policy.config.decoder.latent_codes
    if wanted is None:
        if path is not None:
            raise ConfigError(f"This recipe's decoder names no latent actions, so it cannot use {path}; leave --latent out.")
        return None, {}
    if path is None:
        raise ConfigError(
            "This decoder learns to name latent actions; give it a latent action model with --latent (train one: vlaflow train "
            f"iflybot.latent --dataset {dataset.root} --out DIR), or --set policy.decoder.teaches=false."
        )
    model = StoredLatentModel.open(path)
    fit_codes(model.config, wanted, str(path))
    with ExitStack() as stack:
        bar: Progress | None = None
        done = 0

        def tell(now: int, total: int) -> None:
            nonlocal bar, done
            bar = bar or stack.enter_context(progress(total, "Latent actions"))
            bar.advance(now - done)
            done = now

        codes = dataset_codes(model, dataset, storage=storage, progress=tell)
    before = np.concatenate(([0], np.cumsum(intervened(dataset, rule))))
    end_N = np.minimum(np.arange(len(dataset)) + codes.gap, len(dataset))
    predictable_N = before[end_N] == before[:-1]
    return np.where(predictable_N[:, None], codes.id_NK, -1), {"latent": model.fingerprint()}


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
    now = StoredLatentModel.open(path).fingerprint()
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
