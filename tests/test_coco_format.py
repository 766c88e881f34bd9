"""Files of predictions and annotations: what is taken, and what is wrong in others."""

import copy
import json
import re

import numpy as np
import pycocotools.mask as mask_util
import pytest

from msrcnn_d2.coco_format import check_fits, read_annotations, read_results
from msrcnn_d2.utils.errors import UserError
from msrcnn_d2_runtime.mask_encoding import encode_bitmasks
from tests.helpers.toy import IMAGE_SIZE, write_coco_json

HEIGHT, WIDTH = IMAGE_SIZE
SQUARE = [8, 8, 40, 8, 40, 40, 8, 40]
INSIDE = np.zeros(IMAGE_SIZE, dtype=bool)
INSIDE[8:40, 8:40] = True
RLE = encode_bitmasks(INSIDE[None])[0]
# From the first pixel on, down the columns
COUNTS = [8 * HEIGHT + 8, *[32, HEIGHT - 32] * 31, 32, HEIGHT * (WIDTH - 40) + HEIGHT - 40]


def result(**changes):
    entry = {"image_id": 1, "category_id": 1, "score": 0.5, "segmentation": RLE, **changes}
    return {k: v for k, v in entry.items() if v is not None}


def written(contents, folder, name="x.json"):
    (folder / name).write_text(json.dumps(contents))
    return str(folder / name)


def error_of(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and "  " not in message
    return message


@pytest.fixture
def truth(tmp_path):
    return read_annotations(write_coco_json(tmp_path / "truth.json"))


@pytest.mark.parametrize(
    "segmentation",
    [RLE, {"size": [HEIGHT, WIDTH], "counts": COUNTS}, [SQUARE]],
    ids=["RLE", "uncompressed RLE", "polygon"],
)
def test_masks_in_all_of_their_forms(segmentation, truth, tmp_path):
    given = [result(segmentation=segmentation, pred_mask_ious=0.7), result(image_id=2)]
    results = check_fits(read_results(written(given, tmp_path)), truth)

    assert results == [result(pred_mask_ious=0.7), result(image_id=2)]
    assert np.array_equal(mask_util.decode(results[0]["segmentation"]).astype(bool), INSIDE)
    json.dumps(results)  # "counts" is a string


def test_polygons_of_one_mask_are_its_parts(truth, tmp_path):
    parts = [[8, 8, 24, 8, 24, 40, 8, 40], [24, 8, 40, 8, 40, 40, 24, 40]]
    both, none = check_fits(
        read_results(written([result(segmentation=x) for x in (parts, [])], tmp_path)), truth
    )
    assert both == result()
    assert mask_util.area(none["segmentation"]) == 0


def test_results_are_not_modified(truth):
    results = [result(segmentation=[SQUARE])]
    before = copy.deepcopy(results)
    check_fits(results, truth)
    assert results == before


# Contents, and part of the message: the kind of problem in brackets, for an entry
BAD_RESULTS = {
    "dict": ({"annotations": []}, "is not a list of predictions"),
    "list of lists": ([[1, 2]], "is not a list of predictions"),
    "empty": ([], "has no predictions"),
    "no image": ([result(image_id=None)], "Prediction 1 in .*(image_id)"),
    "no mask": ([result(), result(segmentation=None)], "Prediction 2 in .*(mask-missing)"),
    "list as image": ([result(image_id=[1])], "(image_id)"),
    "score of text": ([result(score="0.5")], "'0.5'.*(score)"),
    "NaN": ([result(score=float("nan"))], "nan.*(score)"),
    "short polygon": ([result(segmentation=[[1, 2, 3, 4]])], "(polygon-points)"),
    "odd polygon": ([result(segmentation=[[1, 2, 3, 4, 5, 6, 7]])], "(polygon-points)"),
    "text as a mask": ([result(segmentation="x")], "(mask-malformed)"),
    "no size": ([result(segmentation={"counts": RLE["counts"]})], "(rle-counts)"),
    # pycocotools would read beyond its end
    "cut off": ([result(segmentation={**RLE, "counts": "Po"})], "(rle-counts)"),
    "no counts": ([result(segmentation={**RLE, "counts": ""})], "(rle-counts)"),
    "wrong sum": ([result(segmentation={**RLE, "counts": [1, 2]})], "(rle-counts)"),
}


def assert_says(message, found):
    """The message has these parts in this order; brackets are brackets."""
    pattern = message.replace("(", "[(]").replace(")", "[)]")
    assert re.search(pattern, found), found


@pytest.mark.parametrize("case", BAD_RESULTS)
def test_results_with_a_problem(case, tmp_path):
    contents, message = BAD_RESULTS[case]
    path = written(contents, tmp_path)
    found = error_of(read_results, path)
    assert path in found
    assert_says(message, found)


@pytest.mark.parametrize("read", [read_results, read_annotations])
def test_files_that_are_no_json(read, tmp_path):
    assert "none.json' does not exist: give " in error_of(read, str(tmp_path / "none.json"))
    assert "is a folder" in error_of(read, str(tmp_path))
    for contents in (b'[{"image_id": 1, "sc', b"", b"\x80\x02}q\x00."):
        (tmp_path / "x.json").write_bytes(contents)
        assert "is not JSON" in error_of(read, str(tmp_path / "x.json"))


ENCODED = {
    "utf-16": ("狗", "UTF-16"),
    "utf-16-le": ("a", "UTF-16"),
    "utf-16-be": ("a", "UTF-16"),
    "utf-32": ("a", "UTF-32"),
    "gbk": ("红色的狗和猫", "GBK"),
    "cp932": ("赤い犬とねこ", "Shift JIS"),
    "cp1252": ("Füße é", "Windows-1252"),
}


@pytest.mark.parametrize("read", [read_results, read_annotations])
@pytest.mark.parametrize("codec", ENCODED)
def test_other_encodings_are_named(codec, read, tmp_path):
    name, encoding = ENCODED[codec]
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"name": name}], ensure_ascii=False), encoding=codec)
    found = error_of(read, str(path))
    assert encoding in found.split("'")[2] and "save it as UTF-8" in found, found


