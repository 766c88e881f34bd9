class BuildError(Exception):
    """A reason, in one sentence for the user, why Detectron2 cannot be built."""
