"""Data sets that a policy learns from together: which robots they are of, and their chunks as one source of samples.

Data sets are of one robot if the meaning of their actions, the names of their states and their views are equal. A robot's
numbers are normalised by the statistics of all its data sets together.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial, reduce
from typing import Any

import numpy as np
import torch

from vlaflow.config import to_json
from vlaflow.data.check import about_jitter
from vlaflow.data.common import CommonShape
from vlaflow.data.filters import filtered
from vlaflow.data.lerobot import Dataset
from vlaflow.data.mixture import Mixed, Order
from vlaflow.data.reading import Reading
from vlaflow.data.source import MakeOrder, Source
from vlaflow.data.stats import FeatureStats
from vlaflow.data.weights import DatasetEntry, Member, weights_of
from vlaflow.data.windows import Windows, action_chunks
from vlaflow.errors import ConfigError, SpecError, nearest
from vlaflow.policies.acting import chunks_of, policy_frames, print_exclusions, require_readable, stated_spec
from vlaflow.policies.base import Policy, PolicyConfig
from vlaflow.policies.policy_config import Normalisation
from vlaflow.policies.provenance import READING, run_of
from vlaflow.policies.recipe import Base, Objective, OpenedDataset, Setup, TrainConfig
from vlaflow.policies.robots import Robot
from vlaflow.policies.stages import CoTraining, Stage
from vlaflow.spec import ActionSpec

LARGEST = 448
"""Side in pixels up to which images of unequal size are kept for a backbone that takes any size and number of pixels."""


@dataclass(frozen=True)
class Robots:
    """The robots of several data sets.

    Args:
        by_name: each robot, in the policy's order.
        of: the robot of each data set, as a place in that order.
    """

    by_name: dict[str, Robot]
    of: tuple[int, ...]

    def robot(self, number: int) -> Robot:
        """That of one data set."""
        return list(self.by_name.values())[self.of[number]]

    @property
    def names(self) -> list[str]:
        """The name of each data set's robot."""
        by_place = list(self.by_name)
        return [by_place[place] for place in self.of]


def timed(policy: PolicyConfig, config: TrainConfig, datasets: Sequence[OpenedDataset]) -> PolicyConfig:
    """The policy with chunks of the config's duration at the highest of the rates; as it is where none is stated."""
    if config.chunk_s is None:
        return policy
    longest = longest_chunk(config.chunk_s, datasets)
    executed = max(1, round(policy.n_action_steps * longest / policy.decoder.chunk_size))
    return replace(policy, decoder=policy.decoder.with_chunk_size(longest), n_action_steps=min(executed, longest))


def longest_chunk(seconds: float, datasets: Sequence[OpenedDataset]) -> int:
    """Actions of a chunk of this duration at the highest of the data sets' rates."""
    return max(steps_of(seconds, stated_spec(each.dataset).rate_hz) for each in datasets)


def steps_of(seconds: float, rate_hz: float) -> int:
    """Actions of a chunk of this duration, at least one."""
    return max(1, round(seconds * rate_hz))


def robots_of(policy: PolicyConfig, config: TrainConfig, datasets: Sequence[OpenedDataset]) -> Robots:
    """The robots that data sets are of, each named after its first data set.

    Raises:
        SpecError: a data set without an action spec.
    """
    groups: dict[object, list[int]] = {}
    views = {each.label: tuple(v for v in policy.backbone.views if v in each.dataset.views) for each in datasets}
    for number, each in enumerate(datasets):
        key = (stated_spec(each.dataset).meaning, tuple(each.dataset.dimension_names("state")), views[each.label])
        groups.setdefault(key, []).append(number)
    side = common_side(policy, [each.dataset for each in datasets])
    by_name, of = {}, [0] * len(datasets)
    for place, members in enumerate(groups.values()):
        first = datasets[members[0]]
        spec = reduce(ActionSpec.widened, (stated_spec(datasets[number].dataset) for number in members))
        steps = policy.decoder.chunk_size if config.chunk_s is None else steps_of(config.chunk_s, spec.rate_hz)
        stats = pooled([datasets[number].dataset for number in members], config)
        name = re.sub(r"[^\w.-]+", "-", first.entry.name if first.entry.name not in by_name else first.label)
        own = normalisation_of([datasets[number] for number in members], config)
        by_name[name] = Robot(spec.with_chunk_size(steps), stats, views[first.label], side, own)
        for number in members:
            of[number] = place
    require_used(config, datasets, len(by_name))
    return Robots(by_name, tuple(of))


