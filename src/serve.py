"""Serve a policy over HTTP, for an arm whose computer is not the one with the GPU.

    python src/serve.py outputs/my_run/checkpoint-5000 [--host 127.0.0.1] [--port 8000] [--max_mb 32]

    GET  /health   what is served, what an observation must contain, and how long an action takes
    POST /act      takes an observation, returns the action to execute now; the server keeps one chunk, so it serves one arm
    POST /reset    an episode begins

Bodies are msgpack; an array is {"dtype": "uint8", "shape": [480, 640, 3], "data": bytes}. A bad request gets status 400 and
{"error": one line}; 408 if it takes too long to send, 413 if it is too large, 503 if the requests of all clients together
are. There is no login: serve on a network you trust, or through ssh -L. examples/client.py is a client.
LeRobot's own server (python -m lerobot.async_inference.policy_server) serves checkpoints of LeRobot's own policies with
cameras: it unpickles what it receives, does not know flow, and resizes differently from --image_size.
"""

import asyncio
import errno
import logging
import math
import resource
import signal
import socket
import sys
import time
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import msgpack
import numpy as np
import psutil
from aiohttp import http_exceptions, web

from command_line import TRAINED_ON, OneLineParser, command
from errors import UserError, one_line

DTYPES = ("uint8", "uint16", "uint32", "int16", "int32", "int64", "float16", "float32", "float64")
MOST_PIXELS = 4096  # a side of a picture
# Items in the lists and dicts of a request, besides what its arrays hold. An empty list takes 1 byte there, 64 in memory.
MOST_ITEMS = 10_000
LONGEST_TEXT = 4096
LARGEST_MAX_MB = 1000
MOST_CONNECTIONS = 64
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def is_not_a_clients_mistake(record: logging.LogRecord) -> bool:
    """False if a client did not send HTTP: it is answered with status 400, without a traceback here."""
    return record.exc_info is None or not isinstance(record.exc_info[1], http_exceptions.HttpProcessingError)


LOG = logging.getLogger("armature.serve")
LOG.addFilter(is_not_a_clients_mistake)
CONNECTIONS = {
    "logger": LOG,
    "access_log": None,
    "keepalive_timeout": 60,  # a silent connection is closed after so many seconds; examples/client.py reconnects before
    # A refused request is still read to its end: a client that is sending would meet a closed connection, not its answer.
    "lingering_time": 30,
    "shutdown_timeout": 5,
    "auto_decompress": False,  # a few compressed kilobytes can hold gigabytes
    "handler_cancellation": True,  # a client that has left does not wait for the policy any more
}


class RefusedRequestError(UserError):
    """A request that is answered with another status than 400."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(eq=False)
class Connection:
    """A client's connection."""

    socket: socket.socket
    since: float  # when it connected, began its request or got its last answer; infinite while the policy works for it
    transport: asyncio.Transport | None = None
    held: int = 0  # bytes of its request
    reading: asyncio.Timeout | None = None  # of the body that it is sending


def pack(tree) -> bytes:
    """Pack arrays, numbers, text, lists and dicts as msgpack."""
    return msgpack.packb(tree, default=pack_array)


def pack_array(array) -> dict:
    array = np.asarray(array)
    return {"dtype": str(array.dtype), "shape": list(array.shape), "data": array.tobytes()}


def unpack(body: bytes | bytearray):
    """Unpack what `pack` packed.

    Raises:
        UserError: it is not msgpack, an array's fields do not fit together, or it would take much more memory than `body`.
    """
    items = 0

    def count(container):
        nonlocal items
        items += len(container)
        if items > MOST_ITEMS:
            raise UserError(f"the body has too many items: expected at most {MOST_ITEMS}. Send numbers as arrays")

    def unpack_dict(item: dict):
        count(item)
        return unpack_array(item)

    def unpack_list(numbers: list) -> list:
        count(numbers)
        for number in numbers:
            # one long text among many: numpy would give each item the length of the longest
            is_scalar = isinstance(number, np.ndarray) and number.ndim == 0
            if not is_scalar and not isinstance(number, (int, float, list)):
                raise UserError(f"a list has a wrong item: expected numbers, got {type(number).__name__}")
        return numbers

    try:
        return msgpack.unpackb(
            body,
            object_hook=unpack_dict,
            list_hook=unpack_list,
            max_array_len=MOST_ITEMS,
            max_map_len=MOST_ITEMS,
            max_str_len=LONGEST_TEXT,
        )
    except UserError:
        raise
    except (ValueError, msgpack.UnpackException) as error:
        raise UserError(f"the body cannot be read as msgpack: {one_line(error)[:120]}") from error


