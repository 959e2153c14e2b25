"""``vlaflow COMMAND ...``: imports only the module of the command, and prints errors as sentences.

A command is a module here with ``main(argv: list[str]) -> int`` that returns an exit status and reads its arguments with
tyro. No heavy package may be imported at the top of a module: ``vlaflow --help`` must be instant.

Exit status: 0 success, 1 a failed check, 2 an error that the user can fix, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from vlaflow import __version__
from vlaflow.errors import ConfigError, VlaflowError, nearest
from vlaflow.outputs import REFUSALS, require_system
from vlaflow.packages import EXTRAS, missing
from vlaflow.text import one_line

COMMANDS = {
    "demo": "from nothing to an evaluated policy and a report, in some ten minutes",
    "record": "record demonstrations of scripted experts as a LeRobot data set",
    "record-vqa": "record questions about simulated scenes as a VQA data set",
    "train": "train a policy, or one of its later stages, by recipe",
    "plan": "say what a recipe needs: memory per GPU, epochs, hours",
    "calibrate": "choose the sampler, exits or refinement of a checkpoint on held-out data",
    "bench": "time a checkpoint on this machine, part by part",
    "deploy": "compile a checkpoint's chunks for this machine",
    "eval": "measure a checkpoint's success rate and latency in an environment",
    "merge": "merge the shards of an evaluation that ran on several machines",
    "eval-vqa": "measure a checkpoint's accuracy on questions about images",
    "serve": "serve a checkpoint with openpi's websocket protocol",
    "eval-realtime": "evaluate in real time, with simulated inference delays",
    "reproduce": "test a claim of one of the papers at the size of a laptop",
    "export": "write a checkpoint in LeRobot's layout",
    "check": "check that an environment or a checkpoint keeps its contract",
    "data": "check or show a data set; fit and compare action tokenizers; report on latent actions",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the console script and ``python -m vlaflow`` end with what this returns."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except VlaflowError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        return _refuse(missing(package))
    except KeyboardInterrupt:
        _refuse("Interrupted.")
        return 130
    except BrokenPipeError:  # the reader closed the pipe, as in `vlaflow --help | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # of the disk, at a place where nothing more can be said
        if error.errno not in REFUSALS:
            raise
        file = error.filename or "A file"
        return _refuse(f"{file} cannot be read or written ({error.strerror}). Correct that, and repeat the command.")


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return _show(_help())
    if arguments[0] == "--version":
        from vlaflow.versions import versions

        return _show("\n".join(f"{name} {version}" for name, version in versions().items()))
    name, *rest = arguments
    if name not in COMMANDS:
        raise ConfigError(f"There is no command '{name}'; {nearest(name, COMMANDS)} (vlaflow --help lists them)")
    require_system()
    command = importlib.import_module(f"vlaflow.cli.{name.replace('-', '_')}")
    status: int = command.main(rest)
    return status


def _help() -> str:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    return f"""vlaflow {__version__}: train, calibrate, evaluate and serve vision-language-action policies.

usage: vlaflow COMMAND ...

{listed}

vlaflow COMMAND --help   its options, with an example
vlaflow --version        versions of vlaflow and its dependencies"""


def _show(text: str) -> int:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    return 0


def _refuse(sentence: str) -> int:
    sys.stderr.write(one_line(sentence) + "\n")
    return 2