def normalisation_of(members: Sequence[OpenedDataset], config: TrainConfig) -> Normalisation:
    """What the config says of one robot's data sets by name.

    Raises:
        ConfigError: of two of them, different things.
    """
    stated = {each.entry.name: own for each in members if (own := config.normalisation.get(each.entry.name))}
    if len(set(stated.values())) > 1:
        names = " and ".join(f"'{name}'" for name in stated)
        raise ConfigError(f"{names} are data of one robot, whose numbers are normalised in one way; set normalisation for one.")
    return next(iter(stated.values()), Normalisation())


def require_used(config: TrainConfig, datasets: Sequence[OpenedDataset], robots: int) -> None:
    """Refuse a normalisation by data set that would have no effect, with a ``ConfigError``."""
    names = [each.entry.name for each in datasets]
    for name, own in config.normalisation.items():
        if name not in names:
            raise ConfigError(f"normalisation.{name} is about a data set that is not given; {nearest(name, names)}")
        if robots == 1 and own != Normalisation():
            key = next(f.name for f in fields(own) if getattr(own, f.name) != "same")
            raise ConfigError(f"There is only one robot, so normalisation is set without a name: --set policy.{key}=...")


def known_robots(base: Base, config: TrainConfig, datasets: Sequence[OpenedDataset]) -> Robots:
    """The robots of a policy that is continued, and which of them each data set is of.

    Raises:
        SpecError: a data set of a robot that the policy does not know, or that may be of several of its robots.
        ConfigError: the config states another duration than the policy's chunks have, or another normalisation.
    """
    policy = base.policy
    require_kept(config, base.path)
    _require_same_duration(base, config)
    if policy.robots:
        return Robots(dict(policy.robots), tuple(_known_robot(base, each) for each in datasets))
    for each in datasets:
        theirs = f"data set {each.dataset.root}"
        policy.action_spec.require_match(stated_spec(each.dataset), f"checkpoint {base.path}", theirs)
        read, held = policy.stats["state"].dim, _state_dim(each.dataset)
        if read != held:
            raise SpecError(
                f"{base.path} reads a state of {read} numbers, and that of {each.dataset.root} has {held}. Name the columns "
                "that it was trained with (--key state=COLUMN,COLUMN), or choose another data set."
            )
    views = tuple(policy.model.backbone.views)
    return Robots({"": Robot(policy.action_spec, dict(policy.stats), views)}, (0,) * len(datasets))


def _known_robot(base: Base, each: OpenedDataset) -> int:
    """The robot of a policy of several that a data set is of, as a place in their order.

    Where actions, state and views leave a choice, it is the robot that the data set was trained as, else one with the most of
    its views, else the one of its name.

    Raises:
        SpecError: there is none, or a choice is left.
    """
    robots, spec = list(base.policy.robots.items()), stated_spec(each.dataset)
    found = [
        place
        for place, (_, robot) in enumerate(robots)
        if replace(robot.action_spec, chunk_size=spec.chunk_size).meaning == spec.meaning
        and robot.stats["state"].dim == _state_dim(each.dataset)
        and set(robot.views) <= set(each.dataset.views)
    ]
    if not found:
        known = ", ".join(f"'{name}' ({robot.action_spec.robot})" for name, robot in robots)
        raise SpecError(
            f"The actions, state or views of {each.dataset.root} are those of none of the robots that {base.path} knows: "
            f"{known}. Train a policy on its data as well, or convert the data set."
        )
    members = run_of(base.folder).get("mixture", ())
    trained_as = {member["robot"] for member in members if member["data"] == each.dataset.fingerprint}
    most = max(len(robots[place][1].views) for place in found)
    for chosen in (
        [place for place in found if robots[place][0] in trained_as],
        [place for place in found if len(robots[place][1].views) == most],
        [place for place in found if robots[place][0] == each.entry.name],
    ):
        found = [place for place in found if place in chosen] or found
    if len(found) > 1:
        names = [robots[place][0] for place in found]
        raise SpecError(
            f"{each.dataset.root} may be of several robots that {base.path} knows: {', '.join(names)}. Say which one by its "
            f"name: --dataset {names[0]}={each.dataset.root}"
        )
    return found[0]


def _state_dim(dataset: Dataset) -> int:
    return len(dataset.dimension_names("state"))


def require_kept(config: TrainConfig, policy: str) -> None:
    """Refuse a normalisation of robots where a policy is continued, named as in "{policy} keeps", with a ``ConfigError``."""
    if config.normalisation:
        raise ConfigError(f"{policy} keeps how its robots are normalised; leave normalisation out.")


