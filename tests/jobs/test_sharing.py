"""Models are put where others find them and fetched from there: folders, a real S3 server, a real web server."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from scarcade.engine.errors import CorruptError, OpenError, StorageError, UsageError
from scarcade.engine.folder import MANIFEST, problems
from scarcade.engine.storage import Mirror, shown
from scarcade.jobs.cli import main
from scarcade.jobs.mapping import map_queries
from scarcade.jobs.sharing import pull, push
from scarcade.models.saved import read
from tests.jobs.conftest import Atlas
from tests.s3 import s3_server


@pytest.fixture(scope="module")
def bucket() -> Iterator[Callable[[str], str]]:
    with s3_server() as url:
        yield url


def same(one: Path, other: Path) -> bool:
    """Every file of the one that its manifest lists, and nothing else, is in the other."""
    listed = [*json.loads((one / MANIFEST).read_text())["files"], MANIFEST]
    there = {path.relative_to(other).as_posix() for path in other.rglob("*") if path.is_file()}
    return there == set(listed) and all((one / name).read_bytes() == (other / name).read_bytes() for name in listed)


def copy(atlas: Atlas, to: Path) -> Path:
    """The model, with a note of its owner's beside its files."""
    shutil.copytree(atlas.model, to)
    (to / "my notes.txt").write_text("not for others")
    return to


def test_what_comes_is_what_went(atlas: Atlas, bucket: Callable[[str], str], tmp_path: Path) -> None:
    own = copy(atlas, tmp_path / "own")
    for place in (tmp_path / "shelf" / "atlas", bucket("shelf/atlas")):
        push(own, place)
        assert push(own, place) == (place if isinstance(place, Path) else shown(place))  # there already
        got = pull(place, tmp_path / f"got {isinstance(place, Path)}")
        assert same(own, got)
        assert pull(place, got) == got
        (got / "model.safetensors").write_bytes(b"")
        assert same(own, pull(place, got))  # mended
        assert read(got).fingerprint == read(atlas.model).fingerprint
    assert not [path for path in tmp_path.rglob(".*") if path.name.startswith((".tmp", "."))]


