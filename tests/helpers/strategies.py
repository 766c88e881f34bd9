"""What the properties are tried on: boxes, polygons, bitmasks, batches, detections, JSON."""

import copy
import functools
import os
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
NIGHTLY_TIMES = 15  # as many cases as in a short run
TRIED = Counter()  # cases by property

HEIGHT, WIDTH = 40, 56


def holds(cases, **strategies):
    """
    Turns a function of a case into a test of many.

    Args:
        cases: how many in a short run.
        strategies: of the arguments of the function; others are fixtures.
    """

    def decorate(function):
        @functools.wraps(function)
        def counted(*args, **kwargs):
            TRIED[function.__qualname__] += 1
            return function(*args, **kwargs)

        tried = settings(max_examples=cases * (NIGHTLY_TIMES if NIGHTLY else 1))
        return tried(given(**strategies)(counted))

    return decorate


def seeds():
    """Of NumPy's generators: what would take too long to draw one by one."""
    return st.integers(0, 2**32 - 1)


# ---- geometry, with numbers that float32 has: sums and differences of them are exact


def eighths(low, high):
    return st.integers(8 * low, 8 * high).map(lambda x: x / 8)


USUAL = ("usual",)
UNUSUAL = ("usual", "usual", "usual", "tiny", "huge", "outside")
BOX_KINDS = (*UNUSUAL, "reversed")
TINY = [0.0, 1e-7, 0.01, 0.1, 0.5, 1.0]


@st.composite
def boxes(draw, kinds=BOX_KINDS):
    """A box (x0, y0, x1, y1): usual ones; with no or too little size, huge, outside, reversed."""
    x0, y0 = draw(eighths(0, WIDTH - 4)), draw(eighths(0, HEIGHT - 4))
    width, height = draw(eighths(1, WIDTH)), draw(eighths(1, HEIGHT))
    kind = draw(st.sampled_from(kinds))
    if kind == "tiny":
        width, height = draw(st.sampled_from(TINY)), draw(st.sampled_from([*TINY, height]))
    if kind == "huge":
        x0, y0, width, height = x0 - 300, y0 - 300, 600 + width, 600 + height
    if kind == "outside":
        x0 += draw(st.sampled_from([-2 * WIDTH, 0, 2 * WIDTH]))
        y0 += draw(st.sampled_from([-2 * HEIGHT, 2 * HEIGHT]))
    if kind == "reversed":
        width = -width
    return [x0, y0, x0 + width, y0 + height]


@st.composite
def boxes_around(draw, shape):
    """A box that has most of an object, as foreground proposals have, if it is not empty."""
    if isinstance(shape, list):
        points = np.concatenate(shape or [[0, 0]]).reshape(-1, 2)
    else:
        points = np.argwhere(shape)[:, ::-1] if shape.any() else np.array([[0, 0]])
    jitter = [draw(eighths(-2, 2)) for _ in range(4)]
    low, high = np.add(points.min(axis=0), jitter[:2]), np.add(points.max(axis=0), jitter[2:])
    return [*low.tolist(), *np.maximum(high, low + 1).tolist()]


@st.composite
def polygons(draw):
    """Any polygon: it may cross itself, have no area, touch or leave the image, be outside."""
    kind = draw(st.sampled_from(["any", "any", "cell", "flat", "border", "outside"]))
    shift, low, high = 0, -8, max(HEIGHT, WIDTH) + 8
    if kind == "cell":
        low, high = 10, 12
    if kind == "border":
        low, high = 0, WIDTH
    if kind == "outside":
        shift = draw(st.sampled_from([-500, 500]))
    values = eighths(low, high)
    if kind == "flat":
        vertices = [[x, x] for x in draw(st.lists(values, min_size=3, max_size=6))]
    else:
        count = draw(st.integers(3, 7))
        vertices = [[draw(values), draw(values)] for _ in range(count)]
    return np.array(vertices, dtype=float).reshape(-1) + shift


