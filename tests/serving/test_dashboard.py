"""The operator's page: it shows what happened, speaks only where it is asked to, and nobody else gets to see it."""

import base64
import io
import json
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from tests import helpers
from tests.serving import browser, hostile
from tests.serving.live import POLICY, Slow, expected, port_of, request, serving, until
from vlaflow.compute.dense import Dense
from vlaflow.compute.doubts import BelowThreshold
from vlaflow.compute.refine import Refine
from vlaflow.errors import RequestError
from vlaflow.flows.sampling import Sampling
from vlaflow.robot.client import Client
from vlaflow.serving import dashboard
from vlaflow.serving.dashboard import SUBPROTOCOL
from vlaflow.spec import Observation

NO_BROWSER = "there is no Chromium that runs; tools/setup.sh dev installs it where it may (sudo apt install chromium)"
chromium = pytest.mark.skipif(browser.find() is None, reason=NO_BROWSER)
RATED = helpers.policy(rater=True)


def watching(address, token=None, **more):
    """The stream, opened as the page opens it."""
    origin = address.replace("ws://", "http://")
    offered = [SUBPROTOCOL] + ([f"token.{base64.urlsafe_b64encode(token.encode()).decode().rstrip('=')}"] if token else [])
    return connect(f"{address}/dashboard/stream", subprotocols=offered, **{"origin": origin, **more})


