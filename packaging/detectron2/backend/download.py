"""Finds the archive in package indexes and downloads it."""

import io
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import requests
from pypi_simple import DistributionPackage, NoSuchProjectError, PyPISimple
from requests.adapters import BaseAdapter, HTTPAdapter
from urllib3.util import Retry

from .archive import LOCAL_COPY_VARIABLE, Archive, BuildError, mismatch

TIMEOUT = (10, 30)  # seconds to connect, and between two pieces of the answer
RETRIES = Retry(total=3, backoff_factor=0.5, status_forcelist=(500, 502, 503, 504))


def download(archive: Archive, indexes: list[str], directory: Path) -> Path:
    """Return the verified archive from the first index that has it."""
    failures = []
    for index in indexes:
        try:
            return _download_from(index, archive, directory)
        except (BuildError, NoSuchProjectError, requests.RequestException, ValueError) as error:
            failures.append(f"{_public_name(index)} {_reason(error)}")
    raise BuildError(
        f"cannot download {archive.filename}, because {' and '.join(failures)}: check the "
        "connection, set PIP_INDEX_URL or UV_DEFAULT_INDEX to an index that has it, "
        f"or set {LOCAL_COPY_VARIABLE} to the path of a copy."
    )


def _download_from(index: str, archive: Archive, directory: Path) -> Path:
    path = directory / archive.filename
    with _client(index) as client:
        package = _find(client, archive)
        # `mismatch` compares it with the digest in archive.py, not with the one of the index.
        client.download_package(package, path, verify=False, timeout=TIMEOUT)
    if problem := mismatch(path, archive):
        raise BuildError(f"offers a file that {problem}")
    return path


def _find(client: PyPISimple, archive: Archive) -> DistributionPackage:
    page = client.get_project_page(archive.project, timeout=TIMEOUT)
    for package in page.packages:
        if package.filename == archive.filename:
            return package
    raise NoSuchProjectError(archive.project, page.project)


def _client(index: str) -> PyPISimple:
    """A client for the index; user name and password do not appear in its URLs."""
    parts = urlsplit(index)
    host = parts.netloc.rpartition("@")[2]
    session = requests.Session()
    session.mount("file:", _FileAdapter())
    for scheme in ("http:", "https:"):
        session.mount(scheme, HTTPAdapter(max_retries=RETRIES))
    session.verify = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE") or True
    if parts.username:
        session.auth = _HostAuth(host, unquote(parts.username), unquote(parts.password or ""))
    return PyPISimple(parts._replace(netloc=host).geturl(), session=session)


class _HostAuth(requests.auth.HTTPBasicAuth):
    """Sends the password to the index's host alone: its pages may link to other hosts."""

    def __init__(self, host: str, username: str, password: str) -> None:
        super().__init__(username, password)
        self.host = host

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        return super().__call__(request) if urlsplit(request.url).netloc == self.host else request


class _FileAdapter(BaseAdapter):
    """Reads file: URLs, for an index that is a local directory."""

    def send(self, request: requests.PreparedRequest, **kwargs: object) -> requests.Response:
        path = Path(url2pathname(urlsplit(request.url).path))
        path = path / "index.html" if path.is_dir() else path
        response = requests.Response()
        response.request, response.url = request, request.url
        response.status_code = 200 if path.is_file() else 404
        response.raw = path.open("rb") if path.is_file() else io.BytesIO()
        response.headers["Content-Type"] = "text/html"
        return response

    def close(self) -> None:
        pass


def _public_name(index: str) -> str:
    """The name of the index for an error message, without what may hold passwords and tokens.

    urlsplit would not do: it rejects some malformed URLs, and splits others within a password.
    """
    place = index.rpartition("@")[2]
    place = place.partition("://")[2] or place
    return place if place.startswith("/") else re.split("[/?#]", place)[0]


def _reason(error: Exception) -> str:
    if isinstance(error, BuildError):
        return str(error)
    if isinstance(error, NoSuchProjectError):
        return "does not have it"
    if isinstance(error, requests.HTTPError):
        return f"answers {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.exceptions.SSLError):
        return "shows a certificate that is not trusted"
    if isinstance(error, (requests.ConnectionError, requests.Timeout)):
        return "cannot be reached"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "broke off the download"
    return "does not answer like a package index"
