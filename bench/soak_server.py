"""A soak of the server: does an arm get its actions while others send bad requests, send slowly, idle and leave?

    python bench/soak_server.py [--bad 1000] [--slow 200] [--idle 60] [--leave 200] [--files 40] [--seconds 20]
                                [--checkpoint CHECKPOINT] [--json]

Serves a tiny policy of one training step, or --checkpoint, in a process that may open --files files. All the time, an arm asks
for an action 30 times a second over one connection, and another client connects anew twice a second to ask for one. Slow clients
send a half of the largest body at once and then a byte a second. Idle ones send nothing; every second one asks for /health
before. Those that the server closes come back after a second.

Prints a line for each kind of client: what the arm and the new connections got, and the server's memory and open files at most.
The status is 1 if a request of theirs was not answered, or a bad one was not refused, or the server printed anything.
"""

import asyncio
import contextlib
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
from common import ROOT, SHIPPED, benchmark_parser, print_json

from serve import pack

sys.path.insert(0, str(ROOT / "examples"))

MAX_MB = 4
MAX_BYTES = MAX_MB * 1_000_000
FPS = 30


def tiny_checkpoint(folder: Path) -> Path:
    from train import train

    settings = {
        "dataset_id": [str(SHIPPED)],
        "policy": "flow",
        "policy_args": ["size=tiny", "chunk_size=6", "n_action_steps=3", "num_keypoints=4", "head=regression"],
        "image_size": [64, 64],
        "device": "cpu",
        "batch_size": 2,
        "steps": 1,
        "quiet": True,
    }
    return train(**settings, output_dir=str(folder / "run")).checkpoint


@contextlib.contextmanager
def served(checkpoint: Path, files: int, log: Path):
    """(process, port) of a server that may open so many files and prints into `log`."""

    def limit_files():
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    command = [sys.executable, str(ROOT / "src" / "serve.py"), str(checkpoint)]
    command += ["--port", "0", "--device", "cpu", "--max_mb", str(MAX_MB)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            preexec_fn=limit_files,
        )
    line = process.stdout.readline()
    if not line.startswith("serving "):
        sys.exit(f"error: the server does not start: {log.read_text()}")
    try:
        yield process, int(line.split(" on http://127.0.0.1:")[1].split()[0])
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


class Watch:
    """Asks a server for actions in threads, and notes what it gets and what the server takes."""

    def __init__(self, process: subprocess.Popen, port: int):
        from client import Client

        self.new_client = lambda: Client(f"127.0.0.1:{port}")
        self.process = psutil.Process(process.pid)
        self.observation = {}
        for key, entry in self.new_client().health()["expects"].items():
            shape = [size or 64 for size in entry["shape"]]  # 0 stands for any size
            self.observation[key] = np.zeros(shape, "uint8" if entry["kind"] == "uint8" else "float32")
        self.ended = threading.Event()
        self.start_phase()
        self.threads = []
        for target in (self.be_arm, self.connect_anew, self.measure):
            self.threads.append(threading.Thread(target=target))
            self.threads[-1].start()

    def start_phase(self) -> None:
        self.arm: list[float] = []  # seconds of each answered request
        self.new: list[float] = []
        self.failures: list[str] = []
        self.megabytes = 0.0
        self.files = 0

    def ask(self, client, seconds: list[float], who: str) -> None:
        begun = time.perf_counter()
        try:
            client.act(self.observation)
            seconds.append(time.perf_counter() - begun)
        except (OSError, RuntimeError, ValueError) as error:
            self.failures.append(f"{who}: {type(error).__name__} {error}")

    def be_arm(self) -> None:
        client = self.new_client()
        while not self.ended.wait(1 / FPS):
            self.ask(client, self.arm, "arm")

    def connect_anew(self) -> None:
        while not self.ended.wait(0.5):
            client = self.new_client()
            self.ask(client, self.new, "new connection")
            client.connection.close()

    def measure(self) -> None:
        while not self.ended.wait(0.05):
            with contextlib.suppress(psutil.Error):
                self.megabytes = max(self.megabytes, self.process.memory_info().rss / 1e6)
                self.files = max(self.files, self.process.num_fds())

    def figures(self) -> dict:
        milliseconds = 1000 * np.array(self.arm or [np.nan])
        return {
            "arm_answers": len(self.arm),
            "arm_p50_ms": float(np.percentile(milliseconds, 50)),
            "arm_p99_ms": float(np.percentile(milliseconds, 99)),
            "new_answers": len(self.new),
            "new_longest_s": max(self.new, default=float("nan")),
            "not_answered": len(self.failures),
            "first_failure": self.failures[0] if self.failures else None,
            "memory_mb": self.megabytes,
            "open_files": self.files,
        }

    def end(self) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()


