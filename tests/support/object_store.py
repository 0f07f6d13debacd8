"""S3 server for tests (moto's, on loopback), behind a proxy that records requests and can make each of them fail."""

import http.client
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from common.storage import object_store

BUCKET = "decant-tests"

# An HTTP status with S3's error code; or the proxy closes the connection before it forwards the request ("drop"), after
# the server answered ("drop answer"), or within the answer's body ("cut").
Fault = tuple[int, str] | Literal["drop", "drop answer", "cut"] | None

SLOW_DOWN: Fault = (503, "SlowDown")
DENIED: Fault = (403, "AccessDenied")

_ERROR = """<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>{code}</Code><Message>injected {code}</Message></Error>"""


@dataclass(frozen=True)
class Request:
    """Recorded request, with the numbers of bytes in its body and in the answer's. `key` is without the bucket."""

    method: str
    key: str
    query: tuple[str, ...]
    num_sent: int
    num_received: int
    status: int


class Store:
    """Record of the proxy's requests. `fault(number, method, key)` decides the fault of each request.

    `number` counts requests from 0 since `clear`.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.fault: Callable[[int, str, str], Fault] = lambda *_: None
        self._lock = threading.Lock()
        self._count = 0

    def clear(self) -> None:
        self.requests.clear()
        self.fault = lambda *_: None
        self._count = 0

    def next_fault(self, method: str, key: str) -> Fault:
        with self._lock:
            self._count += 1
            return self.fault(self._count - 1, method, key)

    def count(self, method: str, key_end: str = "") -> int:
        return sum(request.method == method and request.key.endswith(key_end) for request in self.requests)

    def objects(self, prefix: str) -> dict[str, bytes]:
        """Returns the objects below a prefix, by the rest of their keys; these requests do not fail."""
        fault, self.fault = self.fault, lambda *_: None
        fs = object_store.filesystem("s3", os.getpid())
        found = {key: fs.cat_file(key) for key in fs.find(f"{BUCKET}/{prefix}")}
        self.fault = fault
        return {key.removeprefix(f"{BUCKET}/{prefix}/"): data for key, data in found.items()}


# In a process of its own, because Flask's proxy objects make torch fail when it inspects all loaded modules, as it does
# when vLLM starts. The process ends with this one, because its input ends then.
_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def running_store() -> Iterator[Store]:
    """Starts server and proxy, sets the environment variables for them and creates the bucket `BUCKET`."""
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None
    store = Store()
    proxy = _Proxy(store, int(server.stdout.readline()))
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    settings = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_address[1]}",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    object_store.filesystem.cache_clear()
    try:
        object_store.filesystem("s3", os.getpid()).mkdir(BUCKET)
        store.clear()
        yield store
    finally:
        object_store.filesystem.cache_clear()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        proxy.shutdown()
        proxy.server_close()
        server.kill()
        server.wait()


class _Proxy(ThreadingHTTPServer):
    """Proxy that forwards requests to the server at `port` of this machine, unless `store.fault` makes them fail."""

    daemon_threads = True

    def __init__(self, store: Store, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _ProxyHandler)
        self.store = store
        self.upstream_port = port


class _ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Proxy

    def _handle(self) -> None:
        body = self._read_body()
        address = urlsplit(self.path)
        key = address.path.removeprefix(f"/{BUCKET}").lstrip("/")
        fault = self.server.store.next_fault(self.command, key)
        if fault == "drop":
            self._record(key, address.query, len(body), 0, 0)
            self.close_connection = True
            return
        if isinstance(fault, tuple):
            data = _ERROR.format(code=fault[1]).encode()
            status, headers = fault[0], [("Content-Type", "application/xml"), ("Content-Length", str(len(data)))]
        else:
            status, headers, data = self._forward(body)
        self._record(key, address.query, len(body), len(data), status)
        if fault == "drop answer":
            self.close_connection = True
            return
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        self.close_connection = fault == "cut"

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.upstream_port, timeout=30)
        connection.request(self.command, self.path, body or None, dict(self.headers))
        answer = connection.getresponse()
        data = answer.read()
        kept = [(n, v) for n, v in answer.getheaders() if n.lower() not in ("transfer-encoding", "connection")]
        if not any(name.lower() == "content-length" for name, _ in kept):
            kept.append(("Content-Length", str(len(data))))
        connection.close()
        return answer.status, kept, data

    def _read_body(self) -> bytes:
        assert self.headers.get("Transfer-Encoding") is None
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _record(self, key: str, query: str, num_sent: int, num_received: int, status: int) -> None:
        names = tuple(sorted(parse_qs(query, keep_blank_values=True)))
        self.server.store.requests.append(Request(self.command, key, names, num_sent, num_received, status))

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _handle

    def log_message(self, *_: Any) -> None:
        pass
