"""What ``make test-clients`` says before it runs; the run itself needs a trained checkpoint and is not part of this suite."""

import subprocess
import sys


def test_a_missing_checkpoint_is_one_sentence_that_says_how_to_get_one(tmp_path):
    command = [sys.executable, "-m", "tests.end_to_end.stock_clients", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"There is no checkpoint in {tmp_path}/none: make demo trains one, or name yours with CKPT=.\n"
