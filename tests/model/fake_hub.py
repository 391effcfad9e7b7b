"""A model hub on this machine: the part of its HTTP interface that a download uses, over a folder
of files.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "some-owner/Janus-Tiny"


@dataclass
class FakeHub:
    """url: what HF_ENDPOINT takes. cut_after: the first download of a weights file breaks off after
    so many bytes.
    """

    folder: Path
    url: str = ""
    cut_after: int | None = None
    served: list[str] = field(default_factory=list)


@contextmanager
def serve(folder: Path) -> Iterator[FakeHub]:
    hub = FakeHub(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(send_body=False)

        def do_GET(self) -> None:
            self._answer(send_body=True)

        def _answer(self, send_body: bool) -> None:
            path = unquote(urlparse(self.path).path)
            parts = path.strip("/").split("/")
            if parts[0] == "api":
                self._api(parts[1:], send_body)
            elif (
                "/".join(parts[:2]) == NAME
                and parts[2] == "resolve"
                and parts[3] in ("main", COMMIT)
            ):
                self._file(parts[4], send_body)
            else:
                self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, send_body)

        def _api(self, parts: list[str], send_body: bool) -> None:
            if "/".join(parts[1:3]) != NAME:
                return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"}, send_body)
            if len(parts) > 4 and parts[4] not in ("main", COMMIT):
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, send_body)
            files = sorted(path for path in hub.folder.iterdir())
            if len(parts) > 3 and parts[3] == "tree":
                tree = [
                    {
                        "type": "file",
                        "path": path.name,
                        "size": path.stat().st_size,
                        "oid": etag(path),
                    }
                    for path in files
                ]
                return self._send(200, json.dumps(tree).encode(), {}, send_body)
            siblings = [{"rfilename": path.name, "size": path.stat().st_size} for path in files]
            info = {
                "_id": "1",
                "id": NAME,
                "modelId": NAME,
                "sha": COMMIT,
                "siblings": siblings,
                "tags": [],
                "private": False,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
            }
            self._send(200, json.dumps(info).encode(), {}, send_body)

        def _file(self, name: str, send_body: bool) -> None:
            path = hub.folder / name
            content = path.read_bytes()
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            end = int(self.headers.get("Range", "bytes=0-").split("-")[1] or len(content) - 1)
            headers = {"ETag": f'"{etag(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            partial = "Range" in self.headers
            if partial:
                headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            if send_body:
                hub.served.append(f"{name}@{start}")
            body = content[start : end + 1]
            if send_body and hub.cut_after is not None and name.endswith((".bin", ".safetensors")):
                cut, hub.cut_after = body[: hub.cut_after], None
                self._send(
                    206 if partial else 200,
                    cut,
                    {**headers, "Content-Length": str(len(body))},
                    True,
                )
                self.close_connection = True
                return None
            return self._send(206 if partial else 200, body, headers, send_body)

        def _send(self, status: int, body: bytes, headers: dict[str, str], send_body: bool) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if send_body:
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
