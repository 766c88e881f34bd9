"""Checks before a run, overrides, and the order of the data."""

import inspect
import json
import logging
import os
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from detectron2.config import LazyCall, LazyConfig
from detectron2.data import DatasetCatalog, DatasetFromList, MapDataset, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.solver.build import get_default_optimizer_params

from msrcnn_d2 import model_zoo
from msrcnn_d2.engine import (
    build_recipe,
    check_data,
    check_recipe,
    find_config_file,
    load_config,
)
from msrcnn_d2.engine import configs as configs_module
from msrcnn_d2.engine import evaluate as evaluate_module
from msrcnn_d2.engine import loaders as loaders_module
from msrcnn_d2.engine import recipe as recipe_module
from msrcnn_d2.engine.configs import register_dataset
from msrcnn_d2.engine.evaluate import evaluators_in, summary_table
from msrcnn_d2.engine.loaders import (
    ResumableBatches,
    StepSeeds,
    build_resumable_loader,
    build_test_loader,
)
from msrcnn_d2.engine.preflight import check_registered
from msrcnn_d2.engine.recipe import EVALUATORS_OF, TestSet
from msrcnn_d2.evaluation import MaskScoringCOCOEvaluator
from msrcnn_d2.published_models import Published
from msrcnn_d2.utils.errors import UserError
from msrcnn_d2_runtime.image_reading import ImageSettings
from tests.helpers.toy_training import lazy_config as toy_config

TestSet.__test__ = False  # not a test

LAZY = model_zoo.get_config_file("COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x.py")
YACS = LAZY.replace(".py", ".yaml")


# Reading configs


def test_overrides_of_a_lazy_config():
    overrides = ["train.max_iter=7", "model.roi_heads.mask_iou_head.loss_weight=2", "train.seed=3"]
    cfg = load_config(LAZY, overrides + ["dataloader.train.aspect_ratio_grouping=False"])
    assert (cfg.train.max_iter, cfg.train.seed) == (7, 3)
    assert cfg.model.roi_heads.mask_iou_head.loss_weight == 2
    assert cfg.dataloader.train.aspect_ratio_grouping is False


@pytest.mark.parametrize(
    "overrides", [["SOLVER.MAX_ITER", "7"], ["SOLVER.MAX_ITER=7"], ["SEED=1", "SOLVER.MAX_ITER", 7]]
)
def test_overrides_of_a_yacs_config(overrides):
    assert load_config(YACS, overrides).SOLVER.MAX_ITER == 7


@pytest.mark.parametrize(
    "path, override, message",
    [
        (LAZY, "trian.max_iter=1", "did you mean train?"),
        (LAZY, "train.max_itr=1", "did you mean max_iter?"),
        (LAZY, "model.roi_heads.mask_iou_head.loss_wieght=1", "did you mean loss_weight?"),
        (LAZY, "model.roi_heads.batch_size_per_imag=1", "did you mean batch_size_per_image?"),
        (LAZY, "train.max_iter", "not of the form key=value"),
        (LAZY, "--resume", "'--resume' is not of the form key=value"),
        (YACS, "--resume", "--resume"),
        (LAZY, "model.pixel_mean=[1,2", "Cannot override"),
        (YACS, "SOLVER.MAX_ITR=1", "SOLVER.MAX_ITR"),
        (YACS, "SOLVER.MAX_ITER", "odd length"),
        (YACS, "SOLVER.FREEZE=backbone", "a list of regular expressions"),
    ],
)
def test_a_wrong_override_is_refused(path, override, message):
    with pytest.raises(UserError) as error:
        load_config(path, [override])
    assert message in str(error.value)


def test_a_value_of_another_type_in_a_yaml_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"_BASE_: {YACS}\nSOLVER: {{FREEZE: backbone}}\n")
    with pytest.raises(UserError, match="SOLVER.FREEZE takes a list of regular expressions"):
        load_config(str(path))


def test_the_test_loader_has_a_batch_size_with_any_detectron2():
    cfg = load_config(LAZY, ["dataloader.test.batch_size=4"])
    (test_set,) = build_recipe(cfg).test_sets
    assert test_set.batch_size == 4
    with pytest.raises(UserError, match="did you mean batch_size?"):
        load_config(LAZY, ["dataloader.test.batch_sise=4"])
    cfg = load_config(YACS, ["DATALOADER.TEST_BATCH_SIZE", "4"])
    assert build_recipe(cfg).test_sets[0].batch_size == 4


@pytest.mark.parametrize(
    "path, override",
    [(LAZY, "dataloader.evaluator.engine=matlab"), (YACS, "TEST.COCO_ENGINE=matlab")],
)
def test_an_unknown_engine_is_refused_before_training(path, override):
    with pytest.raises(UserError, match="no engine 'matlab'.*TEST.COCO_ENGINE"):
        build_recipe(load_config(path, [override]))


@pytest.mark.parametrize(
    "path, overrides",
    [
        (LAZY, ["train.compile=True", "train.amp.test=True"]),
        (YACS, ["SOLVER.COMPILE=True", "TEST.AMP.ENABLED=True"]),
    ],
)
def test_faster_ways_are_chosen_in_the_config(path, overrides):
    recipe = build_recipe(load_config(path))
    assert (recipe.compile, recipe.test_amp, recipe.amp) == (False, False, False)
    recipe = build_recipe(load_config(path, overrides))
    assert (recipe.compile, recipe.test_amp, recipe.amp) == (True, True, False)


def test_a_key_can_be_added_on_purpose():
    assert load_config(LAZY, ["+train.mine=1"]).train.mine == 1


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.py", "model = (", "cannot be read"),
        ("config.py", "import a_module_that_is_not_there", "a_module_that_is_not_there"),
        ("config.py", "model = dict(a=1)", "no `train`"),
        ("config.yaml", "MODEL: [", "cannot be read"),
        ("config.yaml", "MODLE: {}", "MODLE"),
    ],
)
def test_a_broken_config_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        load_config(str(tmp_path / name))
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["", "nosuch.py", "COCO-InstanceSegmentation/nosuch.yaml"])
def test_a_missing_config_file_is_refused(name):
    with pytest.raises(UserError, match="ms_rcnn_R_50_FPN_1x|does not exist"):
        find_config_file(name)


