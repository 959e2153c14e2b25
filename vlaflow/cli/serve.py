"""``vlaflow serve CKPT``: a checkpoint behind openpi's websocket protocol."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from vlaflow.compute.base import ComputePolicy


@dataclass(frozen=True)
class ServeArguments:
    """Serve a checkpoint to robots that speak openpi's protocol.

    Example: vlaflow serve runs/demo/rated --observation-keys metaworld --compute refine

    Listens on this machine alone; other machines need --host and a --token. Ctrl-C finishes what runs.

    Args:
        checkpoint: folder, or Hugging Face repository id.
        compute: how much to compute, as in vlaflow eval.
        budget_ms: whatever fits so many milliseconds on this machine, in place of --compute (vlaflow bench latency CKPT first).
        steps: solver steps per round, where the compute policy states none.
        observation_keys: which keys clients send: metaworld, libero, droid, aloha, roboarena, or one that another package
        brings.
        image: key of an image, in the order of the policy's views, in place of the layout's; repeat for more.
        state: key of a part of the state, in place of the layout's; repeat for more.
        host: address to listen on.
        port: of the server; 0 takes a free one.
        token: clients must send it; by default VLAFLOW_TOKEN of the environment, which no list of processes shows.
        batch: most requests answered together.
        wait_ms: how long the first request of a batch waits for company.
        queue: most requests waiting.
        deadline_ms: a request that has waited so long is not computed, unless it brings a deadline of its own.
        most_mib: largest request; a client can make the server hold two of them.
        guided: continue committed actions by guidance even where the checkpoint was trained for them.
        connections: most clients at a time.
        dashboard: serve a page to watch and instruct the policy at /dashboard.
        log_format: a sentence per event, or a JSON object.
        threads: of torch, where the networks run on the CPU; vlaflow bench latency measures one.
        device: where the networks run.
    """

    checkpoint: Annotated[str, tyro.conf.Positional]
    compute: str = "dense"
    budget_ms: float | None = None
    steps: int = 10
    observation_keys: str = "metaworld"
    image: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    state: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    batch: int = 8
    wait_ms: float = 2.0
    queue: int = 32
    deadline_ms: float = 10_000.0
    most_mib: float = 64.0
    guided: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    connections: int = 32
    dashboard: bool = False
    log_format: Literal["text", "json"] = "text"
    threads: int = 1
    device: str = "cpu"


def main(argv: list[str]) -> int:
    """Serve until interrupted; returns the exit status."""
    a = tyro.cli(ServeArguments, args=argv, prog="vlaflow serve")

    import torch

    from vlaflow.compute.parse import parse
    from vlaflow.compute.spelling import Checkpoint, Knobs
    from vlaflow.errors import ConfigError
    from vlaflow.policies.base import Policy
    from vlaflow.policies.checkpoint import local_folder
    from vlaflow.policies.provenance import fingerprint
    from vlaflow.serving.engine import EngineConfig
    from vlaflow.serving.observation_keys import choose
    from vlaflow.serving.request_log import JsonLines
    from vlaflow.serving.server import PolicyServer, ServerConfig

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if a.log_format == "json" else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    torch.set_num_threads(a.threads)
    folder: Path = local_folder(a.checkpoint)
    name = a.compute if a.budget_ms is None else f"budget:{a.budget_ms:g}"
    home, knobs = Checkpoint(folder, fingerprint(folder)), Knobs(a.steps, device=a.device, threads=a.threads)
    compute = parse(name, knobs, home)
    policy = Policy.from_pretrained(folder, a.device)
    views = tuple(policy.model.backbone.views)

    @lru_cache(maxsize=64)  # which policy fits is read from files
    def within(milliseconds: float) -> ComputePolicy:
        return parse(f"budget:{milliseconds:g}", knobs, home)

    config = ServerConfig(
        **choose(a.observation_keys, views, a.image, a.state),
        host=a.host,
        port=a.port,
        token=a.token if a.token is not None else os.environ.get("VLAFLOW_TOKEN"),
        engine=EngineConfig(a.batch, a.wait_ms, a.queue, a.deadline_ms, a.guided),
        most_bytes=int(a.most_mib * 2**20),
        connections=a.connections,
        budget=within,
        dashboard=a.dashboard,
        checkpoint=str(a.checkpoint),
        fingerprint=home.fingerprint,
    )

    async def serve() -> None:
        server = PolicyServer(policy, compute, config)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.stop)
        await server.serve()

    try:
        asyncio.run(serve())
    except OSError as error:
        raise ConfigError(f"{a.host}:{a.port} cannot be listened on ({error.strerror}); choose another --port.") from error
    return 0
