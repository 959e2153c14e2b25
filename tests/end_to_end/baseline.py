"""What the demo recipe's first twenty steps give, kept in git: a change of code that changes a number is seen.

    python -m tests.end_to_end.baseline          measure and compare
    python -m tests.end_to_end.baseline --write  measure and keep, after a change that is meant to change numbers

The recipe is ``asyncvla.demo`` as it is, in float32 on one thread, on a small data set of moving squares that is drawn here.
Losses and a chunk of the resulting policy are compared bit by bit on the machine that the file was made on, and within
``TOLERANCE`` elsewhere: processors add in other orders.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from vlaflow.cli import train as command
from vlaflow.data.writer import Writer
from vlaflow.policies.base import Policy
from vlaflow.spec import ActionSpec, Dimension, Observation
from vlaflow.versions import machine

FILE = Path(__file__).parents[1] / "fixtures/demo_baseline.json"
STEPS = 20
SIDE = 96
# Largest relative difference between processors: float32 sums of a few thousand terms, through twenty optimiser steps.
TOLERANCE = 2e-3

SPEC = ActionSpec(
    robot="baseline arm",
    dimensions=(
        *(Dimension(name, "m", "world", -1.0, 1.0, "away from the base") for name in ("dx", "dy", "dz")),
        Dimension("gripper", "none", "gripper", -1.0, 1.0, "close", mode="absolute"),
    ),
    rotation="none",
    gripper="-1 open, +1 closed",
    rate_hz=80,
)


def write_dataset(root):
    """Twelve episodes of two tasks: a bright square moves over a dark ground, and the actions say how."""
    with Writer(
        root,
        fps=80,
        action_spec=SPEC,
        state_names=("x", "y", "z", "gripper"),
        views={"image": (SIDE, SIDE)},
        robot_type="baseline",
        provenance={},
    ) as writer:
        for episode in range(12):
            rng = np.random.default_rng(episode)
            length, phase = 50 + episode, rng.uniform(0, 2 * np.pi)
            time = np.arange(length)[:, None] / 40
            position = np.sin(time * np.array([1.0, 1.7, 0.6]) + phase)
            move = np.gradient(position, axis=0) * 20
            gripper = np.where(time > 0.6, 1.0, -1.0)
            images = np.full((length, SIDE, SIDE, 3), 20, np.uint8)
            for frame, (x, y, _) in enumerate(position):
                left, top = (int(16 + 24 * (1 + value)) for value in (x, y))
                images[frame, top : top + 16, left : left + 16] = (220, 180 if gripper[frame] > 0 else 60, 40)
            state = np.hstack([position, gripper]).astype(np.float32)
            action = np.clip(np.hstack([move, gripper]), -1, 1).astype(np.float32)
            writer.add({"image": images}, state, action, ("follow the square", "close the gripper")[episode % 2])
    return root


def machine_key():
    """What has to agree for bits to agree."""
    return f"{machine()}; torch {torch.__version__}; {torch.backends.cpu.get_cpu_capability()}"


def measure(folder):
    """Train in ``folder``; returns the losses of the first steps and one chunk, as they are kept."""
    dataset, out = write_dataset(folder / "dataset"), folder / "policy"
    threads, told = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    try:
        places = ["--dataset", str(dataset), "--out", str(out), "--tracker", "none", "--no-calibrate"]
        changes = ["--steps", str(STEPS), "--set", "precision=fp32", "--set", "checkpoint_every=20"]
        assert command.main(["asyncvla.demo", *places, *changes]) == 0
        lines = (json.loads(line) for line in (out / "training/log.jsonl").read_text().splitlines())
        losses = [line["loss"] for line in lines if "loss" in line]
        seen = Observation(
            {"image": np.arange(SIDE * SIDE * 3, dtype=np.uint32).reshape(SIDE, SIDE, 3).astype(np.uint8)},
            np.array([0.1, -0.2, 0.3, -1.0], np.float32),
            "follow the square",
        )
        chunk = Policy.from_pretrained(out).act(seen).actions
    finally:
        torch.set_num_threads(threads)
        if told is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = told
    return {"losses": losses, "chunk": chunk.astype(float).ravel().tolist()}


def differences(found, kept):
    """What does not agree, in words; nothing when all does."""
    same = kept["machine"] == machine_key()
    words = []
    for part in ("losses", "chunk"):
        mine, theirs = np.array(found[part]), np.array(kept[part])
        if mine.shape != theirs.shape:
            words.append(f"{part}: {mine.shape} numbers, {theirs.shape} kept")
        elif not (np.array_equal(mine, theirs) if same else np.allclose(mine, theirs, rtol=TOLERANCE, atol=TOLERANCE)):
            words.append(f"{part}: up to {np.abs(mine - theirs).max():.3g} apart{' on the machine of the file' * same}")
    return words


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep what is measured")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    if arguments.write:
        FILE.write_text(json.dumps({"machine": machine_key(), **found}, indent=1) + "\n")
        return 0
    wrong = differences(found, json.loads(FILE.read_text()))
    print("\n".join(wrong) or "as kept")  # noqa: T201
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
