"""Does it matter who computes? Small networks trained by one process, by two copies, and sharded by layer over two.

    python -m benchmarks.layouts

Prints the tables of docs/scale.md: losses, a run that moves from two processes to one and back, one whose second process is
killed, and what each process gathers. Nothing is timed; the runs are those of ``tests.training.layouts``, in some minutes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from tests.training.layouts import everything
from vlaflow.training.metrics_log import read_log

ROWS = {
    "one-shared": "shared stack, 1 process × 2 parts",
    "copies-shared": "shared stack, 2 copies (DDP)",
    "sharded-shared": "shared stack, 2 processes, `--shard`",
    "one-expert": "action expert, 1 process × 2 parts",
    "copies-expert": "action expert, 2 copies (DDP)",
    "sharded-expert": "action expert, 2 processes, `--shard`",
    "recomputed": "the same with recomputed activations",
    "rounded": "shared stack, `--shard`, layers gathered in bfloat16",
    "moved": "shared stack, `--shard`: 2 processes, after step 2 one, after step 4 two",
    "killed": "shared stack, `--shard`: one of 2 killed in step 4, continued on 1",
}


BYTES = {
    "all": "the network",
    "layer": "its largest layer",
    "layers": "layers that were whole at once, at most",
    "root": "what stays whole during a step (embeddings, norms, heads)",
}
NETWORKS = {"qwen": "Qwen2.5-VL", "smol": "smol"}


@dataclass(frozen=True)
class Options:
    """Where.

    Args:
        folder: for the runs, which must not be there yet; a temporary one by default.
    """

    folder: Path | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Train and print."""
    options = tyro.cli(Options, description=__doc__, args=argv)
    for name, words in NETWORKS.items():
        with tempfile.TemporaryDirectory() as temporary:
            out = (options.folder or Path(temporary)) / name
            out.mkdir(parents=True)
            everything(out, name)
            print(f"### {words}\n\n{tables(out)}\n")
    return 0


def tables(out: Path) -> str:
    """Losses by run, and bytes by stack, as markdown."""
    lines = ["| run | " + " | ".join(f"step {n}" for n in range(1, 7)) + " |", "|---|" + "---|" * 6]
    for name, words in ROWS.items():
        lines.append(f"| {words} | " + " | ".join(f"{entry['loss']:.7f}" for entry in read_log(out / name)) + " |")
    lines += ["", "| bytes in each process | shared stack | action expert |", "|---|---|---|"]
    first, found = ([_counted(out, stack, rank) for stack in ("shared", "expert")] for rank in (0, 1))
    for key, words in BYTES.items():
        lines.append(f"| {words} | " + " | ".join(f"{each[key]:,}" for each in found) + " |")
    built = [f"{one['built']:,} and {other['built']:,}" for one, other in zip(first, found, strict=True)]
    lines.append(f"| weights held before they are shared, first process and others | {' | '.join(built)} |")
    lines.append("| exchanged while a checkpoint is written | " + " | ".join(f"{max(e['saved']):,}" for e in found) + " |")
    return "\n".join(lines)


def _counted(out: Path, stack: str, rank: int) -> dict[str, Any]:
    return json.loads((out / f"sharded-{stack}/rank-{rank}.json").read_text())


if __name__ == "__main__":
    raise SystemExit(main())
