"""Images that cannot be read: in training left out and counted, in evaluation refused."""

import json

import numpy as np
import pytest
from PIL import Image

from detectron2.data import DatasetMapper

from msrcnn_d2.engine.bad_images import BadImage, BadImageError, BadImages
from msrcnn_d2.engine.loaders import build_resumable_loader, build_test_loader, fit_mask_format
from msrcnn_d2.utils.distributed import StepAgreement
from tests.helpers.toy import IMAGE_SIZE
from tests.helpers.toy_training import NUM_IMAGES, run, write_dataset, write_lazy_config

pytestmark = pytest.mark.usefixtures("leave_no_traces")


@pytest.fixture
def dataset(tmp_path):
    """Options of a dataset that may be spoilt."""
    folder = tmp_path / "data"
    folder.mkdir()
    return write_dataset(folder)


@pytest.fixture
def base(dataset, tmp_path):
    config = write_lazy_config(tmp_path / "lazy.yaml")
    # The check before training would find them at once
    return ["--config-file", config, *dataset, "train.check_images=False", "train.eval_period=0"]


def spoil(folder, *numbers, how="truncate"):
    for number in numbers:
        image = folder / f"{number}.png"
        if how == "truncate":
            image.write_bytes(image.read_bytes()[:-30])
        elif how == "remove":
            image.unlink()
        elif how == "resize":
            Image.open(image).resize((48, 32)).save(image)
        else:
            image.write_text("not an image")


def dicts(folder):
    height, width = IMAGE_SIZE
    return [
        {"file_name": f"{folder}/{k}.png", "image_id": k, "height": height, "width": width}
        for k in range(1, NUM_IMAGES + 1)
    ]


def mapper(is_train):
    return DatasetMapper(is_train, augmentations=[], image_format="BGR")


