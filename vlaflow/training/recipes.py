"""Finding recipes by name: 'asyncvla.demo' is the function ``demo`` of the module registered as ``asyncvla``.

A recipe is a public function there that returns a ``TrainConfig``, or a ``Pipeline`` of several. Modules are registered under
``vlaflow.recipes`` (``registry``). Listing reads their source files and imports none of them.
"""

from __future__ import annotations

import ast
import importlib.util
import typing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlaflow import registry
from vlaflow.errors import CapabilityError, ConfigError, nearest

if TYPE_CHECKING:
    from vlaflow.policies.base import PolicyConfig
    from vlaflow.policies.recipe import DataSpec, TrainConfig


@dataclass(frozen=True)
class Recipe:
    """A recipe that exists.

    Args:
        system, function: its name, in two parts.
        summary: first line of its docstring.
        entry: the module it is in.
    """

    system: str
    function: str
    summary: str
    entry: registry.RegistryEntry

    @property
    def name(self) -> str:
        """As one types it: "asyncvla.demo"."""
        return f"{self.system}.{self.function}"

    @cached_property
    def call(self) -> Callable[..., Any]:
        """The function itself."""
        return getattr(self.entry.load(), self.function)

    @property
    def several(self) -> bool:
        """Whether it is a pipeline of several stages."""
        from vlaflow.policies.recipe import Pipeline

        return typing.get_type_hints(self.call)["return"] is Pipeline

    @property
    def continues(self) -> bool:
        """Whether it continues a trained policy, whose ``PolicyConfig`` it takes."""
        from vlaflow.policies.base import PolicyConfig

        return PolicyConfig in self._takes()

    def config(self, data: DataSpec, policy: PolicyConfig | None = None) -> TrainConfig:
        """The config for a data set and, where it ``continues`` one, a policy; the function is given what it takes of them.

        Raises:
            ConfigError: the recipe needs actions, and the data set holds none; or as the recipe raises.
        """
        from vlaflow.policies.base import PolicyConfig
        from vlaflow.policies.recipe import DataSpec

        known: dict[object, Any] = {DataSpec: data, PolicyConfig: policy}
        try:
            return self.call(*(known[kind] for kind in self._takes()))
        except ConfigError as error:
            if data.action_dim == 0:
                raise ConfigError(f"The recipe '{self.name}' learns from actions. {data.no_action}") from error
            raise

    def _takes(self) -> list[object]:
        return [hint for name, hint in typing.get_type_hints(self.call).items() if name != "return"]


def list_recipes() -> dict[str, Recipe]:
    """Every recipe by name, apart from those of modules that cannot be read."""
    found: dict[str, Recipe] = {}
    for system in registry.names("recipes"):
        with suppress(CapabilityError, ConfigError):
            found |= {recipe.name: recipe for recipe in _recipes_of(system)}
    return found


def _recipes_of(system: str) -> list[Recipe]:
    """The recipes of one module, read from its source.

    Raises:
        CapabilityError: when another distribution's module has no source that could be read.
    """
    entry = registry.find("recipes", system)
    try:
        spec = importlib.util.find_spec(entry.module)
        assert spec is not None
        assert spec.origin is not None
        body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    except Exception as error:  # importing its parent packages may raise anything
        if not entry.distribution:
            raise
        raise CapabilityError(
            f"The recipes '{system}' come with {entry.distribution}, and {entry.module} cannot be read "
            f"({type(error).__name__}: {error}). Repair or uninstall that package."
        ) from error
    functions = [node for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    found = []
    for node in functions:
        returned = ast.unparse(node.returns).rpartition(".")[2] if node.returns else ""
        if returned in ("TrainConfig", "Pipeline"):
            lines = (ast.get_docstring(node) or "").splitlines()
            found.append(Recipe(system, node.name, lines[0] if lines else "", entry))
    return found


def find_recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        ConfigError: with the nearest valid name.
        CapabilityError: when its module cannot be read.
    """
    system, _, function = name.partition(".")
    if system in registry.names("recipes"):
        own = {recipe.function: recipe for recipe in _recipes_of(system)}
        if function in own:
            return own[function]
        raise ConfigError(f"'{system}' has no recipe '{function}'; {nearest(function, own)}")
    raise ConfigError(f"There is no recipe '{name}'; {nearest(name, list_recipes())}")
