"""The compiled kernels of the gates: built at first use by the machine's own C++ compiler, kept in a cache.

Nothing here runs at import. Where no compiler is found, or SPARTA_KERNEL=off is set, the operators of torch take over,
with the same results; `kernel_status()` says which of the two it is, and why. For a GPU see `gate_triton`.

Cache: $SPARTA_CACHE, else $XDG_CACHE_HOME/sparta, else ~/.cache/sparta. A file's name holds the digest of
sources, torch version, flags, compiler and processor.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

_SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
_HEADERS = sorted(Path(__file__).parent.glob("*.h"))
_FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi")


@cache
def kernel() -> ModuleType | None:
    """Return the namespace of the compiled operators, building them on the first call; None where that can't be."""
    return _state()[0]


@cache
def triton_kernel() -> ModuleType | None:
    """Return the operators for a GPU; None where Triton isn't installed, or with SPARTA_KERNEL=off."""
    if os.environ.get("SPARTA_KERNEL", "auto") == "off":
        return None
    try:
        from sparta_models.kernels import gate_triton
    except ImportError:
        return None
    return gate_triton


def kernel_status() -> str:
    """Say whether the compiled kernel of the CPU is in use, and if not, why."""
    return _state()[1]


@cache
def _state() -> tuple[ModuleType | None, str]:
    if os.environ.get("SPARTA_KERNEL", "auto") == "off":
        return None, "off: SPARTA_KERNEL=off"
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None, "off: no C++ compiler (g++, or $CXX) found"
    try:
        library = _built(compiler)
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    # RuntimeError: there is no home directory for the cache.
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None)
        return None, f"off: {error}" + (f"\n{output.decode(errors='replace')[-2000:]}" if output else "")
    return torch.ops.sparta_models, f"on: {library}"


def cache_root() -> Path:
    """Where this machine keeps what can be made again: SPARTA_CACHE, else `sparta` in the user's cache folder."""
    own = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "sparta"
    return Path(os.environ.get("SPARTA_CACHE") or own).expanduser()


def _built(compiler: str) -> Path:
    directory = cache_root()
    library = directory / f"gate-{_key(compiler)}.so"
    if not library.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "gate.lock").open("w") as lock:
            _wait_for(lock.fileno())
            if not library.exists():
                _compile(compiler, library)
    return library


def _key(compiler: str) -> str:
    version = _run(compiler, "--version")
    code = [path.read_bytes() for path in (*_SOURCES, *_HEADERS)]
    parts = [*code, torch.__version__.encode(), " ".join(_FLAGS).encode(), version, _processor()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> bytes:
    """Name the processor's abilities, because -march=native code of another one may not run here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    return next(
        (line.encode() for line in lines if line.startswith(("flags", "Features"))), platform.machine().encode()
    )


def _wait_for(lock: int) -> None:
    """Let one process of the machine build at a time; the lock goes when its holder ends, however it ends."""
    try:
        import fcntl
    except ImportError:
        # Without locks two processes may both build; each renames a whole file into place.
        return
    fcntl.flock(lock, fcntl.LOCK_EX)


def _compile(compiler: str, library: Path) -> None:
    torch_directory = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent) as temporary:
        out = Path(temporary) / library.name
        paths = [
            f"-I{torch_directory / 'include'}",
            *map(str, _SOURCES),
            "-o",
            str(out),
            f"-L{torch_directory / 'lib'}",
        ]
        _run(compiler, *_FLAGS, *paths, "-lc10", "-ltorch_cpu")
        out.replace(library)


def _run(*command: str) -> bytes:
    return subprocess.run(command, capture_output=True, check=True, timeout=300).stdout  # noqa: S603 (no user input in it)
