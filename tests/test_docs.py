"""What the READMEs refer to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [p for depth in ("*", "*/*", "*/*/*") for p in sorted(ROOT.glob(f"{depth}.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_images_exist(page):
    text = page.read_text()
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing
    assert "@@" not in text  # a gap that was to be filled


def test_there_are_pages():
    assert ROOT / "README.md" in PAGES and ROOT / "projects" / "nuclei" / "README.md" in PAGES
