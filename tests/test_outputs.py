"""Predictions are written to each format, survive a kill, and are read again by other programs."""

import csv
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image
from scipy import ndimage

from msrcnn_d2.coco_format import check_fits, read_annotations, read_results
from msrcnn_d2_runtime.drawing import draw_predictions
from msrcnn_d2_runtime.errors import UserError
from msrcnn_d2_runtime.mask_encoding import encode_bitmasks
from msrcnn_d2_runtime.outputs import KINDS, JsonLines, OutputFolder
from msrcnn_d2_runtime.outputs.polygons import polygons_of
from msrcnn_d2_runtime.predictions import CroppedMasks, PredictedImage, Predictions, RoiMasks

CLASSES = ["bus", "Käfer 甲虫", 'a, "b"\tc']
ALL = [*KINDS]
SETTINGS = {"model": "m.pth", "min_score": 0.5, "classes": ["bus"]}
# In two folders, with blanks and letters of many scripts; the last one is not UTF-8
NAMES = [
    "b/a.jpg",
    "a/a.jpg",
    "a/ä ö 图.png",
    "scan.tif",
    "no objects.webp",
    os.fsdecode(b"\xe9.png"),
]


def image_of(name, calibrated=False):
    """An image with random objects, which depend on its name."""
    rng = np.random.default_rng([*os.fsencode(name)])
    height, width = rng.integers(20, 40, 2)
    bitmaps = rng.random((0 if "no objects" in name else 5, height, width)) < 0.3
    bitmaps[:1, 5:15, 5:15] = True  # overlaps with the others
    bitmaps[-1:] = False
    n = len(bitmaps)
    corners = np.sort(rng.random((n, 2, 2)) * (width, height), axis=1).reshape(n, 4)
    scores, ious = -np.sort(-rng.random((2, n), dtype=np.float32))
    fields = {"scores": scores, "pred_mask_ious": ious, "mask_scores": scores * ious}
    if calibrated:
        probs = -np.sort(-rng.random((n, 10), dtype=np.float32))
        fields |= {"mask_iou_probs": probs, "quality_scores": probs.mean(axis=1)}
        fields |= {"expected_mask_ious": probs.mean(axis=1) / 2}
    predictions = Predictions(
        pred_boxes=corners.astype(np.float32),
        pred_classes=rng.integers(0, 3, n),
        masks=CroppedMasks.of(bitmaps),
        scores=fields,
        ranking="quality_scores" if calibrated else "mask_scores",
    )
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PredictedImage(name, f"/data/{name}", image, predictions)


def opened(folder, kinds=ALL, **kwargs):
    kwargs = {"class_names": CLASSES, "settings": SETTINGS, **kwargs}
    return OutputFolder(str(folder), kinds, **kwargs)


def run(folder, names=NAMES, kinds=ALL, calibrated=False, **kwargs):
    """A run over the images that are not done."""
    with opened(folder, kinds, **kwargs) as output:
        for name in names:
            if name not in output.done:
                output.write(image_of(name, calibrated))
    return folder


