"""Frames as vla-eval itself packs them: what tests/serving/test_vla_eval.py replays where vla-eval is not installed.

PYTHONPATH=. .venv-vla-eval/bin/python -m tests.end_to_end.vla_eval_frames
"""

import sys
from pathlib import Path

import msgpack
import numpy as np

from tests import helpers

FILE = Path(__file__).parents[1] / "fixtures" / "vla_eval_0_8_0.msgpack"
EPISODE, STEPS = 2, 4


def main():
    """Write the frames of a short episode, one list of byte strings."""
    from vla_eval.protocol.messages import Message, MessageType, make_hello_payload, pack_message

    def observation(number):
        seen = helpers.observation(number)
        images = {"primary": seen.images["image"]}
        return {"images": images, "states": seen.state.astype(np.float64), "task_description": seen.instruction}

    told = [(MessageType.HELLO, make_hello_payload(benchmark="a benchmark"))]
    told += [(MessageType.EPISODE_START, {"task": {"name": "a task", "episode_idx": EPISODE}})]
    told += [(MessageType.OBSERVATION, observation(number)) for number in range(STEPS)]
    told += [(MessageType.EPISODE_END, {"metrics": {"success": False}, "steps": STEPS, "elapsed_sec": 0.1})]
    frames = [pack_message(Message(kind, payload, number + 1, 0.0)) for number, (kind, payload) in enumerate(told)]
    FILE.write_bytes(msgpack.packb(frames))


if __name__ == "__main__":
    sys.exit(main())
