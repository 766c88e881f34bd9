"""
Annotations of tools, as these write them, are the masks that were drawn.

There are two images. The first has a square, an object of two parts and a ring; the second has a
circle and a rectangle. What a tool cannot draw, it does not have.
"""

import base64
import io
import json
import math
import zlib

import numpy as np
import pycocotools.mask as mask_util
import pytest
import yaml
from PIL import ExifTags, Image

import msrcnn_d2_cli.convert_data
from msrcnn_d2.annotation_tools import FORMATS, convert_annotations
from msrcnn_d2.dataset_check import check_dataset
from msrcnn_d2.utils.errors import UserError
from tests.helpers.command import exit_code

HEIGHT, WIDTH = SIZE = 60, 80
SQUARE = [[10, 10], [30, 10], [30, 30], [10, 30]]
PARTS = [[40, 10], [50, 10], [50, 20], [40, 20]], [[60, 10], [70, 10], [70, 20], [60, 20]]
OUTLINE = [[10, 35], [30, 35], [30, 55], [10, 55]]
HOLE = [[15, 40], [25, 40], [25, 50], [15, 50]]
RECTANGLE = [[5, 5], [15, 5], [15, 15], [5, 15]]
CENTRE, RADIUS = (40, 30), 10


def drawn(*rectangles, without=()):
    """The pixels in rectangles that run along the axes."""
    mask = np.zeros(SIZE, dtype=bool)
    for value, shapes in ((True, rectangles), (False, without)):
        for (left, top), _, (right, bottom), _ in shapes:
            mask[top:bottom, left:right] = value
    return mask


def disc():
    """The pixels whose centres are in the circle."""
    x, y = np.arange(WIDTH) + 0.5, np.arange(HEIGHT)[:, None] + 0.5
    return (x - CENTRE[0]) ** 2 + (y - CENTRE[1]) ** 2 < RADIUS**2


MASKS = {
    "square": drawn(SQUARE),
    "parts": drawn(*PARTS),
    "part": drawn(PARTS[0]),
    "ring": drawn(OUTLINE, without=[HOLE]),
    "plate": drawn(OUTLINE),
    "disc": disc(),
    "rectangle": drawn(RECTANGLE),
}


def write_images(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or ("a.png", "b.png"):
        Image.new("RGB", (WIDTH, HEIGHT), "gray").save(folder / name)


def labelme_shape(label, points, kind="polygon", **more):
    shape = {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}}
    return {**shape, "description": "", "mask": None, **more}


def write_labelme(folder, **shapes):
    write_images(folder, *(f"{name}.png" for name in shapes))
    for name, entries in shapes.items():
        contents = {"version": "5.5.0", "flags": {}, "shapes": entries, "imageData": None}
        contents |= {"imagePath": f"{name}.png", "imageHeight": HEIGHT, "imageWidth": WIDTH}
        (folder / f"{name}.json").write_text(json.dumps(contents))


def png(mask, **how):
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG", **how)
    return file.getvalue()


def labelme(folder):
    # A mask is that of the pixels from (10, 35) to (29, 54)
    ring = base64.b64encode(png(MASKS["ring"][35:55, 10:30])).decode()
    parts = [labelme_shape("cell", part, group_id=1) for part in PARTS]
    write_labelme(
        folder,
        a=[
            *(labelme_shape("cell", SQUARE), *parts),
            labelme_shape("ring", [[10, 35], [29, 54]], "mask", mask=ring),
            labelme_shape("cell", [[1, 1], [9, 9]], "line"),
            labelme_shape("__ignore__", SQUARE),
        ],
        b=[
            # Another object of the same group number, as it has another label
            labelme_shape("cell", [CENTRE, [CENTRE[0], CENTRE[1] + RADIUS]], "circle", group_id=2),
            labelme_shape("ring", [[15, 15], [5, 5]], "rectangle", group_id=2),
        ],
    )
    return folder, {}, {"a.png": ["square", "parts", "ring"], "b.png": ["disc", "rectangle"]}, 2


def via(folder):
    write_images(folder)

    def region(label, **shape):
        return {"shape_attributes": shape, "region_attributes": {"class": label, "note": "x"}}

    def polygon(points):
        x, y = zip(*points)
        return {"name": "polygon", "all_points_x": x, "all_points_y": y}

    regions = [region("cell", **polygon(SQUARE)), region("", **polygon(SQUARE))]
    regions += [region("ring", name="point", cx=1, cy=2)]
    ticked = {"cell": False, "ring": True}
    (folder / "via.json").write_text(
        json.dumps(
            {
                "_via_settings": {},
                "_via_img_metadata": {
                    "a.png123": {"filename": "a.png", "size": 123, "regions": regions},
                    "a.png-1": {"filename": "a.png", "size": -1, "regions": []},  # added again
                    "b.png123": {
                        "filename": "b.png",
                        "size": 123,
                        "regions": {  # as version 1 has it
                            "0": region("cell", name="circle", cx=40, cy=30, r=RADIUS),
                            "1": region(ticked, name="rect", x=5, y=5, width=10, height=10),
                        },
                    },
                },
            }
        )
    )
    return folder / "via.json", {}, {"a.png": ["square"], "b.png": ["disc", "rectangle"]}, 2


