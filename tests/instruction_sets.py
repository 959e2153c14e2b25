"""The numerical rooms' tests once with each instruction set that this processor has and torch's kernels are compiled for.

python -m tests.instruction_sets [pytest's arguments]    (make test-isa)

Sums come in another order with each of them, so a test that passes with one alone depends on rounding. The libraries that
multiply matrices (oneDNN, MKL) are held to the same set; MKL ignores it on processors of other makers.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOMS = ("nn", "flows", "actions", "backbones", "stacks", "decoders", "compute", "policies")
SETS = {
    "default": {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {},
}
"""By the names that torch takes, poorest first, with what the other libraries call them."""


def capability(name: str | None) -> str:
    """What torch computes with in a process of its own, in the letters of ``SETS``; None for all that the processor has."""
    environment = {key: value for key, value in os.environ.items() if key != "ATEN_CPU_CAPABILITY"}
    if name is not None:
        environment["ATEN_CPU_CAPABILITY"] = name
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    return subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip().lower()


def available() -> list[str]:
    """Names of ``SETS`` up to the processor's own; only the default where torch has kernels of another kind (ARM)."""
    names, own = list(SETS), capability(None)
    return names[: names.index(own) + 1] if own in names else names[:1]


def main(arguments: list[str]) -> int:
    """Run them one set after the other, all of them whatever fails; the exit status says whether anything did."""
    here, failed = Path(__file__).parent, []
    command = [sys.executable, "-m", "pytest", "-n", "logical", "--maxprocesses", "4", "--dist", "loadfile"]
    for name in available():
        begin = time.monotonic()
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": name, **SETS[name]}
        status = subprocess.run([*command, *(str(here / room) for room in ROOMS), *arguments], env=environment, check=False)
        failed += [name] * (status.returncode != 0)
        sys.stdout.write(f"{name}: {'failed' if name in failed else 'passed'} in {time.monotonic() - begin:.0f} s\n")
        sys.stdout.flush()
    if failed:
        sys.stdout.write(f"make test-isa failed with {', '.join(failed)} (see above)\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
