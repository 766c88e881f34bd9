"""Images of every depth, orientation and size are read alike everywhere, or refused by name."""

import json
import pickle
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, features

from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import read_image

from msrcnn_d2 import MaskScoringPredictor
from msrcnn_d2.dataset_check import check_dataset
from msrcnn_d2.dataset_check.issues import Level
from msrcnn_d2.engine import build_recipe, load_config, register_dataset
from msrcnn_d2.engine.loaders import build_test_loader
from msrcnn_d2.engine.preflight import check_data
from msrcnn_d2.image_reading import image_settings, read_with
from msrcnn_d2.report import gallery
from msrcnn_d2.utils.errors import UserError
from msrcnn_d2_runtime.image_reading import (
    ImageSettings,
    NeedsSetting,
    read_bgr_image,
    scaled_to_8_bits,
)
from tests.helpers.command import exit_code
from tests.helpers.toy import IMAGE_SIZE, tiny_yacs_config, write_coco_json, write_images
from tests.helpers.toy_training import lazy_config, run, write_dataset

HEIGHT, WIDTH = IMAGE_SIZE
RANGE = ImageSettings(intensity_range=(1000, 1510))
# What becomes of these in the range: 0, 0.5 (to even), 1, 127.5 (to even), 255, clipped twice
VALUES = np.array([[1000, 1001, 1002, 1255], [1510, 1600, 65535, 0]])
SCALED = np.array([[0, 0, 1, 128], [255, 255, 255, 0]], np.uint8)


def save_png(path, values):
    Image.fromarray(values.astype(np.uint16)).save(path)


def save_tiff(dtype):
    return lambda path, values: Image.fromarray(values.astype(dtype)).save(path)


def save_big_endian_tiff(path, values):
    height, width = values.shape
    data = values.astype(">u2").tobytes()
    Image.frombytes("I;16B", (width, height), data).save(path)


def save_16_bit_colors(path, values=VALUES):
    """A PNG that Pillow cannot write: of 16 bits per channel."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    height, width = values.shape
    rows = np.repeat(values[..., None], 3, axis=2).astype(">u2")
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


DEEP = {
    "16-bit.png": save_png,
    "16-bit.tif": save_tiff(np.uint16),
    "big-endian.tif": save_big_endian_tiff,
    "32-bit.tif": save_tiff(np.int32),
    "float.tif": save_tiff(np.float32),
}


def map_images(path, settings, image_format="BGR", **more):
    """What a mapper of Detectron2 makes of a file: an array (H, W, C), and the whole dict."""
    mapper = DatasetMapper(is_train=False, augmentations=[], image_format=image_format)
    mapped = read_with(settings, mapper)({"file_name": str(path), **more})
    return mapped["image"].numpy().transpose(1, 2, 0), mapped


@pytest.mark.parametrize("name", DEEP)
def test_deep_images_are_scaled_alike_everywhere(name, tmp_path):
    DEEP[name](tmp_path / name, VALUES)
    expected = np.dstack([SCALED] * 3)
    assert np.array_equal(read_bgr_image(tmp_path / name, RANGE), expected)
    with Image.open(tmp_path / name) as image:
        assert np.array_equal(read_bgr_image(image, RANGE), expected)
        assert np.array_equal(read_bgr_image(np.asarray(image), RANGE), expected)
    pixels, mapped = map_images(tmp_path / name, RANGE, height=2, width=4, image_id=7)
    assert np.array_equal(pixels, expected)
    assert mapped["file_name"] == str(tmp_path / name) and mapped["image_id"] == 7
    assert np.array_equal(map_images(tmp_path / name, RANGE, "L")[0][..., 0], SCALED)


@pytest.mark.parametrize("name", DEEP)
def test_deep_images_without_a_scale_are_refused(name, tmp_path):
    DEEP[name](tmp_path / name, VALUES)
    with pytest.raises(UserError, match=f"{name}.*intensity_range.*INTENSITY_RANGE"):
        read_bgr_image(tmp_path / name)
    with pytest.raises(ValueError, match="intensity_range"):
        map_images(tmp_path / name, ImageSettings())


def test_percentiles_are_those_of_each_image():
    settings = ImageSettings(intensity_percentiles=(10, 100))
    values = np.arange(11) * 100 + 5  # the second lowest is the 10th percentile
    found = scaled_to_8_bits(values, settings)
    assert found.tolist() == [0, 0, 28, 57, 85, 113, 142, 170, 198, 227, 255]
    assert np.array_equal(scaled_to_8_bits(values * 7 + 30, settings), found)


def test_values_that_are_no_numbers():
    nan, inf = float("nan"), float("inf")
    values = np.array([nan, -inf, inf, 0, 1])
    for settings in (
        ImageSettings(intensity_range=(0, 1)),
        ImageSettings(intensity_percentiles=(0, 100)),
    ):
        assert scaled_to_8_bits(values, settings).tolist() == [0, 0, 255, 0, 255]
        assert scaled_to_8_bits(values[:1], settings).tolist() == [0]
    settings = ImageSettings(intensity_percentiles=(1, 50))
    assert scaled_to_8_bits(np.array([3, 3, 3, 9]), settings).tolist() == [0, 0, 0, 255]


def test_ordinary_images_are_read_as_by_detectron2(tmp_path):
    """With and without settings, of every mode; the file is the mapper's own to open."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8))
    names = {"RGB": "jpg", "CMYK": "jpg", "RGBA": "png", "P": "png", "L": "png", "LA": "png"}
    opened = []

    class Mapper(DatasetMapper):
        def __call__(self, dataset_dict):
            opened.append(dataset_dict["file_name"])
            return super().__call__(dataset_dict)

    mapper = Mapper(is_train=False, augmentations=[], image_format="BGR")
    for mode, suffix in {**names, "1": "png"}.items():
        path = str(tmp_path / f"{mode}.{suffix}")
        image.convert(mode).save(path, exif=exif_of(6))
        for settings in (ImageSettings(), RANGE):
            pixels = read_with(settings, mapper)({"file_name": path})["image"]
            expected = read_image(path, "BGR")
            assert expected.shape == (9, 8, 3)
            assert np.array_equal(pixels.numpy().transpose(1, 2, 0), expected)
            assert np.array_equal(read_bgr_image(path, settings), expected)
            assert opened.pop() == path


