"""An S3 server on the loopback, for tests of what is kept in object stores."""

import logging
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import quote, unquote

import pytest


@contextmanager
def s3_server() -> Iterator[Callable[[str], str]]:
    """Maps a path in an empty bucket to its URL, or skips where moto is not installed."""
    moto = pytest.importorskip("moto.server")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import boto3

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request, else
        server = moto.ThreadedMotoServer(port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        patch = pytest.MonkeyPatch()
        patch.setenv("AWS_ACCESS_KEY_ID", "x")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="bucket")
        # all servers of a process have one memory: what the one before was given is still there
        for page in client.get_paginator("list_objects_v2").paginate(Bucket="bucket"):
            for one in page.get("Contents", ()):
                client.delete_object(Bucket="bucket", Key=one["Key"])
    try:
        yield lambda path: f"s3://bucket/{path}?endpoint_override=http%3A%2F%2F{host}%3A{port}&region=us-east-1"
    finally:
        patch.undo()
        server.stop()


def address_of(url: str) -> str:
    """The server's address in a URL that `s3_server` gave."""
    return unquote(url.split("endpoint_override=")[1].split("&", maxsplit=1)[0])


def through(url: str, address: str) -> str:
    """`url` with its server asked at another address."""
    return url.replace(quote(address_of(url), safe=""), quote(address, safe=""))


@contextmanager
def checked_keys(url: str) -> Iterator[None]:
    """The server of `url` lets nobody in within the block: no key is right."""

    def post(n: bytes) -> None:
        request = urllib.request.Request(
            f"{address_of(url)}/moto-api/reset-auth",
            data=n,
            method="POST",
            headers={"Content-Type": "application/octet-stream"},
        )
        urllib.request.urlopen(request).close()

    post(b"0")
    try:
        yield
    finally:
        post(b"inf")
