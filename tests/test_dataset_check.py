"""The check of a dataset: each thing that can be wrong, and that nothing else is said about it."""

import copy
import json
import os
import subprocess
import sys

import pytest
from PIL import ExifTags, Image

from msrcnn_d2.dataset_check import Finding, Level, check_dataset
from msrcnn_d2.dataset_check.issues import KINDS
from msrcnn_d2.utils.errors import UserError
from msrcnn_d2_runtime.image_reading import ImageSettings
from tests.helpers.command import exit_code
from tests.helpers.toy import IMAGE_SIZE, real_datasets, write_coco_json, write_images

HEIGHT, WIDTH = IMAGE_SIZE
SIZE = {"height": HEIGHT, "width": WIDTH}
NAN, INF = float("nan"), float("inf")
SQUARE = [8, 8, 40, 8, 40, 40, 8, 40]  # of annotation 1, of image 1
# The first row of the image: one pixel in each column
ROW = {"size": [HEIGHT, WIDTH], "counts": [0, *[1, HEIGHT - 1] * WIDTH]}

OF_ROW = {"segmentation": ROW, "bbox": [0, 0, WIDTH, 1], "area": WIDTH}


@pytest.fixture
def dataset(tmp_path):
    """Two images with two objects each, of three categories, and nothing wrong with them."""
    write_coco_json(tmp_path / "a.json")
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images")
    return tmp_path


def contents_of(folder):
    return json.loads((folder / "a.json").read_text())


def check(folder, contents=None, images=True, **options):
    if contents is not None:
        (folder / "a.json").write_text(json.dumps(contents))
    images = str(folder / "images") if images else None
    return check_dataset(str(folder / "a.json"), images, progress=False, **options)


def serious(findings):
    """Kinds, image ids and annotation ids of what is no note."""
    found = [f for f in findings.all if f.level is not Level.NOTE]
    return sorted(((f.kind, f.image_id, f.annotation_id) for f in found), key=repr)


def test_nothing_is_wrong_with_a_clean_dataset(dataset):
    findings = check(dataset)
    assert [f.kind for f in findings.all] == ["mask-formats"]
    assert (findings.num_images, findings.num_annotations, findings.num_categories) == (2, 4, 3)
    assert findings.num_files == 2 and findings.bad_images == []
    assert findings.mask_format == "polygon"
    assert findings.totals() == "0 errors, 0 warnings, 1 note"


def annotation(**changes):
    """A change of annotation 1; what is None is removed."""

    def change(contents):
        entry = contents["annotations"][0]
        entry.update(changes)
        for key in [k for k, v in changes.items() if v is None]:
            del entry[key]

    return change


def image(index=0, **changes):
    return lambda contents: contents["images"][index].update(changes)


def category(**changes):
    return lambda contents: contents["categories"][0].update(changes)


def polygons(*parts):
    """The mask is the square and these parts."""
    return annotation(segmentation=[SQUARE, *parts])


def pop(kind, key):
    return lambda contents: contents[kind][0].pop(key)


def append(kind, entry):
    return lambda contents: contents[kind].append(copy.deepcopy(entry))


def append_copy(**changes):
    return lambda contents: contents["annotations"].append(
        {**contents["annotations"][0], "id": 5, **changes}
    )


def json_null(key):
    return lambda contents: contents["annotations"][0].update({key: None})


def with_root(contents):
    """As Roboflow exports a dataset that is called "shapes"."""
    groups = [{**entry, "supercategory": "shapes"} for entry in contents["categories"]]
    contents["categories"] = [{"id": 0, "name": "shapes", "supercategory": "none"}, *groups]


