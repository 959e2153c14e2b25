"""``vlaflow data spec``; its arguments are in ``data``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlaflow.cli.console import plain_console

if TYPE_CHECKING:
    from vlaflow.cli.data import Spec


def spec(arguments: Spec) -> int:
    """Print the data set's spec or a draft, and write it."""
    import json
    import sys

    from vlaflow.config import to_json
    from vlaflow.data.draft import draft
    from vlaflow.data.lerobot import Dataset
    from vlaflow.errors import ConfigError
    from vlaflow.outputs import require_writable, write_json

    dataset, console = Dataset.open(arguments.directory, reading=arguments.how.reading()), plain_console(stderr=True)
    if arguments.out is not None:
        if arguments.out.exists():
            raise ConfigError(f"{arguments.out} exists, and may have been completed by hand; choose another --out.")
        require_writable(arguments.out)
    found = dataset.action_spec
    if found is None:
        drafted = draft(dataset)
        found, words = drafted.spec, drafted.words
    else:
        words = f"{dataset.root} states what its actions mean."
    console.print(words, soft_wrap=True, highlight=False)
    if arguments.out is None:
        sys.stdout.write(json.dumps(to_json(found), indent=2) + "\n")
    else:
        write_json(arguments.out, to_json(found))
        console.print(
            f'Written: {arguments.out}. Replace what is "unstated", then: vlaflow train ... --action-spec {arguments.out}',
            soft_wrap=True,
            highlight=False,
        )
    return 0
