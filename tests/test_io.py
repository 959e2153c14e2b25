"""Writing tensors one at a time."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlaflow.io import save_tensors


def tensors():
    generator = torch.Generator().manual_seed(0)
    given = {
        f"{name}.ü": torch.randn(3, 5, generator=generator).to(dtype) for name, dtype in (("b", None), ("a", torch.bfloat16))
    }
    kinds = (torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    given |= {str(kind): torch.arange(4).to(kind) for kind in kinds}
    return {**given, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "turned": torch.arange(6.0).view(2, 3).T}


@pytest.mark.parametrize("about", [None, {"rows": "{}"}])
def test_the_bytes_are_those_of_safetensors_own_writer(tmp_path, about):
    save_tensors(tmp_path / "ours", tensors(), about=about)
    save_file({name: t.contiguous() for name, t in tensors().items()}, tmp_path / "theirs", about)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_is_not_given_is_taken_from_the_model(tmp_path):
    like = {"a": torch.zeros(2), "b": torch.ones(3)}
    save_tensors(tmp_path / "file", {"a": torch.full((2,), 7.0)}, like=like)
    found = load_file(tmp_path / "file")
    assert torch.equal(found["a"], torch.full((2,), 7.0))
    assert torch.equal(found["b"], like["b"])
    with pytest.raises(ValueError, match="'a' is not of the shape"):
        save_tensors(tmp_path / "file", {"a": torch.zeros(3)}, like=like)