def brush(mask):
    """
    What Label Studio writes of a mask: 32 bits with the number of values, the bits of a value minus
    1, four times the bits of a run length minus 1, and runs: a bit for equal values, the kind of
    the length, the length minus 1, the value or the values.
    """
    values = np.repeat(mask.ravel() * 255, 4)
    bits = f"{len(values):032b}" + f"{7:05b}" + "".join(f"{x:04b}" for x in (2, 3, 7, 15))
    for k, run in enumerate(np.split(values, np.flatnonzero(np.diff(values)) + 1)):
        if k == 0:  # eight values that are not said to be equal
            bits += "0" + f"{0:02b}" + f"{8 - 1:03b}" + "".join(f"{x:08b}" for x in run[:8])
            run = run[8:]
        bits += "1" + f"{3:02b}" + f"{len(run) - 1:016b}" + f"{run[0]:08b}"
    bits += "0" * (-len(bits) % 8)
    return [int(bits[k : k + 8], 2) for k in range(0, len(bits), 8)]


def label_studio(folder):
    write_images(folder / "images", "a.png", "0a1b2c3d-b.png")

    def percent(points):
        return [[x / WIDTH * 100, y / HEIGHT * 100] for x, y in points]

    def result(id_, kind, **value):
        size = {"original_width": WIDTH, "original_height": HEIGHT}
        return {"id": id_, "type": kind, "value": value, "to_name": "image", **size}

    def task(id_, url, *results):
        annotations = [{"result": [], "was_cancelled": True}, {"result": results}]
        return {"id": id_, "data": {"text": "x", "image": url}, "annotations": annotations}

    rle = {"format": "rle", "rle": brush(MASKS["ring"])}
    circle = {"x": 50, "y": 50, "radiusX": RADIUS / WIDTH * 100, "radiusY": RADIUS / HEIGHT * 100}
    # Turned by 90 degrees about its upper left corner, which lies at (15, 5)
    box = {"x": 15 / WIDTH * 100, "y": 5 / HEIGHT * 100, "rotation": 90}
    box |= {"width": 10 / WIDTH * 100, "height": 10 / HEIGHT * 100}
    tasks = [
        task(
            1,
            "/data/upload/1/11112222-a.png",
            result("x", "polygon", points=percent(SQUARE)),
            result("x", "labels", points=percent(SQUARE), labels=["cell"]),
            result("y", "brushlabels", **rle, brushlabels=["ring"]),
            result("z", "keypointlabels", x=1, y=1, width=1, keypointlabels=["ring"]),
        ),
        task(
            2,
            "/data/local-files/?d=some/0a1b2c3d-b.png",
            result("x", "ellipselabels", **circle, ellipselabels=["cell"]),
            result("y", "rectanglelabels", **box, rectanglelabels=["ring"]),
        ),
        task(3, "c.png"),  # looked at, and without objects
        {"id": 4, "data": {"image": "d.png"}, "annotations": []},
    ]
    write_images(folder / "images", "c.png")
    (folder / "export.json").write_text(json.dumps(tasks))
    expected = {"a.png": ["square", "ring"], "0a1b2c3d-b.png": ["disc", "rectangle"], "c.png": []}
    return folder / "export.json", {"images": str(folder / "images")}, expected, 2


def supervisely(folder):
    write_images(folder / "ds" / "img")
    (folder / "ds" / "ann").mkdir()

    def figure(title, kind, **shape):
        return {"classTitle": title, "geometryType": kind, "tags": [], **shape}

    def points(exterior, *interior):
        return {"points": {"exterior": exterior, "interior": interior}}

    def bitmap(mask, left, top, **how):
        data = base64.b64encode(zlib.compress(png(mask, **how))).decode()
        return {"bitmap": {"data": data, "origin": [left, top]}}

    objects = {
        "a": [
            figure("cell", "polygon", **points(SQUARE)),
            figure("cell", "bitmap", **bitmap(MASKS["parts"][10:20, 40:70], 40, 10)),
            figure("ring", "polygon", **points(OUTLINE, HOLE)),
            figure("ring", "point", **points([[1, 1]])),
        ],
        "b": [
            figure("cell", "bitmap", **bitmap(MASKS["disc"][20:40, 30:50], 30, 20)),
            figure("ring", "rectangle", **points([[5, 5], [15, 15]])),
        ],
    }
    for name, entries in objects.items():
        contents = {"size": {"height": HEIGHT, "width": WIDTH}, "objects": entries, "tags": []}
        (folder / "ds" / "ann" / f"{name}.png.json").write_text(json.dumps(contents))
    meta = {"classes": [{"title": "cell", "shape": "any"}, {"title": "ring", "shape": "any"}]}
    (folder / "meta.json").write_text(json.dumps(meta))
    expected = {"a.png": ["square", "parts", "ring"], "b.png": ["disc", "rectangle"]}
    return folder, {}, {f"ds/img/{k}": v for k, v in expected.items()}, 1