def unpack_array(item: dict):
    """The array that a dict describes; any other dict as it is."""
    if item.keys() != {"dtype", "shape", "data"}:
        return item
    dtype = item["dtype"]
    shape = item["shape"]
    data = item["data"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"an array has a wrong dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if not isinstance(shape, list) or len(shape) > 4 or not all(is_size(size) for size in shape):
        raise UserError(f"an array has a wrong shape: expected up to 4 sizes from 1 to {MOST_PIXELS}, got {shape!r}")
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    if not isinstance(data, bytes):
        raise UserError(f"an array has wrong data: expected {expected} bytes, got {type(data).__name__}")
    if len(data) != expected:
        raise UserError(f"{dtype} of shape {shape} has wrong data: expected {expected} bytes, got {len(data)}")
    # A copy, because torch wants memory that it may write to.
    return np.frombuffer(data, dtype).reshape(shape).copy()


def is_size(size) -> bool:
    return type(size) is int and 1 <= size <= MOST_PIXELS  # True is an int, but not for numpy


class PolicyServer:
    """Answers requests with one policy's actions.

    Clients that send slowly, or nothing, do not shut out others. Once there are `max_connections`, a new connection takes the
    place of the one that has been quiet longest. Once the bodies of all requests hold more than `max_held` bytes, the request
    that has taken longest to send is refused.

    Args:
        policy: a LoadedPolicy or an AsyncPolicy.
        max_bytes: the largest request body that is accepted.
        max_connections: how many connections are open at a time.

    Attributes:
        request_seconds: how long a client may take to send a body.
        quiet_seconds: how long a quiet connection is kept at least, even if others wait for its place.
    """

    request_seconds = 30.0
    quiet_seconds = 1.0  # an arm asks more often, and a new client has sent its first request by then

    def __init__(self, policy, max_bytes: int, max_connections: int = MOST_CONNECTIONS):
        self.policy = policy
        self.max_bytes = max_bytes
        self.max_held = 4 * max_bytes
        self.max_connections = max_connections
        self.connections: dict[asyncio.Protocol, Connection] = {}
        # All policy calls run in this thread: torch keeps helper threads for each thread that calls it,
        # and a call that takes long must not keep /health from answering.
        self.thread = ThreadPoolExecutor(1, "policy")
        self.milliseconds: deque[float] = deque(maxlen=1000)

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self.errors_to_answers])
        app.router.add_get("/health", self.health)
        app.router.add_post("/act", self.act)
        app.router.add_post("/reset", self.reset)
        return app

    async def serve(self, sock: socket.socket) -> None:
        """Answer requests to a listening socket until Ctrl-C or SIGTERM."""
        loop = asyncio.get_running_loop()
        stops = (signal.SIGINT, signal.SIGTERM)
        for stop in stops:
            loop.add_signal_handler(stop, asyncio.current_task().cancel)
        runner = web.AppRunner(self.app(), **CONNECTIONS)
        try:
            await runner.setup()
            await self.accept(runner.server, sock)
        except asyncio.CancelledError:
            for stop in stops:  # a second one ends the process at once
                loop.remove_signal_handler(stop)
        finally:
            await runner.cleanup()

    async def accept(self, server: web.Server, sock: socket.socket) -> None:
        """Accept connections without end.

        asyncio would accept as many as there are file descriptors, and print a hundred tracebacks a second after that.
        """
        loop = asyncio.get_running_loop()
        sock.setblocking(False)
        while True:
            try:
                client, _ = await loop.sock_accept(sock)
            except ConnectionError:  # it has left already
                continue
            except OSError as error:
                if error.errno not in OUT_OF_RESOURCES:
                    raise
                await self.close_quietest()
                continue
            while self.count_connections() >= self.max_connections:
                await self.close_quietest()
            protocol = server()
            connection = Connection(client, since=loop.time())
            self.connections[protocol] = connection
            try:
                connection.transport, _ = await loop.connect_accepted_socket(lambda protocol=protocol: protocol, client)
            except OSError:  # it has left meanwhile
                client.close()

    def count_connections(self) -> int:
        """How many are open. Forgets the others."""
        self.connections = {key: entry for key, entry in self.connections.items() if entry.socket.fileno() != -1}
        return len(self.connections)

    async def close_quietest(self) -> None:
        """Close the connection that has been quiet longest, or wait a moment if none has been for `quiet_seconds`."""
        quietest = None
        if self.count_connections():
            quietest = min(self.connections.values(), key=lambda entry: entry.since)
        if quietest is None or asyncio.get_running_loop().time() - quietest.since < self.quiet_seconds:
            await asyncio.sleep(0.1)
        else:
            quietest.transport.abort()
            await asyncio.sleep(0)  # the event loop closes the socket

    async def health(self, request: web.Request) -> web.Response:
        times = list(self.milliseconds)
        p50 = p99 = None
        if times:
            p50, p99 = np.percentile(times, [50, 99]).round(2).tolist()
        expects = {}
        for key, (kind, shape) in self.policy.expected.items():
            expects[key] = {"kind": kind, "shape": [size or 0 for size in shape]}  # 0 stands for any size
            if key in self.policy.depth:  # distances are taken too
                expects[key]["depth"] = asdict(self.policy.depth[key])
        served = {"policy": self.policy.kind, "device": str(self.policy.device), "expects": expects}
        if hasattr(self.policy, "lead"):
            served["ahead"] = {name: getattr(self.policy, name) for name in ("fps", "lead", "chunks", "late", "held")}
        return answer({"status": "ok", **served, "actions": len(times), "p50_ms": p50, "p99_ms": p99})

    async def act(self, request: web.Request) -> web.Response:
        connection = self.connections[request.protocol]
        try:
            # Unpacking costs milliseconds and stays in the event loop; only the policy's call goes to its thread.
            observation = unpack(await self.read(request, connection))
            if not isinstance(observation, dict):
                got = type(observation).__name__
                raise UserError(f"the observation is no dict: expected a dict of names to arrays, got {got}")
            begun = time.perf_counter()  # the wait for an earlier call counts: the arm waits too
            action = await self.in_policy_thread(connection, self.act_and_log, observation)
            self.milliseconds.append(1000 * (time.perf_counter() - begun))
        finally:
            connection.held = 0
        return answer({"action": action})

    def act_and_log(self, observation: dict) -> np.ndarray:
        """The action to execute now. A chunk that comes late gets a line in the log."""
        late = getattr(self.policy, "late", 0)
        action = self.policy.act(observation)
        if getattr(self.policy, "late", 0) > late:
            LOG.warning("a chunk comes late: %s", self.policy.timing())
        return action

    async def reset(self, request: web.Request) -> web.Response:
        await self.in_policy_thread(self.connections[request.protocol], self.policy.reset)
        return answer({"status": "ok"})

    async def in_policy_thread(self, connection: Connection, function, *args):
        connection.since = math.inf
        return await asyncio.get_running_loop().run_in_executor(self.thread, function, *args)

    async def read(self, request: web.Request, connection: Connection) -> bytearray:
        """A request's body, in memory that is bounded over all requests.

        Raises:
            RefusedRequestError: it is too large, takes too long, or is one of too many.
        """
        body = bytearray()
        try:
            async with asyncio.timeout(self.request_seconds) as connection.reading:
                async for chunk in request.content.iter_any():
                    body += chunk
                    if len(body) > self.max_bytes:
                        expected = f"expected at most {self.max_bytes / 1e6:g} MB (raise it with --max_mb)"
                        raise RefusedRequestError(413, f"the body is too large: {expected}")
                    connection.held = len(body)
                    self.free_bytes()
                    if connection.reading is None:  # it was this one
                        raise TimeoutError
        except (web.RequestPayloadError, ConnectionError) as error:
            raise UserError(f"the body does not arrive as its headers say: {one_line(error)}") from error
        except TimeoutError:
            if connection.reading is None:
                message = "the requests of all clients are too large together, and this one took longest. Send it again"
                raise RefusedRequestError(503, message) from None
            expected = f"expected all of it in {self.request_seconds:g} seconds"
            raise RefusedRequestError(408, f"the body takes too long to send: {expected}") from None
        finally:
            connection.reading = None
        return body

    def free_bytes(self) -> None:
        """While the requests of all connections hold too many bytes, end the one that has taken longest to send."""
        while sum(entry.held for entry in self.connections.values()) > self.max_held:
            reading = [entry for entry in self.connections.values() if entry.reading is not None]
            longest = min(reading, key=lambda entry: entry.since)
            if not longest.reading.expired():
                longest.reading.reschedule(0)  # its time is over
            longest.reading = None
            longest.held = 0

    @web.middleware
    async def errors_to_answers(self, request: web.Request, handler) -> web.StreamResponse:
        """Answer a failed request with one line; the server keeps running."""
        connection = self.connections[request.protocol]
        connection.since = asyncio.get_running_loop().time()
        try:
            return await handler(request)
        except RefusedRequestError as error:
            return answer({"error": str(error)}, status=error.status)
        except UserError as error:
            return answer({"error": one_line(error)[:1000]}, status=400)
        except (web.HTTPNotFound, web.HTTPMethodNotAllowed):
            message = (
                f"there is no {request.method} {request.path[:200]}: expected GET /health, POST /act or POST /reset"
            )
            return answer({"error": message}, status=404)
        except Exception as error:  # a bug: the client gets a line, this terminal all of it
            traceback.print_exc()
            return answer({"error": f"{type(error).__name__}: {one_line(error)[:200]}"}, status=500)
        finally:
            connection.since = asyncio.get_running_loop().time()


