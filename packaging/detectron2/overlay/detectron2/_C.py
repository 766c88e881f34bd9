"""Takes the place of Detectron2's compiled module in this pure-Python build.

Without it `import detectron2.layers` fails, although RoIAlign and NMS come from torchvision.
"""


class MissingOperatorError(ImportError):
    """Raised for an operator that only a compiled Detectron2 has.

    It is an ImportError, so that `from detectron2._C import name` fails as it does where there
    is no compiled module, and callers fall back as they do there.
    """


def __getattr__(name: str):
    # Python looks up names such as __path__ by itself and expects an AttributeError.
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    raise MissingOperatorError(
        f"{__name__}.{name} is a compiled operator, which this pure-Python build of Detectron2 "
        "lacks; to use rotated boxes or the C++ COCO evaluation, install Detectron2 from its "
        "sources instead.",
        name=__name__,
    )


# detectron2.utils.collect_env prints these three.


def get_compiler_version() -> str:
    return "none (pure-Python build)"


def get_cuda_version() -> str:
    return "none (pure-Python build)"


def has_cuda() -> bool:
    return False
