"""
The same weights on the same pixels give what MMDetection's own Mask Scoring R-CNN gives.

Runs where MMDetection is installed, which nothing else here needs, and where images of COCO are.
"""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import detectron2.data.transforms as T
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, Instances, pairwise_iou

from msrcnn_d2 import model_zoo
from msrcnn_d2.checkpoint import MaskScoringCheckpointer

mmdet = pytest.importorskip(
    "mmdet", reason="no MMDetection: pip install mmdet==3.3.0 mmengine mmcv-lite==2.1.0"
)

NUM_IMAGES = 2
SHORT_SIDE = 320  # pixels; it takes about a minute per model, with the usual 800 several
CONFIGS = {  # ours by MMDetection's
    "ms-rcnn_r50-caffe_fpn_1x_coco": "ms_rcnn_R_50_FPN_1x",
    "ms-rcnn_r101-caffe_fpn_1x_coco": "ms_rcnn_R_101_FPN_1x",
    "ms-rcnn_x101-32x4d_fpn_1x_coco": "ms_rcnn_X_101_32x4d_FPN_1x",
    "ms-rcnn_x101-64x4d_fpn_1x_coco": "ms_rcnn_X_101_64x4d_FPN_1x",
}


@pytest.fixture(scope="module")
def images():
    """Images of COCO as (3, H, W) tensors of BGR bytes, in different shapes."""
    folders = [os.environ.get("DETECTRON2_DATASETS"), "../shared/data/datasets"]
    root = Path(__file__).parent.parent
    files = [sorted((root / f / "coco/val2017").glob("*.jpg")) for f in folders if f]
    files = next(filter(None, files), None)
    if not files:
        pytest.skip("no COCO: set DETECTRON2_DATASETS to the folder of coco/")
    return [read_resized(str(file)) for file in files[:NUM_IMAGES]]


def read_resized(file):
    image = read_image(file, "BGR")
    transform = T.ResizeShortestEdge(SHORT_SIDE, 2 * SHORT_SIDE).get_transform(image)
    return torch.from_numpy(transform.apply_image(image).copy()).permute(2, 0, 1)


def build_theirs(name):
    """MMDetection's model and config; `name` is that of the config file that it comes with."""
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    from tests.helpers import mmcv_ops

    mmcv_ops.install()
    import mmdet.models  # registers them

    init_default_scope("mmdet")
    path = Path(mmdet.__file__).parent / f".mim/configs/ms_rcnn/{name}.py"
    cfg = Config.fromfile(path)
    cfg.model.backbone.init_cfg = None  # no download
    model = MODELS.build(cfg.model).eval()
    keep_class_scores(model.roi_head.mask_iou_head)
    return model, cfg


def keep_class_scores(mask_iou_head):
    """MMDetection 3 overwrites them with the mask scores; here the mask scores come besides."""
    rescore = mask_iou_head.predict_by_feat

    def predict_by_feat(mask_iou_preds, results_list):
        class_scores = [results.scores for results in results_list]
        results_list = rescore(mask_iou_preds, results_list)
        for results, scores in zip(results_list, class_scores):
            results.mask_scores, results.scores = results.scores, scores
        return results_list

    mask_iou_head.predict_by_feat = predict_by_feat


# Mean and standard deviation of the outputs; of other layers they are 0 and 1. The RPN's keep clear
# of where the two differ on purpose: MMDetection ranks proposals by probabilities, which tie near
# 1, Detectron2 by logits; and only MMDetection limits by how much a proposal shrinks.
OUTPUTS = {
    "rpn_head.rpn_cls": (-20, 1),
    "rpn_head.rpn_reg": (0, 0.1),
    "roi_head.bbox_head.fc_cls": (0, 3),
    "roi_head.mask_head.conv_logits": (0, 3),
    "roi_head.mask_iou_head.fc_mask_iou": (0.5, 0.25),
}
BACKGROUND = 0.9  # share of the proposals that rather are background


@torch.no_grad()
def draw_weights(model, images):
    """
    Random weights that detect many objects, with all kinds of scores.

    Weights as they are initialised would not do: activations grow or fade from layer to layer,
    and each region gets nearly the same scores. So each layer in turn, when the images first come
    to it, is scaled and shifted to outputs of a given mean and spread.
    """
    drawn, hooks = set(), []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            draw = draw_norm
        elif getattr(layer, "bias", None) is not None:
            draw = draw_layer
        else:
            continue

        def hook(layer, inputs, output, name=name, draw=draw):
            if name in drawn:  # the RPN's head sees one level after the other
                return output
            drawn.add(name)
            draw(name, layer, inputs[0], output)
            return layer.forward(*inputs)

        hooks.append(layer.register_forward_hook(hook))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
    predict_theirs(model, images)
    for handle in hooks:
        handle.remove()


def draw_norm(name, layer, x, output):
    var, mean = torch.var_mean(x, (0, 2, 3))
    noise = 0.2 * torch.randn(4, len(mean))
    layer.running_mean.copy_(mean + var.sqrt() * noise[0])
    layer.running_var.copy_(var * noise[1].exp())
    layer.weight.copy_(noise[2].exp())
    layer.bias.copy_(noise[3])


