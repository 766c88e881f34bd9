"""A package index on this machine, and archives small enough to write in a test."""

import hashlib
import io
import tarfile
from pathlib import Path

from backend.archive import Archive


def pack(path: Path, files: dict[str, str], *special: tarfile.TarInfo) -> Archive:
    """Write a .tar.gz of the files, and of special members without content."""
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"top-0.6/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
        for member in special:
            tar.addfile(member)
    return Archive("some-project", path.name, hashlib.sha256(path.read_bytes()).hexdigest())


class Server:
    """Answers each path of `pages` with its bytes, and remembers what it was asked."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.pages: dict[str, bytes] = {}
        self.lengths: dict[str, int] = {}  # Content-Length where it is not the true one
        self.asked: list[tuple[str, str | None]] = []  # path, Authorization

    def offer(self, archive: Archive, content: bytes, host: str = "") -> str:
        """Put the archive into an index and return the index's URL."""
        link = f'<a href="{host}/files/{archive.filename}">{archive.filename}</a>'
        self.pages[f"/simple/{archive.project}/"] = f"<html><body>{link}</body></html>".encode()
        self.pages[f"/files/{archive.filename}"] = content
        return f"{self.url}/simple"
