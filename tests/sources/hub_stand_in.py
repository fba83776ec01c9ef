"""A Hugging Face Hub on loopback: the few endpoints that clients ask for repositories, trees and
files, with ranges and etags."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+)(?P<rest>/.*)?)?"
)
_FILE = re.compile(
    r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
)


@dataclass
class Repo:
    """A repository: the files of each revision. gated: needs a token."""

    revisions: dict[str, dict[str, bytes]]
    gated: bool = False

    def find(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and the files of a branch, or of a commit."""
        for name, files in self.revisions.items():
            commit = sha1(repr((name, sorted(files.items()))).encode()).hexdigest()
            if revision in (name, commit):
                return commit, files
        return None


@dataclass
class Hub:
    """The stand-in: its repositories by (kind, name), and what was asked of it. broken: it answers
    with errors; cuts: so many downloads end halfway."""

    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    broken: bool = False
    cuts: int = 0

    def serve(self) -> ThreadingHTTPServer:
        """Start serving on a free port of loopback."""
        hub = self

        class Handler(_Handler):
            stand_in = hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stand_in: Hub

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        # A revision may hold slashes, which clients write as %2F.
        raw = urlsplit(self.path).path
        self.stand_in.asked.append(f"{self.command} {path}")
        if self.stand_in.broken:
            return self._send(500, b"broken")
        if found := _API.fullmatch(raw):
            return self._api(found, body=body)
        if found := _FILE.fullmatch(raw):
            return self._file(found, body=body)
        return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _repo(self, kind: str, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and files, or None after the answer that there are none."""
        repo = self.stand_in.repos.get((kind, name))
        if repo is None:
            self._send(
                401,
                b"{}",
                {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"},
            )
            return None
        if repo.gated and "Authorization" not in self.headers:
            self._send(
                403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}
            )
            return None
        found = repo.find(unquote(revision))
        if found is None:
            self._send(
                404,
                b"{}",
                {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"},
            )
        return found

    def _api(self, found: re.Match[str], *, body: bool) -> None:
        answer = self._repo(found["kind"], found["repo"], found["revision"] or "main")
        if answer is None:
            return
        commit, files = answer
        if found["what"] == "tree":
            items = [
                {"type": "file", "path": name, "size": len(data), "oid": sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            return self._json(items, body=body)
        siblings = [{"rfilename": name} for name in files]
        self._json(
            {
                "id": found["repo"],
                "sha": commit,
                "siblings": siblings,
                "private": False,
                "gated": False,
                "tags": [],
            },
            body=body,
        )

    def _file(self, found: re.Match[str], *, body: bool) -> None:
        kind = "datasets" if found["kind"] else "models"
        answer = self._repo(kind, found["repo"], found["revision"])
        if answer is None:
            return
        commit, files = answer
        data = files.get(unquote(found["path"]))
        headers = {"X-Repo-Commit": commit}
        if data is None:
            return self._send(
                404,
                b"",
                {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"},
            )
        headers |= {"ETag": f'"{sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        status = 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        if body and self.stand_in.cuts and len(data) > 1000:
            self.stand_in.cuts -= 1
            self._send(status, data, headers, body=False)
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        self._send(status, data, headers, body=body)

    def _json(self, value: object, *, body: bool) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, body=body)

    def _send(
        self, status: int, data: bytes, headers: dict[str, str] | None = None, *, body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass
