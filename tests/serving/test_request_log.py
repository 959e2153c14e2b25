"""The log and the metrics: what happened, once each, in a form that machines read, and no images or secrets."""

import json
import logging
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.serving.live import Slow, request, serving, until
from vlaflow.errors import RequestError
from vlaflow.robot.client import Client
from vlaflow.serving.engine import EngineConfig
from vlaflow.serving.request_log import BUCKETS_S, MOST_SENTENCE, Event, JsonLines, sentence


@pytest.fixture
def lines():
    """The log as --log-format json writes it."""
    written = []

    class Keep(logging.Handler):
        def emit(self, record):
            written.append(self.format(record))

    logger, handler = logging.getLogger("vlaflow.serving"), Keep()
    handler.setFormatter(JsonLines())
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield written
    logger.removeHandler(handler)
    logger.setLevel(before)


def scrape(address):
    return urllib.request.urlopen(address.replace("ws", "http") + "/metrics").read().decode()


SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(\{([a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*",?)*\})? (\S+)')


def parse(text):
    """{sample with labels: value}, of Prometheus' text format read strictly: a family is described once, before its samples."""
    assert text.endswith("\n")
    found, kinds, helped = {}, {}, set()
    family = None
    for line in text.splitlines():
        if line.startswith("# HELP "):
            family = line.split(" ", 3)[2]
            assert family not in helped
            helped.add(family)
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == family
            assert name not in kinds
            assert kind in ("counter", "gauge", "histogram")
            kinds[name] = kind
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            suffixes = ("_bucket", "_sum", "_count") if kinds[family] == "histogram" else ("",)
            assert match[1] in {family + suffix for suffix in suffixes}
            assert kinds[family] != "counter" or match[1].endswith("_total")
            key = match[1] + (match[2] or "")
            assert key not in found
            found[key] = float(match[4])
    assert kinds.keys() == helped
    return found


def test_every_request_is_one_line_with_its_number_client_time_and_outcome(lines):
    with serving() as (_, address), Client(address) as client:
        client.infer(request(0))
        with pytest.raises(RequestError):
            client.infer({"prompt": "x"})
        client.reset()
        client.infer(request(0))
        host = "{}:{}".format(*client._connection.local_address)
    found = [json.loads(line) for line in lines]
    asked = [line for line in found if "request" in line]
    assert [line["event"] for line in asked] == ["answered", "refused", "reset", "answered"]
    assert [line["request"] for line in asked] == [1, 2, 3, 4]
    assert {line["client"] for line in asked} == {host}
    assert all(line["ms"] > 0 for line in asked)
    assert [line.get("nfe") for line in asked] == [3, None, None, 3]
    assert asked[1]["note"] == "The request lacks 'observation/image'; it has 'prompt'."
    others = [line["event"] for line in found if "request" not in line]
    assert others == ["serving", "connected", "left", "stopping"] or others == ["serving", "connected", "stopping", "left"]
    times = [datetime.fromisoformat(line["time"]) for line in found]
    assert times == sorted(times)
    assert all(time.tzinfo for time in times)


def test_no_line_holds_an_image_or_grows_with_what_is_sent(lines):
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with serving() as (_, address), Client(address) as client:
        client.infer({**request(0), "observation/image": picture})
        for wrong in ({"prompt": "y" * 5000}, {"observation/state": np.full(4000, np.nan)}, {"endpoint": "z" * 5000}):
            with pytest.raises(RequestError) as caught:
                client.infer({**request(0), "observation/image": picture, **wrong})
            assert len(str(caught.value)) < 500
    assert lines
    assert all(len(line) < 800 for line in lines)
    assert str(picture[0, 0, 0]) + ", " + str(picture[0, 0, 1]) not in "".join(lines)


@given(text=st.text(max_size=1000))
def test_a_sentence_stays_on_its_line(text):
    said = sentence(text)
    assert len(said) <= MOST_SENTENCE + 5
    assert said.isprintable()
    assert str(Event("refused", "1.2.3.4:5", 6, 7.0, note=said)).isprintable()


def test_a_defect_is_in_the_log_with_its_traceback_and_nowhere_else(lines):
    class Broken(Slow):
        def decode(self, *arguments):
            raise KeyError("inside")

    with serving(compute=Broken(0)) as (_, address), Client(address) as client, pytest.raises(RequestError) as caught:
        client.infer(request(0))
    assert str(caught.value) == "The server failed on this request; see its log."
    found = [json.loads(line) for line in lines]
    (traceback,) = [line for line in found if "traceback" in line]
    assert "KeyError: 'inside'" in traceback["traceback"]
    assert traceback["level"] == "error"
    assert [line["event"] for line in found if "request" in line] == ["failed"]


def test_the_metrics_are_prometheus_text_and_say_what_happened():
    with serving(connections=2) as (_, address), Client(address) as client, Client(address):
        fresh = parse(scrape(address))
        assert set(fresh.values()) == {0.0, 2.0}  # two connections, nothing else yet
        for number in range(5):
            client.infer(request(number))
        client.reset()
        for wrong in ({"prompt": "x"}, {**request(0), "prompt": "x" * 500}):
            with pytest.raises(RequestError):
                client.infer(wrong)
        with pytest.raises(RequestError):
            Client(address)
        found = parse(scrape(address))
    assert {o: found[f'vlaflow_requests_total{{outcome="{o}"}}'] for o in ("answered", "reset", "refused", "busy")} == {
        "answered": 5,
        "reset": 1,
        "refused": 2,
        "busy": 0,
    }
    assert found["vlaflow_clients"] == 2
    assert found['vlaflow_connections_total{outcome="turned_away"}'] == 1
    assert found["vlaflow_queue_depth"] == 0
    assert found["vlaflow_nfe_total"] == 15
    assert found["vlaflow_layers_total"] == 10
    assert 0 < found["vlaflow_inference_seconds_total"] <= found["vlaflow_request_seconds_sum"]
    buckets = [value for key, value in found.items() if key.startswith("vlaflow_request_seconds_bucket")]
    assert len(buckets) == len(BUCKETS_S) + 1
    assert buckets == sorted(buckets)
    assert buckets[-1] == found["vlaflow_request_seconds_count"] == 5


def test_a_request_is_counted_in_the_buckets_that_it_fits():
    with serving(compute=Slow(0.12)) as (_, address), Client(address) as client:
        client.infer(request(0))
        found = parse(scrape(address))
    assert found['vlaflow_request_seconds_bucket{le="0.1"}'] == 0
    assert found['vlaflow_request_seconds_bucket{le="10"}'] == 1


def test_the_queue_is_seen_while_it_is_full():
    with serving(compute=Slow(0.3), engine=EngineConfig(batch=1, queue=4)) as (server, address), ThreadPoolExecutor(4) as pool:
        open_ = [Client(address) for _ in range(4)]
        asking = [pool.submit(client.infer, request(0)) for client in open_]
        assert until(lambda: server.engine.waiting == 3)
        found = parse(scrape(address))
        assert found["vlaflow_queue_depth"] >= 2
        assert found["vlaflow_clients"] == 4
        for future in asking:
            future.result()
        for client in open_:
            client.close()


def test_what_is_not_ours_is_a_message_line():
    record = logging.LogRecord("other", logging.WARNING, "f", 1, "it is %s", ("late",), None)
    found = json.loads(JsonLines().format(record))
    assert {k: found[k] for k in ("level", "event", "logger", "note")} == {
        "level": "warning",
        "event": "message",
        "logger": "other",
        "note": "it is late",
    }