def test_a_config_is_found_by_its_name_in_the_zoo():
    assert find_config_file("COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x.py") == LAZY


def test_the_config_that_a_run_saves_can_be_loaded(tmp_path):
    path = str(tmp_path / "config.yaml")
    LazyConfig.save(load_config(LAZY, ["train.max_iter=7"]), path)
    assert load_config(path).train.max_iter == 7


def test_a_saved_config_with_functions_refers_to_the_one_that_has_them(tmp_path):
    """As those of LVIS in projects/ViTDet, and most of projects/MViTv2."""
    cfg = load_config(LAZY)
    cfg.model.roi_heads.mask_head.conv_norm = lambda channels: nn.BatchNorm2d(channels)
    path = str(tmp_path / "config.yaml")
    LazyConfig.save(cfg, path)
    with pytest.raises(UserError, match="the .py file.*--config-file"):
        load_config(path)


def test_a_model_that_needs_what_is_not_installed():
    def build():
        raise ModuleNotFoundError("No module named 'timm'")

    with pytest.raises(UserError, match="No module named 'timm'"):
        evaluate_module.build_model(SimpleNamespace(build_model=build, device="cpu"))


def test_without_a_gpu_configs_run_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_config(LAZY).train.device == "cpu"
    assert load_config(YACS).MODEL.DEVICE == "cpu"


def test_with_a_gpu_configs_run_on_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load_config(LAZY).train.device == "cuda"
    assert load_config(LAZY, ["train.device=cpu"]).train.device == "cpu"
    assert load_config(YACS).MODEL.DEVICE == "cuda"


# Checks before a run


@pytest.fixture
def dataset(tmp_path):
    """Registers small datasets under new names; forgets them afterwards."""
    names = []

    def register(name, num_categories=3, with_images=True):
        images = tmp_path / f"{name}_images"
        images.mkdir()
        if with_images:
            (images / "1.png").touch()
        annotations = tmp_path / f"{name}.json"
        categories = [{"id": k, "name": f"class {k}"} for k in range(1, num_categories + 1)]
        annotations.write_text(
            json.dumps({"images": [], "annotations": [], "categories": categories})
        )
        register_dataset(name, str(annotations), str(images))
        names.append(name)
        return annotations

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def recipe_on(tmp_path, name, **attributes):
    defaults = dict(
        output_dir=str(tmp_path / "output"),
        train_names=(name,),
        test_sets=[SimpleNamespace(names=(name,), batch_size=None)],
        num_classes=3,
        num_stuff_classes=None,
        total_batch_size=16,
        compile=False,
        has_calibrator=False,
        predicts_keypoints=False,
        hooks=(),
        writers=(),
        accumulation_steps=1,
        val_metric="",
        patience=0,
        validation_set=None,
    )
    return SimpleNamespace(**{**defaults, **attributes})


def refusal(recipe, num_processes=1, training=True):
    with pytest.raises(UserError) as error:
        check_recipe(recipe, num_processes, training)
    return str(error.value)


def test_a_sound_recipe_passes_and_leaves_nothing_behind(tmp_path, dataset):
    dataset("check_ok")
    check_recipe(recipe_on(tmp_path, "check_ok"), num_processes=8, training=True)
    assert os.listdir(tmp_path / "output") == []


def test_unknown_dataset(tmp_path):
    assert "coco_2017_train" in refusal(recipe_on(tmp_path, "coco_2017_tran"))


def test_missing_annotations(tmp_path, dataset, monkeypatch):
    dataset("check_no_json").unlink()
    message = refusal(recipe_on(tmp_path, "check_no_json"))
    assert "check_no_json.json" in message and "--dataset" in message
    assert "DETECTRON2_DATASETS" not in message  # which has nothing to do with this path
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    # Nor has it where the path is below it: this path was given, not derived from it
    assert "DETECTRON2_DATASETS" not in refusal(recipe_on(tmp_path, "check_no_json"))


@pytest.mark.parametrize("name", ["lvis_v1_val", "cityscapes_fine_instance_seg_val"])
def test_where_data_of_detectron2s_names_are_looked_for(name, monkeypatch):
    metadata, missing = MetadataCatalog.get(name), "missing/datasets"
    for key in {"json_file", "gt_dir"} & set(vars(metadata)):
        folder = name.split("_")[0]
        monkeypatch.setitem(vars(metadata), key, f"{missing}/{folder}/file_or_folder")
        monkeypatch.setenv("DETECTRON2_DATASETS", missing)
        with pytest.raises(UserError, match=f"{name}.*file_or_folder.*contains {folder}/"):
            check_registered(name)


@pytest.mark.parametrize("content", ["", '{"images": [', "[]", "{}", '{"categories": 3}'])
def test_annotations_that_are_not_coco(tmp_path, dataset, content):
    dataset("check_broken_json").write_text(content)
    message = refusal(recipe_on(tmp_path, "check_broken_json"))
    assert "check_broken_json.json" in message and "COCO's format" in message


def test_nothing_to_evaluate_on(tmp_path, dataset):
    dataset("check_no_test")
    recipe = recipe_on(tmp_path, "check_no_test", test_sets=[])
    check_recipe(recipe, 1, training=True)
    assert "nothing to evaluate on" in refusal(recipe, training=False)


def test_missing_images(tmp_path, dataset):
    dataset("check_no_images", with_images=False)
    assert "Images of dataset" in refusal(recipe_on(tmp_path, "check_no_images"))


def test_categories_that_do_not_match(tmp_path, dataset):
    dataset("check_categories", num_categories=2)
    message = refusal(recipe_on(tmp_path, "check_categories"))
    assert "2 categories (class 1, class 2)" in message and "num_classes=2" in message


def test_evaluation_does_not_need_the_training_set(tmp_path, dataset):
    dataset("check_val")
    recipe = recipe_on(tmp_path, "check_val", train_names=("not_there",))
    check_recipe(recipe, 1, training=False)
    assert "not_there" in refusal(recipe)


