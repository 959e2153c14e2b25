"""The process pool: order, errors, deaths, signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.simulators import jobs
from vlaflow.errors import ConfigError, DataError
from vlaflow.simulators.workers import JobError, WorkerError, iterate_jobs, make_vector, run_jobs


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_results_come_in_the_order_of_the_jobs(workers):
    """Whatever finishes first."""
    seen = []
    result = run_jobs(jobs.slow_square, list(range(7)), workers, progress=lambda done, total: seen.append((done, total)))
    assert result == [i * i for i in range(7)]
    assert seen == [(i, 7) for i in range(1, 8)]


def test_no_jobs_need_no_workers():
    """An empty list is a list."""
    assert run_jobs(jobs.slow_square, [], 2) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_the_error_of_a_job_keeps_its_kind_and_names_the_job(workers):
    """A user can fix it, so it must arrive as what it is."""
    with pytest.raises(DataError, match=r"Three is not a number I like\. \(in job '3'\)"):
        run_jobs(jobs.refuse_three, [1, 2, 3, 4], workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_defect_in_a_job_keeps_its_traceback(workers):
    """Anything that is not a VlaflowError is ours to fix, and needs the line."""
    with pytest.raises(JobError, match="job '0' failed with ZeroDivisionError") as caught:
        run_jobs(jobs.divide_by_zero, [1, 0], workers)
    assert "return 1 // job" in str(caught.value.__cause__)


def test_a_result_that_cannot_be_sent_is_an_error_and_not_a_hang():
    """Pickling happens after the job, where a mistake is easily lost."""
    with pytest.raises(JobError, match=r"[Pp]ickle"):
        run_jobs(jobs.not_picklable, [1], 1)


def test_a_function_that_cannot_be_sent_is_refused():
    """Lambdas are not importable by name."""
    with pytest.raises(ConfigError, match="function of a module"):
        run_jobs(lambda job: job, [1], 1)


def test_a_dead_worker_is_reported_with_its_signal_and_job():
    """The kernel's out-of-memory killer leaves no other trace."""
    with pytest.raises(WorkerError, match=r"died \(signal SIGKILL\) during job '2'.*fewer workers"):
        run_jobs(jobs.kill_self, [1, 2, 3], 1)


def test_setup_runs_once_per_worker_and_reaches_every_job():
    """Loading a policy is dear."""
    assert run_jobs(jobs.add_offset, [1, 2, 3], 2, setup=jobs.make_offset) == [101, 102, 103]
    with pytest.raises(DataError, match="setup of a worker"):
        run_jobs(jobs.add_offset, [1], 1, setup=jobs.broken_setup)


def test_workers_have_one_thread_each():
    """A worker per core and a thread pool per worker would fight."""
    before = dict(os.environ)
    results = run_jobs(jobs.threads_and_pid, [0, 1], 2)
    assert [r[:2] for r in results] == [(1, "1"), (1, "1")]
    assert os.getpid() not in {r[2] for r in results}
    assert dict(os.environ) == before


def test_leaving_the_iteration_early_ends_the_workers():
    """A generator that is closed must not leave processes."""
    import multiprocessing

    iterator = iterate_jobs(jobs.slow_square, list(range(20)), 2)
    next(iterator)
    iterator.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 1), (signal.SIGKILL, -9)])
def test_signals_leave_no_process_behind(number, status):
    """Not even SIGKILL of the parent, which gets no chance to clean up."""
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-m", "tests.simulators.jobs"],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # a shell's background jobs ignore Ctrl-C, and their children would too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 (no threads here)
    )
    with parent.stdout as output:
        assert [output.readline() for _ in range(2)] == ["busy\n"] * 2
    children = _children(parent.pid)
    assert len(children) >= 2
    parent.send_signal(number)
    code = parent.wait(60)
    assert code == status or (number == signal.SIGINT and code in (1, 130, -2))
    deadline = time.monotonic() + 8
    while any(_alive(c) for c in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [c for c in children if _alive(c)]


def _children(pid):
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_frames_are_the_same_in_this_process_and_in_workers():
    """The image may not depend on who took it."""
    work = [("metaworld/window-close-v3", seed) for seed in (1000, 1001)]
    here, there = run_jobs(jobs.first_frame, work, 0), run_jobs(jobs.first_frame, work, 2)
    assert np.array_equal(here, there)


def test_a_vector_environment_steps_chunks_in_parallel():
    """gymnasium's own vector class drives these environments."""
    vector = make_vector("metaworld/window-close-v3", 2, size=32, n_action_steps=4)
    try:
        observation, _ = vector.reset(seed=[1000, 1001])
        assert observation["pixels"].shape == (2, 32, 32, 3)
        observation, reward, *_, info = vector.step(np.zeros((2, 4, 4), np.float32))
        assert reward.shape == (2,)
        assert info["executed"].tolist() == [4, 4]
    finally:
        vector.close()
