"""A hub on this machine that serves one data set from a folder, for the real client to read from."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@contextmanager
def serve(folder: Path, name: str) -> Iterator[str]:
    """Serves `folder` as the data set `name` (owner/name); gives the hub's address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"folder": folder, "name": name}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    name: str

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path in (f"/api/datasets/{self.name}", f"/api/datasets/{self.name}/revision/main"):
            return self.answer(200, json.dumps({"id": self.name, "sha": "0" * 40, "siblings": []}).encode())
        tree, file = f"/api/datasets/{self.name}/tree/main", f"/datasets/{self.name}/resolve/main/"
        if path.startswith(tree):
            return self.list(self.folder / path.removeprefix(tree).strip("/"))
        if path.startswith(file) and (self.folder / path.removeprefix(file)).is_file():
            return self.send((self.folder / path.removeprefix(file)).read_bytes())
        return self.answer(404, b"{}", **{"X-Error-Code": "RepoNotFound"})

    def list(self, folder: Path) -> None:
        if not folder.is_dir():
            return self.answer(404, b"{}", **{"X-Error-Code": "EntryNotFound"})
        deep = "recursive=true" in self.path.lower()
        found: list[dict[str, Any]] = []
        for path in sorted(folder.rglob("*") if deep else folder.iterdir()):
            kind = "directory" if path.is_dir() else "file"
            size = 0 if path.is_dir() else path.stat().st_size
            found.append({"type": kind, "path": str(path.relative_to(self.folder)), "size": size, "oid": "0" * 40})
        self.answer(200, json.dumps(found).encode())

    def send(self, data: bytes) -> None:
        if not (asked := self.headers.get("Range")):
            return self.answer(200, data)
        start, _, end = asked.removeprefix("bytes=").partition("-")
        part = data[int(start) : int(end or len(data)) + 1]
        self.answer(206, part, **{"Content-Range": f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}"})

    def answer(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""
