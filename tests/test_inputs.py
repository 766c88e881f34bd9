"""Which images are meant by files, folders, patterns, lists and addresses, and their names."""

import io
import os
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from PIL import Image

from msrcnn_d2_runtime import inputs
from msrcnn_d2_runtime.errors import UserError
from msrcnn_d2_runtime.image_reading import ImageSettings
from msrcnn_d2_runtime.inputs import download, find_inputs


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder with subfolders; the current directory is beside it."""
    for name in (
        *("b.png", "a.JPG", "notes.txt", "sub/a.JPG", "sub/größe 1.webp", "sub/deep/c.tif"),
        *(".hidden/d.png", "sub/._a.JPG", "other/a.JPG", "[x].png"),
    ):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def names_of(*given, **options):
    return [x.name for x in find_inputs(given, **options).sources]


def test_a_folder_with_its_subfolders_in_order(tree):
    found = find_inputs(["photos"])
    expected = ["[x].png", "a.JPG", "b.png", "other/a.JPG", "sub/a.JPG", "sub/größe 1.webp"]
    assert [x.name for x in found.sources] == [*expected, "sub/deep/c.tif"]
    assert [x.location for x in found.sources] == [f"photos/{x.name}" for x in found.sources]
    assert found.num_ignored == 1
    assert names_of(tree) == names_of("photos/") == names_of("./photos")
    twice = find_inputs(["photos", "./photos", "photos/*"])
    assert len(twice.sources) == len(found.sources) and twice.num_ignored == 1


def test_links_in_circles(tree):
    (tree / "sub" / "circle").symlink_to(tree)
    (tree / "elsewhere").symlink_to(tree / "sub" / "deep")
    names = names_of(tree)
    assert len(names) == 7 and "elsewhere/c.tif" in names and "sub/deep/c.tif" not in names


def test_the_folder_of_the_results_is_left_out(tree):
    assert "sub/a.JPG" not in names_of("photos", without=tree / "sub")
    assert "sub/a.JPG" not in names_of("photos/**", without=tree / "sub")
    assert "sub/a.JPG" not in names_of("photos/*", without="photos/sub")


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("photos/*.png", ["[x].png", "b.png"]),
        ("photos/*/a.JPG", ["other/a.JPG", "sub/a.JPG"]),
        ("photos/s*/**/*.tif", ["sub/deep/c.tif"]),
        ("photos/[ab].*", ["a.JPG", "b.png"]),
        ("photos/[x].png", ["[x].png"]),  # it is there
        ("photos/s*/d*", ["sub/deep/c.tif"]),  # a folder
        ("photos/**/d*", ["sub/deep/c.tif"]),
        ("photos/**/*", [*"[x].png a.JPG b.png other/a.JPG sub/a.JPG".split(), "sub/deep/c.tif"]),
        ("photos/**", [*"[x].png a.JPG b.png other/a.JPG sub/a.JPG".split(), "sub/deep/c.tif"]),
    ],
)
def test_patterns(tree, pattern, expected):
    found = [x for x in names_of(pattern) if x != "sub/größe 1.webp"]
    assert found == expected
    absolute = names_of(str(tree.parent / pattern))
    assert [x for x in absolute if x != "sub/größe 1.webp"] == expected


@pytest.mark.parametrize(
    "given, expected",
    [
        (["photos/a.JPG", "photos/b.png"], ["a.JPG", "b.png"]),
        (["photos/sub/a.JPG", "photos/other/a.JPG"], ["sub/a.JPG", "other/a.JPG"]),
        (
            ["photos/a.JPG", "photos/sub/a.JPG", "photos/b.png"],
            "photos/a.JPG sub/a.JPG photos/b.png",
        ),
        (["photos/sub", "photos/other"], None),
        (["photos/b.png", "./photos/b.png", "photos/a.JPG"], ["b.png", "a.JPG"]),  # once
        (["https://x.org/p/a.png", "https://x.org/q/a.png"], ["p/a.png", "q/a.png"]),
        (["https://x.org/a.png", "https://y.org/a.png"], ["x.org/a.png", "y.org/a.png"]),
        (["http://x.org/%2e%2e/..%2Fb%20c.png"], [".._b c.png"]),
        (["http://x.org"], ["index"]),
    ],
)
def test_names_are_unique(tree, given, expected):
    names = names_of(*given)
    assert len(set(names)) == len(names)
    if expected is not None:
        assert names == (expected.split() if isinstance(expected, str) else expected)


def test_names_of_addresses_that_differ_in_their_query():
    names = names_of("http://x.org/i.png?id=1", "http://x.org/i.png?id=2")
    assert len(set(names)) == 2 and all(x.startswith("i-") and x.endswith(".png") for x in names)


def test_a_name_that_is_no_text(tree):
    """Names of files are bytes; outputs are written as UTF-8."""
    for byte in (b"\xfe", b"\xff"):
        open(os.path.join(os.fsencode(tree), byte + b".png"), "w").close()
    found = [x for x in find_inputs(["photos"]).sources if "�" in x.name]
    assert len({x.name.encode() for x in found}) == 2
    assert all(os.path.exists(x.location) for x in found)


def test_names_that_leave_no_room_for_the_suffixes_of_results(tree):
    long = ["x" * 250 + "1.png", "x" * 250 + "2.png", "图" * 80 + ".jpg", "y." + "z" * 250]
    for name in long:
        (tree / name).touch()
    urls = [f"http://x.org/{'图' * 100}.png?id={k}" for k in range(2)]
    names = names_of("photos/b.png", *(tree / name for name in long), *urls)
    assert names[0] == "b.png" and len(set(names)) == 7
    assert max(len(x.encode()) for x in names) <= 200
    assert [os.path.splitext(x)[1] for x in names[1:4]] == [".png", ".png", ".jpg"]
    assert names[1:5] == names_of(*(tree / name for name in long))


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\0"])
def test_a_list_on_standard_input(tree, separator):
    listed = separator.join(["photos/sub/größe 1.webp", "photos/b.png", ""])
    names = names_of("-", standard_input=io.BytesIO(listed.encode()))
    assert names == ["größe 1.webp", "b.png"]
    with pytest.raises(UserError, match="empty"):
        find_inputs(["-"], standard_input=io.BytesIO(b"\n"))


@pytest.mark.parametrize(
    "given, said",
    [
        (["photos/a.JPG", "no.png", "nor/this"], "'no.png', 'nor/this'"),
        (["photos/*.xyz"], "No image matches"),
        (["photos/*.txt"], "only other files"),
        (["empty"], "no images"),
        (["ftp://x.org/a.png"], "http"),
        (["file:///etc/passwd"], "http"),
        (["http://[x/a.png"], "not an address"),
        (["http://user:secret@x.org/a.png"], "of x.org"),
    ],
)
def test_inputs_that_are_not_there(tree, given, said):
    (tree.parent / "empty").mkdir()
    with pytest.raises(UserError, match=said) as error:
        find_inputs(given)
    assert "secret" not in str(error.value)


def test_results_among_the_images(tree):
    with pytest.raises(UserError, match="results"):
        find_inputs(["./photos"], without="photos")


def test_a_file_that_is_named_is_tried(tree):
    assert names_of("photos/notes.txt") == ["notes.txt"]


# ---- the web


class Server(BaseHTTPRequestHandler):
    """Answers as the path says."""

    def do_GET(self):
        pixels = io.BytesIO()
        Image.new("RGB", (4, 3), (255, 0, 0)).save(pixels, "PNG")
        body = pixels.getvalue()
        answers = {"/missing.png": 404, "/away": 302, "/file": 302, "/again": 302}
        self.send_response(answers.get(self.path, 200))
        if self.path == "/text.png":
            body = b"<html>"
        if self.path == "/eps.png":  # of which Pillow makes a picture by Ghostscript
            body = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
        place = {"/away": "/i.png", "/file": "file:///etc/passwd", "/again": "/again"}
        if self.path in place:
            self.send_header("Location", place[self.path])
        length = len(body) + (10 if self.path == "/short.png" else 0)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with HTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("path", ["/i.png", "/größe 1.png", "/away", "/i.png?a=ä b"])
def test_an_image_of_the_web(server, path):
    (source,) = find_inputs([server + path]).sources
    ((name, read),) = source.images(ImageSettings())
    assert name == source.name
    assert np.array_equal(read(), np.full((3, 4, 3), [0, 0, 255], np.uint8))


@pytest.mark.parametrize(
    "path, said",
    [
        ("/missing.png", "404"),
        ("/text.png", "not an image"),
        ("/eps.png", "not an image"),
        ("/short.png", "ended"),
        ("/file", "file"),
        ("/again", "loop"),
    ],
)
def test_what_the_web_does_not_have(server, path, said):
    (source,) = find_inputs([server + path]).sources
    with pytest.raises(UserError, match=said) as error:
        source.read(ImageSettings())
    assert "\n" not in str(error.value)


def test_limits_of_a_download(server):
    with pytest.raises(UserError, match="bytes"):
        download(f"{server}/i.png", max_bytes=10)
    with pytest.raises(UserError, match="seconds"):
        download(f"{server}/i.png", max_seconds=-1)
    with pytest.raises(UserError, match="Cannot download 'http://127.0.0.1:9/"):
        download("http://user:secret@127.0.0.1:9/i.png")


def test_no_redirection_to_an_open_connection():
    request = inputs.Request("https://x.org/a.png")
    redirect = partial(inputs._WebOnly().redirect_request, request, None, 302, "Found", {})
    assert redirect("https://y.org/a.png").full_url == "https://y.org/a.png"
    with pytest.raises(OSError, match="not followed"):
        redirect("http://x.org/a.png")
