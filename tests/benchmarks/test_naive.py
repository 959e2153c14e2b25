import torch
from torch import nn

from benchmarks._naive import NaivePolicy, Style
from benchmarks.training import make_batch, make_policy
from vlaflow.backbones.tiny import TinyConfig
from vlaflow.decoders.flow import FlowConfig
from vlaflow.policies.base import PolicyConfig

RENAMED = {"layers.": "blocks.", ".ffn.up": ".up", ".ffn.down": ".down"}
ROUNDING = 1e-4
"""Float32 sums in another order; velocities are of order 1."""


def weights_for_naive(model):
    """The library's weights under the naive model's names."""
    state = {}
    for name, tensor in {**model.backbone.state_dict(), **model.decoder.state_dict()}.items():
        if name.startswith("stems.0.patches.project."):
            cell = tensor.view(-1, 4, 4, 3).permute(0, 3, 1, 2) if tensor.ndim == 2 else tensor
            state[f"stem.0.{name.rsplit('.', 1)[1]}"] = cell
            continue
        if name.startswith("stems.0.convolutions."):
            number, kind = name.removeprefix("stems.0.convolutions.").split(".")
            state[f"stem.{int(number) + 1}.{kind}"] = tensor
            continue
        for ours, theirs in RENAMED.items():
            name = name.replace(ours, theirs)  # noqa: PLW2901
        state[name] = tensor
    return state


def test_the_naive_model_is_the_same_model():
    """With the library's norms, activation and weights it predicts the library's velocities, padded sentences included."""
    backbone = TinyConfig(4, ("corner2",), image_size=32, cell=16, width=32, depth=2, heads=2, ffn=64, suffix=6)
    config = PolicyConfig("asyncvla", backbone, FlowConfig(action_dim=4, chunk_size=6), n_action_steps=3)
    policy, batch = make_policy(config), make_batch(config, 3)
    naive = NaivePolicy(backbone, 4, 6, Style(norm=nn.LayerNorm, gelu="none"))
    naive.load_state_dict(weights_for_naive(policy.model))
    generator = torch.Generator().manual_seed(0)
    x_BLD, clock_BL = torch.randn(3, 6, 4, generator=generator), torch.rand(3, 6, generator=generator)
    with torch.no_grad():
        ours_BLD = policy.model.decoder.velocity(x_BLD, clock_BL, policy.encode(batch.observation))
        seen = batch.observation
        state_BS = (seen.state_BS - torch.tensor(policy.stats["state"].mean)) / torch.tensor(policy.stats["state"].std)
        theirs_BLD = naive.velocity(seen, state_BS.float(), x_BLD, clock_BL)
    torch.testing.assert_close(theirs_BLD, ours_BLD, rtol=0, atol=ROUNDING)
