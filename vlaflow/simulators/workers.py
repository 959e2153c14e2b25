"""A small pool of processes for episodes, used by recording and evaluation.

Its guarantees: results in the order of the jobs, whatever the number of workers; the error of a job is raised in the
parent and names the job; a worker that dies is noticed at once; Ctrl-C and SIGTERM leave no process behind. Each worker
is a new interpreter (OpenGL does not survive a fork) with one thread for BLAS, torch and Mesa, because there is already one
worker per core. Jobs are responsible for determinism: a job contains its seed and uses no global random state.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

from vlaflow.errors import ConfigError, VlaflowError
from vlaflow.simulators.base import Render, make

Job = TypeVar("Job")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


class WorkerError(VlaflowError):
    """A worker process ended without returning a result."""


class JobError(Exception):
    """A job raised something other than a `VlaflowError`: a bug. Its cause is the worker's traceback."""


class _Remote(Exception):  # noqa: N818 - never raised, only shown as the cause of another
    """The traceback of another process, as text."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


def run_jobs(
    function: Callable[..., Result],
    jobs: Sequence[Job],
    workers: int,
    *,
    setup: Callable[[], Any] | None = None,
    progress: Progress | None = None,
    finished: Callable[[int, Result], None] | None = None,
    threads: int = 1,
) -> list[Result]:
    """Run ``function`` on every job and return the results in the order of the jobs. See `iterate_jobs`."""
    found = iterate_jobs(function, jobs, workers, setup=setup, progress=progress, finished=finished, threads=threads)
    return list(found)


def iterate_jobs(
    function: Callable[..., Result],
    jobs: Sequence[Job],
    workers: int,
    *,
    setup: Callable[[], Any] | None = None,
    progress: Progress | None = None,
    finished: Callable[[int, Result], None] | None = None,
    threads: int = 1,
) -> Generator[Result, None, None]:
    """Run ``function`` on every job and yield the results in the order of the jobs, each as soon as possible.

    Args:
        function: importable by name (or a functools.partial of such); called as ``function(job)``, or as
            ``function(job, tools)`` when there is a ``setup``.
        jobs: picklable.
        workers: processes; 0 runs in this process, one job after the other, for debugging.
        setup: called once in every worker before its first job; its return value (a loaded policy, ...) is ``tools``.
        progress: called in this process as ``progress(done, total)`` after every finished job.
        finished: called in this process with the number and result of each job as soon as it is done, in any order.
        threads: BLAS and torch threads of each worker.

    Raises:
        VlaflowError: raised by a job; the name of the job is added.
        JobError: any other exception of a job, with its traceback.
        WorkerError: when a worker dies.
    """
    if workers < 0 or threads < 1:
        raise ConfigError(f"workers must be at least 0 and threads at least 1, got {workers} and {threads}.")
    if workers == 0 or not jobs:
        tools = (setup(),) if setup and jobs else ()
        for done, job in enumerate(jobs, 1):
            outcome = _attempt(function, job, tools)
            if isinstance(outcome, _Failure):
                raise outcome.rebuild(job)
            if finished:
                finished(done - 1, outcome)
            if progress:
                progress(done, len(jobs))
            yield outcome
        return
    with _signals(), _Pool(function, setup, min(workers, len(jobs)), threads) as pool:
        yield from pool.run(jobs, progress, finished)


class _Failure:
    """Result of a job, or of the setup, that raised an exception."""

    def __init__(self, error: BaseException) -> None:
        self.text = traceback.format_exc()
        self.summary = f"{type(error).__name__}: {error}"
        self.kind: type[VlaflowError] | None = type(error) if isinstance(error, VlaflowError) else None
        self.message = str(error)
        try:
            ForkingPickler.dumps(self.kind)
        except Exception:  # a class defined inside a function cannot be sent
            self.kind = VlaflowError

    def rebuild(self, job: Any) -> Exception:
        """The exception to raise in the parent."""
        error: Exception
        if self.kind is not None:
            error = self.kind(f"{self.message} (in {_named(job)})")
        else:
            error = JobError(f"{_named(job)} failed with {self.summary}")
        error.__cause__ = _Remote(self.text)
        return error


def _named(job: Any) -> str:
    if job is _SETUP:
        return "the setup of a worker"
    text = str(getattr(job, "name", job))
    return f"job '{text if len(text) <= 120 else text[:117] + '...'}'"


_SETUP = object()


def _attempt(function: Callable[..., Any], job: Any, tools: tuple[Any, ...]) -> Any:
    try:
        return function(job, *tools)
    except Exception as error:
        return _Failure(error)


class _Pool:
    def __init__(self, function: Callable[..., Any], setup: Callable[[], Any] | None, workers: int, threads: int) -> None:
        try:
            ForkingPickler.dumps((function, setup))
        except Exception as error:
            raise ConfigError(f"A worker cannot receive {function!r}: {error}. Use a function of a module.") from error
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        with _environment(dict.fromkeys(_THREADS, str(threads)) | {"LP_NUM_THREADS": "1"}):
            for number in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_work, args=(theirs, function, setup, threads), name=f"vlaflow-worker-{number}", daemon=True
                )
                process.start()
                theirs.close()
                self.pipes.append(ours)
                self.processes.append(process)

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the pipes, which ends idle workers, and stop the busy ones."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            if process.is_alive():
                process.join(0.5)
            if process.is_alive():
                process.terminate()
                process.join(2)
            if process.is_alive():
                process.kill()
                process.join()

    def run(self, jobs: Sequence[Any], progress: Progress | None, finished: Callable[[int, Any], None] | None) -> Iterator[Any]:
        results: dict[int, Any] = {}
        running: dict[Connection, int] = {}
        waiting = iter(range(len(jobs)))
        due = done = 0
        for pipe in self.pipes:
            self._assign(pipe, waiting, running, jobs)
        while due < len(jobs):
            ready = set(wait(list(running)))
            for pipe in [p for p in running if p in ready]:
                number = running.pop(pipe)
                try:
                    outcome, in_setup = pipe.recv()
                except (EOFError, ConnectionResetError):
                    self._dead(pipe, jobs[number])
                if isinstance(outcome, _Failure):
                    raise outcome.rebuild(_SETUP if in_setup else jobs[number])
                results[number] = outcome
                done += 1
                if finished:
                    finished(number, outcome)
                if progress:
                    progress(done, len(jobs))
                self._assign(pipe, waiting, running, jobs)
            while due in results:
                yield results.pop(due)
                due += 1

    def _assign(self, pipe: Connection, waiting: Iterator[int], running: dict[Connection, int], jobs: Sequence[Any]) -> None:
        number = next(waiting, None)
        if number is None:
            return
        try:
            pipe.send(jobs[number])
        except (BrokenPipeError, ConnectionResetError):
            self._dead(pipe, jobs[number])
        running[pipe] = number

    def _dead(self, pipe: Any, job: Any) -> None:
        process = self.processes[self.pipes.index(pipe)]
        process.join(5)
        code = process.exitcode
        how = f"exit status {code}"
        if code is not None and code < 0:
            how = f"signal {signal.Signals(-code).name}"
        hint = " The kernel kills processes when memory runs out: try fewer workers." if code == -signal.SIGKILL else ""
        raise WorkerError(f"{process.name} died ({how}) during {_named(job)}.{hint}")


def _work(pipe: Connection, function: Callable[..., Any], setup: Callable[[], Any] | None, threads: int) -> None:
    """The main loop of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and then ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    tools: tuple[Any, ...] = ()
    ready = False
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            break
        outcome: Any = None
        if not ready:
            outcome = _prepare(setup, threads)
            ready = not isinstance(outcome, _Failure)
            tools = (outcome,) if setup and ready else ()
        if ready:
            outcome = _attempt(function, job, tools)
        try:
            pipe.send((outcome, not ready))
        except (BrokenPipeError, ConnectionResetError):
            break
        except Exception as error:  # the result cannot be pickled
            pipe.send((_Failure(error), False))
    with suppress(OSError):
        pipe.close()


