"""Programs compiled ahead of time by torch's AOTInductor: one package with machine code and weights per program.

Building needs a C++ compiler and takes half a minute a program; loading needs neither and takes hundredths of a second.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from vlaflow.engine.programs import Precision, Program, Run
from vlaflow.errors import CapabilityError

SUFFIX = ".pt2"
SETTINGS: Mapping[Precision, Mapping[str, object]] = {
    "f32": {"freezing": True, "cpp.weight_prepack": False},
    "bf16": {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP"},
}
"""In float32 MKL multiplies matrices as ``linear.transposed`` stores them; reordered for oneDNN, few tokens take twice as long
and a search among generated products three times. In bfloat16 products are generated: starting oneDNN's takes longer than they.
"""


def require_compiler() -> None:
    """Refuse to build without a C++ compiler, before anything is done.

    Raises:
        CapabilityError: with what to install; policies run eagerly without.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise CapabilityError(
            f"Programs are compiled with '{compiler}', which this machine lacks. Install it (apt install g++), set CXX to "
            "another C++ compiler, or use --engine openvino; without programs policies run eagerly."
        )


def build(program: Program, file: Path, precision: Precision) -> None:
    """Compile a program into a package.

    Args:
        program: what to compile; it runs with as many threads as torch has now.
        file: where to.
        precision: of the products of its linear layers.
    """
    require_compiler()
    import torch._inductor
    from torch._inductor.utils import fresh_inductor_cache

    # torch keeps code of earlier compilations in a folder that all programs of this user share: others could write there if
    # they made it first, and two compilations at a time leave files of each other half written
    with torch.no_grad(), fresh_inductor_cache(dir=str(file.parent)):
        exported = torch.export.export(program.module, program.examples, strict=False)
        torch._inductor.aoti_compile_and_package(exported, package_path=str(file), inductor_configs=dict(SETTINGS[precision]))


def load(file: Path) -> Run:
    """Open a package. It holds machine code: only ``store`` may say which."""
    import torch._inductor

    run = torch._inductor.aoti_load_package(str(file)).loader.run
    return lambda tensors: run(list(tensors))