FIRST = 1, 1  # ids of the image and of the annotation that most cases change
# name: change, kind, image id, annotation id
ONE_THING_WRONG = {
    "image is text": (append("images", "x"), "image-entry", None, None),
    "image without id": (append("images", {**SIZE, "file_name": "3.png"}), "image-id", None, None),
    "image id twice": (
        append("images", {"id": 2, "file_name": "3.png", **SIZE}),
        *("image-id-twice", 2, None),
    ),
    "image ids of two kinds": (
        append("images", {"id": "3", "file_name": "3.png", **SIZE}),
        *("image-id-mixed", "3", None),
    ),
    "image without file name": (pop("images", "file_name"), "image-file-name", 1, None),
    "file name is a number": (image(file_name=1), "image-file-name", 1, None),
    "file name is empty": (image(file_name=""), "image-file-name", 1, None),
    "images of one file": (image(1, file_name="1.png"), "image-file-twice", 2, None),
    "no height": (pop("images", "height"), "image-sides", 1, None),
    "height as text": (image(height="64"), "image-sides", 1, None),
    "height with a point": (image(height=64.0), "image-sides", 1, None),
    "height of 0": (image(height=0), "image-sides", 1, None),
    "height of NaN": (image(height=NAN), "image-sides", 1, None),
    "height beyond all numbers": (image(height=10**30), "image-sides", 1, None),
    "category is null": (append("categories", None), "category-entry", None, None),
    "category without id": (append("categories", {"name": "d"}), "category-id", None, None),
    "category id is a list": (
        append("categories", {"id": [4], "name": "d"}),
        *("category-id", None, None),
    ),
    "category id twice": (
        append("categories", {"id": 3, "name": "d"}),
        *("category-id-twice", None, None),
    ),
    "category ids of two kinds": (
        append("categories", {"id": "4", "name": "d"}),
        *("category-id-mixed", None, None),
    ),
    "category without name": (pop("categories", "name"), "category-name", None, None),
    "category name is a number": (category(name=3), "category-name", None, None),
    "category name twice": (category(name="b"), "category-name-twice", None, None),
    "annotation is a list": (append("annotations", []), "annotation-entry", None, None),
    "annotation without id": (annotation(id=None), "annotation-id", 1, None),
    "annotation id is text": (annotation(id="9"), "annotation-id-odd", 1, "9"),
    "annotation id with a point": (annotation(id=9.0), "annotation-id-odd", 1, 9.0),
    "annotation id is negative": (annotation(id=-1), "annotation-id-odd", 1, -1),
    "annotation id beyond 64 bits": (annotation(id=10**20), "annotation-id-odd", 1, 10**20),
    "annotation id beyond all numbers": (annotation(id=10**400), "annotation-id", 1, None),
    "annotation id is NaN": (annotation(id=NAN), "annotation-id", 1, None),
    "annotation id is 0": (annotation(id=0), "annotation-id-odd", 1, 0),
    "annotation id twice": (annotation(id=2), "annotation-id-twice", 1, 2),
    "no image id": (annotation(image_id=None), "image-reference", None, 1),
    "image id is a list": (annotation(image_id=[1]), "image-reference", None, 1),
    "image id is null": (json_null("image_id"), "unknown-image", None, 1),
    "unknown image": (annotation(image_id=9), "unknown-image", 9, 1),
    "image id is text": (annotation(image_id="1"), "unknown-image", "1", 1),
    "no category id": (annotation(category_id=None), "category-reference", *FIRST),
    "unknown category": (annotation(category_id=0), "unknown-category", *FIRST),
    "category id is a dict": (annotation(category_id={}), "category-reference", *FIRST),
    "Roboflow's root": (with_root, "category-root", None, None),
    "copy": (append_copy(), "annotation-copy", 1, 5),
    "no iscrowd": (annotation(iscrowd=None), "iscrowd-missing", *FIRST),
    "iscrowd is null": (json_null("iscrowd"), "iscrowd", *FIRST),
    "iscrowd is text": (annotation(iscrowd="0"), "iscrowd", *FIRST),
    "iscrowd is 2": (annotation(iscrowd=2), "iscrowd", *FIRST),
    "ignored": (annotation(ignore=1), "ignore", *FIRST),
    "ignore is null": (json_null("ignore"), "ignore", *FIRST),
    "no area": (annotation(area=None), "area", *FIRST),
    "area is null": (json_null("area"), "area", *FIRST),
    "area is text": (annotation(area="1024"), "area", *FIRST),
    "area is NaN": (annotation(area=NAN), "area", *FIRST),
    "area is negative": (annotation(area=-1), "area", *FIRST),
    "area beyond all numbers": (annotation(area=10**400), "area", *FIRST),
    "keypoints are text": (annotation(keypoints="x"), "keypoints", *FIRST),
    "keypoints with null": (annotation(keypoints=[1, 2, None]), "keypoints", *FIRST),
    "no box": (annotation(bbox=None), "box", *FIRST),
    "box is null": (json_null("bbox"), "box", *FIRST),
    "box of three": (annotation(bbox=[8, 8, 32]), "box", *FIRST),
    "box with NaN": (annotation(bbox=[8, 8, 32, NAN]), "box", *FIRST),
    "box with text": (annotation(bbox=[8, 8, 32, "32"]), "box", *FIRST),
    "box is a dict of four": (annotation(bbox=dict.fromkeys("xywh", 8)), "box", *FIRST),
    "box without width": (annotation(bbox=[8, 8, 0, 32]), "box-empty", *FIRST),
    "box with negative height": (annotation(bbox=[8, 40, 32, -32]), "box-empty", *FIRST),
    "box of corners": (annotation(bbox=[8, 8, 40, 40]), "box-differs", *FIRST),
    "box 2.5 pixels off": (annotation(bbox=[5.5, 8, 34.5, 32]), "box-differs", *FIRST),
    "box of another object": (annotation(bbox=[50, 10, 40, 40]), "box-elsewhere", *FIRST),
    "box outside": (annotation(bbox=[-50, 10, 40, 40]), "box-elsewhere", *FIRST),
    "box as large as numbers": (annotation(bbox=[8, 8, 1e308, 1e308]), "box", *FIRST),
    "no mask": (annotation(segmentation=None), "mask-missing", *FIRST),
    "mask without polygons": (annotation(segmentation=[]), "mask-missing", *FIRST),
    "mask is null": (json_null("segmentation"), "mask-missing", *FIRST),
    "mask is text": (annotation(segmentation="x"), "mask-malformed", *FIRST),
    "mask is true": (annotation(segmentation=True), "mask-malformed", *FIRST),
    "mask is one polygon": (annotation(segmentation=SQUARE), "mask-flat", *FIRST),
    "polygon without points": (polygons([]), "polygon-points", *FIRST),
    "polygon of two points": (polygons([9, 9, 20, 20]), "polygon-points", *FIRST),
    "odd polygon": (polygons([9, 9, 20, 9, 20, 20, 9]), "polygon-points", *FIRST),
    "polygon with NaN": (polygons([9, 9, 20, 9, 20, NAN]), "polygon-numbers", *FIRST),
    "polygon with infinity": (polygons([9, 9, 20, 9, 20, -INF]), "polygon-numbers", *FIRST),
    "polygon with null": (polygons([9, 9, 20, 9, 20, None]), "polygon-numbers", *FIRST),
    "polygon with text": (polygons([9, 9, 20, 9, 20, "9"]), "polygon-numbers", *FIRST),
    "polygon of pairs": (polygons([[9, 9], [20, 9], [20, 20]]), "polygon-pairs", *FIRST),
    "polygon of six pairs": (
        polygons([[9, 9], [20, 9], [20, 20], [20, 21], [9, 21], [9, 20]]),
        *("polygon-pairs", *FIRST),
    ),
    "mask of pairs": (
        annotation(segmentation=[[8, 8], [40, 8], [40, 40], [8, 40]]),
        *("polygon-pairs", *FIRST),
    ),
    "area of the box of a triangle": (
        annotation(segmentation=[[8, 8, 40, 8, 40, 40]]),
        *("area-differs", *FIRST),
    ),
    "area of 0": (annotation(area=0), "area-differs", *FIRST),
    "area of RLE": (
        annotation(segmentation=ROW, bbox=[0, 0, WIDTH, 1], area=3 * WIDTH),
        *("area-differs", *FIRST),
    ),
    "polygon is null": (polygons(None), "polygon-numbers", *FIRST),
    "polygon beyond floats": (polygons([9, 9, 20, 9, 20, 10**400]), "polygon-numbers", *FIRST),
    "polygon far away": (polygons([9, 9, 20, 9, 20, 1e9]), "polygon-far", *FIRST),
    "line": (polygons([9, 9, 20, 20, 30, 30]), "polygon-flat", *FIRST),
    "point three times": (polygons([9, 9] * 3), "polygon-flat", *FIRST),
    "line with rounding errors": (
        polygons([0.1, 0.1, 0.2, 0.2, 0.7, 0.7, 30.3, 30.3]),
        *("polygon-flat", *FIRST),
    ),
    "polygon left of the image": (polygons([-9, 9, 0, 9, 0, 20]), "polygon-outside", *FIRST),
    "polygon below the image": (polygons([9, 64, 20, 64, 20, 70]), "polygon-outside", *FIRST),
    "RLE of another size": (
        annotation(segmentation={"size": [WIDTH, HEIGHT], "counts": [0, WIDTH * HEIGHT]}),
        *("rle-size", *FIRST),
    ),
    "RLE without counts": (annotation(segmentation={"size": [64, 96]}), "rle-counts", *FIRST),
    "RLE without size": (annotation(segmentation={"counts": [9]}), "rle-counts", *FIRST),
    "RLE that does not add up": (
        annotation(segmentation={**ROW, "counts": [5, 5]}),
        *("rle-counts", *FIRST),
    ),
    "negative counts": (
        annotation(segmentation={**ROW, "counts": [-1, 64 * 96 + 1]}),
        *("rle-counts", *FIRST),
    ),
    "counts with a point": (
        annotation(segmentation={**ROW, "counts": [64 * 96.0]}),
        *("rle-counts", *FIRST),
    ),
    # pycocotools would read beyond its end
    "compressed RLE cut off": (
        annotation(segmentation={**ROW, "counts": "Po"}),
        *("rle-counts", *FIRST),
    ),
    "compressed RLE that does not add up": (
        annotation(segmentation={**ROW, "counts": "11"}),
        *("rle-counts", *FIRST),
    ),
    # As CVAT writes a brush mask
    "RLE crowd with attributes": (
        annotation(**OF_ROW, iscrowd=1, attributes={"occluded": False}),
        *("crowd-mask", *FIRST),
    ),
    # By 90 degrees about (24, 18): what was 32 x 20 pixels is 20 x 32
    "rectangle that CVAT has turned": (
        annotation(
            segmentation=[[8, 8, 40, 8, 40, 28, 8, 28]],
            **{"bbox": [8, 8, 32, 20], "area": 640, "attributes": {"rotation": 90.0}},
        ),
        *("box-rotated", *FIRST),
    ),
    "RLE without pixels": (
        annotation(segmentation={**ROW, "counts": [64 * 96]}),
        *("rle-empty", *FIRST),
    ),
}


