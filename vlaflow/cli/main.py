"""``vlaflow COMMAND ...``: finds the command's module, imports only that one, and turns errors into sentences.

A command is a module here with ``main(argv: list[str]) -> int`` that returns an exit status and reads its arguments with
tyro. Nothing heavy may be imported above: ``vlaflow --help`` answers at once.

Exit status: 0 done, 1 the command found something wrong (a failed check), 2 something the user can fix,
130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from vlaflow import __version__
from vlaflow.errors import ConfigError, VlaflowError, nearest
from vlaflow.packages import EXTRAS, missing

COMMANDS = {
    "demo": "from nothing to an evaluated policy and a report, in a quarter of an hour",
    "record": "let scripted experts demonstrate tasks and write a LeRobot dataset",
    "record-vqa": "ask about simulated scenes and write a question set",
    "train": "train a policy, or one of its later stages, by recipe",
    "calibrate": "measure when a checkpoint may answer before its last layer",
    "bench": "time a checkpoint on this machine, part by part",
    "eval": "measure a checkpoint's success rate and latency in an environment",
    "eval-vqa": "count a checkpoint's right answers to questions about images",
    "serve": "put a checkpoint behind openpi's websocket protocol",
    "eval-realtime": "drive an environment in real time, with simulated delays of inference",
    "check": "try an environment or a checkpoint against everything it promises",
    "data": "check or show a dataset; fit and compare action tokenizers; look at latent actions",
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
    except BrokenPipeError:  # the reader went away, as in `vlaflow --help | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return _show(_help())
    if arguments[0] == "--version":
        from vlaflow.versions import versions

        return _show("\n".join(f"{name} {version}" for name, version in versions().items()))
    name, *rest = arguments
    if name not in COMMANDS:
        raise ConfigError(f"There is no command '{name}'; {nearest(name, COMMANDS)} (vlaflow --help lists them)")
    command = importlib.import_module(f"vlaflow.cli.{name.replace('-', '_')}")
    status: int = command.main(rest)
    return status


def _help() -> str:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    return f"""vlaflow {__version__}: train, calibrate, evaluate and serve vision-language-action policies.

usage: vlaflow COMMAND ...

{listed}

vlaflow COMMAND --help   what it takes, with an example
vlaflow --version        versions of vlaflow and of what it stands on"""


def _show(text: str) -> int:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    return 0


def _refuse(sentence: str) -> int:
    sys.stderr.write(sentence + "\n")
    return 2
