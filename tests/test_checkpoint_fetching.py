"""Downloads, where they are kept, and the names of the zoos."""

import hashlib
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from detectron2.utils.file_io import PathManager

from msrcnn_d2.checkpoint.fetching import find_file
from msrcnn_d2.checkpoint.reading import read_file
from msrcnn_d2.utils.errors import UserError
from tests.helpers.weights import (
    GOOD,
    Calls,
    arrays,
    assert_has,
    load,
    pickled,
    torch_bytes,
    weights_for,
)


def test_directories_and_missing_files(tmp_path):
    (tmp_path / "ms_rcnn_R_50_FPN_1x").mkdir()
    for path in (tmp_path, tmp_path / "ms_rcnn_R_50_FPN_1x"):
        with pytest.raises(UserError, match="is a directory: give one of its files"):
            find_file(str(path))
    for name in ("x.pth", "x", "ms_rcnn_R_101_FPN_1x"):  # a place, not a name of the zoo
        with pytest.raises(UserError, match="does not exist: give a file, a URL, or.*ms_rcnn_R_50"):
            find_file(str(tmp_path / name))
    with pytest.raises(UserError, match="cannot be read .Is a directory."):
        read_file(str(tmp_path))


class Server:
    """
    Serves `files`: by path a body, or a function that answers by itself; notes the requests.
    What comes from it is kept below `folder`.
    """

    def __init__(self):
        self.files, self.requests = {}, []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests.append(self.path)
                body = server.files.get(self.path.partition("?")[0])
                if callable(body):
                    body(self)
                elif body is None:
                    self.send_error(404)
                else:
                    answer(self, body)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        port = self.server.server_address[1]
        self.host, self.folder = f"127.0.0.1:{port}", f"127.0.0.1_{port}"
        self.url = f"http://{self.host}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


