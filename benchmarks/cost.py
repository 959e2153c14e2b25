"""What the four published systems cost at full size, by arithmetic alone: the tables at the end of docs/performance.md.

    python -m benchmarks.cost
    python -m benchmarks.cost --numbers float8

Nothing is measured and no network is built; see ``benchmarks.cost_model.cost`` for what is counted and what is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from benchmarks.cost_model import full_size
from benchmarks.cost_model.cost import (
    Cost,
    chunk,
    embed,
    expected,
    ladder,
    layers,
    mean_depth,
    prefix_pass,
    rating,
    step,
    step_without_cache,
    words,
)
from benchmarks.cost_model.hardware import BFLOAT16, FLOAT8, H200, RTX_4090, NumberFormat
from benchmarks.cost_model.shapes import PolicyShape

FORMATS = {f.name: f for f in (BFLOAT16, FLOAT8)}
MACHINES = (H200, RTX_4090)
A1_PAPER_TOKENS, A1_PAPER_CROPS = 680, 5
"""What A1's own counts belong to; its text says 352 tokens (docs/performance.md)."""


@dataclass(frozen=True)
class Options:
    """What to print.

    Args:
        numbers: format of weights and products.
    """

    numbers: Literal["bfloat16", "float8"] = "bfloat16"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, first column left, the others right."""
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def digits(value: float) -> str:
    """Three significant digits without an exponent; whole numbers beyond a thousand."""
    places = next((p for p, limit in ((3, 1), (2, 10), (1, 100)) if value < limit), 0)
    return f"{value:.{places}f}"


def _times(cost: Cost, numbers: NumberFormat) -> list[str]:
    return [digits(cost.milliseconds(machine, numbers)) for machine in MACHINES]


def systems() -> dict[str, PolicyShape]:
    """The four, A1 with both of its heads."""
    return {
        "AsyncVLA-3B": full_size.asyncvla(),
        "A1-FM 7B": full_size.a1_flow(),
        "A1-MLP 7B": full_size.a1_regression(),
        "iFlyBot-VLA 3B": full_size.iflybot(),
        "DFM-VLA 8B": full_size.dfm_vla(),
    }


def parts(numbers: NumberFormat) -> str:
    """A row per system: its size, a full pass over the observation, and a solver step at full depth."""
    columns = ["system", "parameters", "prefix tokens"]
    columns += [f"{part} {unit}" for part in ("prefix", "step") for unit in ("GFLOP", *(f"{m.name} ms" for m in MACHINES))]
    rows = []
    for name, shape in systems().items():
        size = [f"{shape.parameters / 1e9:.2f} B", str(shape.backbone.prefix)]
        both = [[digits(c.flops / 1e9), *_times(c, numbers)] for c in (prefix_pass(shape), step(shape))]
        rows.append([name, *size, *both[0], *both[1]])
    return table(columns, rows)


def chunks(numbers: NumberFormat) -> str:
    """A row per way of spending compute on one chunk."""
    asyncvla, dfm, a1, iflybot = full_size.asyncvla(), full_size.dfm_vla(), full_size.a1_flow(), full_size.iflybot()
    asked, written = (1, *full_size.A1_EXITS), full_size.iflybot(written=True)
    rows = {
        "AsyncVLA: prefix, 10 steps": chunk(asyncvla),
        "AsyncVLA: the same, rater, 10 more steps": chunk(asyncvla) + rating(asyncvla) + step(asyncvla) * 10,
        "AsyncVLA: prefix again at each of 10 steps, images once": embed(asyncvla) + step_without_cache(asyncvla) * 10,
        "A1-FM: prefix, 10 steps": chunk(a1),
        "A1-FM: all 14 exits evaluated, none taken, 10 steps each": ladder(a1, asked, 10),
        "A1-FM: all 14 exits evaluated, none taken, 2 steps each": ladder(a1, asked, 2),
        "A1-FM: exit after 6 layers, 2 steps each": ladder(a1, (1, 2, 4, 6), 2),
    }
    for budget in (1.0, 0.4):
        shares = full_size.a1_exit_shares(budget)
        name = f"A1-FM: exits at budget {budget}, 2 steps each ({mean_depth(shares):.1f} layers on average)"
        rows[name] = expected(a1, shares, 2, before=(1,))
    rows |= {
        "A1-MLP: prefix, head": chunk(full_size.a1_regression()),
        "iFlyBot-VLA: latent tokens as queries, 5 steps": chunk(iflybot),
        "iFlyBot-VLA: latent tokens generated one by one, 5 steps": chunk(written) + words(written, 10),
        "DFM-VLA: prefix once, 16 passes": chunk(dfm),
        "DFM-VLA: prefix once, 4 passes": chunk(dfm, steps=4),
        "DFM-VLA: prefix again at each of 16 passes": embed(dfm) + step_without_cache(dfm) * 16,
    }
    cells = [[n, digits(c.flops / 1e9), digits(c.moved(numbers) / 1e9), *_times(c, numbers)] for n, c in rows.items()]
    return table(["one chunk", "GFLOP", "GB moved", *(f"{m.name} ms" for m in MACHINES)], cells)


def a1_counts() -> dict[str, tuple[float, float]]:
    """A1's published GFLOPs and ours for the inputs they belong to: (published, ours), of which the first may be a difference
    of two published totals.
    """
    a1 = full_size.a1_flow(A1_PAPER_TOKENS, A1_PAPER_CROPS)
    asked = (1, *full_size.A1_EXITS)
    counts = {
        "vision tower and connector": (2013.36, embed(a1)),
        "one language layer": (323.61, layers(a1, 1)),
        "28 language layers": (9061.01, layers(a1)),
        "vision and language": (11074.37, prefix_pass(a1)),
        "one flow step (total with 10 steps − vision and language, by 10)": (5.593, step(a1)),
        "total, 10 steps": (11130.30, chunk(a1)),
        "total, every exit evaluated, 10 steps each": (11503.30, ladder(a1, asked, 10)),
        "total, every exit evaluated, 2 steps each": (11160.20, ladder(a1, asked, 2)),
        "regression head": (1.850, step(full_size.a1_regression())),
    }
    return {name: (published, cost.flops / 1e9) for name, (published, cost) in counts.items()}


def a1_table() -> str:
    """A1's figures next to ours."""
    rows = [
        [name, f"{published:,.2f}", f"{ours:,.2f}", f"{100 * (ours / published - 1):+.2f} %"]
        for name, (published, ours) in a1_counts().items()
    ]
    return table(["A1, GFLOP", "published", "here", "difference"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    numbers = FORMATS[tyro.cli(Options, description=__doc__, args=argv).numbers]
    peaks = [f"{m.name} {m.peak[numbers.name] / 1e12:g} TFLOP/s and {m.bandwidth / 1e12:g} TB/s" for m in MACHINES]
    print(
        f"Weights and products in {numbers.name}; {', '.join(peaks)}.", parts(numbers), chunks(numbers), a1_table(), sep="\n\n"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
