"""The model card: what a stranger who finds the checkpoint needs to know to judge and repeat it."""

from __future__ import annotations

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
    questions: str = "",
) -> str:
    """The text of README.md, in Markdown.

    Args:
        policy: what was trained.
        config: of the stage.
        dataset: what it learned from.
        outcome: where training stands.
        recipe: the recipe's name.
        command: the command line, to repeat it.
        train, held: episodes trained on and held out.
        questions: what it learned to answer, in words.
    """
    stage = "confidence rater" if config.rater is not None else "policy"
    millions = sum(p.numel() for p in policy.model.parameters()) / 1e6
    spec = policy.action_spec
    tasks = sorted(set(dataset.tasks))
    shown = [f"  - {task}" for task in tasks[:20]] + ([f"  - and {len(tasks) - 20} more"] if len(tasks) > 20 else [])
    done = "" if outcome.finished else f" of {outcome.steps} (unfinished)"
    loss = "-" if outcome.loss is None else f"{outcome.loss:.4f} (mean of the last hundred steps)"
    validation = "no episodes held out" if outcome.validation is None else f"{outcome.validation:.4f} (averaged weights)"
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
        f"- Actions: {', '.join(f'{d.name} ({d.unit}, {d.mode})' for d in spec.dimensions)}; chunks of {spec.horizon}",
        f"- Views: {', '.join(policy.model.backbone.views)}",
        f"- Data: {dataset.root.name}, {len(dataset.episodes)} episodes, {len(dataset)} frames, "
        f"fingerprint {dataset.fingerprint}",
        "- Instructions:",
        *shown,
        "",
        f"## Training of the {stage}",
        "",
        f"- Recipe: {recipe}, seed {config.seed}",
        f"- Command: `{command}`",
        f"- Steps: {outcome.step}{done} of {config.batch_size} observations per process, in {duration(outcome.seconds)}",
        f"- Episodes: {train} for training, {held} held out",
        *([f"- Questions: {questions}"] if questions else []),
        f"- Training loss: {loss}",
        f"- Validation loss: {validation}",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in versions().items())}",
        "",
    ]
    if config.rater is not None and policy.card:  # the policy's own story comes first
        return "\n".join([policy.card.rstrip(), "", *lines[lines.index(f"## Training of the {stage}") :]])
    return "\n".join(lines)