def yolo(folder):
    write_images(folder / "train" / "images")
    (folder / "train" / "labels").mkdir()

    def line(index, points):
        return " ".join([str(index), *(f"{x / WIDTH:.6f} {y / HEIGHT:.6f}" for x, y in points)])

    lines = [line(1, SQUARE), "1 0.5 0.5 0.1 0.1", line(5, OUTLINE)]
    (folder / "train" / "labels" / "a.txt").write_text("\n".join(lines) + "\n")
    # As Roboflow writes it; the second image has no objects and no file
    names = {1: "cell", 5: "ring"}
    config = {"train": "../train/images", "val": "../valid/images", "names": names}
    (folder / "data.yaml").write_text(yaml.safe_dump(config))
    expected = {"train/images/a.png": ["square", "plate"], "train/images/b.png": []}
    return folder / "data.yaml", {}, expected, 1


def voc(folder, colors=None):
    """
    Args:
        colors: of the classes, for files without a palette.
    """
    write_images(folder / "JPEGImages", "a.jpg", "b.jpg")
    objects = {
        "a": [("square", 1), ("parts", 1), ("ring", 2)],
        "b": [("disc", 1), ("rectangle", 2)],
    }
    for name in ("SegmentationObject", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    for name, entries in objects.items():
        instances, classes = np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint8)
        for number, (mask, index) in enumerate(entries, start=1):
            instances[MASKS[mask]], classes[MASKS[mask]] = number, index
        instances[:3] = classes[:3] = 255
        for kind, ids in (("Object", instances), ("Class", classes)):
            image = Image.fromarray(ids)
            if colors:
                table = np.zeros((256, 3), np.uint8)
                table[1], table[2], table[3], table[255] = *colors, (9, 9, 9), (224, 224, 192)
                image = Image.fromarray(table[ids])
            image.save(folder / f"Segmentation{kind}" / f"{name}.png")
    (folder / "ImageSets" / "Segmentation" / "val.txt").write_text("b\n")
    expected = {"a.jpg": ["square", "parts", "ring"], "b.jpg": ["disc", "rectangle"]}
    return folder, {"class_names": ["cell", "ring"]}, expected, 0


def voc_in_color(folder):
    colors = (250, 50, 83), (51, 221, 255)
    source, _, *rest = voc(folder, colors)
    rows = ["# label:color_rgb:parts:actions", "background:0,0,0::"]
    rows += [f"{n}:{','.join(map(str, c))}::" for n, c in zip(("cell", "ring"), colors)]
    (folder / "labelmap.txt").write_text("\n".join(rows) + "\n")
    return source, {}, *rest


def voc_without_colors(folder):
    """Of Datumaro: the colours are those of VOC's palette, in the order of the names."""
    source, _, *rest = voc(folder, [(128, 0, 0), (0, 128, 0)])
    (folder / "labelmap.txt").write_text("# label:color\nbackground:::\ncell:::\nring:::\n")
    return source, {}, *rest


def masks(folder):
    expected = {}
    for name, objects in {"a": ["square", "parts", "ring"], "b": ["disc", "rectangle"]}.items():
        write_images(folder / name / "images", f"{name}.png")
        (folder / name / "masks").mkdir()
        for k, mask in enumerate(objects):
            Image.fromarray(MASKS[mask]).save(folder / name / "masks" / f"{k}.png")
        expected[f"{name}/images/{name}.png"] = objects
    return folder, {}, expected, 0


def numbered_masks(folder):
    write_images(folder / "images")
    (folder / "masks").mkdir()
    ids = MASKS["square"] + 300 * MASKS["parts"] + 7 * MASKS["ring"]
    Image.fromarray(ids.astype(np.uint16)).save(folder / "masks" / "a_masks.tif")
    Image.fromarray(MASKS["disc"].astype(np.uint8)).save(folder / "masks" / "b.png")
    Image.new("L", (WIDTH, HEIGHT)).save(folder / "masks" / "c.png")
    expected = {"a.png": ["square", "ring", "parts"], "b.png": ["disc"]}
    return folder / "masks", {"images": str(folder / "images")}, expected, 1


