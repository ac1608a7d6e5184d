"""A small Ray dashboard: jobs that somebody else ends, over real HTTP, with a token or without."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Dashboard(ThreadingHTTPServer):
    """What was asked of it, and what it answers."""

    daemon_threads = True

    def __init__(self, token: str | None = None, ray: str = "2.60.0") -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.token, self.ray = token, ray
        self.jobs: dict[str, dict[str, Any]] = {}
        self.packages: dict[str, bytes] = {}
        self.uploads = 0
        self.logs: dict[str, str] = {}
        self.no_agent = 0  # so many times nobody is there to take a job
        self.broken = 0  # so many requests fail

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def end(self, ident: str, status: str, code: int | None = None, message: str = "") -> None:
        self.jobs[ident] |= {"status": status, "driver_exit_code": code, "message": message, "end_time": 2000}


class _Answers(BaseHTTPRequestHandler):
    server: Dashboard

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._routed()

    def do_POST(self) -> None:
        self._routed()

    def do_PUT(self) -> None:
        self._routed()

    def _routed(self) -> None:  # noqa: PLR0911  (a table of routes)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.broken:
            self.server.broken -= 1
            return self._answer(500, "Traceback\n  somewhere\nOSError: the head is in trouble")
        given = self.headers.get("Authorization")
        if self.server.token is not None and given is None:
            return self._answer(401, "Unauthorized: Missing authentication token")
        if self.server.token is not None and given != f"Bearer {self.server.token}":
            return self._answer(403, "Forbidden: Invalid authentication token")
        parts = self.path.strip("/").split("/")
        if parts == ["api", "version"]:
            return self._answer(200, {"ray_version": self.server.ray})
        if parts[:2] == ["api", "packages"]:
            return self._package(parts[3], body)
        if parts[:2] == ["api", "jobs"]:
            return self._job(parts[2:], body)
        return self._answer(404, "404: Not Found")

    def _package(self, name: str, body: bytes) -> None:
        if self.command == "PUT":
            self.server.packages[name] = body
            self.server.uploads += 1
        self._answer(200 if name in self.server.packages else 404, "")

    def _job(self, rest: list[str], body: bytes) -> None:  # noqa: PLR0911
        jobs = self.server.jobs
        if self.command == "POST" and not rest:
            if self.server.no_agent:
                self.server.no_agent -= 1
                return self._answer(500, "No available agent to submit job, please try again later.")
            request = json.loads(body)
            if request["submission_id"] in jobs:
                return self._answer(
                    400, f"ValueError: Job with submission_id {request['submission_id']} already exists."
                )
            jobs[request["submission_id"]] = request | {"status": "RUNNING", "start_time": 1000 + len(jobs)}
            return self._answer(200, {"submission_id": request["submission_id"]})
        if not rest:
            return self._answer(200, list(jobs.values()))
        if rest[0] not in jobs:
            return self._answer(404, f"Job {rest[0]} does not exist")
        if rest[1:] == ["logs"]:
            return self._answer(200, {"logs": self.server.logs.get(rest[0], "")})
        if rest[1:] == ["stop"]:
            self.server.end(rest[0], "STOPPED")
            return self._answer(200, {"stopped": True})
        return self._answer(200, jobs[rest[0]])

    def _answer(self, status: int, content: Any) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


@contextmanager
def dashboard(token: str | None = None, **options: Any) -> Iterator[Dashboard]:
    with Dashboard(token, **options) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
