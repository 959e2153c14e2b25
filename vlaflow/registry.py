"""Parts by name: vlaflow's own, and those of every installed distribution that declares entry points.

==================  ================================  ================================================================
group               name                              object
==================  ================================  ================================================================
vlaflow.backbones   class name, as in config.json     a frozen dataclass derived from ``backbones.base.BackboneConfig``
vlaflow.decoders    class name, as in config.json     a frozen dataclass derived from ``decoders.base.DecoderConfig``
vlaflow.tokenizers  class name, as in config.json     a frozen dataclass derived from ``actions.base.TokenizerConfig``
vlaflow.raters      class name, as in config.json     a frozen dataclass derived from ``decoders.rating.BaseRaterConfig``
vlaflow.compute     as in ``--compute``               a ``compute.spelling.ComputeKind``
vlaflow.simulators  the suite, before the slash       a ``simulators.base.Suite``
vlaflow.layouts     as in ``--observation-keys``      a ``serving.observation_keys.ObservationKeys``
vlaflow.recipes     the system, before the dot        a module whose public functions are recipes
==================  ================================  ================================================================

What a checkpoint or a command line names is looked up here and nowhere else, so it can choose among installed parts but
never name a module. Nothing is imported before it is named, so a broken part affects only those who name it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, is_dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal, TypeVar

from vlaflow.errors import CapabilityError, ConfigError, VlaflowError

T = TypeVar("T")
Group = Literal["backbones", "decoders", "tokenizers", "raters", "compute", "simulators", "layouts", "recipes"]

OURS: dict[Group, dict[str, str]] = {
    "backbones": {
        "EmuConfig": "vlaflow.backbones.emu3:EmuConfig",
        "MolmoConfig": "vlaflow.backbones.molmo2:MolmoConfig",
        "QwenConfig": "vlaflow.backbones.qwen2_5_vl:QwenConfig",
        "SmolConfig": "vlaflow.backbones.smol:SmolConfig",
        "TinyConfig": "vlaflow.backbones.tiny:TinyConfig",
    },
    "decoders": {
        "AutoregressiveConfig": "vlaflow.decoders.autoregressive:AutoregressiveConfig",
        "DiscreteFlowConfig": "vlaflow.decoders.discrete_flow:DiscreteFlowConfig",
        "FlowConfig": "vlaflow.decoders.flow:FlowConfig",
        "LatentFlowConfig": "vlaflow.decoders.latent_flow:LatentFlowConfig",
        "MaskedDiffusionConfig": "vlaflow.decoders.masked_diffusion:MaskedDiffusionConfig",
        "RegressionConfig": "vlaflow.decoders.regression:RegressionConfig",
    },
    "tokenizers": {
        "BinsFit": "vlaflow.actions.bins:BinsFit",
        "BinsTokenizer": "vlaflow.actions.bins:BinsTokenizer",
        "FastFit": "vlaflow.actions.fast:FastFit",
        "FastTokenizer": "vlaflow.actions.fast:FastTokenizer",
        "PublishedFast": "vlaflow.actions.published_fast:PublishedFast",
        "PublishedFastTokenizer": "vlaflow.actions.published_fast:PublishedFastTokenizer",
    },
    "raters": {"RaterConfig": "vlaflow.decoders.rater:RaterConfig"},
    "compute": {
        "dense": "vlaflow.compute.dense:DENSE",
        "mean": "vlaflow.compute.consensus:MEAN",
        "medoid": "vlaflow.compute.consensus:MEDOID",
        "two-stage": "vlaflow.compute.two_stage:TWO_STAGE",
        "refine": "vlaflow.compute.refine_spelling:REFINE",
        "refine-random": "vlaflow.compute.refine_spelling:REFINE_RANDOM",
        "refine-spread": "vlaflow.compute.refine_spelling:REFINE_SPREAD",
        "refine-tokens": "vlaflow.compute.refine_tokens:REFINE_TOKENS",
        "exit": "vlaflow.compute.calibration:EXIT",
        "budget": "vlaflow.compute.budget:BUDGET",
        "auto": "vlaflow.compute.auto:AUTO",
    },
    "simulators": {
        "libero": "vlaflow.simulators.libero_suite:SUITE",
        "metaworld": "vlaflow.simulators.metaworld_suite:SUITE",
        "obstacle": "vlaflow.simulators.obstacle_suite:SUITE",
    },
    "layouts": {
        "views": "vlaflow.serving.observation_keys:VIEWS",
        "metaworld": "vlaflow.serving.observation_keys:METAWORLD",
        "libero": "vlaflow.serving.observation_keys:LIBERO",
        "droid": "vlaflow.serving.observation_keys:DROID",
        "aloha": "vlaflow.serving.observation_keys:ALOHA",
        "roboarena": "vlaflow.serving.observation_keys:ROBOARENA",
        "vla-eval-libero": "vlaflow.serving.observation_keys:VLA_EVAL_LIBERO",
        "vla-eval-calvin": "vlaflow.serving.observation_keys:VLA_EVAL_CALVIN",
        "vla-eval-simpler": "vlaflow.serving.observation_keys:VLA_EVAL_SIMPLER",
        "vla-eval-vlabench": "vlaflow.serving.observation_keys:VLA_EVAL_VLABENCH",
    },
    "recipes": {
        "a1": "vlaflow.policies.a1.recipes",
        "asyncvla": "vlaflow.policies.asyncvla.recipes",
        "baselines": "vlaflow.policies.baselines.recipes",
        "dfm_vla": "vlaflow.policies.dfm_vla.recipes",
        "iflybot": "vlaflow.policies.iflybot.recipes",
    },
}
"""vlaflow's own parts, in the notation of entry points: "module:attribute", or "module"."""