def test_colors_of_16_bits(tmp_path):
    """Pillow has the upper 8 bits: right for the full range, and for no other scale."""
    path = tmp_path / "colors.png"
    save_16_bit_colors(path)
    upper = np.dstack([VALUES >> 8] * 3)
    full = ImageSettings(intensity_range=(0, 65535))
    for settings in (ImageSettings(), full):
        assert np.array_equal(read_bgr_image(path, settings), upper)
        assert np.array_equal(map_images(path, settings)[0], upper)
    with pytest.raises(UserError, match=r"colors.png.*16 bits per channel"):
        read_bgr_image(path, RANGE)
    with pytest.raises(NeedsSetting, match="16 bits per channel"):
        map_images(path, RANGE)


@pytest.mark.skipif(not features.check("avif"), reason="needs a Pillow that reads AVIF")
def test_a_damaged_avif_file_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "a.avif"
    Image.new("RGB", (40, 40)).save(path)
    header, pixels = path.read_bytes().split(b"mdat")
    path.write_bytes(header + b"mdat" + bytes(len(pixels)))
    with pytest.raises(UserError, match="a.avif"):
        read_bgr_image(path)


def test_another_size_is_told_with_the_name_of_the_file(tmp_path):
    save_png(tmp_path / "a.png", VALUES)
    with pytest.raises(ValueError, match="for image /.*a.png") as raised:
        map_images(tmp_path / "a.png", RANGE, height=4, width=2)
    assert "://" not in str(raised.value)


def test_a_mapper_keeps_its_attributes_also_in_other_processes():
    mapper = DatasetMapper(
        is_train=True, augmentations=[], image_format="BGR", instance_mask_format="bitmask"
    )
    again = pickle.loads(pickle.dumps(read_with(RANGE, mapper)))
    assert again.instance_mask_format == "bitmask" and again.is_train
    assert again.settings == RANGE
    assert read_with(RANGE, again) is again


def test_a_mapper_of_ones_own_may_read_in_its_own_way(tmp_path):
    save_png(tmp_path / "a.png", VALUES)

    class Mine(DatasetMapper):
        def __call__(self, dataset_dict):
            return np.asarray(Image.open(dataset_dict["file_name"])).max()

    def function(dataset_dict):
        return read_image(dataset_dict["file_name"], "RGB").max()

    mapper = Mine(is_train=True, augmentations=[], image_format="BGR")
    assert read_with(ImageSettings(), mapper)({"file_name": str(tmp_path / "a.png")}) == 65535
    assert read_with(ImageSettings(), function) is function
    settings = ImageSettings(intensity_range=(0, 255 * 65535))
    assert read_with(settings, function)({"file_name": str(tmp_path / "a.png")}) == 1