def told(stream, condition, seconds=10):
    """The first message of the stream that is as it should be."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        message = json.loads(stream.recv(10))
        if condition(message):
            return message
    raise AssertionError(f"not told within {seconds} s; last: {message}")


@pytest.fixture(scope="module")
def live():
    with serving(dashboard=True) as found:
        yield found


def test_the_page_is_off_unless_asked_for():
    with serving() as (_, address):
        with pytest.raises(urllib.error.HTTPError, match="426"):
            urllib.request.urlopen(address.replace("ws", "http") + "/dashboard")
        with pytest.raises(InvalidStatus, match="403"), watching(address):
            pass


@pytest.mark.parametrize(("path", "kind"), [("", "text/html"), ("/style.css", "text/css"), ("/script.js", "text/javascript")])
def test_the_page_may_load_and_ask_nothing_but_its_own_server(live, path, kind):
    answer = urllib.request.urlopen(f"{live[1].replace('ws', 'http')}/dashboard{path}")
    assert answer.headers["Content-Type"].startswith(kind)
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    assert "://" not in answer.read().decode().replace("http://www.w3.org/2000/svg", "").replace("${scheme}://", "")


def test_the_stream_tells_what_the_last_request_showed_and_got(live):
    server, address = live
    with watching(address) as stream, Client(address) as client:
        hello = json.loads(stream.recv(10))
        assert [d["name"] for d in hello["dimensions"]] == ["d0", "d1", "d2", "d3"]
        reply = client.infer(request(3, seed=5))
        message = told(stream, lambda m: "chunk" in m and m["chunk"]["request"] == sum(server.request_log.outcomes.values()))
        np.testing.assert_allclose(message["chunk"]["actions"], reply["actions"], atol=1e-5)
        assert message["chunk"]["confidence"] is None
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(message["images"]["image"].partition(",")[2]))))
        assert picture.shape == (16, 16, 3)
        assert message["latency_ms"][0] <= message["latency_ms"][1]
        assert message["clients"] == [message["chunk"]["client"]]
        assert message["work"][-1] == [reply["layers"], reply["nfe"]]


def test_a_raters_confidence_and_the_draft_are_sent():
    served = serving(RATED, Refine(BelowThreshold(1.0), Sampling(3), Dense(3)), dashboard=True)
    with served as (_, address), watching(address) as stream, Client(address) as client:
        reply = client.infer(request(0))
        chunk = told(stream, lambda m: "chunk" in m)["chunk"]
    np.testing.assert_allclose(chunk["confidence"], reply["confidence"], atol=1e-3)
    assert chunk["regenerated"] == [True] * 3 + [False] * 3  # three of six actions are executed
    assert np.shape(chunk["draft"]) == (6, 4)


def test_the_operators_instruction_reaches_requests_that_follow_and_no_others(live):
    _, address = live
    words = "Close it"
    with watching(address) as stream, Client(address) as client:
        before = client.infer(request(0, seed=1, follow_operator=True))
        assert before["instruction"] == "Open a drawer"
        stream.send(json.dumps({"instruction": f"  {words} "}))
        told(stream, lambda m: m.get("instruction") == words)
        followed = client.infer(request(0, seed=1, follow_operator=True))
        own = client.infer(request(0, seed=1))
        message = told(stream, lambda m: m.get("followed") == 1 and m.get("ignored") == 1)
        stream.send(json.dumps({"instruction": None}))
        told(stream, lambda m: "instruction" in m and m["instruction"] is None)
        after = client.infer(request(0, seed=1, follow_operator=True))
    assert message["instruction"] == words
    assert followed["instruction"] == words
    assert "instruction" not in own
    np.testing.assert_array_equal(own["actions"], expected(0, 1))
    np.testing.assert_array_equal(after["actions"], before["actions"])
    changed = POLICY.act(helpers.observation(0, words), Dense(3), generator=helpers.generators(1, 1)[0])
    np.testing.assert_array_equal(followed["actions"], changed.actions)
    assert not np.array_equal(followed["actions"], own["actions"])


def test_setting_and_clearing_an_instruction_is_logged(live, caplog):
    caplog.set_level("INFO")
    with watching(live[1]) as stream:
        for words in ("Stop", None):
            stream.send(json.dumps({"instruction": words}))
            told(stream, lambda m, words=words: m.get("instruction", 0) == words)
    said = [record.getMessage() for record in caplog.records]
    assert any(line.endswith("instruction: set to 'Stop'") for line in said)
    assert any(line.endswith("instruction: cleared") for line in said)


LONG = json.dumps({"instruction": "x" * 301})


@pytest.mark.parametrize("frame", ["", "[", "[" * 5000, "{}", '{"instruction": 5}', '{"instruction": " "}', LONG, b"\xff"])
def test_what_is_no_instruction_is_refused_and_changes_nothing(live, frame):
    with watching(live[1]) as stream:
        stream.send(frame)
        assert told(stream, lambda m: m["kind"] == "refused")["sentence"]
    assert live[0].dashboard.instruction is None


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"origin": None}, "Only the page of this server"),
        ({"origin": "http://example.org"}, "Only the page of this server"),
        ({"origin": "null"}, "Only the page of this server"),
    ],
)
def test_pages_of_other_origins_cannot_watch(live, more, why):
    """Without this any page that a browser shows could open a socket to this machine and look through the camera."""
    with pytest.raises(InvalidStatus) as caught, watching(live[1], **more):
        pass
    assert caught.value.response.status_code == 403
    assert why in caught.value.response.body.decode()


def test_a_name_that_was_pointed_at_this_machine_cannot_watch_it(live):
    """DNS rebinding: the page's origin and the host agree, and both are a stranger's."""
    hello = hostile.HELLO.replace(b"GET /", b"GET /dashboard/stream").replace(b"127.0.0.1", b"example.org")
    hello = hello.replace(b"\r\n\r\n", b"\r\nOrigin: http://example.org\r\n\r\n")
    with hostile.Raw(port_of(live[1]), hello) as stranger:
        assert b" 403 " in stranger.head
    own = hello.replace(b"example.org", b"localhost")
    with hostile.Raw(port_of(live[1]), own) as page:
        assert b" 101 " in page.head


def test_the_stream_needs_the_servers_token_which_is_never_logged(caplog):
    caplog.set_level("DEBUG", "vlaflow")
    with serving(token="a-secret/é", dashboard=True) as (_, address):
        assert urllib.request.urlopen(address.replace("ws", "http") + "/dashboard").read().count(b'data-token="yes"') == 1
        for wrong in (None, "a-secret", "a-secret/e"):
            with pytest.raises(InvalidStatus, match="403"), watching(address, wrong):
                pass
        with watching(address, "a-secret/é") as stream:
            assert stream.subprotocol == SUBPROTOCOL
            assert json.loads(stream.recv(10))["kind"] == "hello"
    coded = base64.urlsafe_b64encode("a-secret/é".encode()).decode()
    assert not [r for r in caplog.records if "a-secret" in r.getMessage() or coded[:8] in r.getMessage()]


def test_pages_that_never_read_slow_nobody_and_miss_frames():
    """What they are told fills their sockets; after that nothing more is made for them."""
    image = np.random.default_rng(0).integers(0, 256, (480, 480, 3), dtype=np.uint8)
    seen = {**request(1), "observation/image": image}
    known = POLICY.act(Observation({"image": image}, seen["observation/state"], seen["prompt"]), Dense(3)).actions
    hello = hostile.HELLO.replace(b"GET /", b"GET /dashboard/stream")
    hello = hello.replace(b"\r\n\r\n", b"\r\nOrigin: http://127.0.0.1\r\n\r\n")
    with serving(dashboard=True) as (server, address), Client(address) as client:
        server.dashboard.rate_hz = 1000.0
        pages = [hostile.Raw(port_of(address), hello) for _ in range(2)]
        assert until(lambda: server.dashboard.watchers == 2)
        for _ in range(60):
            np.testing.assert_array_equal(client.infer({**seen, "seed": 0})["actions"], known)
        made = server.dashboard.messages_sent
        for _ in range(10):
            client.infer({**seen, "seed": 0})
        assert server.dashboard.messages_sent == made
        for page in pages:
            page.close()
        assert until(lambda: server.dashboard.watchers == 0)


def test_a_fifth_page_is_turned_away():
    with serving(dashboard=True) as (_, address), ExitStack() as open_:
        for _ in range(4):
            json.loads(open_.enter_context(watching(address)).recv(10))
        with pytest.raises(ConnectionClosed, match="4 pages are already watching"), watching(address) as fifth:
            fifth.recv(10)


def test_watchers_take_no_place_of_a_client():
    with serving(dashboard=True, connections=1) as (_, address), watching(address) as stream, Client(address) as client:
        client.infer(request(0))
        assert told(stream, lambda m: "chunk" in m)
        with pytest.raises(RequestError, match="1 clients are connected already"):
            Client(address)


def test_an_answer_that_is_no_number_is_an_error_on_the_page_and_for_the_client():
    """A policy that diverged must not break the page: JSON has neither NaN nor infinity."""

    class Diverged(Slow):
        def decode(self, *arguments):
            out = super().decode(*arguments)
            return replace(out, action_BLD=out.action_BLD * float("nan"))

    with serving(compute=Diverged(0), dashboard=True) as (_, address), watching(address) as stream, Client(address) as client:
        with pytest.raises(RequestError, match="NaN or an infinite value"):
            client.infer(request(0))
        raw = next(text for text in iter(stream.recv, None) if "infinite value" in text)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert "chunk" not in json.loads(raw, parse_constant=refuse)


MANY = [99.5 + i / 4096 for i in range(1024)]


@pytest.mark.parametrize(("moments", "rate"), [([], 0.0), ([10.0, 95.0, 99.0], 0.2), (MANY, 2048.0)])
def test_the_rate_is_right_when_more_come_than_are_kept(moments, rate):
    assert dashboard._rate(moments, 100.0) == pytest.approx(rate, rel=0.01)


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser.browsing(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture(scope="module")
def shown(tab):
    """A page that shows a rated and refined chunk, and the client that asked for it."""
    with (
        serving(RATED, Refine(BelowThreshold(1.0), Sampling(3), Dense(3)), dashboard=True) as (server, address),
        Client(address) as client,
    ):
        tab.open(address.replace("ws", "http") + "/dashboard")
        client.infer(request(0))
        tab.until("document.querySelectorAll('#curves svg').length == 5")
        yield server, client, tab


@chromium
def test_the_browser_shows_a_curve_per_dimension_with_unit_and_confidence(shown):
    page = shown[2]
    names = page.run("[...document.querySelectorAll('#curves svg title')].map(t => t.textContent)")
    assert names == ["d0, m", "d1, m", "d2, m", "d3, m", "confidence, 0 to 1"]
    assert page.run("document.querySelectorAll('#curves circle.again').length") == 12  # three executed actions of four
    assert page.run("document.querySelectorAll('#table tr').length") == 7
    assert page.run("[...document.querySelectorAll('figure img')].every(i => i.complete && i.naturalWidth == 16)")
    assert "requests/s" in page.run("document.getElementById('numbers').innerText")
    assert page.until("/answered\\s1\\b/.test(document.getElementById('numbers').innerText)")


@chromium
def test_what_is_typed_into_the_browser_is_what_the_policy_is_told(shown):
    _, client, page = shown
    page.run("document.getElementById('words').value = 'Close it'; document.getElementById('set').click()")
    assert page.until("document.getElementById('standing').textContent.startsWith('In force: “Close it”')")
    assert client.infer(request(0, follow_operator=True))["instruction"] == "Close it"
    assert page.until("document.getElementById('standing').textContent.includes('1 requests followed it, 0 kept')")
    page.run("document.getElementById('clear').click()")
    assert page.until("document.getElementById('standing').textContent.startsWith('Off')")
    assert page.run("document.getElementById('clear').disabled")
    page.run(
        "const box = document.getElementById('words'); box.value = 'x'.repeat(301); document.getElementById('set').click()"
    )
    assert page.until("document.getElementById('refusal').textContent.includes('1 to 300 characters')")
    assert client.infer(request(0, follow_operator=True))["instruction"] == "Open a drawer"


@chromium
def test_what_a_client_sends_is_shown_as_text_and_never_run(shown):
    _, client, page = shown
    words = "<img src=x onerror=top.bad=1>"
    client.infer({**request(0), "prompt": words})
    with pytest.raises(RequestError):
        client.infer({**request(0), "endpoint": "<b>"})
    assert page.until(f"document.getElementById('last-request').textContent.includes({words!r})")
    assert page.until("document.querySelector('#log .wrong').textContent.includes(\"no endpoint '<b>'\")")
    assert page.run("document.querySelectorAll('main b, #last-request img').length + (window.bad ? 1 : 0)") == 0


CONTRAST = """(() => {
  const light = (c) => c.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const card = light(getComputedStyle(document.querySelector('section')).backgroundColor);
  const of = (q, p) => light(getComputedStyle(document.querySelector(q))[p]);
  return [ratio(card, of('h2', 'color')), ratio(card, of('.quiet', 'color')), ratio(card, of('svg text', 'fill')),
    ratio(card, of('svg .line', 'stroke')), ratio(card, of('svg .again', 'stroke'))];
})()"""


@chromium
def test_text_and_lines_stand_out_in_light_and_dark(shown):
    """WCAG: 4.5 for text, 3 for lines."""
    page, grounds = shown[2], []
    for scheme in ("light", "dark"):
        page.scheme(scheme)
        *text, line, draft = page.run(CONTRAST)
        assert min(text) > 4.5, scheme
        assert min(line, draft) > 3, scheme
        grounds.append(page.run("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] != grounds[1]


@chromium
def test_everything_has_a_name_for_those_who_cannot_see_it(shown):
    page = shown[2]
    assert page.run("[...document.querySelectorAll('input')].every(i => i.labels.length == 1)")
    assert page.run(
        "[...document.querySelectorAll('svg')].every(s => s.getAttribute('role') == 'img' && s.getAttribute('aria-label'))"
    )
    assert page.run("[...document.querySelectorAll('img')].every(i => i.alt)")
    assert page.run("[...document.querySelectorAll('button')].every(b => b.textContent.trim())")
    assert page.run("document.documentElement.lang") == "en"


@chromium
def test_the_browser_fetches_nothing_from_elsewhere(shown):
    page = shown[2]
    assert page.run(
        "performance.getEntriesByType('resource').every(r => r.name.startsWith(location.origin) || r.name.startsWith('data:'))"
    )


@chromium
def test_the_browser_asks_for_the_token_and_keeps_it_out_of_the_address(tab):
    with serving(token="a secret/é", dashboard=True) as (_, address):
        tab.open(address.replace("ws", "http") + "/dashboard")
        tab.until("!document.getElementById('ask').hidden && document.querySelector('main').hidden")
        tab.run("document.getElementById('token').value = 'a secret/é'; document.querySelector('#ask button').click()")
        assert tab.until("document.getElementById('link').textContent == 'live'")
        assert "secret" not in tab.run("location.href + document.documentElement.outerHTML")


@chromium
def test_an_instruction_that_cannot_be_sent_is_said_to_be_lost(tab):
    """The button of a robot that is to stop must not do nothing without a word."""
    with serving(dashboard=True) as (_, address):
        tab.open(address.replace("ws", "http") + "/dashboard")
        tab.until("document.getElementById('link').textContent == 'live'")
        tab.run("document.getElementById('words').value = 'Stop'; document.getElementById('set').click()")
        tab.until("!document.getElementById('clear').disabled")
    tab.until("document.getElementById('link').textContent != 'live'")
    tab.run("document.getElementById('clear').click()")
    assert tab.until("document.getElementById('refusal').textContent.includes('was not sent')")
    assert tab.run("document.getElementById('words').value") == "Stop"
