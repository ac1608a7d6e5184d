"""The jobs of a Ray cluster over HTTP: what `submit` and `jobs` ask of its dashboard.

Ray's REST interface is spoken directly. Ray's own client does the same, but takes RAY_ADDRESS before the address that
it is given, waits for ever for a server that is silent, needs packages that only a cluster needs (``ray[default]``),
and takes seconds to import. So a laptop needs neither these nor the same version of Python or Ray as the cluster.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import quote, urlsplit

import requests

from scarcade.engine.errors import ClusterError, UsageError
from scarcade.jobs.cluster_token import HOW

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_TIMEOUT = (10, 60)  # seconds to connect, and between two bytes
_AGENT_PATIENCE_S = 60.0  # a cluster that has just started has nobody to take jobs yet
_NO_AGENT = "No available agent"


@dataclass(frozen=True)
class JobInfo:
    """What the cluster knows of one job."""

    id: str
    status: str  # PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED
    message: str = ""
    exit_code: int | None = None
    began: float | None = None  # seconds since 1970
    ended: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    entrypoint: str = ""

    @property
    def over(self) -> bool:
        return self.status in ENDED


def url_of(address: str) -> str:
    """``http://HOST:PORT`` of a dashboard.

    Raises:
        UsageError: `address` is not one.
    """
    url = address.rstrip("/") if "://" in address else f"http://{address.rstrip('/')}"
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.username:
        raise UsageError(
            f"--address {address}: wants the address of the cluster's dashboard, http://HOST:8265, not that of ray.init"
        )
    return url if port or parts.scheme == "https" else f"{url}:8265"


class JobsApi:
    """One cluster's jobs.

    Args:
        address: of its dashboard, ``http://HOST:8265`` or ``HOST:8265``.
        token: sent with every request; None: none is.

    Raises (every method):
        ClusterError: nothing answers there, it is not a Ray cluster, or it does not take the token.
    """

    def __init__(self, address: str, token: str | None = None) -> None:
        self.url = url_of(address)
        self._session = requests.Session()
        self._auth = partial(_signed, token)

    def ray_version(self) -> str:
        """Version of Ray on the cluster."""
        answer = self._ask("GET", "/api/version")
        try:
            return str(answer.json()["ray_version"])
        except (ValueError, KeyError, TypeError) as error:
            raise ClusterError(self._stranger(answer)) from error

    def open_to_all(self) -> bool:
        """Whether the cluster takes jobs from whoever reaches its port."""
        return self._send("GET", "/api/version", auth=partial(_signed, None)).status_code == 200

    def jobs(self) -> list[JobInfo]:
        """Every job that was submitted to the cluster, the oldest first."""
        found = [_info(one) for one in self._ask("GET", "/api/jobs/").json() if one.get("submission_id")]
        return sorted(found, key=lambda job: job.began or 0.0)

    def job(self, ident: str) -> JobInfo | None:
        """One job; None if there is none of this id."""
        answer = self._send("GET", f"/api/jobs/{quote(ident, safe='')}", auth=self._auth)
        return None if answer.status_code == 404 else _info(self._checked(answer).json())

    def logs(self, ident: str) -> str:
        """All that a job has written so far."""
        return str(self._ask("GET", f"/api/jobs/{quote(ident, safe='')}/logs").json().get("logs") or "")

    def stop(self, ident: str) -> bool:
        """Ask a job to end; False if it was not running."""
        return bool(self._ask("POST", f"/api/jobs/{quote(ident, safe='')}/stop").json().get("stopped"))

    def submit(self, request: Mapping[str, Any]) -> bool:
        """Start a job; False if there is one of that ``submission_id`` already."""
        deadline = time.monotonic() + _AGENT_PATIENCE_S
        while True:
            answer = self._send("POST", "/api/jobs/", auth=self._auth, json=dict(request))
            if "already exists" in answer.text and answer.status_code >= 400:
                return False
            if _NO_AGENT not in answer.text or time.monotonic() > deadline:
                self._checked(answer)
                return True
            time.sleep(1.0)

    def upload(self, name: str, content: bytes) -> str:
        """The URI of a package; sent unless the cluster has it. `name` must name its content."""
        path = f"/api/packages/gcs/{name}"
        if self._send("GET", path, auth=self._auth).status_code == 404:
            self._ask("PUT", path, data=content)
        return f"gcs://{name}"

    def _ask(self, method: str, path: str, **options: Any) -> requests.Response:
        return self._checked(self._send(method, path, auth=self._auth, **options))

    def _send(self, method: str, path: str, **options: Any) -> requests.Response:
        try:
            return self._session.request(method, self.url + path, timeout=_TIMEOUT, **options)
        except requests.RequestException as error:
            raise ClusterError(
                f"--address {self.url}: no Ray dashboard answers there ({_reason(error)}); it wants http://HOST:8265, "
                "started with `ray start --head` where ray[default] is installed"
            ) from error

    def _checked(self, answer: requests.Response) -> requests.Response:
        if answer.status_code == 401:
            raise ClusterError(f"--address {self.url}: the cluster asks for a token, and none was sent; {HOW}")
        if answer.status_code == 403:
            raise ClusterError(f"--address {self.url}: the cluster does not take this token; {HOW}")
        if answer.status_code == 404:
            raise ClusterError(self._stranger(answer))
        if answer.status_code >= 400:
            lines = [line for line in answer.text.strip().splitlines() if line.strip()]
            raise ClusterError(f"--address {self.url}: {lines[-1].strip() if lines else answer.reason}")
        return answer

    def _stranger(self, answer: requests.Response) -> str:
        return (
            f"--address {self.url}: what answers there knows no jobs of Ray (status {answer.status_code}); wanted is "
            "the dashboard of the cluster's head, http://HOST:8265, where ray[default] is installed"
        )


def _signed(token: str | None, request: Any) -> Any:
    """The request with the token, if there is one; as `auth` even if not, so that no .netrc comes in its place."""
    if token:
        request.headers["Authorization"] = f"Bearer {token}"
    return request


def _info(one: Mapping[str, Any]) -> JobInfo:
    began, ended = one.get("start_time"), one.get("end_time")
    return JobInfo(
        id=str(one.get("submission_id") or ""),
        status=str(one.get("status") or "PENDING"),
        message=str(one.get("message") or ""),
        exit_code=one.get("driver_exit_code"),
        began=began / 1000 if began else None,
        ended=ended / 1000 if ended else None,
        metadata=one.get("metadata") or {},
        entrypoint=str(one.get("entrypoint") or ""),
    )


def _reason(error: requests.RequestException) -> str:
    """The innermost cause, in a few words: requests wraps it thrice."""
    cause: BaseException = error
    while (inner := cause.__cause__ or cause.__context__ or getattr(cause, "reason", None)) and isinstance(
        inner, BaseException
    ):
        cause = inner
    text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return " ".join(str(text).split())[:200]
