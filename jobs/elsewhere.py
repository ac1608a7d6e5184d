"""A folder of ours that lies elsewhere: its files are fetched as its manifest lists them, and each is checked.

Object stores, web servers and Hugging Face (``hf://USER/REPO``, ``hf://USER/REPO@REVISION/FOLDER``), whose files are
those of a web server. What is not in the manifest is not fetched, and nothing that lies outside of the folder is.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit

from scarcade.engine.download import download, over_http
from scarcade.engine.errors import CorruptError, OpenError
from scarcade.engine.folder import MANIFEST, MANIFEST_LIMIT, read_manifest, sha256
from scarcade.engine.storage import Mirror, shown

_AT_ONCE = 8


class Elsewhere:
    """The folder at `url`.

    Raises (every method):
        OpenError: there is none, or no folder of ours. StorageError: it cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.where = shown(self.url)
        self._get = _getter(self.url)

    def manifest(self, target: Path) -> dict[str, Any]:
        """Its manifest, which is written to `target`.

        Raises:
            CorruptError: it is not one of ours, or lists files outside of the folder.
        """
        if not self._get(MANIFEST, target, MANIFEST_LIMIT):
            raise OpenError(f"{self.where}: is no model (it has no {MANIFEST}); the folder to give is RUN/model")
        found = read_manifest(target.parent)
        for name in found["files"]:
            if ".." in PurePosixPath(name).parts or name.startswith("/"):
                raise OpenError(f"{self.where}: its file {name!r} lies outside of the folder")
        return found

    def fetch(self, manifest: Mapping[str, Any], target: Path) -> None:
        """Every file of its manifest, to the folder `target`.

        Raises:
            CorruptError: naming a file that is not there, or not what was written.
        """

        def one(name: str) -> None:
            path, wanted = target / name, manifest["files"][name]
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._get(name, path, wanted["bytes"]):
                raise CorruptError(f"{self.where}: {name}: missing")
            if path.stat().st_size != wanted["bytes"] or sha256(path) != wanted["sha256"]:
                raise CorruptError(f"{self.where}: {name}: its content is not what was written")

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for _ in pool.map(one, manifest["files"]):
                pass


def _getter(url: str) -> Callable[[str, Path, int], bool]:
    """What writes a file of the folder at `url` to a path, of so many bytes; False if there is none of that name."""
    headers: dict[str, str] = {}
    if url.startswith("hf://"):
        url, headers = _hugging_face(url)
    if not over_http(url):
        mirror = Mirror(url)
        return lambda name, target, _: mirror.pull_file(name, target)

    def get(name: str, target: Path, limit: int) -> bool:
        try:
            download(f"{url}/{quote(name)}", target, headers, limit=limit)
        except OpenError as error:
            if isinstance(error.__cause__, HTTPError) and error.__cause__.code == HTTPStatus.NOT_FOUND:
                return False
            raise
        return True

    return get


def _hugging_face(url: str) -> tuple[str, dict[str, str]]:
    """(URL of the folder's files, headers), by the variables that huggingface_hub goes by.

    Raises:
        OpenError: it names no repository.
    """
    parts = urlsplit(url)
    repository, _, folder = parts.path.strip("/").partition("/")
    name, _, revision = repository.partition("@")
    if not parts.netloc or not name:
        raise OpenError(f"{url}: wanted is hf://USER/REPOSITORY, with @REVISION and /FOLDER where there are any")
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    token = os.environ.get("HF_TOKEN")
    where = f"{host}/{parts.netloc}/{name}/resolve/{revision or 'main'}/{folder}".rstrip("/")
    return where, {"Authorization": f"Bearer {token}"} if token else {}
