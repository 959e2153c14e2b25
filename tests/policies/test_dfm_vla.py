"""DFM-VLA's assemblies and recipes: the published size on the meta device, and its recipes' numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vlaflow.actions.fast import FastFit
from vlaflow.policies.baselines import recipes as baselines
from vlaflow.policies.dfm_vla import recipes
from vlaflow.policies.dfm_vla.policy import emu3
from vlaflow.policies.recipe import DataSpec
from vlaflow.training.optim import freeze

DATA = DataSpec(8, 7, ("front", "wrist"))
CHUNKS = np.random.default_rng(0).uniform(-0.2, 0.2, (50, 10, 7)).cumsum(1).clip(-1, 1).astype(np.float32)


def built(config):
    config = replace(config, decoder=config.decoder.fitted(CHUNKS))
    with torch.device("meta"):
        return config.build()


def test_the_published_size_and_what_of_it_trains():
    """8.49 B parameters of Emu3; the decoder adds embedding and head of the action tokens, and the mark in front of them."""
    config = recipes.libero(DATA)
    model = built(emu3(DATA, source=None))
    freeze(model, config.optim)
    assert not any(p.requires_grad for p in model.backbone.network.vqmodel.parameters())
    assert all(p.requires_grad for p in model.backbone.language.parameters())
    vocabulary = model.decoder.vocabulary
    assert sum(p.numel() for p in model.decoder.parameters()) == (2 * vocabulary + 1) * 4096 + vocabulary
    assert vocabulary <= 1025
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(8.6e9, rel=0.02)


def test_the_published_numbers():
    config, optim = recipes.libero(DATA), recipes.libero(DATA).optim
    assert (optim.learning_rate, optim.betas, optim.eps, optim.weight_decay) == (8e-5, (0.9, 0.95), 1e-6, 0.1)
    assert optim.learning_rate * optim.final_fraction == pytest.approx(5e-6)
    assert (optim.warmup_steps, optim.clip_norm, config.global_batch_size, config.accumulate) == (50, 5.0, 256, 32)
    assert config.objective.policy.decoder.tokenizer == FastFit(50.0, 1024)
    assert config.objective.policy.n_action_steps == config.objective.policy.decoder.chunk_size == 10
    assert recipes.calvin(DATA).steps == 24_000


def test_the_comparison_differs_in_the_decoder_alone():
    made = [
        *(getattr(recipes, name) for name in ("demo", "demo_head", "demo_ordered", "demo_slots", "demo_bins", "demo_fast")),
        *(getattr(baselines, name) for name in ("fast_ar", "coefficients_ar", "masked_diffusion", "flow")),
    ]
    configs = [recipe(DATA) for recipe in made]
    decoder = configs[0].objective.policy.decoder
    same = {
        repr(replace(c, objective=replace(c.objective, policy=replace(c.objective.policy, decoder=decoder, system="x"))))
        for c in configs
    }
    assert len(same) == 1
