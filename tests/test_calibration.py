"""Fitting a calibrator: the fit itself, `msrcnn_d2.calibrate`, the command, and what it writes."""

import copy
import dataclasses
import json
import logging
import shlex
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from msrcnn_d2 import add_mask_calibrator, calibrate
from msrcnn_d2.calibration import (
    Samples,
    calibrate_on,
    collect_detections,
    cross_validated_probs,
    fit,
    fit_calibrator,
)
from msrcnn_d2.calibration.collect import CueRecorder, DetectionCollector
from msrcnn_d2.checkpoint import MaskScoringCheckpointer
from msrcnn_d2.engine import evaluate as evaluate_module
from msrcnn_d2.engine import load_config, register_dataset
from msrcnn_d2.modeling import MaskCalibrator
from msrcnn_d2.modeling.mask_cues import CUES
from msrcnn_d2.utils.errors import UserError
from msrcnn_d2_cli.calibrate import answer
from msrcnn_d2_runtime.iou_thresholds import iou_index
from msrcnn_d2_runtime.ranking import parse_operating_point
from tests.helpers import forked
from tests.helpers.command import exit_code
from tests.helpers.toy import tiny_mask_rcnn, tiny_yacs_config, write_coco_json
from tests.helpers.toy_training import lazy_config

calibrate_module = import_module("msrcnn_d2.calibration.calibrate")  # hidden by the function
pytestmark = pytest.mark.usefixtures("leave_no_traces")

NUM_CUES = len(CUES)
PREFIX = "roi_heads.mask_calibrator."


# ---- the fit


def samples_of(cue, score_log_odds, chance, per_image=4):
    """N detections that are right by chance; all cues but the second one are constant."""
    count = len(cue)
    cues = torch.full((count, NUM_CUES), 0.3)
    cues[:, 1] = torch.as_tensor(cue)
    right = torch.rand(count) < torch.as_tensor(chance)
    return Samples(
        cues=cues,
        score_log_odds=torch.as_tensor(score_log_odds, dtype=torch.float32),
        right=right[:, None].expand(-1, 10),
        counted=torch.ones(count, dtype=torch.bool),
        images=torch.arange(count) // per_image,
    )


def noise(count):
    """All cues and scores are noise, half of the detections are right."""
    samples = samples_of(torch.zeros(count), torch.randn(count), torch.full((count,), 0.5))
    samples.cues = torch.randn(count, NUM_CUES)
    return samples


def fitted(samples, **kwargs):
    calibrator = MaskCalibrator(hidden_dim=16, num_members=2)
    fit_calibrator(calibrator, samples, **kwargs)
    return calibrator


def tensors(calibrator):
    return torch.cat([x.flatten() for x in calibrator.state_dict().values()])


def test_probabilities_follow_a_cue():
    """Detections with a cue of 1 are right three times as often as those with 0."""
    cue = torch.arange(2000) % 2.0
    samples = samples_of(cue, torch.zeros(2000), 0.3 + 0.6 * cue)
    probs = fitted(samples).probs(samples.cues, samples.score_log_odds)
    for value in (0, 1):
        share = samples.right[cue == value].float().mean().item()
        assert share == pytest.approx(0.3 + 0.6 * value, abs=0.05)
        found = probs[cue == value]
        torch.testing.assert_close(found, torch.full_like(found, share), rtol=0, atol=0.02)


def test_the_line_is_found_again():
    score = 2 * torch.randn(20_000)
    samples = samples_of(torch.zeros(20_000), score, (1.5 * score - 1).sigmoid())
    calibrator = fitted(samples, with_network=False)
    assert calibrator.slope.tolist() == pytest.approx([1.5] * 10, abs=0.1)
    assert calibrator.offset.tolist() == pytest.approx([-1] * 10, abs=0.1)


@pytest.mark.parametrize("slope", [2.0, 0.0, -2.0])
def test_without_networks_the_ranking_stays(slope):
    """Even if low scores are better: with so few detections that would be chance."""
    score = torch.randn(300)
    samples = samples_of(torch.rand(300), score, (slope * score).sigmoid())
    calibrator = fitted(samples, with_network=False)
    assert (calibrator.slope > 0).all()
    quality = calibrator.probs(samples.cues, score).double().mean(dim=1)
    assert (quality[score.argsort()].diff() >= 0).all()