@pytest.mark.parametrize("how", ["truncate", "remove", "resize", "overwrite"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_another_image_takes_the_place_of_a_bad_one(how, num_workers, tmp_path):
    write_dataset(tmp_path)
    spoil(tmp_path, 3, 7, how=how)
    found = []
    loader = build_resumable_loader(
        dicts(tmp_path),
        mapper=mapper(True),
        seed=0,
        first_iter=0,
        total_batch_size=3,
        num_workers=num_workers,
        on_bad_images=found.extend,
    )
    batches = [batch for batch, _ in zip(loader, range(6))]
    ids = [x["image_id"] for batch in batches for x in batch]
    assert len(ids) == 18 and not {3, 7} & set(ids)
    assert {image.name for image in found} == {f"{tmp_path}/3.png", f"{tmp_path}/7.png"}
    # Nothing but the others' place changes
    repeated = build_resumable_loader(
        dicts(tmp_path),
        mapper=mapper(True),
        seed=0,
        first_iter=4,
        total_batch_size=3,
        on_bad_images=found.extend,
    )
    resumed = [[x["image_id"] for x in batch] for batch, _ in zip(repeated, range(2))]
    assert resumed == [[x["image_id"] for x in batch] for batch in batches[4:]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_dataset_of_bad_images_is_one_sentence(num_workers, tmp_path):
    loader = build_resumable_loader(
        dicts(tmp_path / "nosuch"),
        mapper=mapper(True),
        seed=0,
        first_iter=0,
        total_batch_size=2,
        num_workers=num_workers,
        on_bad_images=lambda images: None,
    )
    with pytest.raises(BadImageError) as error:
        next(iter(loader))
    assert "nosuch/" in str(error.value) and "Traceback" not in str(error.value)


def test_mistakes_of_a_mapper_are_not_bad_images(tmp_path):
    def wrong(dataset_dict):
        return dataset_dict["a key that is not there"]

    loader = build_resumable_loader(
        dicts(tmp_path), mapper=wrong, seed=0, first_iter=0, total_batch_size=2
    )
    with pytest.raises(KeyError):
        next(iter(loader))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_evaluation_refuses_a_bad_image_by_name(num_workers, batch_size, tmp_path):
    write_dataset(tmp_path)
    spoil(tmp_path, 5)
    loader = build_test_loader(
        dicts(tmp_path), mapper=mapper(False), batch_size=batch_size, num_workers=num_workers
    )
    with pytest.raises(BadImageError) as error:
        list(loader)
    message = str(error.value)
    assert f"Image '{tmp_path}/5.png' cannot be used (image file is truncated" in message
    assert "Traceback" not in message


class Trainer:
    iter = 3


def test_a_resumed_training_goes_on_counting():
    counter, resumed = BadImages(1, StepAgreement()), BadImages(1, StepAgreement())
    counter.trainer = resumed.trainer = Trainer()
    counter.found([BadImage("a.png", "it is broken")])
    counter.after_step()
    resumed.load_state_dict(counter.state_dict())
    resumed.found([BadImage("a.png", "it is broken")])
    resumed.after_step()
    resumed.found([BadImage("b.png", "it is broken")])
    with pytest.raises(BadImageError):
        resumed.after_step()


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_images_are_counted_once_and_up_to_the_limit(limit, caplog):
    counter = BadImages(limit, StepAgreement())
    counter.trainer = Trainer()
    names = ["a.png", "a.png", "b.png", "a.png", "c.png"]
    for known, name in enumerate(names):
        counter.found([BadImage(name, "it is broken")])
        if len(set(names[: known + 1])) > limit:
            with pytest.raises(BadImageError) as error:
                counter.after_step()
            assert f"at most {limit} may be left out" in str(error.value)
            return
        counter.after_step()
    pytest.fail("there are more than the limit")


def test_training_goes_on_past_bad_images_with_a_warning_and_a_count(base, dataset, tmp_path):
    folder = tmp_path / "data"
    spoil(folder, 2)
    spoil(folder, 6, how="remove")
    options = ["dataloader.train.num_workers=1", f"train.output_dir={tmp_path}/output"]
    with pytest.raises(SystemExit):  # of the evaluation at the end, on the same images
        run(*base, *options)
    log = (tmp_path / "output" / "log.txt").read_text()
    assert f"Image '{folder}/2.png' is left out (image file is truncated" in log
    assert "That makes 1 of at most 10." in log and "That makes 2 of at most 10." in log
    assert (tmp_path / "output" / "model_final.pth").exists()


@pytest.mark.parametrize("limit", [0, 1])
def test_more_bad_images_than_the_limit_stop_a_training(limit, base, tmp_path, capsys):
    spoil(tmp_path / "data", *range(1, 5))
    with pytest.raises(SystemExit) as left:
        run(*base, f"train.max_bad_images={limit}", f"train.output_dir={tmp_path}/output")
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert f"at most {limit} may be left out" in captured.err
    assert "train.max_bad_images (yaml: DATALOADER.MAX_BAD_IMAGES)" in captured.err
    assert captured.err.count("error: ") == 1
    assert "Traceback" not in captured.out + captured.err
    assert not (tmp_path / "output" / "model_final.pth").exists()


# What is found before training


@pytest.fixture
def checked(base, tmp_path, capsys):
    """Runs train_net.py with the check; returns exit code, error and log."""

    def run_and_look(*options):
        num_first = 6  # words of the options that have to come before key=value
        first, rest = base[:num_first], base[num_first:]
        options = [*first, *options, *rest, "train.check_images=True", "train.max_iter=1"]
        code = 0
        for checkpoint in (tmp_path / "output").glob("*.pth"):
            checkpoint.unlink()  # runs are not mixed
        try:
            run(*options, f"train.output_dir={tmp_path}/output")
        except SystemExit as left:
            code = left.code
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return code, error, (tmp_path / "output" / "log.txt").read_text()

    return run_and_look


def edit(tmp_path, change):
    """Change the annotations."""
    path = tmp_path / "data" / "annotations.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_a_clean_dataset_is_a_line_of_the_log(checked):
    code, _, log = checked()
    assert code == 0
    assert log.count("Checking dataset 'toy' ...") == 1
    assert "Dataset 'toy' has 0 errors, 0 warnings" in log


@pytest.mark.parametrize("how", ["truncate", "remove", "resize", "overwrite"])
def test_bad_images_are_named_before_training(how, checked, tmp_path):
    spoil(tmp_path / "data", 4, how=how)
    code, error, log = checked()
    # The same images are evaluated on, and an evaluation needs all
    assert code == 2 and "Starting training" not in log
    assert "Dataset 'toy' has 1 image that cannot be used, such as image 4 '4.png'" in error
    assert "an evaluation or calibration needs all of them: `msrcnn-d2 check-data" in error
    assert "image 4 '4.png'" in log


def test_training_starts_with_up_to_so_many_bad_images(checked, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    other = write_dataset(folder, "other")
    spoil(folder, 4, 5)
    options = [*other, "dataloader.train.dataset.names=other"]
    code, error, log = checked(*options, "train.max_bad_images=1")
    assert code == 2 and "Starting training" not in log
    assert "training may leave out 1 (train.max_bad_images" in error
    code, _, log = checked(*options, "train.max_bad_images=2")
    assert code == 0 and "image-truncated (2)" in log


def test_errors_of_annotations_are_named_before_training(checked, tmp_path):
    edit(tmp_path, lambda data: data["annotations"][2]["segmentation"][0].__setitem__(0, 1e999))
    code, error, log = checked()
    assert code == 2 and "Starting training" not in log
    assert "Dataset 'toy' has 1 error, such as image 2 '2.png', annotation 3: " in error
    assert "--fix OUT.json" in error


def drop_areas(data):
    for annotation in data["annotations"]:
        del annotation["area"]


def test_what_only_an_evaluation_needs_does_not_stop_a_training(checked, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    other = write_dataset(folder, "other")
    edit(tmp_path, drop_areas)
    options = ["dataloader.test.dataset.names=other", "dataloader.evaluator.dataset_name=other"]
    assert checked(*other, *options)[0] == 0
    code, error, _ = checked()
    assert code == 2 and "Dataset 'toy' has 18 errors" in error and "(area)" in error


def make_crowds(data):
    for annotation in data["annotations"]:
        annotation["iscrowd"] = 1


def test_an_evaluation_that_can_only_give_nan_is_told_before(checked, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    other = write_dataset(folder, "other")
    edit(tmp_path, make_crowds)
    # Training is on the other set, evaluation on this one
    options = [*other, "dataloader.train.dataset.names=other"]
    code, _, log = checked(*options)
    assert code == 0 and log.count("All results on dataset 'toy' would be nan") == 1
    code, error, log = checked("--eval-only", *options)
    assert code == 2 and "All results on dataset 'toy' would be nan" in error and "18" in error
    assert "Start inference" not in log.split("Checking dataset")[-1]


def test_a_set_to_predict_on_needs_no_annotations(checked, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    other = write_dataset(folder, "other")
    edit(tmp_path, lambda data: data.pop("annotations"))
    code, _, log = checked(*other, "dataloader.train.dataset.names=other")
    assert code == 0 and "would be nan" not in log


def drop_crowd_flags(data):
    for number, annotation in enumerate(data["annotations"]):
        annotation["id"] = f"uuid-{number}"
        del annotation["iscrowd"]
    for entry in data["images"]:
        entry["id"] = 2**60 + entry["id"]
    for annotation in data["annotations"]:
        annotation["image_id"] += 2**60


@pytest.mark.parametrize("engine", ["pycocotools", "faster-coco-eval"])
def test_odd_ids_and_missing_flags_are_trained_on_and_evaluated(engine, checked, tmp_path):
    edit(tmp_path, drop_crowd_flags)
    code, error, log = checked(f"dataloader.evaluator.engine={engine}")
    assert code == 0, error
    assert "iscrowd-missing (18)" in log and "annotation-id-odd (18)" in log
    assert "Results on toy" in log


@pytest.mark.parametrize("codec, said", [("utf-8-sig", "byte-order-mark"), ("utf-16", "UTF-16")])
def test_encodings_that_detectron2_does_not_read_are_one_sentence(
    codec, said, base, tmp_path, capsys
):
    path = tmp_path / "data" / "annotations.json"
    path.write_text(path.read_text(), codec)
    with pytest.raises(SystemExit) as left:
        run(*base, f"train.output_dir={tmp_path}/output")
    captured = capsys.readouterr()
    assert left.value.code == 2 and "Traceback" not in captured.out + captured.err
    assert said in captured.err


@pytest.mark.parametrize("num_wrong", [1, 18])
def test_many_wrong_boxes_stop_a_training_and_a_few_do_not(num_wrong, checked, tmp_path):
    def spoil_boxes(data):
        # 108 annotations, of which one is less than one in a hundred
        data["annotations"] = [
            {**a, "id": k} for k, a in enumerate(6 * data["annotations"], start=1)
        ]
        for annotation in data["annotations"][:num_wrong]:
            annotation["bbox"] = [0, 0, 4, 4]

    edit(tmp_path, spoil_boxes)
    code, error, log = checked()
    assert f"box-elsewhere ({num_wrong})" in log
    assert code == (0 if num_wrong == 1 else 2)
    assert ("Dataset 'toy' has 18 errors" in error) == (num_wrong == 18)


def test_annotations_that_are_no_json_are_one_sentence(base, tmp_path, capsys):
    path = tmp_path / "data" / "annotations.json"
    path.write_text(path.read_text()[:-100])
    with pytest.raises(SystemExit) as left:
        run(*base, f"train.output_dir={tmp_path}/output")
    captured = capsys.readouterr()
    assert left.value.code == 2 and "Traceback" not in captured.out + captured.err
    assert "annotations.json' is not JSON, or it is cut off" in captured.err


def test_what_detectron2_refuses_is_told_with_its_ids(base, tmp_path, capsys):
    def use_twice(data):
        data["annotations"][2]["id"] = data["annotations"][1]["id"]

    edit(tmp_path, use_twice)
    with pytest.raises(SystemExit) as left:
        run(*base, f"train.output_dir={tmp_path}/output")
    captured = capsys.readouterr()
    assert left.value.code == 2 and "Traceback" not in captured.out + captured.err
    assert "Dataset 'toy' has 1 error, such as image 2 '2.png', annotation 2: " in captured.err


# Masks as RLE


def rle_annotations(path, crowds_only):
    """Let the first object of each image be RLE."""
    import pycocotools.mask as mask_util

    data = json.loads(path.read_text())
    seen = set()
    for annotation in data["annotations"]:
        if annotation["image_id"] in seen:
            continue
        seen.add(annotation["image_id"])
        mask = np.zeros(IMAGE_SIZE, dtype=np.uint8, order="F")
        mask[10:30, 20:50] = 1
        rle = mask_util.encode(mask)
        annotation["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
        annotation.update(bbox=[20, 10, 30, 20], area=600, iscrowd=int(crowds_only))
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("crowds_only", [True, False])
def test_masks_that_are_rle_need_no_option(crowds_only, base, tmp_path):
    rle_annotations(tmp_path / "data" / "annotations.json", crowds_only)
    run(*base, f"train.output_dir={tmp_path}/output")
    log = (tmp_path / "output" / "log.txt").read_text()
    assert ("There are masks in run-length encoding" in log) == (not crowds_only)
    assert "loss_mask_iou" in (tmp_path / "output" / "metrics.json").read_text()


def test_a_mapper_of_ones_own_keeps_its_masks():
    rle = [{"annotations": [{"segmentation": {"size": [1, 1], "counts": "1"}}]}]
    fit_mask_format(print, rle)
    bitmask = DatasetMapper(True, augmentations=[], image_format="RGB", use_instance_mask=True)
    fit_mask_format(bitmask, [])
    assert bitmask.instance_mask_format == "polygon"
    fit_mask_format(bitmask, rle)
    assert bitmask.instance_mask_format == "bitmask"