def test_batch_that_cannot_be_shared_out(tmp_path, dataset):
    dataset("check_batch")
    message = refusal(recipe_on(tmp_path, "check_batch"), num_processes=3)
    assert "16 images" in message and "3 processes" in message


def test_batch_that_cannot_be_split_into_parts(tmp_path, dataset):
    dataset("check_parts")
    recipe = recipe_on(tmp_path, "check_parts", accumulation_steps=3)
    message = refusal(recipe, num_processes=2)
    assert "8 images" in message and "3 equal parts" in message
    recipe.accumulation_steps = 4
    check_recipe(recipe, num_processes=2, training=True)
    recipe.accumulation_steps = 3
    check_recipe(recipe, num_processes=2, training=False)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, "many"])
def test_batch_size_of_an_evaluation(tmp_path, dataset, batch_size):
    dataset("check_test_batch")
    test_sets = [SimpleNamespace(names=("check_test_batch",), batch_size=batch_size)]
    recipe = recipe_on(tmp_path, "check_test_batch", test_sets=test_sets)
    message = refusal(recipe, training=False)
    assert str(batch_size) in message and "dataloader.test.batch_size" in message


def test_compiling_needs_a_compiler(tmp_path, dataset, monkeypatch):
    dataset("check_compiler")
    recipe = recipe_on(tmp_path, "check_compiler", compile=True, device="cpu")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    message = refusal(recipe)
    assert "there is no 'g++'" in message and "train.compile" in message
    compiler = tmp_path / "my-c++"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CXX", f"{compiler} -O1")
    check_recipe(recipe, num_processes=1, training=True)


def test_output_folder_that_cannot_be_written(tmp_path, dataset):
    dataset("check_output")
    (tmp_path / "file").touch()
    recipe = recipe_on(tmp_path, "check_output", output_dir=str(tmp_path / "file" / "output"))
    assert "train.output_dir" in refusal(recipe)


def test_a_dataset_name_is_not_given_twice(dataset, tmp_path):
    annotations = dataset("check_twice")
    images = str(tmp_path / "check_twice_images")
    register_dataset("check_twice", str(annotations), images)  # the same again is no harm
    with pytest.raises(UserError, match="check_twice"):
        register_dataset("check_twice", "other.json", images)
    with pytest.raises(UserError, match="coco_2017_val"):
        register_dataset("coco_2017_val", "other.json", images)


# Recipes


def test_the_config_stays_as_the_user_gave_it(tmp_path, dataset):
    dataset("recipe_config")
    names = ["dataloader.test.dataset.names=recipe_config", f"train.output_dir={tmp_path}"]
    cfg = load_config(LAZY, names)
    before = str(cfg)
    evaluator = build_recipe(cfg).test_sets[0].build_evaluator()
    assert evaluator._output_dir == str(tmp_path / "inference")
    assert str(cfg) == before  # runs save it; in the next one the folder may be another


def test_evaluators_of_a_yaml_config_follow_from_the_type_of_the_dataset(monkeypatch, dataset):
    dataset("of_my_type")
    monkeypatch.setitem(vars(MetadataCatalog.get("of_my_type")), "evaluator_type", "my_type")
    cfg = load_config(YACS, ["DATASETS.TEST", "('of_my_type',)"])
    with pytest.raises(UserError, match="of_my_type.*my_type"):
        build_recipe(cfg)

    def first(cfg, name, output_dir):
        return f"first of {name} into {output_dir}"

    def second(cfg, name, output_dir):
        return "second"

    monkeypatch.setitem(EVALUATORS_OF, "my_type", (first, second))
    (test_set,) = build_recipe(cfg).test_sets
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    expected = [f"first of of_my_type into {folder}", "second"]
    assert evaluators_in(test_set.build_evaluator()) == expected
    monkeypatch.setitem(EVALUATORS_OF, "my_type", (second,))
    assert build_recipe(cfg).test_sets[0].build_evaluator() == "second"

    def wrong(cfg, name, output_dir):
        raise ValueError("unlucky")

    monkeypatch.setitem(EVALUATORS_OF, "my_type", (second, wrong))
    with pytest.raises(UserError, match="unlucky"):
        build_recipe(cfg).test_sets[0].prepare()


def test_published_results_are_shown_for_the_set_they_were_measured_on(monkeypatch, caplog):
    task = {"AP": 30.0, "AP50": 50.0, "AP75": 31.25}
    monkeypatch.setattr(evaluate_module, "inference_on_dataset", lambda *args: {"bbox": task})
    for name, shown in [("coco_2017_val", True), ("mine", False)]:
        caplog.clear()
        recipe = SimpleNamespace(
            test_sets=[TestSet((name,), lambda: None, lambda: None)],
            wrap_for_test=lambda model: model,
            device="cpu",
            test_amp=False,
            num_classes=None,
        )
        with caplog.at_level(logging.INFO, logger="msrcnn_d2"):
            evaluate_module.evaluate(recipe, nn.Identity(), Published(38.2, 36.0, "weights.pth"))
        assert ("38.20" in caplog.text) is shown and "30.00" in caplog.text


@pytest.mark.parametrize("path", [LAZY, YACS])
def test_recipes_of_both_kinds_agree(path):
    recipe = build_recipe(load_config(path))
    assert (recipe.max_iter, recipe.total_batch_size, recipe.num_classes) == (90000, 16, 80)
    assert recipe.train_names == ("coco_2017_train",)
    assert [t.names for t in recipe.test_sets] == [("coco_2017_val",)]
    assert (recipe.amp, recipe.seed) == (False, -1)


