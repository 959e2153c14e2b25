"""Parts by name: vlaflow's own, and those of every installed distribution that declares entry points.

===================  ===============================  ====================================================================
group                name                             object
===================  ===============================  ====================================================================
vlaflow.backbones    its class's, as in config.json   a frozen dataclass derived from ``backbones.base.BackboneConfig``
vlaflow.decoders     its class's, as in config.json   a frozen dataclass derived from ``decoders.base.DecoderConfig``
===================  ===============================  ====================================================================

What a checkpoint or a command line names is looked up here and nowhere else, so it can choose among installed parts and never
a module. Nothing is imported before it is named, and a part that cannot be imported stops nobody who does not name it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal

from vlaflow.errors import CapabilityError, ConfigError, VlaflowError

Group = Literal["backbones", "decoders"]

OURS: dict[Group, dict[str, str]] = {
    "backbones": {
        "EmuConfig": "vlaflow.backbones.emu3:EmuConfig",
        "MolmoConfig": "vlaflow.backbones.molmo2:MolmoConfig",
        "QwenConfig": "vlaflow.backbones.qwen2_5_vl:QwenConfig",
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
}
"""vlaflow's own parts, written as entry points are: "module:attribute"."""


class Part:
    """Base of the configs that other distributions may add kinds of.

    A base names its ``group`` and is no dataclass; its kinds are frozen dataclasses, each registered by its class's name.
    """

    group: ClassVar[Group]


@dataclass(frozen=True)
class Entry:
    """A part that is installed, not imported yet.

    Args:
        group, name: what it is found by.
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
def installed(group: Group) -> dict[str, tuple[Entry, ...]]:
    """Everything of a group by name; a name that several distributions claim has several entries."""
    found = {name: [Entry(group, name, value)] for name, value in OURS[group].items()}
    for point in entry_points(group=f"vlaflow.{group}"):
        origin = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"
        entry = Entry(group, point.name, point.value, origin)
        if entry not in found.setdefault(point.name, []):
            found[point.name].append(entry)
    return {name: tuple(found[name]) for name in sorted(found)}


def find(group: Group, name: str, unknown: str = "") -> Entry:
    """The part of that name, not imported yet.

    Args:
        group, name: what is looked for.
        unknown: beginning of the sentence when there is none; what is installed is added.

    Raises:
        ConfigError: for a name that nothing installed has, or that several distributions claim.
    """
    entries = installed(group)
    if name not in entries:
        begin = unknown or f"There is no '{name}' among vlaflow.{group}"
        raise ConfigError(
            f"{begin}; installed are {', '.join(entries)}. Install the package that provides it, or choose one of these."
        )
    claims = entries[name]
    if len(claims) > 1:
        owners = " and ".join(entry.distribution or "vlaflow" for entry in claims)
        raise ConfigError(f"'{name}' of vlaflow.{group} is claimed by {owners}. Uninstall all but one of them.")
    return claims[0]


def load(group: Group, name: str, unknown: str = "") -> Any:
    """The part of that name, imported. See ``find`` and ``Entry.load`` for what is raised."""
    return find(group, name, unknown).load()


def kind_of(base: type[Part], name: str, unknown: str = "") -> type[Part]:
    """The config class of that name.

    Raises:
        ConfigError: for an unknown name, or an entry that is no config of that base under its own name.
        CapabilityError: for one that cannot be imported.
    """
    entry = find(base.group, name, unknown)
    found = entry.load()
    if not (isinstance(found, type) and issubclass(found, base) and found.__name__ == name):
        raise ConfigError(
            f"'{name}' of vlaflow.{base.group} ({entry.distribution or 'vlaflow'}) is {found!r}; it must be a class of that "
            f"name derived from {base.__name__}."
        )
    return found


def require_registered(part: Part) -> None:
    """Refuse a config that could be written and then not be read again.

    Raises:
        ConfigError: with what its package has to declare.
    """
    kind = type(part)
    claims = installed(part.group).get(kind.__name__, ())
    if not any(entry.load() is kind for entry in claims):
        raise ConfigError(
            f"{kind.__name__} of {kind.__module__} is not registered, so a checkpoint with it could not be opened. Declare it "
            f'in its package\'s pyproject.toml under [project.entry-points."vlaflow.{part.group}"]: {kind.__name__} = '
            f'"{kind.__module__}:{kind.__qualname__}", and install that package.'
        )
