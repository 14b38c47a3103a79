"""The one error of this package that a user sees, and the warning of the fallback."""


class DataError(ValueError):
    """Data that cannot be used as it is; the message says what was expected, what came and what to do."""


class FfcvMissingWarning(UserWarning):
    """FFCV is not importable: splits are stored as .npz and read into memory."""
