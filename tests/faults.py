"""A real S3 API on loopback, behind a proxy that misbehaves as networks and busy servers do."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "speech"
_HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "expect"}

# "500" and "503": the server answers so. "cut": the connection is closed without an answer. "truncated": half of the body comes,
# then the connection is closed. "slow": the body comes in eight pieces. "lost": the request is carried out, the answer is not sent.
Fault = str


class FaultyS3(ThreadingHTTPServer):
    """`plan(method, path)` says what goes wrong with a request, if anything; `log` has every request with its fault."""

    daemon_threads = True

    def __init__(self, behind: tuple[str, int]):
        super().__init__(("127.0.0.1", 0), _Proxy)
        self.behind = behind
        self.plan: Callable[[str, str], Fault | None] = lambda method, path: None
        self.log: list[tuple[str, str, Fault | None]] = []

    def url(self, folder: str = "hubert") -> str:
        """The keys are in the URL, so processes that started earlier have them too."""
        port = self.server_address[1]
        return f"s3://k:s@{BUCKET}/{folder}?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"

    @contextmanager
    def faults(self, *faults: Fault, on: tuple[str, ...] = ("GET",), path: str = "") -> Iterator[None]:
        """The next requests of these methods, to paths that contain `path`, meet these faults, one each."""
        left, lock = list(faults), threading.Lock()

        def plan(method: str, where: str) -> Fault | None:
            with lock:
                return left.pop(0) if left and method in on and path in where else None

        self.plan, self.log = plan, []
        try:
            yield
        finally:
            self.plan = lambda method, where: None

    def handle_error(self, request, client_address) -> None:
        """Clients that hang up are part of the game."""


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyS3

    def log_message(self, *_: object) -> None:
        pass

    def _body(self) -> bytes:
        """As it came: chunks stay chunks."""
        if "chunked" not in self.headers.get("transfer-encoding", ""):
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        body = b""
        while True:
            line = self.rfile.readline()
            size = int(line.split(b";")[0], 16)
            body += line + self.rfile.read(size + 2)
            if not size:
                return body

    def _pass_on(self) -> None:
        body = self._body()
        fault = self.server.plan(self.command, self.path)
        self.server.log.append((self.command, self.path, fault))
        if fault in ("500", "503"):
            self._answer(int(fault), [], b"", 0, None)
            return
        if fault == "cut":
            self.close_connection = True
            return
        upstream = http.client.HTTPConnection(*self.server.behind)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() != "expect":
                upstream.putheader(name, value)
        upstream.endheaders(body or None)
        answer = upstream.getresponse()
        data = answer.read()
        if fault == "lost":
            self.close_connection = True
            return
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP]
        self._answer(answer.status, headers, data, int(answer.getheader("content-length", len(data))), fault)
        upstream.close()

    def _answer(
        self, status: int, headers: list[tuple[str, str]], data: bytes, length: int, fault: Fault | None
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if fault == "truncated":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif fault == "slow":
            piece = max(1, len(data) // 8)
            for start in range(0, len(data), piece):
                self.wfile.write(data[start : start + piece])
                time.sleep(0.02)
        else:
            self.wfile.write(data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on


@contextmanager
def faulty_s3() -> Iterator[FaultyS3]:
    """With an empty bucket, and nothing going wrong yet."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        aws_access_key_id="k",
        aws_secret_access_key="s",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=BUCKET)
    proxy = FaultyS3((host, port))
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield proxy
    proxy.shutdown()
    proxy.server_close()
    moto.stop()
