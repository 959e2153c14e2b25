"""The options of a training run besides recipe, data set and folder, and a recipe's config with them applied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vlaflow.config import override
from vlaflow.data.reading import Reading
from vlaflow.data.weights import named_mixture
from vlaflow.policies.recipe import Assets, Base, TrainConfig
from vlaflow.training.metrics_log import Tracker


@dataclass(frozen=True)
class Options:
    """The options of a run besides recipe, data set and folder.

    Args:
        overrides: values by dotted key of the ``TrainConfig``, as text: {"optim.learning_rate": "3e-4"}.
        tracker: where the log goes besides ``training/log.jsonl``.
        fresh: start over; an old checkpoint is moved aside.
        command: for the model card; the process's own command line by default.
        vqa: file or folder of a VQA data set for co-training (docs/vqa.md).
        tokenizer: file of a fitted action tokenizer, for decoders of tokens; by default one is fitted.
        latent: folder of a latent action model, for decoders that learn to name its codes.
        threads: CPU threads; by default OMP_NUM_THREADS, or the physical cores.
        shard: processes that train together share the weights instead of each holding all (docs/scale.md).
        compiled: compile the loss, for long runs (docs/training.md).
        reading: names of columns and cameras of data sets that state none of their own (``DatasetEntry.reading``); by default
            those of the run or policy that is continued, else LeRobot's.
        mixture: name of how several data sets are mixed (``data.weights.NAMED``); by default as the recipe says.
    """

    overrides: Mapping[str, str] | None = None
    tracker: Tracker = "auto"
    fresh: bool = False
    command: str | None = None
    vqa: Path | str | None = None
    tokenizer: Path | str | None = None
    latent: Path | str | None = None
    threads: int | None = None
    shard: bool = False
    compiled: bool = False
    reading: Reading | None = None
    mixture: str | None = None

    def assets(self, base: Base | None = None) -> Assets:
        """What it names for the objective, with the policy to continue."""
        return Assets(base, self.vqa, self.tokenizer, self.latent)


def overridden(
    config: TrainConfig, overrides: Mapping[str, str] | None, assets: Assets, mixture: str | None = None
) -> TrainConfig:
    """The config with a mixture by name, what assets bring along and then its own values.

    Raises:
        ConfigError: there is no such mixture, a key or value is wrong, or assets do not fit it.
    """
    if mixture is not None:
        config = replace(config, mixture=named_mixture(mixture))
    config = replace(config, objective=config.objective.with_assets(assets))
    config = override(config, overrides) if overrides else config
    config.objective.require(assets)
    return config
