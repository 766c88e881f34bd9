"""`python -m msrcnn_d2_cli`, for where the command `msrcnn-d2` is not on the PATH."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
