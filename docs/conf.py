"""
How Sphinx builds these pages: `make docs`. Nothing here needs the network.

Docstrings name classes and functions without their module. Those of this package are looked up
among the documented ones; those of Detectron2 and PyTorch become links to their own pages.
"""

import importlib
import os
import re
from pathlib import Path

from docutils import nodes
from sphinx.util.nodes import make_refnode

import msrcnn_d2
from msrcnn_d2.published_models import published_table

ROOT = Path(__file__).resolve().parents[1]

project = "msrcnn_d2"
author = "the authors of msrcnn_d2"
copyright = "the authors of msrcnn_d2, Apache License 2.0"
version = release = msrcnn_d2.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
default_role = "code"  # docstrings write `name` for code
add_module_names = False
python_use_unqualified_type_names = True

myst_enable_extensions = ["substitution"]
myst_substitutions = {"published_table": published_table()}
myst_heading_anchors = 3
# The language of a block without one: commands, which no lexer has to understand
highlight_language = "none"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# A method without a docstring says what the one that it overrides says; that is others' prose
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
# As a list; without this, each attribute would be described once more at its annotation
napoleon_custom_sections = [("Attributes", "params_style")]

html_theme = "furo"
html_title = "msrcnn_d2"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False

# Types of other packages in signatures: without the network there is no list of where they are
# described. Names in prose are not excused.
nitpick_ignore_regex = [
    (
        "py:class",
        r"(torch|numpy|pycocotools|omegaconf|yacs|fvcore|matplotlib|PIL)\..*",
    ),
    ("py:class", r"(supervision|sahi)\..*"),
    ("py:class", r"(collections|pathlib|argparse|types|os)\..*"),
    ("py:class", r"msrcnn_d2\.config\.Config"),  # a type variable
    ("py:class", r"dict\[int \| float \| str"),  # a type that Sphinx cuts in two
]

DETECTRON2 = "https://detectron2.readthedocs.io/en/latest/modules/"
# Where Detectron2's names are imported from, and the page that describes them
DETECTRON2_PAGES = {
    "detectron2.checkpoint": "checkpoint.html",
    "detectron2.config": "config.html",
    "detectron2.data": "data.html",
    "detectron2.engine": "engine.html",
    "detectron2.evaluation": "evaluation.html",
    "detectron2.layers": "layers.html",
    "detectron2.modeling": "modeling.html",
    "detectron2.modeling.roi_heads": "modeling.html",
    "detectron2.structures": "structures.html",
    "detectron2.utils.visualizer": "utils.html",
}


def detectron2_url(name: str) -> str | None:
    """The page of a class or function of Detectron2, given with or without its module."""
    short = name.rpartition(".")[2]
    for module, page in DETECTRON2_PAGES.items():
        if hasattr(importlib.import_module(module), short):
            return f"{DETECTRON2}{page}#{module}.{short}"
    return None


def resolve(app, env, node, contnode):
    """Find the target of a role that gives a name without its module."""
    if node.get("refdomain") != "py":
        return None
    name = node["reftarget"].lstrip("~.")
    objects = env.domains["py"].objects
    found = [full for full in objects if full == name or full.endswith(f".{name}")]
    if found:
        full = min(found, key=lambda x: (objects[x].aliased, len(x)))
        entry = objects[full]
        return make_refnode(
            app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, full
        )
    url = detectron2_url(name)
    if url is None:
        return None
    return nodes.reference("", "", contnode, internal=False, refuri=url)


# Pages whose text is a file of the repository, which reads well without Sphinx, too
REPOSITORY_PAGES = {
    "benchmarks": ROOT / "benchmarks" / "README.md",
    "changelog": ROOT / "CHANGELOG.md",
    "contributing": ROOT / "CONTRIBUTING.md",
    "projects/nuclei": ROOT / "projects" / "nuclei" / "README.md",
    "projects/retrofit": ROOT / "projects" / "retrofit" / "README.md",
    "projects/seeds": ROOT / "projects" / "seeds" / "README.md",
    "projects/shapes": ROOT / "projects" / "shapes" / "README.md",
}
# ![text](path#anchor) and [text](path#anchor), but no URL
LINK = re.compile(r"(!?)\[([^]]*)\]\((?!\w+://)([^)#\s]*)(#[^)]*|)\)")


def read_from_repository(app, docname, source):
    """Replace stubs by the files that they stand for; links to these files lead to the stubs."""
    docs = Path(app.srcdir)
    page = docs / f"{docname}.md"
    file = REPOSITORY_PAGES.get(docname, page)
    stubs = {path: docs / f"{name}.md" for name, path in REPOSITORY_PAGES.items()}

    def relocated(match):
        image, text, path, anchor = match.groups()
        target = (file.parent / path).resolve() if path else file
        target = stubs.get(target, target)
        if image or docs in target.parents:
            return f"{image}[{text}]({os.path.relpath(target, page.parent)}{anchor})"
        return text  # a file that is not part of the documentation

    app.env.note_dependency(str(file))
    source[0] = LINK.sub(relocated, file.read_text())


def without_types(app, what, name, obj, options, lines):
    """Types are in the annotations; a colon in Returns or in a property's text ends none."""
    if what in ("property", "attribute") and lines:
        lines[0] = f": {lines[0]}"
    for i, line in enumerate(lines[:-1]):
        if line.strip() == "Returns:":
            text = lines[i + 1].lstrip()
            lines[i + 1] = lines[i + 1].replace(text, f": {text}", 1)


def without_objects(app, what, name, obj, options, signature, return_annotation):
    """`<function ...>` as a default is no Python, in which Sphinx would shorten the types."""
    return signature and re.sub(r"<.*?>+", "...", signature), return_annotation


def setup(app):
    app.connect("autodoc-process-signature", without_objects)
    app.connect("autodoc-process-docstring", without_types, priority=400)  # before napoleon
    app.connect("missing-reference", resolve)
    app.connect("source-read", read_from_repository)