def draw_layer(name, layer, x, output):
    mean, std = OUTPUTS.get(name, (0, 1))
    is_std, is_mean = torch.std_mean(output, [d for d in range(output.ndim) if d != 1])
    scale = std / is_std
    output_dim = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    layer.weight.transpose(output_dim, -1).mul_(scale)
    layer.bias.sub_(is_mean).mul_(scale).add_(mean)
    if name.endswith("fc_cls"):
        logits = layer(x)
        margins = logits[:, :-1].amax(1) - logits[:, -1]
        layer.bias[-1] += margins.quantile(BACKGROUND)


def preprocess_theirs(model, images):
    from mmdet.structures import DetDataSample

    sizes = [tuple(image.shape[1:]) for image in images]
    samples = [
        DetDataSample(metainfo={"img_shape": s, "ori_shape": s, "scale_factor": (1.0, 1.0)})
        for s in sizes
    ]
    return model.data_preprocessor({"inputs": images, "data_samples": samples})


@torch.no_grad()
def predict_theirs(model, images):
    data = preprocess_theirs(model, images)
    samples = model.predict(data["inputs"], data["data_samples"])
    return [as_instances(sample.pred_instances, sample.img_shape) for sample in samples]


def as_instances(found, image_size):
    return Instances(
        image_size,
        pred_boxes=Boxes(found.bboxes),
        pred_classes=found.labels,
        scores=found.scores,
        pred_mask_ious=(found.mask_scores / found.scores).clamp(0, 1),
        pred_masks=found.masks,
    )


def inputs_of_ours(model, images):
    """What a dataset mapper would give it."""
    flip = model.input_format == "RGB"
    return [{"image": image.flip(0) if flip else image} for image in images]


@torch.no_grad()
def predict_ours(model, images):
    return [x["instances"] for x in model(inputs_of_ours(model, images))]


def pairwise_mask_iou(first, second):
    first, second = first.flatten(1).float(), second.flatten(1).float()
    intersection = first @ second.T
    union = first.sum(1)[:, None] + second.sum(1) - intersection
    return torch.where(union > 0, intersection / union, 1.0)


def differences(first, second):
    """How two detections differ, for each pair of them: matrices by name."""
    return {
        "class": (first.pred_classes[:, None] != second.pred_classes).float(),
        "box": 1 - pairwise_iou(first.pred_boxes, second.pred_boxes),
        "score": (first.scores[:, None] - second.scores).abs(),
        "mask IoU": (first.pred_mask_ious[:, None] - second.pred_mask_ious).abs(),
        "mask": 1 - pairwise_mask_iou(first.pred_masks, second.pred_masks),
    }


TOLERANCES = {"class": 0.5, "box": 0.01, "score": 1e-3, "mask IoU": 1e-3, "mask": 0.01}


def count_agreeing(first, second):
    """
    Returns:
        number of detections with exactly one counterpart that agrees in everything, and by name
        the largest difference between those whose boxes are nearest to each other.
    """
    values = differences(first, second)
    agree = torch.stack([values[k] < TOLERANCES[k] for k in values]).all(dim=0)
    only = agree & (agree.sum(0) == 1) & (agree.sum(1) == 1)[:, None]
    nearest = (values["box"] + values["class"]).argmin(dim=1, keepdim=True)
    return only.sum().item(), {k: v.gather(1, nearest).max().item() for k, v in values.items()}


def assert_varied(instances):
    """Detections that are all alike, or not sure of anything, would prove nothing."""
    for field, least in [("scores", 0.2), ("pred_mask_ious", 0.2)]:
        values = torch.cat([x.get(field) for x in instances])
        assert len(values) > 50 * len(instances), "few detections"
        assert values.quantile(0.9) - values.quantile(0.1) > least, f"all {field} alike"


@pytest.mark.parametrize("name", CONFIGS)
def test_detections_are_those_of_mmdetection(name, images, tmp_path):
    theirs, cfg = build_theirs(name)
    draw_weights(theirs, images)
    file = tmp_path / "published.pth"
    classes = tuple(MetadataCatalog.get("coco_2017_val").thing_classes)
    meta = {"CLASSES": classes, "epoch": 12, "config": cfg.pretty_text}
    torch.save({"meta": meta, "state_dict": theirs.state_dict()}, file)

    cfg = model_zoo.get_config(f"COCO-InstanceSegmentation/{CONFIGS[name]}.py")
    ours = instantiate(cfg.model).eval()
    MaskScoringCheckpointer(ours).load(str(file), strict=True)
    file.unlink()  # hundreds of megabytes, which pytest would keep

    pixels = ours.preprocess_image(inputs_of_ours(ours, images)).tensor
    expected_pixels = preprocess_theirs(theirs, images)["inputs"]
    torch.testing.assert_close(pixels, expected_pixels, rtol=0, atol=1e-5)

    expected, found = predict_theirs(theirs, images), predict_ours(ours, images)
    assert_varied(expected)
    agreeing, largest = zip(*map(count_agreeing, expected, found))
    total = sum(max(len(x), len(y)) for x, y in zip(expected, found))
    result = f"{sum(agreeing)} of {total} detections agree; largest differences: {largest}"
    print(result)
    assert sum(agreeing) >= 0.999 * total, result