def learning_rates(recipe, model):
    """{name: (learning rate, weight decay)} of a model's parameters."""
    names = {p: name for name, p in model.named_parameters()}
    groups = recipe.build_optimizer(model).param_groups
    return {names[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


def test_learning_rates_by_layer_are_detectron2s(tiny):
    cfg = toy_config()
    cfg.optimizer.params.overrides = {"bias": {"lr": 0.5, "weight_decay": 0.25}}
    cfg.optimizer.params.weight_decay_norm = 0.125
    rates = learning_rates(build_recipe(cfg), tiny)
    assert rates["roi_heads.mask_iou_head.predictor.bias"] == (0.5, 0.25)
    assert rates["roi_heads.mask_iou_head.predictor.weight"] == (1e-3, 1e-4)
    yaml = ["SOLVER.BIAS_LR_FACTOR=2.0", "SOLVER.WEIGHT_DECAY_BIAS=0.5", "SOLVER.BASE_LR=0.25"]
    rates = learning_rates(build_recipe(load_config(YACS, yaml)), tiny)
    assert rates["roi_heads.mask_iou_head.predictor.bias"] == (0.5, 0.5)
    assert rates["roi_heads.mask_iou_head.predictor.weight"] == (0.25, 1e-4)


def tenth_for_the_backbone(name):
    return 0.1 if name.startswith("backbone.bottom_up") else 1.0


def test_a_function_of_names_is_for_detectron2_after_0_6(tiny):
    cfg = toy_config()
    cfg.optimizer.params.base_lr = cfg.optimizer.lr
    cfg.optimizer.params.lr_factor_func = tenth_for_the_backbone
    recipe = build_recipe(cfg)
    if "lr_factor_func" not in inspect.signature(get_default_optimizer_params).parameters:
        with pytest.raises(UserError, match="optimizer.*lr_factor_func"):
            recipe.build_optimizer(tiny)
        return
    rates = learning_rates(recipe, tiny)
    assert rates["roi_heads.mask_iou_head.predictor.weight"][0] == 1e-3
    assert rates["backbone.bottom_up.stem.conv1.weight"][0] == pytest.approx(1e-4)


# The order of the data


def dicts(num_images=10):
    """Images 0, 3, 6, 9 are upright."""
    return [
        {"index": k, "width": 10 if k % 3 else 5, "height": 7, "file_name": ""}
        for k in range(num_images)
    ]


def mapper(dataset_dict):
    return {**dataset_dict, "random": (np.random.rand(), torch.rand(1).item())}


def take(count, first_iter=0, seed=1, mapper=mapper, **kwargs):
    loader = build_resumable_loader(
        dicts(), mapper=mapper, seed=seed, first_iter=first_iter, total_batch_size=3, **kwargs
    )
    batches = iter(loader)
    return [next(batches) for _ in range(count)]


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_loader_goes_on_with_the_same_samples(grouping, num_workers):
    whole = take(12, aspect_ratio_grouping=grouping)
    rest = take(5, first_iter=7, aspect_ratio_grouping=grouping, num_workers=num_workers)
    assert rest == whole[7:]


def test_each_image_comes_once_an_epoch():
    samples = [s["index"] for batch in take(10, aspect_ratio_grouping=False) for s in batch]
    assert Counter(samples) == {k: 3 for k in range(10)}
    assert samples[:10] != samples[10:20]


def test_batches_are_of_one_orientation():
    batches = take(12)
    upright = [{s["width"] < s["height"] for s in batch} for batch in batches]
    assert all(len(kinds) == 1 for kinds in upright)
    assert {True} in upright and {False} in upright


def test_another_seed_is_another_order_and_another_augmentation():
    one, other = take(4, seed=1), take(4, seed=2)
    assert [s["index"] for b in one for s in b] != [s["index"] for b in other for s in b]
    assert not {s["random"] for b in one for s in b} & {s["random"] for b in other for s in b}


def test_loading_leaves_the_callers_random_numbers_alone():
    def numbers_after(work):
        np.random.seed(0)
        torch.manual_seed(0)
        work()
        return np.random.rand(), torch.rand(1).item()

    seeds = StepSeeds(1)
    batches = ResumableBatches(
        lambda seed, first_iter, on_bad_images: build_resumable_loader(
            dicts(), mapper=mapper, seed=seed, first_iter=first_iter, total_batch_size=3
        ),
        seeds,
    )
    assert numbers_after(lambda: next(iter(batches))) == numbers_after(lambda: None)


def test_samples_that_the_mapper_refuses_are_replaced():
    refuse_zero = take(4, mapper=lambda d: None if d["index"] == 0 else mapper(d))
    indices = {s["index"] for batch in refuse_zero for s in batch}
    assert 0 not in indices and all(len(batch) == 3 for batch in refuse_zero)


def test_steps_are_seeded_by_run_and_iteration():
    def numbers(seed, iteration):
        seeds = StepSeeds(seed)
        seeds.trainer = SimpleNamespace(iter=iteration)
        seeds.before_step()
        return np.random.rand(), torch.rand(1).item()

    assert numbers(1, 5) == numbers(1, 5)
    assert len({numbers(1, 5), numbers(1, 6), numbers(2, 5)}) == 3


class Images(Dataset):
    """A map-style dataset that is neither a list nor Detectron2's."""

    def __len__(self):
        return len(dicts())

    def __getitem__(self, index):
        return dicts()[index]


def batches_of_recipe(dataset, first_iter=0, mapper=mapper, seed=3, **arguments):
    loader = loaders_module.build_train_loader(
        dict(dataset=dataset, mapper=mapper, total_batch_size=3, **arguments),
        ImageSettings(),
        seed,
        first_iter,
        lambda bad: None,
    )
    return [[(x["index"], x["random"]) for x in batch] for batch, _ in zip(loader, range(6))]


@pytest.mark.parametrize(
    "wrap",
    [DatasetFromList, lambda images: Images(), lambda images: MapDataset(images, mapper)],
    ids=["DatasetFromList", "torch", "MapDataset"],
)
@pytest.mark.parametrize(
    "options", [{}, dict(num_workers=2, prefetch_factor=3, persistent_workers=True, timeout=60)]
)
def test_a_map_style_dataset_is_read_in_the_order_of_a_list(wrap, options):
    expected = batches_of_recipe(dicts())
    dataset = wrap(dicts())
    arguments = {"mapper": None if isinstance(dataset, MapDataset) else mapper, **options}
    assert batches_of_recipe(dataset, **arguments) == expected
    assert batches_of_recipe(dataset, first_iter=4, **arguments)[:2] == expected[4:]


def test_the_seed_of_the_loader_is_that_of_the_data():
    assert batches_of_recipe(dicts(), seed=8) != batches_of_recipe(dicts())
    assert load_config(LAZY, ["dataloader.train.seed=3"]).dataloader.train.seed == 3
    own = loaders_module.build_train_loader(
        dict(dataset=dicts(), mapper=mapper, total_batch_size=3, seed=3),
        ImageSettings(),
        8,
        0,
        lambda bad: None,
    )
    batch = next(iter(own))
    assert [(x["index"], x["random"]) for x in batch] == batches_of_recipe(dicts())[0]


@pytest.mark.parametrize("part", ["train", "test"])
def test_options_of_pytorchs_loader_are_known_on_the_command_line(part):
    options = {"pin_memory": True, "prefetch_factor": 4, "persistent_workers": True}
    overrides = [f"dataloader.{part}.{k}={v}" for k, v in options.items()]
    assert options.items() <= dict(load_config(LAZY, overrides).dataloader[part]).items()
    with pytest.raises(UserError, match="persistent_workers"):
        load_config(LAZY, [f"dataloader.{part}.persistent_worker=True"])


def test_what_pytorchs_loader_refuses_is_one_sentence():
    for wrong in (dict(persistent_workers=True), dict(num_workers=-1), dict(prefetch=2)):
        with pytest.raises(UserError, match="dataloader.train"):
            batches_of_recipe(dicts(), **wrong)


def test_options_reach_pytorchs_loader():
    loader = build_test_loader(dicts(), mapper=mapper, num_workers=1, prefetch_factor=5)
    assert loader.prefetch_factor == 5
    loader = build_resumable_loader(
        dicts(),
        mapper=mapper,
        seed=0,
        first_iter=0,
        total_batch_size=3,
        num_workers=1,
        multiprocessing_context="spawn",
    )
    assert loader.multiprocessing_context.get_start_method() == "spawn"


def test_images_of_unknown_size_are_not_grouped_and_the_log_says_it(caplog):
    images = DatasetFromList([{"index": k} for k in range(10)])
    assert len(batches_of_recipe(images)) == 6
    assert sum("aspect ratio" in x.message for x in caplog.records) == 1


def test_images_that_are_read_already_are_not_read_for_their_sizes():
    reads = []

    class Samples(Images):
        def __getitem__(self, index):
            reads.append(index)
            return mapper({**dicts()[index], "image": None})

    loader = loaders_module.build_train_loader(
        dict(dataset=Samples(), mapper=None, total_batch_size=3),
        ImageSettings(),
        0,
        0,
        lambda bad: None,
    )
    assert reads == [0]
    assert len(next(iter(loader))) == 3


def test_masks_in_rle_are_recognised_in_a_map_style_dataset():
    class Format:
        instance_mask_format = "polygon"

        def __call__(self, image):
            return mapper(image)

    rle = {"segmentation": {"size": [2, 2], "counts": [4]}, "iscrowd": 0}
    images = [{**d, "annotations": [rle]} for d in dicts()]
    own, inside = Format(), Format()
    batches_of_recipe(DatasetFromList(images), mapper=own)
    batches_of_recipe(MapDataset(images, inside), mapper=None)
    assert own.instance_mask_format == inside.instance_mask_format == "bitmask"


def test_an_element_that_cannot_be_read_is_a_bad_image():
    class Broken(Images):
        def __getitem__(self, index):
            if index == 4:
                raise OSError("cut off")
            return super().__getitem__(index)

    found = []
    loader = loaders_module.build_train_loader(
        dict(dataset=Broken(), mapper=mapper, total_batch_size=3),
        ImageSettings(),
        0,
        0,
        found.extend,
    )
    indices = {x["index"] for batch, _ in zip(loader, range(8)) for x in batch}
    assert 4 not in indices and {(image.reason) for image in found} == {"cut off"}
    with pytest.raises(UserError, match="cut off"):
        list(build_test_loader(Broken(), mapper=mapper))


def test_a_stream_falls_back_to_detectron2s_loader_with_one_warning(caplog):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(3 * dicts())

    batches = batches_of_recipe(Stream(), pin_memory=False)
    assert len(batches) == 6
    assert sum("resumed" in x.message for x in caplog.records) == 1


def test_a_loader_of_ones_own_is_used_with_one_warning(caplog):
    node = LazyCall(Images)()
    assert isinstance(
        recipe_module._lazy_train_loader(node, ImageSettings(), (), 0, 0, None), Images
    )
    assert sum("resumed" in x.message for x in caplog.records) == 1


@pytest.mark.parametrize(
    "path, overrides, limit",
    [
        (LAZY, ["model.roi_heads.box_predictor.test_topk_per_image=400"], 400),
        (LAZY, ["model.roi_heads.box_predictor.test_topk_per_image=50"], 100),
        (YACS, ["TEST.DETECTIONS_PER_IMAGE=400"], 400),
        (YACS, ["TEST.DETECTIONS_PER_IMAGE=400", "TEST.MAX_DETS_PER_IMAGE=300"], 300),
        (YACS, [], 100),
    ],
)
def test_the_evaluation_counts_what_the_model_detects(path, overrides, limit, tmp_path, dataset):
    name = f"limit_{limit}_{len(overrides)}"
    dataset(name)
    is_lazy = path == LAZY
    names = f"dataloader.test.dataset.names={name}" if is_lazy else f"DATASETS.TEST=('{name}',)"
    output = "train.output_dir" if is_lazy else "OUTPUT_DIR"
    cfg = load_config(path, [*overrides, names, f"{output}={tmp_path}"])
    evaluator = build_recipe(cfg).test_sets[0].build_evaluator()
    assert evaluator._max_dets_per_image[-1] == limit


@pytest.mark.parametrize(
    "path, key", [(LAZY, "dataloader.evaluator.boundary_ap"), (YACS, "TEST.BOUNDARY_AP")]
)
def test_boundary_ap_is_switched_on_in_both_kinds_of_config(path, key, tmp_path, dataset):
    dataset("boundaries")
    output = f"{'train.output_dir' if path == LAZY else 'OUTPUT_DIR'}={tmp_path}"
    names = "dataloader.test.dataset.names=boundaries"
    names = names if path == LAZY else "DATASETS.TEST=('boundaries',)"
    for overrides, expected in [([], False), ([f"{key}=True"], True)]:
        cfg = load_config(path, [output, names, *overrides])
        evaluator = build_recipe(cfg).test_sets[0].build_evaluator()
        assert evaluator._measures_boundaries is expected
    with pytest.raises(UserError, match="True or False"):
        load_config(path, [f"{key}=yes"])


def test_the_summary_has_the_comparable_number_where_more_than_100_count():
    task = {"AP": 90.0, "AP50": 90.0, "AP75": 90.0, "AP@100": 31.0}
    table = summary_table({"bbox": task, "segm": task})
    assert table.count("31.00") == 2 and "AP@100" in table


def test_several_test_sets_and_evaluators_of_a_lazy_config(tmp_path, dataset):
    for name in ("several_a", "several_b"):
        dataset(name)
    cfg = load_config(LAZY, [f"train.output_dir={tmp_path}"])
    loader = LazyCall(build_test_loader)(dataset={"names": "several_a"})
    other = LazyCall(build_test_loader)(dataset={"names": "several_b"})
    a, b = (LazyCall(MaskScoringCOCOEvaluator)(dataset_name=f"several_{x}") for x in "ab")
    cfg.dataloader.test, cfg.dataloader.evaluator = [loader, other], [a, b]
    first, second = build_recipe(cfg).test_sets
    assert (first.names, second.names) == (("several_a",), ("several_b",))
    folders = [t.build_evaluator()._output_dir for t in (first, second)]
    assert folders == [f"{tmp_path}/inference/several_{x}" for x in "ab"]
    cfg.dataloader.test, cfg.dataloader.evaluator = loader, [a, a]
    (both,) = build_recipe(cfg).test_sets
    assert len(both.build_evaluator()._evaluators) == 2
    cfg.dataloader.test, cfg.dataloader.evaluator = [loader, other], [a]
    with pytest.raises(UserError, match="2 loaders"):
        build_recipe(cfg)


def prepared(cfg):
    for test_set in build_recipe(cfg).test_sets:
        test_set.prepare()
    return True


@pytest.mark.parametrize(
    "change, message",
    [
        ("evaluator.max_dets_per_image=[1,10,100]", "max_dets_per_image"),
        ("evaluator.max_dets_per_image=many", "max_dets_per_image"),
        ("evaluator.max_dets_per_image=0", "max_dets_per_image"),
        ("+dataloader.evaluator.kpt_oks_sigmas='0.1,0.2'", "kpt_oks_sigmas"),
        ("+dataloader.evaluator.kpt_oks_sigmas=0.1", "kpt_oks_sigmas"),
        ("+dataloader.evaluator.kpt_oks_sigmas=[0.1,-1]", "kpt_oks_sigmas"),
        ("+dataloader.evaluator.kpt_oks_sigmas=[0.1]", "2 keypoints"),
        ("+dataloader.evaluator.tasks=bbox", "tasks"),
        ("+dataloader.evaluator.tasks=[bbox,masks]", "tasks"),
        ("+dataloader.evaluator.tasks=[keypoints]", "2 keypoints"),
        ("+dataloader.evaluator.max_det=100", "max_det"),
        ("evaluator.engine=[pycocotools]", "dataloader.evaluator"),
        ("evaluator.dataset_name=eager_none", "eager_none"),
        ("evaluator.dataset_name=[eager,eager_none]", "dataset_name"),
        ("test.dataset.names=3", "dataloader.test.dataset.names"),
        ("test.dataset.names='[eager]'", "dataloader.test.dataset.names"),
        ("test.dataset.names=[eager,eager_none]", "dataloader.test.dataset.names"),
        ("test.dataset.names=[]", "dataloader.test"),
        ("+dataloader.test.dataset.min_keypoint=3", "dataloader.test"),
        ("+dataloader.test.prefetch_facto=3", "dataloader.test"),
        ("test.num_workers=-1", "dataloader.test.num_workers"),
        ("evaluator=matlab", "dataloader.evaluator"),
    ],
)
@pytest.mark.parametrize("evaluator", [COCOEvaluator, MaskScoringCOCOEvaluator])
def test_evaluations_are_built_before_training(change, message, evaluator, tmp_path, dataset):
    if evaluator is COCOEvaluator and "engine" in change:
        pytest.skip("Detectron2's evaluator has no engine")
    with_keypoints(dataset("eager"))
    key = change if change.startswith("+") else f"dataloader.{change}"
    base = toy_config("eager")
    base.dataloader.evaluator = LazyCall(evaluator)(
        dataset_name="${..test.dataset.names}", max_dets_per_image=None
    )
    if "engine" in change:
        base.dataloader.evaluator.engine = None
    LazyConfig.save(base, str(tmp_path / "config.yaml"))
    with pytest.raises(UserError, match=re.escape(message)):
        prepared(load_config(str(tmp_path / "config.yaml"), [key]))


def with_keypoints(annotations):
    """Gives the dataset an image with one object that has two keypoints."""
    contents = json.loads(annotations.read_text())
    contents["images"] = [{"id": 1, "file_name": "1.png", "width": 8, "height": 8}]
    box = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "bbox": [0, 0, 4, 4], "area": 16}
    keypoints = {"keypoints": [1, 1, 2, 3, 3, 2], "num_keypoints": 2}
    contents["annotations"] = [{**box, **keypoints, "segmentation": [[0, 0, 4, 0, 4, 4]]}]
    annotations.write_text(json.dumps(contents))


def test_sound_evaluations_are_built_before_training(tmp_path, dataset):
    with_keypoints(dataset("eager_sound"))
    cfg = toy_config("eager_sound")
    cfg.train.output_dir = str(tmp_path)
    cfg.dataloader.test.dataset.names = ["eager_sound"]
    cfg.dataloader.evaluator = LazyCall(COCOEvaluator)(
        dataset_name="${..test.dataset.names}", tasks=["keypoints"], kpt_oks_sigmas=[0.1, 1]
    )
    assert prepared(cfg)
    cfg.dataloader.evaluator = None
    assert build_recipe(cfg).test_sets == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["TEST.MAX_DETS_PER_IMAGE=-1"],
        ["TEST.KEYPOINT_OKS_SIGMAS=[0.1,0.2,0.3]"],
        ["TEST.KEYPOINT_OKS_SIGMAS=['a','b']"],
        ["MODEL.KEYPOINT_ON=True"],
    ],
)
def test_evaluations_of_yaml_are_built_before_training(overrides, dataset):
    with_keypoints(dataset("eager_yaml"))
    with pytest.raises(UserError, match="dataloader.evaluator .yaml: TEST"):
        prepared(load_config(YACS, ["DATASETS.TEST=('eager_yaml',)", *overrides]))
    sigmas = "TEST.KEYPOINT_OKS_SIGMAS=[0.1,0.2]"
    assert prepared(load_config(YACS, ["DATASETS.TEST=('eager_yaml',)", sigmas]))


