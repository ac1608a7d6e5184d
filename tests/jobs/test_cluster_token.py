"""Where the token of a cluster is found, and what is said of where it lies."""

from pathlib import Path

import pytest

from scarcade.engine.errors import ClusterError, UsageError
from scarcade.jobs.cluster_token import token_of


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".ray" / "auth_token"
    path.parent.mkdir()
    path.touch(0o600)
    path.write_text("sesame\n")
    return path


def test_the_order_is_that_of_ray(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.touch(0o600)
    other.write_text("open")
    path = {"RAY_AUTH_TOKEN_PATH": str(other)}
    assert token_of({}) == (None, [])  # the default one is given to nobody who did not ask
    assert token_of({"RAY_AUTH_MODE": "token"}) == ("sesame", [])
    assert token_of({"RAY_AUTH_MODE": "token", **path}) == ("open", [])
    assert token_of(path) == ("open", [])
    assert token_of({"RAY_AUTH_TOKEN": "now", **path}) == ("now", [])
    assert token_of({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "now"}) == (None, [])


def test_a_file_that_others_can_read_is_told(file: Path) -> None:
    file.chmod(0o644)
    token, warnings = token_of({"RAY_AUTH_MODE": "token"})
    assert token == "sesame"
    assert len(warnings) == 1
    assert "chmod 600" in warnings[0]
    assert "sesame" not in warnings[0]


@pytest.mark.parametrize("content", [b"", b" \n", b"two\nlines", b"\xff\xfe", b"\x00"])
def test_a_file_without_a_token(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(ClusterError, match="auth_token") as error:
        token_of({"RAY_AUTH_MODE": "token"})
    assert "lines" not in str(error.value).replace("more than one line", "")


def test_no_token_and_a_wrong_mode(file: Path) -> None:
    file.unlink()
    with pytest.raises(ClusterError, match="RAY_AUTH_TOKEN_PATH"):
        token_of({"RAY_AUTH_MODE": "token"})
    with pytest.raises(ClusterError, match="/nowhere"):
        token_of({"RAY_AUTH_TOKEN_PATH": "/nowhere"})
    with pytest.raises(UsageError, match="RAY_AUTH_MODE=yes"):
        token_of({"RAY_AUTH_MODE": "yes"})
