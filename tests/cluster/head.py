"""A Ray head on loopback that asks for a token: its own ports, its own folder, its own processes."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests


@dataclass(frozen=True)
class Head:
    """Where the dashboard answers, and the file with the token that it wants."""

    url: str
    token: Path
    log: Path


def free_ports(n: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def head(cpus: int = 2) -> Iterator[Head]:
    """`ray start --head`, until the end of the block. Needs ray[default]."""
    folder = Path(tempfile.mkdtemp(prefix="sc-", dir="/tmp"))  # short enough for sockets
    token = folder / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    gcs, dashboard, agent, grpc = free_ports(4)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--node-ip-address=127.0.0.1", f"--port={gcs}", "--dashboard-host=127.0.0.1"]
    command += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--dashboard-agent-grpc-port={grpc}", f"--num-cpus={cpus}", "--object-store-memory=100000000"]
    command += [f"--temp-dir={folder / 'ray'}"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{dashboard}"
        _wait(url, process, folder / "log")
        yield Head(url, token, folder / "log")
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        family += [one for one in psutil.process_iter() if _of(one, folder)]  # drivers live in sessions of their own
        for one in family:
            if one.is_running():
                one.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if requests.get(f"{url}/api/authentication_mode", timeout=5).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def _of(process: psutil.Process, folder: Path) -> bool:
    """Whether a process was started by the Ray in `folder`."""
    try:
        return process.environ().get("RAY_AUTH_TOKEN_PATH") == str(folder / "token") and process.pid != os.getpid()
    except psutil.Error:
        return False
