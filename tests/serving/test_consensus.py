"""Several draws per request, in the server's batches."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from tests import helpers
from tests.serving.live import POLICY, request, serving
from vlaflow.compute.consensus import Consensus
from vlaflow.compute.dense import Dense
from vlaflow.robot.client import Client
from vlaflow.serving.engine import EngineConfig
from vlaflow.spec import ActionPrefix


def test_draws_of_batched_requests_are_those_of_single_ones():
    compute, known = Consensus(3, "mean", Dense(3)), np.full((4, 4), 0.5, np.float32)
    with serving(compute=compute, engine=EngineConfig(batch=4, wait_ms=50)) as (server, address):

        def ask(number):
            with Client(address) as client:
                return client.infer(request(number, seed=number, action_prefix=known, inference_delay=2))

        with ThreadPoolExecutor(4) as pool:
            replies = list(pool.map(ask, range(4)))
        assert server.engine.counts.batches < 4
    for number, reply in enumerate(replies):
        generator = torch.Generator().manual_seed(number)
        own = POLICY.act(helpers.observation(number), compute, generator=generator, action_prefix=ActionPrefix(known, 2))
        np.testing.assert_array_equal(reply["actions"][:2], known[:2])
        np.testing.assert_allclose(reply["actions"], own.actions, atol=1e-5)
        np.testing.assert_allclose(reply["spread"], own.spread, atol=1e-5)
