"""Serve a policy over HTTP, for an arm whose computer is not the one with the GPU.

    python src/serve.py outputs/my_run/checkpoint-5000 [--host 127.0.0.1] [--port 8000] [--max_mb 32]

    GET  /health   what is served, what an observation has to hold, and how long an action takes
    POST /act      an observation to the action to carry out now; one arm a server, which keeps the chunk under way
    POST /reset    an episode begins

Bodies are msgpack; an array is {"dtype": "uint8", "shape": [480, 640, 3], "data": bytes}. A mistake is answered with status 400 and
{"error": one line}. There is no login: keep to a network you trust, or to ssh -L. examples/client.py is a client.
LeRobot's own server (python -m lerobot.async_inference.policy_server) runs checkpoints of its own policies with cameras; it unpickles
what it is sent, does not know flow, and resizes in another way than --image_size does.
"""

import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from command_line import OneLineParser, command
from errors import UserError, one_line

KINDS = ("uint8", "float32", "float64", "int64", "int32")


def pack(tree) -> bytes:
    """Arrays, numbers, text, lists and dicts as msgpack."""
    import msgpack

    def spell(item):
        item = np.ascontiguousarray(item)
        return {"dtype": str(item.dtype), "shape": list(item.shape), "data": item.tobytes()}

    return msgpack.packb(tree, default=spell)


def unpack(body: bytes):
    """What `pack` packed.

    Raises:
        UserError: it is no msgpack, or an array's bytes are not as many as its shape says.
    """
    import msgpack

    def build(item: dict):
        if item.keys() != {"dtype", "shape", "data"}:
            return item
        if item["dtype"] not in KINDS:
            raise UserError(f"an array of {item['dtype']}: expected one of {', '.join(KINDS)}")
        wanted = int(np.prod(item["shape"])) * np.dtype(item["dtype"]).itemsize
        if len(item["data"]) != wanted:
            raise UserError(
                f"an array of {item['dtype']} {item['shape']} has {len(item['data'])} bytes, expected {wanted}"
            )
        return np.frombuffer(item["data"], item["dtype"]).reshape(item["shape"]).copy()

    try:
        return msgpack.unpackb(body, object_hook=build)
    except UserError:
        raise
    except Exception as error:  # msgpack's own, ValueError, TypeError: whatever the bytes provoke
        raise UserError(f"the body is no msgpack: {one_line(error)[:120]}") from error


class Server(ThreadingHTTPServer):
    """Serves one policy.

    Args:
        policy: infer.LoadedPolicy or ahead.AsyncPolicy.
        address: (host, port); port 0 for any.
        max_bytes: the largest body that is read.
    """

    daemon_threads = True

    def __init__(self, policy, address: tuple[str, int], max_bytes: int):
        self.policy, self.max_bytes = policy, max_bytes
        self.thread = ThreadPoolExecutor(1, "policy")  # torch keeps its helpers by thread, and connections come and go
        self.milliseconds: deque = deque(maxlen=1000)
        super().__init__(address, Handler)

    def health(self) -> dict:
        times = list(self.milliseconds)
        p50, p99 = np.percentile(times, [50, 99]).round(2).tolist() if times else (None, None)
        expected = {
            key: {"kind": kind, "shape": [0 if size is None else size for size in shape]}  # 0 is any
            for key, (kind, shape) in self.policy.expected.items()
        }
        served = {"policy": self.policy.kind, "device": str(self.policy.device), "expects": expected}
        return {"status": "ok", **served, "actions": len(times), "p50_ms": p50, "p99_ms": p99}

    def act(self, observation) -> np.ndarray:
        if not isinstance(observation, dict):
            raise UserError(f"an observation is a dict of names to arrays, got {type(observation).__name__}")
        begun = time.perf_counter()
        action = self.thread.submit(self.policy.act, observation).result()
        self.milliseconds.append(1000 * (time.perf_counter() - begun))
        return action

    def reset_policy(self) -> None:
        self.thread.submit(self.policy.reset).result()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds that a silent connection is kept
    # an answer is two writes, and the second would wait 40 ms for the first to be acknowledged
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.path == "/health":
            self.answer(200, self.server.health())
        else:
            self.answer(404, {"error": f"there is no GET {self.path}: /health is there"})

    def do_POST(self):
        try:
            size = int(self.headers.get("Content-Length", ""))
        except ValueError:
            size = -1
        if not 0 <= size <= self.server.max_bytes:
            left = min(size, 2**28)  # read and dropped, or the client would not come to hear the answer
            while left > 0 and (part := self.rfile.read(min(left, 2**16))):
                left -= len(part)
            self.close_connection = not 0 <= size <= 2**28
            limit = self.server.max_bytes / 1e6
            message = f"the body has {size / 1e6:.1f} MB" if size >= 0 else "the request does not say its length"
            self.answer(413, {"error": f"{message}: at most {limit:g} MB are taken (--max_mb)"})
            return
        body = self.rfile.read(size)
        try:
            if self.path == "/act":
                self.answer(200, {"action": self.server.act(unpack(body))})
            elif self.path == "/reset":
                self.server.reset_policy()
                self.answer(200, {"status": "ok"})
            else:
                self.answer(404, {"error": f"there is no POST {self.path}: /act and /reset are there"})
        except UserError as error:
            self.answer(400, {"error": str(error)})
        except Exception as error:  # the server goes on
            self.answer(500, {"error": f"{type(error).__name__}: {one_line(error)[:200]}"})

    def answer(self, status: int, tree: dict) -> None:
        body = pack(tree)
        self.send_response(status)
        self.send_header("Content-Type", "application/msgpack")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


@command
def main(argv: list[str]) -> int:
    parser = OneLineParser(prog="serve.py", description="Serve a policy over HTTP.")
    parser.add_argument("checkpoint", help="a checkpoint-<step> folder, a run's folder, or a Hub id")
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 for every computer that reaches this one [%(default)s]"
    )
    parser.add_argument("--port", type=int, default=8000, help="[%(default)s]")
    parser.add_argument("--max_mb", type=float, default=32, help="largest request [%(default)s]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... [auto]")
    parser.add_argument("--n_action_steps", type=int, help="actions carried out of each predicted chunk [as trained]")
    parser.add_argument(
        "--ahead", type=float, metavar="FPS", help="predict ahead, for an arm that asks so often a second"
    )
    parser.add_argument("--task", default="", help="task text for observations that bring none")
    args = parser.parse_args(argv)
    if args.ahead is not None and not 0 < args.ahead < float("inf"):
        parser.error(f"--ahead must be a number of actions a second, got {args.ahead:g}")
    from policy.loaded import load_policy

    policy = load_policy(args.checkpoint, args.device, args.n_action_steps, args.task)
    policy = policy.ahead(args.ahead) if args.ahead else policy
    try:
        server = Server(policy, (args.host, args.port), int(args.max_mb * 1e6))
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {args.host} --port {args.port} cannot be used: {one_line(error)}") from error
    print(
        f"serving {args.checkpoint} on http://{args.host}:{server.server_port} (GET /health; Ctrl-C ends)", flush=True
    )
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("ended")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
