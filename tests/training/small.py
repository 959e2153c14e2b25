"""Small things to train on: samples in memory, a data set on disk, a policy of a few thousand weights."""

import json
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vlaflow.backbones.tiny import TinyConfig
from vlaflow.data.batch import Batch, ObservationBatch, VqaBatch
from vlaflow.data.stats import FeatureStats
from vlaflow.data.writer import Writer
from vlaflow.decoders.flow import FlowConfig
from vlaflow.policies.base import Policy, PolicyConfig
from vlaflow.policies.objectives import PolicyObjective
from vlaflow.policies.processor import Drawn
from vlaflow.policies.recipe import OptimConfig, TrainConfig
from vlaflow.spec import ActionSpec, Dimension

SPEC = ActionSpec(
    robot="test arm",
    dimensions=tuple(Dimension(name, "m", "world", -1.0, 1.0, "away from the base") for name in "xy"),
    rotation="none",
    gripper="none",
    rate_hz=10,
)
WIDTHS = {"width": 32, "depth": 1, "heads": 2, "ffn": 64}


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Unchanged:
    """A sample that no stage prepares."""

    batch: object

    def to(self, device, *, non_blocking=False):
        return self.batch


class AsItIs:
    """For loaders whose samples no stage prepares, and whose loss draws the first number of both generators."""

    def prepare(self, batch):
        return Unchanged(batch)

    def draw(self, batch, generator, shared):
        return Drawn((torch.rand(1, generator=generator), torch.rand(1, generator=shared)))


as_it_is = AsItIs()


def tiny_policy(views=("front",), **backbone) -> PolicyConfig:
    backbone = TinyConfig(state_dim=3, views=views, image_size=32, cell=16, text_bytes=32, **WIDTHS, **backbone)
    return PolicyConfig("asyncvla", backbone, FlowConfig(action_dim=2, chunk_size=4), n_action_steps=2)


def tiny_config(policy=None, vqa=None, **changes) -> TrainConfig:
    defaults = {
        "objective": PolicyObjective(policy or tiny_policy(), vqa),
        "optim": OptimConfig(learning_rate=1e-3, warmup_steps=2),
        "steps": 6,
        "global_batch_size": 4,
        "validate_every": 3,
        "checkpoint_every": 2,
        "shift": 2,
        "precision": "fp32",  # "auto" is bf16 on processors with AMX, and tests compare runs of other batch sizes
    }
    return TrainConfig(**{**defaults, **changes})


@dataclass
class Memory:
    """Samples as a function of their number."""

    count: int = 40
    poisoned: int | None = None

    def __len__(self):
        return self.count

    def batch(self, indices):
        def numbers(shape, salt):
            return np.stack([np.random.default_rng([int(i), salt]).standard_normal(shape) for i in indices]).astype(np.float32)

        action_BLD = torch.from_numpy(numbers((4, 2), 0))
        if self.poisoned is not None:
            action_BLD[torch.from_numpy(indices == self.poisoned)] = torch.nan
        image = np.stack([np.random.default_rng([int(i), 1]).integers(0, 256, (32, 32, 3), np.uint8) for i in indices])
        words = ["push the puck" if i % 2 else "open" for i in indices]
        observation = ObservationBatch({"front": torch.from_numpy(image)}, torch.from_numpy(numbers((3,), 2)), words)
        valid_BL = torch.ones(len(indices), 4, dtype=torch.bool)
        episode_B = torch.from_numpy(indices // 10)
        return Batch(observation, action_BLD, valid_BL, episode_B, torch.from_numpy(indices % 10))


class Ragged(Memory):
    """Samples near the end of their episode have padding."""

    def batch(self, indices):
        batch = super().batch(indices)
        left = torch.from_numpy(10 - indices % 10)
        return replace(batch, valid_BL=torch.arange(4) < left[:, None])


@dataclass
class Cut:
    """A source that breaks down at its batch number ``at``."""

    source: object
    at: int = 6
    calls: int = 0

    def __len__(self):
        return len(self.source)

    def batch(self, indices):
        self.calls += 1
        if self.calls == self.at:
            raise RuntimeError("cut")
        return self.source.batch(indices)


@dataclass
class Ended(Cut):
    """A source that has its process told to end at its batch number ``at``, which the step after it notices."""

    def batch(self, indices):
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.source.batch(indices)


@dataclass
class AskedSource:
    """Questions as a function of their number: is the image dark or bright?"""

    count: int = 20

    def __len__(self):
        return self.count

    def batch(self, indices):
        value = np.where(indices % 2, 40, 210).astype(np.uint8)[:, None, None, None]
        image = torch.from_numpy(np.broadcast_to(value, (len(indices), 32, 32, 3)).copy())
        known_BS = torch.zeros(len(indices), 3, dtype=torch.bool)
        observation = ObservationBatch({"front": image}, torch.zeros(len(indices), 3), ["How is it?"] * len(indices), known_BS)
        return VqaBatch(observation, ["dark" if i % 2 else "bright" for i in indices], [f"q{i}" for i in indices])


def tiny_stats():
    rows = np.random.default_rng(0).standard_normal((50, 3))
    return {"state": FeatureStats.of(rows), "action": FeatureStats.of(rows[:, :2])}


def write_dataset(root: Path, longer: int = 0) -> Path:
    """Six episodes of two tasks, noise in one view; each by so many frames longer."""
    with Writer(
        root,
        fps=10,
        action_spec=SPEC,
        state_names=("x", "y", "z"),
        views={"front": (32, 32)},
        robot_type="test",
        provenance={},
    ) as writer:
        for episode in range(6):
            rng = np.random.default_rng(episode)
            length = 9 + episode + longer
            images = rng.integers(0, 256, (length, 32, 32, 3), np.uint8)
            state = rng.standard_normal((length, 3)).astype(np.float32)
            action = rng.uniform(-1, 1, (length, 2)).astype(np.float32)
            writer.add({"front": images}, state, action, ("push the puck", "open the drawer")[episode % 2])
    return root


def new_policy(config: TrainConfig) -> Policy:
    return Policy.create(config.objective.policy, SPEC, tiny_stats(), config.seed)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def write_questions(root):
    root.mkdir()
    for i in range(8):
        Image.fromarray(np.full((32, 32, 3), 30 * i, np.uint8)).save(root / f"{i}.png")
    said = [{"from": "human", "value": "<image>\nDark or bright?"}, {"from": "gpt", "value": "dark"}]
    lines = [json.dumps({"id": i, "image": f"{i}.png", "conversations": said}) for i in range(8)]
    (root / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return root
