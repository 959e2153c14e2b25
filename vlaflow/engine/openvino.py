"""Programs compiled by OpenVINO (extra ``openvino``), which needs no C++ compiler and builds in seconds.

It multiplies in bfloat16 where that is asked for and the processor can.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlaflow.engine.programs import Program, Run
from vlaflow.errors import DeploymentError

SUFFIX = ".blob"


def build(program: Program, file: Path, *, bf16: bool = False) -> None:
    """Compile a program into OpenVINO's own format.

    Args:
        program: what to compile; it runs with as many threads as torch has now.
        file: where to.
        bf16: multiply in bfloat16.

    Raises:
        DeploymentError: OpenVINO cannot compile it.
    """
    import openvino

    with torch.no_grad():
        exported = torch.export.export(_Positional(program.module), program.examples, strict=False)
    try:
        compiled = openvino.Core().compile_model(openvino.convert_model(exported), "CPU", _settings(bf16))
        file.write_bytes(compiled.export_model().getvalue())
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise DeploymentError(
            f"OpenVINO {openvino.__version__} cannot compile {program.key} ({reason}). Use the other compiler: --engine aoti."
        ) from error


class _Positional(nn.Module):
    """The module with arguments that are named by their places, since OpenVINO leaves out those that nothing reads."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        """As the module."""
        found: list[Tensor] = self.module(*tensors)
        return found


def _settings(bf16: bool) -> dict[str, object]:
    """The precision is not part of what is exported, so that it is stated when a program is opened too."""
    precision = "bf16" if bf16 else "f32"
    return {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }


def load(file: Path, *, bf16: bool = False) -> Run:
    """Open a program. It is code of a kind: only ``store`` may say which."""
    import openvino

    model: Any = openvino.Core().import_model(file.read_bytes(), "CPU", _settings(bf16))
    read = [_place(port.get_names()) for port in model.inputs]
    request, made = model.create_infer_request(), range(len(model.outputs))
    bound: list[Tensor | None] = [None] * len(read)  # kept, so that no other tensor can come to lie where one of these does

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        for port, place in enumerate(read):
            tensor, before = tensors[place], bound[port]
            if before is None or tensor.data_ptr() != before.data_ptr():
                request.set_input_tensor(port, openvino.Tensor(tensor.numpy(), shared_memory=True))
                bound[port] = tensor
        request.infer(share_outputs=True)  # it would look at each argument in Python, a third of a small program's time
        return [torch.from_numpy(request.get_output_tensor(port).data.copy()) for port in made]

    return run


def _place(names: Iterable[str]) -> int:
    """Of an argument. Where its first reader changes nothing (no padding), the port has this one's names as well."""
    own = "tensors_"
    return next(int(name.removeprefix(own)) for name in names if name.startswith(own))
