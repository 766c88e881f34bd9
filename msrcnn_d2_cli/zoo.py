"""
List the models that come with msrcnn-d2, and the AP on COCO val2017 that was published for them.

With a name it prints where the model's config is, where its weights are published, and where they
are kept once they have been downloaded.
"""

import argparse
import os

from .parsing import UsageError

USAGE = "[NAME | --markdown]"
EXAMPLES = """
  all models:
    {prog}
  one of them:
    {prog} ms_rcnn_R_50_FPN_1x
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", help="name of a model")
    parser.add_argument(
        "--markdown", action="store_true", help="print the published models as Markdown"
    )


def check_arguments(args: argparse.Namespace) -> None:
    if args.markdown and args.name:
        raise UsageError("Give NAME or --markdown, not both.")


def run(args: argparse.Namespace) -> None:
    from msrcnn_d2.published_models import published_table

    if args.markdown:
        print(published_table())
    elif args.name:
        print(place_of(args.name))
    else:
        print(table())


def table() -> str:
    """A line for each model; its config may be .py or .yaml."""
    from tabulate import tabulate

    from msrcnn_d2.model_zoo import config_names
    from msrcnn_d2.published_models import PUBLISHED

    headers = ["name", "backbone", "schedule", "box AP", "mask AP", "GB", "images/s", "weights"]
    rows = []
    for name in dict.fromkeys(os.path.splitext(os.path.basename(x))[0] for x in config_names()):
        *backbone, schedule = name.removeprefix("ms_rcnn_").split("_")
        row = [name, "-".join(backbone), schedule]
        published = PUBLISHED.get(name)
        if published:
            numbers = [published.box_ap, published.mask_ap, published.memory, published.speed]
            row += [*("" if x is None else f"{x:.1f}" for x in numbers), "published"]
        rows.append(row)
    align = ("left",) * 3 + ("right",) * 4 + ("left",)
    return tabulate(rows, headers, colalign=align, disable_numparse=True) + (
        "\n\nGB: memory of a GPU that trains 2 images per iteration. images/s: inference on a V100."
        "\nAll numbers are those that the authors of the weights have published."
    )


def place_of(name: str) -> str:
    """Where config and weights of a model are."""
    from msrcnn_d2.checkpoint.fetching import path_in_cache
    from msrcnn_d2.model_zoo import config_names, get_config_file
    from msrcnn_d2.published_models import published_results

    stem = os.path.basename(name.removesuffix(".py").removesuffix(".yaml"))
    twins = [x for x in config_names() if os.path.splitext(os.path.basename(x))[0] == stem]
    lines = [f"config   {get_config_file(x)}" for x in twins or [name]]
    published = published_results(name)
    if published is None:
        return "\n".join([*lines, "weights  none are published"])
    kept = path_in_cache(published.checkpoint_url)
    state = "downloaded" if os.path.isfile(kept) else "not downloaded yet"
    lines += [f"weights  {published.checkpoint_url}", f"file     {kept} ({state})"]
    return "\n".join(lines)
