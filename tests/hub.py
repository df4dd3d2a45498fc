"""A stand-in for the Hugging Face Hub on localhost, of folders: what huggingface_hub asks of it."""

import hashlib
import json
import re
import threading
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """Serves models; a test changes its attributes as it goes."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.models: dict[str, Path] = {}
        """Folders by the name of the model."""
        self.gated: set[str] = set()
        """Models whose files take the token ``good``."""
        self.cut_after: int | None = None
        """Bytes of a file after which each connection breaks."""
        self.asked: list[str] = []
        """Method and path of each request."""
        self.uploaded: dict[str, dict[str, bytes]] = {}
        """Files by the name of the model."""
        self.refuses: int | None = None
        """Status of every upload."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, name: str) -> str:
        files = sorted(file for file in self.models[name].rglob("*") if file.is_file())
        return hashlib.sha1("".join(map(content_id, files)).encode()).hexdigest()


def content_id(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/\w+)?", path):
            self.say_model(match[1])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/\w+", path):
            self.say_tree(match[1])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", path):
            self.send_file(match[1], match[2])
        else:
            self.say(404, {"error": "not found"})

    do_HEAD = do_GET

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        lines = self.rfile.read(int(self.headers["Content-Length"])).decode().splitlines()
        if self.server.refuses or self.headers["Authorization"] != "Bearer good":
            self.say(self.server.refuses or 401, {"error": "not you, or not now"})
        elif path == "/api/repos/create":
            made = json.loads(lines[0])
            self.say(200, {"url": f"{self.server.endpoint}/{made['organization']}/{made['name']}"})
        elif path == "/api/validate-yaml":
            self.say(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(lines[0])["files"]
            answer = {"uploadMode": "regular", "shouldIgnore": False}
            self.say(200, {"files": [{"path": file["path"], **answer} for file in files]})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            values = [entry["value"] for entry in map(json.loads, lines) if entry["key"] == "file"]
            files = {value["path"]: b64decode(value["content"]) for value in values}
            self.server.uploaded[match[1]] = files
            url = f"{self.server.endpoint}/{match[1]}/commit/1"
            self.say(200, {"success": True, "commitOid": "1" * 40, "commitUrl": url})
        else:
            self.say(404, {"error": "not found"})

    def say(self, status: int, content: object, **headers: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def folder(self, name: str) -> Path | None:
        if name not in self.server.models:
            # As the real one: who may not know is told the same as who asks for nothing
            self.say(401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return self.server.models[name]

    def say_model(self, name: str) -> None:
        if folder := self.folder(name):
            files = [{"rfilename": path} for path in paths(folder)]
            sha = self.server.commit(name)
            self.say(200, {"id": name, "sha": sha, "private": False, "siblings": files})

    def say_tree(self, name: str) -> None:
        if folder := self.folder(name):
            self.say(
                200,
                [
                    {
                        "type": "file",
                        "path": path,
                        "size": (folder / path).stat().st_size,
                        "oid": content_id(folder / path),
                    }
                    for path in paths(folder)
                ],
            )

    def send_file(self, name: str, path: str) -> None:
        if not (folder := self.folder(name)):
            return
        if name in self.server.gated and self.headers["Authorization"] != "Bearer good":
            self.say(403, {"error": "gated"}, X_Error_Code="GatedRepo")
            return
        if not (folder / path).is_file():
            self.say(404, {"error": "no such file"}, X_Error_Code="EntryNotFound")
            return
        content = (folder / path).read_bytes()
        start = int(re.match(r"bytes=(\d+)-|", self.headers["Range"] or "")[1] or 0)
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{content_id(folder / path)}"')
        self.send_header("X-Repo-Commit", self.server.commit(name))
        self.send_header("Accept-Ranges", "bytes")
        if start:
            whole = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.send_header("Content-Range", whole)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = self.server.cut_after
        if limit is not None and len(content) - start > limit:
            self.wfile.write(content[start : start + limit])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(content[start:])


def paths(folder: Path) -> list[str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [file.relative_to(folder).as_posix() for file in files]


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve until the end of the block."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


def client(hub: Hub, cache: Path, monkeypatch, **constants: object) -> None:
    """Let huggingface_hub ask this server alone, in this process, with an empty cache."""
    import huggingface_hub.constants as of_hub

    from phi3_plugin.hub import adapter, checkpoint

    checkpoint.cache_clear()
    adapter.cache_clear()
    url = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    chosen = {"ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": False}
    for name, value in {
        **chosen,
        "HUGGINGFACE_CO_URL_TEMPLATE": url,
        "HF_TOKEN_PATH": str(cache / "no_token"),
        **constants,
    }.items():
        monkeypatch.setattr(of_hub, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