def test_a_byte_order_mark_is_passed_over(tmp_path):
    path = write_coco_json(tmp_path / "truth.json")
    (tmp_path / "truth.json").write_text((tmp_path / "truth.json").read_text(), "utf-8-sig")
    assert len(read_annotations(path).anns) == 4
    (tmp_path / "x.json").write_text(json.dumps([result()]), "utf-8-sig")
    assert read_results(str(tmp_path / "x.json")) == [result()]


def test_annotations_are_read_silently(tmp_path, capsys):
    coco = read_annotations(write_coco_json(tmp_path / "truth.json"))
    assert sorted(coco.imgs) == [1, 2] and len(coco.anns) == 4 and len(coco.cats) == 3
    assert capsys.readouterr() == ("", "")


def changed(change, folder):
    data = json.loads((folder / "truth.json").read_text())
    change(data)
    return written(data, folder, "changed.json")


def test_objects_are_no_crowds_unless_it_says_so(tmp_path):
    write_coco_json(tmp_path / "truth.json")
    path = changed(lambda x: [a.pop("iscrowd") for a in x["annotations"]], tmp_path)
    assert {a["iscrowd"] for a in read_annotations(path).anns.values()} == {0}


BAD_ANNOTATIONS = {
    "results": (lambda x: x.pop("annotations"), "no list of annotations"),
    "empty": (lambda x: x.update(annotations=[]), "no list of annotations"),
    "no images": (lambda x: x.update(images=[]), "no list of images"),
    "no categories": (lambda x: x.pop("categories"), "no list of categories"),
    "no list": (lambda x: x.update(images={"a": 1}), "no list of images"),
    "boxes only": (
        lambda x: x["annotations"][1].pop("segmentation"),
        "Entry 2 of the annotations in '.*'.*(mask-missing)",
    ),
    "empty mask": (lambda x: x["annotations"][0].update(segmentation=[]), "(mask-missing)"),
    "no height": (lambda x: x["images"][0].pop("height"), "Entry 1 of the images .*(image-sides)"),
}


@pytest.mark.parametrize("case", BAD_ANNOTATIONS)
def test_files_that_are_not_annotations(case, tmp_path):
    change, message = BAD_ANNOTATIONS[case]
    write_coco_json(tmp_path / "truth.json")
    assert_says(message, error_of(read_annotations, changed(change, tmp_path)))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"image_id": 9}, "1 image id .*such as 9"),
        ({"category_id": 0}, "1 category id .*such as 0"),
        ({"segmentation": {**RLE, "size": [WIDTH, HEIGHT]}}, "image 1 .*96 x 64.* 64 x 96"),
    ],
)
def test_results_of_other_images(wrong, message, truth):
    assert_says(message, error_of(check_fits, [result(), result(**wrong)], truth))


@pytest.mark.parametrize("key", ["pred_mask_iou", "mask_score", "quality_score"])
def test_scores_of_masks_are_numbers_that_all_have_or_none(key, tmp_path):
    wrong = written([result(**{key: float("nan")})], tmp_path)
    assert_says(f"nan.*({key})", error_of(read_results, wrong))
    wrong = written([result(**{key: "x"})], tmp_path)
    assert_says(f"'x'.*({key})", error_of(read_results, wrong))
    mixed = written([result(**{key: 0.5}), result()], tmp_path)
    assert_says(f"1 of 2 predictions in '{mixed}' .*'{key}'", error_of(read_results, mixed))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("quality_score", 1.5, "1.5 is not from 0 to 1"),
        ("quality_score", True, "true is not"),
        ("mask_iou_probs", 0.5, "0.5 in place of a list of 10"),
        ("mask_iou_probs", [0.5] * 9, "9 numbers in place of a list of 10"),
        ("mask_iou_probs", [0.5] * 9 + [-0.1], "values that are not from 0 to 1"),
        ("mask_iou_probs", [0.5] * 9 + [None], "values that are not from 0 to 1"),
        ("mask_iou_probs", [0.5] * 9 + [float("nan")], "values that are not from 0 to 1"),
    ],
)
def test_calibrated_scores_are_probabilities(key, value, message, tmp_path):
    wrong = written([result(), result(**{key: value})], tmp_path)
    assert_says(f"Prediction 2 .*{message}.*({key})", error_of(read_results, wrong))


