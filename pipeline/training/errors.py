"""Ends of a training that are not its completion."""


class TrainingStopped(Exception):  # noqa: N818 - an orderly end on request, not an error
    """The training was asked to stop; its checkpoint lets the same job go on."""


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient is not finite. The optimizer step was not taken; the batch is kept in a file."""


class OutOfMemoryError(MemoryError):
    """The device has no room for a training step; the message says which settings to turn."""


class FrozenChangedError(AssertionError):
    """Activations that were frozen are not what they were before the training: a defect, never the user's fault."""