@pytest.mark.parametrize("case", ONE_THING_WRONG)
def test_one_thing_wrong_is_one_finding(case, dataset):
    change, *found = ONE_THING_WRONG[case]
    contents = contents_of(dataset)
    change(contents)
    # The images are of other cases, and a third one is not there
    assert serious(check(dataset, contents, images=False)) == [tuple(found)]


def test_all_kinds_are_tested():
    of_files = {"image-missing", "image-unreadable", "image-truncated", "image-size"}
    of_files |= {"image-renamed"}
    # These are in tests/test_image_reading.py
    of_files |= {"image-pixels", "image-deep", "image-deep-color", "image-16-bits"}
    of_files |= {"image-orientation", "image-orientation-unclear"}
    of_all = {"no-images", "no-categories", "no-objects", "normalised", "byte-order-mark"}
    notes = {name for name, kind in KINDS.items() if kind.level is Level.NOTE}
    tested = {case[1] for case in ONE_THING_WRONG.values()}
    assert tested | of_files | of_all | notes == set(KINDS)


NOTHING_WRONG = {
    "box 2 pixels off": annotation(bbox=[6, 8, 34, 32]),
    "box 5 % off": annotation(
        segmentation=[[0, 0, 80, 0, 80, 60, 0, 60]], bbox=[4, 0, 76, 60], area=4800
    ),
    "triangle of half a pixel": annotation(
        segmentation=[[8, 8, 9, 8, 9, 9]], bbox=[8, 8, 1, 1], area=0
    ),
    "bow tie, which has the area 0 by its sign": annotation(
        segmentation=[[8, 8, 40, 40, 40, 8, 8, 40]], area=512
    ),
    "area of overlapping parts, counted twice": annotation(
        segmentation=[SQUARE, SQUARE], area=2 * 1024
    ),
    "area of overlapping parts, counted once": annotation(segmentation=[SQUARE, SQUARE]),
    "area 5 % off": annotation(area=1075),
    "area of a small object 20 pixels off": annotation(
        segmentation=[[8, 8, 12, 8, 12, 12, 8, 12]], bbox=[8, 8, 4, 4], area=36
    ),
    "true is 1 and false is 0": annotation(iscrowd=False, ignore=False),
    "ids with a point refer as well": annotation(image_id=1.0, category_id=1.0),
    "RLE": annotation(segmentation=ROW, bbox=[0, 0, WIDTH, 1], area=WIDTH),
    "compressed RLE": annotation(  # of the whole image: 0 pixels outside, 6144 inside
        segmentation={**ROW, "counts": "0PP6"}, bbox=[0, 0, WIDTH, HEIGHT], area=6144
    ),
    # It counts in no range of sizes, and those of COCO differ by up to two thirds
    "area of a crowd": annotation(
        segmentation=ROW, bbox=[0, 0, WIDTH, 1], area=3 * WIDTH, iscrowd=1
    ),
    "fields of one's own": annotation(color="red", keypoints=[]),
    "CVAT's attributes": annotation(attributes={"occluded": False, "rotation": 0.0}),
    # The mask, which is what counts, says how it lies
    "polygon that CVAT has turned": annotation(
        segmentation=[[24, 8, 40, 24, 24, 40, 8, 24]], area=512, attributes={"rotation": 45.0}
    ),
    "attributes of any kind": annotation(attributes=["x"]),
    "rotation of any kind": annotation(attributes={"rotation": "x"}),
    "few crowds of RLE, as COCO has": annotation(**OF_ROW, iscrowd=1),
    "group of categories that has objects, too": lambda contents: [
        x.update(supercategory="none" if x["id"] == 1 else "a") for x in contents["categories"]
    ],
}


