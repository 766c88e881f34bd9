import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch

from detectron2.layers import paste_masks_in_image
from detectron2.structures import BitMasks, Boxes, Instances, ROIMasks

from msrcnn_d2.evaluation.mask_encoding import encode_predicted_masks
from msrcnn_d2_runtime.mask_encoding import decode_crop, encode_bitmasks, encode_roi_masks

HEIGHT, WIDTH = 60, 80


def rles_of_coco(masks):
    rles = [mask_util.encode(np.asfortranarray(m.numpy(), dtype=np.uint8)) for m in masks]
    return [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in rles]


def rle(counts, size):
    height, width = size
    (compressed,) = mask_util.frPyObjects([{"size": [*size], "counts": counts}], height, width)
    return {"size": [*size], "counts": compressed["counts"].decode()}


def bitmask(rows):
    return torch.tensor([[x == "#" for x in row] for row in rows])


# ---- full-size masks


@pytest.mark.parametrize(
    "rows, counts",
    [
        pytest.param(["....", "....", "...."], [12], id="empty"),
        pytest.param(["####", "####", "####"], [0, 12], id="full"),
        pytest.param(["#...", "....", "...."], [0, 1, 11], id="first-pixel"),
        pytest.param(["....", "....", "...#"], [11, 1], id="last-pixel"),
        pytest.param(["....", ".##.", "...."], [4, 1, 2, 1, 4], id="inside"),
        # Down a whole column and on at the top of the next one: one run
        pytest.param([".##.", ".#..", ".#.."], [3, 4, 5], id="run-over-two-columns"),
        pytest.param(["..#.", ".#..", ".#.."], [4, 3, 5], id="bottom-and-next-top"),
        pytest.param(["#.#.", "....", "#.#."], [0, 1, 1, 1, 3, 1, 1, 1, 3], id="holes"),
        pytest.param(["#.##", "#.##", "#.##"], [0, 3, 3, 6], id="to-the-end"),
    ],
)
def test_bitmasks_worked_out_by_hand(rows, counts):
    assert encode_bitmasks(bitmask(rows)[None]) == [rle(counts, (3, 4))]


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (9, 13), (HEIGHT, WIDTH)])
def test_bitmasks_are_encoded_as_by_coco(size):
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([0, 0.05, 0.5, 0.95, 1])[:, None, None]
    masks = torch.rand(5, *size, generator=generator) < shares

    assert encode_bitmasks(masks) == rles_of_coco(masks)
    assert encode_bitmasks(masks.to(torch.uint8)) == rles_of_coco(masks)
    # A view whose rows do not lie one after the other
    transposed = masks.transpose(1, 2)
    assert encode_bitmasks(transposed) == rles_of_coco(transposed)


def test_crops_are_decoded_without_the_rest():
    generator = np.random.default_rng(0)
    for size in [(1, 1), (1, 7), (7, 1), (9, 13)] * 10:
        mask = np.pad(generator.random(size) < generator.random(), generator.integers(0, 3, (2, 2)))
        (encoded,) = encode_bitmasks(mask[None])
        top, left, inside = decode_crop(encoded)
        rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
        if not len(rows):
            assert inside.size == 0
            continue
        assert (top, left) == (rows[0], columns[0])
        part = mask[top : rows[-1] + 1, left : columns[-1] + 1]
        assert inside.dtype == bool and np.array_equal(inside, part)


# ---- masks inside their boxes

FULL = torch.ones(4, 4)
LEFT_HALF = torch.tensor([[1.0, 1, 0, 0]] * 4)


@pytest.mark.parametrize(
    "mask, box, expected",
    [
        # Each pixel is a cell of the mask
        pytest.param(FULL, [2, 1, 6, 5], (2, 1, 6, 5), id="one-pixel-per-cell"),
        pytest.param(LEFT_HALF, [2, 1, 6, 5], (2, 1, 4, 5), id="left-half"),
        # It is 1/2 between the centres of the second and the third cell, at 8 + 4
        pytest.param(LEFT_HALF, [8, 8, 16, 16], (8, 8, 12, 16), id="two-pixels-per-cell"),
        pytest.param(FULL, [-4, -4, 4, 4], (0, 0, 4, 4), id="beyond-the-first-corner"),
        pytest.param(FULL, [76, 56, 84, 64], (76, 56, 80, 60), id="beyond-the-last-corner"),
        pytest.param(FULL, [10, -30, 20, 90], (10, 0, 20, 60), id="whole-columns"),
        pytest.param(FULL, [-30, 10, 110, 20], (0, 10, 80, 20), id="whole-rows"),
        pytest.param(FULL, [-80, -60, 160, 120], (0, 0, 80, 60), id="larger-than-the-image"),
        pytest.param(torch.zeros(4, 4), [2, 1, 6, 5], None, id="empty-mask"),
        pytest.param(FULL, [5, 5, 5, 5], None, id="box-without-size"),
        pytest.param(FULL, [5, 5, 9, 5], None, id="box-without-height"),
        pytest.param(FULL, [5.5, 5.5, 5.5, 5.5], None, id="no-size-at-the-centre-of-a-pixel"),
        # The centre of pixel (5, 7) lies in it
        pytest.param(FULL, [5.4, 7.4, 5.6, 7.6], (5, 7, 6, 8), id="smaller-than-a-pixel"),
        pytest.param(FULL, [5.1, 7.1, 5.3, 7.3], None, id="between-centres-of-pixels"),
        pytest.param(FULL, [100, 10, 120, 20], None, id="right-of-the-image"),
        pytest.param(FULL, [10, -30, 20, -10], None, id="above-the-image"),
    ],
)
def test_roi_masks_worked_out_by_hand(mask, box, expected):
    full_size = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    if expected is not None:
        x0, y0, x1, y1 = expected
        full_size[y0:y1, x0:x1] = True

    (encoded,) = encode_roi_masks(mask[None], torch.tensor([box]).float(), (HEIGHT, WIDTH))

    assert encoded == rles_of_coco([full_size])[0]