def answer(tree: dict, status: int = 200) -> web.Response:
    return web.Response(body=pack(tree), status=status, content_type="application/msgpack")


def observation_bytes(expected: dict[str, tuple[str, tuple]]) -> int:
    """The fewest bytes that an observation takes in a request; see LoadedPolicy.expected."""
    total = 0
    for kind, shape in expected.values():
        itemsize = 1 if kind == "uint8" else 4
        total += itemsize * math.prod(size or 1 for size in shape)
    return total


def most_connections() -> int:
    """How many connections to keep: half of the file descriptors that are left, as the policy may open files too."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    left = limit - psutil.Process().num_fds()
    return min(MOST_CONNECTIONS, max(1, left // 2))


@command
def main(argv: list[str]) -> int:
    parser = OneLineParser(prog="serve.py", description="Serve a policy over HTTP.")
    parser.add_argument("checkpoint", help="a checkpoint-<step> folder, a run's folder, or a Hub id")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other computers connect [%(default)s]")
    parser.add_argument("--port", type=int, default=8000, help="0 for any free port [%(default)s]")
    parser.add_argument(
        "--max_mb", type=float, default=32, help="largest request; all together may hold 4 times as much [%(default)s]"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... [auto]")
    parser.add_argument("--n_action_steps", type=int, help="actions executed from each predicted chunk [as trained]")
    parser.add_argument(
        "--ahead",
        type=float,
        metavar="FPS",
        help="for an arm that asks FPS times a second: predict each chunk in a thread while the last one is carried out. flow "
        "blends them; smolvla, pi0 and pi05 continue them with LeRobot's real-time chunking",
    )
    parser.add_argument("--task", default="", help="task text for observations without one")
    parser.add_argument(
        "--rename",
        nargs="+",
        metavar="OLD=NEW",
        help="names that clients give observations, and those that the policy takes",
    )
    parser.add_argument("--trained_on", metavar="DATASET", help=TRAINED_ON)
    args = parser.parse_args(argv)
    if args.ahead is not None and not 0 < args.ahead < math.inf:
        parser.error(f"--ahead must be a number of actions a second, got {args.ahead:g}")
    if not 0 <= args.port <= 65535:
        parser.error(f"--port must be from 0 to 65535, got {args.port}")
    if not 0 < args.max_mb <= LARGEST_MAX_MB:
        parser.error(f"--max_mb must be a number above 0 and at most {LARGEST_MAX_MB}, got {args.max_mb:g}")
    # Slow: torch and lerobot, which --help and a wrong flag do not need.
    from policy.loaded import load_policy

    policy = load_policy(
        args.checkpoint, args.device, args.n_action_steps, args.task, args.rename, trained_on=args.trained_on
    )
    if args.ahead:
        policy = policy.ahead(args.ahead)
    needed = observation_bytes(policy.expected) / 1e6
    if args.max_mb < needed:
        raise UserError(
            f"--max_mb {args.max_mb:g} is too small: expected at least {needed:g}, the size of an observation"
        )
    server = PolicyServer(policy, math.ceil(args.max_mb * 1e6), most_connections())
    # The socket is opened before the server runs: a port in use is an error in one line, and port 0 gets its number.
    try:
        sock = socket.create_server((args.host, args.port))
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"cannot listen on {args.host}:{args.port}: {one_line(error)}. Pass another --host or --port"
        ) from error
    with sock:
        address = f"http://{args.host}:{sock.getsockname()[1]}"
        print(f"serving {args.checkpoint} on {address} (GET /health; Ctrl-C ends)", flush=True)
        asyncio.run(server.serve(sock))
    print("ended")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
