"""Policies inside LeRobot: its batches and chunks as vlaflow's, and checkpoints that both can open.

The distribution ``lerobot_policy_vlaflow`` (``integrations/``) registers the policies with LeRobot and calls this module, which
does not import LeRobot. A checkpoint of LeRobot's layout contains vlaflow's checkpoint in a folder of its own:

    config.json, policy_preprocessor.json, policy_postprocessor.json    LeRobot's
    vlaflow/                                                            config, weights, statistics, action spec, calibrations

Normalisation is vlaflow's: LeRobot's processors only add a batch axis and move tensors.

Shape letters: B batch, C channels, H height, W width, S state dimension, L chunk size, D action dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlaflow.compute.base import ComputePolicy
from vlaflow.data.batch import Batch, ObservationBatch
from vlaflow.errors import ConfigError, SpecError
from vlaflow.outputs import copy_files, require_writable_folder, whole_folder, write_json
from vlaflow.policies.action_prefix import longest_action_prefix
from vlaflow.policies.base import Policy
from vlaflow.policies.checkpoint import LEROBOT, home_of, local_folder
from vlaflow.policies.provenance import keep_run
from vlaflow.policies.recipe import TrainConfig
from vlaflow.policies.robots import keep_robot
from vlaflow.policies.seeds import chunk_generator
from vlaflow.spec import ActionPrefix

TYPES = {
    "asyncvla": "vlaflow_asyncvla",
    "a1": "vlaflow_a1",
    "dfm_vla": "vlaflow_dfm_vla",
    "iflybot": "vlaflow_iflybot",
}
"""LeRobot's ``--policy.type`` by system; every other system is ``OTHER``."""
OTHER = "vlaflow_policy"
STATE, ACTION, PADDING, TASK = "observation.state", "action", "action_is_pad", "task"
ONLY_IMAGE, IMAGE = "observation.image", "observation.images."


def policy_type(policy: Policy) -> str:
    """LeRobot's name for a policy of this system."""
    return TYPES.get(policy.config.system, OTHER)


def require_trainable(config: TrainConfig, name: str) -> None:
    """Refuse a recipe that asks for what LeRobot's trainer does not do, and would leave out in silence.

    Args:
        config: of the recipe.
        name: of it, for the message.

    Raises:
        ConfigError: with the setting to change.
    """
    optim, elsewhere = config.optim, "or train it with vlaflow train, then: vlaflow export lerobot CKPT --out DIR"
    if config.lora is not None:
        raise ConfigError(f"{name} trains adapters, which lerobot-train does not: leave them out with lora=none, {elsewhere}")
    if optim.packages:
        raise ConfigError(f"lerobot-train has no optimiser {optim.kind}: set optim.kind=adamw, {elsewhere}")
    if any(group.frozen_steps for group in optim.groups):
        raise ConfigError(
            f"Groups of {name} join after some steps, which lerobot-train does not know: leave frozen_steps out, {elsewhere}"
        )


@dataclass(frozen=True)
class Keys:
    """Under which of LeRobot's keys a policy's inputs lie.

    Args:
        views: key by view.
    """

    views: Mapping[str, str]

    @staticmethod
    def of(policy: Policy, given: Mapping[str, str]) -> Keys:
        """The given keys, and LeRobot's usual ones for views that are not among them."""
        usual = {view: ONLY_IMAGE if view == "image" else f"{IMAGE}{view}" for view in policy.views}
        return Keys({**usual, **{view: key for view, key in given.items() if view in usual}})

    def observation(self, batch: Mapping[str, Any], state_dim: int) -> ObservationBatch:
        """The observations of one of LeRobot's batches, on the CPU.

        Args:
            batch: images as float (B, C, H, W) in [0, 1] or uint8, the state, and the instructions as "task".
            state_dim: of the policy; states may be absent if it is 0.

        Raises:
            SpecError: an image or the state is missing.
        """
        images = {}
        for view, key in self.views.items():
            if key not in batch:
                raise SpecError(f"The batch has no '{key}', the policy's view '{view}'. Rename a key with --rename_map.")
            images[view] = as_pixels(batch[key])
        if STATE not in batch and state_dim:
            raise SpecError(f"The batch has no '{STATE}', which the policy reads.")
        n = len(next(iter(images.values())))
        state_BS = batch[STATE].float().cpu() if STATE in batch else torch.zeros(n, 0)
        return ObservationBatch(images, state_BS, instructions(batch.get(TASK), n))

    def batch(self, batch: Mapping[str, Any], state_dim: int) -> Batch:
        """One of LeRobot's training batches, on the CPU."""
        action_BLD = batch[ACTION].float().cpu()
        padded = batch.get(PADDING)
        valid_BL = torch.ones(action_BLD.shape[:2], dtype=torch.bool) if padded is None else ~padded.cpu().bool()
        number_B = torch.zeros(len(action_BLD), dtype=torch.int64)
        episode_B, frame_B = (batch.get(key, number_B) for key in ("episode_index", "frame_index"))
        return Batch(self.observation(batch, state_dim), action_BLD, valid_BL, episode_B.cpu(), frame_B.cpu())


