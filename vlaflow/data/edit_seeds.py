"""The seeds that a recording notes in its provenance, for a data set that has other episodes than the recording."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


def seeds_of(provenance: Any) -> list[Any]:
    """All seeds in the order of the episodes: by environment, and one recording after another where several were merged."""
    found: list[Any] = []

    def gather(seeds: list[Any]) -> None:
        found.extend(seeds)

    _walk(provenance, gather)
    return found


def of_kept(provenance: Any, episodes: Any, kept: Sequence[int]) -> Any:
    """Provenance with the seeds of some episodes alone, in their order.

    Args:
        provenance: of a data set, JSON data.
        episodes: how many it says that it has.
        kept: numbers of those that are kept, rising.

    Returns:
        Without any seeds where there is not one for every episode, for nobody could tell which is whose.
    """
    count = len(seeds_of(provenance))
    if count != episodes or any(number >= count for number in kept):
        return _walk(provenance, lambda seeds: None)
    wanted, numbers = {*kept}, iter(range(count))
    return _walk(provenance, lambda seeds: [seed for seed, number in _paired(seeds, numbers) if number in wanted])


def _paired(seeds: Sequence[Any], numbers: Iterator[int]) -> list[tuple[Any, int]]:
    return [(seed, next(numbers)) for seed in seeds]


def _walk(provenance: Any, change: Callable[[list[Any]], list[Any] | None]) -> Any:
    """Provenance with every list of seeds changed; None for one leaves them all out."""
    if not isinstance(provenance, Mapping):
        return provenance
    found: dict[str, Any] = {}
    for key, value in provenance.items():
        if key == "merged" and isinstance(value, list):
            found[key] = [_walk(each, change) for each in value]
        elif key == "seeds" and isinstance(value, Mapping) and all(isinstance(each, list) for each in value.values()):
            changed = {env: change(seeds) for env, seeds in value.items()}
            if None not in changed.values():
                found[key] = changed
        else:
            found[key] = value
    return found
