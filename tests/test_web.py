"""What the page of `msrcnn-d2 demo` shows of an image, and which requests it refuses."""

import asyncio
import io
import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image
from pycocotools.coco import COCO

from msrcnn_d2_runtime.errors import UserError
from msrcnn_d2_runtime.image_reading import ImageSettings
from msrcnn_d2_web.analysis import DISPLAY_SIDE, Analyser, View, scaled, shown
from msrcnn_d2_web.guard import MAX_JSON, Guard
from msrcnn_d2_web.pictures import display_picture, full_picture, object_at, predictions_json
from msrcnn_d2_web.store import AnalysisStore
from tests.helpers.web import FakePredictor, image_file

BY_MASK_SCORE = View("mask_scores")


def analyse(data=None, **options):
    return Analyser(FakePredictor(**options)).analyse("a b.png", data or image_file())


# ---- reading


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data


LEFT_RED = Image.fromarray(np.array([[[204, 0, 0], [0, 0, 204]]] * 3, np.uint8))  # 3 x 2 pixels
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8))
DEEP = Image.fromarray(np.array([[0, 4095], [1000, 65535]], np.uint16))


@pytest.mark.parametrize(
    "data, pixels",
    [
        (image_file(LEFT_RED), [[[204, 0, 0], [0, 0, 204]]] * 3),
        (image_file(LEFT_RED.convert("RGBA")), [[[204, 0, 0], [0, 0, 204]]] * 3),
        (image_file(LEFT_RED.convert("P")), [[[204, 0, 0], [0, 0, 204]]] * 3),
        (image_file(Image.new("L", (2, 1), 7)), [[[7] * 3] * 2]),
        # Turned by 90 degrees to the left, with EXIF data that say so
        (image_file(LEFT_RED, exif=exif(6)), [[[204, 0, 0]] * 3, [[0, 0, 204]] * 3]),
        (image_file(DEEP, "TIFF"), [[[0] * 3, [255] * 3], [[62] * 3, [255] * 3]]),
    ],
    ids=["color", "alpha", "palette", "grey", "turned", "16 bits"],
)
def test_the_model_sees_the_image_and_so_do_users(data, pixels):
    predictor = FakePredictor(settings=ImageSettings(intensity_range=(0, 4095)))
    analysis = Analyser(predictor).analyse("a.png", data)
    assert analysis.display.tolist() == pixels
    assert predictor.seen[0][:, :, ::-1].tolist() == pixels


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "not an image"),
        (b"<html>", "not an image"),
        (image_file(NOISE)[:-2000], "damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not an image"),
        (image_file(DEEP, "TIFF"), "--intensity-percentiles"),
        (image_file((101, 100)), "100 x 101"),
    ],
    ids=["empty", "no image", "cut off", "for Ghostscript", "16 bits", "too large"],
)
def test_a_bad_file_is_refused_in_a_sentence(data, words):
    predictor = FakePredictor()
    with pytest.raises(UserError, match=words) as caught:
        Analyser(predictor, max_pixels=10_000).analyse("a.png", data)
    assert not predictor.seen and str(caught.value).endswith(".")


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PPM", "TIFF", "WEBP"])
def test_photographs_of_many_formats_are_read(kind):
    assert analyse(image_file((12, 8), kind)).size == (12, 8)


def test_the_settings_of_the_model_limit_the_size():
    analyser = Analyser(FakePredictor(settings=ImageSettings(max_pixels=99)))
    with pytest.raises(UserError, match="pixels"):
        analyser.analyse("a.png", image_file((10, 10)))


# ---- what is shown


def test_objects_are_filtered_and_sorted_without_the_model():
    analyser = Analyser(FakePredictor())
    predictions = analyser.analyse("a.png", image_file()).predictions
    by_class_score = predictions.scores.argsort()[::-1].tolist()
    assert by_class_score != [0, 1, 2, 3] and len(predictions) == 4
    assert shown(predictions, BY_MASK_SCORE).tolist() == [0, 1, 2, 3]
    assert shown(predictions, View("scores")).tolist() == by_class_score
    for field in ("scores", "pred_mask_ious", "mask_scores"):
        values = predictions.get(field)
        for minimum in (0, *values.tolist(), 0.31, 1):
            index = shown(predictions, View("scores", {field: minimum})).tolist()
            assert index == [k for k in by_class_score if values[k] >= minimum]
    # 0.3 as a slider has it is the 0.3 that a model predicts
    both = View("mask_scores", {"pred_mask_ious": 0.3, "scores": 0.5})
    assert predictions[shown(predictions, both)].scores.tolist() == pytest.approx([0.7, 0.9, 0.8])
    assert len(analyser.predictor.seen) == 1


