"""The endpoints of the Hugging Face Hub by which clients write, for the server in `hub_server.py`.

A client creates a repository, asks how each file is uploaded, uploads large files (LFS), and then
commits: the commit names the uploaded files, and has the content of the others. It may have a
parent, which must be the head of the branch.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.sources.hub_server import LFS_SUFFIXES, Hub, HubHandler, Repo, file_entry, git_hash

_WRITE = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
    r"/(?P<what>preupload|commit|branch|paths-info)/(?P<revision>[^/]+)"
)
_LFS = re.compile(r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")


@dataclass
class WritableHub(Hub):
    """A Hub that clients write to.

    Attributes:
        token: The token that writers need; "" if they need none.
        objects: SHA-256 -> content of what was uploaded.
        uploads: The SHA-256 of each upload, in order.
        sizes: The number of files that each commit added.
        changes: The number of requests to change something so far.
        fails_from: The number of the first such request that fails; None if none does.
        fails_once: Whether only that request fails, and not all later ones too.
        status: The status of failed requests; 0 if the connection is closed without a response.
        loses_response: Whether the first failed request is still carried out.
        before_commit: Called before a commit is compared with the head.
    """

    token: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    changes: int = 0
    fails_from: int | None = None
    fails_once: bool = False
    status: int = 500
    loses_response: bool = False
    before_commit: Any = None
    lock: Any = field(default_factory=threading.Lock)


class WritableHandler(HubHandler):
    """Responds to requests that read and write."""

    hub: WritableHub

    def do_GET(self) -> None:
        hub = self.hub
        if hub.fails_from is not None and hub.changes > hub.fails_from and not hub.fails_once:
            return self._fail()
        return super().do_GET()

    def do_POST(self) -> None:
        self._change()

    def do_PUT(self) -> None:
        self._change()

    def _change(self) -> None:
        """Carry out a request to change something, unless it is one of those that fail."""
        hub, length = self.hub, self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self._read_chunks()
        path = urlsplit(self.path).path
        with hub.lock:
            number, hub.changes = hub.changes, hub.changes + 1
            hub.requests.append(f"{self.command} {unquote(path)}")
        first = hub.fails_from
        if first is not None and (number == first or (number > first and not hub.fails_once)):
            if hub.loses_response and number == first:
                self.wfile, connection = _Discarded(), self.wfile
                self._write(path, body)
                self.wfile = connection
            return self._fail()
        # The address of an upload contains its own permission.
        needs_token = hub.token and self.command != "PUT"
        if needs_token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._error(401, "", "Invalid username or password.")
        return self._write(path, body)

    def _fail(self) -> None:
        if self.hub.status:
            self._error(self.hub.status, "", "the server fails")
        else:
            self.close_connection = True

    def _read_chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _write(self, path: str, body: bytes) -> None:
        if found := _WRITE.fullmatch(path):
            repo = self.hub.repos.get((found["kind"], found["repo"]))
            if repo is None:
                return self._error(404, "RepoNotFound", "Repository not found")
            actions = {
                "preupload": self._preupload,
                "commit": self._commit,
                "branch": self._branch,
                "paths-info": self._paths_info,
            }
            return actions[found["what"]](repo, unquote(found["revision"]), body)
        if path.startswith("/lfs/"):
            return self._store(path.removeprefix("/lfs/"), body)
        endpoints = {
            "/api/repos/create": self._create,
            "/api/validate-yaml": lambda _: self._json({"errors": [], "warnings": []}, body=True),
            "/lfs-verify": self._verify,
        }
        answer = self._offer if _LFS.fullmatch(path) else endpoints.get(path)
        if answer is None:
            return self._error(404, "", f"no such endpoint: {path}")
        return answer(json.loads(body))

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        kind = {"dataset": "datasets"}.get(wanted.get("type"), "models")
        url = f"http://{self.headers['Host']}/{'' if kind == 'models' else kind + '/'}{name}"
        with self.hub.lock:
            if (kind, name) in self.hub.repos:
                return self._send(409, json.dumps({"error": "exists", "url": url}).encode())
            repo = Repo({"main": {".gitattributes": b"*.arrow filter=lfs\n"}})
            repo.private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.hub.repos[kind, name] = repo
        return self._json({"url": url, "name": name, "id": name}, body=True)

    def _preupload(self, repo: Repo, revision: str, body: bytes) -> None:
        found = repo.find(revision)
        if found is None:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        answers = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            is_lfs = path.endswith(LFS_SUFFIXES)
            answer = {
                "path": path,
                "uploadMode": "lfs" if is_lfs else "regular",
                "shouldIgnore": path in found[1].get(".gitignore", b"").decode().splitlines(),
            }
            if path in found[1]:
                data = found[1][path]
                answer["oid"] = sha256(data).hexdigest() if is_lfs else git_hash(data)
            answers.append(answer)
        return self._json({"files": answers}, body=True)

    def _offer(self, wanted: dict[str, Any]) -> None:
        """Answer which objects must be uploaded, and where to."""
        base, objects = f"http://{self.headers['Host']}", []
        for item in wanted["objects"]:
            answer: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                answer["actions"] = {
                    "upload": {"href": f"{base}/lfs/{item['oid']}"},
                    "verify": {"href": f"{base}/lfs-verify"},
                }
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects}, body=True)

    def _store(self, digest: str, body: bytes) -> None:
        if sha256(body).hexdigest() != digest:
            return self._error(400, "", "the content has another digest")
        with self.hub.lock:
            self.hub.objects[digest] = body
            self.hub.uploads.append(digest)
        return self._send(200, b"")

    def _verify(self, item: dict[str, Any]) -> None:
        if len(self.hub.objects.get(item["oid"], b"")) != item["size"]:
            return self._error(404, "", "not uploaded")
        return self._json({}, body=True)

    def _commit(self, repo: Repo, branch: str, body: bytes) -> None:
        header, *changes = [json.loads(line) for line in body.splitlines()]
        if self.hub.before_commit is not None:
            self.hub.before_commit()
        with self.hub.lock:
            if branch not in repo.heads:
                return self._error(404, "RevisionNotFound", "Invalid rev id")
            parent = header["value"].get("parentCommit")
            if parent is not None and parent != repo.heads[branch]:
                return self._error(412, "", "A commit has happened since. Please refresh.")
            files = dict(repo.commits[repo.heads[branch]])
            for change in changes:
                if not self._apply(files, change["key"], change["value"]):
                    return self._error(400, "", f"invalid operation: {change['key']}")
            self.hub.sizes.append(len(changes))
            commit = repo.add_commit(branch, files, header["value"]["summary"])
        found = _WRITE.fullmatch(urlsplit(self.path).path)
        kind = "datasets/" if found["kind"] == "datasets" else ""
        url = f"http://{self.headers['Host']}/{kind}{found['repo']}/commit/{commit}"
        return self._json({"commitUrl": url, "commitOid": commit}, body=True)

    def _apply(self, files: dict[str, bytes], kind: str, value: dict[str, Any]) -> bool:
        """Apply an operation of a commit; return whether it is valid."""
        path = value["path"]
        if kind == "file":
            files[path] = base64.b64decode(value["content"])
        elif kind == "lfsFile" and value["oid"] in self.hub.objects:
            files[path] = self.hub.objects[value["oid"]]
        elif kind == "deletedFile" and path in files:
            del files[path]
        else:
            return False
        return True

    def _branch(self, repo: Repo, branch: str, body: bytes) -> None:
        if branch in repo.heads:
            return self._error(409, "", "the branch exists")
        repo.heads[branch] = repo.heads[json.loads(body).get("startingPoint") or "main"]
        return self._send(200, b"{}")

    def _paths_info(self, repo: Repo, revision: str, body: bytes) -> None:
        found = repo.find(revision)
        if found is None:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        paths = [path for path in parse_qs(body.decode()).get("paths", []) if path in found[1]]
        return self._json([file_entry(path, found[1][path]) for path in paths], body=True)

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)


class _Discarded:
    """A connection whose client receives nothing."""

    def write(self, _: bytes) -> int:
        return 0

    def flush(self) -> None:
        pass
