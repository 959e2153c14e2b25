"""Writing tensors one at a time, and files on systems that lack what Linux has."""

import errno
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vlaflow.errors import CapabilityError, CheckpointError, ConfigError
from vlaflow.io import CHECKSUM, read_json, read_weights, save_tensors
from vlaflow.outputs import claim, require_system
from vlaflow.text import printable


def test_a_lock_keeps_a_second_holder_out_until_it_is_released(tmp_path):
    with (tmp_path / "lock").open("w") as first, (tmp_path / "lock").open("w") as second:
        claim(first.fileno(), "busy")
        with pytest.raises(ConfigError, match="busy"):
            claim(second.fileno(), "busy")
        first.close()
        claim(second.fileno(), "busy")
        claim(second.fileno())


def test_a_system_without_locks_is_the_error_of_a_folder_without_locks(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with (tmp_path / "lock").open("w") as file, pytest.raises(OSError, match="no file locks") as error:
        claim(file.fileno())
    assert error.value.errno == errno.ENOLCK


def test_windows_is_one_sentence_and_other_systems_are_none():
    for system in ("linux", "darwin"):
        require_system(system)
    with pytest.raises(CapabilityError, match="install it within WSL") as error:
        require_system("win32")
    assert "\n" not in str(error.value)


def test_a_command_on_windows_ends_with_that_sentence_before_anything_is_imported():
    code = "import sys\nfrom vlaflow.cli.main import main\nsys.platform = 'win32'\nsys.exit(main(['train', 'asyncvla.demo']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "WSL" in done.stderr


def tensors():
    generator = torch.Generator().manual_seed(0)
    given = {
        f"{name}.ü": torch.randn(3, 5, generator=generator).to(dtype) for name, dtype in (("b", None), ("a", torch.bfloat16))
    }
    kinds = (torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    given |= {str(kind): torch.arange(4).to(kind) for kind in kinds}
    return {**given, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "turned": torch.arange(6.0).view(2, 3).T}


def test_the_bytes_are_those_of_safetensors_own_writer(tmp_path):
    """Of several entries of its metadata, that one writes the first at random."""
    save_tensors(tmp_path / "ours", tensors())
    with safe_open(tmp_path / "ours", "pt") as opened:
        about = opened.metadata()
    assert list(about) == [CHECKSUM]
    save_file({name: t.contiguous() for name, t in tensors().items()}, tmp_path / "theirs", about)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    save_tensors(tmp_path / "ours", tensors(), about={"rows": "{}"})
    with safe_open(tmp_path / "ours", "pt") as opened:
        assert opened.metadata().keys() == {CHECKSUM, "rows"}
    assert all(torch.equal(found, tensors()[name]) for name, found in read_weights(tmp_path / "ours").items())


def test_no_flipped_bit_leaves_weights_that_are_read(tmp_path):
    """Apart from one in the name of the checksum, without which the weights are as they were saved."""
    file, like = tmp_path / "file", {"a": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}
    save_tensors(file, like)
    saved = file.read_bytes()

    @settings(max_examples=100)
    @given(place=st.integers(0, len(saved) - 1), bit=st.integers(0, 7))
    def every(place, bit):
        content = bytearray(saved)
        content[place] ^= 1 << bit
        file.write_bytes(content)
        if CHECKSUM.encode() in content:
            with pytest.raises(CheckpointError, match="Copy it again"):
                read_weights(file)
        else:
            with suppress(CheckpointError):
                assert all(torch.equal(found, like[name]) for name, found in read_weights(file).items())

    every()


def test_weights_of_other_programs_have_no_checksum_and_are_read(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "file")
    assert torch.equal(read_weights(tmp_path / "file")["a"], torch.ones(3))


def test_what_is_not_given_is_taken_from_the_model(tmp_path):
    like = {"a": torch.zeros(2), "b": torch.ones(3)}
    save_tensors(tmp_path / "file", {"a": torch.full((2,), 7.0)}, like=like)
    found = load_file(tmp_path / "file")
    assert torch.equal(found["a"], torch.full((2,), 7.0))
    assert torch.equal(found["b"], like["b"])
    with pytest.raises(ValueError, match="'a' is not of the shape"):
        save_tensors(tmp_path / "file", {"a": torch.zeros(3)}, like=like)


DAMAGED = [b"[1, 2]", b"null", b"5", b"{", b"\xff\xfe{}", b'{"a": ' * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_what_is_no_json_object_is_one_sentence_that_names_the_file(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json .*; the file is damaged\.$"):
        read_json(tmp_path / "config.json")


def test_control_characters_of_an_error_do_not_reach_the_terminal():
    assert printable("task 'a\x1b[31m\r' ü\n") == "task 'a\\x1b[31m\\r' ü\n"
