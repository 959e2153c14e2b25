"""What a process imports that opens a policy: every environment worker, server and command waits for it."""

import subprocess
import sys

from tests.training.small import new_policy, tiny_config

CODE = """
import sys
import vlaflow.policies.asyncvla.recipes
from vlaflow.policies.base import Policy

Policy.from_pretrained(sys.argv[1])
print(*{"transformers", "torch._dynamo", "sympy", "scipy", "matplotlib", "accelerate"} & sys.modules.keys())
"""


def test_opening_a_policy_imports_neither_torchs_compiler_nor_what_other_policies_need(tmp_path):
    """The compiler alone takes as long as torch itself; operations on the meta device import it unasked."""
    new_policy(tiny_config()).save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("\n", 0), done.stderr