@pytest.mark.parametrize("case", NOTHING_WRONG)
def test_nothing_wrong(case, dataset):
    contents = contents_of(dataset)
    NOTHING_WRONG[case](contents)
    assert serious(check(dataset, contents)) == []


@pytest.mark.parametrize("changed", [lambda k: -k, lambda k: 2**53 + k, lambda k: 2**60 + k])
def test_negative_and_large_ids_of_images_and_categories_are_fine(changed, dataset):
    contents = contents_of(dataset)
    for entry in contents["images"] + contents["categories"]:
        entry["id"] = changed(entry["id"])
    for entry in contents["annotations"]:
        entry.update({k: changed(entry[k]) for k in ("image_id", "category_id")})
    assert serious(check(dataset, contents)) == []


def test_ids_of_text_are_fine(dataset):
    contents = contents_of(dataset)
    for entry in contents["images"] + contents["categories"]:
        entry["id"] = f"n{entry['id']}"
    for entry in contents["annotations"]:
        entry.update(image_id=f"n{entry['image_id']}", category_id=f"n{entry['category_id']}")
    findings = check(dataset, contents)
    assert serious(findings) == []
    assert {f.kind for f in findings.all} == {"mask-formats", "category-ids"}


def notes_of(findings):
    return {(f.kind, f.image_id, f.annotation_id) for f in findings.of(Level.NOTE)}


