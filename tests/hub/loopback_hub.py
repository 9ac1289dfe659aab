"""A Hub on loopback: keeps repositories, checks hashes and tokens, fails when it is told to.

It speaks what the unmodified `huggingface_hub` client asks for when it creates, pushes, lists and loads models. Point
the client at `LoopbackHub.url` through its `endpoint` argument, or through HF_ENDPOINT before it is imported.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITE_TOKEN, READ_TOKEN = "hf_loopback_write", "hf_loopback_read"
USER = "tester"
LARGE_FILES = ("*.safetensors", "*.bin")


@dataclass
class Commit:
    message: str
    files: dict[str, bytes]

    @property
    def oid(self) -> str:
        listing = sorted((path, git_oid(data)) for path, data in self.files.items())
        return hashlib.sha1(repr((self.message, listing)).encode()).hexdigest()


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [Commit("initial commit", {})]})
    pull_requests: list[str] = field(default_factory=list)

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.oid == revision), None)

    @property
    def files(self) -> dict[str, bytes]:
        return self.branches["main"][-1].files


@dataclass
class Fault:
    pattern: str
    status: int | None
    times: int
    seconds: float = 0.0


class LoopbackHub:
    """Args: lfs: answer that large files go the LFS way (the client then needs HF_HUB_DISABLE_XET=1)."""

    def __init__(self, lfs: bool = False) -> None:
        self.lfs = lfs
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        # Bytes of files that were read, by path.
        self.served: Counter[str] = Counter()
        # False: answer with whole files whatever part is asked for.
        self.ranges = True
        self.unhandled: list[str] = []
        self.faults: list[Fault] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def fail(self, pattern: str, status: int | None, times: int = 1) -> None:
        """Answer the next `times` requests that match with `status`; None drops the connection instead."""
        self.faults.append(Fault(pattern, status, times))

    def delay(self, pattern: str, seconds: float, times: int = 1) -> None:
        """Answer the next `times` requests that match as always, but later."""
        self.faults.append(Fault(pattern, 200, times, seconds))

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Refused(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub
    repo_id = r"(?P<repo>[^/]+/[^/]+)"
    routes = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", rf"/api/models/{repo_id}/branch/(?P<branch>.+)", "create_branch"),
        ("POST", rf"/api/models/{repo_id}/discussions", "open_pull_request"),
        ("GET", rf"/api/models/{repo_id}/discussions/(?P<num>\d+)", "pull_request"),
        ("POST", rf"/api/models/{repo_id}/preupload/(?P<rev>.+)", "preupload"),
        ("POST", rf"/api/models/{repo_id}/commit/(?P<rev>.+)", "commit"),
        ("POST", rf"/{repo_id}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/_lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
        ("GET", rf"/api/models/{repo_id}/tree/(?P<rev>[^?]+?)(?:/additional_chat_templates)?", "tree"),
        ("GET", rf"/api/models/{repo_id}/revision/(?P<rev>.+)", "info"),
        ("GET", rf"/api/models/{repo_id}", "info"),
        ("GET|HEAD", rf"/{repo_id}/resolve/(?P<rev>refs/pr/\d+|[^/]+)/(?P<path>.+)", "resolve"),
    )

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        self.body = self.read_body()
        line = f"{self.command} {path}"
        self.hub.requests.append(line)
        for fault in self.hub.faults:
            if fault.times and re.search(fault.pattern, line):
                fault.times -= 1
                if fault.seconds:
                    time.sleep(fault.seconds)
                    break
                if fault.status is None:
                    self.close_connection = True
                    return self.connection.shutdown(socket.SHUT_RDWR)
                return self.refuse(fault.status, "", f"told to answer {fault.status}")
        for methods, pattern, name in self.routes:
            if self.command in methods.split("|") and (match := re.fullmatch(pattern, path)):
                try:
                    return getattr(self, name)(**match.groupdict())
                except _Refused as refused:
                    return self.refuse(refused.status, refused.code, refused.message)
        self.hub.unhandled.append(line)
        return self.refuse(404, "EntryNotFound", f"no such route: {line}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    # --- account and repository

    def whoami(self) -> None:
        role = "write" if self.token() == WRITE_TOKEN else "read"
        self.require_token()
        self.send({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def validate_yaml(self) -> None:
        errors = card_errors(json.loads(self.body)["content"])
        self.send({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def create(self) -> None:
        self.require_write()
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if not name.startswith(USER + "/"):
            raise _Refused(403, "", "You don't have the rights to create a model under this namespace")
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            return self.send({"error": "You already created this model repo", "url": url}, status=409)
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.repos[name] = Repo(private)
        return self.send({"url": url, "name": name, "id": name})

    def create_branch(self, repo: str, branch: str) -> None:
        self.require_write()
        found = self.repo(repo)
        if branch in found.branches:
            raise _Refused(409, "", "Reference already exists")
        found.branches[branch] = list(found.branches["main"])
        self.send({})

    def open_pull_request(self, repo: str) -> None:
        self.require_token()
        found = self.repo(repo)
        found.pull_requests.append(json.loads(self.body)["title"])
        num = len(found.pull_requests)
        found.branches[f"refs/pr/{num}"] = list(found.branches["main"])
        self.send({"num": num})

    def pull_request(self, repo: str, num: str) -> None:
        title = self.repo(repo).pull_requests[int(num) - 1]
        self.send({
            "title": title, "num": int(num), "author": {"name": USER}, "createdAt": "2026-01-01T00:00:00.000Z",
            "status": "draft", "repo": {"name": repo, "type": "model"}, "isPullRequest": True, "events": [],
            "filesWithConflicts": [], "changes": {"base": "refs/heads/main"}, "diff": "",
        })  # fmt: skip

    # --- upload

    def preupload(self, repo: str, rev: str) -> None:
        files = self.at(repo, rev).files
        modes = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            large = self.hub.lfs and any(fnmatch.fnmatch(path, pattern) for pattern in LARGE_FILES)
            modes.append({"path": path, "shouldIgnore": False, "uploadMode": "lfs" if large else "regular",
                          "oid": git_oid(files[path]) if path in files else None})  # fmt: skip
        self.send({"files": modes})

    def lfs_batch(self, repo: str) -> None:
        self.require_write()
        objects = []
        for asked in json.loads(self.body)["objects"]:
            known = asked["oid"] in self.hub.blobs
            actions = {} if known else {"actions": {"upload": {"href": f"{self.hub.url}/_lfs/{asked['oid']}"}}}
            objects.append({"oid": asked["oid"], "size": asked["size"], **actions})
        self.send({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, "", "the bytes do not have the hash that was announced")
        self.hub.blobs[oid] = self.body
        self.send({})

    def commit(self, repo: str, rev: str) -> None:
        as_request = bool(self.query.get("create_pr"))
        if as_request or rev.startswith("refs/pr/"):
            self.require_token()
        else:
            self.require_write()
        found, files, message = self.repo(repo), dict(self.at(repo, rev).files), ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"], validate=True)
            elif key == "lfsFile":
                if len(self.hub.blobs.get(value["oid"], b"")) != value["size"]:
                    raise _Refused(400, "", f"{value['path']} points to an object that was not uploaded")
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise _Refused(400, "", f"unknown operation {key}")
            if value.get("path") == "README.md" and (errors := card_errors(files["README.md"].decode())):
                raise _Refused(400, "", errors[0]["message"])
        new, told = Commit(message, files), {}
        if as_request:
            found.pull_requests.append(message)
            rev = f"refs/pr/{len(found.pull_requests)}"
            found.branches[rev] = list(found.branches["main"])
            told = {"pullRequestUrl": f"{self.hub.url}/{repo}/discussions/{len(found.pull_requests)}"}
        found.branches[rev].append(new)
        url = f"{self.hub.url}/{repo}/commit/{new.oid}"
        self.send({"success": True, "commitOid": new.oid, "commitUrl": url, "hookOutput": "", **told})

    # --- read

    def info(self, repo: str, rev: str = "main") -> None:
        commit = self.at(repo, rev)
        self.send({"_id": "0", "id": repo, "modelId": repo, "sha": commit.oid, "private": self.repo(repo).private,
                   "tags": [], "downloads": 0, "likes": 0,
                   "siblings": [{"rfilename": path} for path in commit.files]})  # fmt: skip

    def tree(self, repo: str, rev: str) -> None:
        if urlsplit(self.path).path.endswith("/additional_chat_templates"):
            raise _Refused(404, "EntryNotFound", "Entry not found")
        files = self.at(repo, rev).files.items()
        self.send([{"type": "file", "path": p, "size": len(data), "oid": git_oid(data)} for p, data in files])

    def resolve(self, repo: str, rev: str, path: str) -> None:
        commit = self.at(repo, rev)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            headers["X-Error-Code"] = "EntryNotFound"
            return self.send(b"Entry not found", status=404, headers=headers)
        data = commit.files[path]
        headers["ETag"] = f'"{git_oid(data)}"'
        if (asked := self.headers.get("Range")) and self.hub.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            part = data[int(first) : int(last) + 1 if last else len(data)]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
            self.hub.served[path] += len(part) if self.command == "GET" else 0
            return self.send(part, status=206, headers=headers, kind="application/octet-stream")
        self.hub.served[path] += len(data) if self.command == "GET" else 0
        return self.send(data, headers=headers, kind="application/octet-stream")

    # --- below the routes

    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def require_token(self) -> None:
        if self.token() not in (WRITE_TOKEN, READ_TOKEN):
            raise _Refused(401, "", "Invalid username or password.")

    def require_write(self) -> None:
        self.require_token()
        if self.token() != WRITE_TOKEN:
            raise _Refused(403, "", "Your token has no write access")

    def repo(self, name: str) -> Repo:
        found = self.hub.repos.get(name)
        if found is None or (found.private and self.token() not in (WRITE_TOKEN, READ_TOKEN)):
            raise _Refused(404 if self.token() else 401, "RepoNotFound", "Repository not found")
        return found

    def at(self, repo: str, revision: str) -> Commit:
        found = self.repo(repo).find(revision)
        if found is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().strip(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(
        self,
        body: object,
        status: int = 200,
        headers: dict[str, str] | None = None,
        kind: str = "application/json",
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.send({"error": message}, status=status, headers=headers)

    def log_message(self, *args: object) -> None:
        pass


def card_errors(text: str) -> list[dict[str, str]]:
    """What the Hub would refuse in the YAML header of a card, for the parts that hf_sparse writes."""
    found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", text, re.DOTALL)
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        return [{"message": f"Invalid YAML: {error}"}]
    wrong = [name for name, kind in (("base_model", str | list), ("tags", list), ("datasets", list), ("metrics", list),
                                     ("license", str), ("library_name", str), ("pipeline_tag", str))
             if not isinstance(data.get(name, kind() if isinstance(kind, type) else ""), kind)]  # fmt: skip
    relations = ("adapter", "merge", "quantized", "finetune")
    wrong += [] if data.get("base_model_relation", "finetune") in relations else ["base_model_relation"]
    for model in data.get("model-index", []):
        for i, result in enumerate(model.get("results") or [{}]):
            whole = (
                isinstance(model.get("name"), str)
                and isinstance(result.get("task", {}).get("type"), str)
                and all(isinstance(result.get("dataset", {}).get(key), str) for key in ("type", "name"))
                and result.get("metrics")
                and all(isinstance(x.get("type"), str) and "value" in x for x in result["metrics"])
            )
            wrong += [] if whole else [f"model-index[0].results[{i}]"]
    return [{"message": f'"{name}" is not valid'} for name in wrong]


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
