"""A robot under real-time control goes on through a restart of its server, over real sockets."""

import logging
import time

from tests.serving.live import request, serving
from vlaflow.robot import BackgroundTransport, Client, RealtimeConfig, RealtimeController


def test_the_controller_goes_on_through_a_restart_and_the_client_says_so(caplog):
    with serving() as (_, address):
        port = int(address.rpartition(":")[2])
        client = Client(address, timeout_s=5)
        transport = BackgroundTransport(client)
        controller = RealtimeController(transport, client.metadata, RealtimeConfig("commit", n_action_steps=2))
        controller.begin(request(1))
    with client, transport, caplog.at_level(logging.WARNING):
        drive(controller, lambda: controller.counts.failed)
        before = controller.counts.answered
        with serving(port=port):
            drive(controller, lambda: controller.counts.answered > before)
    assert client.reconnected == 1
    assert "reconnected to" in caplog.text
    assert "failed, repeating it" in caplog.text


def drive(controller, until, seconds=20):
    """Act as a robot would, at 200 Hz, until something has come true."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        controller.act(lambda: request(2))
        time.sleep(0.005)
