"""``vlaflow data cache``: build a frame cache ahead of training, on one machine or on many."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlaflow.cli.data import BuildCache


def build_cache(arguments: BuildCache) -> int:
    """Build a share of the cache, and say what is there."""
    from rich.console import Console

    from vlaflow.data.frame_source import CODECS
    from vlaflow.data.frames import CacheBuilder
    from vlaflow.data.lerobot import Dataset
    from vlaflow.progress import counting

    share = _share(arguments.shard)
    dataset = Dataset.open(arguments.directory, video=True, reading=arguments.how.reading())
    codec = CODECS[arguments.frames]
    builder = CacheBuilder(dataset, arguments.size, area=arguments.area, codec=codec)
    with counting("Decoding episodes") as report:
        builder.build(arguments.workers, report, share)
    missing, store = builder.store.missing(), builder.store
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    shapes = ", ".join(f"{view} {height}x{width}" for view, (height, width) in builder.shapes.items())
    console.print(f"{len(store) - len(missing)} of {len(store)} blocks are in {store.folder} ({shapes}).")
    console.print(f"{len(missing)} are missing." if missing else f"The cache is complete: {store.nbytes / 1e9:.2f} GB.")
    return 0


def _share(text: str) -> tuple[int, int]:
    """Which of how many shares, counted from 0."""
    from vlaflow.errors import ConfigError

    number, slash, total = text.partition("/")
    if not (slash and number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise ConfigError(f"--shard takes I/N with I in 1..N, e.g. 3/16; got '{text}'.")
    return int(number) - 1, int(total)
