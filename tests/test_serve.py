"""The inference server: actions as load_policy gives them, and clear answers to bad requests."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
import pytest
from aiohttp import web

import serve
from helpers.paths import ROOT
from helpers.runs import small
from policy.loaded import load_policy
from serve import CONNECTIONS, PolicyServer, pack, unpack
from train import train

sys.path.insert(0, str(ROOT / "examples"))
STATE, PICTURE = np.array([0.1, 0.2, 0.3], np.float32), np.full((64, 96, 3), 7, np.uint8)


@pytest.fixture(scope="module")
def checkpoint(made, tmp_path_factory):
    settings = small("flow", dataset_id=[str(made("video"))], steps=1)
    settings["policy_args"] = [*settings["policy_args"], "head=regression"]
    return train(**settings, output_dir=str(tmp_path_factory.mktemp("served") / "run")).checkpoint


@contextlib.contextmanager
def served(server, app=None, **connections):
    """A client of a PolicyServer that answers in a thread."""
    from client import Client

    async def answer_until(stopped):
        runner = web.AppRunner(app or server.app(), **{**CONNECTIONS, **connections})
        await runner.setup()
        accepting = asyncio.create_task(server.accept(runner.server, sock))
        while not stopped.is_set():
            await asyncio.sleep(0.01)
        assert not accepting.done()
        accepting.cancel()
        await runner.cleanup()

    stopped = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as sock, ThreadPoolExecutor(1) as pool:
        client = Client(f"127.0.0.1:{sock.getsockname()[1]}", timeout=60)
        answering = pool.submit(asyncio.run, answer_until(stopped))
        try:
            yield client
        finally:
            client.connection.close()
            stopped.set()
            answering.result()


class StandIn:
    """In a policy's place: acts by a function."""

    kind = "stand-in"
    device = "cpu"
    expected = {"observation.state": ("float", (3,))}  # noqa: RUF012

    def __init__(self, act):
        self.act = act


@pytest.fixture(scope="module")
def client(checkpoint):
    with served(PolicyServer(load_policy(checkpoint, device="cpu"), max_bytes=1_000_000)) as client:
        yield client


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
        ([1, 2], "expected a dict of names to arrays, got list"),
        ({"observation.state": {"dtype": "uint8", "shape": [9], "data": b"12"}}, "expected 9 bytes, got 2"),
        (
            {"observation.state": {"dtype": "object", "shape": [1], "data": b"12345678"}},
            "an array has a wrong dtype: expected one of",
        ),
        ({"observation.state": {"dtype": "uint8", "shape": [-1], "data": b"12"}}, "an array has a wrong shape"),
        ({"observation.state": {"dtype": "uint8", "shape": [2], "data": "12"}}, "expected 2 bytes, got str"),
        ({"observation.images.top": np.zeros((600, 600, 3), np.uint8)}, "the body is too large: expected at most 1 MB"),
    ],
)
def test_bad_requests_are_answered(client, observation, message):
    with pytest.raises(RuntimeError) as error:
        client.act(observation)
    assert message in str(error.value)
    assert client.health()["status"] == "ok"  # and the server goes on


@pytest.mark.parametrize(("path", "status"), [("/act", 413), ("/acts", 404)])
def test_a_client_that_is_still_sending_gets_its_answer(client, path, status):
    """The server refuses it before it has read all of it."""
    connection = client.connection
    connection.close()
    connection.request("POST", path, bytes(30_000_000))
    answer = connection.getresponse()
    assert answer.status == status
    assert "error" in msgpack.unpackb(answer.read())
    assert client.health()["status"] == "ok"  # over the same connection


def test_a_connection_that_the_server_has_closed_is_made_again():
    with served(PolicyServer(StandIn(None), max_bytes=1000), keepalive_timeout=0.01) as client:
        client.health()
        assert client.connection.sock.recv(1) == b""  # waits until the server has closed it
        with pytest.raises(ConnectionError):
            client.health()
        client.health()
        assert client.connection.sock.recv(1) == b""
        client.idle = 0
        client.health()


def test_answers_are_sent_at_once(client):
    """Without Nagle's algorithm: an answer's second packet would wait 40 ms for the first one to be acknowledged."""
    options = []

    async def note(request):
        options.append(request.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        return serve.answer({})

    server = PolicyServer(StandIn(None), max_bytes=1000)
    app = server.app()
    app.router.add_get("/option", note)
    with served(server, app) as client:
        client._ask("GET", "/option", None)
    assert options == [1]


def test_health_is_answered_while_the_policy_computes():
    from client import Client

    begun, finish = threading.Event(), threading.Event()

    def act(observation):
        begun.set()
        assert finish.wait(60)
        return STATE

    with served(PolicyServer(StandIn(act), max_bytes=1000)) as client:
        other = Client(f"127.0.0.1:{client.connection.port}")
        asking = threading.Thread(target=client.act, args=({},))
        asking.start()
        assert begun.wait(60)
        assert other.health()["actions"] == 0
        finish.set()
        asking.join()
        assert other.health()["actions"] == 1
        other.connection.close()


def test_a_bug_of_the_policy_is_answered_and_shown_whole(capfd):
    def act(observation):
        raise AttributeError("no such thing\nat all")

    with served(PolicyServer(StandIn(act), max_bytes=1000)) as client:
        with pytest.raises(RuntimeError, match=r"^AttributeError: no such thing at all$"):
            client.act({})
        assert client.health()["status"] == "ok"
    assert "Traceback" in capfd.readouterr().err


def test_ctrl_c_ends_the_command(checkpoint, monkeypatch, capsys):
    make_app = PolicyServer.app

    async def press_ctrl_c(app):
        os.kill(os.getpid(), signal.SIGINT)

    def interrupted_app(server):
        app = make_app(server)
        app.on_startup.append(press_ctrl_c)
        return app

    monkeypatch.setattr(PolicyServer, "app", interrupted_app)
    assert serve.main([str(checkpoint), "--port", "0", "--device", "cpu"]) == 0
    first, last = capsys.readouterr().out.splitlines()[-2:]
    assert first.startswith(f"serving {checkpoint} on http://127.0.0.1:")
    assert last == "ended"


def test_a_port_in_use_is_told(checkpoint, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve.main([str(checkpoint), "--port", str(port), "--device", "cpu"]) == 2
    assert f"cannot listen on 127.0.0.1:{port}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "values", "message"),
    [
        ("--ahead", ["nan", "0", "-1", "inf"], "--ahead must be a number of actions a second, got"),
        ("--max_mb", ["nan", "0", "-1", "inf"], "--max_mb must be a number above 0 and at most 1000, got"),
        ("--port", ["-1", "65536"], "--port must be from 0 to 65535, got"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_loaded(capsys, flag, values, message):
    for value in values:
        with pytest.raises(SystemExit):
            serve.main(["x", flag, value])
        assert f"{message} {value}" in capsys.readouterr().err


def test_bytes_that_are_no_msgpack(client):
    with pytest.raises(RuntimeError, match="the body cannot be read as msgpack"):
        client._ask("POST", "/act", b"\xc1nonsense")
    with pytest.raises(RuntimeError, match="there is no POST /acts"):
        client._ask("POST", "/acts", b"")
    assert np.array_equal(unpack(pack({"a": STATE}))["a"], STATE)
