"""A small server on the loopback that speaks the hub's API and serves raw files of commits, as GitHub does.

It answers what huggingface_hub asks for: a repository's commit, its tree, and files by HEAD and GET with redirects to a
content host, ranges and checksums in headers. Faults are set by the tests, see ``Faults``.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_LARGE = 1000  # bytes; from here on a file is stored by its SHA-256, behind a redirect


@dataclasses.dataclass
class Faults:
    """Faults of the server, by repository or path of a file."""

    statuses: dict[str, int] = dataclasses.field(default_factory=dict)  # 401, 403 (gated), 404, 503
    busy: dict[str, int] = dataclasses.field(default_factory=dict)  # answer 429 so many times
    cut: dict[str, list[int]] = dataclasses.field(default_factory=dict)  # end the next answers after so many bytes
    wrong: set[str] = dataclasses.field(default_factory=set)  # send other content of the same length
    pages: set[str] = dataclasses.field(default_factory=set)  # send a login page instead, whatever was asked for


@dataclasses.dataclass
class Hub:
    """The server's content: files by repository, ``org/name`` or ``github:owner/repo``; and what was asked."""

    repositories: dict[str, dict[str, bytes]]
    commits: dict[str, str] = dataclasses.field(default_factory=dict)  # of the default branch, COMMIT by default
    tokens: dict[str, str] = dataclasses.field(default_factory=dict)  # repositories that need this one
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)  # of files in trees, if not the true ones
    faults: Faults = dataclasses.field(default_factory=Faults)
    requests: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # method and path
    sent: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # a file's path, and its range
    address: str = ""

    def environment(self, home: Path) -> dict[str, str]:
        """Variables of a process that takes this server for the hub and for GitHub, and has its cache in ``home``."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        return kept | {
            "HF_ENDPOINT": self.address,
            "GITHUB_RAW_ENDPOINT": f"{self.address}/raw",
            "HF_HOME": str(home),
        }

    def downloads(self, name: str) -> list[str]:
        """The ranges in which the content of a file was sent."""
        return [asked for sent, asked in self.sent if sent == name]


def files_of(folder: Path, prefix: str = "") -> dict[str, bytes]:
    """The content of all files of a folder by their paths."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {prefix + path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def git_sha1(content: bytes) -> str:
    """The name that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextlib.contextmanager
def serve(repositories: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    """Serves the repositories until the ``with`` ends."""
    hub = Hub(repositories)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_args) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer("HEAD")

        def do_GET(self) -> None:
            self.answer("GET")

        def answer(self, method: str) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((method, path))
            parts = path.strip("/").split("/")
            if parts[0] == "api":
                self.api(parts[1:])
            elif parts[0] == "content":
                repository, name = find(parts[1])
                self.content(repository[name], name)
            elif parts[0] == "raw":
                self.file(f"github:{parts[1]}/{parts[2]}", parts[3], "/".join(parts[4:]))
            else:
                assert parts[2] == "resolve", path
                self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

        def api(self, parts: list[str]) -> None:
            repo = "/".join(parts[1:3])  # after "models"
            if parts[0] != "models":
                self.reply(404, b"")
                return
            if self.refused(repo):
                return
            revision = parts[4] if len(parts) > 4 else "main"
            commit = hub.commits.get(repo, COMMIT) if revision == "main" else revision
            if len(commit) != 40:
                self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif len(parts) > 3 and parts[3] == "tree":
                self.reply(200, json.dumps(tree(hub.repositories[repo], hub.sizes)).encode())
            else:
                siblings = [{"rfilename": name} for name in hub.repositories[repo]]
                self.reply(200, json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode())

        def file(self, repo: str, commit: str, name: str) -> None:
            if self.refused(repo) or self.refused(name, repository=False):
                return
            content = hub.repositories[repo].get(name)
            if content is None:
                self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            elif repo.startswith("github:") or len(content) < _LARGE:
                self.content(content, name, {"ETag": f'"{git_sha1(content)}"', "X-Repo-Commit": commit})
            else:
                digest = hashlib.sha256(content).hexdigest()
                large = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content)), "X-Repo-Commit": commit}
                self.reply(302, b"", large | {"Location": f"{hub.address}/content/{digest}"})

        def content(self, content: bytes, name: str, headers: dict[str, str] | None = None) -> None:
            if self.command == "GET":
                hub.sent.append((name, self.headers.get("Range", "")))
            if name in hub.faults.pages:
                self.reply(200, b"<html>log in</html>" * 99, {"Content-Type": "text/html"})
                return
            if name in hub.faults.wrong:
                content = bytes(len(content))
            status, headers = 200, headers or {}
            if (asked := self.headers.get("Range", "")).startswith("bytes="):
                first = int(asked.removeprefix("bytes=").partition("-")[0])
                headers = headers | {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"}
                status, content = 206, content[first:]
            cuts = hub.faults.cut.get(name) if self.command == "GET" else None
            self.reply(status, content, headers, cut=cuts.pop(0) if cuts else None)

        def refused(self, what: str, repository: bool = True) -> bool:
            if hub.faults.busy.get(what, 0) > 0:
                hub.faults.busy[what] -= 1
                self.reply(429, b"", {"Retry-After": "0"})
                return True
            status = hub.faults.statuses.get(what, 200)
            token = hub.tokens.get(what)
            if token and self.headers.get("Authorization") != f"Bearer {token}":
                status = 403
            if repository and what not in hub.repositories:
                status = 404
            code = {401: "RepoNotFound", 403: "GatedRepo", 404: "RepoNotFound"}.get(status, "")
            code = "" if self.path.startswith("/raw/") else code
            if status != 200:
                self.reply(status, b"{}", {"X-Error-Code": code} if code else {})
            return status != 200

        def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None, cut: int | None = None):
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content[:cut])
            if cut is not None:
                self.close_connection = True
                self.wfile.flush()
                self.connection.shutdown(2)

    def find(digest: str) -> tuple[dict[str, bytes], str]:
        for repository in hub.repositories.values():
            for name, content in repository.items():
                if hashlib.sha256(content).hexdigest() == digest:
                    return repository, name
        raise AssertionError(digest)

    def tree(files: dict[str, bytes], sizes: dict[str, int]) -> list[dict[str, object]]:
        entries: list[dict[str, object]] = []
        for name, content in files.items():
            size = sizes.get(name, len(content))
            entry: dict[str, object] = {"type": "file", "path": name, "size": size, "oid": git_sha1(content)}
            if len(content) >= _LARGE:
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": size, "pointerSize": 130}
            entries.append(entry)
        folders = {name.rpartition("/")[0] for name in files if "/" in name}
        return entries + [{"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(folders)]

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
