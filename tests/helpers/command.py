"""The command `msrcnn-d2`, run in the process of the tests."""

from msrcnn_d2_cli import main


def exit_code(*args: object) -> int:
    """
    Args:
        args: the command, such as "convert", and its arguments.
    """
    try:
        return main([str(a) for a in args])
    except SystemExit as left:
        assert isinstance(left.code, int)
        return left.code