@pytest.mark.parametrize("cropped", [False, True])
@pytest.mark.parametrize("size", [(60, 50), (73, 31), (1, 1), (130, 97)])
def test_masks_of_a_smaller_picture_are_in_the_same_places(cropped, size):
    predictions = analyse(cropped=cropped, num_objects=5).predictions
    resized = scaled(predictions, size)
    assert resized.masks.image_size == size
    rows, columns = (
        ((np.arange(n) + 0.5) * old / n).astype(int) for n, old in zip(size, (120, 80))
    )
    expected = predictions.pred_masks[:, rows][:, :, columns]
    if cropped:
        assert np.array_equal(resized.pred_masks, expected)
    else:  # borders are those of boxes, and these are not at pixels
        assert (resized.pred_masks != expected).sum(axis=(1, 2)).max() <= sum(size)


def test_a_large_image_is_made_smaller_for_the_browser_only():
    analysis = analyse(image_file((500, 3000)))
    height, width = analysis.display.shape[:2]
    assert (height, width) == (round(500 * DISPLAY_SIDE / 3000), DISPLAY_SIDE)
    assert analysis.displayed.image_size == (height, width)
    assert analysis.size == analysis.predictions.image_size == (500, 3000)
    picture = Image.open(io.BytesIO(display_picture(analysis, BY_MASK_SCORE, ("a", "b"))))
    assert picture.size == (width, height)
    phone = display_picture(analysis, BY_MASK_SCORE, ("a", "b"), narrow=True)
    assert Image.open(io.BytesIO(phone)).width <= 400
    data, suffix = full_picture(analysis, BY_MASK_SCORE, ("a", "b"), ImageSettings())
    full = Image.open(io.BytesIO(data))
    assert (full.size, full.format, suffix) == ((3000, 500), "PNG", ".png")


def test_the_picture_of_a_jpeg_file_is_a_jpeg_file():
    analysis = analyse(image_file((400, 400), "JPEG"))
    data, suffix = full_picture(analysis, BY_MASK_SCORE, ("a", "b"), ImageSettings())
    assert suffix == ".jpg" and Image.open(io.BytesIO(data)).format == "JPEG"


def test_around_a_selected_object_the_picture_is_dark():
    analysis = analyse(image_file(Image.new("RGB", (400, 400), (150, 150, 150))))

    def brightness(selected):
        view = View("mask_scores", selected=selected)
        picture = Image.open(io.BytesIO(display_picture(analysis, view, ("a", "b"))))
        pixels = np.asarray(picture.convert("L")).astype(float)
        inside = analysis.predictions.pred_masks[2]
        rest = ~analysis.predictions.pred_masks.any(axis=0)
        return pixels[inside].mean(), pixels[rest].mean()

    inside, rest = brightness(None)
    assert brightness(99) == (inside, rest)  # no such object
    assert brightness(2)[0] == pytest.approx(inside, abs=15)
    assert brightness(2)[1] < 0.6 * rest
    assert brightness(1)[0] < 0.6 * inside


def test_the_object_at_a_place_is_the_smallest_one():
    analysis = analyse(image_file((100, 100)))
    masks = analysis.predictions.pred_masks
    for row, column in np.random.default_rng(0).integers(0, 100, (50, 2)).tolist():
        hit = [k for k in range(4) if masks[k, row, column]]
        found = object_at(analysis, BY_MASK_SCORE, (column + 0.5) / 100, (row + 0.5) / 100)
        assert found == (hit[0] if hit else None)
    hidden = View("mask_scores", {"scores": 1})
    assert object_at(analysis, hidden, 0.05, 0.05) is None


@pytest.mark.parametrize("cropped", [False, True])
def test_the_json_is_a_dataset_in_coco_format(tmp_path, cropped):
    analysis = analyse(image_file((50, 3000)), cropped=cropped)
    view = View("scores", {"mask_scores": 0.2})
    path = tmp_path / "predictions.json"
    path.write_text(predictions_json(analysis, view, ("cat", "größer")), encoding="utf-8")
    coco = COCO(str(path))
    (image,) = coco.dataset["images"]
    assert (image["file_name"], image["height"], image["width"]) == ("a b.png", 50, 3000)
    assert coco.cats[2]["name"] == "größer"
    annotations = coco.dataset["annotations"]
    index = shown(analysis.predictions, view)
    chosen = analysis.predictions[index]
    assert 0 < len(index) < 4
    for keys, field in (
        ("score", "scores"),
        ("pred_mask_iou", "pred_mask_ious"),
        ("mask_score", "mask_scores"),
    ):
        assert [x[keys] for x in annotations] == pytest.approx(chosen.get(field).tolist())
    assert [x["category_id"] for x in annotations] == (chosen.pred_classes + 1).tolist()
    for annotation, mask in zip(annotations, chosen.pred_masks):
        assert np.array_equal(coco.annToMask(annotation), mask)
        assert annotation["area"] == mask.sum() == mask_util.area(annotation["segmentation"])


