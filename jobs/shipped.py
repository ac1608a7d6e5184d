"""What travels to the cluster with a job: this very package as a wheel, and small files that the command names.

The wheel is made from the files that are imported here, so a changed checkout runs on the cluster as it runs here. It
is a zip made in memory, the same bytes for the same files, and is named by their hash: the cluster gets it once and
nobody runs an old one under the same name. (Ray would take a .whl by its file name for what it had already, and would
call pip on every node; of a zip it puts the folder on the path, and a wheel of pure Python is just that.)
"""

import base64
import hashlib
import importlib.metadata
import io
import os
import zipfile
from collections.abc import Mapping
from email.message import Message
from pathlib import Path

from scarcade import __version__
from scarcade.engine.errors import InputError

_NAME = "scarcade"
_KINDS = (".py", ".html", ".css", ".js", ".md")
_EPOCH = (2020, 1, 1, 0, 0, 0)  # a time that is no part of the content
_MOST = 10_000_000  # bytes of a small file; data do not travel with a job


def package_files() -> dict[str, bytes]:
    """Every file of the imported package by its place in a wheel; links are followed."""
    import scarcade

    home = Path(scarcade.__path__[0])
    found = {}
    for folder, inside, names in os.walk(home, followlinks=True):
        inside[:] = sorted(name for name in inside if name != "__pycache__")
        for name in sorted(names):
            if name.endswith(_KINDS) or name == "py.typed":
                path = Path(folder, name)
                found[f"{_NAME}/{path.relative_to(home).as_posix()}"] = path.read_bytes()
    return found


def wheel(files: Mapping[str, bytes] | None = None) -> bytes:
    """A wheel of the package, from a checkout or an installed one alike; built without a network."""
    inside = dict(package_files() if files is None else files)
    info = f"{_NAME}-{__version__}.dist-info"
    inside[f"{info}/METADATA"] = _metadata().encode()
    inside[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: scarcade\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(f"{name},{_digest(content)},{len(content)}\n" for name, content in inside.items())
    inside[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    return _zipped(inside)


def small_files(paths: Mapping[str, Path]) -> bytes:
    """A zip of local files by the names that they get where the job runs.

    Raises:
        InputError: one is no file, or too large to travel with a job.
    """
    inside = {}
    for name, path in paths.items():
        if not path.is_file():
            raise InputError(f"{path}: is sent with the job, and is no file here")
        if path.stat().st_size > _MOST:
            raise InputError(f"{path}: is sent with the job, and is larger than {_MOST / 1e6:g} MB")
        inside[name] = path.read_bytes()
    return _zipped(inside)


def package_name(content: bytes) -> str:
    """What Ray calls a zip with this content."""
    return f"_ray_pkg_{hashlib.sha256(content).hexdigest()[:32]}.zip"


def _metadata() -> str:
    """METADATA of the wheel: name, version, and what the installed package says that it needs."""
    told = Message()
    told["Metadata-Version"] = "2.1"
    told["Name"] = _NAME
    told["Version"] = __version__
    try:
        known = importlib.metadata.metadata(_NAME)
    except importlib.metadata.PackageNotFoundError:
        return told.as_string()  # a bare clone on the path: what it needs is not written down
    for key in ("Requires-Python", "Requires-Dist"):
        for value in known.get_all(key) or []:
            if "extra ==" not in value:
                told[key] = value
    return told.as_string()


def _digest(content: bytes) -> str:
    return f"sha256={base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b'=').decode()}"


def _zipped(inside: Mapping[str, bytes]) -> bytes:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as file:
        for name in sorted(inside):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(entry, inside[name])
    return whole.getvalue()