def test_notes(dataset):
    contents = contents_of(dataset)
    contents["images"].append({"id": 3, "file_name": "3.png", **SIZE})
    contents["categories"].append({"id": 9, "name": "z"})
    contents["annotations"][0]["iscrowd"] = 1
    # 3 pixels beyond the left edge; the box is that of the whole polygon
    contents["annotations"][1].update(
        segmentation=[[-3, 10, 40, 10, 40, 50]], bbox=[-3, 10, 43, 40]
    )
    findings = check(dataset, contents, images=False)
    assert serious(findings) == []
    assert notes_of(findings) == {
        ("mask-formats", None, None),
        ("image-empty", 3, None),
        ("category-ids", None, None),
        ("category-unused", None, None),
        ("crowd", 1, 1),
        ("polygon-over-edge", 1, 2),
    }
    text = findings.summary()
    assert "polygon 1 extends 3 pixels" in text
    assert "category 9, 'z'" in text
    assert "the category ids are not 1 to 4: 4 is not among them" in text


def test_the_box_of_a_mask_over_the_edge_may_be_cut_off(dataset):
    contents = contents_of(dataset)
    contents["annotations"][1].update(segmentation=[[-9, 10, 40, 10, 40, 50]])
    contents["annotations"][1].update(bbox=[0, 10, 40, 40], area=980)
    assert serious(check(dataset, contents)) == []


def test_mask_format(dataset):
    contents = contents_of(dataset)
    contents["annotations"][0].update(
        segmentation=ROW, bbox=[0, 0, WIDTH, 1], area=WIDTH, iscrowd=1
    )
    findings = check(dataset, contents)
    assert findings.mask_format == "polygon"  # crowds are not trained on
    assert "3 masks of polygons, 1 of RLE: mask format 'polygon'" in findings.summary()
    contents["annotations"][0]["iscrowd"] = 0
    assert check(dataset, contents).mask_format == "bitmask"


def test_parts_of_findings(dataset):
    contents = contents_of(dataset)
    contents["annotations"][0]["segmentation"].append([1, 2, 3, 4])
    (finding,) = check(dataset, contents).of(Level.ERROR)
    assert finding == Finding(
        *("polygon-points", Level.ERROR, "polygon 2 has 2 points"),
        *(1, 1, "1.png", 0, 1),
    )
    assert str(finding) == f"image 1 '1.png', annotation 1: {finding.message}"


def test_empty_lists(dataset):
    nothing = {"images": [], "annotations": [], "categories": []}
    contents = contents_of(dataset)
    kinds = {f.kind for f in check(dataset, nothing).all}
    assert kinds == {"no-images", "no-categories", "no-objects"}
    for entry in contents["annotations"]:
        entry["iscrowd"] = 1
    assert serious(check(dataset, contents)) == [("no-objects", None, None)]


def normalise(contents, *keys):
    """From pixels to shares of the images' sides."""
    for entry in contents["annotations"]:
        if "bbox" in keys:
            x, y, width, height = entry["bbox"]
            entry["bbox"] = [x / WIDTH, y / HEIGHT, width / WIDTH, height / HEIGHT]
        if "segmentation" in keys:
            entry["segmentation"] = [
                [x / (HEIGHT if k % 2 else WIDTH) for k, x in enumerate(polygon)]
                for polygon in entry["segmentation"]
            ]


