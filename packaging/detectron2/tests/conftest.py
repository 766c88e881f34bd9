"""A package index for tests, and an environment that names none."""

import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

write_bytecode = sys.dont_write_bytecode
import backend.download  # noqa: E402
import backend.indexes  # noqa: E402
from local_index import Server  # noqa: E402

sys.dont_write_bytecode = write_bytecode  # the backend turns it off for good

INDEX_VARIABLES = (*backend.indexes.MAIN_VARIABLES, *backend.indexes.FURTHER_VARIABLES)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the indexes and the copy that the user of this machine has configured."""
    for variable in (*INDEX_VARIABLES, "DETECTRON2_SDIST"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = fake.pages.get(self.path)
            fake.asked.append((self.path, self.headers["Authorization"]))
            self.send_response(404 if page is None else 200)
            self.send_header("Content-Type", "text/html")
            length = fake.lengths.get(self.path, len(page or b""))
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(page or b"")

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        fake = Server(http.server_port)
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield fake
        http.shutdown()
