"""A fixed dataset is one that Detectron2 and pycocotools take, with as much as possible kept."""

import contextlib
import copy
import io
import json
import random

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets import load_coco_json

from msrcnn_d2.dataset_check import Level, check_dataset
from msrcnn_d2.dataset_check.check import Dataset, find_issues, read_dataset
from msrcnn_d2.dataset_check.fix import fix_issues
from msrcnn_d2.dataset_check.images import look_at_images
from msrcnn_d2.dataset_check.issues import KINDS, Fix
from tests.helpers.command import exit_code
from tests.helpers.toy import IMAGE_SIZE, OBJECTS, write_coco_json, write_images
from tests.test_dataset_check import INF, NAN, ONE_THING_WRONG, ROW, SQUARE, normalise, with_root

HEIGHT, WIDTH = IMAGE_SIZE
SIZE = {"height": HEIGHT, "width": WIDTH}
TRIANGLE = [50, 10, 90, 10, 90, 50]
# Errors in annotations that only a person can correct
LEFT = {"no-images", "no-categories", "no-objects", "normalised", "image-id-mixed"}
LEFT |= {"category-id-twice", "category-id-mixed", "category-name"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The toy dataset and a third image, which it does not have; no test changes its files."""
    path = tmp_path_factory.mktemp("dataset")
    write_coco_json(path / "a.json")
    (path / "images").mkdir()
    write_images(path / "images", [*OBJECTS, []])
    return path


@pytest.fixture
def contents(folder):
    return json.loads((folder / "a.json").read_text())


def fix(contents, folder, **options):
    names = [x["file_name"] for x in contents["images"] if is_named(x)]
    files = look_at_images(str(folder / "images"), names, num_workers=1, progress=False)
    return fix_issues(Dataset(contents, files), **options)


def is_named(image):
    name = image.get("file_name") if isinstance(image, dict) else None
    return isinstance(name, str) and bool(name)


def assert_usable(contents, folder, path):
    """Nothing that can be fixed is left, and without errors Detectron2 and COCO take the file."""
    path.write_text(json.dumps(contents))
    findings = check_dataset(str(path), str(folder / "images"), progress=False)
    for finding in findings.all:
        assert KINDS[finding.kind].fix is Fix.NOTHING, str(finding)
    errors = {finding.kind for finding in findings.of(Level.ERROR)}
    assert errors <= LEFT, errors
    if errors <= {"no-objects"}:
        for record, instances in mapped(path, folder, findings.mask_format):
            assert len(instances) == sum(a["iscrowd"] == 0 for a in record["annotations"])
            assert not len(instances) or instances.has("gt_masks")
        assert_evaluates(path)


def mapped(path, folder, mask_format):
    """For each image what Detectron2's loader and its mapper make of it."""
    name = f"fixed_{path.stem}"
    dicts = load_coco_json(str(path), str(folder / "images"), name)
    MetadataCatalog.pop(name)
    mapper = DatasetMapper(
        True,
        # Not smaller, so that no mask loses its last pixel
        augmentations=[T.ResizeShortestEdge([96, 96], 192), T.RandomFlip()],
        image_format="BGR",
        use_instance_mask=True,
        instance_mask_format=mask_format,
    )
    return [(record, mapper(record)["instances"]) for record in dicts]


def assert_evaluates(path):
    """The objects themselves as detections are all right."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        objects = [a for a in truth.anns.values() if not a["iscrowd"]]
        keys = "image_id", "category_id"
        results = [
            {**{k: a[k] for k in keys}, "segmentation": as_text(truth.annToRLE(a)), "score": 1.0}
            for a in objects
        ]
        if not results:
            return
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert -1 <= evaluation.stats[0] <= 1


def as_text(rle):
    counts = rle["counts"]
    return {**rle, "counts": counts.decode() if isinstance(counts, bytes) else counts}


@pytest.mark.parametrize("case", ONE_THING_WRONG)
def test_whatever_is_wrong_is_usable_afterwards(case, contents, folder, tmp_path):
    change, kind, *_ = ONE_THING_WRONG[case]
    change(contents)
    fixed = fix(contents, folder)
    done = {change.finding.kind for change in fixed.changes}
    assert (kind in done) == (KINDS[kind].fix is not Fix.NOTHING)
    assert fixed.left.of(Level.ERROR) == [] or kind in LEFT
    assert_usable(contents, folder, tmp_path / "b.json")


def changed(contents, folder, **changes):
    """Annotation 1 after it was changed and fixed; None if it is gone."""
    contents["annotations"][0].update(changes)
    for key in [k for k, v in changes.items() if v is None]:
        del contents["annotations"][0][key]
    fix(contents, folder)
    found = [a for a in contents["annotations"] if a["image_id"] == 1 and a["category_id"] == 1]
    return found[0] if found else None


FIXED = {
    "polygon among good ones": (
        {"segmentation": [[1, 2], SQUARE, [NAN] * 6, TRIANGLE, [1e9, *TRIANGLE[1:]]]},
        # The triangle has half of 40 x 40 pixels without its diagonal
        {"segmentation": [SQUARE, TRIANGLE], "bbox": [8, 8, 82, 42], "area": 1024 + 780},
    ),
    "mask as one list": ({"segmentation": SQUARE}, {"segmentation": [SQUARE]}),
    "mask of pairs": (
        {"segmentation": [[8, 8], [40, 8], [40, 40], [8, 40]]},
        {"segmentation": [SQUARE]},
    ),
    "polygons of pairs": (
        {"segmentation": [[[8, 8], [40, 8], [40, 40], [8, 40]], SQUARE]},
        {"segmentation": [SQUARE, SQUARE]},
    ),
    "area of another object": ({"area": 9}, {"area": 32 * 32}),
    "id of 60 bits": ({"id": 2**60}, {"id": 1}),
    "negative id": ({"id": -3}, {"id": 1}),
    "no box": ({"bbox": None}, {"bbox": [8, 8, 32, 32]}),
    "box of corners": ({"bbox": [8, 8, 40, 40]}, {"bbox": [8, 8, 32, 32]}),
    "box of RLE": ({"segmentation": ROW, "area": 96}, {"bbox": [0, 0, 96, 1]}),
    "no area": ({"area": None}, {"area": 32 * 32}),
    "area of RLE": ({"segmentation": ROW, "area": None}, {"area": 96, "bbox": [0, 0, 96, 1]}),
    "area of two polygons": (
        # The triangle has as many pixels as pycocotools gives it
        {"segmentation": [SQUARE, [0, 50, 4, 50, 4, 54, 0, 54]], "area": "x"},
        {"area": 32 * 32 + 4 * 4, "bbox": [0, 8, 40, 46]},
    ),
    "no iscrowd": ({"iscrowd": None}, {"iscrowd": 0}),
    "id of text": ({"id": "1"}, {"id": 1}),
    "id 0": ({"id": 0}, {"id": 1}),
}


@pytest.mark.parametrize("case", FIXED)
def test_fixed_annotations(case, contents, folder):
    changes, expected = FIXED[case]
    before = copy.deepcopy(contents)
    before["annotations"][0].update({k: v for k, v in changes.items() if v is not None})
    entry = changed(contents, folder, own_field={"a": [1]}, **changes)
    assert entry.pop("own_field") == {"a": [1]}
    assert entry == {**before["annotations"][0], **expected}
    assert contents["annotations"][1:] == before["annotations"][1:]


def test_masks_of_cvat_are_objects_if_the_user_says_so(contents, folder, tmp_path):
    """The area of one is wrong besides, which does not matter in a crowd."""
    for entry in contents["annotations"]:
        entry.update(segmentation=ROW, bbox=[0, 0, WIDTH, 1], area=WIDTH, iscrowd=1)
        entry["attributes"] = {"occluded": False}
    contents["annotations"][1].update(category_id=3, area=500)
    before = copy.deepcopy(contents)
    fixed = fix(contents, folder)
    assert contents == before and {f.kind for f in fixed.left.of(Level.ERROR)} == {"no-objects"}
    fixed = fix(contents, folder, crowds_to_objects=True)
    assert changes_of(fixed)[:4] == [("crowd-mask", Fix.SET_CROWD)] * 4
    assert [x["iscrowd"] for x in contents["annotations"]] == [0] * len(contents["annotations"])
    assert contents["annotations"][1]["area"] == WIDTH
    assert_usable(contents, folder, tmp_path / "b.json")


def test_real_crowds_stay(contents, folder):
    contents["annotations"][0].update(segmentation=ROW, bbox=[0, 0, WIDTH, 1], iscrowd=1)
    before = copy.deepcopy(contents)
    assert fix(contents, folder).changes == [] and contents == before


def test_a_rectangle_is_turned_as_in_cvat(contents, folder):
    """By 90 degrees about its centre (24, 18); 32 x 20 pixels become 20 x 32."""
    entry = changed(
        contents,
        folder,
        **{"segmentation": [[8, 8, 40, 8, 40, 28, 8, 28]], "bbox": [8, 8, 32, 20], "area": 640},
        attributes={"rotation": 90.0},
    )
    assert entry["segmentation"] == [[34, 2, 34, 34, 14, 34, 14, 2]]  # clockwise: up is now right
    assert entry["bbox"] == [14, 2, 20, 32] and entry["area"] == 640
    assert fix(contents, folder).changes == []  # it is not turned once more


def test_the_root_of_roboflow_is_left_out(contents, folder):
    with_root(contents)
    before = copy.deepcopy(contents["annotations"])
    fixed = fix(contents, folder)
    assert [x["id"] for x in contents["categories"]] == [1, 2, 3]
    assert contents["annotations"] == before
    assert changes_of(fixed) == [("category-root", Fix.DROP)]


def test_names_of_label_studio_become_those_of_the_files(contents, folder):
    for entry in contents["images"]:
        entry["file_name"] = f"images/0a1b2c3d-{entry['file_name']}"
    contents["images"][1]["width"] += 1  # of no file: it is left out, as with its right name
    fixed = fix(contents, folder)
    assert [(x["id"], x["file_name"]) for x in contents["images"]] == [(1, "1.png")]
    assert changes_of(fixed)[:2] == [("image-renamed", Fix.SET_FILE_NAME)] * 2
    assert "'1.png'" in str(fixed.changes[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"segmentation": [[1, 2, 3, 4]]},
        {"segmentation": [[NAN] * 6, [9, 9] * 3]},
        {"segmentation": None},
        {"segmentation": "x"},
        {"segmentation": {**ROW, "counts": [5, 5]}},
        {"segmentation": {**ROW, "counts": [HEIGHT * WIDTH]}},
        {"segmentation": {"size": [WIDTH, HEIGHT], "counts": [0, HEIGHT * WIDTH]}},
        {"segmentation": [[-9, 9, 0, 9, 0, 20]]},
        {"category_id": 7},
        {"image_id": 7},
        {"iscrowd": "0"},
        {"iscrowd": 2},
        {"ignore": 1},
        {"ignore": "0"},
    ],
)
def test_annotations_that_cannot_be_kept(changes, contents, folder):
    assert changed(contents, folder, **changes) is None
    assert len(contents["annotations"]) == 3


def test_bad_images_go_with_their_annotations(contents, folder):
    contents["images"][0]["file_name"] = "none.png"
    fixed = fix(contents, folder)
    assert [x["id"] for x in contents["images"]] == [2]
    assert [x["id"] for x in contents["annotations"]] == [3, 4]
    assert changes_of(fixed) == [("image-missing", Fix.DROP)] + 2 * [
        ("unknown-image", Fix.DROP_WITH_IMAGE)
    ]
    assert "image-missing (1): left out" in fixed.summary()
    assert "annotations (2): left out with their image" in fixed.summary()


def test_missing_sizes_are_those_of_the_files(contents, folder):
    for entry in contents["images"]:
        del entry["height"], entry["width"]
    del contents["annotations"][0]["area"]
    before = len(contents["annotations"])
    fixed = fix(contents, folder)
    assert [(x["height"], x["width"]) for x in contents["images"]] == [IMAGE_SIZE] * 2
    assert len(contents["annotations"]) == before and contents["annotations"][0]["area"] == 1024
    assert changes_of(fixed)[:2] == [("image-sides", Fix.SET_SIZE)] * 2


def test_missing_sizes_without_files_cost_the_image(contents):
    del contents["images"][0]["height"]
    fix_issues(Dataset(contents))
    assert [x["id"] for x in contents["images"]] == [2]


def changes_of(fixed):
    return [(change.finding.kind, change.fix) for change in fixed.changes]


def test_the_first_of_equal_entries_stays(contents, folder):
    contents["images"].append(dict(contents["images"][0]))
    contents["annotations"].append({**contents["annotations"][1], "id": 1})
    contents["annotations"].append({**contents["annotations"][1], "id": 1, "category_id": 3})
    fix(contents, folder)
    assert [x["id"] for x in contents["images"]] == [1, 2]
    # The first is a copy of annotation 2, the second has only the id of another one
    assert [x["id"] for x in contents["annotations"]] == [1, 2, 3, 4, 5]
    assert contents["annotations"][-1]["category_id"] == 3


def test_images_with_one_id_are_left_out_if_they_differ(contents, folder):
    """Which of them the annotations are of is not known."""
    contents["images"].append({"id": 1, "file_name": "3.png", **SIZE})
    fixed = fix(contents, folder)
    assert [x["id"] for x in contents["images"]] == [2]
    assert [x["id"] for x in contents["annotations"]] == [3, 4]
    assert {x.finding.index for x in fixed.changes if x.finding.kind == "image-id-twice"} == {0, 2}


def double_category(contents):
    contents["categories"].append({"id": 1, "name": "second"})


ONLY_FOR_A_PERSON = {
    "normalised": lambda contents: normalise(contents, "bbox", "segmentation"),
    "category-id-twice": double_category,
    "category-name": lambda contents: contents["categories"][0].pop("name"),
    "category-id-mixed": lambda contents: contents["categories"].append({"id": "x", "name": "x"}),
    "image-id-mixed": lambda contents: contents["images"][1].update(id="2"),
}


@pytest.mark.parametrize("kind", ONLY_FOR_A_PERSON)
def test_what_only_a_person_knows_stays(kind, contents, folder):
    ONLY_FOR_A_PERSON[kind](contents)
    if kind == "image-id-mixed":
        for entry in contents["annotations"][2:]:
            entry["image_id"] = "2"
    before = copy.deepcopy(contents)
    fixed = fix(contents, folder)
    assert contents == before and fixed.changes == []
    assert {finding.kind for finding in fixed.left.of(Level.ERROR)} == {kind}


def test_boxes_and_areas_are_not_computed_from_masks_that_are_not_in_pixels(contents, folder):
    normalise(contents, "segmentation")
    del contents["annotations"][0]["area"], contents["annotations"][1]["bbox"]
    before = copy.deepcopy(contents)
    assert fix(contents, folder).changes == [] and contents == before


def test_a_byte_order_mark_is_not_written_again(folder, tmp_path, monkeypatch, capsys, contents):
    path, fixed = tmp_path / "a.json", tmp_path / "b.json"
    path.write_text(json.dumps(contents), "utf-8-sig")
    assert run(monkeypatch, capsys, path, folder / "images")[0] == 1
    code, text = run(monkeypatch, capsys, path, folder / "images", "--fix", fixed)
    assert code == 0 and "byte-order-mark (1)" in text
    assert json.loads(fixed.read_text()) == contents


def test_the_command_writes_a_fixed_copy(folder, tmp_path, monkeypatch, capsys, contents):
    contents.update(info={"year": 2020}, licenses=[], own=[1, {"a": None}])
    contents["annotations"][0]["segmentation"].insert(0, [1, 2])
    contents["annotations"][1]["id"] = 1
    contents["annotations"][3]["category_id"] = 77
    path, fixed = tmp_path / "a.json", tmp_path / "b.json"
    path.write_text(json.dumps(contents))
    before = path.read_bytes()
    arguments = path, folder / "images", "--fix", fixed, "--json", tmp_path / "c.json"
    code, text = run(monkeypatch, capsys, *arguments)
    assert code == 0
    assert f"FIXED in {fixed}:\n" in text
    assert "polygon-points (1): left out the polygon\n    - image 1 '1.png', annotation 1" in text
    assert "annotation-id-twice (1): gave a new id\n" in text and "annotation 1: id 2" in text
    assert "unknown-category (1): left out\n" in text
    assert "0 errors, 0 warnings" in text

    assert path.read_bytes() == before
    written = json.loads(fixed.read_text())
    assert list(written) == list(contents)
    assert (written["info"], written["own"]) == ({"year": 2020}, [1, {"a": None}])
    assert [x["id"] for x in written["annotations"]] == [1, 2, 3]
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.json", "b.json", "c.json"]
    changes = json.loads((tmp_path / "c.json").read_text())["fixed"]["changes"]
    assert {x["kind"] for x in changes} == {
        *("polygon-points", "annotation-id-twice", "unknown-category")
    }
    assert_usable(written, folder, tmp_path / "d.json")


def test_the_command_says_how_crowds_become_objects(
    folder, tmp_path, monkeypatch, capsys, contents
):
    for entry in contents["annotations"][:1]:
        entry.update(segmentation=ROW, bbox=[0, 0, WIDTH, 1], area=WIDTH, iscrowd=1, attributes={})
    path, fixed = tmp_path / "a.json", tmp_path / "a_fixed.json"
    path.write_text(json.dumps(contents))
    code, text = run(monkeypatch, capsys, path, folder / "images")
    command = f"msrcnn-d2 check-data {path} {folder / 'images'} --fix {fixed} --crowds-to-objects"
    assert code == 0 and text.endswith(f"{command}\n")
    code, text = run(monkeypatch, capsys, *command.split()[2:])
    assert code == 0 and "crowd-mask (1): set iscrowd to 0\n" in text and command not in text
    assert json.loads(fixed.read_text())["annotations"][0]["iscrowd"] == 0
    code, text = run(monkeypatch, capsys, path, folder / "images", "--crowds-to-objects")
    assert code == 2 and "needs --fix" in text


def test_what_nothing_is_left_of_is_still_an_error(folder, tmp_path, monkeypatch, capsys, contents):
    for entry in contents["annotations"]:
        entry["segmentation"] = []
    path = tmp_path / "a.json"
    path.write_text(json.dumps(contents))
    code, text = run(monkeypatch, capsys, path, folder / "images", "--fix", tmp_path / "b.json")
    assert code == 1 and "no-objects" in text
    assert json.loads((tmp_path / "b.json").read_text())["annotations"] == []


def test_the_wrong_folder_is_not_fixed(folder, tmp_path, monkeypatch, capsys):
    arguments = folder / "a.json", tmp_path, "--fix", tmp_path / "b.json"
    code, text = run(monkeypatch, capsys, *arguments)
    assert code == 2 and "None of the 2 images, such as '1.png', is in the folder" in text
    assert not list(tmp_path.iterdir())


def test_a_failed_check_leaves_no_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.json").write_text("x")
    (tmp_path / "b.json").write_text("was there before")
    arguments = tmp_path / "a.json", "--no-images", "--fix", tmp_path / "b.json"
    code, text = run(monkeypatch, capsys, *arguments)
    assert code == 2 and "is not JSON" in text
    assert (tmp_path / "b.json").read_text() == "was there before"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.json", "b.json"]


def run(monkeypatch, capsys, *args):
    code = exit_code("check-data", *args)
    printed = capsys.readouterr()
    return code, printed.out + printed.err


# Whatever may be in a file

VALUES = [None, True, False, "", "x", "1", [], {}, [[]], [1], {"a": 1}, 0, 1, -1, 2, 0.5]
VALUES += [NAN, INF, -INF, 1e308, -1e308, 10**30, 10**400, 2**53, 1e5, [1, 2, 3, 4], SQUARE]


def with_everything(folder):
    """The toy dataset with a crowd, RLE of both kinds, two polygons and keypoints besides."""
    contents = json.loads((folder / "a.json").read_text())
    entries = contents["annotations"]
    entries[0].update(keypoints=[1, 2, 2], num_keypoints=1, ignore=0)
    entries[0].update(attributes={"rotation": 30.0})
    entries[1]["segmentation"].append([1, 1, 5, 1, 5, 5])
    entries[1]["bbox"] = [1, 1, 89, 49]
    row = {"category_id": 1, "bbox": [0, 0, WIDTH, 1], "area": WIDTH, "iscrowd": 0}
    entries.append({"id": 5, "image_id": 1, **row, "segmentation": ROW, "iscrowd": 1})
    full = {**ROW, "counts": "0PP6"}
    entries.append({"id": 6, "image_id": 2, **row, "segmentation": full})
    entries[-1].update(bbox=[0, 0, WIDTH, HEIGHT], area=WIDTH * HEIGHT)
    return contents


def random_place(contents, rng):
    """A container and a key or index of it, at any depth."""
    container, key = contents, rng.choice(list(contents))
    while container is contents or rng.random() < 0.8:
        inner = container[key]
        if not isinstance(inner, (dict, list)) or not inner:
            break
        container = inner
        key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
    return container, key


def corrupt(contents, rng):
    for _ in range(rng.choice([1, 1, 2, 5])):
        container, key = random_place(contents, rng)
        if container is contents:  # of an empty list; without lists it is no dataset
            continue
        how = rng.random()
        if how < 0.15:
            del container[key]
        elif how < 0.3 and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))


@pytest.mark.parametrize("seed", range(10))
def test_corrupted_files_are_checked_and_fixed(seed, folder, tmp_path):
    rng = random.Random(seed)
    pristine = with_everything(folder)
    path = tmp_path / f"corrupted{seed}.json"
    for _ in range(40):
        contents = copy.deepcopy(pristine)
        corrupt(contents, rng)
        path.write_text(json.dumps(contents))
        dataset = read_dataset(str(path), str(folder / "images"), num_workers=1, progress=False)
        findings = find_issues(dataset)
        if not findings.of(Level.ERROR):
            mapped(path, folder, findings.mask_format)
            if not findings.of(Level.WARNING):
                assert_evaluates(path)
        fixed = fix_issues(dataset)
        fixed.summary(), fixed.left.summary(None), json.dumps(fixed.as_data())
        assert_usable(dataset.contents, folder, path)
