"""A small Hugging Face Hub in memory: the routes that huggingface_hub and datasets call, and faults on demand.

Real libraries talk to it through HF_ENDPOINT. What it does not know it answers with 501, so that a new route shows.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"  # tokens: the second may not write
GIT_ATTRIBUTES = {".gitattributes": b"*.parquet filter=lfs\n"}


@dataclass
class Repo:
    """A repository: its commits, the newest last, each all the files."""

    private: bool = False
    gated: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits.append((oid, files))
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        revision = self.commits[-1][0] if revision == "main" else self.tags.get(revision, revision)
        return next((commit for commit in self.commits if commit[0] == revision), None)


@dataclass
class Fault:
    """What the next requests that match get in place of an answer."""

    method: str
    path: str  # a regular expression
    status: int | None = None  # none: the connection is cut
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    after: bool = False  # the work is done, and the answer lost
    delay: float = 0.0  # seconds; then the answer comes


class Hub(ThreadingHTTPServer):
    """The server."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.forget()

    def forget(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []

    def dataset(self, name: str, files: dict[str, bytes] | None = None, **options: Any) -> Repo:
        return self.repository("dataset", name, files, **options)

    def repository(self, kind: str, name: str, files: dict[str, bytes] | None = None, **options: Any) -> Repo:
        repo = self.repos.setdefault((kind, name), Repo(**options))
        repo.commit(GIT_ATTRIBUTES | (files or {}))
        return repo


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def do(self) -> None:
        self.url = urlsplit(self.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.log.append(f"{self.command} {unquote(self.url.path)}")
        fault = self._fault()
        if fault and fault.delay:
            time.sleep(fault.delay)
        elif fault and not fault.after:
            self._fail(fault)
            return
        try:
            self._route(unquote(self.url.path))
        except Refusal as refusal:
            named = {"X-Error-Code": refusal.code} if refusal.code else {}
            said = {"X-Error-Message": refusal.message} if refusal.message else {}
            self._answer({"error": refusal.message or refusal.code}, refusal.status, named | said)

    do_GET = do_HEAD = do_POST = do_PUT = do

    def _fault(self) -> Fault | None:
        for fault in self.server.faults:
            if fault.times and fault.method == self.command and re.search(fault.path, self.url.path):
                fault.times -= 1
                self.lost = fault.after
                return fault
        self.lost = False
        return None

    def _fail(self, fault: Fault) -> None:
        if fault.status is None:
            self.close_connection = True
            self.connection.close()
            return
        code = {"X-Error-Code": "GatedRepo"} if fault.headers.get("gated") else {}
        self._answer(
            {"error": f"injected {fault.status}", "url": f"{self.server.url}/datasets/me/x"},
            fault.status,
            fault.headers | code,
        )

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if self.lost:
            self.close_connection = True
            self.connection.close()
            return
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def token(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if token not in (None, WRITER, READER):
            raise Refusal(401, message="Invalid credentials in Authorization header")
        return token

    def _may_write(self, name: str) -> None:
        if self.token is None:
            raise Refusal(401)
        if self.token != WRITER or not name.startswith("me/"):
            raise Refusal(403, message="You don't have the rights to write")

    def _repo(self, name: str, kind: str = "dataset") -> Repo:
        repo, token = self.server.repos.get((kind, name)), self.token
        if repo is None or (repo.private and token != WRITER):
            raise Refusal(404 if token else 401, "RepoNotFound")
        if repo.gated and token != WRITER:
            raise Refusal(403, "GatedRepo")
        return repo

    def _at(self, name: str, revision: str, kind: str = "dataset") -> tuple[str, dict[str, bytes]]:
        commit = self._repo(name, kind).at(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound")
        return commit

    def _route(self, path: str) -> None:
        for pattern, handle in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                handle(self, **match.groupdict())
                return
        self.server.log.append(f"no route {self.command} {path}")
        self._answer({"error": self.server.log[-1]}, 501)

    def break_down(self) -> None:
        self.server.faults = [Fault(**told) for told in json.loads(self.body)]
        self.server.blobs.clear()  # so that files are uploaded again
        self._answer({})

    def whoami(self) -> None:
        if self.token is None:
            raise Refusal(401)
        self._answer({"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self) -> None:
        told = json.loads(self.body)
        name = f"{told.get('organization') or 'me'}/{told['name']}"
        if name.startswith("me/") or self.token != WRITER:
            self._may_write(name)
        else:
            raise Refusal(403, message="You don't have the rights to create a dataset under this namespace")
        if ("dataset", name) in self.server.repos:
            status, error = 409, {"error": "You already created this dataset repo"}
        else:
            status, error = 200, {}
            self.server.dataset(name, private=told.get("visibility") == "private")
        self._answer({"url": f"{self.server.url}/datasets/{name}", "name": name} | error, status)

    def may_write(self, name: str) -> None:
        self._repo(name)
        self._may_write(name)
        self._answer({})

    def info(self, name: str, kind: str, revision: str = "main") -> None:
        oid, files = self._at(name, revision, kind)
        siblings = [{"rfilename": file} for file in sorted(files)]
        told = {"id": name, "sha": oid, "private": self._repo(name, kind).private, "siblings": siblings, "tags": []}
        self._answer(told)

    def tree(self, name: str, kind: str, revision: str, folder: str | None = None) -> None:
        _, files = self._at(name, revision, kind)
        inside = f"{folder.strip('/')}/" if folder and folder.strip("/") else ""
        recursive = parse_qs(self.url.query).get("recursive", ["false"])[0].lower() in ("true", "1")
        entries, folders = [], set()
        for file, content in sorted(files.items()):
            if not file.startswith(inside):
                continue
            *above, _ = file[len(inside) :].split("/")
            folders |= {inside + "/".join(above[: n + 1]) for n in range(len(above))}
            if recursive or not above:
                entries.append(_entry(file, content))
        if inside and not entries and not folders:
            raise Refusal(404, "EntryNotFound")
        shown = [each for each in sorted(folders) if recursive or each.count("/") == inside.count("/")]
        self._answer([{"type": "directory", "path": each, "size": 0, "oid": "0" * 40} for each in shown] + entries)

    def paths_info(self, name: str, revision: str) -> None:
        _, files = self._at(name, revision)
        if "json" in self.headers.get("Content-Type", ""):
            asked = json.loads(self.body)["paths"]
        else:
            asked = parse_qs(self.body.decode())["paths"]
        found = [_entry(file, files[file]) for file in asked if file in files]
        folders = [each for each in asked if any(file.startswith(f"{each.rstrip('/')}/") for file in files)]
        self._answer(found + [{"type": "directory", "path": each, "size": 0, "oid": "0" * 40} for each in folders])

    def refs(self, name: str) -> None:
        repo = self._repo(name)
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": oid} for tag, oid in repo.tags.items()]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.commits[-1][0]}
        self._answer({"branches": [main], "tags": tags, "converts": []})

    def make_tag(self, name: str, revision: str) -> None:
        self._may_write(name)
        tag, oid = json.loads(self.body)["tag"], self._at(name, revision)[0]
        if tag in self._repo(name).tags:
            raise Refusal(409, message="Tag already exists")
        self._repo(name).tags[tag] = oid
        self._answer({})

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        ok = content.startswith("---\n") and "\n---\n" in content[4:]
        self._answer({"errors": [] if ok else [{"message": "no YAML"}], "warnings": []}, 200 if ok else 400)

    def preupload(self, name: str, revision: str) -> None:
        self._may_write(name)
        _, files = self._at(name, revision)
        answer = []
        for file in json.loads(self.body)["files"]:
            kept = files.get(file["path"])
            large = _is_lfs(file["path"])
            oid = None if kept is None else hashlib.sha256(kept).hexdigest() if large else _git_oid(kept)
            mode = "lfs" if large else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer({"files": answer})

    def batch(self, name: str) -> None:
        self._may_write(name)
        objects = []
        for each in json.loads(self.body)["objects"]:
            actions = {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}", "header": {}}}
            objects.append(each if each["oid"] in self.server.blobs else each | {"actions": actions})
        self._answer({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, message="not what was said")
        self.server.blobs[oid] = self.body
        self._answer({})

    def make_commit(self, name: str, revision: str) -> None:
        self._may_write(name)
        repo = self._repo(name)
        head, files = repo.commits[-1]
        files = dict(files)
        for line in self.body.splitlines():
            told = json.loads(line)
            value = told["value"]
            if told["key"] == "header" and value.get("parentCommit", head) != head:
                raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
            if told["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if told["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            if told["key"] == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(files)
        self._answer({"commitUrl": f"{self.server.url}/datasets/{name}/commit/{oid}", "commitOid": oid})

    def resolve(self, name: str, revision: str, file: str, folder: str | None) -> None:
        oid, files = self._at(name, revision, "dataset" if folder else "model")
        if file not in files:
            raise Refusal(404, "EntryNotFound")
        content = files[file]
        etag = hashlib.sha256(content).hexdigest() if _is_lfs(file) else _git_oid(content)
        headers = {"X-Repo-Commit": oid, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if ranged := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(ranged[1]), min(int(ranged[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            self._answer(content[start : end + 1], 206, headers)
        else:
            self._answer(content, 200, headers)


def _is_lfs(file: str) -> bool:
    return file.endswith((".parquet", ".safetensors", ".png"))


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(file: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": file, "size": len(content), "oid": _git_oid(content)}
    if _is_lfs(file):
        oid = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
    return entry


NAME = r"(?P<name>[^/]+/[^/]+)"
API = rf"/api/datasets/{NAME}"
REVISION = "(?P<revision>[^/]+)"
ROUTES = [
    ("POST /faults", Handler.break_down),
    ("GET /api/whoami-v2", Handler.whoami),
    ("GET /api/agent-harnesses", lambda handler: handler._answer({})),  # which tool is at work
    ("POST /api/repos/create", Handler.create),
    ("POST /api/validate-yaml", Handler.validate),
    (f"GET {API}/auth-check/write", Handler.may_write),
    (f"GET {API}/refs", Handler.refs),
    (rf"GET /api/(?P<kind>dataset|model)s/{NAME}", Handler.info),
    (rf"GET /api/(?P<kind>dataset|model)s/{NAME}/revision/{REVISION}", Handler.info),
    (rf"GET /api/(?P<kind>dataset|model)s/{NAME}/tree/{REVISION}(?P<folder>/.*)?", Handler.tree),
    (f"POST {API}/paths-info/{REVISION}", Handler.paths_info),
    (f"POST {API}/tag/{REVISION}", Handler.make_tag),
    (f"POST {API}/preupload/{REVISION}", Handler.preupload),
    (f"POST {API}/commit/{REVISION}", Handler.make_commit),
    (f"POST /datasets/{NAME}.git/info/lfs/objects/batch", Handler.batch),
    ("PUT /lfs/(?P<oid>[0-9a-f]+)", Handler.put),
    (f"(GET|HEAD) /(?P<folder>datasets/)?{NAME}/resolve/{REVISION}/(?P<file>.+)", Handler.resolve),
]
