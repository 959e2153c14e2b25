"""``vlaflow data push``; its arguments are in ``data``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlaflow.cli.data import PushToHub


def push(arguments: PushToHub) -> int:
    """Check that it is a data set, and upload it."""
    from rich.console import Console

    from vlaflow.data import hub
    from vlaflow.data.lerobot import Dataset
    from vlaflow.errors import ConfigError
    from vlaflow.hub import HubName, hub_name

    name = hub_name(f"hf://{arguments.repository.removeprefix('hf://')}", "data set")
    if not isinstance(name, HubName) or name.revision is not None:
        raise ConfigError(f"'{arguments.repository}' cannot be pushed to. Write USER/NAME, without a revision.")
    dataset = Dataset.open(arguments.directory, video=True)
    made = hub.push(dataset.root, name.repository, private=arguments.private, message=arguments.message)
    Console().print(f"Pushed: {made}", soft_wrap=True, highlight=False)
    return 0
