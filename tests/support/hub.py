"""A local server that speaks the Hugging Face Hub's protocol for one model, someone/small."""

import contextlib
import http.server
import json
import os
import threading
from pathlib import Path


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
