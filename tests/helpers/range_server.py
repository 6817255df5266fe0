"""An HTTP server of a folder, with ranges and without listings, that can be slow, cut connections, or refuse."""

import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class RangeServer:
    """Serves the files below a folder.

    Attributes:
        url: of the folder.
        served: bytes of all answers so far.
        requests: (method, path) of all requests so far.
        latency: seconds before each answer.
        cut: every how many answers the connection is cut halfway; 0 for never.
        is_down: whether all requests fail.
        serves_ranges: False to answer a range with the whole file.
        hangs: whether requests get no answer.
        status: of all answers, if not 0.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.served = 0
        self.requests = []
        self.latency = 0.0
        self.cut = 0
        self.is_down = False
        self.serves_ranges = True
        self.hangs = False
        self.status = 0
        self.lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *args):
                pass

            def answer(self):
                with owner.lock:
                    owner.requests.append((self.command, self.path))
                    number = len(owner.requests)
                time.sleep(owner.latency)
                while owner.hangs:
                    time.sleep(0.05)
                path = owner.folder / self.path.lstrip("/")
                if owner.is_down:
                    self.close_connection = True
                    return
                if owner.status:
                    self.send_error(owner.status)
                    return
                if not path.is_file():
                    self.send_error(404)
                    return
                size = path.stat().st_size
                version = f'"{size}-{path.stat().st_mtime_ns}"'
                if self.headers.get("If-Match", version) != version:
                    self.send_error(412)
                    return
                start, end = 0, size
                asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
                if asked and owner.serves_ranges:
                    start = int(asked[1])
                    end = min(size, int(asked[2]) + 1) if asked[2] else size
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
                else:
                    self.send_response(200)
                self.send_header("Content-Length", str(end - start))
                self.send_header("ETag", version)
                self.end_headers()
                if self.command == "HEAD":
                    return
                with open(path, "rb") as file:
                    file.seek(start)
                    content = file.read(end - start)
                if owner.cut and number % owner.cut == 0:
                    content = content[: len(content) // 2]
                    self.close_connection = True
                self.wfile.write(content)
                with owner.lock:
                    owner.served += len(content)

            do_GET = do_HEAD = answer  # noqa: N815

            def handle_one_request(self):
                try:
                    super().handle_one_request()
                except ConnectionError:
                    self.close_connection = True

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


if __name__ == "__main__":  # FOLDER LATENCY: in a process of its own, for a benchmark
    server = RangeServer(Path(sys.argv[1]))
    server.latency = float(sys.argv[2])
    print(server.url, flush=True)
    sys.stdin.read()  # until the benchmark closes it
