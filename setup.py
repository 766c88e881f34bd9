"""What setup.cfg cannot say: a README whose links and pictures work on a package index, too."""

import os
import re
from pathlib import Path

from setuptools import setup

# The address of the repository, such as https://github.com/OWNER/msrcnn_d2; set for a release
REPOSITORY = os.environ.get("MSRCNN_D2_REPOSITORY", "").rstrip("/")
RELATIVE_LINK = re.compile(r"(!?)(\[[^]]*\]\()(?!\w+://|#)")


def absolute(link: re.Match) -> str:
    """A picture needs the file itself, a link the page that shows it."""
    kind = "raw" if link[1] else "blob"
    return f"{link[1]}{link[2]}{REPOSITORY}/{kind}/HEAD/"


readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
setup(long_description=RELATIVE_LINK.sub(absolute, readme) if REPOSITORY else readme)