def _require_same_duration(base: Base, config: TrainConfig) -> None:
    """Refuse a duration that chunks of a policy that is continued do not have; they keep theirs."""
    specs = [robot.action_spec for robot in base.policy.robots.values()]
    for spec in specs or [base.policy.action_spec]:
        own = spec.chunk_size or base.policy.config.decoder.chunk_size
        if config.chunk_s is not None and steps_of(config.chunk_s, spec.rate_hz) != own:
            raise ConfigError(
                f"The chunks of {base.path} keep their {own} actions, {own / spec.rate_hz:g} s at {spec.rate_hz:g} Hz. Leave "
                f"--chunk-seconds (chunk_s={config.chunk_s:g}) out, or train a policy from scratch with it."
            )


def pooled(datasets: Sequence[Dataset], config: TrainConfig) -> dict[str, FeatureStats]:
    """Statistics of "state" and "action" over the training episodes of data sets of one robot."""
    found: dict[str, list[np.ndarray]] = {"state": [], "action": []}
    for dataset in datasets:
        columns = dataset.columns()
        rows = np.isin(columns.episode, np.asarray(config.episodes(dataset)[0], np.int64))
        rows &= ~filtered(dataset, config.filters).outlier_N
        found["state"].append(columns.state[rows])
        found["action"].append(columns.action[rows])
    return {name: FeatureStats.of(np.concatenate(parts)) for name, parts in found.items()}


def common_side(policy: PolicyConfig, datasets: Sequence[Dataset]) -> int | None:
    """Side that images of several data sets are brought to, where the backbone takes any size and theirs differ."""
    sizes = {dataset.image_size(view) for dataset in datasets for view in policy.backbone.views if view in dataset.views}
    if len(datasets) == 1 or len(sizes) <= 1:
        return None
    area = policy.backbone.input_size.area
    return min(LARGEST if area is None else math.isqrt(area), max(max(size) for size in sizes))


@dataclass(frozen=True)
class Samples:
    """Samples of one or several data sets.

    Args:
        train: to learn from.
        held: held out, of one data set; None for none.
        order: how training goes through ``train``.
        held_each: held-out samples of each of several data sets, with its weight.
        weights: of each of several data sets, by label; they add up to 1.
    """

    train: Source
    held: Source | None
    order: MakeOrder
    held_each: Mapping[str, tuple[Source, float]]
    weights: Mapping[str, float]

    def setup(
        self,
        objective: Objective,
        stage: Stage,
        vqa: CoTraining | None,
        identity: Mapping[str, Any],
        card: Callable[[Sequence[str]], str],
    ) -> Setup:
        """A stage that learns from them; arguments as in ``Setup``."""
        return Setup(objective, stage, self.train, self.held, vqa, identity, card, self.order, self.held_each)


def samples_of(
    policy: Policy,
    config: TrainConfig,
    datasets: Sequence[OpenedDataset],
    robots: Robots,
    codes: Sequence[np.ndarray | None],
) -> Samples:
    """The chunks of all data sets; of the only one as they are, if the policy knows one robot.

    Args:
        policy: what is to learn from them.
        config: which episodes, and the rules for what is left out.
        datasets: one or several.
        robots: that they are of.
        codes: latent action codes by row of each data set.
    """
    train: dict[str, Windows] = {}
    held: dict[str, Windows] = {}
    for number, each in enumerate(datasets):
        robot = robots.robot(number)
        require_readable(policy.config, each.dataset)
        views = list(robot.views) if policy.robots else list(policy.model.backbone.views)
        frames = policy_frames(config.frames, policy, each.dataset, views, robot.image_size)
        steps = robot.action_spec.chunk_size or policy.config.decoder.chunk_size
        train[each.label], aside = chunks_of(config, each.dataset, steps, frames, codes[number])
        if aside is not None:
            held[each.label] = aside
    if len(datasets) == 1 and not policy.robots:
        (only,) = train.values()
        return Samples(only, next(iter(held.values()), None), partial(Order, nearby=only.nearby()), {}, {})
    named = zip(datasets, robots.names, strict=True)
    members = [Member(each.entry, name, len(train[each.label])) for each, name in named]
    weights = dict(zip(train, weights_of(members, config.mixture), strict=True))
    place = dict(zip(train, robots.of, strict=True))
    mixed = Mixed(train, weights, policy.shape, place, {name: part.nearby() for name, part in train.items()})
    held_each: dict[str, tuple[Source, float]] = {
        name: (Mixed({name: part}, {name: 1.0}, policy.shape, {name: place[name]}), weights[name])
        for name, part in held.items()
    }
    return Samples(mixed, None, mixed.order, held_each, weights)


