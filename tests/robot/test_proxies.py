"""Proxies of the environment: none to this machine, and an error that names the one to another."""

import pytest

from tests.robot.test_client import answering
from vlaflow.errors import RequestError
from vlaflow.robot import wire
from vlaflow.robot.client import Client
from vlaflow.robot.proxies import proxy_of

DEAD = "http://user:secret@127.0.0.1:9"
"""Nothing listens on the discard port."""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "ws_proxy", "wss_proxy", "socks_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, DEAD)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_proxy_env_is_ignored_for_a_server_on_this_machine(host):
    hello = wire.pack({"a": 1})
    with answering(lambda connection: connection.send(hello)) as address:
        client = Client(address.replace("127.0.0.1", host), timeout_s=5)
        client.close()
    assert client.metadata == {"a": 1}


def test_an_error_behind_a_proxy_names_it_without_its_password():
    with pytest.raises(
        RequestError, match=r"cannot be reached through the proxy http://127\.0\.0\.1:9 of the env.*no_proxy"
    ) as e:
        Client("ws://robot.invalid:8000", timeout_s=5)
    assert "secret" not in str(e.value)


def test_the_cure_of_that_error_helps(monkeypatch):
    monkeypatch.setenv("no_proxy", "robot.invalid")
    with pytest.raises(RequestError, match=r"robot\.invalid:8000 cannot be reached: "):
        Client("ws://robot.invalid:8000", timeout_s=5)


@pytest.mark.parametrize(
    ("address", "proxy"),
    [
        ("ws://127.8.9.1:1", None),
        ("ws://[::1]:1", None),
        ("ws://LOCALHOST:1", None),
        ("ws://localhost.example.org:1", DEAD),
        ("ws://10.0.0.2:1", DEAD),
        ("wss://example.org", DEAD),
    ],
)
def test_only_loopback_goes_without(address, proxy):
    assert proxy_of(address) == proxy


def test_a_proxy_for_websockets_comes_first(monkeypatch):
    monkeypatch.setenv("ws_proxy", "http://other:1")
    assert proxy_of("ws://example.org") == "http://other:1"