def answer(handler, body, length=None):
    handler.send_response(200)
    handler.send_header("Content-Length", str(length or len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def server(cache, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    result = Server()
    yield result
    result.stop()


other_server = server  # at another port


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files_in(folder):
    """All files but the locks, which stay."""
    return [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"]


def digest(data):
    return hashlib.sha256(data).hexdigest()[:8]


def test_download(server, cache):
    data = torch_bytes(GOOD)
    names = ["model.pth", f"model-{digest(data)}.pth", f"model_20200206-{digest(data)}.pth"]
    names += ["model-20200206.pth", "model-20200206.v1.pth"]  # a date is no digest
    for name in names:
        server.files[f"/a/b/{name}"] = data
        for _ in range(2):  # the second time it is there
            file = find_file(f"{server.url}/a/b/{name}")
            assert file == str(cache / server.folder / "a" / "b" / name)
            assert Path(file).read_bytes() == data
    assert len(server.requests) == len(files_in(cache)) == len(names)


def test_servers_do_not_share(server, other_server, cache):
    servers = {server: torch_bytes({"a": torch.zeros(1)}), other_server: torch_bytes(GOOD)}
    for one, data in servers.items():
        one.files["/a/x.pth"] = data
    for one, data in [*servers.items(), *servers.items()]:  # the second time it is there
        file = find_file(f"{one.url}/a/x.pth")
        assert file == str(cache / one.folder / "a" / "x.pth")
        assert Path(file).read_bytes() == data
    assert server.requests == other_server.requests == ["/a/x.pth"]


@pytest.mark.parametrize("credentials", ["user:secret@", "user@", "user:sec@ret:secret@"])
def test_credentials_stay_out_of_the_cache(credentials, server, cache):
    server.files["/a/x.pth"] = torch_bytes(GOOD)
    expected = find_file(f"{server.url}/a/x.pth")
    assert find_file(f"http://{credentials}{server.host}/a/x.pth") == expected
    assert [p.name for p in cache.iterdir()] == [server.folder]
    assert server.requests == ["/a/x.pth"]


def cut(handler):
    answer(handler, torch_bytes(GOOD)[:900], length=5000)


def hang_up(handler):
    handler.connection.close()


def nonsense(handler):
    handler.wfile.write(b"what?\r\n\r\n")


WRONG_HASH = "its SHA-256 is not the one in its name"
DOWNLOADS = {
    "wrong hash": ("/x-00000000.pth", torch_bytes(GOOD), WRONG_HASH),
    "wrong hash after _date": ("/x_20200206-86ba88d2.pth", torch_bytes(GOOD), WRONG_HASH),
    "wrong hash after -date": ("/x-20200206-86ba88d2.pth", torch_bytes(GOOD), WRONG_HASH),
    "web page": ("/x.pth", b"<html>log in</html>", "what comes is a web page (HTML), not weights)"),
    "web page for a hash": ("/x-00000000.pth", b"<html></html>", WRONG_HASH),
    "404": ("/x.pth", None, "the server answers 404 Not Found"),
    "cut": ("/x.pth", cut, "what comes is truncated or damaged ("),
    "hangs up": ("/x.pth", hang_up, "("),
    "nonsense": ("/x.pth", nonsense, "("),
    "attack": (
        "/x.pth",
        torch_bytes(Calls(os.system, "touch x")),
        "what comes is refused, since it contains 'posix.system'",
    ),
}


@pytest.mark.parametrize("case", DOWNLOADS)
def test_failing_downloads(case, server, cache):
    path, body, reason = DOWNLOADS[case]
    server.files[path] = body
    with pytest.raises(UserError) as caught:
        find_file(server.url + path)
    message, place = str(caught.value), cache / server.folder / path[1:]
    assert message.startswith(f"Cannot download '{server.url}{path}' (") and reason in message
    assert message.endswith(
        f"): get the file in another way and put it at '{place}', or give its own path."
    )
    assert ". " not in message.replace(str(place), "") and ".incomplete" not in message
    assert not files_in(cache)

    place.write_bytes(torch_bytes(GOOD))  # as the message says
    assert find_file(server.url + path) == str(place)


def test_no_connection(server, cache):
    server.stop()
    with pytest.raises(UserError, match="no connection: .*refused.*put it at"):
        find_file(server.url + "/x.pth")
    with pytest.raises(UserError, match="Cannot download 'http://127.0.0.1/a b.pth'"):
        find_file("http://127.0.0.1/a b.pth")  # which no URL may contain


def test_two_at_a_time_download_once(server):
    data, started = torch_bytes(GOOD), threading.Event()

    def slowly(handler):
        started.wait(0.3)
        answer(handler, data)

    server.files["/x.pth"] = slowly
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(find_file(f"{server.url}/x.pth")))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 1 and len(found) == 3 and len(set(found)) == 1


def test_interrupted_download_leaves_nothing(server, cache, monkeypatch):
    def interrupted(url, path, *args):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.hub, "download_url_to_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_file(server.url + "/x.pth")
    assert not files_in(cache)


def test_urls_do_not_lead_out_of_the_cache(server, cache, tmp_path):
    for path in ("/../../out.pth", "/a/../../../out.pth", "//out.pth"):
        server.files[path] = torch_bytes(GOOD)
        assert Path(find_file(server.url + path)).resolve() == cache / server.folder / "out.pth"
    assert not (tmp_path / "out.pth").exists()


def test_servers_do_not_lead_out_of_the_cache(cache):
    """Such a server cannot be had, but the message says where its file would be."""
    for url in ("http://../x.pth", "http://user@../x.pth"):
        with pytest.raises(UserError, match=f"put it at '{cache}/x.pth'"):
            find_file(url)


def test_passwords_are_not_shown(cache):
    with pytest.raises(UserError, match="Cannot download 'http://127.0.0.1:9/x.pth'") as error:
        find_file("http://user:secret@127.0.0.1:9/x.pth")
    assert "secret" not in str(error.value)


def test_a_cache_that_cannot_be_written(server, cache):
    (cache / server.folder).mkdir(parents=True)
    (cache / server.folder / "a").write_bytes(b"a file where a folder should be")
    with pytest.raises(UserError, match="Cannot write '.*a/x.pth' .*set FVCORE_CACHE"):
        find_file(server.url + "/a/x.pth")


def test_queries_of_urls_are_kept(server, plain):
    server.files["/x.pth"] = torch_bytes({"model": weights_for(plain)})
    load(plain, f"{server.url}/x.pth?download=true")
    assert server.requests == ["/x.pth?download=true"]
    server.files["/x.pth"] = torch_bytes(GOOD)
    for query in ("?id=1", "?id=2"):  # each is a file of its own
        assert read_file(find_file(server.url + "/x.pth" + query))["model"]["b"].tolist() == [1] * 3
    assert len(server.requests) == 3
    server.files["/x.pth"] = torch_bytes({"model": weights_for(plain)})
    server.files["/"] = torch_bytes(GOOD)
    assert Path(find_file(server.url + "/?id=7")).name == "download"
    load(plain, f"{server.url}/x.pth?matching_heuristics=True")
    assert_has(plain, weights_for(plain))


def test_detectron2_shares_its_downloads(cache):
    url = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    place = cache / "detectron2" / "ImageNetPretrained" / "MSRA" / "R-50.pkl"
    place.parent.mkdir(parents=True)
    pickled({"model": arrays(GOOD["model"])}, place)
    assert find_file(url) == str(place) == PathManager.get_local_path(url)


ZOO = {
    "ms_rcnn_R_50_FPN_1x": "61c9355e.pth",
    "ms_rcnn_R_101_FPN_2x.yaml": "5f3cc74f.pth",
    "COCO-InstanceSegmentation/ms_rcnn_X_101_64x4d_FPN_1x.py": "86ba88d2.pth",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x": "model_final_a54504.pkl",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml": "model_final_f10217.pkl",
}


@pytest.mark.parametrize("name", ZOO)
def test_names_of_the_zoos(name, cache, monkeypatch):
    """Without a network: the message says which URL and which place; a file put there is used."""

    def offline(url, *args):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError) as caught:
        find_file(name)
    url, place = re.search(r"'(https://\S+)' .*put it at '(\S+)',", str(caught.value)).groups()
    left_out = "https://" if "ms_rcnn" in name else "https://dl.fbaipublicfiles.com/"
    assert url.startswith(left_out) and url.endswith(ZOO[name])
    assert place == str(cache / url.removeprefix(left_out))
    Path(place).write_bytes(torch_bytes(GOOD))
    assert find_file(name) == place
