"""The one error of this package that a user sees, the warning of the fallback, and what a damaged .npz raises."""

import struct
import zipfile
import zlib

# RuntimeError and NotImplementedError: an entry that claims to be encrypted, or packed in an unknown way.
UNREADABLE_NPZ = (zipfile.BadZipFile, zlib.error, struct.error, ValueError, KeyError, EOFError, OSError, RuntimeError)
"""What numpy and zipfile raise for an archive that is damaged, or none, or holds pickled objects."""


class DataError(ValueError):
    """Data that cannot be used as it is; the message says what was expected, what came and what to do."""


class DataUnreachableError(DataError, OSError):
    """Data that could not be had this time, as when a disk or a network does not answer: another try may have them."""


class FfcvMissingWarning(UserWarning):
    """FFCV is not importable: splits are stored as .npz and read into memory."""
