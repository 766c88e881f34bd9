import base64
from pathlib import Path

import pytest
from pypi_simple import PYPI_SIMPLE_ENDPOINT
from urllib3.util import Retry

from backend import download, indexes
from backend.archive import Archive, BuildError
from local_index import Server, pack

NOWHERE = "http://127.0.0.1:9/simple"  # the port of the discard service, which nobody runs


@pytest.fixture(autouse=True)
def no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "RETRIES", Retry(total=0))


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return pack(tmp_path / "some-project-0.6.tar.gz", {"file": "text"})


@pytest.fixture
def content(archive: Archive, tmp_path: Path) -> bytes:
    return (tmp_path / archive.filename).read_bytes()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


def failure(archive: Archive, index_urls: list[str], target: Path) -> str:
    with pytest.raises(BuildError) as error:
        download.download(archive, index_urls, target)
    message = str(error.value)
    assert message.count(". ") == 0 and "\n" not in message, "one sentence"
    assert "UV_DEFAULT_INDEX" in message and "DETECTRON2_SDIST" in message, "says what to do"
    return message


def test_downloads_from_an_index(
    server: Server, archive: Archive, content: bytes, target: Path
) -> None:
    path = download.download(archive, [server.offer(archive, content)], target)
    assert path == target / archive.filename and path.read_bytes() == content


def test_reads_an_index_in_a_directory(
    archive: Archive, content: bytes, tmp_path: Path, target: Path
) -> None:
    page = tmp_path / "simple index" / archive.project / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text(f'<a href="../../{archive.filename}">{archive.filename}</a>')
    index = indexes._as_url(str(tmp_path / "simple index"))
    assert download.download(archive, [index], target).read_bytes() == content


def test_asks_the_next_index(
    server: Server, archive: Archive, content: bytes, target: Path
) -> None:
    good = server.offer(archive, content)
    lacking = f"{server.url}/other"
    assert download.download(archive, [NOWHERE, lacking, good], target).read_bytes() == content
    assert server.asked[0][0] == f"/other/{archive.project}/"


def test_a_tampered_file_is_refused(
    server: Server, archive: Archive, content: bytes, target: Path
) -> None:
    message = failure(archive, [server.offer(archive, content[:-1] + b"x")], target)
    assert f"instead of {archive.sha256}" in message


def test_a_truncated_file_is_refused(
    server: Server, archive: Archive, content: bytes, target: Path
) -> None:
    index = server.offer(archive, content[:-9])
    server.lengths[f"/files/{archive.filename}"] = len(content)
    message = failure(archive, [index], target)
    assert "broke off the download" in message or "SHA-256" in message


def test_each_index_is_named_with_its_problem(
    server: Server, archive: Archive, target: Path
) -> None:
    message = failure(archive, [NOWHERE, f"{server.url}/simple"], target)
    host = server.url.removeprefix("http://")
    assert f"127.0.0.1:9 cannot be reached and {host} does not have it" in message


def test_a_page_that_is_no_index(server: Server, archive: Archive, target: Path) -> None:
    server.pages[f"/simple/{archive.project}/"] = b"Please log in"
    assert "does not have it" in failure(archive, [f"{server.url}/simple"], target)
    assert "like a package index" in failure(archive, ["gopher://example/"], target)


def test_credentials_reach_the_index_alone(
    server: Server, archive: Archive, content: bytes, target: Path
) -> None:
    other_host = server.url.replace("127.0.0.1", "localhost")
    index = server.offer(archive, content, other_host).replace("://", "://me:p%40ss@")
    download.download(archive, [index], target)
    authorization = "Basic " + base64.b64encode(b"me:p@ss").decode()
    assert [sent for _, sent in server.asked] == [authorization, None]


def test_credentials_are_not_shown(server: Server, archive: Archive, target: Path) -> None:
    secret = f"{server.url}/simple".replace("://", "://me:hidden@")
    message = failure(archive, [secret, "http://me:hidden@127.0.0.1:9/hidden/?t=hidden"], target)
    assert "hidden" not in message and "me:" not in message
    for malformed in ("http://me:hidden@[::1/simple", "http://me:hid/den@host/simple"):
        assert "hid" not in failure(archive, [malformed], target)


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, [PYPI_SIMPLE_ENDPOINT]),
        ({"PIP_INDEX_URL": "https://a/simple"}, ["https://a/simple"]),
        ({"UV_DEFAULT_INDEX": "corp=https://a/?k=v"}, ["https://a/?k=v"]),
        (
            {
                "PIP_INDEX_URL": "https://p",
                "UV_INDEX_URL": "https://u",
                "UV_DEFAULT_INDEX": "https://d",
            },
            ["https://d", "https://u", "https://p"],
        ),
        ({"UV_INDEX": "https://a b=https://b"}, [PYPI_SIMPLE_ENDPOINT, "https://a", "https://b"]),
        (
            {"PIP_INDEX_URL": "https://a", "PIP_EXTRA_INDEX_URL": "https://b https://a"},
            ["https://a", "https://b"],
        ),
        ({"PIP_INDEX_URL": "/srv/simple"}, ["file:///srv/simple"]),
    ],
)
def test_indexes_from_the_environment(
    environment: dict[str, str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert indexes.configured_indexes() == expected


def test_indexes_from_pip_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://global\nextra-index-url =\n  https://b\n  https://c%20\n"
        "[install]\nindex-url = https://install\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    assert indexes.configured_indexes() == ["https://install", "https://b", "https://c%20"]
    monkeypatch.setenv("PIP_INDEX_URL", "https://environment")
    assert indexes.configured_indexes()[0] == "https://environment"
