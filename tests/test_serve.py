"""The inference server: actions as load_policy gives them, and clear answers to bad requests."""

import asyncio
import contextlib
import errno
import gzip
import os
import resource
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
import psutil
import pytest
from aiohttp import web

import serve
from errors import UserError
from helpers.paths import ROOT
from helpers.runs import small
from policy.loaded import load_policy, to_tensor
from serve import CONNECTIONS, PolicyServer, pack, unpack
from train import train

sys.path.insert(0, str(ROOT / "examples"))
STATE = np.array([0.1, 0.2, 0.3], np.float32)
PICTURE = np.full((64, 96, 3), 7, np.uint8)
OBSERVATION = {"observation.state": STATE, "observation.images.top": PICTURE}


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


def ask(client, path: str, body: bytes, headers: dict | None = None):
    """The server's response, with its `body`."""
    client.connection.request("POST", path, body, headers or {})
    response = client.connection.getresponse()
    response.body = response.read()
    return response


def connect(client) -> socket.socket:
    """A connection beside the client's own."""
    return socket.create_connection(("127.0.0.1", client.connection.port), timeout=60)


def head_of(length: int) -> bytes:
    """The head of a request to act with a body of so many bytes."""
    return b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % length


def read_all(sock: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    received = b""
    while chunk := sock.recv(10_000):
        received += chunk
    return received


def wait_until(condition) -> None:
    while not condition():
        time.sleep(0.001)


def peers(server) -> set:
    """The addresses of the clients that are connected to a server."""
    addresses = set()
    for entry in list(server.connections.values()):
        with contextlib.suppress(OSError):  # it is closed
            addresses.add(entry.socket.getpeername())
    return addresses


def held_by(server) -> list[int]:
    """The bytes that a server holds of each request."""
    return [entry.held for entry in list(server.connections.values())]


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


class StandIn:
    """In a policy's place: acts by a function."""

    kind = "stand-in"
    device = "cpu"
    expected = {"observation.state": ("float", (3,))}  # noqa: RUF012
    depth = {}  # noqa: RUF012

    def __init__(self, act):
        self.act = act


@pytest.fixture(scope="module")
def client(checkpoint):
    with served(PolicyServer(load_policy(checkpoint, device="cpu"), max_bytes=1_000_000)) as client:
        yield client


def test_a_policy_that_predicts_ahead(checkpoint):
    """It answers as another one, and /health counts its chunks."""
    policy = load_policy(checkpoint, device="cpu").ahead(fps=0.1)
    with served(PolicyServer(policy, 1_000_000)) as client:
        client.reset()
        actions = np.stack([client.act(OBSERVATION) for _ in range(20)])
        counted = client.health()["ahead"]
    assert actions.shape == (20, 3)
    assert np.isfinite(actions).all()
    assert (counted["lead"], counted["held"]) == (1, 0)
    assert counted["chunks"] == policy.chunks > 1
    assert counted["late"] == policy.late


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
        ({"observation.state": STATE, "observation.images.top": PICTURE.astype(np.uint16)}, "expected uint8 of shape"),
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
        (
            {"observation.images.top": np.zeros((0, 96, 3), np.uint8)},
            "expected up to 4 sizes from 1 to 4096, got [0, 96,",
        ),
        ({"observation.images.top": np.zeros((1, 5000, 3), np.uint8)}, "expected up to 4 sizes from 1 to 4096"),
        ({"observation.state": {"dtype": "uint8", "shape": [1] * 70, "data": b"1"}}, "expected up to 4 sizes"),
        ({"observation.state": {"dtype": "uint8", "shape": [2**63], "data": b"1"}}, "expected up to 4 sizes"),
        ({"observation.state": {"dtype": "uint8", "shape": [True], "data": b"1"}}, "expected up to 4 sizes"),
        ({"observation.state": {"dtype": [1], "shape": [1], "data": b"1"}}, "an array has a wrong dtype"),
        ({"observation.images.top": [], "observation.state": STATE}, "observation.images.top: expected uint8"),
        ({"a": 1, b"b": 2}, "the observation has no 'observation.images.top'"),
        ({**OBSERVATION, b"b": 2}, "the observation has \"b'b'\""),
        ({1: 2}, "int is not allowed for map key"),
        ({**OBSERVATION, "task": 5}, "task: expected text, got int"),
        ({**OBSERVATION, "task": "x" * 5000}, "exceeds max_str_len"),
        ({**OBSERVATION, "observation.state": None}, "observation.state: expected numbers of shape"),
        ({**OBSERVATION, "observation.state": {"a": {}}}, "observation.state: expected numbers of shape"),
        ({**OBSERVATION, "observation.state": b"123"}, "observation.state: expected numbers of shape"),
        ({**OBSERVATION, "observation.state": "1 2 3"}, "observation.state: expected numbers of shape"),
        ({**OBSERVATION, "observation.state": msgpack.Timestamp(1)}, "observation.state: expected numbers of shape"),
        (
            {"observation.state": [bytes(900_000), *[b""] * 5000]},
            "a list has a wrong item: expected numbers, got bytes",
        ),
        ({"observation.state": ["x" * 4000, *[""] * 5000]}, "a list has a wrong item: expected numbers, got str"),
        ({"observation.state": [[] for _ in range(20_000)]}, "exceeds max_array_len"),
        ({"observation.state": [[[]] * 9000] * 9}, "the body has too many items: expected at most 10000"),
        ({str(number): {} for number in range(20_000)}, "exceeds max_map_len"),
        ({str(number): 0 for number in range(9000)}, "the observation has no 'observation.images.top'"),
        ({**OBSERVATION, "observation.state": nested(400)}, "observation.state: expected float of shape (3,)"),
    ],
)
def test_bad_requests_are_answered(client, observation, message):
    response = ask(client, "/act", pack(observation))
    error = msgpack.unpackb(response.body)["error"]
    assert message in error
    assert len(error) <= 1000
    assert "\n" not in error
    assert response.status == (413 if "too large" in error else 400)
    assert client.health()["status"] == "ok"  # over the same connection