def contents(folder):
    """All files and empty folders, by their paths."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.is_file() or not any(path.iterdir())
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("outputs") / "whole")


def lines_of(folder):
    return [json.loads(x) for x in (folder / "predictions.jsonl").read_bytes().splitlines()]


def csv_rows(path):
    with open(path, encoding="utf-8-sig", newline="") as f:
        return [*csv.DictReader(f)]


# ---- each format


def test_lines_have_all_predictions(whole):
    lines = lines_of(whole)
    assert [line["image"] for line in lines] == NAMES
    for line in lines:
        expected = image_of(line["image"]).predictions
        assert (line["height"], line["width"]) == expected.image_size
        assert line["source"] == f"/data/{line['image']}" and line["ranked_by"] == "mask_score"
        found = line["predictions"]
        assert [p["class"] for p in found] == [CLASSES[k] for k in expected.pred_classes]
        assert [p["category_id"] - 1 for p in found] == expected.pred_classes.tolist()
        for key, field in [
            ("score", "scores"),
            ("pred_mask_iou", "pred_mask_ious"),
            ("mask_score", "mask_scores"),
        ]:
            values = np.array([p[key] for p in found], dtype=np.float32)
            assert np.array_equal(values, expected.get(field))
        boxes = np.array([p["bbox"] for p in found]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        assert np.allclose(boxes, expected.pred_boxes, atol=2e-3)
        for p, mask in zip(found, expected.pred_masks):
            assert np.array_equal(mask_util.decode(p["segmentation"]), mask)
            assert p["area"] == mask.sum()


def test_lines_to_a_stream_are_the_same(whole):
    stream = io.BytesIO()
    lines = JsonLines(stream, CLASSES)
    for name in NAMES:
        lines.write(image_of(name))
    assert stream.getvalue() == (whole / "predictions.jsonl").read_bytes()


def test_names_in_any_script_are_kept_as_utf_8(whole):
    for file in ("predictions.jsonl", "predictions.csv"):
        text = (whole / file).read_text(encoding="utf-8")
        assert "a/ä ö 图.png" in text and CLASSES[1] in text


def test_csv_has_a_line_for_each_object(whole):
    assert (whole / "predictions.csv").read_bytes().startswith(b"\xef\xbb\xbf")  # for Excel
    rows = csv_rows(whole / "predictions.csv")
    lines = {line["image"]: line["predictions"] for line in lines_of(whole)}
    del lines["no objects.webp"]
    *names, last = sorted(lines)
    assert [row["image"] for row in rows[::5]] == [*names, "\\udce9.png"] and len(rows) == 25
    for row in rows[:20]:
        entry = lines[row["image"]][int(row["instance"]) - 1]
        assert row["class"] == entry["class"] and int(row["area"]) == entry["area"]
        for key in ("score", "pred_mask_iou", "mask_score"):
            assert float(row[key]) == entry[key]
        x, y, width, height = entry["bbox"]
        box = [float(row[key]) for key in ("x_min", "y_min", "x_max", "y_max")]
        assert np.allclose(box, [x, y, x + width, y + height], atol=1e-3)
    assert "quality_score" not in rows[0]


def test_label_maps_show_the_best_object_of_each_pixel(whole):
    for name in NAMES:
        masks = image_of(name).predictions.pred_masks
        expected = np.zeros(masks.shape[1:], dtype=int)
        for k in reversed(range(len(masks))):
            expected[masks[k]] = k + 1
        found = np.asarray(Image.open(whole / "label_maps" / f"{name}.png"))
        assert found.dtype == np.uint16 and np.array_equal(found, expected)
    assert csv_rows(whole / "label_maps/legend.csv") == csv_rows(whole / "predictions.csv")


def test_each_object_has_a_mask(whole):
    for name in NAMES:
        masks = image_of(name).predictions.pred_masks
        files = sorted((whole / "masks" / name).iterdir())
        assert [f.name for f in files] == [f"{k:03}.png" for k in range(1, len(masks) + 1)]
        for file, mask in zip(files, masks):
            assert np.array_equal(np.asarray(Image.open(file).convert("L")), mask * 255)


def test_coco_results_are_read_by_the_evaluation(tmp_path):
    names = NAMES[:-1]
    folder = run(tmp_path / "output", names, ["coco"], calibrated=True)
    results = read_results(str(folder / "coco_instances_results.json"))
    ids = {name: k for k, name in enumerate(sorted(names), 1)}
    entries = {ids[line["image"]]: line["predictions"] for line in lines_of(folder)}
    assert len(results) == 20
    for result in results:
        entry = entries[result.pop("image_id")].pop(0)
        assert set(entry) - set(result) == {"class", "area"}
        assert all(entry[key] == value for key, value in result.items())
    for key in ("quality_score", "expected_iou", "mask_iou_probs"):
        assert key in result


def annotations_of(path, names, class_names=CLASSES):
    """Ground truth that lists images and classes in another order, with other ids."""
    thing = {"id": 1, "image_id": 70, "category_id": 10, "iscrowd": 0, "area": 9}
    thing |= {"bbox": [1, 1, 3, 3], "segmentation": [[1, 1, 4, 1, 4, 4, 1, 4]]}
    images = []
    for k, name in enumerate(reversed(names)):
        height, width = map(int, image_of(NAMES[len(names) - 1 - k]).predictions.image_size)
        images.append({"id": 70 + k, "file_name": name, "height": height, "width": width})
    categories = [{"id": 10 + k, "name": x} for k, x in enumerate(reversed(class_names))]
    contents = {"images": images, "annotations": [thing], "categories": categories}
    path.write_text(json.dumps(contents))
    return str(path)


@pytest.mark.parametrize("segmentation", ["polygons", "rle"])
def test_a_dataset_has_all_masks_and_scores(tmp_path, segmentation):
    names = NAMES[:-1]
    folder = run(tmp_path / "output", names, ["dataset"], True, segmentation=segmentation)
    coco = read_annotations(str(folder / "annotations/instances_predictions.json"))
    assert [coco.cats[k]["name"] for k in (1, 2, 3)] == CLASSES
    assert [image["file_name"] for image in coco.dataset["images"]] == sorted(names)
    for image_id, image in coco.imgs.items():
        (line,) = (x for x in lines_of(folder) if x["image"] == image["file_name"])
        entries = [p for p in line["predictions"] if p["area"]]  # without the empty mask
        annotations = coco.loadAnns(coco.getAnnIds(image_id))
        assert len(annotations) == len(entries) == (0 if "no objects" in line["image"] else 4)
        for annotation, entry in zip(annotations, entries):
            mask = mask_util.decode(entry["segmentation"])
            assert np.array_equal(coco.annToMask(annotation), mask)
            rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
            x, y, width, height = annotation["bbox"]
            assert (x, x + width, y, y + height) == (
                *(columns[0], columns[-1] + 1),
                *(rows[0], rows[-1] + 1),
            )
            scores = ["score", "pred_mask_iou", "mask_score", "quality_score", "expected_iou"]
            for key in ("category_id", "area", "mask_iou_probs", *scores):
                assert annotation[key] == entry[key]
            assert annotation["attributes"] == {key: entry[key] for key in scores}
            assert (annotation["segmentation"] == entry["segmentation"]) == (segmentation == "rle")


def test_datumaro_imports_the_dataset(many_parts):
    dm = pytest.importorskip("datumaro")
    dataset = dm.Dataset.import_from(str(many_parts), "coco")
    labels = [label.name for label in dataset.categories()[dm.AnnotationType.label]]
    assert sorted(item.id for item in dataset) == ["a/b c", "a/ä 图"]
    for item in dataset:
        (line,) = (x for x in lines_of(many_parts) if x["image"].startswith(item.id))
        entries = [p for p in line["predictions"] if p["area"]]
        found = {}  # object -> its parts
        for annotation in item.annotations:
            if annotation.type == dm.AnnotationType.polygon:
                found.setdefault(annotation.group, []).append(annotation)
        assert len(found) == len(entries)
        for key, entry in zip(sorted(found), entries):
            assert drawn([x.points for x in found[key]], entry)
            assert {labels[x.label] for x in found[key]} == {entry["class"]}
            attributes = found[key][0].attributes
            assert all(attributes[x] == entry[x] for x in ("score", "mask_score", "pred_mask_iou"))


def test_label_studio_imports_the_dataset(many_parts, tmp_path):
    coco = pytest.importorskip("label_studio_sdk.converter.imports.coco")
    annotations = str(many_parts / "annotations/instances_predictions.json")
    coco.convert_coco_to_ls(annotations, str(tmp_path / "tasks.json"), out_type="predictions")
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    lines = sorted(lines_of(many_parts), key=lambda line: line["image"])
    for task, line in zip(tasks, lines, strict=True):
        assert unquote(task["data"]["image"]).endswith(line["image"])
        entries = [p for p in line["predictions"] if p["area"]]
        found = []
        for item in task["predictions"][0]["result"]:
            if item["type"] == "rectanglelabels":  # before the parts of each object
                found.append((item["value"]["rectanglelabels"], []))
            else:
                points = np.array(item["value"]["points"]) * (line["width"], line["height"])
                found[-1][1].append(points.ravel() / 100)
        for (label, polygons), entry in zip(found, entries, strict=True):
            assert label == [entry["class"]] and drawn(polygons, entry)


def drawn(polygons, entry):
    """Whether polygons are the mask of a prediction."""
    polygons = [np.asarray(p, dtype=float).tolist() for p in polygons]
    merged = mask_util.merge(mask_util.frPyObjects(polygons, *entry["segmentation"]["size"]))
    return merged["counts"].decode() == entry["segmentation"]["counts"]


@pytest.fixture(scope="module")
def many_parts(tmp_path_factory):
    """A dataset, with images, whose masks have many parts and holes."""
    folder = tmp_path_factory.mktemp("dataset")
    names = ["a/ä 图.png", "a/b c.png"]
    run(folder, names, ["dataset"])
    (folder / "images/a").mkdir(parents=True)
    for name in names:
        Image.fromarray(image_of(name).image).save(folder / "images" / name)
    entries = [entry for line in lines_of(folder) for entry in line["predictions"]]
    parts_and_holes = [parts_and_holes_of(mask_util.decode(x["segmentation"])) for x in entries]
    assert np.max(parts_and_holes, axis=0).min() > 5
    return folder


def parts_and_holes_of(mask):
    """Pixels of a part may touch at corners; those of a hole may not."""
    _, num_parts = ndimage.label(mask, np.ones((3, 3)))
    _, num_outside = ndimage.label(np.pad(mask, 1) == 0)
    return num_parts, num_outside - 1


@pytest.mark.parametrize(
    "picture",
    [
        "#",
        "###",
        "# #",
        "#. .#",
        "##. #.#",
        "### #.# ###",
        ".#. #.# .#.",
        "##### #.#.# #####",
        "#### #..# #.## ####",
        "####. #..## #.#.# ##..# .####",
        "##### #...# #.#.# #...# #####",
        "####### #.....# #.###.# #.#.#.# #.###.# #.....# #######",
        "#.#.# .#.#. #.#.#",
    ],
)
def test_polygons_of_small_masks(picture):
    mask = np.array([[x == "#" for x in row] for row in picture.split()])
    check_polygons(mask)
    check_polygons(np.pad(mask, 2))


def test_polygons_of_random_masks():
    rng = np.random.default_rng(0)
    for _ in range(300):
        mask = rng.random(rng.integers(1, 20, 2)) < rng.random()
        check_polygons(np.repeat(mask, rng.integers(1, 3), axis=rng.integers(2)))


def check_polygons(mask):
    (rle,) = encode_bitmasks(mask[None])
    polygons = polygons_of(rle)
    assert len(polygons) == parts_and_holes_of(mask)[0]
    assert not polygons or drawn(polygons, {"segmentation": rle})
    # How often each polygon goes around the centre of each pixel: crossings on the left of it
    around = np.zeros(mask.shape, dtype=int)
    for polygon in polygons:
        points = np.array(polygon).reshape(-1, 2)
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0)):
            assert (x0 == x1) != (y0 == y1)  # along the edges of pixels
            if x0 == x1:
                around[min(y0, y1) : max(y0, y1), x0:] += 1 if y1 < y0 else -1
    assert np.array_equal(around, mask)


@pytest.mark.parametrize("prefix", ["", "val/"])
def test_results_can_have_the_ids_of_annotations(tmp_path, prefix):
    names = NAMES[1:5]
    known = annotations_of(tmp_path / "gt.json", [prefix + NAMES[0], *(prefix + x for x in names)])
    folder = run(tmp_path / "output", names, ["coco"], annotations=known)
    results = read_results(str(folder / "coco_instances_results.json"))
    fitting = check_fits(results, read_annotations(known))  # also checks the size of each image
    ids = {name: 74 - NAMES.index(name) for name in names}
    assert {r["image_id"] for r in fitting} == {ids[x] for x in names if "no objects" not in x}
    for line in lines_of(folder):
        for entry in line["predictions"]:
            assert entry["category_id"] == 12 - CLASSES.index(entry["class"])


def test_images_and_classes_that_annotations_lack_are_refused(tmp_path):
    known = annotations_of(tmp_path / "gt.json", ["a.jpg", "x/b.png"])
    with opened(tmp_path / "output", ["coco"], annotations=known) as output:
        output.write(image_of("a/a.jpg"))
        with pytest.raises(UserError, match="b/a.jpg"):  # a second a.jpg
            output.write(image_of("b/a.jpg"))
        with pytest.raises(UserError, match="c.png"):
            output.write(image_of("c.png"))
        assert output.done == {"a/a.jpg"}
    with pytest.raises(UserError, match="cat"):
        opened(tmp_path / "other", class_names=["cat"], annotations=known)
    for wrong in ("{}", "[", "[1]"):
        (tmp_path / "wrong.json").write_text(wrong)
        with pytest.raises(UserError, match="wrong.json"):
            opened(tmp_path / "other", annotations=str(tmp_path / "wrong.json"))
    assert not (tmp_path / "other").exists()


def test_without_images_all_files_are_there(tmp_path):
    folder = run(tmp_path / "output", [])
    assert json.loads((folder / "coco_instances_results.json").read_text()) == []
    assert csv_rows(folder / "predictions.csv") == []


def test_pictures_are_drawn_on(whole, tmp_path):
    for name in NAMES:
        picture = name if name.endswith((".jpg", ".png")) else f"{name}.png"
        found = Image.open(whole / "pictures" / picture)
        assert found.format == ("JPEG" if name.endswith(".jpg") else "PNG")
        image = image_of(name)
        drawn = draw_predictions(image.image, image.predictions, CLASSES)
        if found.format == "JPEG":
            assert found.size == drawn.shape[1::-1]
        else:
            assert np.array_equal(np.asarray(found), drawn)
    folder = run(tmp_path / "output", ["1.png"], ["pictures"], labels="full", legend=True)
    image = image_of("1.png")
    drawn = draw_predictions(image.image, image.predictions, CLASSES, labels="full", legend=True)
    assert np.array_equal(np.asarray(Image.open(folder / "pictures/1.png")), drawn)


@pytest.mark.parametrize("side, times", [(10, 1), (9000, 2)])
def test_small_masks_are_pasted_once(tmp_path, side, times):
    class Counted(RoiMasks):
        count = 0

        def crop(self, k):
            self.count += 1
            return super().crop(k)

    image = image_of("1.png")
    predictions = image.predictions[:3]
    boxes = np.float32([[2, 3, 2 + side, 3 + side]] * 3)
    masks = Counted(np.ones((3, 28, 28), np.float32), boxes, predictions.image_size)
    image.predictions = predictions.replaced(pred_boxes=boxes, masks=masks)
    with opened(tmp_path / "output", ["pictures"]) as output:
        output.write(image)
    assert masks.count == 3 * times
    drawn = draw_predictions(image.image, image.predictions, CLASSES)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "output/pictures/1.png")), drawn)


def test_pictures_do_not_overwrite_each_other(tmp_path):
    names = ["1.tif.png", "1.tif", "2.tif", "2.tif.png", "1.tif.png.png", "3", "3.PNG"]
    for k, name in enumerate(names):  # stopped after each image
        run(tmp_path / "output", [name], ["pictures"], resume=k > 0)
    pictures = [*(tmp_path / "output/pictures").iterdir()]
    found = {np.asarray(Image.open(path)).tobytes() for path in pictures}
    expected = [draw_predictions(x.image, x.predictions, CLASSES) for x in map(image_of, names)]
    assert found == {picture.tobytes() for picture in expected} and len(found) == len(names)


# ---- kills


def test_a_run_that_stops_after_any_image_ends_the_same(whole, tmp_path):
    for k in range(len(NAMES) + 1):
        folder = tmp_path / str(k)
        with pytest.raises(KeyboardInterrupt), opened(folder, resume=True) as output:
            for name in NAMES[:k]:
                output.write(image_of(name))
            raise KeyboardInterrupt
        assert not (folder / "predictions.csv").exists()
        assert contents(run(folder, resume=True)) == contents(whole)
    assert contents(run(folder, resume=True)) == contents(whole)  # with nothing to do


@pytest.mark.parametrize("rest", [b"", b"\0" * 5000, b'{"image": 3}\n', b"[]\n"])
def test_a_line_that_was_cut_anywhere_is_written_again(whole, tmp_path, rest):
    journal = (whole / "predictions.jsonl").read_bytes()
    start = journal[:-1].rindex(b"\n") + 1
    for end in (start, start + 1, (start + len(journal)) // 2, len(journal) - 1):
        folder = tmp_path / str(end)
        shutil.copytree(whole, folder)
        (folder / "predictions.jsonl").write_bytes(journal[:end] + rest)
        with opened(folder, resume=True) as output:
            assert output.done == set(NAMES[:-1])
            output.write(image_of(NAMES[-1]))
        assert contents(folder) == contents(whole)


def test_the_order_of_images_does_not_matter(whole, tmp_path):
    found = contents(run(tmp_path / "output", NAMES[::-1]))
    expected = contents(whole)
    journal = Path("predictions.jsonl")
    assert sorted(found.pop(journal).splitlines()) == sorted(expected.pop(journal).splitlines())
    assert found == expected


def slow_run(folder):
    time_between = 0.005
    with opened(folder, resume=True) as output:
        for k in range(1000):
            if f"{k}.png" not in output.done:
                output.write(image_of(f"{k}.png"))
                time.sleep(time_between)


def test_a_process_may_be_killed_at_any_time(tmp_path):
    folder, journal = tmp_path / "output", tmp_path / "output/predictions.jsonl"
    for k in range(3):
        process = multiprocessing.get_context("fork").Process(target=slow_run, args=(folder,))
        process.start()
        before = len(lines_of(folder)) if k else 0
        deadline = time.monotonic() + 60
        while not journal.exists() or journal.read_bytes().count(b"\n") < before + 5 + k:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    names = [f"{k}.png" for k in range(len(lines_of(folder)) + 3)]
    expected = contents(run(tmp_path / "expected", names))
    assert contents(run(folder, names, resume=True)) == expected


def test_a_full_disk_leaves_whole_lines(tmp_path):
    with opened(tmp_path / "output", ["jsonl"]) as output:
        output.write(image_of("1.png"))
        size = (tmp_path / "output/predictions.jsonl").stat().st_size
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, limits[1]))
        try:
            with pytest.raises(OSError):
                output.write(image_of("2.png"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        output.write(image_of("3.png"))
    assert [line["image"] for line in lines_of(tmp_path / "output")] == ["1.png", "3.png"]


def test_kinds_can_be_added(whole, tmp_path):
    folder = run(tmp_path / "output", kinds=["pictures", "csv"])
    for kind in ALL:
        run(folder, kinds=[kind], resume=True)
    assert contents(folder) == contents(whole)


# ---- other folders


def test_a_folder_of_another_run_is_refused(tmp_path):
    folder = run(tmp_path / "output", NAMES[:1], ["csv"])
    before = contents(folder)
    refused = [
        {},
        {"resume": True, "settings": {**SETTINGS, "min_score": 0.4}},
        {"resume": True, "class_names": CLASSES[::-1]},
        {"resume": True, "labels": "full"},
        {"resume": True, "kinds": ["pictures"]},
    ]
    for kwargs in refused:
        with pytest.raises(UserError, match="output"):
            opened(folder, **{"kinds": ["csv"], **kwargs})
    assert contents(folder) == before
    opened(folder, ["csv"], resume=True).close()


def test_a_run_that_ended_before_its_first_image_leaves_its_folder_to_others(tmp_path):
    """As after a mistake that shows only when the model is running."""
    folder = tmp_path / "output"
    with pytest.raises(UserError), opened(folder):
        raise UserError("the model predicts no IoU")
    assert contents(run(folder, settings={}, kinds=["csv"])) == contents(
        run(tmp_path / "new", settings={}, kinds=["csv"])
    )


def test_other_folders_and_files_are_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").touch()
    for resume in (False, True):
        for wrong in ("photos", "photos/a.jpg"):
            with pytest.raises(UserError, match=wrong):
                opened(tmp_path / wrong, resume=resume)
    assert [*(tmp_path / "photos").iterdir()] == [tmp_path / "photos/a.jpg"]
    (tmp_path / "empty").mkdir()
    opened(tmp_path / "empty").close()


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    with opened(tmp_path / "output"):
        with pytest.raises(UserError, match="[Aa]nother process"):
            opened(tmp_path / "output", resume=True)
    opened(tmp_path / "output", resume=True).close()


def test_unknown_kinds_and_names_that_leave_the_folder_are_errors(tmp_path):
    with pytest.raises(ValueError, match="pngs"):
        opened(tmp_path / "output", ["pngs"])
    with opened(tmp_path / "output", ["csv"]) as output:
        for name in ("../a.jpg", "/a.jpg", "a/../../b.jpg"):
            with pytest.raises(AssertionError):
                output.write(image_of(name))
