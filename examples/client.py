"""Ask a policy that `python src/serve.py CHECKPOINT` serves for actions; needs numpy and msgpack alone.

python examples/client.py http://127.0.0.1:8000          # says what is served, and asks for 100 actions to see how long they take

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


def spell(array) -> dict:
    array = np.ascontiguousarray(array)
    return {"dtype": str(array.dtype), "shape": list(array.shape), "data": array.tobytes()}


def build(item: dict):
    if item.keys() == {"dtype", "shape", "data"}:
        return np.frombuffer(item["data"], item["dtype"]).reshape(item["shape"])
    return item


class Client:
    """One connection to a served policy, kept open.

    Raises:
        RuntimeError: the server's own words about what was wrong with a request.
    """

    def __init__(self, address: str, timeout: float = 10.0):
        place = urlsplit(address if "//" in address else f"//{address}")
        self.connection = http.client.HTTPConnection(place.hostname, place.port or 8000, timeout=timeout)
        self.last = 0.0  # when it was asked
        self.idle = 30.0  # seconds after which it connects anew: the server keeps a silent connection for 60

    def act(self, observation: dict) -> np.ndarray:
        """(A,) float32 in robot units."""
        return self._ask("POST", "/act", msgpack.packb(observation, default=spell))["action"]

    def reset(self) -> None:
        """Call it when an episode begins."""
        self._ask("POST", "/reset", b"")

    def health(self) -> dict:
        return self._ask("GET", "/health", None)

    def _ask(self, method: str, path: str, body: bytes | None) -> dict:
        if time.monotonic() - self.last > self.idle:
            self.connection.close()  # the request connects again
        self.last = time.monotonic()
        try:
            self.connection.request(method, path, body)
            answer = self.connection.getresponse()
            message = msgpack.unpackb(answer.read(), object_hook=build)
        except OSError:
            self.connection.close()
            raise
        if answer.status != 200:
            raise RuntimeError(message["error"])
        return message


def main(address: str) -> None:
    client = Client(address)
    health = client.health()
    print(health)
    made_up = {
        key: np.zeros([size or 64 for size in entry["shape"]], "uint8" if entry["kind"] == "uint8" else "float32")
        for key, entry in health["expects"].items()
    }
    client.reset()
    times = []
    for _ in range(100):
        begun = time.perf_counter()
        client.act(made_up)
        times.append(1000 * (time.perf_counter() - begun))
    print(
        "an action takes {:.1f} ms (median), {:.1f} ms (99 %), the way there and back included".format(
            *np.percentile(times, [50, 99])
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:] or ["http://127.0.0.1:8000"])
