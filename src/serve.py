"""Serve a policy over HTTP, for an arm whose computer is not the one with the GPU.

    python src/serve.py outputs/my_run/checkpoint-5000 [--host 127.0.0.1] [--port 8000] [--max_mb 32]

    GET  /health   what is served, what an observation must contain, and how long an action takes
    POST /act      takes an observation, returns the action to execute now; the server keeps one chunk, so it serves one arm
    POST /reset    an episode begins

Bodies are msgpack; an array is {"dtype": "uint8", "shape": [480, 640, 3], "data": bytes}. A bad request gets status 400 and
{"error": one line}. There is no login: serve on a network you trust, or through ssh -L. examples/client.py is a client.
LeRobot's own server (python -m lerobot.async_inference.policy_server) serves checkpoints of LeRobot's own policies with
cameras: it unpickles what it receives, does not know flow, and resizes differently from --image_size.
"""

import asyncio
import math
import socket
import sys
import time
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
from aiohttp import web

from command_line import OneLineParser, command
from errors import UserError, one_line

DTYPES = ("uint8", "float32", "float64", "int64", "int32")
CONNECTIONS = {
    "access_log": None,
    "keepalive_timeout": 60,  # a silent connection is closed after so many seconds; examples/client.py reconnects before
    # A refused request is still read to its end: a client that is sending would meet a closed connection, not its answer.
    "lingering_time": 60,
    "shutdown_timeout": 5,
}


def pack(tree) -> bytes:
    """Pack arrays, numbers, text, lists and dicts as msgpack."""
    return msgpack.packb(tree, default=pack_array)


def pack_array(array) -> dict:
    array = np.ascontiguousarray(array)
    return {"dtype": str(array.dtype), "shape": list(array.shape), "data": array.tobytes()}


def unpack(body: bytes):
    """Unpack what `pack` packed; a UserError if it is not msgpack or an array's fields do not fit together."""
    try:
        return msgpack.unpackb(body, object_hook=unpack_array)
    except UserError:
        raise
    except (ValueError, msgpack.UnpackException) as error:
        raise UserError(f"the body is not msgpack: {one_line(error)[:120]}") from error


def unpack_array(item: dict):
    """The array that a dict describes; any other dict as it is."""
    if item.keys() != {"dtype", "shape", "data"}:
        return item
    dtype = item["dtype"]
    shape = item["shape"]
    data = item["data"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"an array has a wrong dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if not isinstance(shape, list) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise UserError(f"an array has a wrong shape: expected a list of sizes, got {shape!r}")
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    if not isinstance(data, bytes):
        raise UserError(f"an array has wrong data: expected {expected} bytes, got {type(data).__name__}")
    if len(data) != expected:
        raise UserError(f"{dtype} of shape {shape} has wrong data: expected {expected} bytes, got {len(data)}")
    # A copy, because torch wants memory that it may write to.
    return np.frombuffer(data, dtype).reshape(shape).copy()


class PolicyServer:
    """Answers requests with one policy's actions.

    Args:
        policy: a LoadedPolicy or an AsyncPolicy.
        max_bytes: the largest request body that is accepted.
    """

    def __init__(self, policy, max_bytes: int):
        self.policy = policy
        self.max_bytes = max_bytes
        # All policy calls run in this thread: torch keeps helper threads for each thread that calls it,
        # and a call that takes long must not keep /health from answering.
        self.thread = ThreadPoolExecutor(1, "policy")
        self.milliseconds: deque[float] = deque(maxlen=1000)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=self.max_bytes, middlewares=[self.errors_to_answers])
        app.router.add_get("/health", self.health)
        app.router.add_post("/act", self.act)
        app.router.add_post("/reset", self.reset)
        return app

    async def health(self, request: web.Request) -> web.Response:
        times = list(self.milliseconds)
        p50 = p99 = None
        if times:
            p50, p99 = np.percentile(times, [50, 99]).round(2).tolist()
        expects = {}
        for key, (kind, shape) in self.policy.expected.items():
            expects[key] = {"kind": kind, "shape": [size or 0 for size in shape]}  # 0 stands for any size
        served = {"policy": self.policy.kind, "device": str(self.policy.device), "expects": expects}
        return answer({"status": "ok", **served, "actions": len(times), "p50_ms": p50, "p99_ms": p99})

    async def act(self, request: web.Request) -> web.Response:
        # Unpacking costs milliseconds and stays in the event loop; only the policy's call goes to its thread.
        observation = unpack(await request.read())
        if not isinstance(observation, dict):
            got = type(observation).__name__
            raise UserError(f"the observation is no dict: expected a dict of names to arrays, got {got}")
        begun = time.perf_counter()  # the wait for an earlier call counts: the arm waits too
        action = await self.in_policy_thread(self.policy.act, observation)
        self.milliseconds.append(1000 * (time.perf_counter() - begun))
        return answer({"action": action})

    async def reset(self, request: web.Request) -> web.Response:
        await self.in_policy_thread(self.policy.reset)
        return answer({"status": "ok"})

    async def in_policy_thread(self, function, *args):
        return await asyncio.get_running_loop().run_in_executor(self.thread, function, *args)

    @web.middleware
    async def errors_to_answers(self, request: web.Request, handler) -> web.StreamResponse:
        """Answer a failed request with one line; the server keeps running."""
        try:
            return await handler(request)
        except UserError as error:
            return answer({"error": str(error)}, status=400)
        except (web.HTTPNotFound, web.HTTPMethodNotAllowed):
            message = f"there is no {request.method} {request.path}: expected GET /health, POST /act or POST /reset"
            return answer({"error": message}, status=404)
        except web.HTTPRequestEntityTooLarge:
            message = f"the body is too large: expected at most {self.max_bytes / 1e6:g} MB (raise it with --max_mb)"
            return answer({"error": message}, status=413)
        except Exception as error:  # a bug: the client gets a line, this terminal all of it
            if not isinstance(error, ConnectionError):  # that is a client that hung up
                traceback.print_exc()
            return answer({"error": f"{type(error).__name__}: {one_line(error)[:200]}"}, status=500)


