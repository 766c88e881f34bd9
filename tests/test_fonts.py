"""Names in scripts that Matplotlib's own font lacks are drawn with another one, if there is one."""

import logging
import os
import warnings
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.font_manager import FontEntry

from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances

from msrcnn_d2 import MaskScoringVisualizer
from msrcnn_d2.report.figures import ap_by_class
from msrcnn_d2_runtime import fonts

# Matplotlib brings these; DejaVu Sans, its default, has neither of the two characters
STIX = ("STIXGeneral", os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "STIXGeneral.ttf"))
IN_STIX, NOWHERE = "\N{FROWN}\N{SMILE}", "\N{CJK UNIFIED IDEOGRAPH-732B}"


@pytest.fixture(params=[[STIX], []], ids=["with a font", "without"])
def installed(request, monkeypatch):
    monkeypatch.setattr(fonts, "_installed", lambda: request.param)
    for function in (fonts._fallbacks, fonts._say):
        function.cache_clear()
    yield request.param
    for function in (fonts._fallbacks, fonts._say):
        function.cache_clear()


def test_ordinary_names_need_nothing(installed):
    names = ["cat", "größe", "кошка", "γάτα", "$a_b$", ""]
    assert fonts.drawable(names) == (names, list(matplotlib.rcParams["font.family"]))


def test_what_no_font_has_is_a_square_and_said_once(installed, caplog):
    names = [f"{IN_STIX} a", f"{NOWHERE} b"]
    for _ in range(2):
        texts, families = fonts.drawable(names)
    default = list(matplotlib.rcParams["font.family"])
    assert families == [*default, *(["STIXGeneral"] if installed else [])]
    assert texts == [names[0] if installed else "□□ a", "□ b"]
    (record,) = (r for r in caplog.records if r.levelno == logging.WARNING)
    assert NOWHERE in record.getMessage()
    assert (IN_STIX[0] in record.getMessage()) == (not installed)


def test_joiners_and_variants_are_no_letters(installed, caplog):
    assert fonts.drawable(["a\u200db\ufe0f"])[0] == ["a\u200db\ufe0f"]
    assert not caplog.records


def test_figures_and_pictures_have_the_names(installed):
    names = [IN_STIX, NOWHERE, "cat"]
    ap = {"class_score": 30.0, "true_iou": 50.0}
    quality = SimpleNamespace(
        by_class={name: SimpleNamespace(ap=ap) for name in names}, rankings=("class_score",)
    )
    instances = Instances((60, 200))
    instances.pred_boxes = Boxes(torch.tensor([[10.0, 20, 60, 50], [80, 20, 150, 50]]))
    instances.scores = instances.pred_mask_ious = instances.mask_scores = torch.ones(2)
    instances.pred_classes = torch.tensor([0, 1])
    pixels = np.full((60, 200, 3), 90, np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Matplotlib warns of each missing character
        figure = ap_by_class(quality).figure
        FigureCanvasAgg(figure).draw()
        visualizer = MaskScoringVisualizer(pixels, Metadata(thing_classes=names))
        visualizer.draw_instance_predictions(instances).get_image()
    labels = figure.axes[0].get_yticklabels()
    drawn = [text.get_text() for text in labels]
    assert sorted(drawn) == sorted([IN_STIX if installed else "□□", "□", "cat"])
    for text in [*labels, *visualizer.output.ax.texts]:
        assert ("STIXGeneral" in text.get_fontfamily()) == bool(installed)


def test_numbers_beside_a_name_from_right_to_left_keep_their_order():
    assert fonts.left_to_right("cat") == "cat"
    assert fonts.left_to_right("\u0642\u0637\u0629") == "\u200e\u0642\u0637\u0629\u200e"


def test_a_condensed_font_is_only_for_families_without_another(monkeypatch):
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    entries = [
        FontEntry(fname=f"{name}{stretch}.ttf", name=name, stretch=stretch)
        for name, stretch in (
            *(("Sans A", "condensed"), ("Sans A", "normal")),
            *(("Sans B", "normal"), ("Sans B", "condensed")),
            *(("Sans C", "condensed"), ("Serif", "normal")),
        )
    ]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", entries)
    expected = ["Sans Anormal", "Sans Bnormal", "Serifnormal", "Sans Ccondensed"]
    assert [file for _, file in fonts._installed()] == [f"{x}.ttf" for x in expected]


def test_the_systems_fonts_are_looked_through():
    found = dict(fonts._installed())
    assert os.path.basename(found["DejaVu Sans"]) == "DejaVuSans.ttf"
    assert not any("last" in name.lower() for name in found)
