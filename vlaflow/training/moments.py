"""What an optimiser remembers of each parameter, whichever optimiser it is, and float32 copies of weights in smaller formats.

A step of AdamW is often too small to change a weight in bfloat16, so weights in such a format have a float32 copy, their
master: it takes the steps, and the weight is the master rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

MASTER = "master"
TABLES = ("qmap1", "qmap2")
"""Of bitsandbytes: the same for all parameters, so they need not be kept."""


class Masters:
    """Float32 copies of a module's trainable parameters that are in a smaller format; call it when they are where they train.

    Attributes:
        of: a parameter's copy.
    """

    def __init__(self, module: nn.Module) -> None:
        self.of: dict[nn.Parameter, nn.Parameter] = {
            parameter: nn.Parameter(parameter.detach().float())
            for parameter in module.parameters()
            if parameter.requires_grad and parameter.dtype != torch.float32
        }

    def serve(self, optimizer: torch.optim.Optimizer) -> None:
        """Have every step of an optimiser of the copies begin with the parameters' gradients and end in the parameters."""
        optimizer.register_step_pre_hook(lambda *_: self._take())
        optimizer.register_step_post_hook(lambda *_: self._give())

    def _take(self) -> None:
        for parameter, master in self.of.items():
            master.grad = None if parameter.grad is None else parameter.grad.float()

    @torch.no_grad()
    def _give(self) -> None:
        for parameter, master in self.of.items():
            parameter.copy_(master)
            master.grad = None


class Moments:
    """See the module text.

    Args:
        optimizer: AdamW of torch or of bitsandbytes, or Muon.
        masters: the parameters it steps for, by the module's own; the others it steps itself.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, masters: Mapping[nn.Parameter, nn.Parameter]) -> None:
        self._optimizer, self._masters = optimizer, masters

    def of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """By the quantity's name, as they are; none before the parameter's first step."""
        stepped = self._masters.get(parameter, parameter)
        state = self._optimizer.state.get(stepped, {})
        found = {key: torch.as_tensor(value) for key, value in state.items() if key not in TABLES}
        return {**found, MASTER: stepped.detach()} if found and stepped is not parameter else found

    def restore(self, parameter: nn.Parameter, fill: Callable[[str, Tensor], None]) -> None:
        """Remember of a parameter what ``fill`` copies into a tensor, given the quantity's name."""
        stepped = self._masters.get(parameter, parameter)
        state: dict[str, Any] = self._optimizer.state[stepped]
        begin = getattr(self._optimizer, "init_state", None)
        if begin is None:
            state["step"] = torch.zeros((), device=stepped.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(stepped), torch.zeros_like(stepped)
        else:  # Muon, and bitsandbytes, which decides by the parameter's size how its moments are kept
            group, place = self._place(stepped)
            begin(self._optimizer.param_groups[group], stepped, group, place)
        for key, value in state.items():
            if isinstance(value, Tensor) and key not in TABLES:
                fill(key, value)
            elif key not in TABLES:
                number = torch.as_tensor(value)
                fill(key, number)
                state[key] = number.item()
        if stepped is not parameter:
            fill(MASTER, stepped)

    def strangers(self, module: nn.Module) -> int:
        """How many parameters the optimiser remembers that are not the module's."""
        own = {self._masters.get(parameter, parameter) for parameter in module.parameters()}
        return len(self._optimizer.state.keys() - own)

    def _place(self, parameter: nn.Parameter) -> tuple[int, int]:
        for number, group in enumerate(self._optimizer.param_groups):
            for place, each in enumerate(group["params"]):
                if each is parameter:
                    return number, place
        raise KeyError("The optimizer does not step this parameter.")
