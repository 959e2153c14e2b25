"""Finding recipes by name: 'asyncvla.demo' is the function ``demo`` of ``vlaflow/policies/asyncvla/recipes.py``.

A recipe is a public function there that returns a ``TrainConfig``, or a ``Pipeline`` of several. There is no registry to keep
up to date; listing reads the source files and imports nothing.
"""

from __future__ import annotations

import ast
import importlib
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vlaflow
from vlaflow.errors import ConfigError, nearest

if TYPE_CHECKING:
    from vlaflow.policies.base import PolicyConfig
    from vlaflow.policies.recipe import DataSpec, TrainConfig

POLICIES = Path(vlaflow.__file__).parent / "policies"


@dataclass(frozen=True)
class Recipe:
    """A recipe that exists.

    Args:
        system, function: where it is.
        summary: first line of its docstring.
    """

    system: str
    function: str
    summary: str

    @property
    def name(self) -> str:
        """As one types it: "asyncvla.demo"."""
        return f"{self.system}.{self.function}"

    @cached_property
    def call(self) -> Callable[..., Any]:
        """The function itself."""
        return getattr(importlib.import_module(f"vlaflow.policies.{self.system}.recipes"), self.function)

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
                raise ConfigError(
                    f"The recipe '{self.name}' learns from actions, and the data set has no 'action'. Choose another data set."
                ) from error
            raise

    def _takes(self) -> list[object]:
        return [hint for name, hint in typing.get_type_hints(self.call).items() if name != "return"]


def list_recipes() -> dict[str, Recipe]:
    """Every recipe by name."""
    found = {}
    for file in sorted(POLICIES.glob("*/recipes.py")):
        for node in ast.parse(file.read_text()).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            if isinstance(node.returns, ast.Name) and node.returns.id in ("TrainConfig", "Pipeline"):
                lines = (ast.get_docstring(node) or "").splitlines()
                recipe = Recipe(file.parent.name, node.name, lines[0] if lines else "")
                found[recipe.name] = recipe
    return found


def find_recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        ConfigError: with the nearest valid name.
    """
    recipes = list_recipes()
    if name in recipes:
        return recipes[name]
    system, _, function = name.partition(".")
    systems = {recipe.system for recipe in recipes.values()}
    if system in systems:
        own = [recipe.function for recipe in recipes.values() if recipe.system == system]
        raise ConfigError(f"'{system}' has no recipe '{function}'; {nearest(function, own)}")
    raise ConfigError(f"There is no recipe '{name}'; {nearest(name, recipes)}")
