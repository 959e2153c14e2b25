"""A robot that knows stock openpi-client and nothing of vlaflow: run by the Python of .venv-clients, as a script.

    .venv-clients/bin/python tests/end_to_end/stock_robot.py openpi ws://127.0.0.1:8000 --episodes 3 --n-action-steps 8

Its body is elsewhere: it asks the process that started it for observations and has it execute actions, in messages over
standard input and output (length, then msgpack as openpi-client packs it). See ``stock_clients.py``, which is that process.
"""

import argparse
import struct
import sys

import numpy as np
import websockets.sync.client
from openpi_client import action_chunk_broker, base_policy, msgpack_numpy, websocket_client_policy
from openpi_client.runtime import environment, runtime, subscriber
from openpi_client.runtime.agents import policy_agent

ROBOARENA_FIELDS = {
    "image_resolution",
    "needs_wrist_camera",
    "n_external_cameras",
    "needs_stereo_camera",
    "needs_session_id",
    "action_space",
}


def ask(**question):
    """The answer of the process that holds the simulator."""
    message = msgpack_numpy.packb(question)
    sys.stdout.buffer.write(struct.pack("<I", len(message)) + message)
    sys.stdout.buffer.flush()
    (length,) = struct.unpack("<I", sys.stdin.buffer.read(4))
    return msgpack_numpy.unpackb(sys.stdin.buffer.read(length))


class Body(environment.Environment):
    """openpi's environment: what it is asked, it asks on."""

    def __init__(self):
        self._now = {}

    def reset(self):
        self._now = ask(do="reset")

    def is_episode_complete(self):
        return self._now["done"]

    def get_observation(self):
        return self._now["observation"]

    def apply_action(self, action):
        self._now = ask(do="act", action=np.asarray(action["actions"]))


class RoboArenaPolicy(base_policy.BasePolicy):
    """RoboArena's client: a fixed set of metadata, an endpoint in every request, a bare array for an answer."""

    def __init__(self, address):
        self._socket = websockets.sync.client.connect(address, compression=None, max_size=None)
        found = msgpack_numpy.unpackb(self._socket.recv())
        if set(found) != ROBOARENA_FIELDS:
            raise SystemExit(f"These are not the fields of RoboArena's server config: {sorted(found)}")

    def _ask(self, endpoint, observation):
        self._socket.send(msgpack_numpy.packb({**observation, "endpoint": endpoint}))
        return self._socket.recv()

    def infer(self, obs):
        answer = self._ask("infer", obs)
        if isinstance(answer, str):
            raise SystemExit(answer)
        actions = msgpack_numpy.unpackb(answer)
        if not isinstance(actions, np.ndarray) or actions.ndim != 2:
            raise SystemExit(f"An answer is an array of actions, this was a {type(actions).__name__}")
        return {"actions": actions}

    def reset(self):
        answer = self._ask("reset", {})
        if answer != "reset successful":
            raise SystemExit(f"A reset was answered by {answer!r}")


class Whole(base_policy.BasePolicy):
    """Executes all of an answer before it asks again, as RoboArena does."""

    def __init__(self, policy):
        self._policy, self._left = policy, []

    def infer(self, obs):
        if not self._left:
            self._left = list(self._policy.infer(obs)["actions"])
        return {"actions": self._left.pop(0)}

    def reset(self):
        self._policy.reset()
        self._left = []


class Count(subscriber.Subscriber):
    """Tells how often openpi's loop went round; it must be what the simulator counted."""

    def __init__(self):
        self.steps = 0

    def on_episode_start(self):
        pass

    def on_step(self, observation, action):
        self.steps += 1

    def on_episode_end(self):
        pass


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("client", choices=("openpi", "roboarena"))
    parser.add_argument("address")
    parser.add_argument("--episodes", type=int, default=1)
    parser.add_argument("--n-action-steps", type=int, default=8)
    given = parser.parse_args()
    if "vlaflow" in sys.modules or "torch" in sys.modules:
        raise SystemExit("This process should have been openpi-client's alone.")
    if given.client == "openpi":
        policy = action_chunk_broker.ActionChunkBroker(
            websocket_client_policy.WebsocketClientPolicy(given.address), action_horizon=given.n_action_steps
        )
    else:
        policy = Whole(RoboArenaPolicy(given.address))
    count = Count()
    runtime.Runtime(Body(), policy_agent.PolicyAgent(policy), [count], num_episodes=given.episodes).run()
    ask(do="end", steps=count.steps)


if __name__ == "__main__":
    main()