def test_an_empty_picture_is_refused_where_any_size_is_taken():
    with pytest.raises(UserError, match=r"top: expected uint8 of shape \(any, any, 3\)"):
        to_tensor({"top": np.zeros((0, 4, 3), np.uint8)}, "top", "uint8", (None, None, 3))


def test_numbers_of_any_packed_kind_are_taken(client):
    for state in ([0.1, 0, True], list(STATE), STATE.astype(np.float64), np.array([1, 2, 3])):
        assert client.act({**OBSERVATION, "observation.state": state}).shape == (3,)


def test_no_body_of_random_bytes_is_a_bug(client, capfd):
    """A request of a right one with bytes exchanged, cut off or put in: an action, or what is wrong with it."""
    random = np.random.default_rng(0)
    right = bytearray(pack({"observation.state": STATE, "observation.images.top": PICTURE[:4, :4], "task": "x"}))
    statuses = set()
    for _ in range(300):
        body = right[: random.integers(len(right))] if random.random() < 0.2 else bytearray(right)
        for _ in range(random.integers(1, 4)):
            place = random.integers(min(150, len(body)) + 1)
            body[place : place + random.integers(2)] = random.bytes(random.integers(3))
        statuses.add(ask(client, "/act", bytes(body)).status)
    assert statuses <= {200, 400}
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # a client that speaks TLS
        (b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n1", 400),
        (b"POST /act HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
        (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"a: " + b"x" * 20_000 + b"\r\n\r\n", 400),
        (b"POST /act HTTP/1.1\r\nHost: x\r\nExpect: nothing\r\n\r\n", 417),
    ],
)
def test_what_is_not_http_is_answered(client, request_bytes, status, capfd):
    with connect(client) as sock:
        sock.sendall(request_bytes)
        assert sock.recv(100)[:13] in (b"HTTP/1.1 %d " % status, b"HTTP/1.0 %d " % status)
    assert client.health()["status"] == "ok"
    assert capfd.readouterr().err == ""


