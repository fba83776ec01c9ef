"""A local server with the endpoints of the Hugging Face Hub that clients read.

It serves repositories, trees and files, with ranges and etags. `hub_writer.py` adds the endpoints
for writing.
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+)(?:/(?P<rest>.*))?)?"
)
_FILE = re.compile(
    r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
)


LFS_SUFFIXES = (".arrow", ".index", ".parquet", ".safetensors", ".bin")


@dataclass
class Repo:
    """A repository.

    Attributes:
        revisions: Branch -> path -> content, at the start.
        gated: Whether a token is required.
        private: Whether it was created as a private one.
        heads: Branch -> commit.
        commits: Commit -> path -> content.
        parents: Commit -> the commit before it.
        messages: The messages of the commits that clients made.
    """

    revisions: dict[str, dict[str, bytes]]
    gated: bool = False
    private: bool = False
    heads: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, files in self.revisions.items():
            self.add_commit(name, files, "")

    def add_commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        """Add a commit to a branch, and return it."""
        parent = self.heads.get(branch, "")
        content = sorted((name, sha1(data).hexdigest()) for name, data in files.items())
        commit = sha1(repr((branch, parent, content)).encode()).hexdigest()
        self.heads[branch], self.commits[commit], self.parents[commit] = commit, files, parent
        if parent:
            self.messages.append(message)
        return commit

    def find(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the commit and the files of a branch or commit, or None."""
        commit = self.heads.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


def file_entry(path: str, data: bytes) -> dict[str, Any]:
    """Return the entry of a file in a listing."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data)}
    if not path.endswith(LFS_SUFFIXES):
        return entry | {"oid": git_hash(data)}
    digest = sha256(data).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(data)}\n"
    lfs = {"oid": digest, "size": len(data), "pointerSize": len(pointer)}
    return entry | {"oid": git_hash(pointer.encode()), "lfs": lfs}


def git_hash(data: bytes) -> str:
    """Return the name that git has for a file."""
    return sha1(b"blob %d\0" % len(data) + data).hexdigest()


def list_tree(files: dict[str, bytes], folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    """Return the entries of the files and folders in a folder of a repository."""
    prefix, found = f"{folder}/" if folder else "", {}
    for path, data in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        below, parent = path[len(prefix) :].split("/"), prefix.rstrip("/")
        depths = range(1, len(below)) if recursive else range(1, min(len(below), 2))
        for depth in depths:
            name = "/".join([*([parent] if parent else []), *below[:depth]])
            found[name] = {"type": "directory", "path": name, "size": 0, "oid": git_hash(b"")}
        if recursive or len(below) == 1:
            found[path] = file_entry(path, data)
    return list(found.values())


@dataclass
class Hub:
    """The server.

    Attributes:
        repos: (kind, name) -> repository; the kind is "datasets" or "models".
        requests: The method and path of each request.
        broken: Whether each response is an error.
        cuts: The number of downloads that still end halfway.
    """

    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    broken: bool = False
    cuts: int = 0

    def serve(self, handler: type[HubHandler] | None = None) -> ThreadingHTTPServer:
        """Start serving on a free port of loopback."""
        server_hub = self

        class Handler(handler or HubHandler):  # type: ignore[misc]
            hub = server_hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server


class HubHandler(BaseHTTPRequestHandler):
    """Responds to the requests for `hub`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise, each response waits for 40 ms
    hub: Hub

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        # A revision may contain slashes, which clients write as %2F.
        raw = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.broken:
            return self._send(500, b"broken")
        if found := _API.fullmatch(raw):
            return self._api(found, body=body)
        if found := _FILE.fullmatch(raw):
            return self._file(found, body=body)
        return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _repo(self, kind: str, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the commit and files, or None after an error was sent."""
        repo = self.hub.repos.get((kind, name))
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
            is_recursive = parse_qs(urlsplit(self.path).query).get("recursive") == ["true"]
            items = list_tree(files, unquote(found["rest"] or ""), recursive=is_recursive)
            if not items and found["rest"]:
                return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
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
        if body and self.hub.cuts and len(data) > 1000:
            self.hub.cuts -= 1
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
