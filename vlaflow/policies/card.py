"""The model card: what someone else needs to know to judge a checkpoint and to reproduce it.

The lines about a training itself (steps, losses, command) come from ``training.card``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlaflow.actions.latent import LatentActionModel
from vlaflow.data.hub import title
from vlaflow.policies.base import Policy
from vlaflow.policies.recipe import OpenedDataset
from vlaflow.spec import ActionSpec


def policy_card(
    policy: Policy,
    datasets: Sequence[OpenedDataset],
    training: Sequence[str],
    what: str,
    *,
    sources: Mapping[str, str] | None = None,
    weights: Mapping[str, float] | None = None,
) -> str:
    """The text of README.md, in Markdown; that of a stage which continues a policy begins with the policy's own.

    Args:
        policy: what was trained.
        datasets: what it learned from.
        training: lines about this training.
        what: heading of a later stage's part.
        sources: what it learned from in addition to the data sets, by name, in words.
        weights: shares of the samples, by data set, where there are several.
    """
    facts = _data_lines(datasets, weights or {})
    facts += [f"- {name}: {words}" for name, words in (sources or {}).items()]
    if policy.card:
        return "\n".join([policy.card.rstrip(), "", f"## {what}", "", *facts, *training])
    millions = sum(p.numel() for p in policy.model.parameters()) / 1e6
    specs = [robot.action_spec for robot in policy.robots.values()] or [policy.action_spec]
    tasks = sorted({task for each in datasets for task in each.dataset.tasks})
    shown = [f"  - {task}" for task in tasks[:20]] + ([f"  - and {len(tasks) - 20} more"] if len(tasks) > 20 else [])
    lines = [
        f"# {policy.config.system} policy",
        "",
        f"A vision-language-action policy of {millions:.1f} M parameters, trained with vlaflow.",
        "",
        "```python",
        "import vlaflow",
        'chunk = vlaflow.Policy.from_pretrained("<this folder>").act(observation)',
        "```",
        "",
        *(line for spec in specs for line in _robot_lines(spec)),
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


def _data_lines(datasets: Sequence[OpenedDataset], weights: Mapping[str, float]) -> list[str]:
    lines = []
    for each in datasets:
        found, share = each.dataset, weights.get(each.label)
        size = f"{len(found.episodes)} episodes, {len(found)} frames"
        part = "" if share is None else f"{100 * share:.3g} % of the samples, "
        lines.append(f"- Data: {title(found.root)}, {part}{size}, fingerprint {found.fingerprint}")
    return lines


def _robot_lines(spec: ActionSpec) -> list[str]:
    return [
        f"- Robot: {spec.robot}, {spec.rate_hz:g} actions per second",
        f"- Actions: {', '.join(f'{d.name} ({d.unit}, {d.mode})' for d in spec.dimensions)}; chunks of {spec.chunk_size}",
    ]


def latent_card(model: LatentActionModel, datasets: Sequence[OpenedDataset], training: Sequence[str]) -> str:
    """The text of a latent action model's README.md; arguments as for ``policy_card``."""
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
        *_data_lines(datasets, {}),
        "",
        "## Training",
        "",
        *training,
    ]
    return "\n".join(lines)