def answer(tree: dict, status: int = 200) -> web.Response:
    return web.Response(body=pack(tree), status=status, content_type="application/msgpack")


@command
def main(argv: list[str]) -> int:
    parser = OneLineParser(prog="serve.py", description="Serve a policy over HTTP.")
    parser.add_argument("checkpoint", help="a checkpoint-<step> folder, a run's folder, or a Hub id")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other computers connect [%(default)s]")
    parser.add_argument("--port", type=int, default=8000, help="0 for any free port [%(default)s]")
    parser.add_argument("--max_mb", type=float, default=32, help="largest request [%(default)s]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... [auto]")
    parser.add_argument("--n_action_steps", type=int, help="actions executed from each predicted chunk [as trained]")
    parser.add_argument("--ahead", type=float, metavar="FPS", help="predict chunks early, for FPS requests a second")
    parser.add_argument("--task", default="", help="task text for observations without one")
    args = parser.parse_args(argv)
    if args.ahead is not None and not 0 < args.ahead < math.inf:
        parser.error(f"--ahead must be a number of actions a second, got {args.ahead:g}")
    if not 0 <= args.port <= 65535:
        parser.error(f"--port must be from 0 to 65535, got {args.port}")
    if not 0 < args.max_mb < math.inf:
        parser.error(f"--max_mb must be a number above 0, got {args.max_mb:g}")
    # Slow: torch and lerobot, which --help and a wrong flag do not need.
    from policy.loaded import load_policy

    policy = load_policy(args.checkpoint, args.device, args.n_action_steps, args.task)
    if args.ahead:
        policy = policy.ahead(args.ahead)
    app = PolicyServer(policy, max_bytes=math.ceil(args.max_mb * 1e6)).app()
    # The socket is opened before the server runs: a port in use is an error in one line, and port 0 gets its number.
    try:
        sock = socket.create_server((args.host, args.port))
    except OSError as error:
        raise UserError(
            f"cannot listen on {args.host}:{args.port}: {one_line(error)}. Pass another --host or --port"
        ) from error
    with sock:
        address = f"http://{args.host}:{sock.getsockname()[1]}"
        print(f"serving {args.checkpoint} on {address} (GET /health; Ctrl-C ends)", flush=True)
        web.run_app(app, sock=sock, print=None, **CONNECTIONS)
    print("ended")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
