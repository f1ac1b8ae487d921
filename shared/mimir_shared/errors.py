"""Every error that a user can meet, with the exit code of the program that ends by it.

A message answers five questions in one line: what, where, expected, got, what now.
"""


class MimirError(Exception):
    """An expected failure: shown as one line, without a traceback."""

    exit_code = 2


class InputError(MimirError):
    """Wrong input or settings: the user can mend it."""

    exit_code = 2


class TooManyQuarantinedError(MimirError):
    """More clips were unusable than the stated share allows."""

    exit_code = 3


class CacheError(MimirError):
    """A cache or checkpoint is damaged, or does not match what is asked of it."""

    exit_code = 4


class MachineError(MimirError):
    """The disk, bucket, device or a peer failed: running the same command again is safe."""

    exit_code = 5


class NonFiniteLossError(MimirError):
    """The loss or a gradient is NaN or infinite: stopped before the optimizer step."""

    exit_code = 6
