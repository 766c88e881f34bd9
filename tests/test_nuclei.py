"""projects/nuclei: tiles that belong together, and stage1_train turned into COCO format."""

import contextlib
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps
from pycocotools.coco import COCO

import prepare
import tiles
from msrcnn_d2.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
NUCLEI = ROOT / "projects" / "nuclei"
SIZE = (96, 128)  # height, width of the images, pixels; borders this long are not alike by chance
NUM_IMAGES = 12


def texture(seed: int, height: int = SIZE[0], width: int = SIZE[1]) -> np.ndarray:
    """(height, width) uint8 clouds: neighbouring rows are alike, those 10 pixels away are not."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    clouds = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2))
    return np.asarray(ImageOps.autocontrast(clouds))


def quarters(picture: np.ndarray) -> list[np.ndarray]:
    return [q for half in np.split(picture, 2) for q in np.split(half, 2, axis=1)]


def blank() -> np.ndarray:
    return np.zeros(SIZE, np.uint8)


def box(top: int, left: int, height: int = 4, width: int = 6) -> np.ndarray:
    """A mask as stage1_train has them: 255 where the nucleus is."""
    mask = blank()
    mask[top : top + height, left : left + width] = 255
    return mask


def write_sample(folder: Path, id: str, image: np.ndarray, masks: list[np.ndarray] | None):
    """Of stage1_train; ``image`` is gray and gets colour and alpha. Without masks: no folder."""
    rgba = np.stack([image, image // 2, 255 - image, np.full_like(image, 200)], axis=2)
    (folder / id / "images").mkdir(parents=True)
    Image.fromarray(rgba, "RGBA").save(folder / id / "images" / f"{id}.png")
    if masks is not None:
        (folder / id / "masks").mkdir()
        for i, mask in enumerate(masks):
            Image.fromarray(mask).save(folder / id / "masks" / f"{i}.png")


@pytest.fixture
def stage1_train(tmp_path):
    """Unrelated images a to l with one nucleus each."""
    folder = tmp_path / "stage1_train"
    for i in range(NUM_IMAGES):
        write_sample(folder, chr(ord("a") + i), texture(i), [box(i, 2 * i)])
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def load_parts(out: Path) -> dict[str, COCO]:
    with contextlib.redirect_stdout(io.StringIO()):
        return {
            part: COCO(out / "annotations" / f"nuclei_{part}.json")
            for part in ("train", "holdout", "val")
        }


def find(out: Path, id: str) -> tuple[COCO, dict, list[dict]]:
    """The part that an image is in, the image, and its annotations."""
    for coco in load_parts(out).values():
        for image in coco.dataset["images"]:
            if image["file_name"] == f"{id}.png":
                return coco, image, coco.imgToAnns[image["id"]]
    raise LookupError(id)


# tiles.py


def test_tiles_of_one_picture_are_one_group():
    first, second = quarters(texture(0, 192, 256)), quarters(texture(1, 192, 256))
    images = [first[0], second[3], first[3], second[2], first[1], second[1], first[2], second[0]]
    assert [sorted(g) for g in tiles.group_tiles(images)] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_neighbours_of_neighbours_are_one_group():
    strip = np.split(texture(0, 96, 512), 4, axis=1)
    assert tiles.group_tiles([strip[0], strip[2], strip[3]]) == [[0], [1, 2]]
    assert [len(g) for g in tiles.group_tiles([strip[k] for k in (3, 0, 2, 1)])] == [4]


def test_tiles_of_different_sizes_can_be_neighbours():
    first, second = np.split(texture(0, 96, 256), [100], axis=1)
    assert tiles.group_tiles([first, second]) == [[0, 1]]


def test_uneven_lighting_makes_no_difference():
    first, second = quarters(texture(0, 192, 256))[:2]
    assert tiles.group_tiles([first // 2, second // 2 + 100]) == [[0, 1]]


def test_unrelated_pictures_are_not_grouped():
    assert tiles.group_tiles([texture(seed) for seed in range(50)]) == [[k] for k in range(50)]


@pytest.mark.parametrize("gray", [0, 1, 7, 100, 254, 255])
def test_empty_borders_say_nothing(gray):
    assert tiles.group_tiles([np.full(SIZE, gray, np.uint8)] * 2) == [[0], [1]]


def test_no_images_have_no_groups():
    assert tiles.group_tiles([]) == []


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_groups_are_divided_as_a_whole(share, seed):
    sizes = np.random.default_rng(2).integers(1, 5, 60)
    groups = np.split(np.arange(sizes.sum()), np.cumsum(sizes)[:-1])
    first, second = tiles.divide(groups, share, seed)
    assert sorted(first + second) == list(range(sizes.sum()))
    assert all(set(g) <= set(first) or set(g) <= set(second) for g in groups)
    assert share * sizes.sum() - max(sizes) < len(second) <= share * sizes.sum()
    assert (first, second) == tiles.divide(groups, share, seed)


def test_the_seed_decides_the_division():
    groups = [[k] for k in range(100)]
    assert tiles.divide(groups, 0.2, seed=0) != tiles.divide(groups, 0.2, seed=1)


# stage1_train


def test_masks_are_the_same_pixel_by_pixel(stage1_train, tmp_path):
    pieces = box(1, 1) | box(15, 20)
    overlapping = [box(8, 8, 6, 6), box(10, 10, 6, 6)]
    irregular = 255 * (texture(99) > 150).astype(np.uint8)
    masks = [pieces, *overlapping, irregular]
    write_sample(stage1_train, "zz", texture(100), masks)
    prepare.main([str(stage1_train), str(tmp_path / "out")])

    coco, image, annotations = find(tmp_path / "out", "zz")
    assert (image["height"], image["width"]) == SIZE
    assert len(annotations) == len(masks)
    for annotation, mask in zip(annotations, masks):
        assert isinstance(annotation["segmentation"]["counts"], str)  # compressed
        np.testing.assert_array_equal(coco.annToMask(annotation), mask > 0)
        rows, columns = np.nonzero(mask)
        x, y, width, height = annotation["bbox"]
        assert (x, y) == (columns.min(), rows.min())
        assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
        assert annotation["area"] == (mask > 0).sum()
        assert (annotation["category_id"], annotation["iscrowd"]) == (1, 0)


@pytest.mark.parametrize(
    "as_png",
    [
        lambda m: Image.fromarray(m // 255),
        lambda m: Image.fromarray(m).convert("1"),
        lambda m: Image.fromarray(m).convert("RGBA"),
        lambda m: Image.fromarray(m).convert("P"),
        lambda m: Image.fromarray(m.astype(np.uint16) * 257),
    ],
    ids=["0 and 1", "bits", "with alpha", "palette", "16 bits"],
)
def test_masks_may_be_of_any_mode(stage1_train, tmp_path, as_png):
    as_png(box(3, 4)).save(stage1_train / "a" / "masks" / "0.png")
    prepare.main([str(stage1_train), str(tmp_path / "out")])
    coco, _, (annotation,) = find(tmp_path / "out", "a")
    np.testing.assert_array_equal(coco.annToMask(annotation), box(3, 4) > 0)


def test_images_are_the_same_without_alpha(stage1_train, tmp_path):
    prepare.main([str(stage1_train), str(tmp_path / "out")])
    pngs = sorted((tmp_path / "out").glob("*/*.png"), key=lambda png: png.name)
    assert len(pngs) == NUM_IMAGES
    for png in pngs:
        original = Image.open(stage1_train / png.stem / "images" / png.name)
        assert Image.open(png).mode == "RGB"
        np.testing.assert_array_equal(np.asarray(Image.open(png)), np.asarray(original)[..., :3])


def test_parts_and_ids(stage1_train, tmp_path, capsys):
    out = tmp_path / "out"
    prepare.main([str(stage1_train), str(out), "--val", "0.25", "--holdout", "0.34"])
    parts = load_parts(out)
    names = {part: [i["file_name"] for i in c.dataset["images"]] for part, c in parts.items()}
    assert {part: len(n) for part, n in names.items()} == {"train": 6, "holdout": 3, "val": 3}
    assert sorted(names["train"] + names["holdout"]) == sorted(os.listdir(out / "train"))
    assert names["val"] == sorted(os.listdir(out / "val"))
    for of in ("imgs", "anns"):
        ids = [id for coco in parts.values() for id in getattr(coco, of)]
        assert sorted(ids) == list(range(1, NUM_IMAGES + 1))
    for coco in parts.values():
        assert coco.dataset["categories"] == [{"id": 1, "name": "nucleus", "supercategory": "cell"}]
        assert all(len(annotations) == 1 for annotations in coco.imgToAnns.values())
    assert set(os.listdir(out)) == {"annotations", "train", "val"}
    assert "val          3 images       3 nuclei" in capsys.readouterr().out


def test_tiles_of_one_picture_are_in_one_part(tmp_path):
    for i in range(8):
        for k, tile in enumerate(quarters(texture(i, 192, 256))):
            write_sample(tmp_path / "stage1", f"{k}{i}", tile, [box(1, 1)])
    prepare.main([str(tmp_path / "stage1"), str(tmp_path / "out")])
    seen = set()
    for coco in load_parts(tmp_path / "out").values():
        pictures = {image["file_name"][1] for image in coco.dataset["images"]}
        assert len(coco.imgs) == 4 * len(pictures)
        assert not pictures & seen
        seen |= pictures
    assert len(seen) == 8


def test_the_same_arguments_give_the_same_bytes(stage1_train, tmp_path):
    for out, seed in (("first", 0), ("second", 0), ("third", 1)):
        prepare.main([str(stage1_train), str(tmp_path / out), "--seed", str(seed)])
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert contents(tmp_path / "first").keys() != contents(tmp_path / "third").keys()


@pytest.mark.parametrize("inside", ["", "stage1_train/"])
def test_a_zip_is_read_as_the_folder_is(stage1_train, tmp_path, inside):
    with zipfile.ZipFile(tmp_path / "stage1_train.zip", "w") as file:
        for name, content in reversed(contents(stage1_train).items()):
            file.writestr(inside + name, content)
        file.writestr("__MACOSX/a/images/._a.png", b"what macOS adds")
    prepare.main([str(tmp_path / "stage1_train.zip"), str(tmp_path / "from_zip")])
    prepare.main([str(stage1_train), str(tmp_path / "from_folder")])
    assert contents(tmp_path / "from_zip") == contents(tmp_path / "from_folder")


def break_png(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def deep_png(path: Path) -> None:
    Image.fromarray(np.full(SIZE, 4000, np.uint16)).save(path)


@pytest.mark.parametrize(
    "damage, counted, named",
    [
        (
            lambda a: break_png(a / "images" / "a.png"),
            "1 unreadable image(s)",
            "a/images/a.png: left out: ",
        ),
        (
            lambda a: deep_png(a / "images" / "a.png"),
            "1 unreadable image(s)",
            "a/images/a.png: left out: more than 8 bits per channel",
        ),
        (
            lambda a: Image.new("RGBA", (129, 20)).save(a / "images" / "a.png"),
            "1 image(s) over 128 px",
            None,
        ),
    ],
    ids=["broken", "16 bits", "large"],
)
def test_images_that_cannot_be_used(stage1_train, tmp_path, capsys, damage, counted, named):
    damage(stage1_train / "a")
    prepare.main([str(stage1_train), str(tmp_path / "out"), "--max-size", "128"])
    assert sum(len(c.imgs) for c in load_parts(tmp_path / "out").values()) == NUM_IMAGES - 1
    printed = capsys.readouterr()
    assert f"left out: {counted}\n" in printed.out
    assert named in printed.err if named else "warning" not in printed.err


@pytest.mark.parametrize(
    "damage, counted, named",
    [
        (
            lambda masks: break_png(masks / "0.png"),
            "1 unreadable mask(s)",
            "a/masks/0.png: left out: ",
        ),
        (
            lambda masks: Image.new("L", (96, 128), 255).save(masks / "0.png"),
            "1 mask(s) of another size than the image",
            "a/masks/0.png: left out: 96 x 128 px for an image of 128 x 96 px",
        ),
        (
            lambda masks: Image.fromarray(box(0, 0, 2, 2)).save(masks / "0.png"),
            "1 mask(s) under 5 px",
            None,
        ),
    ],
    ids=["broken", "other size", "small"],
)
def test_masks_that_cannot_be_used(stage1_train, tmp_path, capsys, damage, counted, named):
    Image.fromarray(box(0, 0, 1, 5)).save(stage1_train / "a" / "masks" / "1.png")
    damage(stage1_train / "a" / "masks")
    prepare.main([str(stage1_train), str(tmp_path / "out")])
    _, _, (annotation,) = find(tmp_path / "out", "a")
    assert annotation["area"] == 5  # 1.png is just large enough
    printed = capsys.readouterr()
    assert f"left out: {counted}\n" in printed.out
    assert named in printed.err if named else "warning" not in printed.err


def test_an_image_without_masks_is_kept(stage1_train, tmp_path, capsys):
    write_sample(stage1_train, "zz", texture(100), None)
    prepare.main([str(stage1_train), str(tmp_path / "out")])
    assert find(tmp_path / "out", "zz")[2] == []
    printed = capsys.readouterr()
    assert "zz: " in printed.err
    assert "left out: nothing" in printed.out


def test_an_interrupted_run_leaves_nothing_that_looks_complete(stage1_train, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "_write_json", interrupt)
        prepare.main([str(stage1_train), str(out)])
    assert contents(out) == {}
    (out / prepare.UNFINISHED / "train").mkdir(parents=True)  # after a kill there is no tidying up
    (out / prepare.UNFINISHED / "train" / "old.png").touch()
    prepare.main([str(stage1_train), str(out)])
    assert set(os.listdir(out)) == {"annotations", "train", "val"}
    assert "old.png" not in os.listdir(out / "train")


def interrupt(*args):
    raise KeyboardInterrupt


# --from-coco


@pytest.fixture
def coco_format(tmp_path):
    """Nuclei in COCO format as others may have them: ids with gaps, fields of their own."""
    folder = tmp_path / "coco_format"
    (folder / "annotations").mkdir(parents=True)
    for part, seeds in (("train", range(10)), ("val", range(10, 13))):
        (folder / part).mkdir()
        coco = {"info": {"by": "others"}, "categories": [{"id": 1, "name": "nucleus"}]}
        coco |= {"images": [], "annotations": []}
        for seed in reversed(seeds):
            Image.fromarray(texture(seed)).convert("RGB").save(folder / part / f"{seed}.png")
            image = {
                "id": 7 * seed + 5,
                "file_name": f"{seed}.png",
                "height": SIZE[0],
                "width": SIZE[1],
            }
            coco["images"].append({**image, "microscope": "old"})
            annotation = {"id": 3 * seed + 2, "image_id": image["id"], "category_id": 1}
            polygon = {"segmentation": [[0, 0, 5, 0, 5, 5]], "area": 12.5, "bbox": [0, 0, 5, 5]}
            coco["annotations"].append({**annotation, **polygon, "iscrowd": 0})
        (folder / "annotations" / f"nuclei_{part}.json").write_text(json.dumps(coco))
    return folder


def test_coco_format_gets_a_holdout(coco_format, tmp_path):
    out = tmp_path / "out"
    prepare.main(["--from-coco", str(coco_format), str(out)])
    given = json.loads((coco_format / "annotations" / "nuclei_train.json").read_text())
    parts = {part: coco.dataset for part, coco in load_parts(out).items()}

    images = [Image.open(coco_format / "train" / i["file_name"]) for i in given["images"]]
    groups = tiles.group_tiles([np.asarray(image.convert("L")) for image in images])
    for part, indices in zip(("train", "holdout"), tiles.divide(groups, 0.2, seed=0)):
        assert parts[part]["images"] == [given["images"][k] for k in indices]
        assert parts[part]["annotations"] == [given["annotations"][k] for k in indices]
        assert parts[part].keys() == given.keys()
        assert parts[part]["info"] == given["info"]
    assert len(parts["holdout"]["images"]) == 2
    val = "annotations/nuclei_val.json"
    assert (out / val).read_bytes() == (coco_format / val).read_bytes()
    for name in ("train", "val"):
        assert (out / name).is_symlink()
        assert contents(out / name) == contents(coco_format / name)


def test_images_are_copied_where_links_are_not_possible(coco_format, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no privilege")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    prepare.main(["--from-coco", str(coco_format), str(tmp_path / "out")])
    assert not (tmp_path / "out" / "train").is_symlink()
    assert contents(tmp_path / "out" / "train") == contents(coco_format / "train")


def test_both_forms_divide_alike(stage1_train, tmp_path):
    """stage1_train as COCO format, given with train and holdout in one file, is divided again."""
    prepare.main([str(stage1_train), str(tmp_path / "out")])
    parts = {part: coco.dataset for part, coco in load_parts(tmp_path / "out").items()}
    both = {
        key: sorted(parts["train"][key] + parts["holdout"][key], key=lambda x: x["id"])
        for key in ("images", "annotations")
    }
    annotations = tmp_path / "out" / "annotations"
    (annotations / "nuclei_holdout.json").unlink()
    (annotations / "nuclei_train.json").write_text(json.dumps({**parts["train"], **both}))
    prepare.main(["--from-coco", str(tmp_path / "out"), str(tmp_path / "again")])
    assert parts == {part: coco.dataset for part, coco in load_parts(tmp_path / "again").items()}


# errors


def test_the_folder_above_or_below_or_another_one(stage1_train, tmp_path, capsys):
    def error_of(*arguments):
        with pytest.raises(SystemExit) as exit:
            prepare.main([*map(str, arguments), str(tmp_path / "out")])
        assert exit.value.code == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert f"'{tmp_path / 'nosuch'}'" in error_of(tmp_path / "nosuch")
    (tmp_path / "stage1_test" / "x" / "images").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "stage1_test" / "x" / "images" / "x.png")
    error = error_of(tmp_path)  # names the folder that looks right
    assert "<id>/images/<id>.png" in error and f"'{stage1_train}'" in error
    assert "one folder per image" in error_of(stage1_train / "a")
    assert "stage1_train" in error_of(tmp_path / "stage1_test")
    (tmp_path / "text.zip").write_text("not a zip")
    assert "text.zip'" in error_of(tmp_path / "text.zip")
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "stage1_train.zip").touch()
    assert "stage1_train.zip'" in error_of(tmp_path / "downloads")
    (stage1_train / "a" / "images" / "b.png").touch()
    assert "same id" in error_of(stage1_train)
    assert "annotations/nuclei_train.json'" in error_of("--from-coco", stage1_train)


def test_what_is_in_the_way_is_not_overwritten(stage1_train, coco_format, tmp_path):
    for source, function, rest in (
        (stage1_train, prepare.prepare_stage1, (400, 0.2, 0.2, 0)),
        (coco_format, prepare.prepare_coco, (0.2, 0)),
    ):
        before = contents(coco_format)
        with pytest.raises(UserError, match="'annotations'"):
            function(source, coco_format, *rest)
        assert contents(coco_format) == before
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="/file'"):
            function(source, tmp_path / "file", *rest)


def test_too_few_images(stage1_train, tmp_path):
    with pytest.raises(UserError, match="12 image.s. over 20 px"):
        prepare.prepare_stage1(stage1_train, tmp_path / "out", 20, 0.2, 0.2, 0)
    with pytest.raises(UserError, match=r"12 image.s.,.* 0\.05"):
        prepare.prepare_stage1(stage1_train, tmp_path / "out", 400, 0.05, 0.2, 0)
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda f: (f / "annotations/nuclei_val.json").unlink(), "nuclei_val.json"),
        (lambda f: (f / "annotations/nuclei_train.json").write_text("{"), "nuclei_train.json"),
        (lambda f: (f / "annotations/nuclei_train.json").write_text("[]"), "nuclei_train.json"),
        (lambda f: (f / "annotations/nuclei_holdout.json").touch(), "nuclei_holdout.json"),
        (lambda f: (f / "train/3.png").unlink(), "train/3.png"),
        (lambda f: break_png(f / "train/3.png"), "train/3.png"),
    ],
    ids=["no val", "no JSON", "other JSON", "prepared before", "no image", "broken image"],
)
def test_coco_format_that_is_not_whole(coco_format, tmp_path, damage, named):
    damage(coco_format)
    with pytest.raises(UserError, match=named):
        prepare.prepare_coco(coco_format, tmp_path / "out", 0.2, 0)


@pytest.mark.parametrize(
    "options, named",
    [
        (["--val", "1.5"], "--val: 1.5"),
        (["--holdout", "0"], "--holdout: 0"),
        (["--from-coco", "--val", "0.3"], "--val"),
        (["--from-coco", "--max-size", "9"], "--max-size"),
    ],
)
def test_options_that_make_no_sense(capsys, options, named):
    with pytest.raises(SystemExit) as exit:
        prepare.main(["source", "out", *options])
    assert exit.value.code == 2
    assert named in capsys.readouterr().err.split("error: ")[1]  # after the usage


# real images


@pytest.fixture(scope="module")
def real_nuclei():
    folders = [os.environ.get("DETECTRON2_DATASETS"), ROOT.parent / "shared/data/datasets"]
    for folder in map(Path, filter(None, folders)):
        if (folder / "nuclei/annotations/nuclei_train.json").is_file():
            return folder / "nuclei"
    pytest.skip("no nuclei: set DETECTRON2_DATASETS to the folder of nuclei/")


def test_real_images_come_back_as_they_were(real_nuclei, tmp_path):
    with contextlib.redirect_stdout(io.StringIO()):
        given = COCO(real_nuclei / "annotations" / "nuclei_train.json")
    chosen = given.dataset["images"][:5]
    for image in chosen:
        id = Path(image["file_name"]).stem
        masks = [255 * given.annToMask(a) for a in given.imgToAnns[image["id"]]]
        write_sample(tmp_path / "stage1", id, np.zeros((2, 2), np.uint8), masks)
        png = Image.open(real_nuclei / "train" / image["file_name"]).convert("RGBA")
        png.save(tmp_path / "stage1" / id / "images" / f"{id}.png")
    # With the usual shares of 5 images, nothing would be held out
    prepare.main([str(tmp_path / "stage1"), str(tmp_path / "out"), "--holdout", "0.5"])
    for image in chosen:
        coco, found, annotations = find(tmp_path / "out", Path(image["file_name"]).stem)
        expected = given.imgToAnns[image["id"]]
        assert len(annotations) == len(expected) > 0
        # Names of masks are their numbers: 0, 1, 10, 11, ..., 2, ...
        order = sorted(range(len(expected)), key=str)
        for annotation, k in zip(annotations, order):
            for key in ("segmentation", "area", "bbox", "iscrowd", "category_id"):
                assert annotation[key] == expected[k][key]
        (png,) = (tmp_path / "out").glob(f"*/{image['file_name']}")
        original = Image.open(real_nuclei / "train" / image["file_name"])
        np.testing.assert_array_equal(np.asarray(Image.open(png)), np.asarray(original))
