"""Runs commands in one process, because starting one takes longer than most of them: python -m tests.commands

Reads the arguments of a command from each line of standard input, as a JSON list, and writes what became of it as a line of
JSON: its status, what it wrote to standard error (or the traceback), and what it printed.
"""

import io
import json
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout

from vlaflow.cli.main import main


def outcome(arguments):
    said, printed = io.StringIO(), io.StringIO()
    with redirect_stderr(said), redirect_stdout(printed):
        try:
            status = main(arguments)
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            status = None
            traceback.print_exc()
    return {"status": status, "said": said.getvalue(), "printed": printed.getvalue()}


if __name__ == "__main__":
    answers = sys.stdout
    for line in sys.stdin:
        answers.write(json.dumps(outcome(json.loads(line))) + "\n")
        answers.flush()
