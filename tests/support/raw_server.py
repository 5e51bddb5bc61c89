"""A server on the loopback interface that sends bytes as a test says, whatever HTTP demands."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress


class RawServer:
    """Answers each request with a function of its connection.

    Args:
        answer: gets the connection once the request's header has been read, and returns when it has
            nothing more to send.
    """

    def __init__(self, answer: Callable[[socket.socket], None]) -> None:
        self.asked = 0
        self.closing = threading.Event()
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            received = b""
            while b"\r\n\r\n" not in received:
                received += connection.recv(4096)
            self.asked += 1
            self._answer(connection)

    def drip(self, connection: socket.socket, head: bytes) -> None:
        """Send something, then a blank now and then until the other side has had enough."""
        connection.sendall(head)
        while not self.closing.wait(0.02):
            connection.sendall(b" ")

    def close(self) -> None:
        """Stop listening, and dripping."""
        self.closing.set()
        self._listener.close()
