"""Norms of a block."""

import warnings

import pytest
import torch

from vlaflow.nn.block import make_norm

TORCHS = {"layer": torch.nn.LayerNorm, "rms": torch.nn.RMSNorm}


def norm(kind):
    made = make_norm(kind, 8, 1e-6)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(8, generator=generator))
    return made, torch.randn(3, 8, generator=generator)


@pytest.mark.parametrize("kind", TORCHS)
def test_a_norm_is_torchs(kind):
    made, x_BW = norm(kind)
    plain = TORCHS[kind](8, eps=1e-6)
    plain.load_state_dict(made.state_dict())
    assert torch.equal(made(x_BW), plain(x_BW))


@pytest.mark.parametrize("kind", TORCHS)
def test_a_norm_with_rounded_weights_keeps_the_activations_format(kind):
    """Layers shared by processes are gathered in bfloat16, while sums of a block stay in float32."""
    made, x_BW = norm(kind)
    rounded = made.to(torch.bfloat16)
    expected, _ = norm(kind)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.copy_(parameter.bfloat16().float())
    assert torch.equal(rounded(x_BW), expected(x_BW))


def test_rounded_activations_are_normed_without_a_warning(request):
    """What autocast hands to a norm of the Qwen family, whose weights stay in float32."""
    made, x_BW = norm("rms")
    half_BW = x_BW.bfloat16()
    request.addfinalizer(lambda: torch.set_warn_always(False))
    torch.set_warn_always(True)  # by default torch says it once a process
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = made(half_BW)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), made(half_BW.float()), rtol=2**-7, atol=0)  # two roundings to 8 bits