@pytest.mark.parametrize("keys", [["bbox"], ["segmentation"], ["bbox", "segmentation"]])
def test_coordinates_from_0_to_1_are_one_error(keys, dataset):
    contents = contents_of(dataset)
    normalise(contents, *keys)
    findings = check(dataset, contents)
    assert serious(findings) == [("normalised", None, None)]
    (finding,) = findings.of(Level.ERROR)
    assert ("4 polygons" in finding.message) == ("segmentation" in keys)
    assert ("4 boxes" in finding.message) == ("bbox" in keys)


def test_the_share_of_wrong_areas_is_told(dataset):
    contents = contents_of(dataset)
    for entry in contents["annotations"][:3]:
        entry["area"] *= 3
    findings = check(dataset, contents)
    assert [f.kind for f in findings.of(Level.WARNING)] == 3 * ["area-differs"]
    assert "area-differs (3 of 4)" in findings.summary()


def test_a_byte_order_mark_is_one_error(dataset):
    path = dataset / "a.json"
    path.write_text(path.read_text(), "utf-8-sig")
    assert serious(check(dataset)) == [("byte-order-mark", None, None)]


def test_why_there_are_no_objects(dataset):
    clean = contents_of(dataset)

    def message(change):
        contents = copy.deepcopy(clean)
        change(contents)
        (found,) = (f for f in check(dataset, contents).all if f.kind == "no-objects")
        return found.message

    def of_all(**changes):
        return lambda contents: [entry.update(changes) for entry in contents["annotations"]]

    assert "is empty" in message(lambda contents: contents.update(annotations=[]))
    assert "not a crowd" in message(of_all(iscrowd=1))
    assert "such as '1', and the ids of images are such as 1" in message(of_all(image_id="1"))
    assert "category" in message(of_all(category_id=77))


def test_crowds_of_tools_that_write_all_rle_as_crowds(dataset):
    """COCO's crowds are RLE, too, but few."""
    contents = contents_of(dataset)
    for k, entry in enumerate(contents["annotations"]):
        entry.update({**OF_ROW, "iscrowd": 1} if k < 2 else {})
    contents["annotations"].append({**contents["annotations"][0], "id": 5, "category_id": 2})
    findings = check(dataset, contents)
    assert [f.annotation_id for f in findings.all if f.kind == "crowd-mask"] == [1, 2, 5]
    del contents["annotations"][4]
    kinds = {f.kind for f in check(dataset, contents).all}
    assert "crowd" in kinds and "crowd-mask" not in kinds  # half of them are too few to tell
    for entry in contents["annotations"]:
        entry.update(**OF_ROW, iscrowd=1)
    (error,) = check(dataset, contents).of(Level.ERROR)
    assert error.kind == "no-objects"
    assert "CVAT" in error.message and "--crowds-to-objects" in error.message


def test_boxes_without_masks_say_how_cvat_turned_them(dataset):
    contents = contents_of(dataset)
    contents["annotations"][0].update(segmentation=[], attributes={"rotation": 30.0})
    (error,) = check(dataset, contents).of(Level.ERROR)
    assert error.kind == "mask-missing" and "only a box (CVAT has turned it by 30" in error.message


# Images


@pytest.mark.parametrize(
    "name", ["images/0a1b2c3d-1.png", "../media/0a1b2c3d-1.png", r"images\1.png", "/data/1.png"]
)
def test_names_of_label_studio_and_others(name, dataset):
    contents = contents_of(dataset)
    contents["images"][0]["file_name"] = name
    findings = check(dataset, contents)
    assert serious(findings) == [("image-renamed", 1, None)] and len(findings.bad_images) == 1
    (error,) = findings.of(Level.ERROR)
    assert error.file_name == name and "'1.png'" in error.message


def test_eight_characters_in_the_middle_of_a_name_are_not_of_label_studio(dataset):
    contents = contents_of(dataset)
    (dataset / "images" / "x-1.png").write_bytes((dataset / "images" / "1.png").read_bytes())
    contents["images"][0]["file_name"] = "x-0a1b2c3d-1.png"
    assert [f.kind for f in check(dataset, contents).bad_images] == ["image-missing"]


@pytest.mark.parametrize("other", ["1.png", "b/1.png", "images/11112222-1.png"])
def test_a_file_is_not_that_of_two_names(other, dataset):
    contents = contents_of(dataset)
    for entry, name in zip(contents["images"], ["images/0a1b2c3d-1.png", other]):
        entry["file_name"] = name
    kinds = [(f.kind, f.image_id) for f in check(dataset, contents).bad_images]
    assert kinds == [("image-missing", k) for k in ([1] if other == "1.png" else [1, 2])]


