"""The inference server: actions as load_policy gives them, and clear answers to bad requests."""

import sys
import threading
import time
from socket import IPPROTO_TCP, TCP_NODELAY

import numpy as np
import pytest

import serve
from helpers.paths import ROOT
from helpers.runs import small
from policy.loaded import load_policy
from serve import Handler, Server, pack, unpack
from train import train

sys.path.insert(0, str(ROOT / "examples"))
STATE, PICTURE = np.array([0.1, 0.2, 0.3], np.float32), np.full((64, 96, 3), 7, np.uint8)


@pytest.fixture(scope="module")
def checkpoint(made, tmp_path_factory):
    settings = small("flow", dataset_id=[str(made("video"))], steps=1)
    settings["policy_args"] = [*settings["policy_args"], "head=regression"]
    return train(**settings, output_dir=str(tmp_path_factory.mktemp("served") / "run")).checkpoint


@pytest.fixture(scope="module")
def client(checkpoint):
    from client import Client

    server = Server(load_policy(checkpoint, device="cpu"), ("127.0.0.1", 0), 1_000_000)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Client(f"127.0.0.1:{server.server_port}")
    server.shutdown()


def test_actions_are_the_policys(client, checkpoint):
    policy = load_policy(checkpoint, device="cpu")
    client.reset()
    for _ in range(5):  # over the end of a chunk
        observation = {"observation.state": STATE, "observation.images.top": PICTURE}
        assert np.array_equal(client.act(observation), policy.act(observation))
    health = client.health()
    assert health["status"] == "ok"
    assert health["policy"] == "flow"
    assert health["expects"]["observation.state"] == {"kind": "float", "shape": [3]}
    assert health["actions"] >= 5
    assert health["p99_ms"] >= health["p50_ms"] > 0


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        ({"observation.images.top": PICTURE}, "the observation has no 'observation.state'"),
        (
            {"observation.state": STATE[:2], "observation.images.top": PICTURE},
            "observation.state: expected numbers of shape",
        ),
        ({"observation.state": STATE, "observation.images.top": PICTURE[:, :, 0]}, "expected uint8 of shape"),
        ({"observation.state": STATE, "observation.images.top": PICTURE, "x": STATE}, "the observation has 'x'"),
        (
            {"observation.state": STATE * np.nan, "observation.images.top": PICTURE},
            "observation.state: expected finite numbers",
        ),
        (
            {"observation.state": [[1], [1, 2]], "observation.images.top": PICTURE},
            "observation.state: expected float of",
        ),
        ([1, 2], "an observation is a dict"),
        ({"observation.state": {"dtype": "uint8", "shape": [9], "data": b"12"}}, "has 2 bytes, expected 9"),
        ({"observation.state": {"dtype": "object", "shape": [1], "data": b"12345678"}}, "an array of object"),
        ({"observation.images.top": np.zeros((600, 600, 3), np.uint8)}, "at most 1 MB are taken"),
    ],
)
def test_bad_requests_are_answered(client, observation, message):
    with pytest.raises(RuntimeError) as error:
        client.act(observation)
    assert message in str(error.value)
    assert client.health()["status"] == "ok"  # and the server goes on


def test_a_connection_that_the_server_has_closed_is_made_again(client, monkeypatch):
    monkeypatch.setattr(Handler, "timeout", 0.2)
    client.connection.close()
    client.reset()
    time.sleep(0.5)
    with pytest.raises(ConnectionError):  # what it would meet
        client.reset()
    client.reset()
    time.sleep(0.5)
    monkeypatch.setattr(client, "idle", 0.2)
    client.reset()


def test_answers_are_sent_at_once(client, monkeypatch):
    options, answer = [], Handler.answer

    def noted(self, *message):
        options.append(self.connection.getsockopt(IPPROTO_TCP, TCP_NODELAY))
        answer(self, *message)

    monkeypatch.setattr(Handler, "answer", noted)
    client.health()
    assert options == [1]


def test_a_port_that_cannot_be_is_told(checkpoint, capsys):
    assert serve.main([str(checkpoint), "--port", "99999", "--device", "cpu"]) == 2
    assert "--port 99999 cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("fps", ["nan", "0", "-1", "inf"])
def test_ahead_of_no_pace_is_told(capsys, fps):
    with pytest.raises(SystemExit):
        serve.main(["x", "--ahead", fps])
    assert "--ahead must be a number of actions a second" in capsys.readouterr().err


def test_bytes_that_are_no_msgpack(client):
    with pytest.raises(RuntimeError, match="the body is no msgpack"):
        client._ask("POST", "/act", b"\xc1nonsense")
    with pytest.raises(RuntimeError, match="there is no POST /acts"):
        client._ask("POST", "/acts", b"")
    assert np.array_equal(unpack(pack({"a": STATE}))["a"], STATE)
