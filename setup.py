"""
What setup.cfg cannot say: a README whose links and pictures work on a package index, too, and a
wheel with the demo's model.
"""

import os
import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# The address of the repository, such as https://github.com/OWNER/msrcnn_d2; set for a release
REPOSITORY = os.environ.get("MSRCNN_D2_REPOSITORY", "").rstrip("/")
RELATIVE_LINK = re.compile(r"(!?)(\[[^]]*\]\()(?!\w+://|#)")


def absolute(link: re.Match) -> str:
    """A picture needs the file itself, a link the page that shows it."""
    kind = "raw" if link[1] else "blob"
    return f"{link[1]}{link[2]}{REPOSITORY}/{kind}/HEAD/"


class BuildWithModel(build_py):
    """Copies the demo's model and its config from projects/shapes to msrcnn_d2/shapes."""

    MODEL = ("ms_rcnn_shapes.safetensors", "ms_rcnn_shapes.py", "mask_rcnn_shapes.py")

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # then it is found in the clone
            target = Path(self.build_lib, "msrcnn_d2", "shapes")
            self.mkpath(str(target))
            for name in self.MODEL:
                self.copy_file(f"projects/shapes/{name}", str(target / name))


readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
setup(
    long_description=RELATIVE_LINK.sub(absolute, readme) if REPOSITORY else readme,
    cmdclass={"build_py": BuildWithModel},
)
