"""A TCP proxy in front of a server on this machine, which cuts the connection after every so many bytes of answers."""

import contextlib
import socket
import threading


class CuttingProxy:
    """Forwards connections to a port of this machine.

    Args:
        port: the server's.
        bytes_between_cuts: bytes of answers, of all connections together, after which the one that brings them is cut.

    Attributes:
        url: where it listens.
        cuts: how many connections were cut.
    """

    def __init__(self, port: int, bytes_between_cuts: int):
        self.port = port
        self.bytes_between_cuts = bytes_between_cuts
        self.cuts = 0
        self.served = 0  # bytes since the last cut
        self.lock = threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(("127.0.0.1", self.port))
                threading.Thread(target=self._forward, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._forward, args=(server, client, True), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(16384):
                if is_answer and self._is_cut(len(content)):
                    target.sendall(content[: len(content) // 2])
                    break
                target.sendall(content)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _is_cut(self, count: int) -> bool:
        with self.lock:
            self.served += count
            if self.served < self.bytes_between_cuts:
                return False
            self.served = 0
            self.cuts += 1
            return True

    def close(self) -> None:
        self.listener.close()
