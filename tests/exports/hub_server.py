"""As much of the hub's protocol as uploading and downloading a model takes, on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler
from typing import ClassVar
from urllib.parse import unquote, urlsplit


class HubServer(BaseHTTPRequestHandler):
    """Keeps one repository, whose commits are its files by the commit's hash; `branches` point at them."""

    files: ClassVar[dict[str, dict[str, bytes]]] = {}
    branches: ClassVar[dict[str, str]] = {}
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self._body()
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            self._json({"url": self._address("/me/scenes")})
        elif "/branch/" in path:
            self.branches.setdefault(unquote(path.rpartition("/")[2]), self.branches.get("main", ""))
            self._json({})
        elif "/preupload/" in path:
            entries = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for one in json.loads(body)["files"]
            ]
            self._json({"files": entries})
        elif "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines() if line]
            kept = dict(self.files.get(self.branches.get("main", ""), {}))
            kept |= {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
            commit = hashlib.sha1(body).hexdigest()
            self.files[commit] = kept
            self.branches[unquote(path.rpartition("/")[2])] = commit
            self._json({"commitUrl": self._address(f"/me/scenes/commit/{commit}"), "commitOid": commit})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/paths-info/" in path:
            self._json([])
        else:
            self._json({"error": "no such thing"}, 404)

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:4] == ["api", "models", "me", "scenes"]:
            commit = self._commit(parts[5] if len(parts) > 5 else "main")
            if commit is None:
                self._json({"error": "Revision Not Found"}, 404, {"X-Error-Code": "RevisionNotFound"})
            elif len(parts) > 4 and parts[4] == "tree":
                files = self.files[commit]
                self._json(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for name, data in files.items()
                    ]
                )
            else:
                siblings = [{"rfilename": name} for name in self.files[commit]]
                self._json({"id": "me/scenes", "sha": commit, "siblings": siblings, "private": False, "tags": []})
        elif parts[:3] == ["me", "scenes", "resolve"] and (commit := self._commit(parts[3])) is not None:
            data = self.files[commit]["/".join(parts[4:])]
            self._send(data, 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit})
        else:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _commit(self, revision: str) -> str | None:
        return revision if revision in self.files else self.branches.get(revision)

    def _address(self, path: str) -> str:
        return f"http://{self.headers['Host']}{path}"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
