"""Norms of a block."""

import torch

from vlaflow.nn.block import make_norm


def norm():
    made = make_norm("layer", 8, 1e-6)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(8, generator=generator))
    return made, torch.randn(3, 8, generator=generator)


def test_a_norm_is_torchs():
    made, x_BW = norm()
    plain = torch.nn.LayerNorm(8, eps=1e-6)
    plain.load_state_dict(made.state_dict())
    assert torch.equal(made(x_BW), plain(x_BW))


def test_a_norm_with_rounded_weights_keeps_the_activations_format():
    """Layers shared by processes are gathered in bfloat16, while sums of a block stay in float32."""
    made, x_BW = norm()
    rounded = made.to(torch.bfloat16)
    expected, _ = norm()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.copy_(parameter.bfloat16().float())
    assert torch.equal(rounded(x_BW), expected(x_BW))