WRITERS = {
    "labelme": labelme,
    "via": via,
    "label-studio": label_studio,
    "supervisely": supervisely,
    "yolo": yolo,
    "voc": voc,
    "voc in colour": voc_in_color,
    "voc without colours": voc_without_colors,
    "masks": masks,
    "masks with numbers": numbered_masks,
}
ONE_CLASS = ("masks", "masks with numbers")


def masks_of(contents):
    """For each file name its objects: the id of the category, and the mask."""
    names = {image["id"]: image["file_name"] for image in contents["images"]}
    found = {name: [] for name in names.values()}
    for entry in contents["annotations"]:
        mask = entry["segmentation"]
        if isinstance(mask, list):
            mask = mask_util.merge(mask_util.frPyObjects(mask, HEIGHT, WIDTH))
        mask = mask_util.decode(mask).astype(bool)
        found[names[entry["image_id"]]].append((entry["category_id"], mask))
    return found


@pytest.mark.parametrize("case", WRITERS)
def test_masks_are_those_that_were_drawn(case, tmp_path):
    source, options, expected, num_skipped = WRITERS[case](tmp_path / "data")
    converted = convert_annotations(case.split()[0], str(source), **options, progress=False)
    contents = converted.as_coco()
    found = masks_of(contents)
    assert {k: len(v) for k, v in found.items()} == {k: len(v) for k, v in expected.items()}
    for name, keys in expected.items():
        for key in keys:  # in any order
            differing, category = min(
                (int((mask != MASKS[key]).sum()), category) for category, mask in found[name]
            )
            assert differing <= (8 if key == "disc" else 0), key  # of 316
            is_second = key in ("ring", "plate", "rectangle") and case not in ONE_CLASS
            assert category == 1 + is_second, key
    one_class = {1: "object"}
    names = {x["id"]: x["name"] for x in contents["categories"]}
    assert names == (one_class if case in ONE_CLASS else {1: "cell", 2: "ring"})
    assert len(converted.skipped) == num_skipped, converted.skipped

    path = tmp_path / "a.json"
    path.write_text(json.dumps(contents))
    findings = check_dataset(str(path), converted.root, progress=False)
    notes = {"mask-formats", "image-empty"}
    assert {f.kind for f in findings.all} <= notes, findings.summary()


def test_formats_of_the_command_are_those_that_there_are():
    assert msrcnn_d2_cli.convert_data.FORMATS == tuple(FORMATS)
    assert set(FORMATS) == {case.split()[0] for case in WRITERS}


def test_objects_of_one_polygon_stay_polygons_and_holes_become_rle(tmp_path):
    source, *_ = supervisely(tmp_path)
    contents = convert_annotations("supervisely", str(source), progress=False).as_coco()
    kinds = [type(x["segmentation"]) for x in contents["annotations"]]
    assert kinds == [list, dict, dict, dict, list]


def test_a_tilted_ellipse(tmp_path):
    """Of VIA, whose angle is in radians: as wide as high if it is turned by 45 degrees."""
    write_images(tmp_path, "a.png")
    shape = {"name": "ellipse", "cx": 40, "cy": 30, "rx": 20, "ry": 5, "theta": math.pi / 4}
    region = {"shape_attributes": shape, "region_attributes": {"any": "cell"}}
    entry = {"filename": "a.png", "size": 1, "regions": [region]}
    (tmp_path / "v.json").write_text(json.dumps({"a.png1": entry}))
    contents = convert_annotations("via", str(tmp_path / "v.json"), progress=False).as_coco()
    ((_, mask),) = masks_of(contents)["a.png"]
    x, y = np.arange(WIDTH) + 0.5 - 40, np.arange(HEIGHT)[:, None] + 0.5 - 30
    # Its long axis runs down to the right
    inside = ((x + y) / 20) ** 2 + ((y - x) / 5) ** 2 < 2
    assert (mask != inside).sum() < 20 and inside.sum() > 300


def test_images_that_exif_turns_have_their_size_as_they_are_read(tmp_path):
    source, *_ = yolo(tmp_path)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "train" / "images" / "a.png", exif=exif)
    converted = convert_annotations("yolo", str(source), progress=False)
    assert [image.size for image in converted.images] == [SIZE, SIZE]


@pytest.mark.parametrize("subset, names", [(None, ["a.jpg", "b.jpg"]), ("val", ["b.jpg"])])
def test_subsets(subset, names, tmp_path):
    source, options, *_ = voc(tmp_path)
    converted = convert_annotations("voc", str(source), subset=subset, **options, progress=False)
    assert [image.file_name for image in converted.images] == names


