"""Every operation of every command is killed, and fails in every way; then the command is repeated.

    python -m tests.crashes.walk                              # make crash: everything
    python -m tests.crashes.walk --command train --kind kill --at 17
    python -m tests.crashes.walk --every 8                    # continues where it was interrupted; later --every 4 tries more

What must hold:

- a command that fails ends with exit status 2 and a sentence, and leaves no part behind that it could remove, other than a
  finished data set that could not be renamed, which the sentence says how to keep;
- repeated after a kill or a failure, it ends with the same files as without, byte for byte but for measured times; or, where it
  had finished, it says so in a sentence and the files are the same;
- nothing is written in place but journals: all other files appear by a rename.
"""

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.crashes.commands import COMMANDS, TIMES, fresh_copy, stock, warm_up
from tests.crashes.faults import CREATE, KINDS, WRITE, Fault, attempt, files_of

PARTS = re.compile(r"(^|/)\.(part-|partial-|.*\.partial(/|$))")
"""What is being written; never left after an error, and swept by the next run after a kill."""


NAMED_BY_TIME = re.compile(r"[.]lock$|[.]tfevents[.]")
"""Locks, which hold nothing, and TensorBoard's files, whose names hold the time and the process."""
DONE = re.compile("exists|is not empty|no shard")
"""A command that finds its work done may say so."""


class Case:
    """A command, and what it leaves when nothing happens."""

    def __init__(self, name, source, place):
        self.name, self.command, self.source, self.place = name, COMMANDS[name], source, place
        found = self.run()
        assert found.status in (0, 1), f"{name}: {found.err}"
        self.operations, self.whole = found.operations, self.left()

    def run(self, fault=None, *, repeated=False):
        """Run it, in a fresh copy of the stock unless it is repeated."""
        if not repeated:
            fresh_copy(self.source, self.place)
        return attempt(self.command.run, self.place, fault)

    def left(self):
        """All files, without measured times."""
        files = {path: data for path, data in files_of(self.place).items() if not NAMED_BY_TIME.search(path)}
        return {path: self._untimed(path, data) for path, data in files.items()}

    def _untimed(self, path, data):
        if re.search(self.command.timed, path):
            return b""
        if path.endswith(".json"):
            return _without_times(json.loads(data))
        if path.endswith(".jsonl") and not path.startswith("questions/"):
            return [_without_times(json.loads(line)) for line in data.splitlines()]
        if path.endswith("README.md"):
            return re.sub(rb", in [\d:]+", b"", data)
        return b"" if "tfevents" in path else data

    def points(self, kind):
        """The operations at which this can happen."""
        return [number for number, each in enumerate(self.operations) if each.group in KINDS[kind]]

    def find(self, kind, path, name):
        """The last such operation: function and pattern of the path."""
        found = [n for n in self.points(kind) if re.search(path, self.operations[n].path) and self.operations[n].name == name]
        return found[-1]

    def in_place(self):
        """Visible files that are written where they stay, other than journals."""
        journal = re.compile(self.command.journals)
        written = {each.path for each in self.operations if each.group in (CREATE, WRITE) and each.name != "mkdir"}
        return sorted(path for path in written if not re.search(r"(^|/)\.", path) and not journal.search(path))

    def wrong(self, fault):
        """What is wrong after this fault, in words; "" if nothing is."""
        found = self.run(fault)
        if fault.kind == "kill" and found.status != -9:
            return f"it was not killed: {found.status} {found.err[-2000:]}"
        if fault.kind != "kill":
            if not found.reached:
                return "the operation was not reached"
            if found.status not in (0, 1, 2):
                return f"status {found.status}: {found.err[-3000:]}"
            if found.status == 2 and (not re.search(r"[.)]$", found.sentence) or "Traceback" in found.err):
                return f"no sentence: {found.err[-2000:]}"
            removable = fault.kind != "read-only" and self.operations[fault.at].name not in ("unlink", "rmdir")
            hidden = [path for path in self.parts() if path.split("/")[0] not in found.sentence]
            if removable and hidden:
                return f"left behind: {hidden}"
        ended = found.status in (0, 1)
        again = self.run(repeated=True)
        if again.status not in (0, 1, 2):
            return f"repeated: status {again.status}: {again.err[-3000:]}"
        if again.status == 2 and not (DONE.search(again.sentence) and self.complete()):
            return f"repeated: {again.sentence}"
        if hidden := self.parts():
            return f"repeated: left behind: {hidden}"
        left = self.left()
        if other := [path for path in {**self.whole, **left} if self.whole.get(path) != left.get(path)]:
            return f"repeated{' after success' if ended else ''}: other files: {other}"
        return ""

    def parts(self):
        """What is being written by nobody."""
        return [path for path in files_of(self.place) if PARTS.search(path)] + [
            path.relative_to(self.place).as_posix() for path in self.place.rglob(".part*") if path.is_dir()
        ]

    def complete(self):
        """Whether everything is there already."""
        left = self.left()
        return all(left.get(path) == data for path, data in self.whole.items())


