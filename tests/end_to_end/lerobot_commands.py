"""Real LeRobot trains, resumes and runs vlaflow's policies: what ``make test-lerobot`` runs, apart from ``make test``.

    make test-lerobot

It runs in an environment of its own (``tools/setup-lerobot.sh``) on a small data set that it writes first, and ends with status
0 when all checks hold.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import lerobot_policy_vlaflow
import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors

from tests.end_to_end import lerobot_rollout
from tests.end_to_end.lerobot_eval import evaluated
from tests.training.small import write_dataset
from vlaflow.cli.main import main
from vlaflow.policies.base import Policy
from vlaflow.policies.lerobot import STATE, TYPES
from vlaflow.policies.seeds import chunk_generator
from vlaflow.spec import Observation

RECIPES = {"vlaflow_asyncvla": "asyncvla.demo", "vlaflow_a1": "a1.demo", "vlaflow_dfm_vla": "dfm_vla.demo"}


def train(*words: str) -> None:
    """One run of ``lerobot-train``; its output is shown if it fails."""
    command = [str(Path(sys.executable).with_name("lerobot-train")), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"lerobot-train failed:\n{done.stderr[-4000:]}")


def opened(folder: Path) -> None:
    """Both libraries make the same chunk from a checkpoint, and a chunk begins with the committed actions."""
    config = PreTrainedConfig.from_pretrained(folder)
    config.device = "cpu"
    policy = get_policy_class(config.type).from_pretrained(folder, config=config)
    before, after = make_pre_post_processors(config, pretrained_path=str(folder))
    ours = Policy.from_pretrained(folder)
    rng = np.random.default_rng(0)
    images = {view: rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for view in ours.views}
    state = rng.standard_normal(ours.stats["state"].dim).astype(np.float32)
    batch = {config.views[view]: torch.from_numpy(image).permute(2, 0, 1).float() / 255 for view, image in images.items()}
    batch = before({**batch, STATE: torch.from_numpy(state), "task": "push"})
    chunk_BLD = after(policy.predict_action_chunk(batch))
    wanted = ours.act(Observation(images, state, "push"), generator=chunk_generator(0, 0)).actions
    assert np.array_equal(chunk_BLD[0].numpy(), wanted), "LeRobot and vlaflow make other chunks of one checkpoint"
    policy.reset()
    actions = [policy.select_action(batch) for _ in range(config.n_action_steps + 1)]
    assert actions[0].shape == (1, ours.action_spec.dim)
    if policy.supports_rtc():
        rest = chunk_BLD[0][2:]
        continued = policy.predict_action_chunk(batch, inference_delay=2, prev_chunk_left_over=rest)
        assert torch.equal(continued[0, :2], rest[:2]), "a chunk does not begin with the committed actions"


def run(folder: Path) -> None:
    """All checks, in a folder for their files."""
    data = write_dataset(folder / "dataset")
    shared = [
        "--policy.device=cpu",
        "--policy.push_to_hub=false",
        "--wandb.enable=false",
        "--env_eval_freq=0",
        "--num_workers=0",
    ]
    shared += ["--dataset.repo_id=local/small", f"--dataset.root={data}", "--batch_size=4", "--log_freq=1"]
    for kind, recipe in RECIPES.items():
        out = folder / kind
        train(
            f"--policy.type={kind}", f"--policy.recipe={recipe}", *shared, "--steps=2", "--save_freq=2", f"--output_dir={out}"
        )
        last = out / "checkpoints/last/pretrained_model"
        opened(last)
        sys.stdout.write(f"{kind}: trained, and opened by both\n")
    train(f"--config_path={last}/train_config.json", "--resume=true", "--steps=4")
    opened(out / "checkpoints/last/pretrained_model")
    sys.stdout.write("resumed\n")
    assert main(["export", "lerobot", str(last), "--out", str(folder / "exported")]) == 0
    opened(folder / "exported")
    sys.stdout.write("exported\n")
    assert evaluated(folder / "exported", folder / "evaluated") == 100, "lerobot-eval did not get through its episodes"
    sys.stdout.write("evaluated\n")
    continuing = folder / "vlaflow_asyncvla/checkpoints/last/pretrained_model"  # a discrete flow cannot continue a chunk
    lerobot_rollout.check(continuing, folder / "robot")
    sys.stdout.write("driven\n")


if __name__ == "__main__":
    known = set(PreTrainedConfig.get_known_choices())
    assert set(TYPES.values()) <= known, f"{lerobot_policy_vlaflow.__name__} did not register its policies"
    with tempfile.TemporaryDirectory() as made:
        run(Path(made))