def test_what_was_built_before_training_serves_one_evaluation():
    built = []
    test_set = TestSet((), lambda: built.append("loader"), lambda: built.append("evaluator"))
    test_set.prepare()
    assert sorted(built) == ["evaluator", "loader"]
    for count in (2, 4):
        test_set.build_loader(), test_set.build_evaluator()
        assert len(built) == count


def test_evaluators_do_not_write_over_each_others_files(tmp_path, dataset):
    dataset("folders")
    cfg = toy_config("folders")
    cfg.train.output_dir = str(tmp_path)
    one = cfg.dataloader.evaluator
    cfg.dataloader.evaluator = [one, one]
    (test_set,) = build_recipe(cfg).test_sets
    folders = [x._output_dir for x in test_set.build_evaluator()._evaluators]
    assert len(set(folders)) == 2 and all(f.startswith(f"{tmp_path}/inference/") for f in folders)
    # Two loaders of the same dataset, such as one with augmentations
    cfg.dataloader.test = [cfg.dataloader.test, cfg.dataloader.test]
    first, second = build_recipe(cfg).test_sets
    assert str(first) != str(second)
    assert [x.build_evaluator()._output_dir for x in (first, second)] == folders
    for evaluator in cfg.dataloader.evaluator:
        evaluator.output_dir = "${....train.output_dir}"
    with pytest.raises(UserError, match="output_dir"):
        build_recipe(cfg)