class Part:
    """Base class of configs to which other distributions can add kinds of their own.

    Such a base class states its ``group`` and is not a dataclass; its kinds are frozen dataclasses, each registered under its
    class name.
    """

    group: ClassVar[Group]


@dataclass(frozen=True)
class RegistryEntry:
    """An installed part that is not imported yet.

    Args:
        group, name: the key under which it is registered.
        value: "module:attribute", or "module" for the module itself.
        distribution: name and version of the package that declares it; empty for vlaflow's own.
    """

    group: Group
    name: str
    value: str
    distribution: str = ""

    @property
    def module(self) -> str:
        """Full name of the module it lives in."""
        return self.value.partition(":")[0].strip()

    def load(self) -> Any:
        """The part itself.

        Raises:
            CapabilityError: when another distribution's part cannot be imported, naming the distribution.
        """
        try:
            found: Any = import_module(self.module)
            for attribute in filter(None, self.value.partition(":")[2].strip().split(".")):
                found = getattr(found, attribute)
        except VlaflowError:
            raise
        except Exception as error:
            if not self.distribution:
                raise
            raise CapabilityError(
                f"'{self.name}' of vlaflow.{self.group} comes with {self.distribution} and cannot be imported from "
                f"{self.value} ({type(error).__name__}: {error}). Repair or uninstall that package."
            ) from error
        return found


@cache
def installed(group: Group) -> dict[str, tuple[RegistryEntry, ...]]:
    """All parts of a group by name, vlaflow's own first; a name that several distributions claim has several entries."""
    found = {name: [RegistryEntry(group, name, value)] for name, value in OURS[group].items()}
    for point in sorted(entry_points(group=f"vlaflow.{group}"), key=lambda point: point.name):
        origin = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"
        entry = RegistryEntry(group, point.name, point.value, origin)
        if entry not in found.setdefault(point.name, []):
            found[point.name].append(entry)
    return {name: tuple(entries) for name, entries in found.items()}


def names(group: Group) -> tuple[str, ...]:
    """Names of all parts of a group."""
    return tuple(installed(group))


def find(group: Group, name: str, unknown: str = "", *, typed: bool = True) -> RegistryEntry:
    """Look up the part of that name without importing it.

    Args:
        group, name: what to look up.
        unknown: start of the error message for an unknown name; the installed names are appended.
        typed: whether a person typed the name, so that a misspelling is likely.

    Raises:
        ConfigError: for a name that no installed part has, or that several distributions claim.
    """
    entries = installed(group)
    if name not in entries:
        begin, listed = unknown or f"vlaflow.{group} has no '{name}'", ", ".join(entries)
        if typed and (close := difflib.get_close_matches(name, entries, n=1, cutoff=0.5)):
            raise ConfigError(f"{begin}; did you mean '{close[0]}'? Installed: {listed}.")
        raise ConfigError(f"{begin}; installed: {listed}. Install the package that provides it.")
    claims = entries[name]
    if len(claims) > 1:
        owners = " and ".join(entry.distribution or "vlaflow" for entry in claims)
        raise ConfigError(f"'{name}' of vlaflow.{group} is claimed by {owners}. Uninstall all but one of them.")
    return claims[0]


def load(group: Group, name: str, kind: type[T], unknown: str = "") -> T:
    """Look up the part of that name and import it.

    Raises:
        ConfigError: for an unknown or contested name (see ``find``), or an entry that is not a ``kind``.
        CapabilityError: for one that cannot be imported.
    """
    entry = find(group, name, unknown)
    found = entry.load()
    if not isinstance(found, kind):
        raise ConfigError(
            f"'{name}' of vlaflow.{group} ({entry.distribution or 'vlaflow'}) is of type {type(found).__name__}; it must be of "
            f"type {kind.__name__}."
        )
    return found


def kind_of(base: type[Part], name: str, unknown: str = "") -> type[Part]:
    """Look up the config class of that name.

    Raises:
        ConfigError: for an unknown name, or an entry that is not a config class of that base and name.
        CapabilityError: for one that cannot be imported.
    """
    entry = find(base.group, name, unknown, typed=False)
    found = entry.load()
    if not (isinstance(found, type) and issubclass(found, base) and found.__name__ == name):
        raise ConfigError(
            f"'{name}' of vlaflow.{base.group} ({entry.distribution or 'vlaflow'}) is {found!r}; it must be a class of that "
            f"name derived from {base.__name__}."
        )
    return found


def require_registered(part: Part) -> None:
    """Refuse a config that could be saved but not opened again.

    Raises:
        ConfigError: stating what its package must declare.
    """
    kind = type(part)
    if not is_dataclass(kind):
        raise ConfigError(f"{kind.__name__} of {kind.__module__} must be a frozen dataclass, whose fields a checkpoint holds.")
    claims = installed(part.group).get(kind.__name__, ())
    if not any(entry.load() is kind for entry in claims):
        raise ConfigError(
            f"{kind.__name__} of {kind.__module__} is not registered, so a checkpoint with it could not be opened. Declare it "
            f'in its package\'s pyproject.toml under [project.entry-points."vlaflow.{part.group}"]: {kind.__name__} = '
            f'"{kind.__module__}:{kind.__qualname__}", and install that package.'
        )