def normalised_chunks(
    policy: PolicyConfig, config: TrainConfig, datasets: Sequence[OpenedDataset], robots: Robots
) -> np.ndarray:
    """The chunks of all training episodes as the decoder is to make them, float32 (N, L, D): normalised, and padded.

    Those with an outlier among their actions are not among them.

    Raises:
        ConfigError: none is left.
    """
    decoder, made = policy.decoder, []
    shape = CommonShape(policy.backbone.state_dim, decoder.action_dim, decoder.chunk_size, policy.backbone.views)
    for number, each in enumerate(datasets):
        robot = robots.robot(number)
        steps = robot.action_spec.chunk_size or decoder.chunk_size
        outlier_N = filtered(each.dataset, config.filters).outlier_N
        chunk_NLD = torch.from_numpy(action_chunks(each.dataset, steps, config.episodes(each.dataset)[0], outlier_N))
        made.append(shape.chunk(robot.normalizers(policy)[1].forward(chunk_NLD)))
    if not (found_NLD := torch.cat(made)).numel():
        raise ConfigError("Every chunk has an outlier among its actions. Train with --set filters.outliers=none.")
    return found_NLD.numpy()


def report_exclusions(config: TrainConfig, datasets: Sequence[OpenedDataset], robots: Robots, policy: Policy) -> None:
    """Print what the config's rules leave out of the loss, by data set, or raise what ``require_enough`` raises."""
    for number, each in enumerate(datasets):
        steps = robots.robot(number).action_spec.chunk_size or policy.config.decoder.chunk_size
        print_exclusions(config, each.dataset, steps, each.label if len(datasets) > 1 else "")


def report_jitter(datasets: Sequence[OpenedDataset], robots: Robots) -> None:
    """Print which numbers of each robot are nearly constant, and are therefore normalised by a floor."""
    for place, robot in enumerate(robots.by_name.values()):
        first = datasets[robots.of.index(place)]
        before = f"{first.label}: " if len(datasets) > 1 else ""
        for name, stats in robot.stats.items():
            for sentence in about_jitter(name, first.dataset.dimension_names(name), stats):
                sys.stderr.write(f"{before}{sentence}\n")


def mixture_identity(datasets: Sequence[OpenedDataset], samples: Samples, robots: Sequence[str] = ()) -> dict[str, Any]:
    """What a run on several data sets, or for several robots, records about them, JSON data; nothing for others.

    Args:
        datasets: one or several.
        samples: theirs.
        robots: of each data set; empty where the checkpoint does not tell robots apart.
    """
    if not samples.weights:
        return {}
    named = robots or [""] * len(datasets)
    members = []
    for each, robot in zip(datasets, named, strict=True):
        about = {"name": each.label, "data": each.dataset.fingerprint, "weight": samples.weights[each.label], "robot": robot}
        members.append(about | read_as(each.dataset))
    return {"mixture": members}


def read_as(dataset: Dataset) -> dict[str, Any]:
    """How a data set was read, for the run's record; nothing where it has LeRobot's names."""
    return {} if dataset.reading == Reading() else {READING: to_json(dataset.reading)}


def combined_fingerprint(datasets: Sequence[OpenedDataset]) -> str:
    """Of the content of all data sets: that of the only one, or a hash of them."""
    prints = [each.dataset.fingerprint for each in datasets]
    return prints[0] if len(prints) == 1 else hashlib.sha256(json.dumps(prints).encode()).hexdigest()[:16]


def alone(dataset: Dataset) -> OpenedDataset:
    """The only data set of a training."""
    return OpenedDataset(DatasetEntry(str(dataset.root), dataset.root.name), dataset, dataset.root.name)


def labels(names: Sequence[str], roots: Sequence[str]) -> list[str]:
    """A name for every data set that differs from all others'.

    Raises:
        ConfigError: a data set that is given twice.
    """
    found: list[str] = []
    for name, root in zip(names, roots, strict=True):
        label = name if names.count(name) == 1 else f"{name}/{root.rstrip('/').rpartition('/')[2]}"
        if label in found:
            raise ConfigError(f"Two data sets are called '{label}'. Give each a name: --dataset NAME={root}, or leave one out.")
        found.append(label)
    return found