def test_probabilities_that_all_have_or_none(tmp_path):
    right = result(mask_iou_probs=[0, 1, *8 * [0.5]], quality_score=0.5)
    assert read_results(written([right], tmp_path)) == [right]
    mixed = written([right, result(quality_score=0.5)], tmp_path)
    assert_says("1 of 2 predictions .*'mask_iou_probs'", error_of(read_results, mixed))


def test_masks_of_annotations_have_the_size_of_their_image(tmp_path):
    path = write_coco_json(tmp_path / "truth.json")
    dataset = json.loads((tmp_path / "truth.json").read_text())
    dataset["annotations"][0]["segmentation"] = {"size": [WIDTH, 1], "counts": [WIDTH]}
    (tmp_path / "truth.json").write_text(json.dumps(dataset))
    assert "(rle-size)" in error_of(read_annotations, path)


SHORT = {
    "size": [HEIGHT, WIDTH],
    "counts": mask_util.frPyObjects({"size": [HEIGHT, WIDTH], "counts": [0, 10]}, HEIGHT, WIDTH)[
        "counts"
    ].decode(),
}
BAD_VALUES = {
    "area of text": ("annotations", {"area": "48"}, "area"),
    "area without end": ("annotations", {"area": float("inf")}, "area"),
    "negative area": ("annotations", {"area": -1}, "area"),
    "polygon of 4 numbers": ("annotations", {"segmentation": [[1, 2, 3, 4]]}, "polygon-points"),
    "polygon far away": ("annotations", {"segmentation": [[0, 0, 9, 0, 9, 1e9]]}, "polygon-far"),
    "polygon with NaN": (
        *("annotations", {"segmentation": [[0, 0, 9, 0, 9, float("nan")]]}, "polygon-numbers"),
    ),
    "list of points": ("annotations", {"segmentation": [[0, 0], [9, 0], [9, 9]]}, "polygon-pairs"),
    "one list": ("annotations", {"segmentation": SQUARE}, "mask-flat"),
    "mask of text": ("annotations", {"segmentation": "x"}, "mask-malformed"),
    "counts of less": ("annotations", {"segmentation": {**RLE, "counts": [1, 2]}}, "rle-counts"),
    "short counts": ("annotations", {"segmentation": SHORT}, "rle-counts"),
    "crowd of text": ("annotations", {"iscrowd": "yes"}, "iscrowd"),
    "crowd of null": ("annotations", {"iscrowd": None}, "iscrowd"),
    "list as id": ("annotations", {"id": [1]}, "annotation-id"),
    "list as image": ("annotations", {"image_id": [1]}, "image-reference"),
    "dict as category": ("annotations", {"category_id": {}}, "category-reference"),
    "height of text": ("images", {"height": "64"}, "image-sides"),
    "no height": ("images", {"height": 0}, "image-sides"),
    "mixed ids": ("images", {"id": "a"}, "image-id-mixed"),
    "mixed classes": ("categories", {"id": "a"}, "category-id-mixed"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_annotations_with_wrong_values(case, tmp_path):
    of, wrong, kind = BAD_VALUES[case]
    write_coco_json(tmp_path / "truth.json")
    found = error_of(read_annotations, changed(lambda x: x[of][1].update(wrong), tmp_path))
    assert_says(f"Entry 2 of the {of} in '.*changed.json': .*({kind})", found)


@pytest.mark.parametrize("counts", [SHORT["counts"], RLE["counts"] + "1", "1" * 20, "Q" * 6])
def test_compressed_masks_have_as_many_pixels_as_the_image(counts, tmp_path):
    # pycocotools never comes back from comparing shorter ones
    path = written([result(segmentation={**RLE, "counts": counts})], tmp_path)
    assert "(rle-counts)" in error_of(read_results, path)


def test_integers_that_are_too_large_for_a_float_are_no_scores(tmp_path):
    path = written([result(score=10**400)], tmp_path)
    assert "(score)" in error_of(read_results, path)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999, 1])
def test_compressed_masks_of_any_runs_are_taken(share, truth, tmp_path):
    mask = np.random.default_rng(0).random(IMAGE_SIZE) < share
    given = [result(segmentation=encode_bitmasks(mask[None])[0])]
    assert check_fits(read_results(written(given, tmp_path)), truth) == given


def test_messages_quote_the_beginning_of_a_value_on_one_line(tmp_path):
    found = error_of(read_results, written([result(score="a\n " + 100 * "b")], tmp_path))
    assert "'a\\n bb" in found and 40 * "b" not in found