def random_boxes(count, generator):
    """From less than a pixel to larger than the image, many of them partly outside."""
    sizes = torch.exp(6 * torch.rand(count, 2, generator=generator) - 1)
    corners = torch.rand(count, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT]) - sizes / 2
    return torch.cat([corners, corners + sizes], dim=1)


@pytest.mark.parametrize("size", [1, 14, 28])
@pytest.mark.parametrize(
    "contrast",
    [
        pytest.param(8.0, id="sure"),
        pytest.param(1.0, id="soft"),
        pytest.param(0.01, id="hardly-different-from-a-half"),
    ],
)
def test_roi_masks_are_those_of_detectron2(contrast, size):
    count = 200
    generator = torch.Generator().manual_seed(size)
    masks = torch.sigmoid(contrast * torch.randn(count, size, size, generator=generator))
    boxes = random_boxes(count, generator)

    encoded = encode_roi_masks(masks, boxes, (HEIGHT, WIDTH))

    pasted = paste_masks_in_image(masks, boxes, (HEIGHT, WIDTH))
    ours = torch.from_numpy(mask_util.decode(encoded)).permute(2, 0, 1).bool()
    different = ours != pasted
    # Where interpolated probabilities are a half up to rounding, the order of additions decides
    assert different.sum() <= 10
    a_little_less, a_little_more = (
        paste_masks_in_image(masks, boxes, (HEIGHT, WIDTH), threshold=0.5 + x)
        for x in (-1e-6, 1e-6)
    )
    assert torch.equal(different & (a_little_less == a_little_more), torch.zeros_like(different))
    same = ~different.flatten(1).any(1)
    assert [x for x, s in zip(encoded, same) if s] == rles_of_coco(pasted[same])


@pytest.mark.parametrize("threshold", [0.2, 0.9])
def test_another_threshold(threshold):
    generator = torch.Generator().manual_seed(0)
    masks, boxes = torch.rand(20, 28, 28, generator=generator), random_boxes(20, generator)

    encoded = encode_roi_masks(masks, boxes, (HEIGHT, WIDTH), threshold)

    pasted = paste_masks_in_image(masks, boxes, (HEIGHT, WIDTH), threshold)
    assert encoded == rles_of_coco(pasted)


def test_corners_are_rounded():
    # There are zeros around the mask. 3 pixels per cell: at the border of the box
    # the probability is 2/3, which is inside, but at its corners (2/3)^2 = 4/9, which is not
    expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    expected[8:20, 8:20] = True
    expected[[8, 8, 19, 19], [8, 19, 8, 19]] = False

    encoded = encode_roi_masks(FULL[None], torch.tensor([[8.0, 8, 20, 20]]), (HEIGHT, WIDTH))

    assert encoded == rles_of_coco([expected])


# ---- predictions


@pytest.fixture
def predictions():
    """Three instances with `ROIMasks`, and the same masks pasted."""
    generator = torch.Generator().manual_seed(0)
    masks, boxes = torch.rand(3, 28, 28, generator=generator), random_boxes(3, generator)
    instances = Instances((HEIGHT, WIDTH), pred_boxes=Boxes(boxes), pred_masks=ROIMasks(masks))
    return instances, paste_masks_in_image(masks, boxes, (HEIGHT, WIDTH))


@pytest.mark.parametrize("kind", [ROIMasks, BitMasks, torch.Tensor])
def test_all_kinds_of_masks(kind, predictions):
    instances, pasted = predictions
    if kind is not ROIMasks:
        instances.pred_masks = BitMasks(pasted) if kind is BitMasks else pasted

    assert encode_predicted_masks(instances) == rles_of_coco(pasted)


@pytest.mark.parametrize("kind", [ROIMasks, BitMasks, torch.Tensor])
def test_no_masks(kind, predictions):
    instances, pasted = predictions
    if kind is not ROIMasks:
        instances.pred_masks = BitMasks(pasted) if kind is BitMasks else pasted

    assert encode_predicted_masks(instances[:0]) == []


def test_half_precision_and_gradients_are_no_obstacle(predictions):
    instances, _ = predictions
    masks = instances.pred_masks.tensor

    for variant in (masks.clone().requires_grad_(), (masks > 0.5).half(), (masks > 0.5)):
        instances.pred_masks = ROIMasks(variant)
        assert len(encode_predicted_masks(instances)) == 3