@st.composite
def objects_of_polygons(draw):
    """One to four polygons, of which some are the same or the same moved by a few pixels."""
    parts = draw(st.lists(polygons(), min_size=1, max_size=2))
    for _ in range(draw(st.integers(0, 2))):
        part = draw(st.sampled_from(parts))
        parts.append(part + np.tile([draw(eighths(-9, 9)), draw(eighths(-9, 9))], len(part) // 2))
    if draw(st.booleans()):
        parts.append(parts[0])
    return parts


@st.composite
def stars(draw):
    """A polygon that does not cross itself, inside the image, of at least a few pixels."""
    count = draw(st.integers(3, 9))
    rng = np.random.default_rng(draw(seeds()))
    x, y = draw(eighths(16, WIDTH - 16)), draw(eighths(16, HEIGHT - 16))
    angles = 2 * np.pi * (np.arange(count) + rng.uniform(0, 0.8, count)) / count
    radii = draw(eighths(3, 15)) * rng.uniform(0.4, 1, count)
    star = [x, y] + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return (np.round(8 * star) / 8).reshape(-1)


@st.composite
def bitmaps(draw):
    """A bitmask of the image's size: noise, a rectangle, one pixel, nothing, everything."""
    kind = draw(st.sampled_from(["noise", "blob", "rectangle", "pixel", "empty", "full"]))
    rng = np.random.default_rng(draw(seeds()))
    if kind == "noise":
        return rng.random((HEIGHT, WIDTH)) < rng.random()
    if kind == "blob":
        coarse = rng.random((HEIGHT // 8, WIDTH // 8)) < 0.5
        return np.kron(coarse, np.ones((8, 8))).astype(bool)
    mask = np.full((HEIGHT, WIDTH), kind == "full")
    if kind in ("rectangle", "pixel"):
        y, x = rng.integers(0, HEIGHT), rng.integers(0, WIDTH)
        size = (1, 1) if kind == "pixel" else rng.integers(1, 30, 2)
        mask[y : y + size[0], x : x + size[1]] = True
    return mask


@st.composite
def predicted_masks(draw, count, size):
    """(count, size, size): nothing, everything, noise or halves."""
    rng = np.random.default_rng(draw(seeds()))
    shares = rng.choice([0, 0.3, 0.5, 0.9, 1], count)
    masks = rng.random((count, size, size)) < shares[:, None, None]
    halves = rng.random(count) < 0.3
    masks[halves, :, : size // 2] = True
    return torch.from_numpy(masks)


@dataclass
class Batch:
    """
    Objects and, for each proposal, a box, the index of its object, and a predicted mask.

    Attributes:
        objects: for each image its objects: lists of polygons, or bitmasks.
        boxes, indices: for each image of its proposals; (N, 4) and (N,).
        predicted: for each image (N, S, S).
    """

    objects: list
    boxes: list
    indices: list
    predicted: list
    size: int

    def masks(self, image):
        objects = [self.objects[image][k] for k in self.indices[image]]
        if objects and not isinstance(objects[0], list):
            return BitMasks(torch.from_numpy(np.stack(objects)))
        return PolygonMasks(objects)

    def instances(self, image):
        """The proposals, as sampled for training; without ground truth where there are none."""
        boxes = torch.tensor(self.boxes[image], dtype=torch.float32).reshape(-1, 4)
        proposals = Instances((HEIGHT, WIDTH), proposal_boxes=Boxes(boxes))
        if len(boxes):
            proposals.gt_masks = self.masks(image)
        return proposals


@st.composite
def batches(draw, shape=None, kinds=None, max_images=3, max_proposals=4):
    """
    Args:
        shape: strategy of an object, by default any polygons or bitmasks.
        kinds: of boxes. By default all; with bitmasks without reversed ones, of which PyTorch's
            RoIAlign says that it cannot make room for them.
    """
    size = draw(st.sampled_from([7, 14, 28]))
    if shape is None:
        as_bitmasks = draw(st.booleans())
        shape = bitmaps() if as_bitmasks else st.one_of(st.just([]), objects_of_polygons())
        kinds = UNUSUAL if as_bitmasks else BOX_KINDS
    batch = Batch([], [], [], [], size)
    for _ in range(draw(st.integers(1, max_images))):
        objects = draw(st.lists(shape, min_size=draw(st.sampled_from([0, 1, 1, 1])), max_size=3))
        least = draw(st.sampled_from([0, 1, 2, 2]))
        count = draw(st.integers(least, max_proposals)) if objects else 0
        batch.objects.append(objects)
        batch.indices.append([draw(st.integers(0, len(objects) - 1)) for _ in range(count)])
        batch.boxes.append(
            [
                draw(st.one_of(boxes(kinds or BOX_KINDS), boxes_around(objects[k])))
                for k in batch.indices[-1]
            ]
        )
        batch.predicted.append(draw(predicted_masks(count, size)))
    return batch


# ---- whether something is as it was


class Untouched:
    """Remembers things with tensors in them, and asserts that they are as they were."""

    def __init__(self, *things):
        self.things, self.before = things, copy.deepcopy(things)
        self.places = [x.data_ptr() for x in tensors_of(things)]

    def check(self):
        tensors = list(tensors_of(self.things))
        assert [x.data_ptr() for x in tensors] == self.places
        assert same(self.things, self.before)


def tensors_of(thing):
    if isinstance(thing, torch.Tensor):
        yield thing
    for part in parts_of(thing):
        yield from tensors_of(part)


def parts_of(thing):
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, (list, tuple)):
        return list(thing)
    if isinstance(thing, Instances):
        return [thing.get_fields()]
    if isinstance(thing, (Boxes, BitMasks)):
        return [thing.tensor]
    return [thing.polygons] if isinstance(thing, PolygonMasks) else []


def same(first, second):
    """Whether two things are equal, bit for bit, NaN included."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return torch.equal(first.contiguous().view(-1), second.contiguous().view(-1)) or (
            first.shape == second.shape
            and first.dtype == second.dtype
            and torch.equal(first.isnan(), second.isnan())
            and torch.equal(first.nan_to_num(), second.nan_to_num())
        )
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second)
    if isinstance(first, dict) and list(first) != list(second):
        return False
    parts, others = parts_of(first), parts_of(second)
    if parts or others:
        return len(parts) == len(others) and all(map(same, parts, others))
    return isinstance(first, (dict, list, tuple, Instances, PolygonMasks)) or first == second