def as_pixels(image: Tensor) -> Tensor:
    """Images (B, C, H, W), float in [0, 1] or uint8, as uint8 (B, H, W, 3) on the CPU.

    Raises:
        SpecError: for other shapes, and for floats outside [0, 1], which were normalised.
    """
    if image.ndim != 4 or image.shape[1] != 3:
        raise SpecError(f"An image batch has shape (B, 3, height, width) in LeRobot, got {tuple(image.shape)}.")
    image = image.cpu()
    if image.dtype != torch.uint8:
        low, high = float(image.min()), float(image.max())
        if not (low >= 0 and high <= 1):
            raise SpecError(f"Images have values from {low:g} to {high:g}. Keep them in [0, 1]: vlaflow normalises itself.")
        image = (image.float() * 255).round().to(torch.uint8)
    return image.permute(0, 2, 3, 1).contiguous()


def instructions(task: str | Sequence[str] | None, n: int) -> list[str]:
    """The instructions of a batch; none, or one for all, are allowed."""
    if task is None:
        return [""] * n
    return [task] * n if isinstance(task, str) else list(task)


def act(
    policy: Policy,
    observation: ObservationBatch,
    compute: ComputePolicy | None,
    *,
    seed: int,
    number: int,
    committed: Tensor | None = None,
    delay: int = 0,
) -> Tensor:
    """Chunks (B, L, D) in robot units.

    Args:
        policy, observation, compute: see ``Policy.act``.
        seed, number: of the noise: the run's seed, and how many chunks were made before.
        committed: (N, D) or (1, N, D), the rest of the chunk being executed (real-time chunking); for one observation. LeRobot
            fills it up with rows of zeros, which no robot executes: they are left out.
        delay: how many of these are executed until the new chunk arrives; it begins with them, as far as the decoder can
            continue a chunk. LeRobot takes the longest delay so far, so one slow chunk must not end the run.
    """
    observations = observation.split()
    generators = [chunk_generator(seed + row, number) for row in range(len(observations))]
    prefixes = None
    if committed is not None:
        rest_ND = committed.float().cpu().numpy().reshape(-1, committed.shape[-1])
        rest_ND = rest_ND[: int(np.flatnonzero(rest_ND.any(1)).max(initial=-1)) + 1]
        if len(rest_ND):
            prefixes = [ActionPrefix(rest_ND, min(delay, len(rest_ND), longest_action_prefix(policy)))] * len(observations)
    made = policy.act(observations, compute, generator=generators, action_prefix=prefixes)
    return torch.from_numpy(np.stack([chunk.actions for chunk in made]))


def export(checkpoint: Path | str, out: Path, robot: str | None = None) -> str:
    """Write a checkpoint in LeRobot's layout; returns LeRobot's name of the policy.

    Args:
        checkpoint: folder or Hub repository, or the folder of one of its robots.
        out: folder, which must not exist.
        robot: which one to act for, where it was trained for several; the others are left out.

    Raises:
        CheckpointError: it cannot be opened.
        ConfigError: the folder exists, or cannot be made; or several robots and no choice, or none of this name.
        StorageError: the disk is full; nothing is left of it.
    """
    if out.exists():
        raise ConfigError(f"{out} exists. Choose another --out.")
    require_writable_folder(out.parent)
    folder = local_folder(checkpoint)
    policy = Policy.from_pretrained(folder, robot=robot)
    with whole_folder(out, "The exported checkpoint") as part:
        copy_files(home_of(folder), part / LEROBOT, leave_out=("training", ".*", "*/.*"))
        keep_run(folder, part / LEROBOT)
        if policy.robot is not None:
            keep_robot(part / LEROBOT, policy.robot)
        for name, content in layout(policy).items():
            write_json(part / name, content, indent=4)
    return policy_type(policy)


def layout(policy: Policy, views: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The JSON files of LeRobot 0.6 by name."""
    keys = Keys.of(policy, views or {}).views
    side = {view: size or 0 for view, size in policy.views.items()}
    inputs: dict[str, Any] = {key: {"type": "VISUAL", "shape": [3, side[view], side[view]]} for view, key in keys.items()}
    if policy.stats["state"].dim:
        inputs[STATE] = {"type": "STATE", "shape": [policy.stats["state"].dim]}
    outputs = {ACTION: {"type": "ACTION", "shape": [policy.action_spec.dim]}}
    mapping = dict.fromkeys(("VISUAL", "STATE", "ACTION"), "IDENTITY")
    features = {**inputs, **outputs}
    config = {
        "type": policy_type(policy),
        "n_obs_steps": 1,
        "input_features": inputs,
        "output_features": outputs,
        "device": "cpu",
        "use_amp": False,
        "use_peft": False,
        "push_to_hub": False,
        "repo_id": None,
        "private": None,
        "tags": None,
        "license": None,
        "pretrained_path": None,
        "pretrained_revision": None,
        "recipe": None,
        "settings": [],
        "views": dict(keys),
        "compute": None,
        "chunk_size": policy.chunk_size,
        "n_action_steps": policy.n_action_steps,
        "noise_seed": 0,
        "normalization_mapping": mapping,
    }
    return {
        "config.json": config,
        "policy_preprocessor.json": {
            "name": "policy_preprocessor",
            "steps": [
                {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
                {"registry_name": "to_batch_processor", "config": {}},
                {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
                {"registry_name": "normalizer_processor", "config": {"eps": 1e-08, "features": features, "norm_map": mapping}},
            ],
        },
        "policy_postprocessor.json": {
            "name": "policy_postprocessor",
            "steps": [
                {"registry_name": "unnormalizer_processor", "config": {"eps": 1e-08, "features": outputs, "norm_map": mapping}},
                {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
            ],
        },
    }