def test_given_classes_have_their_numbers_and_leave_out_others(tmp_path):
    source, *_ = labelme(tmp_path)
    converted = convert_annotations("labelme", str(source), class_names=["ring"], progress=False)
    assert converted.as_coco()["categories"] == [{"id": 1, "name": "ring"}]
    assert [len(image.objects) for image in converted.images] == [1, 1]
    assert sum("class 'cell'" in x for x in converted.skipped) == 3


def test_windows_paths_and_images_in_another_folder(tmp_path):
    write_labelme(tmp_path / "json", a=[labelme_shape("cell", SQUARE)])
    (tmp_path / "json" / "a.png").rename(tmp_path / "a.png")
    contents = json.loads((tmp_path / "json" / "a.json").read_text())
    for image, options in [(r"..\a.png", {}), (r"C:\old\a.png", {"images": str(tmp_path)})]:
        contents["imagePath"] = image
        (tmp_path / "json" / "a.json").write_text(json.dumps(contents))
        converted = convert_annotations(
            "labelme", str(tmp_path / "json"), **options, progress=False
        )
        name = converted.images[0].file_name
        assert name == ("a.png" if options else "../a.png")


# Odd inputs, as tools and people write them


def converted_from(format_, source, **options):
    return convert_annotations(format_, str(source), **options, progress=False)


def num_objects(converted):
    return {image.file_name: len(image.objects) for image in converted.images}


def test_objects_without_a_pixel_are_left_out(tmp_path):
    shapes = [
        labelme_shape("cell", [[5, 5], [5, 20]], "rectangle"),
        labelme_shape("cell", [[5, 5], [20, 5], [12, 5]]),
        labelme_shape("cell", [[90, 5], [99, 5], [99, 20]]),  # beyond the image
        labelme_shape("cell", [[5, 5], [5, 5]], "circle"),
    ]
    write_labelme(tmp_path, a=[*shapes, labelme_shape("cell", SQUARE)])
    converted = converted_from("labelme", tmp_path)
    assert num_objects(converted) == {"a.png": 1}
    assert sum("without a pixel" in x for x in converted.skipped) == len(shapes)


def test_an_empty_mask_file_is_no_object(tmp_path):
    source, *_ = masks(tmp_path)
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "a" / "masks" / "9.png")
    assert num_objects(converted_from("masks", source))["a/images/a.png"] == 3


@pytest.mark.parametrize("point", [[float("nan"), 1], [float("inf"), 1], [1e300, 1], [1], "xy"])
def test_coordinates_that_are_none(point, tmp_path):
    write_labelme(tmp_path, a=[labelme_shape("cell", [*SQUARE, point])])
    with pytest.raises(UserError, match=r"a.json' is not as LabelMe"):
        converted_from("labelme", tmp_path)


@pytest.mark.parametrize("key, value", [("imageWidth", "80"), ("imageHeight", -1), ("label", 7)])
def test_sizes_and_classes_that_are_none(key, value, tmp_path):
    write_labelme(tmp_path, a=[labelme_shape("cell", SQUARE)], b=[labelme_shape("cell", SQUARE)])
    contents = json.loads((tmp_path / "a.json").read_text())
    (contents["shapes"][0] if key == "label" else contents)[key] = value
    (tmp_path / "a.json").write_text(json.dumps(contents))
    with pytest.raises(UserError, match=r"a.json' is not as LabelMe"):
        converted_from("labelme", tmp_path)


def test_via_with_an_uneven_outline(tmp_path):
    source, *_ = via(tmp_path)
    source.write_text(source.read_text().replace('"all_points_y": [10, ', '"all_points_y": ['))
    with pytest.raises(UserError, match="is not as VIA"):
        converted_from("via", source)


def test_images_of_one_name_in_two_folders(tmp_path):
    """LabelMe's files lie apart, in the same sub-folders."""
    write_images(tmp_path / "images", "a.png")
    for folder in ("one", "two"):
        write_labelme(tmp_path / "json" / folder, a=[labelme_shape("cell", SQUARE)])
        (tmp_path / "images" / folder).mkdir()
        (tmp_path / "json" / folder / "a.png").rename(tmp_path / "images" / folder / "a.png")
    converted = converted_from("labelme", tmp_path / "json", images=str(tmp_path / "images"))
    assert num_objects(converted) == {"one/a.png": 1, "two/a.png": 1}


def test_two_files_of_one_image_are_an_error(tmp_path):
    """Otherwise the image is trained on with half of its objects, and may be in both parts."""
    write_labelme(tmp_path, a=[labelme_shape("cell", SQUARE)])
    (tmp_path / "copy.json").write_bytes((tmp_path / "a.json").read_bytes())
    with pytest.raises(UserError, match="more than once .a.png."):
        converted_from("labelme", tmp_path)