@pytest.mark.parametrize("path", [LAZY, YACS])
def test_a_model_detects_100_objects_if_the_config_does_not_say(path):
    assert build_recipe(load_config(path)).detections_per_image == 100


def test_cascade_has_the_limit_of_its_last_stage(tmp_path, dataset):
    dataset("limit_cascade")
    cfg = toy_config("limit_cascade")
    stage = {"test_topk_per_image": 400}
    cfg.model = {"roi_heads": {"num_classes": 3, "box_predictor": [{}, {}, stage]}}
    recipe = build_recipe(cfg)
    assert recipe.detections_per_image == 400
    assert recipe.test_sets[0].build_evaluator()._max_dets_per_image[-1] == 400


def test_published_results_are_beside_those_with_100_detections():
    task = {"AP": 90.0, "AP50": 90.0, "AP75": 90.0, "AP@100": 31.0}
    table = summary_table({"bbox": task, "segm": task}, Published(38.2, 36.0, "weights.pth"))
    assert table.splitlines()[0].count("AP@100") == 2


@pytest.mark.parametrize("limit, warned", [(2, True), (3, False), (None, False)])
def test_more_objects_than_the_model_detects_are_told(limit, warned, dataset, caplog):
    path = dataset("crowded")
    contents = json.loads(path.read_text())
    contents["images"] = [
        {"id": k, "file_name": f"{k}.png", "width": 8, "height": 8} for k in (17, 18)
    ]
    square = {"category_id": 1, "bbox": [0, 0, 4, 4], "area": 16, "iscrowd": 0}
    square["segmentation"] = [[0, 0, 4, 0, 4, 4, 0, 4]]
    # Three objects in one image; two and a crowd in the other
    images_and_crowds = [(17, 0), (17, 0), (17, 0), (18, 0), (18, 0), (18, 1)]
    contents["annotations"] = [
        {**square, "id": k, "image_id": image, "iscrowd": crowd}
        for k, (image, crowd) in enumerate(images_and_crowds, 1)
    ]
    path.write_text(json.dumps(contents))
    recipe = SimpleNamespace(
        train_names=("crowded",),
        test_sets=[],
        check_images=False,
        images=ImageSettings(),
        max_bad_images=0,
        detections_per_image=limit,
        validation_set=None,
    )
    with caplog.at_level(logging.WARNING, logger="msrcnn_d2"):
        check_data(recipe, training=True)
    told = [x.getMessage() for x in caplog.records if "test_topk_per_image" in x.getMessage()]
    assert len(told) == warned
    if warned:
        assert all(part in told[0] for part in ("'crowded'", "1 image ", "image 17", "=3"))


