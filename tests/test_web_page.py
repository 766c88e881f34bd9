"""The page of `msrcnn-d2 demo`, its server and its command. These need Gradio: `make test-web`."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msrcnn_d2_cli import main
from msrcnn_d2_runtime.errors import UserError
from tests.helpers.web import FakePredictor, image_file

gradio = pytest.importorskip("gradio", exc_type=ImportError)
httpx = pytest.importorskip("httpx")

from msrcnn_d2_web.analysis import Analyser  # noqa: E402
from msrcnn_d2_web.page import Page  # noqa: E402
from msrcnn_d2_web.server import address_of, build_app, listen, server_of  # noqa: E402
from msrcnn_d2_web.store import AnalysisStore  # noqa: E402

ROOT = Path(__file__).parents[1]
ALL = ("mask_scores", 0, 0, 0)  # the ranking and the sliders


def page_of(**options):
    return Page(Analyser(FakePredictor(**options)), AnalysisStore(), title="Test")


def opened(page, data=None):
    return page.store.add(page.analyser.analyse("a.png", data or image_file((100, 100))))


def rows(table):
    """For each row of a table its numbers: place, move, and scores."""
    parts = re.findall(r"<tr data-object.*?</tr>", table, re.DOTALL)
    texts = [re.sub(r"<[^>]*>", " ", x.replace("▲", "+").replace("▼", "-")) for x in parts]
    return [[float(x) for x in text.split() if re.fullmatch(r"[+-]?[\d.]+", x)] for text in texts]


# ---- the page


def test_sliders_and_rankings_change_the_table_without_the_model():
    page = page_of()
    key = opened(page)
    seen = len(page.analyser.predictor.seen)
    _, table = page.show(False, key, None, *ALL)
    assert [row[-1] for row in rows(table)] == [0.63, 0.45, 0.24, 0.04]
    assert [row[1] for row in rows(table)][:2] == [2, -1]  # by class score they are 3 and 1
    _, table = page.show(False, key, None, "scores", 0, 0, 0)
    assert [row[-3] for row in rows(table)] == [0.9, 0.8, 0.7, 0.06]
    _, table = page.show(False, key, None, "scores", 0.75, 0.4, 0)
    assert [row[-3:] for row in rows(table)] == [[0.9, 0.5, 0.45]]
    picture, table = page.show(False, key, None, "scores", 1, 1, 1)
    assert not rows(table) and "below the thresholds" in table and "0 objects" in picture
    assert len(page.analyser.predictor.seen) == seen


def test_a_model_without_mask_scores_has_one_ranking_and_one_slider():
    page = page_of(plain=True)
    assert [x.field for x in page.scores] == [x.field for x in page.rankings] == ["scores"]
    _, table = page.show(False, opened(page), None, "scores", 0.5)
    assert [row[-1] for row in rows(table)] == [0.9, 0.8, 0.7]
    # Nor is there a word about scores that it lacks
    assert "predicted IoU" not in str(page.blocks.get_config_file())


def test_a_threshold_that_is_out_of_range_or_missing():
    blocks = page_of().blocks.blocks.values()
    sliders = [x for x in blocks if isinstance(x, gradio.Slider)]
    values = [[x.preprocess(value) for value in (None, -1, 0.3, 5)] for x in sliders]
    assert values == [[0, 0, 0.3, 1]] * 3


@pytest.mark.parametrize("number", [0, 100, 300])
def test_no_objects_and_many(number):
    page = page_of(num_objects=number)
    _, table = page.show(False, opened(page), None, *ALL)
    assert len(rows(table)) == min(number, 200)
    assert ("found nothing" in table, "and 100 more" in table) == (number == 0, number == 300)


def test_names_of_classes_and_files_are_text():
    page = page_of()
    key = page.store.add(page.analyser.analyse("<script>x</script>.png", image_file()))
    assert all("<script" not in x and "<b>dog" not in x for x in page.show(False, key, None, *ALL))


def test_an_image_that_is_gone_is_not_an_error():
    picture, table = page_of().show(False, "unknown", None, *ALL)
    assert "drop it again" in picture and not table


# ---- the server


@contextmanager
def served(predictor):
    """The address of a server in this process."""
    listener = listen("127.0.0.1", 0)
    examples = sorted((ROOT / "msrcnn_d2_web" / "examples").glob("*.jpg"))
    app = build_app(predictor, title="Test", examples=examples, max_upload_mb=1)
    server = server_of(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield address_of(listener)
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def address():
    with served(FakePredictor()) as address:
        yield address


@pytest.fixture
def client(address):
    with httpx.Client(base_url=address, trust_env=False, timeout=30) as client:
        client.get("/")
        yield client


def upload(client, data, name="a.png"):
    return client.post("/images", content=data, headers={"x-file-name": name})


def test_many_users_at_once_get_their_own_results(client):
    """The lowest class score that the predictor gives tells images apart."""

    def score_of(brightness):
        data = image_file(Image.new("RGB", (30, 20), (brightness,) * 3))
        key = upload(client, data, f"{brightness}.png").json()["key"]
        answer = client.get(f"/images/{key}/predictions?ranking=scores").json()
        return answer["images"][0]["file_name"], answer["annotations"][-1]["score"]

    values = range(0, 160, 10)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(score_of, values))
    assert [name for name, _ in results] == [f"{x}.png" for x in values]
    assert [score for _, score in results] == pytest.approx([x / 1000 for x in values])


def test_downloads_have_the_names_of_their_images_and_what_is_shown(client):
    key = upload(client, image_file((30, 40)), "M%C3%BCll%20.x.png").json()["key"]
    answer = client.get(f"/images/{key}/predictions?ranking=scores&scores=0.75")
    assert "M%C3%BCll%20.x_predictions.json" in answer.headers["content-disposition"]
    assert [x["score"] for x in answer.json()["annotations"]] == pytest.approx([0.9, 0.8])
    long = "x" * 251 + ".png"  # what a file system takes
    other = upload(client, image_file((30, 40)), long).json()["key"]
    answer = client.get(f"/images/{other}/predictions?ranking=scores")
    assert answer.json()["images"][0]["file_name"] == long
    picture = client.get(f"/images/{key}/picture?ranking=mask_scores")
    assert picture.headers["content-type"] == "image/png" and picture.content[1:4] == b"PNG"
    assert client.get(f"/images/{key}/picture?ranking=__class__").status_code == 400
    assert client.get(f"/images/{key}/picture?ranking=scores&scores=x").status_code == 400
    assert client.get("/images/unknown/picture?ranking=scores").status_code == 404


def test_bad_and_large_files_are_refused(client):
    in_parts = (b"x" * 500_001 for _ in range(2))  # the request does not say how many there are
    for data, status in ((b"no image", 422), (b"x" * 1_000_001, 413), (in_parts, 413)):
        answer = upload(client, data)
        assert answer.status_code == status and answer.json()["message"].endswith(".")
    # A page of another host could send this without asking the server
    assert client.post("/images", content=image_file()).status_code == 400


def test_no_file_of_the_server_is_readable(client):
    secret = "/etc/passwd"
    for path in (f"/gradio_api/file={secret}", f"/file={secret}", f"/assets/{secret}", "/config"):
        assert b"root:" not in client.get(path).content
    config = json.loads(
        re.search(r"gradio_config = (\{.*?\});</script>", client.get("/").text, re.DOTALL)[1]
    )
    assert str(ROOT) not in json.dumps(config)
    assert {x["api_visibility"] for x in config["dependencies"]} == {"private"}
    file = {"path": secret, "meta": {"_type": "gradio.FileData"}}
    for dependency in config["dependencies"]:
        body = {"fn_index": dependency["id"], "session_hash": "a", "event_data": None}
        data = [file] * max(1, len(dependency["inputs"]))
        answer = client.post("/gradio_api/queue/join", json={**body, "data": data})
        assert answer.status_code == 400


def test_the_page_asks_no_other_host(client):
    answer = client.get("/")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "googleapis" not in answer.text + client.get("/theme.css").text


def test_an_address_that_cannot_be_used_is_refused_in_a_sentence():
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}"):
            listen("127.0.0.1", port)
    for host in ("no.such.host.invalid", "192.0.2.1"):
        with pytest.raises(UserError, match=host) as caught:
            listen(host, 0)
        assert "port" not in str(caught.value)  # no other port would help


def test_an_example_that_is_no_image_is_refused_by_its_name(tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.tga"
    good.write_bytes(image_file())
    bad.write_bytes(image_file(kind="TGA"))  # uploads of this format are refused, too
    with pytest.raises(UserError, match="bad.tga"):
        build_app(FakePredictor(), title="Test", examples=[good, bad])


# ---- the command


def test_without_the_public_address_that_was_asked_for_nothing_is_served(monkeypatch, capsys):
    def refuse(listener):
        raise UserError("No address.")

    monkeypatch.setattr("msrcnn_d2_web.server.share", refuse)
    with pytest.raises(SystemExit):
        main(["demo", "--port", "0", "--share"])
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "model, title", [("output/", "output"), ("output/model_final.pth", "model_final.pth")]
)
def test_the_page_is_called_as_its_model(model, title, monkeypatch):
    titles = []
    monkeypatch.setattr("msrcnn_d2_cli.demo.predictor_from", lambda _: FakePredictor())
    server = "msrcnn_d2_web.server"
    monkeypatch.setattr(f"{server}.build_app", lambda _, title, **__: titles.append(title))
    monkeypatch.setattr(f"{server}.serve", lambda *_: None)
    assert main(["demo", "--model", model, "--port", "0"]) == 0
    assert titles == [title]


def test_the_command_serves_the_demo_until_ctrl_c(tmp_path):
    folder = tmp_path / "demo"  # not the model that is meant
    folder.mkdir()
    command = [sys.executable, "-W", "ignore", "-m", "msrcnn_d2_cli", "demo", "--port", "0"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    with subprocess.Popen(command, cwd=tmp_path, env=env, **options) as process:
        try:
            line = process.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            assert found, line + process.stderr.read()
            page = httpx.get(found[0], trust_env=False, timeout=60)
            assert page.status_code == 200 and "star, moon, heart, ring" in page.text
            # An open page has such a request
            with httpx.stream("GET", f"{found[0]}/gradio_api/heartbeat/a", trust_env=False):
                process.send_signal(signal.SIGINT)
                _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0 and "Traceback" not in errors, errors
    assert list(tmp_path.iterdir()) == [folder]


# ---- in the browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        pytest.skip("needs Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


# Whether the name of a class is not wholly visible
CUT = """[...document.querySelectorAll("td.name")].some(
  (name) => name.textContent === "cat" && name.scrollWidth > name.clientWidth
)"""
# Drops the picture that is shown as a file onto itself
DROP = """async () => {
  const picture = document.querySelector(".picture img");
  const data = new DataTransfer();
  data.items.add(new File([await (await fetch(picture.src)).blob()], "dropped.jpg"));
  const options = { dataTransfer: data, bubbles: true, cancelable: true };
  picture.dispatchEvent(new DragEvent("drop", options));
}"""


@pytest.mark.parametrize("width", [1280, 768, 360])
def test_in_a_browser(browser, address, tmp_path, width):
    page = browser.new_page(viewport={"width": width, "height": 740})
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.wait_for_selector(".picture img")
    image = tmp_path / "ä b.png"
    Image.fromarray(np.full((150, 200, 3), 60, np.uint8)).save(image)
    page.set_input_files("input[type=file]", image)
    page.wait_for_function("document.querySelector('.file')?.textContent === 'ä b.png'")

    def last_scores(count):
        """The class score of each object, when there are so many."""
        page.wait_for_function(f"document.querySelectorAll('.objects tbody tr').length === {count}")
        return [float(x) for x in page.locator("td.score:nth-last-child(3)").all_inner_texts()]

    assert last_scores(3) == [0.7, 0.9, 0.8]
    assert not page.evaluate(CUT)
    page.get_by_label("class score", exact=True).check()
    page.wait_for_selector(".objects th.ranking:nth-last-child(3)")
    assert last_scores(3) == [0.9, 0.8, 0.7]
    page.get_by_role("slider").first.fill("0.75")
    assert last_scores(2) == [0.9, 0.8]
    before = page.get_attribute(".picture img", "src")
    page.locator(".objects tbody tr").nth(1).click()
    page.wait_for_selector(".objects tbody tr:nth-child(2)[aria-selected=true]")
    assert page.get_attribute(".picture img", "src") != before
    with page.expect_download() as download:
        page.get_by_role("link", name="JSON").click()
    assert download.value.suggested_filename == "ä b_predictions.json"
    assert len(json.loads(Path(download.value.path()).read_text())["annotations"]) == 2
    page.get_by_role("spinbutton").first.fill("")
    last_scores(4)
    container = page.locator(".gradio-container").first
    assert container.evaluate("x => x.clientWidth") == min(width, 1240)
    page.evaluate(DROP)
    page.wait_for_function("document.querySelector('.file')?.textContent === 'dropped.jpg'")
    image.write_bytes(b"no image")
    page.set_input_files("input[type=file]", image)
    page.wait_for_selector(".status.error")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert all(url.startswith((address, "data:", "blob:")) for url in asked) and not errors
    page.close()


def test_names_of_classes_are_legible_beside_five_scores(browser):
    with served(FakePredictor(calibrated=True)) as address:
        for width in (1280, 768, 360):
            page = browser.new_page(viewport={"width": width, "height": 740})
            page.goto(address)
            page.wait_for_selector(".objects tbody tr")
            assert page.locator(".objects thead th").count() == 8
            assert not page.evaluate(CUT)
            page.close()
