"""``vlaflow serve CKPT``: serve a checkpoint with the websocket protocol of openpi or vla-eval."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import signal
import socket
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vlaflow.cli.arguments import ONLINE, HubGroup, parse_arguments
from vlaflow.ranges import Count, NotNegative, Positive, Range

if TYPE_CHECKING:
    from vlaflow.compute.base import ComputePolicy


@dataclass(frozen=True)
class ServeArguments:
    """Serve a checkpoint to robots with openpi's protocol, or to the benchmarks of vla-eval.

    Example: vlaflow serve runs/demo/rated --observation-keys metaworld --compute refine

    By default only this machine can connect; others need --host and --token. Ctrl-C finishes open requests and exits.

    Args:
        checkpoint: folder, or Hugging Face repository id.
        robot: robot to act for, if the checkpoint was trained for several.
        compute: compute policy, as in vlaflow eval; the calibrated one (auto) by default, or dense where there is none.
        budget_ms: choose a compute policy for this many milliseconds, instead of --compute (run vlaflow bench latency first).
        steps: solver steps per round, where the compute policy states none.
        observation_keys: keys that clients send: views (images/VIEW, state), metaworld, libero, droid, aloha, roboarena,
            vla-eval-libero, vla-eval-calvin, vla-eval-simpler, vla-eval-vlabench, or those of another package.
        image: key of an image, instead of those above, in the order of the policy's views; repeat for more.
        state: key of a part of the state, instead of those above; repeat for more.
        default_prompt: instruction of requests without a prompt, which are refused by default.
        n_action_steps: actions of a chunk that clients execute, instead of the checkpoint's default.
        host: address to listen on.
        port: port to listen on; 0 for a free one.
        token: token that clients must send; by default the environment variable VLAFLOW_TOKEN, which process lists do not show.
        batch: largest number of requests per batch.
        wait_ms: how long the first request of a batch waits for others.
        queue: largest number of waiting requests.
        deadline_ms: longest wait of a request before it fails, unless the request states its own.
        most_mib: largest request in MiB, of which the server may hold two per client; by default what the policy's images need.
        guided: continue action prefixes by guidance even if the checkpoint was trained for them.
        connections: largest number of clients.
        dashboard: serve a page at /dashboard to watch and instruct the policy.
        log_format: log each event as a sentence or as a JSON object.
        threads: number of torch threads, if the networks run on the CPU; vlaflow bench latency uses one.
        device: where the networks run.
        dtype: what they compute in; bf16 halves the memory of their layers.
        engine: what computes chunks: programs that vlaflow deploy built (aoti, openvino), the networks (eager), fused layers
            on a GPU (graphs, graphs-fp8), or the fastest program available (auto).
    """

    checkpoint: Annotated[str, tyro.conf.Positional]
    robot: str | None = None
    compute: str | None = None
    budget_ms: Positive | None = None
    steps: Count = 10
    observation_keys: str = "metaworld"
    image: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    state: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    default_prompt: str | None = None
    n_action_steps: Count | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Range(0, 65535)] = 8000
    token: str | None = None
    batch: Count = 8
    wait_ms: NotNegative = 2.0
    queue: Count = 32
    deadline_ms: Positive = 10_000.0
    most_mib: Positive | None = None
    guided: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    connections: Count = 32
    dashboard: bool = False
    log_format: Literal["text", "json"] = "text"
    threads: Count = 1
    device: str = "cpu"
    dtype: Literal["fp32", "bf16"] = "fp32"
    engine: Literal["auto", "eager", "aoti", "openvino", "graphs", "graphs-fp8"] = "auto"
    hub: HubGroup = ONLINE


def main(argv: list[str]) -> int:
    """Serve until interrupted; returns the exit status."""
    a = parse_arguments(ServeArguments, "vlaflow serve", argv)

    import torch

    from vlaflow.compute import sampler_choice
    from vlaflow.compute.auto import default_name
    from vlaflow.compute.parse import parse
    from vlaflow.compute.spelling import Checkpoint, Knobs
    from vlaflow.errors import ConfigError
    from vlaflow.hub import origin
    from vlaflow.policies.base import Policy
    from vlaflow.policies.engines import for_budgets
    from vlaflow.policies.provenance import fingerprint
    from vlaflow.policies.robots import robot_folder
    from vlaflow.serving.engine import EngineConfig
    from vlaflow.serving.observation_keys import choose
    from vlaflow.serving.request_log import JsonLines
    from vlaflow.serving.server import PolicyServer, ServerConfig

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if a.log_format == "json" else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    torch.set_num_threads(a.threads)
    folder: Path = robot_folder(a.checkpoint, a.robot)
    name = (a.compute or default_name(folder)) if a.budget_ms is None else f"budget:{a.budget_ms:g}"
    home = Checkpoint(folder, fingerprint(folder))
    knobs = Knobs(a.steps, device=a.device, threads=a.threads, dtype=a.dtype)
    engine, knobs = for_budgets(a.engine, (name,), knobs, home)
    compute = parse(name, knobs, home)
    policy = Policy.from_pretrained(folder, a.device, a.dtype, engine=engine)
    knobs = replace(knobs, engine=policy.model.engine)
    views = tuple(policy.views)
    calibration = sampler_choice.load(home)

    @lru_cache(maxsize=64)  # choosing a policy reads files
    def within(milliseconds: float) -> ComputePolicy:
        return parse(f"budget:{milliseconds:g}", knobs, home)

    config = ServerConfig(
        **choose(a.observation_keys, views, a.image, a.state, a.default_prompt, stateless=not policy.stats["state"].dim),
        host=a.host,
        port=a.port,
        token=a.token if a.token is not None else os.environ.get("VLAFLOW_TOKEN"),
        engine=EngineConfig(a.batch, a.wait_ms, a.queue, a.deadline_ms, a.guided),
        most_bytes=None if a.most_mib is None else int(a.most_mib * 2**20),
        connections=a.connections,
        n_action_steps=a.n_action_steps,
        budget=within,
        dashboard=a.dashboard,
        checkpoint=origin(folder) or str(a.checkpoint),
        fingerprint=home.fingerprint,
        calibrated_on=calibration.episodes if calibration else None,
    )

    gc.collect()
    gc.freeze()  # going through all objects of torch takes as long as several chunks

    async def serve() -> None:
        server = PolicyServer(policy, compute, config)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.stop)
        await server.serve()

    try:
        asyncio.run(serve())
    except OSError as error:
        elsewhere = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        cure = "name an address of this machine with --host" if elsewhere else "choose another --port"
        raise ConfigError(f"Cannot listen on {a.host}:{a.port} ({error.strerror}); {cure}.") from error
    return 0