# Summary


def first_column(table):
    return [line.split("|")[1].strip() for line in table.splitlines()[2:]]


def test_summary_shows_published_results_beside_measured_ones():
    task = {"AP": 30.0, "AP50": 50.0, "AP75": 31.25}
    results = {"bbox": task, "segm": {**task, "AP": 36.5}, "segm_by_class_score": task}
    table = summary_table(results, Published(38.2, 36.0, "weights.pth"))
    assert first_column(table) == ["boxes", "masks by class score", "masks by mask score"]
    by_mask_score = table.splitlines()[-1]
    assert "36.50" in by_mask_score and "36.00" in by_mask_score and "31.25" in by_mask_score
    assert "published" not in summary_table(results)


def test_summary_of_models_with_a_calibrator():
    task = {"AP": 30.0, "AP50": 50.0, "AP75": 31.25}
    better = {**task, "AP": 37.0}
    results = {"segm_by_quality_score": better, "bbox": task, "segm": task}
    table = summary_table(results)
    assert first_column(table) == ["boxes", "masks by class score", "masks by calibrated score"]
    assert "37.00" in table.splitlines()[-1]
    results["segm_by_class_score"] = task
    assert first_column(summary_table(results)) == [
        "boxes",
        "masks by class score",
        "masks by mask score",
        "masks by calibrated score",
    ]


