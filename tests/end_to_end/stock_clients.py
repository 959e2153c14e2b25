"""Stock clients drive our server to a success in a simulator: what ``make test-clients`` runs, apart from ``make test``.

    make test-clients CKPT=runs/demo/rated

Three processes: ``vlaflow serve CKPT``; a robot in an environment of its own with openpi-client from PyPI and without vlaflow
(``stock_robot.py``); and this one, which holds the simulator and answers the robot over pipes. It ends with status 0 when
every client reached a success, and prints what each did.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from vlaflow.errors import CapabilityError, CheckpointError, VlaflowError
from vlaflow.robot import wire
from vlaflow.simulators.base import Environment, make

ROBOT = Path(__file__).with_name("stock_robot.py")


@dataclass(frozen=True)
class Options:
    """What to run.

    Args:
        checkpoint: folder of a trained policy with one view.
        env: one of the environments it was trained in.
        clients: Python of the robot's environment, which tools/setup-clients.sh makes.
        episodes: per client; one success is enough.
        seed: of the first episode.
        n_action_steps: actions per chunk that openpi's broker executes.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    env: str = "metaworld/drawer-open-v3"
    clients: Path = Path(".venv-clients/bin/python")
    episodes: int = 4
    seed: int = 1000
    n_action_steps: int = 8


@dataclass(frozen=True)
class Client:
    """A kind of client: what it is started with, and where it looks for image and state."""

    name: str
    options: tuple[str, ...]
    image: str
    state: str


OPENPI = Client("openpi", ("--observation-keys", "metaworld"), "observation/image", "observation/state")
ROBOARENA = Client(
    "roboarena",
    (
        "--observation-keys",
        "roboarena",
        "--image",
        "observation/exterior_image_0_left",
        "--state",
        "observation/joint_position",
    ),
    "observation/exterior_image_0_left",
    "observation/joint_position",
)


@dataclass
class Body:
    """The robot's body: one simulated environment, episode after episode."""

    env: Environment
    client: Client
    seed: int
    successes: list[bool] = field(default_factory=list)
    steps: int = 0

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """What the robot asked for."""
        if question["do"] == "reset":
            self.env.restart(seed=self.seed + len(self.successes))
            return self._seen(done=False)
        _, success, truncated, _ = self.env.advance(np.asarray(question["action"]))
        self.steps += 1
        if success or truncated:
            self.successes.append(success)
        return self._seen(done=success or truncated)

    def _seen(self, done: bool) -> dict[str, Any]:
        seen = self.env.observe()
        observation = {self.client.image: seen.images[self.env.view], self.client.state: seen.state, "prompt": seen.instruction}
        return {"observation": observation, "done": done}


@contextmanager
def serving(checkpoint: Path, options: tuple[str, ...]) -> Iterator[str]:
    """``vlaflow serve`` in a process of its own; yields its address."""
    command = [sys.executable, "-m", "vlaflow", "serve", str(checkpoint), "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            said = []
            for line in server.stderr:
                said.append(line)
                if "ws://" in line:
                    break
            else:
                raise SystemExit("".join(said))
            yield line[line.index("ws://") :].strip()
        finally:
            server.terminate()
            server.stderr.read()


def drive(client: Client, address: str, options: Options) -> Body:
    """All episodes of one client."""
    body = Body(make(options.env), client, options.seed)
    command = [str(options.clients), str(ROBOT), client.name, address]
    command += ["--episodes", str(options.episodes), "--n-action-steps", str(options.n_action_steps)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as robot:
        assert robot.stdin is not None
        assert robot.stdout is not None
        while head := robot.stdout.read(4):
            question = wire.unpack(robot.stdout.read(*struct.unpack("<I", head)))
            ended = question["do"] == "end"
            if ended and question["steps"] != body.steps:
                raise SystemExit(f"{client.name} counted {question['steps']} steps, the simulator {body.steps}.")
            message = wire.pack({} if ended else body.answer(question))
            robot.stdin.write(struct.pack("<I", len(message)) + message)
            robot.stdin.flush()
    if robot.returncode:
        raise SystemExit(f"{client.name} ended with status {robot.returncode}.")
    return body


def main() -> int:
    """Run every client; the exit status is 1 when one reached no success."""
    options = tyro.cli(Options, description=__doc__)
    try:
        if not (options.checkpoint / "config.json").exists():
            raise CheckpointError(
                f"There is no checkpoint in {options.checkpoint}: make demo trains one, or name yours with CKPT=."
            )
        if not options.clients.exists():
            raise CapabilityError(f"There is no {options.clients}: tools/setup-clients.sh makes it.")
        failed = False
        for client in (OPENPI, ROBOARENA):
            with serving(options.checkpoint, client.options) as address:
                body = drive(client, address, options)
            done = sum(body.successes)
            sys.stdout.write(
                f"{client.name}: {done} of {len(body.successes)} episodes of {options.env} succeeded, {body.steps} steps\n"
            )
            sys.stdout.flush()
            failed |= not done
    except VlaflowError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
