"""The model card: what someone else needs to know to judge a checkpoint and to reproduce it."""

from __future__ import annotations

from collections.abc import Mapping

from vlaflow.actions.latent import LatentActionModel
from vlaflow.data.lerobot import Dataset
from vlaflow.policies.base import Policy
from vlaflow.policies.recipe import TrainConfig
from vlaflow.progress import duration
from vlaflow.training.trainer import Outcome
from vlaflow.versions import versions


def model_card(
    policy: Policy,
    config: TrainConfig,
    dataset: Dataset,
    outcome: Outcome,
    *,
    recipe: str,
    command: str,
    train: int,
    held: int,
    sources: Mapping[str, str] | None = None,
) -> str:
    """The text of README.md, in Markdown; that of a stage which continues a policy begins with the policy's own.

    Args:
        policy: what was trained.
        config: of the stage.
        dataset: what it learned from.
        outcome: where training stands.
        recipe: the recipe's name.
        command: the command line, to repeat it.
        train, held: episodes trained on and held out.
        sources: what it learned from in addition to the data set, by name, in words.
    """
    size = f"{len(dataset.episodes)} episodes, {len(dataset)} frames"
    facts = [f"- Data: {dataset.root.name}, {size}, fingerprint {dataset.fingerprint}"]
    facts += [f"- {name}: {words}" for name, words in (sources or {}).items()]
    training = _training(config, outcome, recipe, command, (train, held))
    if policy.card:
        what = "Training of the confidence rater" if config.rater is not None else "Further training of the policy"
        return "\n".join([policy.card.rstrip(), "", f"## {what}", "", *facts, *training])
    millions = sum(p.numel() for p in policy.model.parameters()) / 1e6
    spec = policy.action_spec
    tasks = sorted(set(dataset.tasks))
    shown = [f"  - {task}" for task in tasks[:20]] + ([f"  - and {len(tasks) - 20} more"] if len(tasks) > 20 else [])
    lines = [
        f"# {policy.config.system} policy",
        "",
        f"A vision-language-action policy of {millions:.1f} M parameters, trained with vlaflow.",
        "",
        "```python",
        "from vlaflow.policies.base import Policy",
        'chunk = Policy.from_pretrained("<this folder>").act(observation)',
        "```",
        "",
        f"- Robot: {spec.robot}, {spec.rate_hz:g} actions per second",
        f"- Actions: {', '.join(f'{d.name} ({d.unit}, {d.mode})' for d in spec.dimensions)}; chunks of {spec.chunk_size}",
        f"- Views: {', '.join(policy.model.backbone.views)}",
        *facts,
        "- Instructions:",
        *shown,
        "",
        "## Training of the policy",
        "",
        *training,
    ]
    return "\n".join(lines)


def latent_card(
    model: LatentActionModel,
    config: TrainConfig,
    dataset: Dataset,
    outcome: Outcome,
    *,
    recipe: str,
    command: str,
    train: int,
    held: int,
) -> str:
    """The text of a latent action model's README.md; arguments as for ``model_card``."""
    c, origin = model.config, model.origin
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    lines = [
        "# Latent action model",
        "",
        f"What changed between two frames as {c.codes} codes of {c.book}, learned from video; {millions:.1f} M parameters, "
        "trained with vlaflow.",
        "",
        "```python",
        "from vlaflow.actions.latent import LatentActionModel",
        'id_BK = LatentActionModel.from_pretrained("<this folder>").codes(earlier_BHW3, later_BHW3)',
        "```",
        "",
        f"- Frames: view '{origin.view}', {c.image_size}x{c.image_size} pixels, {origin.gap_s:g} s apart ({origin.gap} frames "
        f"at {origin.rate_hz:g} per second)",
        f"- Data: {dataset.root.name}, {len(dataset.episodes)} episodes, {len(dataset)} frames, fingerprint {origin.dataset}",
        "",
        "## Training",
        "",
        *_training(config, outcome, recipe, command, (train, held)),
    ]
    return "\n".join(lines)


def _training(config: TrainConfig, outcome: Outcome, recipe: str, command: str, episodes: tuple[int, int]) -> list[str]:
    """What every card says of a training; ``episodes`` are those for training and held out."""
    done = "" if outcome.finished else f" of {outcome.steps} (unfinished)"
    loss = "-" if outcome.loss is None else f"{outcome.loss:.4f} (mean of the last hundred steps)"
    validation = "no episodes held out" if outcome.validation is None else f"{outcome.validation:.4f} (averaged weights)"
    return [
        f"- Recipe: {recipe}, seed {config.seed}",
        f"- Command: `{command}`",
        f"- Steps: {outcome.step}{done} of {config.batch_size} observations per process, in {duration(outcome.seconds)}",
        f"- Episodes: {episodes[0]} for training, {episodes[1]} held out",
        f"- Training loss: {loss}",
        f"- Validation loss: {validation}",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in versions().items())}",
        "",
    ]
