"""Local servers that speak the Hugging Face Hub's protocol.

`hub` serves one model, someone/small. `account` receives repositories of the user `me`, who can
write for the organisation `team` and read that of `readers`.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import threading
from pathlib import Path

import huggingface_hub.constants
import yaml


@contextlib.contextmanager
def hub(folder, cache):
    """Serves a folder's files; gives the environment for a process, and the names fetched so far.

    The process downloads into `cache`.
    """
    handler = type("Handler", (_Hub,), {"folder": folder, "fetched": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield (
                os.environ
                | {
                    "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                    "HF_HOME": str(cache),
                    "HF_HUB_OFFLINE": "0",
                },
                handler.fetched,
            )
        finally:
            server.shutdown()


class _Hub(http.server.BaseHTTPRequestHandler):
    """The answers that huggingface_hub asks of a server: a revision's files, and each of them."""

    folder, revision, fetched = Path(), "1" * 40, []

    def do_HEAD(self):
        self.answer(send=False)

    def do_GET(self):
        self.answer(send=True)

    def answer(self, send):
        head = {}
        if self.path.startswith("/api/models/someone/small/tree/"):
            files = [path for path in self.folder.rglob("*") if path.is_file()]
            content = json.dumps(
                [
                    {"type": "file", "path": str(path.relative_to(self.folder)), "oid": path.name,
                     "size": path.stat().st_size}
                    for path in files
                ]
            ).encode()  # fmt: skip
        elif self.path.startswith("/api/models/someone/small"):
            content = json.dumps({"id": "someone/small", "sha": self.revision}).encode()
        else:
            name = self.path.partition(f"/someone/small/resolve/{self.revision}/")[2]
            content = (self.folder / name).read_bytes()
            head = {"ETag": f'"{name}"', "X-Repo-Commit": self.revision}
            if send:
                self.fetched.append(name)
        self.send_response(200)
        for key, value in {**head, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if send:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def account(monkeypatch, token="good"):
    """Gives a server; this process's Hub client speaks to it, over LFS, with this token or none."""
    handler = type(
        "Handler", (_Account,), dict(repositories={}, private=set(), stored={}, asked=[])
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        handler.address = f"http://127.0.0.1:{server.server_port}"
        for name, value in {
            "ENDPOINT": handler.address,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": "/nowhere",
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        try:
            yield handler
        finally:
            server.shutdown()


class _Account(http.server.BaseHTTPRequestHandler):
    """The answers that huggingface_hub asks of a server to which it uploads.

    repositories holds {id: {file: content}}, private the ids created so, stored the uploads by
    their hash, asked the requests. After `lives` uploads the server dies.
    """

    repositories, private, stored, asked, lives, address = {}, set(), {}, [], 1000, ""
    roles = {"good": "write", "reads": "read"}  # noqa: RUF012

    def do_GET(self):
        self.received(b"")

    def do_POST(self):
        self.received(self.rfile.read(int(self.headers["Content-Length"])))

    def do_PUT(self):
        if (left := int(self.headers.get("Content-Length", 0))) == 0:
            return self.answer({"error": "no content"}, 400)
        type(self).lives -= 1
        if self.lives < 0:
            self.rfile.read(left // 2)
            self.close_connection = True
            return self.connection.close()
        content = self.rfile.read(left)
        name = self.path.removeprefix("/lfs/")
        assert name == hashlib.sha256(content).hexdigest()
        self.stored[name] = content
        self.answer({})

    def received(self, body):
        self.asked.append(f"{self.command} {self.path}")
        path, _, _ = self.path.partition("?")
        if path == "/api/validate-yaml":
            card = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            known = {"base_model", "library_name", "license", "pipeline_tag", "tags"}
            errors = [{"message": name} for name in card if name not in known]
            if not all(isinstance(tag, str) for tag in card["tags"]):
                errors.append({"message": "tags"})
            return self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.roles:
            return self.answer({"error": "Invalid credentials"}, 401)
        if path == "/api/whoami-v2":
            orgs = [
                {"name": "team", "roleInOrg": "write"},
                {"name": "readers", "roleInOrg": "read"},
            ]
            auth = {"accessToken": {"role": self.roles[token]}}
            return self.answer({"name": "me", "orgs": orgs, "auth": auth})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        name, rest = self.repository(path)
        if name not in self.repositories:
            return self.answer({"error": "none"}, 404, {"X-Error-Code": "RepoNotFound"})
        if rest.startswith("tree/"):
            files = self.repositories[name].items()
            entry = {"type": "file", "oid": "0" * 40}
            return self.answer([entry | {"path": p, "size": len(c)} for p, c in files])
        if rest.startswith("preupload/"):
            return self.answer({"files": [self.mode(f) for f in json.loads(body)["files"]]})
        if rest == "info/lfs/objects/batch":
            return self.answer({"objects": [self.place(o) for o in json.loads(body)["objects"]]})
        if rest.startswith("commit/"):
            self.commit(self.repositories[name], map(json.loads, body.splitlines()))
            url = f"{self.address}/{name}/commit/{'1' * 40}"
            return self.answer({"commitUrl": url, "commitOid": "1" * 40})
        return self.answer({"error": f"{self.path} is unknown"}, 400)

    @staticmethod
    def repository(path):
        """The id that a path names, and what follows it."""
        parts = path.removeprefix("/api/models").removeprefix("/").split("/", 2)
        return "/".join(parts[:2]).removesuffix(".git"), parts[2] if len(parts) > 2 else ""

    def create(self, asked):
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if asked["name"] == "forbidden":
            return self.answer({}, 403, {"X-Error-Message": "You have no rights to create this"})
        if name in self.repositories:
            url = f"{self.address}/{name}"
            return self.answer({"error": "You already created this repo", "url": url}, 409)
        if asked.get("private") or asked.get("visibility") == "private":
            self.private.add(name)
        self.repositories[name] = {".gitattributes": b"lfs"}
        return self.answer({"url": f"{self.address}/{name}"})

    @staticmethod
    def mode(file):
        large = file["path"].endswith(".safetensors")
        mode = "lfs" if large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def place(self, asked):
        upload = {"href": f"{self.address}/lfs/{asked['oid']}"}
        return asked | ({} if asked["oid"] in self.stored else {"actions": {"upload": upload}})

    def commit(self, files, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]

    def answer(self, value, status=200, more=()):
        content = json.dumps(value).encode()
        self.send_response(status)
        head = {"Content-Type": "application/json", "Content-Length": len(content)} | dict(more)
        for key, each in head.items():
            self.send_header(key, str(each))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass
