"""What a language model's perplexity is in two cases that are known."""

import pytest
import torch

from benchmarks.perplexity import perplexity
from tests.backbones.smol import TEXT
from vlaflow.backbones.smol import SmolConfig

pytest.importorskip("transformers")
ID_N = torch.arange(50) % 7


def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmolConfig(4, (), architecture=TEXT | {"num_hidden_layers": 1}).build().eval()


def test_a_model_without_a_preference_is_as_perplexed_as_its_vocabulary_is_large():
    backbone = model()
    torch.nn.init.zeros_(backbone.language.norm.weight)
    assert perplexity(backbone, ID_N, 16) == pytest.approx(TEXT["vocab_size"])


def test_a_model_that_has_learned_the_text_is_less_perplexed():
    """Its tokens are learned through the same layers and head, by which also policies answer."""
    backbone = model()
    before, optimizer = perplexity(backbone, ID_N, 16), torch.optim.Adam(backbone.parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        hidden = backbone.language(input_ids=ID_N[None]).last_hidden_state[0]
        torch.nn.functional.cross_entropy(backbone.name_ids(hidden)[:-1], ID_N[1:]).backward()
        optimizer.step()
    assert perplexity(backbone, ID_N, 16) < before / 10