def test_a_push_that_was_stopped_is_finished(
    atlas: Atlas, bucket: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_file = Mirror.push_file
    copied: list[str] = []

    def stopping(self: Mirror, path: Path, name: str) -> None:
        if len(copied) == 3:
            raise KeyboardInterrupt
        copied.append(name)
        push_file(self, path, name)

    monkeypatch.setattr(Mirror, "push_file", stopping)
    with pytest.raises(KeyboardInterrupt):
        push(atlas.model, bucket("stopped/atlas"))
    monkeypatch.undo()
    with pytest.raises(OpenError, match=r"is no model \(it has no MANIFEST.json\)"):
        pull(bucket("stopped/atlas"), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    push(atlas.model, bucket("stopped/atlas"))
    assert same(atlas.model, pull(bucket("stopped/atlas"), tmp_path / "got"))


def other(atlas: Atlas, to: Path, epochs: int = 1) -> Path:
    """Something else that is shared: the delta of a query."""
    map_queries(atlas.model, {"q": atlas.query}, to, epochs=epochs)
    return to / "q.delta"


def test_another_one_is_replaced_if_that_is_asked_for(
    atlas: Atlas, bucket: Callable[[str], str], tmp_path: Path
) -> None:
    delta = other(atlas, tmp_path / "m")
    for place in (tmp_path / "shelf", bucket("replaced/one")):
        push(delta, place)
        with pytest.raises(UsageError, match="--force replaces it"):
            push(atlas.model, place)
        with pytest.raises(UsageError, match="is a delta, and --force puts a model in the place of such a one alone"):
            push(atlas.model, place, replace=True)
    second = other(atlas, tmp_path / "m2", epochs=2)
    for place in (tmp_path / "shelf", bucket("replaced/one")):
        push(second, place, replace=True)
        assert same(second, pull(place, tmp_path / "got", replace=True))
        push(delta, place, replace=True)
        with pytest.raises(UsageError, match="exists already; --force replaces it"):
            pull(place, tmp_path / "got")
        assert same(second, tmp_path / "got")


def test_what_is_somebody_elses_is_left_alone(atlas: Atlas, bucket: Callable[[str], str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    Mirror(bucket("mine")).push(tmp_path / "mine", "")
    with pytest.raises(UsageError, match=r"'thesis\.txt', which is not of this model"):
        push(atlas.model, bucket("mine"), replace=True)
    for action in (push, pull):
        with pytest.raises(UsageError, match="was not made by scarcade"):
            action(atlas.model, tmp_path / "mine", replace=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_what_is_no_model_or_damaged_is_not_shared(atlas: Atlas, tmp_path: Path) -> None:
    with pytest.raises(OpenError, match="there is no such folder"):
        push(tmp_path / "none", tmp_path / "out")
    with pytest.raises(OpenError, match="is a store; what is shared is a model"):
        push(atlas.store.path, tmp_path / "out")
    own = copy(atlas, tmp_path / "own")
    (own / "model.safetensors").write_bytes(b"")
    with pytest.raises(CorruptError, match=r"model\.safetensors: 0 bytes where"):
        push(own, tmp_path / "out")
    with pytest.raises(CorruptError, match=r"model\.safetensors: 0 bytes where"):
        pull(own, tmp_path / "out")
    (tmp_path / "run").mkdir()
    shutil.copytree(atlas.model, tmp_path / "run" / "model")
    (tmp_path / "run" / "config.toml").touch()
    with pytest.raises(OpenError, match=r"is a run; the model to give is .*model"):
        push(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, list[Any]]]:
    """A web server of tmp_path/web, and the requests that it had."""
    asked: list[Any] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            super().do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    (tmp_path / "web").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "web")))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_model_of_a_web_server_and_of_hugging_face(
    atlas: Atlas, tmp_path: Path, web: tuple[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked = web
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("SCARCADE_CACHE", str(tmp_path / "cache"))
    for folder in ("models/a b", "lab/atlas/resolve/main", "lab/atlas/resolve/v2/lung"):
        shutil.copytree(atlas.model, tmp_path / "web" / folder)
    assert same(atlas.model, pull(f"{url}/models/a%20b", tmp_path / "one"))
    assert {key for _, key in asked} == {None}  # the key is for Hugging Face alone
    asked.clear()
    assert same(atlas.model, pull("hf://lab/atlas", tmp_path / "two"))
    assert {key for _, key in asked} == {"Bearer hf_secret"}
    assert same(atlas.model, pull("hf://lab/atlas@v2/lung", tmp_path / "three"))
    found = map_queries("hf://lab/atlas@v2/lung", {"q": atlas.query}, tmp_path / "m", epochs=1)
    assert [record["state"] for record in found.queries] == ["done"]
    with pytest.raises(OpenError, match="is no model"):
        pull("hf://lab/none", tmp_path / "four")
    with pytest.raises(OpenError, match="wanted is hf://USER/REPOSITORY"):
        pull("hf://lab", tmp_path / "four")
    with pytest.raises(UsageError, match="huggingface-cli upload"):
        push(atlas.model, "hf://lab/mine")


def test_a_file_that_is_not_what_was_written_is_named_and_nothing_is_left(
    atlas: Atlas, tmp_path: Path, web: tuple[str, list[Any]]
) -> None:
    url, _ = web
    shutil.copytree(atlas.model, tmp_path / "web" / "bad")
    weights = tmp_path / "web" / "bad" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CorruptError, match=r"bad: model\.safetensors: its content is not what was written"):
        pull(f"{url}/bad", tmp_path / "got")
    weights.write_bytes(bytes(content) + b"more")
    with pytest.raises(OpenError, match=r"model\.safetensors: the server sends more than \d+ bytes"):
        pull(f"{url}/bad", tmp_path / "got")
    weights.unlink()
    with pytest.raises(CorruptError, match=r"bad: model\.safetensors: missing"):
        pull(f"{url}/bad", tmp_path / "got")
    manifest = json.loads((tmp_path / "web" / "bad" / MANIFEST).read_text())
    manifest["files"]["../../evil"] = {"bytes": 1, "sha256": "0"}
    (tmp_path / "web" / "bad" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(OpenError, match="lies outside of the folder"):
        pull(f"{url}/bad", tmp_path / "got")
    assert not [path for path in tmp_path.iterdir() if path.name not in ("web",)]


def test_the_commands(atlas: Atlas, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shelf = (tmp_path / "shelf").as_uri()
    assert main(["push", str(atlas.model), shelf]) == 0
    assert main(["pull", str(tmp_path / "one"), shelf]) == 0
    assert main(["pull", shelf, str(tmp_path / "two")]) == 0  # whichever way round
    assert capsys.readouterr().out.splitlines() == [shelf, str(tmp_path / "one"), str(tmp_path / "two")]
    assert not problems(tmp_path / "one") + problems(tmp_path / "two")
    assert main(["push", str(tmp_path / "none"), shelf]) == 4
    assert main(["pull", shelf, "s3://bucket/x"]) == 2
    assert main(["push", str(other(atlas, tmp_path / "m")), shelf]) == 2
    assert "--force replaces it" in capsys.readouterr().err


def test_a_store_that_does_not_answer(atlas: Atlas, tmp_path: Path) -> None:
    with pytest.raises((StorageError, OpenError)):
        pull("http://127.0.0.1:1/model", tmp_path / "got")
    assert not list(tmp_path.iterdir())
