"""A proxy on the loopback that spoils a share of the requests that pass through it, and counts what it did.

What it spoils, and how, is drawn from a seed: a 503, a 429, a connection that is cut before the answer, a body that is
cut in its middle. So retries are tested against real sockets.
"""

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_PASSED_ON = ("content-length", "content-type", "content-range", "etag", "last-modified", "accept-ranges", "location")


class FaultyProxy:
    """Passes requests on to `target`; a `share` of them fails, each takes `delay_s` longer."""

    def __init__(self, target: str, share: float, seed: int = 0, delay_s: float = 0.0) -> None:
        self.share, self.delay_s = share, delay_s
        self.paths: Counter[str] = Counter()  # that were read
        self.seen: Counter[str] = Counter()
        self.bytes_out = 0
        self._target = urlsplit(target)
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def fate(self) -> str:
        """What becomes of the next request."""
        with self._lock:
            drawn = self._random.random()
            kind = self._random.choice(["busy", "throttled", "reset", "cut"]) if drawn < self.share else "passed"
            self.seen[kind] += 1
            return kind

    @property
    def failed(self) -> int:
        return sum(self.seen.values()) - self.seen["passed"]

    def forward(self, request: BaseHTTPRequestHandler, *, cut: bool) -> None:
        time.sleep(self.delay_s)
        if request.command == "GET":
            with self._lock:
                self.paths[request.path] += 1
        body = _body(request)
        upstream = HTTPConnection(self._target.hostname or "", self._target.port, timeout=30)
        try:
            own = ("connection", "transfer-encoding", "content-length", "expect")
            headers = {name: value for name, value in request.headers.items() if name.lower() not in own}
            upstream.request(request.command, request.path, body, headers)
            self._answer(request, upstream.getresponse(), cut=cut)
        finally:
            upstream.close()

    def _answer(self, request: BaseHTTPRequestHandler, answer: HTTPResponse, *, cut: bool) -> None:
        content = answer.read()
        request.send_response(answer.status)
        known = {name.lower(): value for name, value in answer.getheaders() if name.lower() in _PASSED_ON}
        if request.command != "HEAD":
            known["content-length"] = str(len(content))
        for name, value in known.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(content[: len(content) // 2] if cut else content)
        self.bytes_out += len(content)
        if cut:
            request.close_connection = True


def _body(request: BaseHTTPRequestHandler) -> bytes:
    if request.headers.get("transfer-encoding", "").lower() != "chunked":
        return request.rfile.read(int(request.headers.get("content-length", 0)))
    parts = []
    while n_bytes := int(request.rfile.readline().split(b";")[0], 16):
        parts.append(request.rfile.read(n_bytes))
        request.rfile.readline()
    while request.rfile.readline().strip():
        pass  # trailers
    return b"".join(parts)


def _handler(proxy: FaultyProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            kind = proxy.fate()
            if kind == "reset":  # as when a load balancer drops the connection
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                return
            if kind in ("busy", "throttled"):
                _body(self)
                self._said(503 if kind == "busy" else 429, _BUSY)
                return
            proxy.forward(self, cut=kind == "cut" and self.command == "GET")

        def _said(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("content-type", "application/xml")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _any

    return Handler


@contextmanager
def faulty_proxy(target: str, share: float, seed: int = 0, delay_s: float = 0.0) -> Iterator[tuple[FaultyProxy, str]]:
    """The proxy and its address, ``http://127.0.0.1:PORT``."""
    proxy = FaultyProxy(target, share, seed, delay_s)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(proxy))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
