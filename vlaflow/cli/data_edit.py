"""``vlaflow data push``: upload a data set to the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Push:
    """Upload a data set to the Hugging Face Hub, under the tag of its format version, where LeRobot looks for it.

    Example: vlaflow data push runs/peg USER/peg --private

    Derived files (.cache) stay here. Log in first: hf auth login.

    Args:
        directory: a LeRobot data set.
        repository: USER/NAME; created if it does not exist.
        private: make a repository that is created private.
        message: message of the commit.
    """

    directory: Path
    repository: str
    private: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    message: str = "Upload with vlaflow"


def push(arguments: Push) -> int:
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
