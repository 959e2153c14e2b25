"""Whether a policy is evaluated on images like those that it learned from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlaflow.policies.provenance import images_of
from vlaflow.simulators.base import Render, rendering_versions


def unlike_training(folder: Path, envs: Sequence[str], render: Render) -> str:
    """A sentence if the images of an evaluation are rendered otherwise than those of the training, else nothing.

    Data sets of other simulators, and checkpoints that do not say what they learned from, are passed over.

    Args:
        folder: of the checkpoint.
        envs: environments of the evaluation.
        render: its image quality.
    """
    now = {"render": render, **rendering_versions(envs, render)}
    suites = {f"{env.partition('/')[0]} rendering" for env in envs}
    learned = [each for each in images_of(folder) if suites & each.keys() or each.keys() == {"render"}]
    if not learned or any(now.items() <= each.items() for each in learned):
        return ""
    return (
        f"{folder} learned from images rendered as {' or '.join(map(_words, learned))}, and is evaluated on {_words(now)}. Its "
        "success may be lower than on its own: evaluate with the same --render, or record and train again."
    )


def _words(rendering: dict[str, str]) -> str:
    versions = [f"{key} {value}" for key, value in rendering.items() if key != "render"]
    return f"'{rendering['render']}' ({', '.join(versions) or 'of an earlier version'})"
