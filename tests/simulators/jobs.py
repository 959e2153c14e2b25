"""Functions that the worker tests send to other processes."""

import os
import signal
import sys
import time

from vlaflow.errors import DataError


def slow_square(job):
    time.sleep(0.05 if job % 2 == 0 else 0.0)
    return job * job


def threads_and_pid(_job):
    import torch

    return torch.get_num_threads(), os.environ["LP_NUM_THREADS"], os.getpid()


def refuse_three(job):
    if job == 3:
        raise DataError("Three is not a number I like.")
    return job


def divide_by_zero(job):
    return 1 // job


def kill_self(job):
    if job == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return job


def not_picklable(job):
    return lambda: job


def make_offset():
    return 100


def broken_setup():
    raise DataError("There is no such checkpoint.")


def add_offset(job, offset):
    return job + offset


def sleep_long(_job):
    sys.stdout.write("busy\n")
    sys.stdout.flush()
    time.sleep(60)


def first_frame(job):
    from vlaflow.simulators import cached

    name, seed = job
    return cached(name, size=48).reset(seed=seed)[0]["pixels"]


if __name__ == "__main__":  # the signal tests run this file as a program
    from vlaflow.simulators.workers import run_jobs

    run_jobs(sleep_long, list(range(4)), 2)
