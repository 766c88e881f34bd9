"""
Try a model in the browser: drop an image, see its objects with their scores, move thresholds, and
see how the order changes with the score that they are ranked by.

Without arguments, this shows the small model of drawn shapes that comes with msrcnn-d2. The page is
for this computer only, unless --host or --share say otherwise. Ctrl-C ends it.
"""

import argparse

from .parsing import UsageError, add_predictor_arguments, at_least, predictor_from

USAGE = "[--model MODEL] [options]"
EXAMPLES = """
  the model that comes with msrcnn-d2:
    {prog}
  a model of yours, with images of yours as examples:
    {prog} --model output/model_final.pth --examples photos/a.jpg photos/b.jpg
  for everyone in the network who knows the address:
    {prog} --model model.onnx --host 0.0.0.0 --port 8000
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_predictor_arguments(parser)
    group = parser.add_argument_group("page")
    group.add_argument(
        "--host",
        default="127.0.0.1",
        help="address of this machine to answer at; 0.0.0.0 lets other computers see the page "
        "(default: 127.0.0.1, this computer only)",
    )
    group.add_argument(
        "--port",
        type=at_least(0),
        default=7860,
        metavar="N",
        help="port to answer at; 0 for any that is free (default: 7860)",
    )
    group.add_argument(
        "--share",
        action="store_true",
        help="make a public address, which leads here through servers of Gradio: everyone who "
        "knows it can use the page. Gradio downloads a program for this",
    )
    group.add_argument(
        "--max-upload-mb",
        type=at_least(1),
        default=20,
        metavar="N",
        help="largest file to upload (default: 20)",
    )
    group.add_argument(
        "--examples",
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="images that users can choose (default: drawn shapes, for the model of these)",
    )


def check_arguments(args: argparse.Namespace) -> None:
    if args.port > 65535:
        raise UsageError(f"--port needs a number from 0 to 65535, not {args.port}.")


def run(args: argparse.Namespace) -> int:
    from importlib import resources
    from pathlib import Path

    from msrcnn_d2_runtime.errors import UserError

    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError(
            "The page needs Gradio, which is not installed: run `pip install "
            '"msrcnn-d2[web]"`, or `pip install ".[web]"` in the repository.'
        ) from None
    from msrcnn_d2_web.server import address_of, build_app, listen, serve, share

    examples = [Path(x) for x in args.examples]
    for path in examples:
        if not path.is_file():
            raise UserError(f"Example '{path}' does not exist: give the paths of images.")
    # Before the model, which takes longer
    listener = listen(args.host, args.port)
    public_address = share(listener) if args.share else None
    if args.model in (None, "demo") and not (args.config_file or args.weights):
        from msrcnn_d2.prediction.loading import demo_model

        args.model = demo_model()  # not by its name, which a folder here may have too
        title = "Mask Scoring R-CNN on drawn shapes"
        folder = Path(str(resources.files("msrcnn_d2_web").joinpath("examples")))
        examples = examples or sorted(folder.glob("*.jpg"))
    else:
        title = Path(args.model or args.weights or args.config_file).absolute().name
    is_local = args.host in ("127.0.0.1", "localhost", "::1") and not args.share
    app = build_app(
        predictor_from(args),
        title=title,
        examples=examples,
        max_upload_mb=args.max_upload_mb,
        where_it_goes="it stays on this computer" if is_local else "it is kept in memory only",
    )
    print(f"The page is at {address_of(listener)} (Ctrl-C ends it)", flush=True)
    if public_address:
        print(f"and for everyone at {public_address}", flush=True)
    try:
        serve(app, listener)
    except KeyboardInterrupt:  # how it is meant to end
        pass
    return 0
