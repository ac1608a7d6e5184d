"""The token of a Ray cluster, found where Ray itself looks for it, and told to nobody.

It travels in the header of each request and nowhere else: not in a job's environment, metadata or command, all of which
whoever may see the cluster's jobs can read. On its nodes Ray has a token of its own.
"""

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from scarcade.engine.errors import ClusterError, UsageError

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
HOW = f"set {MODE}=token and {TOKEN_PATH} to a file with the cluster's token (or {TOKEN} to the token)"


def token_of(environment: Mapping[str, str] | None = None) -> tuple[str | None, list[str]]:
    """(token or None, warnings). As in Ray: RAY_AUTH_TOKEN, else RAY_AUTH_TOKEN_PATH, else ``~/.ray/auth_token``.

    The last is looked at only where RAY_AUTH_MODE asks for a token, so that no cluster gets one by accident.

    Raises:
        UsageError: RAY_AUTH_MODE is nothing that Ray knows. ClusterError: a token is asked for, and there is none.
    """
    environment = os.environ if environment is None else environment
    mode = environment.get(MODE, "").lower()
    if mode not in ("", "token", "disabled"):
        raise UsageError(f"{MODE}={environment[MODE]}: wants token or disabled")
    if mode == "disabled":
        return None, []
    if token := environment.get(TOKEN, "").strip():
        return token, []
    if named := environment.get(TOKEN_PATH, ""):
        return _read(Path(named), f"{TOKEN_PATH}={named}")
    if mode == "token":
        path = Path.home() / ".ray" / "auth_token"
        if not path.exists():
            raise ClusterError(f"{MODE}=token, but there is no token: {HOW}, or put it into {path}")
        return _read(path, str(path))
    return None, []


def _read(path: Path, where: str) -> tuple[str, list[str]]:
    try:
        token = path.read_text().strip()
        mode = stat.S_IMODE(path.stat().st_mode)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ClusterError(f"{where}: the cluster's token cannot be read ({reason})") from error
    if not token:
        raise ClusterError(f"{where}: the file of the cluster's token is empty")
    if not token.isprintable() or not token.isascii():
        raise ClusterError(f"{where}: holds more than one line of plain letters, so it is no token")
    if mode & 0o077:
        return token, [f"{path}: others may read the cluster's token; chmod 600 {path}"]
    return token, []
