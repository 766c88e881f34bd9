"""train_net.py as users run it: both kinds of config, resuming, many processes, real images."""

import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detectron2.engine import SimpleTrainer

from msrcnn_d2 import engine
from msrcnn_d2.engine import hooks
from tests.helpers import forked, many_processes
from tests.helpers.command import exit_code
from tests.helpers.toy import NUM_CLASSES, real_datasets, tiny_yacs_config
from tests.helpers.toy_training import run, with_python_path, write_dataset, write_lazy_config

ROOT = Path(__file__).parents[1]
COCO_CONFIG = "configs/COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x"


pytestmark = pytest.mark.usefixtures("leave_no_traces")


@pytest.fixture(scope="module")
def toy_dataset(tmp_path_factory):
    """Options that register 9 images as "toy"."""
    return write_dataset(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def lazy_config(tmp_path_factory):
    """A file with a LazyConfig that trains a tiny model on the toy images."""
    return write_lazy_config(tmp_path_factory.mktemp("config") / "lazy.yaml")


@pytest.fixture(scope="module")
def yacs_config(tmp_path_factory):
    cfg = tiny_yacs_config()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("toy",)
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SOLVER.MAX_ITER = 6
    cfg.SOLVER.BASE_LR = 1e-3
    cfg.SOLVER.CHECKPOINT_PERIOD = 3
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SEED = 1
    path = tmp_path_factory.mktemp("config") / "yacs.yaml"
    path.write_text(cfg.dump())
    return str(path)


def run_forked(function, *args):
    """The exit code of a function in a process of its own, and what it prints."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = forked.start(function, *args, log=log)
        process.join(300)
        return process.exitcode, log.read_text()


TRAIN_NET = (ROOT / "train_net.py",)
COMMAND = ("-m", "msrcnn_d2_cli", "train")


def run_alone(*args, launcher=(), program=TRAIN_NET, env=None):
    """Run train_net.py, or the command, in processes of its own."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, *program, *map(str, args)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": with_python_path(ROOT),
            "OMP_NUM_THREADS": "1",
            **(env or {}),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


def last_metrics(output_dir):
    """The last line that has results of an evaluation."""
    lines = (Path(output_dir) / "metrics.json").read_text().splitlines()
    return [m for m in map(json.loads, lines) if "segm/AP" in m][-1]


class Interrupted(Exception):
    pass


@pytest.fixture
def losses_of(monkeypatch):
    """Runs train_net.py; returns the losses of each iteration, until one where it is stopped."""

    def run_and_record(*args, stop_at=None):
        losses = []
        write_metrics = SimpleTrainer._write_metrics

        def record(self, loss_dict, *rest):
            if self.iter == stop_at:
                raise Interrupted
            losses.append((self.iter, {k: v.item() for k, v in loss_dict.items()}))
            write_metrics(self, loss_dict, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(SimpleTrainer, "_write_metrics", record)
            try:
                run(*args)
            except Interrupted:
                pass
        return dict(losses)

    return run_and_record


@pytest.mark.parametrize(
    "kind, options",
    [
        ("lazy", []),
        ("lazy", ["dataloader.train.aspect_ratio_grouping=False"]),
        ("lazy", ["dataloader.train.num_workers=2"]),
        (
            "lazy",
            [
                "dataloader.train.num_workers=1",
                "dataloader.train.persistent_workers=True",
                "dataloader.train.prefetch_factor=3",
                "dataloader.train.seed=5",
            ],
        ),
        ("lazy", ["train.seed=-1"]),
        ("lazy", ["train.amp.enabled=True"]),
        (
            "lazy",
            [
                "train.model_ema.enabled=True",
                "train.accumulation_steps=2",
                "train.freeze=['backbone.bottom_up','.*deconv']",
            ],
        ),
        ("yacs", []),
        (
            "yacs",
            [
                "MODEL_EMA.ENABLED=True",
                "SOLVER.ACCUMULATION_STEPS=2",
                "SOLVER.FREEZE=('backbone.bottom_up','.*deconv')",
            ],
        ),
    ],
)
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(
    kind, options, toy_dataset, request, losses_of, tmp_path
):
    output = {"lazy": "train.output_dir", "yacs": "OUTPUT_DIR"}[kind]
    base = ["--config-file", request.getfixturevalue(f"{kind}_config"), *toy_dataset]
    if options == ["train.seed=-1"]:  # a random seed: the two runs have to start as one
        whole = losses_of(*base, *options, f"{output}={tmp_path}")
        (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    else:
        whole = losses_of(*base, *options, f"{output}={tmp_path / 'whole'}")
        started = losses_of(*base, *options, f"{output}={tmp_path}", stop_at=4)
        assert started == {k: whole[k] for k in range(4)}
    resumed = losses_of("--resume", *base, *options, f"{output}={tmp_path}")
    assert set(whole) == set(range(6)) and "loss_mask_iou" in whole[0]
    assert resumed == {k: whole[k] for k in (3, 4, 5)}
    if len(options) == 3:
        files = [torch.load(x / "model_final.pth") for x in (tmp_path, tmp_path / "whole")]
        for key in ("model", "ema_state"):
            assert all(torch.equal(v, files[1][key][k]) for k, v in files[0][key].items())
        differ = {k for k, v in files[0]["model"].items() if (v != files[0]["ema_state"][k]).any()}
        assert any("mask_iou_head" in k for k in differ)
        assert not any("bottom_up" in k or "deconv" in k for k in differ)


@pytest.mark.parametrize("kind", ["lazy", "yacs"])
def test_training_evaluates_and_leaves_what_users_expect(kind, toy_dataset, request, tmp_path):
    output = {"lazy": "train.output_dir", "yacs": "OUTPUT_DIR"}[kind]
    run(
        "--config-file",
        request.getfixturevalue(f"{kind}_config"),
        *toy_dataset,
        f"{output}={tmp_path}",
    )
    metrics = last_metrics(tmp_path)
    assert {"bbox/AP", "segm/AP", "segm_by_class_score/AP", "mask_quality/mae"} <= set(metrics)
    assert "mask_quality/LaECE_mask_score" in metrics
    left = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert {"config.yaml", "log.txt", "metrics.json", "model_final.pth"} <= left
    assert {"coco_bbox_results.json", "coco_segm_results.json"} <= left
    logged = [json.loads(x) for x in (tmp_path / "metrics.json").read_text().splitlines()]
    assert any("mask_iou/mean_target" in x and "loss_mask_iou" in x for x in logged)
    assert "report.html" not in left  # a report for each evaluation in training would be many
    board = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    images = [f"mask_quality/{name}" for name in ("reliability", "reliability_of_scores")]
    assert board.Tags()["images"] == images
    logged_mae, expected = board.Scalars("mask_quality/mae")[-1].value, metrics["mask_quality/mae"]
    assert logged_mae == pytest.approx(expected, nan_ok=True)  # a model that knows nothing


def test_eval_only_repeats_the_results(lazy_config, toy_dataset, tmp_path, capsys):
    trained, again = tmp_path / "trained", tmp_path / "again"
    run("--config-file", lazy_config, *toy_dataset, f"train.output_dir={trained}")
    results = trained / "inference" / "coco_segm_results.json"
    expected = results.read_text()
    capsys.readouterr()

    # With the config that the run has left, into another folder
    command = ["--config-file", trained / "config.yaml", *toy_dataset]
    results.unlink()
    weights = ["--weights", trained / "model_final.pth"]
    assert exit_code("evaluate", *command, *weights, f"train.output_dir={again}") == 0
    assert "masks by class score" in capsys.readouterr().out
    assert (again / "inference" / "coco_segm_results.json").read_text() == expected
    assert not results.exists()
    report = json.loads((again / "report" / "report.json").read_text())
    assert report["overall"]["ap"]["mask_score"] == last_metrics(trained)["segm/AP"]
    page = (again / "report" / "report.html").read_text()
    assert "Masks on toy" in page and "The images were not given" not in page

    # What --resume finds in the output folder
    run("--eval-only", *command, "--resume", f"train.output_dir={trained}")
    assert results.read_text() == expected


def predictions_of(output_dir):
    return json.loads((output_dir / "inference" / "coco_instances_results.json").read_text())


def test_the_names_of_a_run_go_with_its_weights(lazy_config, toy_dataset, tmp_path, capsys):
    """A run that is evaluated on a set with two of the classes, and one that it does not know."""
    whole, part, again = (tmp_path / name for name in ("whole", "part", "again"))
    _, _, annotations, images = toy_dataset
    content = json.loads(Path(annotations).read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    ids = {"a": 9, "c": 4, "unknown": 5}  # so that c comes first
    content["categories"] = [{"id": k, "name": name} for name, k in ids.items()]
    objects = [x for x in content["annotations"] if names[x["category_id"]] in ids]
    content["annotations"] = [{**x, "category_id": ids[names[x["category_id"]]]} for x in objects]
    (tmp_path / "part.json").write_text(json.dumps(content))
    other = ["--dataset", "toy_part", tmp_path / "part.json", images]
    tested = ["dataloader.test.dataset.names=toy_part"]
    tested += ["dataloader.evaluator.dataset_name=toy_part"]

    command = ["--config-file", lazy_config, *toy_dataset]
    run(*command, *other, *tested, f"train.output_dir={part}", "train.max_iter=2")
    weights = f"train.init_checkpoint={part}/model_final.pth"
    assert torch.load(part / "model_final.pth")["class_names"] == ["a", "b", "c"]
    run(*command, "--eval-only", weights, f"train.output_dir={whole}")
    run(*command, *other, "--eval-only", weights, *tested, f"train.output_dir={again}")

    expected = [{**x, "category_id": names[x["category_id"]]} for x in predictions_of(whole)]
    expected = [
        {**x, "category_id": ids[x["category_id"]]} for x in expected if x["category_id"] in ids
    ]
    assert expected and predictions_of(part) == predictions_of(again) == expected
    assert "count as missed: unknown." in (again / "log.txt").read_text()
    report = json.loads((again / "report" / "report.json").read_text())
    assert "unknown" in json.dumps(report) and '"b"' not in json.dumps(report)

    # Weights of a run do not go on with other names
    for category in content["categories"]:
        category["name"] = {"a": "c", "c": "b", "unknown": "a"}[category["name"]]  # b, a, c
    (tmp_path / "bac.json").write_text(json.dumps(content))
    other = ["--dataset", "toy_bac", tmp_path / "bac.json", images]
    tested = ["dataloader.test.dataset.names=toy_bac", "dataloader.evaluator.dataset_name=toy_bac"]
    trained = ["dataloader.train.dataset.names=toy_bac", f"train.output_dir={part}"]
    capsys.readouterr()
    for options in (
        ["--eval-only", weights, f"train.output_dir={again}"],
        [weights, f"train.output_dir={tmp_path}/new", *trained[:1]],
        ["--resume", *trained],
    ):
        with pytest.raises(SystemExit):
            run(*command, *other, *options, *tested)
        assert "(a, b, c)" in capsys.readouterr().err


def test_evaluation_in_batches_and_without_pasting_masks(
    lazy_config, toy_dataset, tmp_path, monkeypatch
):
    def paste(*args, **kwargs):
        raise AssertionError("a mask of the size of the image is made")

    monkeypatch.setattr("detectron2.layers.paste_masks_in_image", paste)
    one, batched = tmp_path / "one", tmp_path / "batched"
    run("--config-file", lazy_config, *toy_dataset, f"train.output_dir={one}")
    weights = f"train.init_checkpoint={one}/model_final.pth"
    command = ["--config-file", lazy_config, *toy_dataset, "--eval-only", weights]
    options = ["dataloader.test.batch_size=4", "train.amp.test=True"]
    run(*command, f"train.output_dir={batched}", *options)

    log = (batched / "log.txt").read_text()
    assert "Start inference on 3 batches" in log  # of 9 images
    assert "Evaluation is at full precision" in log  # on a CPU
    expected = best_score_of_each_image(one)
    assert len(expected) == 9
    # Up to rounding; AP of a model that knows nothing says little
    assert best_score_of_each_image(batched) == pytest.approx(expected, abs=1e-4)


def best_score_of_each_image(output_dir):
    results = json.loads((output_dir / "inference" / "coco_segm_results.json").read_text())
    scores = {}
    for result in results:
        scores[result["image_id"]] = max(result["score"], scores.get(result["image_id"], 0))
    return scores


def test_a_disk_that_is_full_of_metrics_ends_the_run_in_one_sentence(
    lazy_config, toy_dataset, tmp_path, monkeypatch, capsys
):
    def full(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hooks.MetricsWriter, "after_step", full)
    output = f"train.output_dir={tmp_path / 'output'}"
    assert exit_code("train", "--config-file", lazy_config, *toy_dataset, output) == 2
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == 1 and str(tmp_path / "output") in captured.err
    assert "Traceback" not in captured.err + captured.out


def test_eval_only_wants_a_checkpoint(lazy_config, toy_dataset, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        run(
            *["--config-file", lazy_config, *toy_dataset, "--eval-only", "--resume"],
            f"train.output_dir={tmp_path}",
        )
    assert left.value.code == 2
    assert "no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_no_gpu_is_one_process(num_gpus, lazy_config, toy_dataset, tmp_path):
    options = ["train.max_iter=1", f"train.output_dir={tmp_path}"]
    run("--config-file", lazy_config, *toy_dataset, "--num-gpus", num_gpus, *options)
    assert (tmp_path / "model_final.pth").exists()


def test_precise_batch_norm_from_yaml(yacs_config, toy_dataset, tmp_path):
    precise = ["TEST.PRECISE_BN.ENABLED=True", "TEST.PRECISE_BN.NUM_ITER=2"]
    options = ["MODEL.RESNETS.NORM=BN", "MODEL.BACKBONE.FREEZE_AT=0", "SOLVER.MAX_ITER=2"]
    eval_period = "TEST.EVAL_PERIOD=2"
    run(
        *["--config-file", yacs_config, *toy_dataset, *precise, *options, eval_period],
        *["MODEL_EMA.ENABLED=True", "MODEL_EMA.DECAY=1.0", f"OUTPUT_DIR={tmp_path}"],
    )
    assert "precise-BN" in (tmp_path / "log.txt").read_text()
    averages = torch.load(tmp_path / "model_final.pth")["ema_state"]
    means = [value for name, value in averages.items() if name.endswith("running_mean")]
    assert means and all(value.any() for value in means)  # not those at the start, which are 0


def test_expected_results_from_yaml_are_verified(yacs_config, toy_dataset, tmp_path):
    expected = ["TEST.EXPECTED_RESULTS", "[['bbox','AP',99.0,0.1]]", "SOLVER.MAX_ITER", "1"]
    with pytest.raises(SystemExit) as left:
        run("--config-file", yacs_config, *toy_dataset, *expected, f"OUTPUT_DIR={tmp_path}")
    assert left.value.code == 1


def test_test_time_augmentation_from_yaml(yacs_config, toy_dataset, tmp_path):
    aug = ["TEST.AUG.ENABLED=True", "TEST.AUG.MIN_SIZES=(48,64)", "SOLVER.MAX_ITER=1"]
    run("--config-file", yacs_config, *toy_dataset, *aug, f"OUTPUT_DIR={tmp_path}")
    results = json.loads((tmp_path / "inference" / "coco_instances_results.json").read_text())
    assert results and all("mask_score" in r for r in results)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--config-file", "nosuch.py"], "'nosuch.py' does not exist"),
        (["--config-file", f"{COCO_CONFIG}.py", "train.max_itr=1"], "did you mean max_iter?"),
    ],
)
def test_a_mistake_is_one_sentence_and_an_exit_code(args, message, capsys):
    with pytest.raises(SystemExit) as left:
        run(*args)
    captured = capsys.readouterr()
    assert left.value.code == 2
    assert message in captured.err and "Traceback" not in captured.err + captured.out


# Detectron2 reads the variable when it is imported
@pytest.mark.parametrize("suffix", ["py", "yaml"])
def test_a_folder_without_datasets_is_one_sentence_and_an_exit_code(suffix, tmp_path):
    ran = run_alone(
        *["--config-file", f"{COCO_CONFIG}.{suffix}"],
        env={"DETECTRON2_DATASETS": str(tmp_path / "nosuch")},
    )
    assert ran.returncode == 2
    assert "DETECTRON2_DATASETS" in ran.stderr and "Traceback" not in ran.stderr + ran.stdout


def test_an_unreadable_checkpoint_is_one_sentence_and_an_exit_code(
    lazy_config, toy_dataset, tmp_path, capsys
):
    (tmp_path / "bad.pth").write_text("not a checkpoint")
    for action in (["--eval-only"], []):
        with pytest.raises(SystemExit) as left:
            run(
                "--config-file",
                lazy_config,
                *toy_dataset,
                *action,
                f"train.init_checkpoint={tmp_path}/bad.pth",
                f"train.output_dir={tmp_path}/output",
            )
        captured = capsys.readouterr()
        assert left.value.code == 2
        assert "bad.pth'" in captured.err and captured.err.count("error: ") == 1
        assert "Traceback" not in captured.err + captured.out


@pytest.mark.parametrize("action", [[], ["--eval-only"]])
@pytest.mark.parametrize(
    "kind, mistake, told",
    [
        ("lazy", "dataloader.evaluator.max_dets_per_image=[1,10,100]", "max_dets_per_image"),
        ("lazy", "+dataloader.test.prefetch_factor=2", "dataloader.test"),
        ("yacs", "TEST.KEYPOINT_OKS_SIGMAS=['a']", "kpt_oks_sigmas"),
    ],
)
def test_a_mistake_in_the_evaluation_is_met_before_a_model_is_built(
    kind, mistake, told, action, toy_dataset, request, tmp_path, capsys, monkeypatch
):
    for name in ("train", "evaluate_checkpoint"):
        monkeypatch.setattr(engine, name, lambda *args, **kwargs: pytest.fail("it started"))
    config = request.getfixturevalue(f"{kind}_config")
    output = f"{'train.output_dir' if kind == 'lazy' else 'OUTPUT_DIR'}={tmp_path}"
    with pytest.raises(SystemExit) as left:
        run("--config-file", config, *toy_dataset, *action, mistake, output)
    captured = capsys.readouterr()
    assert left.value.code == 2
    assert "dataloader." in captured.err and told in captured.err
    assert "Traceback" not in captured.err + captured.out


def test_categories_that_do_not_match_stop_a_run(lazy_config, toy_dataset, tmp_path, capsys):
    options = ["model.roi_heads.num_classes=7", f"train.output_dir={tmp_path}"]
    with pytest.raises(SystemExit):
        run("--config-file", lazy_config, *toy_dataset, *options)
    assert f"num_classes={NUM_CLASSES}" in capsys.readouterr().err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as left:
        run("--help")
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert "--resume" in printed and "--dataset" in printed and "torchrun" in printed


@pytest.mark.parametrize("launcher", ["spawn", "torchrun"])
def test_two_processes_without_a_gpu(launcher, lazy_config, toy_dataset, tmp_path):
    command = ["--config-file", lazy_config, *toy_dataset]
    options = ["train.max_iter=2", f"train.output_dir={tmp_path}"]
    if launcher == "spawn":
        spawn = ["--num-gpus", 2, "--dist-url", "auto"]
        ran = run_alone(*command, *spawn, *options, program=COMMAND)
    else:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        ran = run_alone(*command, *options, launcher=torchrun)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    assert "World size: 2" in (tmp_path / "log.txt").read_text()
    assert (tmp_path / "model_final.pth").exists()
    assert "segm_by_class_score/AP" in last_metrics(tmp_path)


def test_a_mistake_in_two_processes_is_told_once(lazy_config, toy_dataset, tmp_path):
    (tmp_path / "bad.pth").write_text("not a checkpoint")
    code, printed = run_forked(
        *[forked.train, "--config-file", lazy_config, *toy_dataset],
        *["--num-gpus", 2, "--dist-url", "auto"],
        *[f"train.init_checkpoint={tmp_path}/bad.pth", f"train.output_dir={tmp_path}/output"],
    )
    assert code == 2
    assert printed.count("error: ") == 1 and "bad.pth" in printed and "Traceback" not in printed


@pytest.mark.parametrize("failing", [[0], [1], [0, 1]])
def test_a_mistake_on_any_process_ends_all_and_is_told_once(failing):
    code, printed = run_forked(many_processes.fail, failing)
    assert code == 2
    assert printed.count("error: ") == 1
    assert f"error: the disk of {failing[0]} is gone" in printed


def test_a_half_set_launcher_environment_is_refused(lazy_config, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        run("--config-file", lazy_config)
    error = capsys.readouterr().err
    assert "LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT" in error


@pytest.mark.skipif(
    real_datasets() is None, reason="no COCO: set DETECTRON2_DATASETS to the folder of coco/"
)
def test_the_coco_config_trains_on_real_images(tmp_path):
    """The command of README.md, on images of a tenth of the size."""
    ran = run_alone(
        *["--config-file", f"{COCO_CONFIG}.py", "train.device=cpu", "train.max_iter=2"],
        *["train.init_checkpoint=", "dataloader.train.total_batch_size=2"],
        *["dataloader.train.num_workers=0", "dataloader.test.num_workers=0"],
        "dataloader.train.mapper.augmentations.0.short_edge_length=[64,80]",
        "dataloader.test.mapper.augmentations.0.short_edge_length=80",
        f"train.output_dir={tmp_path}",
        env={"DETECTRON2_DATASETS": str(real_datasets())},
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    logged = [json.loads(x) for x in (tmp_path / "metrics.json").read_text().splitlines()]
    assert any("loss_mask_iou" in m for m in logged)
    assert "bbox/AP" in logged[-1]  # NaN if the untrained model detected nothing
    assert (tmp_path / "inference" / "coco_instances_results.json").is_file()
