"""``vlaflow data fit-tokenizer`` and ``vlaflow data tokenizer-report``; their other arguments are in ``data``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from vlaflow.packages import PAGES, require
from vlaflow.ranges import Count, Positive

if TYPE_CHECKING:
    from vlaflow.actions.base import TokenizerConfig
    from vlaflow.cli.data import FitTokenizer, TokenizerReport
    from vlaflow.data.transforms import Mode


@dataclass(frozen=True)
class ChunkOptions:
    """The chunks that a tokenizer is for: as in the policy that is to be trained with it, which else refuses its file."""

    chunk_size: Count = 16
    """Actions per chunk; those of given tokenizers keep theirs."""
    normalisation: Literal["quantile", "min_max", "mean_std", "identity"] = "quantile"
    """As in the policy's action_normalisation."""
    action_clip: Positive | None = None
    """As in the policy: largest size of a normalised number; none for no limit."""
    kept_actions: tuple[str, ...] = ()
    """As in the policy: words; action dimensions with one of them in their name are left as they are."""

    @property
    def numbers(self) -> tuple[Mode, float | None, tuple[str, ...]]:
        """How they are normalised, clipped and kept."""
        return self.normalisation, self.action_clip, self.kept_actions


ChunkGroup = Annotated[ChunkOptions, tyro.conf.arg(name="")]
"""As a field of a command's arguments: the options have no prefix."""
CHUNKS = ChunkOptions()
"""No options given."""


def fit_tokenizer(arguments: FitTokenizer) -> int:
    """Fit and write a tokenizer, and print its quality."""
    from rich.console import Console

    from vlaflow.actions.bins import BinsFit
    from vlaflow.actions.fast import FastFit
    from vlaflow.actions.io import TokenizerFile, save_tokenizer
    from vlaflow.actions.published_fast import PublishedFast
    from vlaflow.data.lerobot import Dataset
    from vlaflow.evaluation.tokenizer_report import fit, material, quality
    from vlaflow.outputs import require_writable
    from vlaflow.progress import progress

    a, wanted = arguments, arguments.chunks
    dataset = Dataset.open(a.directory, reading=a.how.reading())
    require_writable(a.out)
    fits: dict[str, Callable[[], TokenizerConfig]] = {
        "fast": lambda: FastFit(a.scale, a.vocabulary),
        "bins": lambda: BinsFit(a.bins, a.spacing),
        "published": lambda: PublishedFast(a.source),
    }
    with progress(3, "Fitting") as bar:
        chunks = material(dataset, wanted.chunk_size, *wanted.numbers)
        bar.advance(note="chunks read")
        made = fit(fits[a.kind](), chunks)
        bar.advance(note="fitted")
        measured = quality(made, chunks)
        bar.advance(note="measured")
    content = TokenizerFile(made, wanted.normalisation, dataset.fingerprint, wanted.action_clip, wanted.kept_actions)
    save_tokenizer(a.out, content)
    Console().print(
        f"{measured.name}: {measured.tokens:.1f} tokens per chunk of {wanted.chunk_size} (at most {measured.slots}), error "
        f"{measured.error:.4f} rms, "
        f"{100 * measured.inexact:.2f} % of the held-out chunks lose more than rounding.\nWritten: {a.out}",
        soft_wrap=True,
        highlight=False,
    )
    return 0


def tokenizer_report(arguments: TokenizerReport) -> int:
    """Measure, print the table and write the page."""
    from rich.console import Console
    from rich.table import Table

    from vlaflow.actions.io import load_tokenizer
    from vlaflow.data.hub import title
    from vlaflow.data.lerobot import Dataset
    from vlaflow.evaluation.tokenizer_report import examples, fit, material, quality, standard_fits
    from vlaflow.outputs import require_writable
    from vlaflow.progress import progress
    from vlaflow.reports import tokenizers as page

    a = arguments
    require(*PAGES, "tokenizers")
    dataset = Dataset.open(a.directory, reading=a.how.reading())
    require_writable(a.out)
    loaded = [load_tokenizer(file, *a.chunks.numbers) for file in a.tokenizer]
    chunk_size = loaded[0].chunk_size if loaded else a.chunks.chunk_size
    chunks = material(dataset, chunk_size, *a.chunks.numbers)
    names: list[str] = [f"{file.stem}: {made.description}" for file, made in zip(a.tokenizer, loaded, strict=True)]
    made: list[Any] = list(loaded)
    todo = () if loaded else standard_fits()
    found = []
    with progress(len(todo) + len(loaded), "Measuring") as bar:
        for tokenizer, name in zip(loaded, names, strict=True):
            found.append(quality(tokenizer, chunks, name))
            bar.advance()
        for what in todo:
            made.append(fit(what, chunks))
            quantile = getattr(what, "spacing", "") == "quantile"
            name = f"{made[-1].description}{', quantile' * quantile}"
            found.append(quality(made[-1], chunks, name))
            bar.advance()
    table = Table("tokenizer", "tokens", "most", "error", "id ±1", "random id", "repaired", "order")
    for row in found:
        changes = (f"{row.error:.4f}", f"{row.neighbour:.3f}", f"{row.random:.3f}", f"{100 * row.repaired:.0f} %")
        table.add_row(row.name, f"{row.tokens:.1f}", str(row.longest), *changes, f"{row.order:.2f}")
    console = Console()
    console.print(table)
    console.print(page.READING, soft_wrap=True)
    if a.policy is not None:
        console.print(_own_metric(a.policy, dataset), soft_wrap=True)
    shown = examples(made, chunks, dataset.dimension_names("action"))
    written = page.write_page(found, shown, f"Action tokenizers on {title(dataset.root)}", a.out)
    console.print(f"Written: {written}", soft_wrap=True)
    return 0


def _own_metric(checkpoint: Path, dataset: Any) -> str:
    """How well the metric of a checkpoint's discrete flow orders its tokens, in a sentence."""
    import torch

    from vlaflow.errors import CapabilityError
    from vlaflow.evaluation.tokenizer_report import id_distance, material, metric_rank
    from vlaflow.policies.base import Policy

    policy = Policy.from_pretrained(checkpoint)
    decoder = policy.model.decoder
    with torch.no_grad():
        distance = decoder.distance()
    if decoder.tokenizer is None or distance is None:
        raise CapabilityError(
            f"{checkpoint} has a {type(decoder).__name__}, which has no metric. Name one with a discrete flow."
        )
    own = policy.config
    chunks = material(dataset, decoder.chunk_size, own.action_normalisation, own.action_clip, own.kept_actions)
    both = distance.cpu().numpy(), id_distance(decoder.tokenizer)
    metric, ids = (metric_rank(decoder.tokenizer, chunks, each) for each in both)
    return f"{checkpoint} ({decoder.tokenizer.description}): order {metric:.2f} by its own metric, {ids:.2f} by the ids."
