"""What holds for files of annotations and predictions, whatever is in them."""

import copy
import json
import tempfile
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import strategies as st

from msrcnn_d2.coco_format import check_fits, read_annotations, read_results
from msrcnn_d2.evaluation import measure_mask_quality
from msrcnn_d2.evaluation.average_precision import ENGINES
from msrcnn_d2.utils.errors import UserError
from tests.helpers.filled_boxes import rle
from tests.helpers.strategies import holds, seeds

pytestmark = pytest.mark.filterwarnings("ignore:Found annotation id 0")

HEIGHT, WIDTH = 12, 16
MASK = np.zeros((HEIGHT, WIDTH), dtype=bool)
MASK[3:9, 4:12] = True
SQUARE = [4, 3, 12, 3, 12, 9, 4, 9]
COUNTS = [4 * HEIGHT + 3, *[6, 6] * 7, 6, 3 + 4 * HEIGHT]
FORMS = [rle(MASK), {"size": [HEIGHT, WIDTH], "counts": COUNTS}, [SQUARE], [SQUARE, SQUARE]]

NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, -1, 0.5, 1.0, 10**400, -(10**30), 2**31, 2**63, 1e300, 1e9]),
    st.integers(),
    st.floats(),
)
KEYS = st.sampled_from(
    "images annotations categories id image_id category_id height width area segmentation iscrowd "
    "bbox score size counts name pred_mask_iou mask_score caption keypoints info".split()
)
COUNTS_TEXT = st.one_of(st.text(max_size=8), st.text(alphabet="012345:?OPQo", max_size=12))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, COUNTS_TEXT, st.sampled_from(FORMS)),
    lambda x: st.one_of(st.lists(x, max_size=5), st.dictionaries(st.one_of(KEYS, COUNTS_TEXT), x)),
    max_leaves=10,
)


def valid_annotations():
    return {
        "images": [
            {"id": k, "file_name": f"{k}.png", "height": HEIGHT, "width": WIDTH} for k in (1, 2, 3)
        ],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            {
                "id": k + 1,
                "image_id": 1 + k // 2,
                "category_id": 1 + k % 2,
                "bbox": [4, 3, 8, 6],
                "area": 48,
                "iscrowd": int(k == 3),
                "segmentation": copy.deepcopy(shape),
            }
            for k, shape in enumerate(FORMS)
        ],
    }


def valid_results():
    return [
        {
            "image_id": 1 + k // 2,
            "category_id": 1 + k % 2,
            "bbox": [4, 3, 8, 6],
            "score": 0.9 - k / 10,
            "segmentation": copy.deepcopy(shape),
            "pred_mask_iou": 0.5,
            "mask_score": 0.5 * (0.9 - k / 10),
        }
        for k, shape in enumerate(FORMS)
    ]


def places_in(thing):
    """All (container, key) of a JSON value."""
    items = thing.items() if isinstance(thing, dict) else enumerate(thing)
    for key, value in list(items):
        yield thing, key
        if isinstance(value, (dict, list)):
            yield from places_in(value)


@st.composite
def spoiled(draw, valid):
    """Valid contents in which one to three things are replaced, removed, repeated or added."""
    contents = valid()
    for _ in range(draw(st.integers(1, 3))):
        places = list(places_in(contents))
        if not places:
            break
        container, key = places[draw(st.integers(0, len(places) - 1))]
        kind = draw(st.sampled_from(["replace", "replace", "number", "remove", "swap", "add"]))
        if kind == "replace":
            container[key] = copy.deepcopy(draw(JSON))  # as it may be spoiled further
        elif kind == "number":
            container[key] = draw(NUMBERS)
        elif kind == "remove":
            del container[key]
        elif kind == "swap":
            other, other_key = places[draw(st.integers(0, len(places) - 1))]
            container[key] = copy.deepcopy(other[other_key])
        elif isinstance(container, dict):
            container[draw(KEYS)] = copy.deepcopy(draw(JSON))
        else:
            container.insert(key, copy.deepcopy(draw(JSON)))
    return contents


def read_both(annotations, results):
    """What an evaluation of files does; messages of errors are one sentence or two."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("annotations.json", "results.json")]
        for file, contents in zip(files, (annotations, results)):
            file.write_text(contents if isinstance(contents, str) else json.dumps(contents))
        try:
            coco_gt = read_annotations(str(files[0]))
            read = check_fits(read_results(str(files[1])), coco_gt)
        except UserError as error:
            assert str(error).endswith(".") and "\n" not in str(error)
            return None
    measured = [measure_mask_quality(coco_gt, read, engine).to_json() for engine in ENGINES]
    for numbers in measured:
        json.dumps(numbers, allow_nan=False)
    json.dumps(read)
    return measured


def test_the_valid_files_are_read():
    assert read_both(valid_annotations(), valid_results())


@holds(60, annotations=spoiled(valid_annotations))
def test_spoiled_annotations_can_be_evaluated_or_are_refused(annotations):
    read_both(annotations, valid_results())


@holds(60, results=spoiled(valid_results))
def test_spoiled_predictions_can_be_evaluated_or_are_refused(results):
    read_both(valid_annotations(), results)


@holds(20, annotations=spoiled(valid_annotations), results=spoiled(valid_results))
def test_both_spoiled_can_be_evaluated_or_are_refused(annotations, results):
    read_both(annotations, results)


@holds(25, annotations=JSON, results=JSON)
def test_any_json_can_be_evaluated_or_is_refused(annotations, results):
    read_both(annotations, valid_results())
    read_both(valid_annotations(), results)


@holds(20, start=st.integers(0, 2000), text=st.text(max_size=5), first=st.booleans())
def test_any_text_can_be_evaluated_or_is_refused(start, text, first):
    contents = [json.dumps(valid_annotations()), json.dumps(valid_results())]
    spoiled_ = contents[first]
    start %= len(spoiled_)
    contents[first] = (
        (spoiled_[:start] + text + spoiled_[start + len(text) :])
        .encode("utf-8", "replace")
        .decode()
    )
    read_both(*contents)


@holds(25, seed=seeds(), height=st.integers(1, 30), width=st.integers(1, 30))
def test_all_masks_that_coco_encodes_are_taken(seed, height, width):
    rng = np.random.default_rng(seed)
    masks = [rng.random((height, width)) < share for share in (0, 0.01, 0.5, 0.99, 1)]
    annotations, results = valid_annotations(), valid_results()
    for image in annotations["images"]:
        image.update(height=height, width=width)
    del annotations["annotations"][1]
    annotations["annotations"][0]["segmentation"] = rle(masks[2])
    results = [{**results[0], "segmentation": rle(mask)} for mask in masks]

    assert read_both(annotations, results)


@holds(25, counts=COUNTS_TEXT)
def test_compressed_masks_are_taken_only_if_they_have_all_pixels_of_the_image(counts):
    results = valid_results()
    results[0]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": counts}

    if read_both(valid_annotations(), results):
        mask = mask_util.decode({"size": [HEIGHT, WIDTH], "counts": counts})
        assert set(np.unique(mask)) <= {0, 1}
        again = mask_util.encode(mask)
        assert mask_util.area(again) == mask.sum()
