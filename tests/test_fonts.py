"""Names in scripts that Matplotlib's own font lacks are drawn with another one, if there is one."""

import logging
import os
import warnings
from types import SimpleNamespace

import matplotlib
import pytest
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.font_manager import FontEntry

from msrcnn_d2.report.figures import ap_by_class
from msrcnn_d2_runtime import fonts

# Matplotlib brings these; DejaVu Sans, its default, has neither of the two characters
STIX = ("STIXGeneral", os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "STIXGeneral.ttf"))
IN_STIX, NOWHERE = "\N{FROWN}\N{SMILE}", "\N{CJK UNIFIED IDEOGRAPH-732B}"


@pytest.fixture(params=[[STIX], []], ids=["with a font", "without"])
def installed(request, monkeypatch):
    monkeypatch.setattr(fonts, "_installed", lambda: request.param)
    for function in (fonts._fallbacks, fonts._say, fonts.runs):
        function.cache_clear()
    yield request.param
    for function in (fonts._fallbacks, fonts._say, fonts.runs):
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


def test_figures_have_the_names(installed):
    names = [IN_STIX, NOWHERE, "cat"]
    ap = {"class_score": 30.0, "true_iou": 50.0}
    quality = SimpleNamespace(
        by_class={name: SimpleNamespace(ap=ap) for name in names}, rankings=("class_score",)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Matplotlib warns of each missing character
        figure = ap_by_class(quality).figure
        FigureCanvasAgg(figure).draw()
    labels = figure.axes[0].get_yticklabels()
    drawn = [text.get_text() for text in labels]
    assert sorted(drawn) == sorted([IN_STIX if installed else "□□", "□", "cat"])
    for text in labels:
        assert ("STIXGeneral" in text.get_fontfamily()) == bool(installed)


def test_runs_have_a_font_for_each_part(installed, caplog):
    usual = font_manager.findfont("DejaVu Sans")
    assert fonts.runs("größe 0.45") == [("größe 0.45", usual)]
    found = fonts.runs(f"a {IN_STIX} {NOWHERE} 0.45")
    if installed:
        assert found == [("a ", usual), (f"{IN_STIX} ", STIX[1]), ("□ 0.45", usual)]
    else:
        assert found == [("a □□ □ 0.45", usual)]
    assert NOWHERE in caplog.text and (IN_STIX in caplog.text) != bool(installed)
    # Marks and joiners stay with the letter before them
    (*_, last) = fonts.runs(f"a{IN_STIX[0]}\u0301\u200d")
    assert last[0].endswith("\u0301\u200d") and len(last[0]) > 2


def test_words_from_right_to_left_are_one_part(monkeypatch):
    """Beside each other, as two parts, the first word would be the left one."""
    name = "\u0712\u072c \u0710\u0712"  # Syriac, which DejaVu Sans does not have
    monkeypatch.setattr(fonts, "_fallbacks", lambda wanted: [("STIXGeneral", set(wanted))])
    parts = fonts.runs(fonts.left_to_right(name) + " 0.45")
    assert [part.strip(" \u200e") for part, _ in parts] == ["", name, "0.45"]
    fonts.runs.cache_clear()
    assert fonts.is_right_to_left(name) and not fonts.is_right_to_left("cat 0.45")


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
