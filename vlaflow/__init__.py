"""vlaflow trains, calibrates, evaluates and serves vision-language-action policies.

>>> import vlaflow
>>> env = vlaflow.make("metaworld/drawer-open-v3")
>>> info = env.restart(seed=1000)
>>> policy = vlaflow.Policy.from_pretrained("runs/demo/rated")
>>> chunk = policy.act(env.observe(), compute=vlaflow.Refine())

=================================  ===================================================================================
``train``, ``evaluate``            a recipe and a data set become a checkpoint, a checkpoint becomes results
``make``                           a simulated robot by name
``Policy``                         a checkpoint, opened: ``act`` turns an ``Observation`` into a ``Chunk`` of actions
``Dataset``                        demonstrations in LeRobot's format
``ActionSpec``                     what the numbers of an action mean
``Dense``, ``Consensus``,          how much compute to spend on a chunk, for ``Policy.act``
``TwoStage``, ``EarlyExit``,
``Refine``, ``RefineTokens``
=================================  ===================================================================================

Each name is imported when it is first used, so ``import vlaflow`` alone loads neither torch nor NumPy.

The rooms, from the ground up: ``spec`` (the nouns), ``nn`` and ``flows`` (mathematics), ``data`` and ``simulators``,
``robot`` (a client without torch), ``backbones``, ``stacks``, ``decoders``, ``compute``, ``policies``, ``training``,
``evaluation``, ``serving``, ``claims``, ``reports``, ``cli``. Imports only point down that list.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlaflow.compute.consensus import Consensus
    from vlaflow.compute.dense import Dense
    from vlaflow.compute.early_exit import EarlyExit
    from vlaflow.compute.refine import Refine
    from vlaflow.compute.refine_tokens import RefineTokens
    from vlaflow.compute.two_stage import TwoStage
    from vlaflow.data.lerobot import Dataset
    from vlaflow.evaluation.run import evaluate
    from vlaflow.policies.base import Policy
    from vlaflow.simulators.base import make
    from vlaflow.spec import ActionSpec, Chunk, Observation
    from vlaflow.training.run import train

__version__ = "0.1.0"

__all__ = [
    "ActionSpec",
    "Chunk",
    "Consensus",
    "Dataset",
    "Dense",
    "EarlyExit",
    "Observation",
    "Policy",
    "Refine",
    "RefineTokens",
    "TwoStage",
    "evaluate",
    "make",
    "train",
]

_MODULES = {
    "ActionSpec": "spec",
    "Chunk": "spec",
    "Consensus": "compute.consensus",
    "Dataset": "data.lerobot",
    "Dense": "compute.dense",
    "EarlyExit": "compute.early_exit",
    "Observation": "spec",
    "Policy": "policies.base",
    "Refine": "compute.refine",
    "RefineTokens": "compute.refine_tokens",
    "TwoStage": "compute.two_stage",
    "evaluate": "evaluation.run",
    "make": "simulators.base",
    "train": "training.run",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        from vlaflow.errors import nearest

        raise AttributeError(f"module 'vlaflow' has no attribute '{name}'; {nearest(name, __all__)}")
    value = getattr(importlib.import_module(f"vlaflow.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
