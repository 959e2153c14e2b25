"""An environment of LeRobot's kind, small enough to evaluate in seconds: a grey room and ten steps of any two numbers.

``lerobot_commands`` evaluates a checkpoint in it with ``lerobot-eval``, as ``--env.type=vlaflow_room``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.scripts import lerobot_eval
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

KIND, STEPS, SIZE, STATE_DIM, ACTION_DIM = "vlaflow_room", 10, 32, 3, 2


class Room(gymnasium.Env):
    """Looks the same at every step; success is to get through all of them with finite actions."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 10}
    task_description = task = "push the puck"

    def __init__(self, render_mode: str = "rgb_array") -> None:
        picture = gymnasium.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
        state = gymnasium.spaces.Box(-np.inf, np.inf, (STATE_DIM,), np.float64)
        self.observation_space = gymnasium.spaces.Dict(
            {"pixels": gymnasium.spaces.Dict({"front": picture}), "agent_pos": state}
        )
        self.action_space = gymnasium.spaces.Box(-np.inf, np.inf, (ACTION_DIM,), np.float32)
        self.render_mode, self.steps = render_mode, 0

    def _seen(self) -> dict[str, Any]:
        return {"pixels": {"front": np.full((SIZE, SIZE, 3), 128, np.uint8)}, "agent_pos": np.zeros(STATE_DIM)}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin again."""
        super().reset(seed=seed, options=options)
        self.steps = 0
        return self._seen(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Count the step."""
        self.steps += 1
        over = self.steps == STEPS
        return self._seen(), 1.0, over, False, {"is_success": over and bool(np.isfinite(action).all())}

    def render(self) -> np.ndarray:
        """A grey picture."""
        return np.full((SIZE, SIZE, 3), 128, np.uint8)


gymnasium.register(f"gym_{KIND}/Room-v0", Room)


@EnvConfig.register_subclass(KIND)
@dataclass
class RoomConfig(EnvConfig):
    """The room's config in LeRobot."""

    task: str | None = "Room-v0"
    fps: int = 10
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(ACTION_DIM,)),
            "agent_pos": PolicyFeature(type=FeatureType.STATE, shape=(STATE_DIM,)),
            "pixels/front": PolicyFeature(type=FeatureType.VISUAL, shape=(SIZE, SIZE, 3)),
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {ACTION: ACTION, "agent_pos": OBS_STATE, "pixels/front": f"{OBS_IMAGES}.front"}
    )

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of ``gymnasium.make``."""
        return {"render_mode": "rgb_array", "max_episode_steps": STEPS}


def evaluated(checkpoint: Path, out: Path) -> float:
    """Success in per cent of two episodes that ``lerobot-eval`` plays at once."""
    given = {"policy.path": checkpoint, "policy.device": "cpu", "env.type": KIND, "output_dir": out}
    given |= {"eval.n_episodes": 2, "eval.batch_size": 2, "eval.use_async_envs": "false"}
    before, sys.argv = sys.argv, ["lerobot-eval", *(f"--{name}={value}" for name, value in given.items())]
    try:
        lerobot_eval.main()
    finally:
        sys.argv = before
    overall: dict[str, float] = json.loads((out / "eval_info.json").read_text())["overall"]
    return overall["pc_success"]
