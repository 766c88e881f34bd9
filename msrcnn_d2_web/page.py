"""The page, in Gradio: what is on it, and what happens when its user does something."""

import base64
import io
import math
import urllib.parse
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from msrcnn_d2_runtime.class_colors import class_color
from msrcnn_d2_runtime.errors import UserError
from msrcnn_d2_runtime.image_reading import ImageSettings
from msrcnn_d2_runtime.ranking import SCORE_FIELDS
from msrcnn_d2_runtime.scores import SCORES
from msrcnn_d2_runtime.text import plural

from .analysis import Analyser, Analysis, View, read_image, shown
from .pictures import display_picture, object_at
from .store import AnalysisStore

__all__ = ["Page"]

MIN_CLASS_SCORE = 0.5  # where the slider is at first, so that the first picture is not crowded
MAX_ROWS = 200
MAX_NARROW = 640  # pixels of a screen that is that of a phone, as in page.css
EXAMPLE_SIDE = 96  # of the small pictures of examples, in pixels
NO_IMAGE = "Drop an image to see its objects here."
GONE = "The server does not have this image any more: drop it again."
NOTHING_FOUND = "The model found nothing in this image."
NOTHING_SHOWN = "All objects are below the thresholds: move the sliders to the left."

_templates = Environment(
    loader=PackageLoader(__package__, ""),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class Page:
    """
    The page of a predictor.

    Attributes:
        analyser: predicts what is uploaded.
        store: has the analyses of all users.
        class_names: of the predictor.
        scores: that the predictor has, except those that nobody can filter by.
        blocks: the page, in Gradio.
    """

    def __init__(
        self,
        analyser: Analyser,
        store: AnalysisStore,
        *,
        title: str,
        examples: Sequence[Path] = (),
        max_upload_mb: int = 20,
        where_it_goes: str = "it stays on this computer",
    ):
        """
        Args:
            title: what the model is called.
            examples: images that users can choose.
            max_upload_mb: largest file to upload, in millions of bytes.
            where_it_goes: what becomes of an image, for its user.

        Raises:
            UserError: the model does not work, or an example is no image.
        """
        self.analyser, self.store = analyser, store
        self.class_names = analyser.predictor.class_names
        # First, since their errors name the file
        thumbnails = [_thumbnail(path, analyser.settings) for path in examples]
        self._examples = list(examples)
        self._example_keys: dict[int, str] = {}
        # Which scores the model has, it says only when it has predicted something
        first = self.store.get(self._example_key(0)) if self._examples else None
        if first:
            probe = first.predictions
        else:
            (probe,) = analyser.predictor.predictions([np.full((256, 256, 3), 127, np.uint8)])
        self.scores = [score for score in SCORES.values() if probe.has(score.field)]
        self.rankings = [score for score in self.scores if score.ranks]
        self.blocks = self._build(title, thumbnails, max_upload_mb, where_it_goes)

    # ---- what users do

    def show(
        self, narrow: bool, key: str | None, selected: int | None, *settings: Any
    ) -> list[str]:
        """
        Args:
            narrow: whether the screen is that of a phone.
            key: of an analysis.
            selected: index of an object.
            settings: the ranking and the value of each slider.

        Returns:
            the picture and the table of objects, as HTML.
        """
        analysis = self.store.get(key)
        if key is None or analysis is None:
            return [_render("no_picture", text=GONE if key else NO_IMAGE), ""]
        view = self.view(settings, selected)
        jpeg = display_picture(analysis, view, self.class_names, narrow)
        return [self._picture(key, analysis, view, jpeg), self._table(analysis, view)]

    def start(self, width: float | None, *settings: Any) -> list[Any]:
        """What a new user sees, on a screen of this width: the first example, if there is one."""
        narrow = (width or math.inf) <= MAX_NARROW
        key = self._example_key(0) if self._examples else None
        return [narrow, *self._open(narrow, key, settings)]

    def choose_example(self, event: gr.EventData, narrow: bool, *settings: Any) -> list[Any]:
        number = event._data.get("number")
        known = isinstance(number, int) and 0 <= number < len(self._examples)
        return self._open(narrow, self._example_key(number) if known else None, settings)

    def open_upload(self, event: gr.EventData, narrow: bool, *settings: Any) -> list[Any]:
        return self._open(narrow, event._data.get("key"), settings)

    def select(
        self,
        event: gr.EventData,
        narrow: bool,
        key: str | None,
        selected: int | None,
        *settings: Any,
    ) -> list[Any]:
        """
        Highlight the object of a row, or the one at a place of the picture; no object if there is
        none, or if it is highlighted already.
        """
        picked, analysis = event._data.get("object"), self.store.get(key)
        if picked is None and analysis is not None:
            x, y = (float(event._data.get(axis, -1)) for axis in "xy")
            picked = object_at(analysis, self.view(settings), x, y)
        selected = picked if isinstance(picked, int) and picked != selected else None
        return [selected, *self.show(narrow, key, selected, *settings)]

    def view(self, settings: Sequence[Any], selected: int | None = None) -> View:
        ranking, *minima = settings
        names = [score.field for score in self.scores]
        return View(ranking, dict(zip(names, map(float, minima))), selected)

    def _open(self, narrow: bool, key: str | None, settings: Sequence[Any]) -> list[Any]:
        return [key, None, *self.show(narrow, key, None, *settings)]

    # ---- what they see

    def _build(
        self, title: str, thumbnails: list[str], max_upload_mb: int, where_it_goes: str
    ) -> gr.Blocks:
        script = resources.files(__package__).joinpath
        with gr.Blocks(title=f"{title} · msrcnn_d2", analytics_enabled=False) as blocks:
            narrow, key, selected = gr.State(), gr.State(), gr.State()
            width = gr.Number(visible=False)  # of the screen
            gr.HTML(
                _render(
                    "header",
                    title=title,
                    class_names=self.class_names,
                    has_mask_scores="mask_scores" in [score.field for score in self.scores],
                ),
                apply_default_css=False,
            )
            with gr.Row(equal_height=False):
                with gr.Column(scale=6, min_width=300):
                    upload = gr.HTML(
                        _render(
                            "upload",
                            max_mb=max_upload_mb,
                            where_it_goes=where_it_goes,
                            examples=thumbnails,
                        ),
                        js_on_load=script("upload.js").read_text(encoding="utf-8"),
                        apply_default_css=False,
                        max_mb=max_upload_mb,
                        max_bytes=max_upload_mb * 1_000_000,
                    )
                    picture = gr.HTML(
                        js_on_load=script("picture.js").read_text(encoding="utf-8"),
                        apply_default_css=False,
                        elem_classes="picture",
                    )
                with gr.Column(scale=5, min_width=300):
                    with gr.Group():
                        ranking = gr.Radio(
                            [(score.title, score.field) for score in self.rankings],
                            value=SCORE_FIELDS[self.analyser.predictor.rank_by],
                            label="Rank by",
                            elem_classes="ranking",
                        )
                        sliders = [
                            gr.Slider(
                                0,
                                1,
                                MIN_CLASS_SCORE if score.field == "scores" else 0,
                                step=0.01,
                                label=f"{score.title[0].upper()}{score.title[1:]} at least",
                            )
                            for score in self.scores
                        ]
                        for slider in sliders:
                            # Users can also type. Gradio would write a file if this were a subclass
                            slider.preprocess = lambda typed: min(max(typed or 0.0, 0.0), 1.0)
                    objects = gr.HTML(
                        js_on_load=script("objects.js").read_text(encoding="utf-8"),
                        apply_default_css=False,
                        elem_classes="objects",
                    )
            settings, seen = [ranking, *sliders], [picture, objects]
            # Nothing can be called by programs; while a picture is drawn the old one stays
            common: dict[str, Any] = {
                "api_visibility": "private",
                "show_progress": "hidden",
                "concurrency_limit": 4,
            }
            opened, changed = [key, selected, *seen], [narrow, key, selected, *settings]
            blocks.load(
                self.start,
                [width, *settings],
                [narrow, *opened],
                js="(_, ...settings) => [window.innerWidth, ...settings]",
                **common,
            )
            upload.uploaded(self.open_upload, [narrow, *settings], opened, **common)
            upload.example(self.choose_example, [narrow, *settings], opened, **common)
            objects.picked(self.select, changed, [selected, *seen], **common)
            picture.pointed(self.select, changed, [selected, *seen], **common)
            triggers = [ranking.change, *(slider.change for slider in sliders)]
            gr.on(triggers, self.show, changed, seen, trigger_mode="always_last", **common)
        return blocks

    def _picture(self, key: str, analysis: Analysis, view: View, jpeg: bytes) -> str:
        count = len(shown(analysis.predictions, view))
        height, width = analysis.size
        return _render(
            "picture",
            jpeg=_base64(jpeg),
            name=analysis.name,
            count=plural(count, "object"),
            total=len(analysis.predictions),
            height=height,
            width=width,
            address=f"images/{key}",
            query=urllib.parse.urlencode({"ranking": view.ranking, **view.minima}),
        )

    def _table(self, analysis: Analysis, view: View) -> str:
        predictions = analysis.predictions
        index = shown(predictions, view)
        other = next((score for score in self.rankings if score.field != view.ranking), None)
        moves = np.zeros(len(index), dtype=int)
        if other:
            by_other = shown(predictions, View(other.field, view.minima)).tolist()
            position = {k: place for place, k in enumerate(by_other)}
            moves = np.array([position[k] - place for place, k in enumerate(index.tolist())], int)
        rows = []
        for k, move in zip(index[:MAX_ROWS].tolist(), moves.tolist()):
            label = int(predictions.pred_classes[k])
            rows.append(
                {
                    "index": k,
                    "move": move,
                    "name": self.class_names[label],
                    "color": ", ".join(map(str, class_color(label))),
                    "selected": k == view.selected,
                    "scores": [
                        {
                            "value": float(predictions.get(x.field)[k]),
                            "ranks": x.field == view.ranking,
                        }
                        for x in self.scores
                    ],
                }
            )
        return _render(
            "objects",
            rows=rows,
            scores=[{"title": x.title, "ranks": x.field == view.ranking} for x in self.scores],
            other=other.title if other else "",
            more=max(0, len(index) - MAX_ROWS),
            nothing=NOTHING_SHOWN if len(predictions) else NOTHING_FOUND,
        )

    def _example_key(self, number: int) -> str:
        """The key of an example, which is predicted when it is needed."""
        key = self._example_keys.get(number)
        if self.store.get(key) is None:
            path = self._examples[number]
            key = self.store.add(self.analyser.analyse(path.name, path.read_bytes()))
            self._example_keys[number] = key
        assert key is not None
        return key


def _thumbnail(path: Path, settings: ImageSettings) -> str:
    try:
        image = Image.fromarray(read_image(path.read_bytes(), settings))
    except (UserError, OSError) as error:
        raise UserError(f"Example '{path}' cannot be used: {error}") from None
    image.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return _base64(file.getvalue())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _render(template: str, **values: Any) -> str:
    return _templates.get_template(f"{template}.html.jinja").render(values)