def test_a_compressed_body_is_not_decompressed(client):
    body = gzip.compress(bytes(10_000_000))
    response = ask(client, "/act", body, {"Content-Encoding": "gzip"})
    assert response.status == 400
    assert "cannot be read as msgpack" in msgpack.unpackb(response.body)["error"]


def test_clients_that_leave_are_no_errors(capfd):
    """In the middle of a request's head, of its body, while the policy acts for another, and while it acts for them."""
    begun = threading.Event()
    finish = threading.Event()
    acted = []

    def act(observation):
        begun.set()
        assert finish.wait(60)
        acted.append(observation)
        return STATE

    server = PolicyServer(StandIn(act), max_bytes=1000)
    with served(server) as client:
        whole = head_of(1) + b"\x80"
        for sent in (b"POST", head_of(100), head_of(100) + b"x", b"", whole, whole + whole):
            with connect(client) as sock:
                sock.sendall(sent)
                if sent.startswith(whole) and not begun.is_set():
                    assert begun.wait(60)
        wait_until(lambda: not peers(server))
        client.health()  # by then, the server has taken their requests from the policy's queue
        finish.set()
        assert np.array_equal(client.act({"last": 1}), STATE)
    assert acted == [{}, {"last": 1}]  # the policy acts only for those that still wait
    assert capfd.readouterr().err == ""


def test_a_body_that_is_sent_too_slowly():
    server = PolicyServer(StandIn(lambda observation: STATE), max_bytes=1000)
    server.request_seconds = 0.01
    with served(server, lingering_time=0.01) as client, connect(client) as sock:
        sock.sendall(head_of(100) + b"x")
        received = read_all(sock)  # the answer, and the connection's end
        assert received.startswith(b"HTTP/1.1 408 ")
        assert b"the body takes too long to send: expected all of it in 0.01 seconds" in received
        assert not any(held_by(server))
        server.request_seconds = 60
        assert np.array_equal(client.act({}), STATE)


def test_bytes_of_all_requests_are_bounded():
    """The request that is being sent for longest gives way to others."""
    server = PolicyServer(StandIn(lambda observation: STATE), max_bytes=100_000)
    held = []
    with served(server, lingering_time=0.01) as client, contextlib.ExitStack() as stack:
        socks = []
        for number in range(10):
            most = min(number + 1, 4)
            sock = stack.enter_context(connect(client))
            sock.sendall(head_of(100_000) + bytes(90_000))
            socks.append(sock)
            wait_until(lambda most=most: held_by(server).count(90_000) == most)
            held.append(sum(held_by(server)))
        assert max(held) <= server.max_held == 400_000
        for sock in socks[:6]:
            received = read_all(sock)
            assert received.startswith(b"HTTP/1.1 503 ")
            assert b"the requests of all clients are too large" in received
        assert np.array_equal(client.act({"picture": bytes(50_000)}), STATE)
        for sock in socks[7:]:
            sock.sendall(bytes(10_000))
            assert sock.recv(100).startswith(b"HTTP/1.1 400 ")


def test_a_new_connection_takes_the_place_of_the_quietest():
    server = PolicyServer(StandIn(lambda observation: STATE), max_bytes=1000, max_connections=5)
    server.quiet_seconds = 0
    with served(server) as client, contextlib.ExitStack() as stack:
        client.health()
        quiet = []
        for _ in range(30):
            quiet.append(stack.enter_context(connect(client)))
            wait_until(lambda: quiet[-1].getsockname() in peers(server))
            assert len(peers(server)) <= 5
            client.act({})  # over its first connection
        for sock in quiet[:-4]:
            assert sock.recv(1) == b""
        assert {sock.getsockname() for sock in quiet[-4:]} < peers(server)