def test_files_of_images(dataset):
    images = dataset / "images"
    names = ["gone.png", "folder", "text.png", "cut.jpg", "cut.png", "header.png", "small.png"]
    names += ["a\0b.png", "empty.png", "1.png/x.png"]
    contents = contents_of(dataset)
    for k, name in enumerate(names, start=3):
        contents["images"].append({"id": k, "file_name": name, **SIZE})
    (images / "folder").mkdir()
    (images / "text.png").write_text("no image at all")
    noise = Image.effect_noise((WIDTH, HEIGHT), 100).convert("RGB")
    for name in ("cut.jpg", "cut.png", "header.png"):
        noise.save(images / name)
        size = (images / name).stat().st_size
        os.truncate(images / name, 20 if name == "header.png" else size // 2)
    Image.new("RGB", (HEIGHT, WIDTH)).save(images / "small.png")
    (images / "empty.png").touch()
    expected = {
        3: "image-missing",
        4: "image-unreadable",
        5: "image-unreadable",
        6: "image-truncated",
        7: "image-truncated",
        8: "image-unreadable",
        9: "image-size",
        10: "image-unreadable",
        11: "image-unreadable",
        12: "image-missing",
    }
    for quick in (False, True):
        findings = check(dataset, contents, quick=quick)
        assert {f.image_id: f.kind for f in findings.bad_images} == expected
        assert findings.of(Level.ERROR) == findings.bad_images
    messages = {f.image_id: f.message for f in findings.bad_images}
    assert messages[4] == "it is a folder"
    assert messages[9] == "it has 64 x 96 pixels (width x height), the annotations say 96 x 64"


@pytest.mark.parametrize("name", ["1.jpg", "1.png"])
@pytest.mark.parametrize("quick", [False, True])
def test_turned_images_have_their_size_as_detectron2_reads_them(name, quick, dataset):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(dataset / "images" / name, exif=exif)
    contents = contents_of(dataset)
    contents["images"][0]["file_name"] = name
    assert serious(check(dataset, contents, quick=quick)) == []
    Image.new("RGB", (WIDTH, HEIGHT)).save(dataset / "images" / name, exif=exif)
    assert serious(check(dataset, quick=quick)) == [("image-orientation", 1, None)]


@pytest.mark.parametrize("quick", [False, True])
def test_bytes_after_the_end_of_an_image_are_fine(quick, dataset):
    contents = contents_of(dataset)
    for entry in contents["images"]:
        name = entry["file_name"].replace("png", "jpg")
        Image.new("RGB", (WIDTH, HEIGHT)).save(dataset / "images" / name)
        with open(dataset / "images" / name, "ab") as f:
            f.write(b"\0" * 100)
        entry["file_name"] = name
    assert serious(check(dataset, contents, quick=quick)) == []


def test_damage_within_an_image_is_found_by_decoding(dataset):
    path = dataset / "images" / "1.png"
    data = bytearray(path.read_bytes())
    data[60] ^= 255
    path.write_bytes(data)
    assert check(dataset, quick=True).bad_images == []
    (finding,) = check(dataset).bad_images
    assert finding.kind == "image-unreadable" and finding.file_name == "1.png"


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_large_images_are_no_end(dataset, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH - 1)
    assert serious(check(dataset)) == []  # Pillow warns
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    findings = check(dataset)
    assert {f.kind for f in findings.of(Level.ERROR)} == {"image-pixels"}
    settings = ImageSettings(max_pixels=HEIGHT * WIDTH)
    assert serious(check(dataset, settings=settings)) == []
    assert Image.MAX_IMAGE_PIXELS == 100


def test_each_file_is_read_once(dataset):
    contents = contents_of(dataset)
    contents["images"][1]["file_name"] = "1.png"
    assert check(dataset, contents).num_files == 1


# Files that are none


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b'{"images": [',
        b"\x80\x02}q\x00.",
        b"[1, 2]",
        b"3",
        b"null",
        b'{"images": {}, "annotations": [], "categories": []}',
        b'{"images": [], "annotations": []}',
        b"[" * 100_000,
    ],
)
def test_other_files_are_one_sentence(contents, tmp_path):
    (tmp_path / "a.json").write_bytes(contents)
    with pytest.raises(UserError, match="a.json' (is not JSON|has no list of)"):
        check(tmp_path, images=False)


def test_missing_paths_are_one_sentence(dataset):
    with pytest.raises(UserError, match="does not exist"):
        check_dataset(str(dataset / "none.json"), None)
    with pytest.raises(UserError, match="is a folder"):
        check_dataset(str(dataset), None)
    with pytest.raises(UserError, match="There is no folder"):
        check_dataset(str(dataset / "a.json"), str(dataset / "none"))


# The command