def test_worker_processes_read_alike(tmp_path):
    save_png(tmp_path / "a.png", VALUES)
    mapper = DatasetMapper(is_train=False, augmentations=[], image_format="RGB")
    images = [{"file_name": str(tmp_path / "a.png"), "image_id": k} for k in range(2)]
    batches = list(build_test_loader(images, mapper=read_with(RANGE, mapper), num_workers=1))
    for (image,) in batches:
        assert torch.equal(image["image"][0], torch.from_numpy(SCALED))


# Orientation: what is to be done with an array to see it as it was held
UPRIGHT = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


def exif_of(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation_is_followed_or_not(orientation, tmp_path):
    stored = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(stored[..., ::-1]).save(path, exif=exif_of(orientation))
    deep = tmp_path / "deep.png"
    Image.fromarray(VALUES.astype(np.uint16)).save(deep, exif=exif_of(orientation))
    for apply_exif in (True, False):
        turn = UPRIGHT[orientation] if apply_exif else lambda x: x
        settings = ImageSettings(apply_exif=apply_exif)
        assert np.array_equal(read_bgr_image(path, settings), turn(stored))
        assert np.array_equal(map_images(path, settings)[0], turn(stored))
        settings = ImageSettings(apply_exif=apply_exif, intensity_range=(1000, 1510))
        assert np.array_equal(map_images(deep, settings)[0][..., 0], turn(SCALED))


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_the_limit_of_pixels(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    Image.new("RGB", (30, 10)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for settings in (ImageSettings(), ImageSettings(max_pixels=299)):
        with pytest.raises(UserError, match=r"large.png.*30 x 10.*max_pixels.*MAX_IMAGE_PIXELS"):
            read_bgr_image(path, settings)
        with pytest.raises(ValueError, match=r"30 x 10.*max_pixels.*MAX_IMAGE_PIXELS"):
            map_images(path, settings)
    settings = ImageSettings(max_pixels=300)
    assert read_bgr_image(path, settings).shape == (10, 30, 3)
    assert map_images(path, settings)[0].shape == (10, 30, 3)
    assert Image.MAX_IMAGE_PIXELS == 100


WRONG = [
    {"intensity_range": [5, 5]},
    {"intensity_range": [1]},
    {"intensity_range": "0,1"},
    {"intensity_range": [0, float("inf")]},
    {"intensity_range": [False, True]},
    {"intensity_percentiles": [-1, 99]},
    {"intensity_percentiles": [1, 101]},
    {"intensity_percentiles": [1, 99], "intensity_range": [0, 9]},
    {"apply_exif": "no"},
    {"max_pixels": -1},
    {"max_pixels": 1.5},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_wrong_settings_are_one_sentence(wrong):
    cfg = lazy_config()
    cfg.dataloader.images = wrong
    with pytest.raises(UserError, match=f"{next(iter(wrong))}|both") as raised:
        build_recipe(cfg)
    assert "\n" not in str(raised.value) and "yaml: INPUT." in str(raised.value)


def test_settings_of_both_kinds_of_config(tmp_path):
    assert image_settings(lazy_config()) == ImageSettings()
    assert image_settings(tiny_yacs_config()) == ImageSettings()
    path = str(tmp_path / "config.yaml")
    LazyConfig.save(lazy_config(), path)
    lazy = load_config(
        path,
        [
            "dataloader.images.intensity_percentiles=[0.1,99.9]",
            "dataloader.images.apply_exif=False",
            "dataloader.images.max_pixels=7",
        ],
    )
    expected = ImageSettings(None, (0.1, 99.9), False, 7)
    assert image_settings(lazy) == build_recipe(lazy).images == expected
    LazyConfig.save(lazy, path)
    assert image_settings(load_config(path)) == expected
    yacs = tiny_yacs_config()
    yacs.merge_from_list(["INPUT.INTENSITY_PERCENTILES", "(0.1, 99.9)", "INPUT.APPLY_EXIF", False])
    yacs.merge_from_list(["INPUT.MAX_IMAGE_PIXELS", 7])
    assert image_settings(yacs) == build_recipe(yacs).images == expected
    with pytest.raises(UserError, match="intensity"):
        load_config(path, ["dataloader.images.intensity=[0,1]"])


# The check of a dataset


@pytest.fixture
def dataset(tmp_path):
    """Two images with two objects each, and nothing wrong with them."""
    write_coco_json(tmp_path / "a.json")
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images")
    return tmp_path


def kinds_of(folder, quick=True, **settings):
    findings = check_dataset(
        *(str(folder / "a.json"), str(folder / "images"), quick),
        progress=False,
        settings=ImageSettings(**settings),
    )
    return [(f.kind, f.image_id) for f in findings.all if f.level is not Level.NOTE]


def check_command(monkeypatch, capsys, *args):
    """Exit code and what was printed."""
    return exit_code("check-data", *args), capsys.readouterr().out


def make_deep(folder, factor=257):
    """The same images with values of 16 bits."""
    for path in folder.glob("*.png"):
        grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16)
        Image.fromarray(grey * factor).save(path)


@pytest.mark.parametrize("quick", [True, False])
def test_the_check_says_which_images_need_a_scale(quick, dataset):
    make_deep(dataset / "images")
    assert kinds_of(dataset, quick) == [("image-deep", 1), ("image-deep", 2)]
    assert kinds_of(dataset, quick, intensity_range=(0, 65535)) == []
    save_16_bit_colors(dataset / "images" / "1.png", np.zeros(IMAGE_SIZE))
    found = kinds_of(dataset, quick, intensity_percentiles=(1, 99))
    assert found == [("image-deep-color", 1)]
    assert kinds_of(dataset, quick) == [("image-16-bits", 1), ("image-deep", 2)]


def test_fixing_leaves_out_no_image_for_want_of_a_setting(dataset, monkeypatch, capsys):
    make_deep(dataset / "images")
    fixed = dataset / "fixed.json"
    base = dataset / "a.json", dataset / "images"
    assert check_command(monkeypatch, capsys, *base, "--fix", fixed)[0] == 1
    assert len(json.loads(fixed.read_text())["images"]) == 2
    assert check_command(monkeypatch, capsys, *base, "--intensity-range", 0, 65535)[0] == 0
    assert check_command(monkeypatch, capsys, *base, "--intensity-percentiles", 1, 99)[0] == 0
    code, _ = check_command(
        *(monkeypatch, capsys, *base, "--intensity-range", 0, 9, "--max-pixels", 9)
    )
    assert code == 1


def turn_files(path, orientation, names=("1.png", "2.png"), stored=IMAGE_SIZE, folder="images"):
    for name in names:
        image = Image.new("RGB", stored[::-1])
        image.save(path / folder / name, exif=exif_of(orientation))


def set_sizes(folder, **sizes):
    contents = json.loads((folder / "a.json").read_text())
    for entry in contents["images"]:
        height, width = sizes.get(f"image_{entry['id']}", (entry["height"], entry["width"]))
        entry.update(height=height, width=width)
    (folder / "a.json").write_text(json.dumps(contents))


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_annotations_of_the_stored_image(orientation, dataset, monkeypatch, capsys):
    turn_files(dataset, orientation)
    assert kinds_of(dataset) == [("image-orientation", 1), ("image-orientation", 2)]
    assert kinds_of(dataset, apply_exif=False) == []
    fixed, base = dataset / "fixed.json", (dataset / "a.json", dataset / "images")
    assert check_command(monkeypatch, capsys, *base, "--fix", fixed)[0] == 1
    assert len(json.loads(fixed.read_text())["annotations"]) == 4
    assert check_command(monkeypatch, capsys, *base, "--ignore-exif")[0] == 0


def test_annotations_of_the_turned_image(dataset):
    turn_files(dataset, 6, stored=(WIDTH, HEIGHT))
    assert kinds_of(dataset) == []
    assert kinds_of(dataset, apply_exif=False) == [
        ("image-orientation", 1),
        ("image-orientation", 2),
    ]


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_orientations_that_keep_the_size(orientation, dataset):
    turn_files(dataset, orientation)
    assert [kind for kind, _ in kinds_of(dataset)] == ["image-orientation-unclear"] * 2


def test_other_images_decide_on_those_whose_size_says_nothing(dataset):
    """Image 2 is turned upside down; image 1, by a quarter turn, says of which one they are."""
    turn_files(dataset, 3, ["2.png"])
    turn_files(dataset, 6, ["1.png"])  # annotated as stored
    assert kinds_of(dataset) == [("image-orientation", 1), ("image-orientation", 2)]
    assert kinds_of(dataset, apply_exif=False) == []
    turn_files(dataset, 6, ["1.png"], stored=(WIDTH, HEIGHT))  # annotated as turned
    assert kinds_of(dataset) == []


def test_square_images_and_a_single_other_size(dataset):
    square = (HEIGHT, HEIGHT)
    set_sizes(dataset, image_1=square)
    turn_files(dataset, 6, ["1.png"], stored=square)
    assert ("image-orientation-unclear", 1) in kinds_of(dataset)
    set_sizes(dataset, image_2=(7, 9))
    turn_files(dataset, 6, ["2.png"])
    assert ("image-size", 2) in kinds_of(dataset)


def test_of_two_readings_in_one_file_the_rarer_is_a_wrong_size(tmp_path):
    write_coco_json(tmp_path / "a.json", [[]] * 3)
    (tmp_path / "images").mkdir()
    turn_files(tmp_path, 6, ["1.png", "2.png"], stored=(WIDTH, HEIGHT))
    turn_files(tmp_path, 6, ["3.png"])
    found = [x for x in kinds_of(tmp_path) if x[0] != "no-objects"]
    assert found == [("image-size", 3)]
    found = [x for x in kinds_of(tmp_path, apply_exif=False) if x[0] != "no-objects"]
    assert found == [("image-orientation", 1), ("image-orientation", 2)]


# A whole run


def losses_of(folder):
    lines = (folder / "metrics.json").read_text().splitlines()
    return [x["total_loss"] for x in map(json.loads, lines) if "total_loss" in x]


def test_a_training_on_deep_images_is_that_on_their_8_bits(tmp_path, capsys):
    """257 x v of 16 bits are v of 8: the same losses, predictions and pictures."""
    seen = {}
    for name in ("plain_images", "deep_images"):
        folder = tmp_path / name
        folder.mkdir()
        options = write_dataset(folder, name)
        for path in folder.glob("*.png"):
            Image.open(path).convert("L").save(path)
        config = str(folder / "config.yaml")
        LazyConfig.save(lazy_config(name), config)
        output = folder / "output"
        base = ["--config-file", config, *options, f"train.output_dir={output}"]
        base += ["train.max_iter=2", "train.eval_period=0"]
        if name == "deep_images":
            make_deep(folder)
            assert run_to_an_error(capsys, *base).count("intensity_range") == 1
            assert not (output / "metrics.json").exists()
            base.append("dataloader.images.intensity_range=[0,65535]")
            base.append("dataloader.train.num_workers=1")
        run(*base)
        run("--eval-only", "--resume", *base)
        results = json.loads((output / "inference" / "coco_instances_results.json").read_text())
        seen[name] = losses_of(output), results
        page = (output / "report" / "report.html").read_text()
        assert page.count("data:image/png") > 3
    assert seen["deep_images"] == seen["plain_images"] and len(seen["deep_images"][0]) == 2


def run_to_an_error(capsys, *args):
    """What train_net.py says when it stops before training."""
    with pytest.raises(SystemExit) as ended:
        run(*args)
    assert ended.value.code == 2
    (sentence,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("error:"))
    return sentence


def test_train_net_stops_before_a_training_that_would_read_images_wrongly(tmp_path):
    names = write_dataset(tmp_path, "turned_images")
    set_of = json.loads((tmp_path / "annotations.json").read_text())["images"]
    turn_files(tmp_path, 6, [entry["file_name"] for entry in set_of], folder=".")
    config = str(tmp_path / "config.yaml")
    LazyConfig.save(lazy_config("turned_images"), config)
    register_dataset(*names[1:])

    def check(*overrides):
        check_data(build_recipe(load_config(config, overrides)), training=True)

    with pytest.raises(UserError, match=r"9 images .* dataloader.images.apply_exif=False"):
        check()
    check("dataloader.images.apply_exif=False")
    with pytest.raises(UserError, match=r"dataloader.images.max_pixels"):
        check("dataloader.images.apply_exif=False", "dataloader.images.max_pixels=9")


def test_the_predictor_and_the_gallery_follow_the_config(tmp_path):
    cfg = lazy_config()
    weights = str(tmp_path / "model.pth")
    torch.save({"model": instantiate(cfg.model).state_dict()}, weights)
    cfg.train.init_checkpoint = weights
    cfg.dataloader.images = {"intensity_range": [1000, 1510]}
    values = np.random.default_rng(0).integers(900, 1600, (64, 96))
    save_png(tmp_path / "1.png", values)
    grey = scaled_to_8_bits(values, RANGE)
    predict = MaskScoringPredictor(cfg)
    found = [predict(x)["instances"] for x in (str(tmp_path / "1.png"), values, grey)]
    for instances in found[:2]:
        assert torch.equal(instances.scores, found[2].scores) and len(instances)
    quality = SimpleNamespace(
        coco_gt=SimpleNamespace(imgs={1: {"file_name": "1.png"}}), results=[{"image_id": 1}]
    )
    shown = gallery._image(quality, 0, str(tmp_path), RANGE, (64, 96))
    assert np.array_equal(shown, np.dstack([grey] * 3))
