"""The error that users can correct."""

__all__ = ["UserError"]


class UserError(Exception):
    """
    Something outside of the code is wrong: a file, a setting, a machine.

    The message says in a sentence or two what was found, what was expected and what to do.

    Attributes:
        on_all_processes: whether all processes of the job raise it together.
    """

    def __init__(self, message: str, *, on_all_processes: bool = False):
        super().__init__(message)
        self.on_all_processes = on_all_processes