def test_nothing_is_found():
    analysis = analyse(num_objects=0)
    assert display_picture(analysis, BY_MASK_SCORE, ("a", "b"))
    assert json.loads(predictions_json(analysis, BY_MASK_SCORE, ("a", "b")))["annotations"] == []


# ---- whose analysis it is


def test_an_analysis_is_only_found_by_its_key():
    store = AnalysisStore()
    analyses = [analyse(), analyse()]
    keys = [store.add(x) for x in analyses]
    assert [store.get(x) for x in keys] == analyses
    assert keys[0] != keys[1] and min(map(len, keys)) >= 32
    for wrong in (None, "", keys[0][:-1], 0):
        assert store.get(wrong) is None


def test_the_analysis_that_was_not_used_for_the_longest_time_goes_first():
    analysis = analyse()
    store = AnalysisStore(max_bytes=3 * analysis.nbytes)
    first, second, third = (store.add(analysis) for _ in range(3))
    assert store.get(first)
    fourth = store.add(analysis)
    assert store.get(second) is None and all(map(store.get, (first, third, fourth)))
    tiny = AnalysisStore(max_bytes=1)
    assert tiny.get(tiny.add(analysis))  # a user sees at least the last one


# ---- requests


def ask(method, path, body=b"", query=b""):
    """
    Returns:
        the status, and what reached the application behind the guard: scope and body, or None.
    """
    reached, sent = [], []

    async def app(scope, receive, send):
        reached.append((scope, (await receive())["body"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    messages = [
        {"type": "http.request", "body": x, "more_body": True} for x in (body[:9], body[9:])
    ]
    messages[-1]["more_body"] = False

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    length = (b"content-length", str(len(body)).encode())
    scope = {"type": "http", "method": method, "path": path, "query_string": query}
    asyncio.run(Guard(app)({**scope, "headers": [length]}, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), reached[0] if reached else None


@pytest.mark.parametrize(
    "path",
    ["/", "/theme.css", "/assets/index-1.js", "/gradio_api/queue/data", "/images/a-_1/picture"],
)
def test_what_the_page_needs_is_answered_without_other_hosts(path):
    status, headers, reached = ask("GET", path)
    assert status == 200 and reached
    assert b"default-src 'self'" in headers[b"content-security-policy"]


@pytest.mark.parametrize(
    "method, path",
    [
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file=http://example.org/"),
        ("GET", "/gradio_api/proxy=http://example.org/"),
        ("GET", "/file=/etc/passwd"),
        ("GET", "/static/../../etc/passwd"),
        ("GET", "/assets/js/..%2f..%2fetc/passwd"),
        ("GET", "/images/../x/picture"),
        ("GET", "/gradio_api/upload"),
        ("POST", "/gradio_api/upload"),
        ("POST", "/gradio_api/call/show"),
        ("POST", "/gradio_api/run/show"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/"),
        ("PUT", "/images"),
        ("OPTIONS", "/images"),
    ],
)
def test_everything_else_is_refused(method, path):
    status, _, reached = ask(method, path)
    assert status == 404 and not reached


FILE = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    "request_",
    [
        {"data": [FILE]},
        {"data": ["a", [FILE]]},
        {"data": FILE},
        {"data": [], "event_data": FILE},
        {"data": [], "event_data": {"key": FILE}},
        {"data": [], "event_data": [FILE]},
        {"data": [], "other": FILE},
        [FILE],
        "text",
        {"data": ["x" * MAX_JSON]},
    ],
    ids=str,
)
def test_no_path_and_no_address_gets_to_gradio(request_):
    status, _, reached = ask("POST", "/gradio_api/queue/join", json.dumps(request_).encode())
    assert status == 400 and not reached


def test_what_users_do_gets_to_gradio():
    request = {"data": ["key", None, "mask_scores", 0.5], "event_data": {"x": 0.1}, "fn_index": 3}
    status, _, reached = ask("POST", "/gradio_api/queue/join", json.dumps(request).encode())
    scope, body = reached
    assert status == 200 and json.loads(body) == request
    assert dict(scope["headers"])[b"content-length"] == str(len(body)).encode()
    # An upload is not read into memory here, and the page cannot be one that Gradio has saved
    assert ask("POST", "/images", b"0123456789ab")[2][1] == b"012345678"
    assert ask("GET", "/", query=b"deep_link=../../x")[2][0]["query_string"] == b""
