"""Processes that train, alone or together as ``torchrun`` would start them: forked from one that has imported what they need,
because imports take longer than these trainings.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import torch
from torch import distributed as dist

IMPORTED = (
    "tests.training.together",
    "tests.training.layouts",
    "vlaflow.evaluation.rollout",
    "torch._dynamo",
    "accelerate",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
)
"""By the process that all others are forked from. It runs nothing, for threads do not survive a fork."""
PATIENCE_S = 10
"""How long the others of a group may take to notice that one has failed; then they are killed."""


def forked() -> multiprocessing.context.ForkServerContext:
    """The context of processes that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    return context


def launch(job: Callable[..., None], out: Path, *arguments: object, world: int = 2) -> list[int]:
    """Run ``job(out, *arguments)`` in ``world`` processes of one thread each; returns their exit statuses, by rank.

    What a process failed with is in ``out/failed-RANK.txt``.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    context, processes = forked(), []
    for rank in range(world):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "OMP_NUM_THREADS": 1}
        environment = {**meeting, "CUDA_VISIBLE_DEVICES": "", **{name: str(value) for name, value in own.items()}}
        processes.append(context.Process(target=_work, args=(environment, job, out, arguments)))
        processes[-1].start()
    running = processes
    while running and all(process.exitcode in {None, 0} for process in processes):
        wait([process.sentinel for process in running])
        running = [process for process in running if process.is_alive()]
    for process in processes:
        process.join(PATIENCE_S)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def failures(out: Path) -> str:
    """What the processes of jobs in ``out`` have failed with."""
    return "\n".join(file.read_text() for file in sorted(out.glob("failed-*.txt")))


def _work(environment: dict[str, str], job: Callable[..., None], out: Path, arguments: tuple[object, ...]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        job(out, *arguments)
        dist.destroy_process_group()
    except BaseException:
        (out / f"failed-{environment['RANK']}.txt").write_text(traceback.format_exc())
        raise