def test_scores_that_separate_right_from_wrong_have_no_ties():
    score = torch.linspace(-4, 4, 60)
    samples = samples_of(torch.zeros(60), score, (score > 0).float())
    quality = fitted(samples, with_network=False).probs(samples.cues, score).mean(dim=1)
    assert (quality.diff() > 0).all()


@pytest.mark.parametrize("chance", [0.0, 1.0])
@pytest.mark.parametrize("count", [1, 2, 60])
def test_few_detections_or_only_one_answer(count, chance):
    samples = samples_of(torch.rand(count), torch.randn(count), torch.full((count,), chance))
    calibrator = fitted(samples)
    assert tensors(calibrator).isfinite().all()
    probs = calibrator.probs(samples.cues, samples.score_log_odds)
    assert ((probs > 0.5) == bool(chance)).all()


def test_the_seed_decides_and_nothing_else():
    samples = noise(600)
    state = torch.get_rng_state()
    first = tensors(fitted(samples, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert torch.equal(tensors(fitted(samples, seed=1)), first)
    assert not torch.equal(tensors(fitted(samples, seed=2)), first)


def test_the_number_of_threads_does_not_matter(monkeypatch):
    monkeypatch.setattr(fit, "EPOCHS", 1)
    samples = noise(4000)
    found = []
    before = torch.get_num_threads()
    for number in (1, 2):
        torch.set_num_threads(number)
        calibrator = fitted(samples)
        assert torch.get_num_threads() == number
        probs = cross_validated_probs(calibrator, samples, with_network=False)
        found.append(torch.cat([tensors(calibrator), probs.flatten()]))
    torch.set_num_threads(before)
    assert torch.equal(*found)


def test_a_fitted_calibrator_is_ready_for_use():
    for with_network in (True, False):
        samples = noise(20)
        calibrator = fitted(samples, with_network=with_network)
        one, other = (
            calibrator.train(mode).probs(samples.cues, samples.score_log_odds)
            for mode in (True, False)
        )
        assert torch.equal(one, other)
        assert not any(p.requires_grad for p in calibrator.parameters())


def test_images_that_do_not_count_leave_something_to_fit_to():
    """Two images of thirty count. In the same part, they would leave the others nothing."""
    samples = noise(120)
    samples.counted = samples.images < 2
    for seed in range(10):
        probs = cross_validated_probs(MaskCalibrator(), samples, with_network=False, seed=seed)
        assert probs.isfinite().all()
        for k in range(2):  # what is held out does not matter
            changed = copy.deepcopy(samples)
            changed.right = samples.right ^ (samples.images == k)[:, None]
            again = cross_validated_probs(MaskCalibrator(), changed, with_network=False, seed=seed)
            assert torch.equal(again[samples.images == k], probs[samples.images == k])
            assert not torch.equal(again, probs)


def test_detections_that_do_not_count_change_nothing():
    samples = noise(200)
    samples.counted = torch.rand(200) < 0.8
    counted = samples[samples.counted]
    samples.right = samples.right ^ ~samples.counted[:, None]
    assert torch.equal(tensors(fitted(samples)), tensors(fitted(counted)))


def test_an_image_does_not_judge_itself():
    samples = noise(80)
    calibrator = MaskCalibrator(hidden_dim=4, num_members=1)
    before = copy.deepcopy(calibrator.state_dict())
    expected = cross_validated_probs(calibrator, samples)
    of_third = samples.images == 3
    samples.right = samples.right ^ of_third[:, None]
    found = cross_validated_probs(calibrator, samples)
    assert torch.equal(found[of_third], expected[of_third])
    changed = (found != expected).any(dim=1)
    # Those of the same part of the images stay, the others' calibrators have seen the image
    assert 0.6 < changed.float().mean() < 0.9
    assert all(torch.equal(x, before[k]) for k, x in calibrator.state_dict().items())


# ---- a world in which a model finds something: half of what it finds is the ground truth

NUM_IMAGES = 10


def found_by(model, pixels):
    image = torch.from_numpy(pixels[:, :, ::-1].transpose(2, 0, 1).copy())
    with torch.no_grad():
        return model.eval()([{"image": image, "height": 64, "width": 96}])[0]["instances"]


def annotations_of(model, folder, crowds=()):
    """
    Every second mask that the model finds in random images becomes an object.

    Args:
        crowds: images, from 0, in which the objects are crowds.
    """
    rng = np.random.default_rng(0)
    annotations = []
    for k in range(NUM_IMAGES):
        pixels = rng.integers(0, 255, (8, 12, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(folder / f"{k + 1}.png")
        found = found_by(model, pixels)
        masks = found.pred_masks.numpy()
        kept = [i for i in range(len(masks)) if masks[i].sum() > 20][::2]
        for i in kept:
            rle = mask_util.encode(np.asfortranarray(masks[i], dtype=np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": k + 1,
                    "category_id": int(found.pred_classes[i]) + 1,
                    "iscrowd": int(k in crowds),
                    "area": int(masks[i].sum()),
                    "bbox": mask_util.toBbox(rle).tolist(),
                    "segmentation": {**rle, "counts": rle["counts"].decode()},
                }
            )
    return annotations


def randomised(model):
    """With weights that give masks of many shapes."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.startswith("roi_heads.") and name.endswith("predictor.weight"):
            torch.nn.init.normal_(parameter, std=0.5 if "mask_head" not in name else 5.0)
    return model


def limited(cfg):
    cfg.model.roi_heads.box_predictor.test_topk_per_image = 12
    return cfg


@pytest.fixture(scope="module", autouse=True)
def few_images_are_enough():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate_module, "MIN_IMAGES", 5)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A config, weights, and annotations in a folder; "crowds.json" has crowds in some images."""
    folder = tmp_path_factory.mktemp("world")
    cfg = limited(lazy_config("found"))
    torch.manual_seed(4)
    model = randomised(instantiate(cfg.model))
    names = ["a", "b", "c"]
    torch.save({"model": model.state_dict(), "class_names": names}, folder / "weights.pth")
    LazyConfig.save(cfg, str(folder / "config.yaml"))
    write_coco_json(folder / "found.json", [[]] * NUM_IMAGES)
    empty = json.loads((folder / "found.json").read_text())
    for name, crowds in (("found", ()), ("crowds", (0, 3))):
        empty["annotations"] = annotations_of(model, folder, crowds)
        (folder / f"{name}.json").write_text(json.dumps(empty))
    empty["annotations"] = [a for a in empty["annotations"] if a["image_id"] < 5]
    empty["images"] = empty["images"][:4]
    (folder / "few.json").write_text(json.dumps(empty))
    return folder


def register(world, name="found"):
    if name not in DatasetCatalog.list():
        register_dataset(name, str(world / f"{name}.json"), str(world))
    return name


def config_in(world, **changes):
    cfg = LazyConfig.load(str(world / "config.yaml"))
    cfg.train.init_checkpoint = str(world / "weights.pth")
    cfg.train.update(changes)
    return cfg


def options_in(world, *datasets):
    options = ["--config-file", world / "config.yaml", "--weights", world / "weights.pth"]
    for name in datasets or ["found"]:
        options += ["--dataset", name, world / f"{name}.json", world]
    return options


@pytest.fixture(scope="module")
def calibrated(world):
    """What the command writes."""
    folder = world / "calibrated"
    assert exit_code("calibrate", *options_in(world), "--output", folder, "--precision", 0.4) == 0
    return folder


@pytest.fixture(scope="module")
def calibration(world):
    """What the function returns for the same input."""
    name = register(world)
    weights = f"train.init_checkpoint={world / 'weights.pth'}"
    cfg = load_config(str(world / "config.yaml"), [weights])
    found = calibrate(cfg, name, progress=False)
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)
    return found


@pytest.fixture
def without_report(monkeypatch):
    """Figures take longer than everything else."""
    for module in ("msrcnn_d2.report", "msrcnn_d2.engine.evaluate"):
        monkeypatch.setattr(f"{module}.write_report", lambda *args: None)


def test_what_is_right_is_what_became_an_object(world):
    collected = collect_detections(config_in(world), register(world, "crowds"))
    objects = json.loads((world / "crowds.json").read_text())["annotations"]
    masks = {(a["image_id"], a["category_id"], a["segmentation"]["counts"]) for a in objects}
    results = collected.ranking.overlaps.results
    samples = collected.samples
    assert len(results) == len(samples) > 50
    for result, right, counted in zip(results, samples.right, samples.counted, strict=True):
        counts = result["segmentation"]["counts"]
        counts = counts if isinstance(counts, str) else counts.decode()
        is_object = (result["image_id"], result["category_id"], counts) in masks
        in_crowd = result["image_id"] in (1, 4)
        assert right.tolist() == [is_object and not in_crowd] * 10
        assert counted or in_crowd
    assert not samples.counted.all()


def test_cues_are_those_of_their_detections(world):
    collected = collect_detections(config_in(world), register(world))
    names = list(CUES)
    scores = [r["score"] for r in collected.ranking.overlaps.results]
    ious = [r["pred_mask_iou"] for r in collected.ranking.overlaps.results]
    cues = collected.samples.cues
    np.testing.assert_allclose(cues[:, names.index("mask_iou")], ious, atol=1e-5)
    log_odds = torch.logit(torch.tensor(scores), eps=1e-6)
    np.testing.assert_allclose(cues[:, names.index("class_log_odds")], log_odds, atol=1e-3)
    mask_log_odds = torch.logit(torch.tensor(scores) * torch.tensor(ious), eps=1e-6)
    np.testing.assert_allclose(collected.samples.score_log_odds, mask_log_odds, atol=1e-3)
    image_ids = [r["image_id"] for r in collected.ranking.overlaps.results]
    pairs = set(zip(image_ids, collected.samples.images.tolist(), strict=True))
    assert len(pairs) == len(set(image_ids)) == NUM_IMAGES


def test_a_random_sample_of_the_images(world):
    cfg = config_in(world)
    first, again, other = (
        collect_detections(cfg, register(world), max_images=6, seed=seed) for seed in (0, 0, 1)
    )
    assert len(set(first.image_ids)) == 6 and first.image_ids == again.image_ids
    assert set(first.image_ids) != set(other.image_ids)
    assert {r["image_id"] for r in first.ranking.overlaps.results} <= set(first.image_ids)
    assert torch.equal(first.samples.cues, again.samples.cues)
    assert first.dataset == "found"


def spoilt(world, folder, of_sample):
    """A dataset of which an image is missing and another has a wrong annotation."""
    dataset = json.loads((world / "found.json").read_text())
    sample = collect_detections(config_in(world), register(world), max_images=6).image_ids
    ids = [x["id"] for x in dataset["images"] if (x["id"] in sample) == of_sample]
    for image in dataset["images"]:
        source = world / image["file_name"]
        if image["id"] != ids[0]:
            (folder / image["file_name"]).write_bytes(source.read_bytes())
    next(a for a in dataset["annotations"] if a["image_id"] == ids[1])["area"] = -1
    (folder / "spoilt.json").write_text(json.dumps(dataset))
    return folder


def test_only_images_that_are_used_are_checked(world, tmp_path):
    cfg = config_in(world)
    known = set(DatasetCatalog.list()), set(MetadataCatalog.list())
    expected = collect_detections(cfg, register(world), max_images=6)
    dataset = register(spoilt(world, tmp_path, of_sample=False), "spoilt")
    found = collect_detections(cfg, dataset, max_images=6)
    assert found.image_ids == expected.image_ids and found.dataset == "spoilt"
    assert torch.equal(found.samples.cues, expected.samples.cues)
    assert torch.equal(found.samples.right, expected.samples.right)
    # What was registered for this is gone
    added = {"found", "spoilt"}
    assert (set(DatasetCatalog.list()), set(MetadataCatalog.list())) == tuple(
        x | added for x in known
    )


def test_an_error_in_an_image_that_is_used_names_the_dataset(world, tmp_path):
    dataset = register(spoilt(world, tmp_path, of_sample=True), "spoilt")
    with pytest.raises(UserError, match="Dataset 'spoilt' has"):
        collect_detections(config_in(world), dataset, max_images=6)


def test_an_error_while_images_are_predicted_leaves_no_dataset(world, monkeypatch):
    register(world)
    known = set(DatasetCatalog.list()), set(MetadataCatalog.list())
    monkeypatch.setattr(CueRecorder, "forward", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        collect_detections(config_in(world), "found", max_images=6)
    assert (set(DatasetCatalog.list()), set(MetadataCatalog.list())) == known


def test_too_little_to_gain_from_leaves_the_ranking_as_it_is(world):
    """The score says something, and the cues say nothing."""
    collected = collect_detections(config_in(world), register(world))
    samples, results = collected.samples, collected.ranking.overlaps.results
    torch.manual_seed(0)
    scores = (2 * samples.right[:, 0] - 1 + torch.randn(len(samples))).sigmoid()
    for result, score in zip(results, scores.tolist(), strict=True):
        result.update(score=score, mask_score=score, pred_mask_iou=1.0)
    samples.cues, samples.score_log_odds = torch.randn(samples.cues.shape), scores.logit()
    calibration = calibrate_on(collected, progress=False)
    assert not calibration.with_network
    calibrator = calibration.model.roi_heads.mask_calibrator
    quality = calibrator.probs(samples.cues, samples.score_log_odds).mean(dim=1)
    assert torch.equal(quality.argsort(), scores.argsort())
    ap = calibration.quality.overall.ap
    assert ap["quality_score"] == ap["mask_score"]


def test_few_images_do_not_decide(world, monkeypatch):
    collected = collect_detections(config_in(world), register(world))
    monkeypatch.setattr(calibrate_module, "MIN_IMAGES", NUM_IMAGES + 1)
    calibration = calibrate_on(collected, progress=False)
    ap = calibration.quality.overall.ap
    assert not calibration.with_network and np.isnan(calibration.ap_of_network)
    assert ap["quality_score"] == ap["mask_score"]


def test_the_dataset_of_the_config_is_the_default(world):
    register(world)
    collected = collect_detections(config_in(world))
    assert collected.dataset == "found" and len(collected.image_ids) == NUM_IMAGES
    assert collected.class_names == ["a", "b", "c"]


def test_a_model_without_a_mask_iou_head(world, tmp_path):
    weights = torch.load(world / "weights.pth")
    weights["model"] = {k: v for k, v in weights["model"].items() if "mask_iou_head" not in k}
    torch.save(weights, tmp_path / "plain.pth")
    cfg = config_in(world)
    cfg.model = tiny_mask_rcnn().model
    cfg = limited(cfg)
    cfg.train.init_checkpoint = str(tmp_path / "plain.pth")
    before = copy.deepcopy(cfg)
    calibration = calibrate(cfg, register(world), progress=False)
    assert cfg == before
    assert {"class_score", "quality_score"} == set(calibration.quality.overall.ap) - {"true_iou"}
    config = calibration.write(tmp_path / "calibrated")
    assert LazyConfig.load(str(config)).model.roi_heads.get("mask_iou_head") is None
    model = calibration.model
    for name, value in weights["model"].items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_yaml_config(world, tmp_path):
    cfg = tiny_yacs_config()
    cfg.TEST.DETECTIONS_PER_IMAGE = 12
    cfg.DATASETS.TRAIN = (register(world),)
    cfg.DATALOADER.NUM_WORKERS = 0
    torch.manual_seed(4)
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    model = randomised(build_model(cfg))
    torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
    folder = tmp_path / "own"
    folder.mkdir()
    dataset = json.loads((world / "found.json").read_text())
    dataset["annotations"] = annotations_of(model, folder)
    (folder / "own.json").write_text(json.dumps(dataset))
    calibration = calibrate(cfg, register(folder, "own"), progress=False)
    config = calibration.write(tmp_path / "calibrated")
    read = load_config(str(config))
    assert read.MODEL.WEIGHTS == str(tmp_path / "calibrated" / "model.pth")
    loaded = build_model(read)
    MaskScoringCheckpointer(loaded).load(read.MODEL.WEIGHTS, strict=True)
    expected = calibration.model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())


# ---- what the command writes


def test_the_same_input_gives_the_same_files(calibrated, calibration, tmp_path):
    """Be it from the command or from Python."""
    again = tmp_path / "again"
    assert calibration.write(again) == again / "config.yaml"
    assert (again / "model.pth").read_bytes() == (calibrated / "model.pth").read_bytes()
    configs = [(x / "config.yaml").read_text().replace(str(x), "") for x in (again, calibrated)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("is_yaml", [False, True])
def test_the_config_is_of_use_in_any_folder(is_yaml, calibration, tmp_path, monkeypatch):
    if is_yaml:
        calibration = dataclasses.replace(calibration, cfg=add_mask_calibrator(tiny_yacs_config()))
        calibration.cfg.freeze()
    before = copy.deepcopy(calibration.cfg)
    monkeypatch.chdir(tmp_path)
    assert calibration.write("own") == Path("own", "config.yaml")
    assert calibration.cfg == before
    cfg = load_config("own/config.yaml")
    paths = (
        (cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR)
        if is_yaml
        else (cfg.train.init_checkpoint, cfg.train.output_dir)
    )
    assert paths == (str(tmp_path / "own" / "model.pth"), str(tmp_path / "own"))


def test_the_weights_of_the_model_stay_as_they_are(world, calibrated):
    before, after = (torch.load(x) for x in (world / "weights.pth", calibrated / "model.pth"))
    assert after["class_names"] == before["class_names"] == ["a", "b", "c"]
    for name, value in before["model"].items():
        assert torch.equal(after["model"][name], value), name
    new = after["model"].keys() - before["model"].keys()
    assert new and all(name.startswith(PREFIX) for name in new)
    assert (after["model"][PREFIX + "slope"] > 0).all()
    assert not torch.equal(after["model"][PREFIX + "slope"], torch.ones(10))
    assert (calibrated / "calibration" / "report.html").is_file()
    thresholds = after["model"][PREFIX + "accept_thresholds"]
    assert (thresholds.diff(dim=1) >= 0).all() and (thresholds[:, 0] < 1).all()


@pytest.mark.usefixtures("without_report")
def test_evaluating_what_was_written(world, calibrated, tmp_path):
    options = [*options_in(world), f"train.output_dir={tmp_path}"]
    options[1], options[3] = calibrated / "config.yaml", calibrated / "model.pth"
    assert exit_code("evaluate", *options) == 0
    results = json.loads((tmp_path / "inference" / "coco_instances_results.json").read_text())
    assert len(results) > 50
    for result in results:
        probs = result["mask_iou_probs"]
        assert len(probs) == 10 and probs == sorted(probs, reverse=True)
        assert result["quality_score"] == pytest.approx(sum(probs) / 10, abs=1e-4)


def test_two_processes_give_the_same(world, calibrated, tmp_path):
    output, log = tmp_path / "two", tmp_path / "log.txt"
    log.touch()
    args = [*options_in(world), "--output", output]
    process = forked.start(forked.as_torchrun, forked.calibrate, *args, log=log)
    process.join(300)
    assert process.exitcode == 0, log.read_text()[-3000:]
    assert (output / "model.pth").read_bytes() == (calibrated / "model.pth").read_bytes()


def model_in(world, with_calibrator):
    cfg = config_in(world)
    return instantiate((add_mask_calibrator(cfg) if with_calibrator else cfg).model)


def test_the_command_that_it_ends_with(world, without_report, tmp_path, capsys):
    assert exit_code("calibrate", *options_in(world), "--output", tmp_path / "o u t") == 0
    (command,) = [x for x in capsys.readouterr().out.splitlines() if "msrcnn-d2 evaluate" in x]
    assert exit_code(*shlex.split(command)[shlex.split(command).index("msrcnn-d2") + 1 :]) == 0


def test_the_command_names_a_test_set_that_is_missing(world, without_report, tmp_path, capsys):
    options = [*options_in(world), "dataloader.test.dataset.names=elsewhere"]
    assert exit_code("calibrate", *options, "--output", tmp_path / "out") == 0
    (command,) = [x for x in capsys.readouterr().out.splitlines() if "msrcnn-d2 evaluate" in x]
    assert "--dataset elsewhere " in command


def test_masks_are_not_pasted():
    class FullSize(DetectionCollector):
        def process(self, inputs, outputs):
            """It may expect masks of the image's size."""

    for kind, expected in ((DetectionCollector, True), (FullSize, False)):
        collector = kind.__new__(kind)  # __init__ needs a dataset
        assert evaluate_module._takes_unpasted_masks(collector) == expected


def test_images_without_annotations(world, tmp_path):
    """Such as COCO's files for its test set, which are refused before the model runs."""
    content = json.loads((world / "found.json").read_text())
    del content["annotations"]
    (tmp_path / "test.json").write_text(json.dumps(content))
    register_dataset("unannotated", str(tmp_path / "test.json"), str(world))
    with pytest.raises(UserError, match="no annotations"):
        calibrate(config_in(world), "unannotated", progress=False)


def test_detectron2_loads_the_file(world, calibrated):
    model = model_in(world, with_calibrator=True)
    DetectionCheckpointer(model).load(str(calibrated / "model.pth"))
    expected = torch.load(calibrated / "model.pth")["model"]
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_convert_keeps_the_calibrator(suffix, half, calibrated, tmp_path):
    """At full precision: thresholds are compared with probabilities that nothing has rounded."""
    target = tmp_path / f"out{suffix}"
    assert exit_code("convert", calibrated / "model.pth", target, *["--half"] * half) == 0
    found = load_file(target) if suffix == ".safetensors" else torch.load(target)["model"]
    expected = torch.load(calibrated / "model.pth")["model"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not name.startswith(PREFIX):
            halved = half and value.is_floating_point()
            assert found[name].dtype == (torch.float16 if halved else value.dtype)
        else:
            assert torch.equal(found[name], value) and found[name].dtype == value.dtype


def test_a_model_without_a_calibrator_ignores_the_one_in_a_file(world, calibrated, caplog):
    model = model_in(world, with_calibrator=False)
    with caplog.at_level(logging.WARNING):
        MaskScoringCheckpointer(model).load(str(calibrated / "model.pth"), strict=True)
    assert PREFIX in caplog.text
    expected = torch.load(world / "weights.pth")["model"]
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("strict", [True, False])
def test_weights_without_the_calibrator_of_the_config_are_refused(world, strict):
    model = model_in(world, with_calibrator=True)
    with pytest.raises(UserError, match="msrcnn-d2 calibrate"):
        MaskScoringCheckpointer(model).load(str(world / "weights.pth"), strict=strict)


def test_a_calibrated_model_is_not_trained(world, calibrated, capsys):
    """Nor does the attempt leave another config in its folder."""
    options = [*options_in(world), "train.max_iter=1"]
    options[1] = calibrated / "config.yaml"
    before = {p: p.read_bytes() for p in calibrated.rglob("*") if p.is_file()}
    assert exit_code("train", *options) == 2
    assert "msrcnn-d2 calibrate" in one_sentence(capsys)
    assert {p: p.read_bytes() for p in calibrated.rglob("*") if p.is_file()} == before


def test_a_calibrated_model_can_be_calibrated_again(world, calibrated):
    cfg = LazyConfig.load(str(calibrated / "config.yaml"))
    calibration = calibrate(cfg, register(world), progress=False)
    expected = torch.load(calibrated / "model.pth")["model"]
    found = calibration.model.state_dict()
    assert all(torch.equal(found[k], v) for k, v in expected.items())


# ---- mistakes of users


def one_sentence(capsys):
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def without_masks(cfg):
    for key in ("mask_in_features", "mask_pooler", "mask_head", "mask_iou_head"):
        del cfg.model.roi_heads[key]
    cfg.model.roi_heads._target_ = "detectron2.modeling.StandardROIHeads"


def finds_nothing(cfg):
    cfg.model.roi_heads.box_predictor.test_score_thresh = 1.1


def other_classes(cfg):
    cfg.model.roi_heads.num_classes = 4


def no_dataset(cfg):
    cfg.dataloader.train.dataset.names = []


@pytest.mark.parametrize(
    "change, dataset, message",
    [
        (None, "nosuch", "nosuch"),
        (None, "few", "4 images"),
        (lambda cfg: cfg.train.update(init_checkpoint=""), "found", "init_checkpoint"),
        (lambda cfg: cfg.train.update(init_checkpoint="gone.pth"), "found", "gone.pth"),
        (without_masks, "found", "mask branch"),
        (finds_nothing, "found", "finds nothing"),
        (other_classes, "found", "classes"),
        (no_dataset, None, "dataset"),
    ],
)
def test_what_cannot_be_calibrated(world, change, dataset, message):
    for name in ("found", "few"):
        register(world, name)
    cfg = config_in(world)
    if change is not None:
        change(cfg)
    with pytest.raises(UserError, match=message) as error:
        calibrate(cfg, dataset, progress=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["model.pth", "config.yaml"])
def test_nothing_is_overwritten(file, world, tmp_path, capsys):
    """A training, too, has written a config.yaml."""
    (tmp_path / file).write_text("precious")
    assert exit_code("calibrate", *options_in(world), "--output", tmp_path) == 2
    assert str(tmp_path) in one_sentence(capsys)
    assert (tmp_path / file).read_text() == "precious"


def test_a_folder_that_cannot_be_made(world, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert exit_code("calibrate", *options_in(world), "--output", tmp_path / "file" / "x") == 2
    assert "--output" in one_sentence(capsys)


@pytest.mark.usefixtures("without_report")
def test_one_of_several_datasets_is_named(world, calibrated, tmp_path, capsys):
    options = [*options_in(world, "crowds", "found"), "--output", tmp_path / "out"]
    assert exit_code("calibrate", *options) == 2
    assert "crowds, found" in one_sentence(capsys)
    assert exit_code("calibrate", *options, "--on", "found") == 0
    written = tmp_path / "out" / "model.pth"
    assert written.read_bytes() == (calibrated / "model.pth").read_bytes()


@pytest.mark.parametrize(
    "option",
    [("--precision", "95"), ("--precision", "1"), ("--iou", "0.52"), ("--max-images", "0")],
)
def test_options_out_of_range(option, world, capsys):
    assert exit_code("calibrate", *options_in(world), *option) == 2
    assert option[0] in one_sentence(capsys)


@pytest.mark.parametrize("precision", [0.4, 0.07, 0.455])
def test_the_operating_point_that_is_shown_is_that_of_the_predictor(precision, calibration):
    """The model knows precisions of whole percents only."""
    text = answer(calibration, SimpleNamespace(precision=precision, iou=0.6))
    assert "P(IoU >= 0.60)" in text
    points = [x for x in text.split('"') if x.startswith("p") and "@" in x]
    expected = [] if precision == 0.455 else [(precision, 0.6)]
    assert [parse_operating_point(x) for x in points] == expected


def test_too_few_detections_for_a_precision(calibration):
    text = answer(calibration, SimpleNamespace(precision=0.9999, iou=0.6))
    assert "too few" in text and "nan" not in text


def test_images_of_the_training_promise_too_much(calibration):
    """The config of the world trains on the images that it was calibrated on."""
    held_out = copy.copy(calibration)
    held_out.cfg = copy.deepcopy(calibration.cfg)
    held_out.cfg.dataloader.train.dataset.names = "others"
    options = SimpleNamespace(precision=0.4, iou=0.6)
    trained_on, held_out = (answer(x, options).splitlines() for x in (calibration, held_out))
    assert trained_on[:-1] == held_out


@pytest.mark.parametrize("percent, iou", [(40, 0.5), (35, 0.75), (30, 0.95)])
def test_accepted_masks_have_the_precision(percent, iou, calibration):
    """On the images of the fit, counted one by one: masks that became objects are right."""
    column = iou_index(iou)
    thresholds = calibration.model.roi_heads.mask_calibrator.accept_thresholds[column]
    accepted = [
        r["mask_iou_probs"][column] >= thresholds[percent - 1].item()
        for r in calibration.quality.results
    ]
    is_right = [x == 1 for x in calibration.quality.true_ious]
    count = sum(accepted)
    assert count >= 20
    assert sum(a and r for a, r in zip(accepted, is_right, strict=True)) >= percent / 100 * count
    # The next precision needs a threshold that is as high, or higher
    assert (thresholds.diff() >= 0).all()