def _prepare(setup: Callable[[], Any] | None, threads: int) -> Any:
    import sys

    try:
        value = setup() if setup else None
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
    except Exception as error:
        return _Failure(error)
    return value


def _end_with(parent: Any) -> None:
    """Exit when the parent process ends, even if it was killed."""
    parent.join()
    os._exit(1)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for child processes started inside the context, which read them before loading BLAS."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _signals() -> Iterator[None]:
    """Turn SIGTERM into SystemExit while workers run, so that workers are stopped and temporary files removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def make_vector(
    name: str, n: int, *, render: Render = "fast", size: int | None = None, n_action_steps: int | None = None
) -> Any:
    """Create N copies of an environment as a `gymnasium.vector.AsyncVectorEnv`, one process each.

    Args:
        name: "suite/task".
        n: number of environments.
        n_action_steps: None for steps with single actions (n, D), k for chunks (n, k, D) executed open loop.
        render: as for `make`.
        size: as for `make`.
    """
    from vlaflow.simulators import gl

    gl.prepare()
    from gymnasium.vector import AsyncVectorEnv

    build = functools.partial(_build, name, render, size, n_action_steps)
    # No automatic reset: the caller chooses the seed of the next episode.
    return AsyncVectorEnv([build] * n, context="spawn", autoreset_mode="Disabled")


def _build(name: str, render: Render, size: int | None, n_action_steps: int | None) -> Any:
    env = make(name, render=render, size=size)
    if n_action_steps is None:
        return env
    from vlaflow.simulators.chunks import ChunkEnv

    return ChunkEnv(env, n_action_steps)
