"""A small latent action model to train, in this process or in several together (``together``)."""

from dataclasses import replace

import torch
from safetensors.torch import save_file

from tests.training.small import Memory, tiny_config
from vlaflow.actions.latent import LatentActionModel, LatentConfig, Origin
from vlaflow.actions.nsvq import Codebook, Replacement
from vlaflow.data.batch import ObservationBatch
from vlaflow.data.common import Normalizers
from vlaflow.data.pairs import EARLIER, LATER
from vlaflow.data.transforms import Normalizer
from vlaflow.policies.objectives import LatentObjective
from vlaflow.policies.stages import LatentStage
from vlaflow.training.trainer import Trainer

SMALL = LatentConfig(image_size=32, patch=4, width=16, heads=2, ffn=32, spatial=1, temporal=1, decoder=1, code_dim=4, book=16)
OFTEN = Replacement(every=2, until=1.0, threshold=0.5)


class Pairs(Memory):
    """Frame pairs as a function of their number."""

    def batch(self, indices):
        batch = super().batch(indices)
        earlier = batch.observation.images["front"]
        seen = batch.observation
        images = {EARLIER: earlier, LATER: earlier.roll(3, 1)}
        return replace(batch, observation=ObservationBatch(images, seen.state_BS, seen.instructions))


def latent_config(**changes):
    objective = LatentObjective(changes.pop("model", SMALL), "front", 0.2, OFTEN)
    return tiny_config(**{"objective": objective, "shift": 0, **changes})


def latent_stage(config):
    latent = config.objective
    model = LatentActionModel.create(latent.model, Origin("", "front", 10.0, 0.2, 2), config.seed)
    action = Normalizers((Normalizer("mean_std", (0.0, 0.0), (1.0, 1.0)),), 2) if latent.model.action_dim else None
    return LatentStage(model, latent.replacement, config.steps, action, latent.action_weight)


def train(out, config=None, source=None, held=None):
    config = config or latent_config()
    stage = latent_stage(config)
    trainer = Trainer(stage, config, source or Pairs(), held, out, tracker="none")
    trainer.run()
    return stage, trainer.team


def uses_of_two_processes(rank):
    """How many entries move when process 0 uses 0 … 7 and process 1 uses 8 … 15: none of 16, if they count together."""
    book = Codebook(16, 4)
    book.entry_VE.data = torch.eye(16)[:, :4] + torch.arange(16.0)[:, None]
    book(book.entry_VE.detach()[None, 8 * rank : 8 * rank + 8], torch.ones(1, 8, 4))
    return book.replace_unused(Replacement(1, 1.0, 0.5), 0, 10, torch.Generator().manual_seed(0))


def train_together(out):
    """Train, and leave what this process ended with in a file of its own."""
    stage, team = train(out, latent_config(global_batch_size=4), held=Pairs(9))
    moved = torch.tensor(uses_of_two_processes(team.rank))
    weights = {name: p.detach().clone() for name, p in stage.module.named_parameters()}
    save_file({**weights, "used": stage.module.book.used_V, "moved": moved}, out / f"rank-{team.rank}.safetensors")
