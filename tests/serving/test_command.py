"""``vlaflow serve`` as a process of its own."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import torch

from tests.compute.test_sampler_choice import MADE
from tests.serving.live import POLICY, expected, request
from vlaflow.compute.calibration import FOLDER
from vlaflow.compute.sampler_choice import FILE
from vlaflow.config import to_json
from vlaflow.policies.provenance import fingerprint
from vlaflow.robot.client import Client


def test_the_command_serves_a_checkpoint_until_it_is_ended(tmp_path):
    POLICY.save_pretrained(tmp_path)
    calibration = replace(MADE, checkpoint=fingerprint(tmp_path))
    calibration.save(tmp_path / FOLDER / FILE)
    options = ["--compute", "dense", "--steps", "3", "--log-format", "json"]
    command = [sys.executable, "-m", "vlaflow", "serve", str(tmp_path), "--port", "0", *options]
    command += ["--threads", f"{torch.get_num_threads()}"]  # the bits of a product depend on it
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = ""
    while "ws://" not in line:
        line = process.stderr.readline()
        assert line, "the server ended before it served"
    note = json.loads(line)["note"]
    with Client(note[note.index("ws://") :]) as client:
        np.testing.assert_array_equal(client.infer(request(1, seed=7))["actions"], expected(1, 7))
        assert client.metadata["calibrated_on"] == to_json(calibration.episodes)
    process.terminate()
    with process.stderr:
        rest = [json.loads(line) for line in process.stderr]
    assert process.wait(10) == 0
    assert "answered" in [line["event"] for line in rest]
    assert rest[-1]["event"] in ("stopping", "left")
    assert not any("traceback" in line for line in rest)
