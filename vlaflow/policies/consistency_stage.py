"""The stage that distils a trained flow policy, so that the same networks need one solver step or two.

What they learn, and from which papers, is in ``flows.consistency``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from vlaflow.decoders.capability import Capability
from vlaflow.decoders.losses import LossTerms
from vlaflow.errors import CapabilityError
from vlaflow.flows.consistency import Consistency
from vlaflow.policies.base import Policy
from vlaflow.policies.processor import Drawn, Prepared
from vlaflow.policies.stages import PolicyStage


class ConsistencyStage(PolicyStage):
    """A policy learns to reach in a step where its teacher's flow leads at full depth; all its exits learn the same.

    In evaluation the teacher walks all the way, so that held-out losses measure the distance to its chunks and can be compared.

    Args:
        policy: what trains.
        teacher: stays as it is.
        consistency: how far the teacher walks.

    Raises:
        CapabilityError: the policy is not a continuous flow.
    """

    def __init__(self, policy: Policy, teacher: Policy, consistency: Consistency) -> None:
        decoder = policy.model.decoder
        if Capability.CONTINUOUS not in decoder.capabilities:
            raise CapabilityError(
                f"Consistency distillation needs a continuous flow, which a {type(decoder).__name__} is not; leave consistency "
                "out, or continue the checkpoint of a flow policy."
            )
        super().__init__(policy)
        self.teacher, self.consistency = teacher, consistency

    def loss(self, batch: Prepared, drawn: Drawn) -> LossTerms:
        """The loss of the policy's own training, with the velocities of ``Consistency.target`` in place of the data's."""
        model, whole = self.teacher.model, not self.module.training
        with torch.no_grad():
            teacher = model.decoder.velocity_field(model.read(self.teacher.begin(batch)))
        teaching = partial(self.consistency.target, teacher=teacher, whole=whole)
        return self.policy.loss_of(replace(batch, targets=replace(batch.targets, teaching=teaching)), drawn)

    def to(self, device: torch.device) -> None:
        """Both policies."""
        super().to(device)
        self.teacher.model.to(device)