def _without_times(data):
    if isinstance(data, dict):
        return {key: _without_times(value) for key, value in data.items() if key not in TIMES}
    return [_without_times(each) for each in data] if isinstance(data, list) else data


def walk(case, kinds, every, ats, kept):
    """Try what did not survive yet, by ``kept``, a file with a line of JSON per fault that was tried."""
    survived = (each for each in last(kept) if each["operations"] == len(case.operations) and not each["wrong"])
    done = {(each["kind"], each["at"]) for each in survived}
    for kind in kinds:
        for at in ats or case.points(kind)[::every]:
            if (kind, at) in done:
                continue
            wrong, each = case.wrong(Fault(kind, at)), case.operations[at]
            if wrong:
                wrong = f"{kind} at {at}, {each.name} of {each.path}: {wrong}"
                say(f"{case.name}: {wrong}")
            found = {"command": case.name, "operations": len(case.operations), "kind": kind, "at": at, "wrong": wrong}
            with kept.open("a") as file:
                file.write(json.dumps(found) + "\n")


def last(file):
    """What became of each fault when it was tried last."""
    tried = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return list({(each["kind"], each["at"]): each for each in tried}.values())


def say(text):
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def table(folder, names):
    """A row per command that was tried."""
    rows = ["| command | operations | tried | lost |", "|---|---|---|---|"]
    for name in names:
        if tried := last(folder / f"{name}.jsonl"):
            counts = Counter(each["kind"] for each in tried)
            kinds = ", ".join(f"{kind} {count}" for kind, count in counts.items())
            lost = sum(bool(each["wrong"]) for each in tried)
            rows.append(f"| `{name}` | {tried[-1]['operations']} | {len(tried)} ({kinds}) | {lost} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--command", action="append", choices=COMMANDS)
    parser.add_argument("--kind", action="append", choices=KINDS)
    parser.add_argument("--at", type=int, action="append")
    parser.add_argument("--every", type=int, default=1, help="only every n-th operation")
    parser.add_argument("--out", type=Path, default=Path("runs/crash"), help="what survived is kept here and not tried again")
    given = parser.parse_args()
    names, written = given.command or list(COMMANDS), []
    given.out.mkdir(parents=True, exist_ok=True)
    warm_up()
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "stock"
        source.mkdir()
        stock(source)
        for name in names:
            case = Case(name, source, Path(place) / "place")
            if found := case.in_place():
                written.append(name)
                say(f"{name}: written in place: {found}")
            walk(case, given.kind or KINDS, given.every, given.at, given.out / f"{name}.jsonl")
    say(table(given.out, names))
    return 1 if written or any(each["wrong"] for name in names for each in last(given.out / f"{name}.jsonl")) else 0


if __name__ == "__main__":
    sys.exit(main())
