"""The part of the Hugging Face hub that a push talks to, on this machine: it answers, and writes down what came."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """repositories: private or not, and its files, by name. validated: README.md files that it was asked about."""

    def __init__(self) -> None:
        self.user = "somebody"
        self.role = "write"
        self.repositories: dict[str, tuple[bool, dict[str, bytes]]] = {}
        self.commits: list[str] = []
        self.validated: list[str] = []
        self.fails_at = ""  # part of a path
        self.endpoint = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if self.fails_at and self.fails_at in path:
            return 500, {"error": "out of order"}
        if path == "/api/whoami-v2":
            access = {"accessToken": {"role": self.role}}
            return 200, {"type": "user", "name": self.user, "orgs": [{"name": "team"}], "auth": access}
        if path == "/api/validate-yaml":
            self.validated.append(json.loads(body)["content"])
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or self.user}/{asked['name']}"
            private = bool(asked.get("private")) or asked.get("visibility") == "private"  # by the client's version
            self.repositories[name] = (private, {})
            return 200, {"url": f"{self.endpoint}/{name}"}
        name = "/".join(path.split("/")[3:5])
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        private, files = self.repositories[name]
        if path.endswith("/preupload/main"):
            asked = json.loads(body)["files"]
            return 200, {"files": [{**entry, "uploadMode": "regular", "shouldIgnore": False} for entry in asked]}
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.commits.append(line["value"]["summary"])
                else:
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"success": True, "commitUrl": f"{self.endpoint}/{name}/commit/0", "commitOid": "0" * 40}
        assert method == "GET", (method, path)
        siblings = [{"rfilename": file} for file in files]
        return 200, {"id": name, "modelId": name, "private": private, "siblings": siblings, "tags": [], "downloads": 0}


@contextmanager
def local_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, value = hub.answer(self.command, self.path.partition("?")[0], body)
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _answer

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