def run(monkeypatch, capsys, *args):
    """Exit code and what was printed."""
    code = exit_code("check-data", *args)
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_the_command_shows_what_it_found(dataset, monkeypatch, capsys):
    path, images = dataset / "a.json", dataset / "images"
    code, text = run(monkeypatch, capsys, path, images)
    assert code == 0
    assert "2 images, 4 annotations, 3 categories" in text and "Decoded 2 files in" in text
    assert text.endswith("\n0 errors, 0 warnings, 1 note.\n")

    contents = contents_of(dataset)
    for entry in contents["annotations"]:
        entry["segmentation"].append([1, 2, 3, 4])
    path.write_text(json.dumps(contents))
    code, text = run(monkeypatch, capsys, path, images, "--show", 1)
    assert code == 1
    assert f"ERRORS: 4\n  polygon-points (4): {KINDS['polygon-points'].title}\n" in text
    assert "    - image 1 '1.png', annotation 1: polygon 2 has 2 points\n" in text
    assert "    - ... and 3 more\n" in text and "(--all shows all.)" in text
    fixed = dataset / "a_fixed.json"
    assert text.endswith(f"msrcnn-d2 check-data {path} {images} --fix {fixed}\n")
    code, text = run(monkeypatch, capsys, path, images, "--all", "--quick")
    assert "--all" not in text and "of 2 files in" in text


def test_warnings_count_if_it_is_to_be_strict(dataset, monkeypatch, capsys):
    contents = contents_of(dataset)
    del contents["annotations"][0]["iscrowd"]
    (dataset / "a.json").write_text(json.dumps(contents))
    arguments = dataset / "a.json", "--no-images"
    assert run(monkeypatch, capsys, *arguments)[0] == 0
    code, text = run(monkeypatch, capsys, *arguments, "--strict")
    assert code == 1 and "not checked" in text


def test_findings_as_data(dataset, monkeypatch, capsys):
    contents = contents_of(dataset)
    contents["annotations"][0].update(id=NAN, bbox=[1, 2])
    (dataset / "a.json").write_text(json.dumps(contents))
    out = dataset / "out.json"
    code, _ = run(monkeypatch, capsys, dataset / "a.json", dataset / "images", "--json", out)
    data = json.loads(out.read_text(), parse_constant=lambda x: pytest.fail(f"{x} is no JSON"))
    assert code == 1
    assert data["counts"] == {"annotation-id": 1, "box": 1, "mask-formats": 1}
    assert data["findings"][1]["kind"] == "box" and data["findings"][1]["image_id"] == 1


def test_what_the_command_cannot_do_is_one_sentence(dataset, monkeypatch, capsys):
    path, images = dataset / "a.json", dataset / "images"
    before = path.read_bytes()
    (dataset / "link.json").symlink_to(path)
    for arguments, message in [
        ((dataset / "none.json", images), "does not exist"),
        ((path, dataset / "none"), "There is no folder"),
        ((path, images, "--fix", path), "is the input"),
        ((path, images, "--fix", dataset / "link.json"), "is the input"),
        ((path, images, "--json", path), "is the input"),
        ((path, images, "--fix", images), "is no file"),
        ((path, images, "--fix", dataset / "none" / "b.json"), "Cannot write"),
        ((path,), "folder of the images, or --no-images"),
        ((path, images, "--fix", "b.json", "--json", "b.json"), "need two files"),
        ((path, images, "--workers", 0), "at least 1"),
    ]:
        code, text = run(monkeypatch, capsys, *arguments)
        assert code == 2 and message in text and "Traceback" not in text
    assert path.read_bytes() == before
    assert sorted(x.name for x in dataset.iterdir()) == ["a.json", "images", "link.json"]


def test_the_command_starts_without_a_warning(dataset):
    command = [
        sys.executable,
        "-m",
        "msrcnn_d2_cli",
        "check-data",
        dataset / "a.json",
        "--no-images",
    ]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stderr == ""


# Real data


@pytest.mark.skipif(
    real_datasets() is None, reason="no COCO: set DETECTRON2_DATASETS to the folder of coco/"
)
@pytest.mark.parametrize("quick", [False, True])
def test_no_false_alarms_on_real_data(quick):
    coco = real_datasets() / "coco"
    for split in ("train2017", "val2017"):
        path = coco / "annotations" / f"instances_{split}.json"
        findings = check_dataset(str(path), str(coco / split), quick, progress=False)
        assert serious(findings) == [] and findings.mask_format == "polygon"
        assert "category-ids" in {f.kind for f in findings.all}


@pytest.mark.skipif(
    real_datasets() is None or not (real_datasets() / "nuclei").is_dir(), reason="no nuclei"
)
def test_no_false_alarms_on_real_masks():
    nuclei = real_datasets() / "nuclei"
    path = nuclei / "annotations" / "nuclei_val.json"
    findings = check_dataset(str(path), str(nuclei / "val"), progress=False)
    assert serious(findings) == [] and findings.mask_format == "bitmask"
