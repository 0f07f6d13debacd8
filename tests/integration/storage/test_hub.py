"""Shards on the hub are verified and inspected by address; a local server speaks the calls that are made."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from precompute.logits.run import run_capture
from tests.support.fake_teacher import FakeTeacher, conversation_records, make_config
from tests.support.models import tiny_llava

NAME = "me/scores"
REVISION = "a" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves the files of `root` as the dataset me/scores: information, lists of files, whole files and ranges."""

    root: Path
    paths: list[str]

    def log_message(self, *_: Any) -> None:
        """Writes no line for each request."""

    def do_HEAD(self) -> None:
        self._send_file(body=False)

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.paths.append(path)
        if re.fullmatch(rf"/api/datasets/{NAME}(/revision/\w+)?", path):
            self._send_json({"id": NAME, "sha": REVISION, "siblings": [], "private": False, "disabled": False})
        elif re.match(rf"/api/datasets/{NAME}/tree/\w+", path):
            self._send_json([self._entry(file) for file in sorted(self.root.iterdir())])
        else:
            self._send_file(body=True)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        text = self.rfile.read(length).decode()
        self.paths.append(urllib.parse.urlsplit(self.path).path)
        wanted = json.loads(text)["paths"] if text.startswith("{") else urllib.parse.parse_qs(text).get("paths", [])
        files = [self.root / name for name in wanted]
        self._send_json([self._entry(file) for file in files if file.is_file()])

    def _entry(self, file: Path) -> dict[str, Any]:
        oid = hashlib.sha1(file.read_bytes()).hexdigest()
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": oid}

    def _send_json(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _send_file(self, *, body: bool) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        match = re.fullmatch(rf"/datasets/{NAME}/resolve/\w+/(.+)", path)
        file = self.root / match[1] if match else None
        if file is None or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, status = file.read_bytes(), 200
        size = len(data)
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(found[1]), int(found[2] or size - 1)
            data, status = data[start : stop + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(file.read_bytes()).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{size}")
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    teacher, records = tiny_llava(tmp_path / "teacher"), conversation_records(tmp_path, 8)
    config = make_config(tmp_path, teacher, records, top_k=4, samples_per_shard=4)
    assert run_capture(config, progress=False, start_teacher=FakeTeacher).complete
    assert isinstance(config.output, Path)
    Hub.root, Hub.paths = config.output, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_shards_on_the_hub_are_verified_and_inspected(hub: str, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}

    def decant(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cli", *arguments], env=environment, capture_output=True, text=True, check=False
        )

    done = decant("verify-shards", f"hf://datasets/{NAME}", "--json")
    assert done.returncode == 0, done.stderr[-2000:] + "\n".join(Hub.paths)
    assert any("/resolve/" in path for path in Hub.paths)
    done = decant("inspect-shards", f"hf://datasets/{NAME}", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    shard = Hub.root / "shard-00001.parquet"
    data = bytearray(shard.read_bytes())
    data[200] ^= 1
    shard.write_bytes(data)
    done = decant("verify-shards", f"hf://datasets/{NAME}")
    assert done.returncode == 1
    assert "NOT verified" in done.stdout
    done = decant("verify-shards", "hf://datasets/me/nothing")
    assert done.returncode == 1
    assert "error: hf://datasets/me/nothing" in done.stderr