def test_via_knows_two_files_of_one_name_by_their_sizes(tmp_path):
    source, *_ = via(tmp_path)
    contents = json.loads(source.read_text())
    contents["_via_img_metadata"]["a.png-1"]["size"] = 124
    source.write_text(json.dumps(contents))
    with pytest.raises(UserError, match=r"several files 'a.png'"):
        converted_from("via", source)


def test_via_without_attributes(tmp_path):
    entry = {"filename": "a.png", "regions": [{"region_attributes": {}}]}
    (tmp_path / "v.json").write_text(json.dumps({"a.png": entry}))
    with pytest.raises(UserError, match="add one for the class"):
        converted_from("via", tmp_path / "v.json")


def test_files_of_the_system_are_no_annotations(tmp_path):
    write_labelme(tmp_path, a=[labelme_shape("cell", SQUARE)])
    (tmp_path / "._a.json").write_bytes(b"\0\x05\x16\x07")  # of macOS, in archives
    assert num_objects(converted_from("labelme", tmp_path)) == {"a.png": 1}


def test_label_studio_with_shapes_in_several_images(tmp_path):
    """Nothing says which of the images of the task is which."""
    source, options, *_ = label_studio(tmp_path)
    tasks = json.loads(source.read_text())
    tasks[0]["annotations"][1]["result"][2]["to_name"] = "second"
    source.write_text(json.dumps(tasks))
    converted = converted_from("label-studio", source, **options)
    assert num_objects(converted) == {"0a1b2c3d-b.png": 2, "c.png": 0}
    assert any("several images" in x for x in converted.skipped)


def test_label_studio_with_several_labels_of_a_shape(tmp_path):
    source, options, *_ = label_studio(tmp_path)
    source.write_text(source.read_text().replace('"labels": ["cell"]', '"labels": ["cell", "b"]'))
    converted = converted_from("label-studio", source, **options)
    assert num_objects(converted)["a.png"] == 2 and "cell, b" in converted.skipped[0]


def test_label_studio_with_paths_of_windows(tmp_path):
    source, options, *_ = label_studio(tmp_path)
    text = source.read_text().replace("?d=some/0a1b", r"?d=some\\0a1b")
    source.write_text(text)
    assert num_objects(converted_from("label-studio", source, **options))["0a1b2c3d-b.png"] == 2


def test_supervisely_with_a_broken_bitmap_and_without_holes(tmp_path):
    source, *_ = supervisely(tmp_path)
    path = tmp_path / "ds" / "ann" / "a.png.json"
    contents = json.loads(path.read_text())
    del contents["objects"][0]["points"]["interior"]
    path.write_text(json.dumps(contents))
    assert num_objects(converted_from("supervisely", source))["ds/img/a.png"] == 3
    contents["objects"][1]["bitmap"]["data"] = base64.b64encode(b"no zlib").decode()
    path.write_text(json.dumps(contents))
    with pytest.raises(UserError, match=r"a.png.json' is not as Supervisely"):
        converted_from("supervisely", source)


@pytest.mark.parametrize("names", [["a", 1, "b", "c", "d", True], {"1": 1, "5": True}])
def test_yolo_with_names_that_yaml_takes_for_others(names, tmp_path):
    source, *_ = yolo(tmp_path)
    config = yaml.safe_load(source.read_text())
    source.write_text(yaml.safe_dump(config | {"names": names}))
    found = converted_from("yolo", source)
    assert [label for label, _ in found.images[0].objects] == ["1", "True"]
    assert {"1", "True"} <= set(found.class_names)


def test_yolo_with_a_list_of_windows_and_with_subfolders(tmp_path):
    source, _, expected, _ = yolo(tmp_path)
    config = yaml.safe_load(source.read_text())
    paths = ".\\train\\images\\a.png\r\n.\\train\\images\\b.png\r\n"
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "train.txt").write_text(paths)
    for train in (["lists/train.txt"], "train"):
        source.write_text(yaml.safe_dump(config | {"train": train}))
        assert num_objects(converted_from("yolo", source)) == {
            name: len(objects) for name, objects in expected.items()
        }


def test_yolo_without_labels_and_with_pixels(tmp_path):
    source, *_ = yolo(tmp_path)
    labels = tmp_path / "train" / "labels" / "a.txt"
    labels.write_text("1 10 10 30 10 30 30 10 30\n")
    with pytest.raises(UserError, match="Line 1 .* no shares"):
        converted_from("yolo", source)
    labels.unlink()
    with pytest.raises(UserError, match=r"no labels of 'train' such as .*labels.a.txt'"):
        converted_from("yolo", source)


