"""An S3 server on the loopback, for tests of what is kept in object stores."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def s3_server() -> Iterator[Callable[[str], str]]:
    """Maps a path in an empty bucket to its URL, or skips where moto is not installed."""
    moto = pytest.importorskip("moto.server")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import boto3

        server = moto.ThreadedMotoServer(port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        patch = pytest.MonkeyPatch()
        patch.setenv("AWS_ACCESS_KEY_ID", "x")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="bucket")
    try:
        yield lambda path: f"s3://bucket/{path}?endpoint_override=http%3A%2F%2F{host}%3A{port}&region=us-east-1"
    finally:
        patch.undo()
        server.stop()
