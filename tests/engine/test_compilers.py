"""What is compiled computes what it was compiled from. Compiling takes minutes, so this runs only where it is asked for."""

import importlib.util
import os
import shutil
import sys
import types

import pytest
import torch

from tests import helpers
from tests.engine.test_programs import DECODERS, made
from vlaflow.compute.dense import Dense
from vlaflow.data.batch import ObservationBatch
from vlaflow.engine import openvino, store
from vlaflow.engine.fold import folded
from vlaflow.engine.linear import in_bfloat16, transposed
from vlaflow.engine.plan import needed
from vlaflow.engine.programs import Program, ProgramKey
from vlaflow.errors import DeploymentError

WITHOUT = {
    "aoti": shutil.which(os.environ.get("CXX", "g++")) is None and "there is no C++ compiler",
    "openvino": importlib.util.find_spec("openvino") is None and "openvino is not installed",
}
TOLERANCE = {"f32": 1e-5, "bf16": 0.1}
"""Of hidden states and velocities, which are of the order of 1."""


CASES = [(precision, name) for precision in TOLERANCE for name in DECODERS if precision == "f32" or name == "flow"]


@pytest.mark.skipif("VLAFLOW_TEST_COMPILE" not in os.environ, reason="takes minutes; set VLAFLOW_TEST_COMPILE=1")
@pytest.mark.parametrize(("precision", "name"), CASES)
@pytest.mark.parametrize("compiler", WITHOUT)
def test_a_compiled_program_computes_what_its_module_does(tmp_path, compiler, precision, name):
    """Of a flow all programs, of the other decoders those of their steps: the prefix's are alike."""
    if WITHOUT[compiler]:
        pytest.skip(WITHOUT[compiler])
    policy = made(DECODERS[name])
    network = folded(policy.model)
    if compiler == "aoti":
        network = in_bfloat16(network) if precision == "bf16" else transposed(network)
    inputs = policy.processor(ObservationBatch.collate([helpers.observation()]))
    for program in needed(network, [inputs], Dense().passes(2)):
        if name != "flow" and program.key.part in ("embed", "run"):
            continue
        store.build(program, tmp_path, compiler, precision)
        run = store.opener(compiler, precision)(store.file_of(tmp_path, str(program.key), compiler))
        halved = [x / 2 if x.is_floating_point() else x for x in program.examples]
        for given in (program.examples, halved, program.examples):  # arguments that stay and arguments that change
            with torch.inference_mode():
                for expected, found in zip(program.module(*given), run(given), strict=True):
                    assert (expected - found).abs().max() < TOLERANCE[precision], program.key


class Doubled(torch.nn.Module):
    def forward(self, x):
        return [2 * x]


def test_what_openvino_cannot_compile_is_refused_in_one_sentence(tmp_path, monkeypatch):
    """Its own errors have many lines, of which the last says what is wrong."""

    def fail(*args):
        raise RuntimeError("Exception from core.cpp:117:\nCheck failed\ntwo passes can't be merged.\n\n")

    stand_in = types.SimpleNamespace(
        Core=lambda: types.SimpleNamespace(compile_model=fail), convert_model=id, __version__="1.0"
    )
    monkeypatch.setitem(sys.modules, "openvino", stand_in)
    program = Program(ProgramKey("step", 12, 0, 4, 1), Doubled(), (torch.ones(1, 2),))
    with pytest.raises(
        DeploymentError, match=r"OpenVINO 1\.0 cannot compile step-12-0-4-1 \(two passes.*--engine aoti"
    ) as refusal:
        openvino.build(program, tmp_path / "program")
    assert "\n" not in str(refusal.value)