def test_voc_with_pure_blue(tmp_path):
    """Its code is 255, which as an index is that of the edges of objects."""
    blue = (0, 0, 255)
    source, *_ = voc(tmp_path, [blue, (0, 128, 0)])
    (tmp_path / "labelmap.txt").write_text("# label:color\ncell:0,0,255::\nring:0,128,0::\n")
    found = converted_from("voc", source)
    assert [label for label, _ in found.images[0].objects] == ["cell", "cell", "ring"]


def test_voc_with_names_of_indices(tmp_path):
    source, *_ = voc(tmp_path)
    (tmp_path / "labelmap.txt").write_text("background:0,0,0::\ncell:9,9,9::\nring:8,8,8::\n")
    found = converted_from("voc", source)
    assert [label for label, _ in found.images[0].objects] == ["cell", "cell", "ring"]


def test_voc_without_the_list(tmp_path):
    source, options, *_ = voc(tmp_path)
    with pytest.raises(UserError, match=r"no list '.*Segmentation.none.txt'"):
        converted_from("voc", source, subset="none", **options)


def test_masks_beside_their_images(tmp_path):
    write_images(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    for name in "ab":
        Image.fromarray(MASKS["square"]).save(tmp_path / f"{name}_cp_masks.png")  # one bit
    found = converted_from("masks", tmp_path, images=str(tmp_path))
    assert num_objects(found) == {"a.jpg": 1, "b.jpg": 1}
    assert found.skipped == ["c.jpg: there are no masks of it"]


def test_masks_in_two_folders_for_all_images(tmp_path):
    write_images(tmp_path / "images")
    write_images(tmp_path / "masks")
    with pytest.raises(UserError, match=r"give '.*masks' with --images '.*images'"):
        converted_from("masks", tmp_path)


def test_transparent_pixels_are_outside_masks(tmp_path):
    source, *_ = masks(tmp_path)
    white = np.full((*SIZE, 4), 255, np.uint8)
    white[..., 3] = MASKS["square"] * 255
    Image.fromarray(white).save(tmp_path / "a" / "masks" / "0.png")
    found = masks_of(converted_from("masks", source).as_coco())["a/images/a.png"]
    assert any((mask == MASKS["square"]).all() for _, mask in found)


def test_masks_as_jpeg(tmp_path):
    source, *_ = masks(tmp_path)
    noisy = np.where(MASKS["square"], 240, 9).astype(np.uint8)
    Image.fromarray(noisy).save(tmp_path / "a" / "masks" / "0.jpg")
    (tmp_path / "a" / "masks" / "0.png").unlink()
    found = masks_of(converted_from("masks", source).as_coco())["a/images/a.png"]
    assert min((mask != MASKS["square"]).sum() for _, mask in found) <= 8

    numbers, options, *_ = numbered_masks(tmp_path / "numbers")
    Image.fromarray(noisy).save(numbers / "b.jpg")
    with pytest.raises(UserError, match="b.jpg' .*PNG or TIFF"):
        converted_from("masks", numbers, **options)


def test_masks_of_several_pages(tmp_path):
    source, options, *_ = numbered_masks(tmp_path)
    page = Image.fromarray(MASKS["disc"].astype(np.uint8))
    page.save(source / "a_masks.tif", save_all=True, append_images=[page])
    with pytest.raises(UserError, match="several pages"):
        converted_from("masks", source, **options)


# The command


def test_the_command_splits_and_checks(tmp_path, capsys):
    shapes = {f"{k:02}": [labelme_shape("b" if k % 2 else "a", SQUARE)] for k in range(10)}
    write_labelme(tmp_path / "in", **shapes)
    train, val = tmp_path / "train.json", tmp_path / "val.json"
    arguments = "convert-data", "labelme", tmp_path / "in", train, "--val", val
    assert exit_code(*arguments, "--val-share", 0.3) == 0
    printed = capsys.readouterr().out
    parts = [json.loads(path.read_text()) for path in (train, val)]
    assert [len(part["images"]) for part in parts] == [7, 3]
    assert (
        parts[0]["categories"]
        == parts[1]["categories"]
        == [
            {"id": 1, "name": "a"},
            {"id": 2, "name": "b"},
        ]
    )
    for key in ("images", "annotations"):
        ids = [x["id"] for part in parts for x in part[key]]
        assert sorted(ids) == [*range(1, 11)]
    assert f"msrcnn-d2 check-data {train} {tmp_path / 'in'}" in printed
    before = train.read_bytes()
    assert exit_code(*arguments, "--val-share", 0.3, "--overwrite") == 0
    assert train.read_bytes() == before  # the same images each time
    assert sorted(x.name for x in tmp_path.iterdir()) == ["in", "train.json", "val.json"]


def test_errors_in_what_was_written_are_shown(tmp_path, capsys):
    write_labelme(tmp_path / "in", a=[labelme_shape("cell", SQUARE)])
    (tmp_path / "in" / "a.png").unlink()
    assert exit_code("convert-data", "labelme", tmp_path / "in", tmp_path / "a.json") == 1
    assert "image-missing (1)" in capsys.readouterr().out


def test_what_is_left_out_is_listed(tmp_path, capsys):
    shapes = [labelme_shape("cell", [[k, 1]], "point") for k in range(7)]
    write_labelme(tmp_path / "in", a=[*shapes, labelme_shape("cell", SQUARE)])
    arguments = "convert-data", "labelme", tmp_path / "in", tmp_path / "a.json", "--overwrite"
    assert exit_code(*arguments) == 0
    printed = capsys.readouterr().out
    assert "Left out (7):" in printed and "shape 5 is a point" in printed
    assert "... and 2 more" in printed and "shape 6 is a point" not in printed
    assert exit_code(*arguments, "--all") == 0
    assert "shape 7 is a point" in capsys.readouterr().out


def wrong(name, contents):
    def write(folder):
        folder.mkdir()
        (folder / name).write_text(json.dumps(contents) if isinstance(contents, dict) else contents)
        return folder / name

    return write


OF_VIA = {"a": {"filename": "a.png", "regions": [{"region_attributes": {"x": 1, "y": 2}}]}}
WRONG = {
    "nothing there": ("labelme", lambda folder: folder, "is no folder"),
    "folder for a file": ("via", lambda folder: labelme(folder)[0], "is no file"),
    "no annotations": ("labelme", lambda folder: write_images(folder) or folder, "no files *.json"),
    "no JSON": ("labelme", wrong("a.json", "{"), "a.json' is not JSON"),
    "no imagePath": ("labelme", wrong("a.json", {"shapes": []}), "a.json' is not as LabelMe"),
    "no objects": ("labelme", wrong("a.json", {"x": 1}), "has no objects with a mask"),
    "no project": ("via", wrong("a.json", {"x": 1}), "no project of VIA"),
    "two attributes": ("via", wrong("a.json", OF_VIA), "attributes x, y: name the one"),
    "JSON-MIN": ("label-studio", wrong("a.json", '[{"image": "a.png"}]'), "not as JSON-MIN"),
    "no names": ("yolo", wrong("data.yaml", "train: x"), "is no data.yaml of YOLO"),
    "no subset": ("yolo", wrong("data.yaml", "names: [a]"), "has no 'train'"),
    "keypoints": ("yolo", wrong("data.yaml", "names: [a]\nkpt_shape: [4, 3]"), "is of keypoints"),
    "no images": ("yolo", wrong("data.yaml", "names: [a]\ntrain: x"), "no images of 'train'"),
    "no masks": ("masks", lambda folder: labelme(folder)[0], "has no folders with images/ and"),
    "no VOC": ("voc", lambda folder: labelme(folder)[0], "no PNG files in"),
    "no meta.json": ("supervisely", lambda folder: labelme(folder)[0], "meta.json' does not exist"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_converted_is_one_sentence(case, tmp_path, capsys):
    format_, write, message = WRONG[case]
    source = write(tmp_path / "in")
    assert exit_code("convert-data", format_, source, tmp_path / "a.json") == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.glob("a.json*"))


def test_a_line_that_is_no_outline_is_named(tmp_path):
    source, *_ = yolo(tmp_path)
    labels = tmp_path / "train" / "labels" / "a.txt"
    for text in ("0 0.1 0.2 0.3\n", "0 0.1 0.1 0.2 0.2 0.3 x\n", "7 0.1 0.1 0.2 0.2 0.1 0.2\n"):
        labels.write_text(text)
        with pytest.raises(UserError, match=r"labels/a.txt'"):
            convert_annotations("yolo", str(source), progress=False)


def test_the_input_is_not_replaced(tmp_path, capsys):
    source, *_ = via(tmp_path)
    before = source.read_bytes()
    assert exit_code("convert-data", "via", source, source, "--overwrite") == 2
    assert "is the input" in capsys.readouterr().err and source.read_bytes() == before


def test_options_that_do_not_go_together(tmp_path, capsys):
    source, *_ = labelme(tmp_path / "in")
    out = tmp_path / "a.json"
    out.write_text("precious")
    for options, message in [
        ((), "is there already"),
        (("--val", out), "need two files"),
        (("--val-share", 0.5), "needs --val"),
        (("--attribute", "x"), "for VIA only"),
        (("--subset", "x"), "not for labelme"),
        (("--images", tmp_path / "none"), "There is no folder"),
    ]:
        target = tmp_path / "b.json" if "--images" in options else out
        assert exit_code("convert-data", "labelme", source, target, *options) == 2
        assert message in capsys.readouterr().err
    assert out.read_text() == "precious" and not (tmp_path / "b.json").exists()