def bad_requests(observation: dict, random) -> list[bytes]:
    """Requests that a server must refuse: one of each kind, with random bytes in some."""
    array = {"dtype": "uint8", "shape": [1], "data": b"1"}
    bodies = [
        b"",
        b"\xc1",
        random.bytes(1000),
        json.dumps({"observation.state": [1, 2, 3]}).encode(),
        gzip.compress(bytes(50_000_000), 1),  # 50 MB of nothing
        pack({}),
        pack([1, 2]),
        pack({"a": 1, b"b": 2}),
        pack({1: 2}),
        b"\x91" * 100_000,  # lists in lists
        b"\xdd\x00\x0f\x42\x40" + b"\x90" * 1_000_000,  # a million lists
        b"\xdf\x00\x0f\x42\x40" + b"\xa0\x80" * 1_000_000,
        b"\xdd\xff\xff\xff\xff",
        pack({"a": [bytes(3_000_000), *[b""] * 5000]}),  # numpy would make 15 GB of it
        pack({"a": ["x" * 4000, *[""] * 9000]}),
        bytes(MAX_BYTES + 1),
    ]
    for key, value in observation.items():
        for wrong in (
            np.zeros((0, *value.shape[1:]), value.dtype),
            np.zeros((1, 5000, 3), np.uint8),
            value[..., :1].astype(np.int32),
            value.astype(np.float16),
            np.full(value.shape, np.nan, np.float32),
            {**array, "shape": [2**63, 0]},
            {**array, "shape": [1] * 100},
            {**array, "shape": [True]},
            {**array, "dtype": "object"},
            {**array, "data": "1"},
            {**array, "shape": "1"},
            None,
            "1 2 3",
            [[1], [1, 2]],
            [],
            {},
        ):
            bodies.append(pack({**observation, key: wrong}))
    bodies += [pack({**observation, "task": 5}), pack({**observation, "other": 1})]
    requests = [head(len(body)) + body for body in bodies]
    requests += [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET /none HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PUT /act HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /act HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"POST /act HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\nzz\r\n",
        b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ]
    return requests


def head(length: int) -> bytes:
    return b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % length


async def status_of(port: int, request: bytes) -> str:
    """The status that a request is answered with, or the error that a client meets."""
    writer = None
    try:
        async with asyncio.timeout(30):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            line = await reader.readline()
            return line.split()[1].decode() if line else "closed"
    except OSError as error:
        return type(error).__name__
    finally:
        if writer is not None:
            writer.close()


async def send_bad_requests(port: int, observation: dict, count: int) -> dict:
    """The statuses that bad requests are answered with, four at a time."""
    random = np.random.default_rng(0)
    requests = bad_requests(observation, random)
    statuses = Counter()
    for first in range(0, count, 4):
        group = [status_of(port, requests[number % len(requests)]) for number in range(first, min(first + 4, count))]
        statuses.update(await asyncio.gather(*group))
    return dict(sorted(statuses.items()))


async def stay(port: int, first: bytes, later: bytes, ends: Counter) -> None:
    """A client that sends `first`, then `later` each second; once the connection is closed, it comes back."""
    while True:
        writer = None
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(first)
            answer = asyncio.create_task(reader.read(100))
            while not answer.done():
                await asyncio.wait([answer], timeout=1)
                if not answer.done():
                    writer.write(later)
                elif answer.result().startswith(b"HTTP/1.1 200"):  # of /health; from now on it idles
                    answer = asyncio.create_task(reader.read(100_000))
                    await answer
                    break
            status = answer.result().split()[1:2]
            ends[status[0].decode() if status and answer.result().startswith(b"HTTP") else "closed"] += 1
        except OSError as error:
            ends[type(error).__name__] += 1
        finally:
            if writer is not None:
                writer.close()
        await asyncio.sleep(1)


