"""Weights that are read later: what is read is what would have been read at once, and nothing is held before."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import policy
from vlaflow.errors import CheckpointError
from vlaflow.nn.stored import lay_as, place_of, read_here, rows_of, shared_later, without_memory
from vlaflow.policies.base import Policy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    policy(rater=True).save_pretrained(folder)
    return folder


def test_a_checkpoint_is_left_in_its_file_until_it_is_read(checkpoint):
    at_once = Policy.from_pretrained(checkpoint).model.state_dict()
    with shared_later(False):
        later = Policy.from_pretrained(checkpoint).model
    assert all(p.is_meta for p in later.parameters())
    read_here(later)
    for name, tensor in at_once.items():
        assert torch.equal(later.state_dict()[name], tensor)


def test_rows_of_a_weight_are_read_without_the_others(checkpoint):
    with shared_later(True):
        later = Policy.from_pretrained(checkpoint).model
    whole = load_file(checkpoint / "model.safetensors")
    name, parameter = next((n, p) for n, p in later.named_parameters() if p.ndim == 2 and len(p) > 5)
    assert torch.equal(rows_of(parameter, torch.tensor([4, 2, 2])), whole[name][[4, 2, 2]])
    place = place_of(parameter)
    assert torch.equal(place.rows(1, 3), whole[name][1:3])
    assert place.rows(5, 5).shape == (0, *place.shape[1:])


def test_a_network_can_lie_where_another_one_does(checkpoint):
    with shared_later(True):
        later = Policy.from_pretrained(checkpoint)
        with without_memory():
            other = later.config.build()
    lay_as(other, later.model)
    read_here(other)
    at_once = Policy.from_pretrained(checkpoint).model
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), at_once.parameters(), strict=True))


def test_building_without_memory_keeps_buffers_and_ends_with_its_context():
    config = policy().config
    with without_memory():
        model = config.build()
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert not any(p.is_meta for p in torch.nn.Linear(2, 2).parameters())


@pytest.mark.parametrize("damage", ["tensor", "shape"])
def test_a_file_of_another_network_is_refused_before_anything_is_read(checkpoint, tmp_path, damage):
    for file in checkpoint.glob("*.json"):
        (tmp_path / file.name).write_text(json.dumps(json.loads(file.read_text())))
    tensors = load_file(checkpoint / "model.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name][..., :-1].contiguous()
    if damage == "tensor":
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with shared_later(True), pytest.raises(CheckpointError, match=f"'{name}'.*config.json"):
        Policy.from_pretrained(tmp_path)