def test_connections_that_the_policy_works_for_are_not_closed():
    begun = threading.Event()
    finish = threading.Event()

    def act(observation):
        begun.set()
        assert finish.wait(60)
        return STATE

    server = PolicyServer(StandIn(act), max_bytes=1000, max_connections=2)
    server.quiet_seconds = 0
    with served(server) as client, ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        action = pool.submit(client.act, {})
        assert begun.wait(60)
        for _ in range(10):
            sock = stack.enter_context(connect(client))
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 200 ")
        finish.set()
        assert np.array_equal(action.result(), STATE)


def test_file_descriptors_that_run_out(monkeypatch, capfd):
    """The quietest connection is closed for the next one, and nothing is printed a hundred times a second."""
    server = PolicyServer(StandIn(lambda observation: STATE), max_bytes=1000)
    server.quiet_seconds = 0
    left = []
    real_accept = socket.socket.accept

    def accept(sock):
        if server.count_connections() >= 3:
            left.append(1)
            raise OSError(errno.EMFILE, "Too many open files")
        return real_accept(sock)

    with served(server) as client, contextlib.ExitStack() as stack:
        monkeypatch.setattr(socket.socket, "accept", accept)
        quiet = []
        for _ in range(10):
            quiet.append(stack.enter_context(connect(client)))
            wait_until(lambda: quiet[-1].getsockname() in peers(server))
        assert np.array_equal(client.act({}), STATE)
        assert left
        monkeypatch.undo()
    assert capfd.readouterr().err == ""


def test_connections_leave_file_descriptors_to_the_policy(monkeypatch):
    for limit, expected in ((10_000, [64]), (resource.RLIM_INFINITY, [64]), (1, [1])):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, limit=limit: (limit, limit))
        assert serve.most_connections() in expected
    monkeypatch.setattr(psutil.Process, "num_fds", lambda process: 20)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (40, 40))
    assert serve.most_connections() == 10


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
        ("--max_mb", ["nan", "0", "-1", "inf", "1001"], "--max_mb must be a number above 0 and at most 1000, got"),
        ("--max_mb", ["'text'", "'1,5'"], "--max_mb must be a number, got"),
        ("--port", ["-1", "65536"], "--port must be from 0 to 65535, got"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_loaded(capsys, flag, values, message):
    for value in values:
        with pytest.raises(SystemExit):
            serve.main(["x", flag, value.strip("'")])
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert f"{message} {value}" in lines[0]


@pytest.mark.parametrize(("max_mb", "status"), [("0.0001", 2), ("0.018", 2), ("1000", 0)])
def test_max_mb_must_hold_an_observation(checkpoint, max_mb, status, monkeypatch, capsys):
    async def no_requests(server, sock):
        assert server.max_bytes == 1_000_000_000

    monkeypatch.setattr(PolicyServer, "serve", no_requests)
    assert serve.main([str(checkpoint), "--port", "0", "--device", "cpu", "--max_mb", max_mb]) == status
    if status:
        message = f"--max_mb {max_mb} is too small: expected at least 0.018444, the size of an observation"
        assert message in capsys.readouterr().err


def test_bytes_that_are_no_msgpack(client):
    with pytest.raises(RuntimeError, match="the body cannot be read as msgpack"):
        client._ask("POST", "/act", b"\xc1nonsense")
    with pytest.raises(RuntimeError, match="the body cannot be read as msgpack: StackError"):
        client._ask("POST", "/act", b"\x91" * 3000)
    with pytest.raises(RuntimeError, match="the body cannot be read as msgpack"):
        client._ask("POST", "/act", b'{"observation.state": [1, 2, 3]}')
    with pytest.raises(RuntimeError, match="the body cannot be read as msgpack"):
        client._ask("POST", "/act", b"")
    with pytest.raises(RuntimeError, match="there is no POST /acts"):
        client._ask("POST", "/acts", b"")
    assert np.array_equal(unpack(pack({"a": STATE}))["a"], STATE)
