"""What every model card says about a training; the rest of a card is in ``policies.card``."""

from __future__ import annotations

from vlaflow.policies.recipe import TrainConfig
from vlaflow.progress import duration
from vlaflow.training.outcome import Outcome
from vlaflow.versions import version_list, versions


def training_lines(config: TrainConfig, outcome: Outcome, *, recipe: str, command: str, train: int, held: int) -> list[str]:
    """Lines of Markdown.

    Args:
        config: of the stage.
        outcome: where training stands.
        recipe: the recipe's name.
        command: the command line, to repeat it.
        train, held: episodes trained on and held out.
    """
    done = "" if outcome.finished else f" of {outcome.steps} (unfinished)"
    loss = "-" if outcome.loss is None else f"{outcome.loss:.4f} (mean of the last hundred steps)"
    validation = "no episodes held out" if outcome.validation is None else f"{outcome.validation:.4f} (averaged weights)"
    return [
        f"- Recipe: {recipe}, seed {config.seed}",
        f"- Command: `{command}`",
        f"- Steps: {outcome.step}{done} of {config.global_batch_size} observations, in {duration(outcome.seconds)}",
        f"- Episodes: {train} for training, {held} held out",
        f"- Training loss: {loss}",
        f"- Validation loss: {validation}",
        f"- Versions: {version_list(versions())}",
        "",
    ]
