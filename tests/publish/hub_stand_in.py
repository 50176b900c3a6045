"""A model hub on loopback: the part of the hub's HTTP interface that huggingface_hub calls to make a repository, send
files as git blobs or through LFS, commit, and read them back. Faults can be planted at any request."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest
import yaml

REPO = "ann/tiny-head"
WRITER, READER = "hf_WriterWriterWriterWriter", "hf_ReaderReaderReaderReader"


@dataclass
class Fault:
    """What happens to the requests whose method and path match, `times` times, after `skip` of them.

    `status` answers with an error; `cut` closes the connection: after so many bytes of the body were read, or behind
    the work (`late`), so that the client does not learn of its success.
    """

    match: str
    status: int | None = None
    message: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    late: bool = False
    times: int = 1
    skip: int = 0


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    commits: list[str] = field(default_factory=lambda: [hashlib.sha1(b"first").hexdigest()])
    snapshots: dict[str, dict[str, bytes]] = field(default_factory=dict)


class StandIn:
    """The state of the hub, and its server."""

    def __init__(self, part_bytes: int | None = None) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # large files by SHA-256, once they arrived whole
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []  # method and path
        self.part_bytes = part_bytes  # large files come in parts of this size
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def count(self, match: str) -> int:
        return sum(re.search(match, request) is not None for request in self.requests)

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times and re.search(fault.match, request):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


class _Cut(Exception):
    pass


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


class _Handler(BaseHTTPRequestHandler):
    hub: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        fault = self.hub.fault(f"{self.command} {path}")
        try:
            body = self.body(fault.cut if fault and not fault.late else None)
            if fault and fault.status:
                self.refuse(fault.status, fault.message, fault.headers)
                return
            if fault and fault.late:
                self.wfile = _Nowhere()  # type: ignore[assignment]
                self.route(path, body)
                raise _Cut
            self.route(path, body)
        except _Cut:
            self.close_connection = True
            self.connection.close()

    def body(self, cut: int | None) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().strip(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
                if cut is not None and len(body) >= cut:
                    raise _Cut
            self.rfile.readline()
            return body
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size if cut is None else min(cut, size))
        if cut is not None:
            raise _Cut
        return body

    # ---- answers ----------------------------------------------------------------------------------------------------

    def send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, content: Any, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(content).encode(), headers=headers)

    def refuse(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        told = {"X-Error-Message": message} if message else {}
        self.send(json.dumps({"error": message}).encode(), status, told | (headers or {}))

    # ---- what the hub knows -----------------------------------------------------------------------------------------

    def route(self, path: str, body: bytes) -> None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in (WRITER, READER):
            self.refuse(401, "Invalid credentials in Authorization header")
        elif path == "/api/repos/create":
            self.create(json.loads(body), given)
        elif path == "/api/validate-yaml":
            self.validate(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.info(found[1], found[2] or "main", given)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            self.preupload(found[1], json.loads(body), given)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.batch(json.loads(body), given)
        elif found := re.fullmatch(r"/objects/(\w+)(?:/(\d+))?", path):
            self.store(found[1], found[2], body)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self.commit(found[1], body, given)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(found[1], found[2], found[3], given)
        else:
            self.refuse(404, f"the stand-in does not know {self.command} {path}")

    def repository(self, name: str, given: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not given):
            self.refuse(404 if given else 401, "Repository not found", {"X-Error-Code": "RepoNotFound"})
            return None
        return found

    def may_write(self, given: str) -> bool:
        if given == WRITER:
            return True
        self.refuse(403, "You don't have the rights to write under the namespace")
        return False

    def create(self, asked: dict[str, Any], given: str) -> None:
        if not self.may_write(given):
            return
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            self.refuse(409, "You already created this model repo")
            return
        self.hub.repositories[name] = Repository(asked.get("visibility") == "private" or asked.get("private") is True)
        self.json({"url": f"{self.hub.url}/{name}"})

    def validate(self, asked: dict[str, Any]) -> None:
        front = re.match(r"---\n(.*?)\n---\n", asked["content"], re.DOTALL)
        fields = yaml.safe_load(front[1]) if front else {}
        wrong = [] if isinstance(fields.get("tags", []), list) else [{"message": '"tags" must be an array'}]
        self.json({"errors": wrong, "warnings": []})

    def info(self, name: str, revision: str, given: str) -> None:
        found = self.repository(name, given)
        if found is None:
            return
        commit = found.commits[-1] if revision == "main" else revision
        files = found.files if commit == found.commits[-1] else found.snapshots.get(commit)
        if files is None:
            self.refuse(404, "Invalid rev id", {"X-Error-Code": "RevisionNotFound"})
            return
        front = re.match(rb"---\n(.*?)\n---\n", files.get("README.md", b""), re.DOTALL)
        siblings = [
            {"rfilename": path, "size": len(content), "blobId": git_hash(content)}
            | (
                {"lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}}
                if is_large(path)
                else {}
            )
            for path, content in files.items()
        ]
        card = {"cardData": yaml.safe_load(front[1])} if front else {}
        self.json({"_id": "1", "id": name, "sha": commit, "private": found.private, "siblings": siblings} | card)

    def preupload(self, name: str, asked: dict[str, Any], given: str) -> None:
        found = self.repository(name, given)
        if found is None or not self.may_write(given):
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                "shouldIgnore": False,
                "oid": self.oid(found, file["path"]),
            }
            for file in asked["files"]
        ]
        self.json({"files": files})

    @staticmethod
    def oid(found: Repository, path: str) -> str | None:
        if path not in found.files:
            return None
        content = found.files[path]
        return hashlib.sha256(content).hexdigest() if is_large(path) else git_hash(content)

    def batch(self, asked: dict[str, Any], given: str) -> None:
        if not self.may_write(given):
            return
        objects = []
        for entry in asked["objects"]:
            known = entry | {"authenticated": True}
            if entry["oid"] not in self.hub.objects:
                href = f"{self.hub.url}/objects/{entry['oid']}"
                upload: dict[str, Any] = {"href": href}
                if size := self.hub.part_bytes:
                    count = -(-entry["size"] // size)
                    upload["header"] = {"chunk_size": str(size)}
                    upload["header"] |= {str(i): f"{href}/{i}" for i in range(1, count + 1)}
                known["actions"] = {"upload": upload}
            objects.append(known)
        self.json({"transfer": "multipart" if self.hub.part_bytes else "basic", "objects": objects})

    def store(self, oid: str, part: str | None, body: bytes) -> None:
        if part:
            self.hub.parts.setdefault(oid, {})[int(part)] = body
            self.send(b"", headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
            return
        if self.command == "POST":  # all parts are there
            # Kept: two files of one content may be under way at once.
            body = b"".join(content for _, content in sorted(self.hub.parts[oid].items()))
        if hashlib.sha256(body).hexdigest() != oid:
            self.refuse(400, "content does not match its name")
            return
        self.hub.objects[oid] = body
        self.json({})

    def commit(self, name: str, body: bytes, given: str) -> None:
        found = self.repository(name, given)
        if found is None or not self.may_write(given):
            return
        files = dict(found.files)
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            match entry["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        found.snapshots[found.commits[-1]] = found.files
        found.files = files
        commit = hashlib.sha1(body + found.commits[-1].encode()).hexdigest()
        found.commits.append(commit)
        self.json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    def resolve(self, name: str, revision: str, path: str, given: str) -> None:
        found = self.repository(name, given)
        if found is None:
            return
        files = found.files if revision in ("main", found.commits[-1]) else found.snapshots.get(revision, {})
        if path not in files:
            self.refuse(404, "Entry not found", {"X-Error-Code": "EntryNotFound"})
            return
        content = files[path]
        etag = hashlib.sha256(content).hexdigest() if is_large(path) else git_hash(content)
        headers = {"X-Repo-Commit": found.commits[-1], "ETag": f'"{etag}"', "Content-Type": "application/octet-stream"}
        begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if begin:
            start = int(begin[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.send(content[start:], 206, headers)
            return
        self.send(content, headers=headers)


class _Nowhere:
    """Swallows the answer."""

    def write(self, content: bytes) -> int:
        return len(content)

    def flush(self) -> None:
        pass


def use_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str) -> None:
    """Point the real client there. Without Xet, whose storage is another service: weights go through LFS."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "tokens"))
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)  # its waits and ours
