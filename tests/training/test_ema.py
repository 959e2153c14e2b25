"""The moving average of the weights."""

import torch
from torch import nn

from vlaflow.training.ema import Ema


def test_the_average_equals_an_explicit_loop():
    """Tolerance: lerp rounds once more or less than the textbook form."""
    module = nn.Linear(3, 3)
    ema = Ema(module, 0.9)
    expected = module.weight.detach().clone().double()
    for n in range(50):
        with torch.no_grad():
            module.weight.add_(torch.randn(3, 3, generator=torch.Generator().manual_seed(n)))
        ema.update()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * module.weight.detach().double()
    torch.testing.assert_close(ema.named()["weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_constant_weights_are_their_own_average():
    module = nn.Linear(3, 3)
    ema = Ema(module, 0.99)
    for _ in range(5):
        ema.update()
    assert torch.equal(ema.named()["weight"], module.weight)


def test_the_weights_come_back_to_the_bit():
    module = nn.Linear(3, 3)
    ema = Ema(module, 0.5)
    with torch.no_grad():
        module.weight.mul_(1.1)
    ema.update()
    before, average = module.weight.detach().clone(), ema.named()["weight"].clone()
    with ema.in_module():
        assert torch.equal(module.weight, average)
        assert not torch.equal(module.weight, before)
    assert torch.equal(module.weight, before)
    assert torch.equal(ema.named()["weight"], average)


def test_only_what_trains_is_averaged():
    module = nn.Linear(3, 3)
    module.bias.requires_grad_(False)
    assert list(Ema(module, 0.5).named()) == ["weight"]


def test_without_warm_up_the_decay_is_constant():
    ema = Ema(nn.Linear(1, 1), 0.9, warm_up=False)
    assert {ema.decay_at(n) for n in range(10)} == {0.9}
