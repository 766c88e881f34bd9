# PYTHON_ARGCOMPLETE_OK
"""
The command `msrcnn-d2`.

It is a package of its own because importing `msrcnn_d2` imports PyTorch and Detectron2, which takes
seconds, and nobody wants to wait that long for `--help` or for a note about a typo. Modules here
import nothing heavy; their functions do, when they run.

To add a command, write a module with

- a docstring, which becomes the description in `--help`,
- `USAGE`, the arguments in one line, and `EXAMPLES`, in which "{prog}" stands for the command,
- `add_arguments(parser)`,
- `check_arguments(args)`, if some do not go together: it raises :class:`UsageError`,
- `run(args)`, which returns the exit code, or None for 0,

and add a row to `COMMANDS`.
"""

import difflib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import ModuleType

from msrcnn_d2_runtime.errors import UserError

from .parsing import Parser, UsageError

__all__ = ["COMMANDS", "build_parser", "main", "run_command"]

# What the user types, and what `msrcnn-d2 --help` says about it
COMMANDS = {
    "train": "train a model, or evaluate one",
    "predict": "find objects in images, and write pictures, masks and scores of them",
    "evaluate": "measure how well a model detects, and how well it scores its masks",
    "calibrate": "fit scores that say how likely each mask is good, to a trained model",
    "export": "write a model into a file that runs without PyTorch and Detectron2",
    "check-data": "find and fix mistakes in a dataset in COCO's format",
    "convert-data": "convert annotations of LabelMe, Label Studio, YOLO, ... to COCO's format",
    "convert": "convert a checkpoint of another framework to Detectron2's names",
    "report": "write a report about mask scores from predictions in COCO's format",
    "demo": "try a model in the browser",
    "zoo": "list the models that come with msrcnn-d2, and where their weights are",
}

# Packages that are not there where an exported model runs and nobody has installed them
OPTIONAL_FOR_EXPORTED = ("matplotlib", "pycocotools", "tqdm")


def main(argv: Sequence[str] | None = None, prog: str = "msrcnn-d2") -> int:
    """
    Args:
        argv: the command and its arguments, those of the program by default.
        prog: name of the program in help texts.

    Returns:
        the exit code. A mistake of the user raises `SystemExit` with code 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "_ARGCOMPLETE" in os.environ:
        _complete(prog)
    if argv and argv[0] in COMMANDS:
        return run_command(argv[0], argv[1:], f"{prog} {argv[0]}")
    parser = _parser_of_commands(prog)
    if argv and not argv[0].startswith("-"):
        nearest = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        advice = f"did you mean '{nearest[0]}'?" if nearest else f"there are {', '.join(COMMANDS)}."
        parser.fail(f"There is no command '{argv[0]}'; {advice}")
    args, unknown = parser.parse_known_args(argv)
    if args.version:
        print(f"msrcnn-d2 {_version()}")
    elif unknown:
        parser.fail(f"Give the command before its options: {prog} COMMAND {' '.join(unknown)}")
    else:
        parser.print_help()
    return 0 if args.version else 2


def run_command(name: str, argv: Sequence[str], prog: str) -> int:
    """
    Args:
        name: a key of `COMMANDS`.
        argv: the arguments that come after it.
        prog: name of program and command in help texts.

    Returns:
        the exit code; see :func:`main`.
    """
    command = _module(name)
    parser = build_parser(name, prog)
    args = parser.parse(argv)
    try:
        if hasattr(command, "check_arguments"):
            command.check_arguments(args)

        code = command.run(args) or 0
        sys.stdout.flush()  # now, while an error can be handled
        return code
    except UsageError as error:
        parser.fail(str(error))
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # torchrun starts several of us
            parser.fail(str(error))
        sys.exit(2)
    except ModuleNotFoundError as error:
        if error.name in ("detectron2", "cv2"):
            parser.fail(str(error))  # ours, which says how to install it
        package = str(error.name).partition(".")[0]
        if package in OPTIONAL_FOR_EXPORTED:
            parser.fail(f"{package} is not installed: run `pip install {package}`.")
        raise
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader has seen enough, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 128 + signal.SIGPIPE


def build_parser(name: str, prog: str | None = None) -> Parser:
    """
    Args:
        name: a key of `COMMANDS`.
        prog: as in :func:`run_command`.
    """
    command = _module(name)
    prog = prog or f"msrcnn-d2 {name}"
    examples = command.EXAMPLES.replace("{prog}", prog)
    if prog.endswith(".py"):  # torchrun starts scripts with Python
        examples = examples.replace("--no-python ", "")
    parser = Parser(
        prog=prog,
        usage=f"{prog} {command.USAGE}",
        description=command.__doc__,
        epilog=f"examples:{examples}",
    )
    command.add_arguments(parser)
    return parser


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def _parser_of_commands(prog: str) -> Parser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    parser = Parser(
        prog=prog,
        usage=f"{prog} COMMAND ...",
        description="\n".join(
            [
                "Mask Scoring R-CNN for Detectron2: masks ranked by how good they are.",
                *("", "commands:", *lines, ""),
                f"{prog} COMMAND --help explains a command, with examples.",
            ]
        ),
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    return parser


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("msrcnn-d2")
    except metadata.PackageNotFoundError:  # in a checkout that is not installed
        from msrcnn_d2 import __version__

        return __version__


def _complete(prog: str) -> None:
    """Print what may come next, for the completion of the shell."""
    import argparse

    try:
        import argcomplete
    except ModuleNotFoundError:  # the shell asks any command, whether or not it can complete
        return
    parser = argparse.ArgumentParser(prog=prog)
    commands = parser.add_subparsers()
    for name in COMMANDS:
        _module(name).add_arguments(commands.add_parser(name))
    argcomplete.autocomplete(parser)
