#!/usr/bin/env python
"""The command `msrcnn-d2 train` as a script, as in Detectron2's projects."""

import sys

from msrcnn_d2_cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("train", sys.argv[1:], prog="train_net.py"))