async def hold_clients(clients: list[tuple[bytes, bytes]], port: int, seconds: float) -> dict:
    """How the connections of clients ended that stay for so many seconds."""
    ends = Counter()
    tasks = [asyncio.create_task(stay(port, first, later, ends)) for first, later in clients]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return dict(sorted(ends.items()))


async def leave(port: int, observation: dict, count: int) -> dict:
    """Clients that leave in the middle of a request's head, of its body, and before its answer."""
    whole = pack(observation)
    request = head(len(whole)) + whole
    for number in range(count):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request[: [0, 10, len(request) // 2, len(request)][number % 4]])
        with contextlib.suppress(OSError):
            await writer.drain()
        writer.transport.abort()
    await asyncio.sleep(2)
    return {"left": count}


def main() -> int:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--bad", type=int, default=1000)
    parser.add_argument("--slow", type=int, default=200)
    parser.add_argument("--idle", type=int, default=60)
    parser.add_argument("--leave", type=int, default=200)
    parser.add_argument("--files", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=20, help="how long slow and idle clients stay")
    parser.add_argument("--checkpoint", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        checkpoint = args.checkpoint or tiny_checkpoint(Path(folder))
        with served(checkpoint, args.files, log) as (process, port):
            watch = Watch(process, port)
            observation = watch.observation
            slow = [(head(MAX_BYTES) + bytes(MAX_BYTES // 2), b"x")] * args.slow
            idle = [(b"", b""), (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"")] * (args.idle // 2)
            phases = {
                "nobody else": asyncio.sleep(5),
                f"{args.bad} bad requests": send_bad_requests(port, observation, args.bad),
                f"{args.slow} slow clients": hold_clients(slow, port, args.seconds),
                f"{args.idle} idle clients": hold_clients(idle, port, args.seconds),
                f"{args.leave} that leave": leave(port, observation, args.leave),
                "nobody else again": asyncio.sleep(5),
            }
            figures = {}
            for name, phase in phases.items():
                watch.start_phase()
                begun = time.perf_counter()
                others = asyncio.run(as_coroutine(phase))
                figures[name] = {"seconds": time.perf_counter() - begun, **watch.figures(), "others": others}
                print_phase(name, figures[name])
            watch.end()
            process.send_signal(signal.SIGINT)
            status = process.wait(60)
        printed = log.read_text()
    statuses = figures[f"{args.bad} bad requests"]["others"]
    refused = sum(count for status_text, count in statuses.items() if status_text.startswith("4"))
    unanswered = sum(entry["not_answered"] for entry in figures.values())
    print(f"bad requests refused: {refused} of {args.bad}; the arm's and new requests not answered: {unanswered}")
    print(f"the server ended with status {status} and printed {len(printed.splitlines())} lines of errors")
    print(printed[:3000], end="")
    if args.json:
        print_json({"phases": figures, "refused": refused, "not_answered": unanswered, "exit_status": status})
    return int(refused < args.bad or unanswered > 0 or status != 0 or bool(printed))


async def as_coroutine(phase):
    return await phase


def print_phase(name: str, entry: dict) -> None:
    answers = f"; {entry['others']}" if entry["others"] else ""
    print(f"{name} ({entry['seconds']:.1f} s{answers})")
    print(
        f"  arm: {entry['arm_answers']} answers, {entry['arm_p50_ms']:.1f} ms (median), {entry['arm_p99_ms']:.1f} ms (99 %); "
        f"new connections: {entry['new_answers']} answers, the longest {entry['new_longest_s']:.2f} s"
    )
    print(
        f"  server: {entry['memory_mb']:.0f} MB, {entry['open_files']} open files; not answered: {entry['not_answered']}"
    )
    if entry["first_failure"]:
        print(f"  the first: {entry['first_failure']}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
