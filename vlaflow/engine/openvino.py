"""Programs compiled by OpenVINO (extra ``openvino``), which needs no C++ compiler and builds in seconds.

It multiplies in bfloat16 where that is asked for and the processor can.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlaflow.engine.programs import Program, Run

SUFFIX = ".blob"


def build(program: Program, file: Path, *, bf16: bool = False) -> None:
    """Compile a program into OpenVINO's own format.

    Args:
        program: what to compile; it runs with as many threads as torch has now.
        file: where to.
        bf16: multiply in bfloat16.
    """
    import openvino

    with torch.no_grad():
        exported = torch.export.export(program.module, program.examples, strict=False)
        model = openvino.convert_model(exported)
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    file.write_bytes(openvino.Core().compile_model(model, "CPU", settings).export_model().getvalue())


def load(file: Path) -> Run:
    """Open a program. It is code of a kind: only ``store`` may say which."""
    import openvino

    request: Any = openvino.Core().import_model(file.read_bytes(), "CPU").create_infer_request()

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        found = request.infer([tensor.numpy() for tensor in tensors], share_inputs=True)
        return [torch.from_numpy(found[place].copy()) for place in range(len(found))]

    return run
