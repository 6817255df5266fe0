"""Ask a policy that `python src/serve.py CHECKPOINT` serves for actions. Needs only numpy and msgpack.

python examples/client.py http://127.0.0.1:8000          # says what is served, and times 100 actions

arm = Client("http://gpu-box:8000")
arm.reset()
action = arm.act({"observation.state": state, "observation.images.top": picture})    # float (D,), uint8 (H, W, 3)
"""

import http.client
import sys
import time
from urllib.parse import urlsplit

import msgpack
import numpy as np


def pack_array(array) -> dict:
    array = np.asarray(array)
    return {"dtype": str(array.dtype), "shape": list(array.shape), "data": array.tobytes()}


def unpack_array(item: dict):
    if item.keys() == {"dtype", "shape", "data"}:
        return np.frombuffer(item["data"], item["dtype"]).reshape(item["shape"])
    return item


class Client:
    """One connection to a served policy, kept open.

    Raises:
        RuntimeError: the server refused a request; the message says why.
    """

    idle = 30.0  # seconds after which it reconnects: the server closes a connection that is silent for 60

    def __init__(self, address: str, timeout: float = 10.0):
        url = urlsplit(address if "//" in address else f"//{address}")
        self.connection = http.client.HTTPConnection(url.hostname, url.port or 8000, timeout=timeout)
        self.last_request = 0.0

    def act(self, observation: dict) -> np.ndarray:
        """(A,) float32 in robot units."""
        return self._ask("POST", "/act", msgpack.packb(observation, default=pack_array))["action"]

    def reset(self) -> None:
        """Call it when an episode begins."""
        self._ask("POST", "/reset", b"")

    def health(self) -> dict:
        """What is served, what an observation must contain, and how long an action takes."""
        return self._ask("GET", "/health", None)

    def _ask(self, method: str, path: str, body: bytes | None) -> dict:
        if time.monotonic() - self.last_request > self.idle:
            self.connection.close()  # the next request opens a new one
        self.last_request = time.monotonic()
        try:
            self.connection.request(method, path, body)
            answer = self.connection.getresponse()
            message = msgpack.unpackb(answer.read(), object_hook=unpack_array)
        except OSError:
            self.connection.close()
            raise
        if answer.status != 200:
            raise RuntimeError(message["error"])
        return message


def main(address: str = "http://127.0.0.1:8000") -> None:
    client = Client(address)
    health = client.health()
    print(health)
    observation = {}
    for key, entry in health["expects"].items():
        shape = [size or 64 for size in entry["shape"]]  # 0 stands for any size
        observation[key] = np.zeros(shape, "uint8" if entry["kind"] == "uint8" else "float32")
    client.reset()
    pause = 0.0
    if "ahead" in health:
        pause = (
            1 / health["ahead"]["fps"]
        )  # served with --ahead FPS: chunks are ready for an arm that asks at that rate
    times = []
    for _ in range(100):
        begun = time.perf_counter()
        client.act(observation)
        times.append(1000 * (time.perf_counter() - begun))
        time.sleep(max(0.0, begun + pause - time.perf_counter()))
    median, p99 = np.percentile(times, [50, 99])
    print(f"an action takes {median:.1f} ms (median), {p99:.1f} ms (99 %), including the network")


if __name__ == "__main__":
    main(*sys.argv[1:])