def test_summary_of_a_model_without_mask_scores():
    task = {"AP": 30.0, "AP50": 50.0, "AP75": 31.25}
    assert "masks by" not in summary_table({"bbox": task, "segm": task})


def test_summary_of_boundaries_and_keypoints():
    task = {"AP": 30.0, "AP50": 50.0, "AP75": 31.25}
    ranked = {"segm": task, "segm_by_class_score": task, "boundary_by_class_score": task}
    results = {"bbox": task, **ranked, "boundary": {**task, "AP": 12.5}, "keypoints": task}
    table = summary_table(results)
    assert first_column(table) == [
        "boxes",
        "masks by class score",
        "masks by mask score",
        "boundaries by class score",
        "boundaries by mask score",
        "keypoints",
    ]
    assert "12.50" in table.splitlines()[-2]
    plain = {task: results[task] for task in ("bbox", "segm", "boundary")}
    assert first_column(summary_table(plain)) == ["boxes", "masks", "boundaries"]


# Evaluation


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_mixed_precision_is_for_gpus():
    precision = evaluate_module.test_precision
    assert isinstance(precision(SimpleNamespace(device="cuda:0", test_amp=True)), torch.autocast)
    for device, test_amp in [("cpu", True), ("cpu", False), ("cuda", False)]:
        recipe = SimpleNamespace(device=device, test_amp=test_amp)
        assert not isinstance(precision(recipe), torch.autocast)


def test_a_process_of_the_users_own_gets_masks_of_the_size_of_the_image():
    class Own(MaskScoringCOCOEvaluator):
        def process(self, inputs, outputs):
            super().process(inputs, outputs)

    class Renamed(MaskScoringCOCOEvaluator):
        pass

    def takes_unpasted_masks(cls):
        return evaluate_module._takes_unpasted_masks(cls.__new__(cls))

    assert takes_unpasted_masks(MaskScoringCOCOEvaluator) and takes_unpasted_masks(Renamed)
    assert not takes_unpasted_masks(Own) and not takes_unpasted_masks(COCOEvaluator)


def test_the_recipe_says_whether_a_model_is_compiled(tiny):
    for compiled in (False, True):
        recipe = SimpleNamespace(build_model=lambda: tiny, device="cpu", compile=compiled)
        model = evaluate_module.build_model(recipe)
        assert ("layers" in vars(model.roi_heads.mask_head)) is compiled


# Images to evaluate on


def test_each_test_image_comes_once_and_similar_shapes_together():
    loader = build_test_loader(dicts(), mapper=mapper, batch_size=4)
    batches = [[x["index"] for x in batch] for batch in loader]
    assert batches == [[0, 3, 6, 9], [1, 2, 4, 5], [7, 8]]
    assert len(loader) == 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_by_one_test_images_stay_in_order(num_workers):
    loader = build_test_loader(dicts(), mapper=mapper, num_workers=num_workers)
    assert [[x["index"] for x in batch] for batch in loader] == [[k] for k in range(10)]


def test_a_sampler_or_a_dataset_of_the_users_own_keeps_its_order():
    loader = build_test_loader(dicts(), mapper=mapper, batch_size=3, sampler=[5, 0, 4, 3])
    assert [[x["index"] for x in batch] for batch in loader] == [[5, 0, 4], [3]]
    loader = build_test_loader(DatasetFromList(dicts()), mapper=mapper, batch_size=5)
    assert [[x["index"] for x in batch] for batch in loader] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_the_yaml_configs_loader_sorts_images_whatever_detectron2_says(monkeypatch):
    images = dicts()
    arguments = {"dataset": images, "mapper": mapper, "num_workers": 0, "sampler": range(10)}
    loader = SimpleNamespace(from_config=lambda cfg, name: dict(arguments))
    monkeypatch.setattr("msrcnn_d2.engine.recipe.build_detection_test_loader", loader)
    (test_set,) = build_recipe(load_config(YACS, ["DATALOADER.TEST_BATCH_SIZE=4"])).test_sets
    batches = [[x["index"] for x in batch] for batch in test_set.build_loader()]
    assert batches == [[0, 3, 6, 9], [1, 2, 4, 5], [7, 8]]


def test_a_stream_of_images_is_batched_as_it_comes():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(dicts(3))

    batches = list(build_test_loader(Stream(), mapper=mapper, batch_size=2))
    assert [[x["index"] for x in batch] for batch in batches] == [[0, 1], [2]]


def test_images_of_unknown_size_can_be_batched():
    images = [{"index": k} for k in range(3)]
    batches = list(build_test_loader(images, batch_size=2, collate_fn=tuple))
    assert batches == [({"index": 0}, {"index": 1}), ({"index": 2},)]


def test_check_of_classes_and_loader_share_what_is_read_once(monkeypatch):
    annotations, images = "train.json", "images"
    times_read = []

    def load(*args):
        times_read.append(args)
        if len(times_read) == 1:
            raise OSError
        return [{"image_id": 1}]

    monkeypatch.setattr(configs_module, "load_coco_json", load)
    register_dataset("read_for_two", annotations, images)
    try:
        with pytest.raises(OSError):
            DatasetCatalog.get("read_for_two")
        got = [DatasetCatalog.get("read_for_two") for _ in range(4)]
    finally:
        DatasetCatalog.remove("read_for_two")
        MetadataCatalog.remove("read_for_two")
    assert got == [[{"image_id": 1}]] * 4
    # The third and the fourth caller read anew: nothing is kept in memory for the whole training
    assert got[0] is got[1] and got[1] is not got[2] and got[2] is not got[3]
    assert times_read == [(annotations, images, "read_for_two")] * 4  # once in vain
