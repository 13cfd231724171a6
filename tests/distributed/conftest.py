"""A real S3 API on loopback, healthy or with the faults of a busy store."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

KEYS = {"aws_access_key_id": "k", "aws_secret_access_key": "s", "region_name": "us-east-1"}


@contextmanager
def s3_server(wrap: Callable = lambda app: app) -> Iterator[str]:
    """URL of an empty bucket of moto's server; the keys are in the URL, so workers that started earlier have them too."""
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    server = make_server("127.0.0.1", 0, wrap(DomainDispatcherApplication(create_backend_app)), threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    place = f"127.0.0.1:{server.server_port}"
    boto3.client("s3", endpoint_url=f"http://{place}", **KEYS).create_bucket(Bucket="speech")
    yield f"s3://k:s@speech/hubert?endpoint_override={place}&scheme=http&region=us-east-1"
    server.shutdown()
    thread.join()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as url:
        yield url


class Faults:
    """Of the requests for whole or parts of objects, every fifth gets a 500, every seventh half a body, every ninth waits."""

    def __init__(self, app: Callable):
        self._app = app
        self._count = itertools.count(1)
        self.answered = {"500": 0, "cut": 0, "slow": 0}

    def __call__(self, environ: dict, start_response: Callable):
        if (
            environ["REQUEST_METHOD"] != "GET"
            or environ["PATH_INFO"].count("/") < 2
            or "list-type" in environ["QUERY_STRING"]
        ):
            return self._app(environ, start_response)
        number = next(self._count)
        if number % 5 == 0:
            self.answered["500"] += 1
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        if number % 9 == 0:
            self.answered["slow"] += 1
            time.sleep(0.2)
        body = b"".join(self._app(environ, start_response))
        if number % 7 == 0 and len(body) > 1:
            self.answered["cut"] += 1
            return [body[: len(body) // 2]]  # of as many bytes as the header promises
        return [body]
