"""Compiles the C++ kernels on first use, once for each source, compiler and processor.

The result lies in the user's cache under a key of all three, is built under a temporary name and
renamed, so that several processes may start at once. A library of plain C functions, called through
ctypes, builds in seconds and needs neither torch's headers nor its ABI.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from flexbench.cache import cache_directory

log = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
SOURCES = ("scan/scan.cpp", "conv/conv.cpp", "norm/norm.cpp", "rows/rows.cpp", "fuse/fuse.cpp")
HEADERS = ("simd.h",)
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-w")
# Tried in this order: some compilers know neither -march=native nor OpenMP.
TUNING = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ())


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    if named is not None:
        return shutil.which(named)
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def _processor() -> str:
    """What `-march=native` looks at: the processor's model and features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    parts = [(HERE / name).read_bytes() for name in (*SOURCES, *HEADERS)]
    parts += [" ".join(FLAGS).encode(), version, _processor().encode()]
    # A shared OpenMP runtime (below) ties the library to the torch that brings it.
    parts.append(torch.__version__.encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _compile(compiler: str, target: Path) -> None:
    """Compile and link into `target`, with the best flags the compiler accepts.

    Where torch has loaded GNU OpenMP, its runtime is shared by leaving the symbols open at the
    link: two runtimes in one process would be two pools of threads that spin against each other.
    """
    shared = hasattr(ctypes.CDLL(None), "GOMP_parallel") if os.name == "posix" else False
    errors = ""
    for tuning in TUNING:
        objects = []
        for source in SOURCES:
            made = target.with_name(Path(source).stem + ".o")
            command = [compiler, *FLAGS, *tuning, "-c", str(HERE / source), "-o", str(made)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                break
            objects.append(str(made))
        else:
            openmp = ["-fopenmp"] if "-fopenmp" in tuning and not shared else []
            undefined = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
            command = [compiler, "-shared", *objects, *openmp, *undefined, "-o", str(target)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if not result.returncode:
                return
        errors = result.stderr
    raise RuntimeError(f"{compiler} could not build the kernels:\n{errors[-2000:]}")


def _target(compiler: str) -> Path:
    """Where the library lies, whether or not it has been built."""
    return cache_directory() / "kernels" / _key(compiler) / "flexbench_kernels.so"


def _library_path() -> Path:
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler found")
    library = _target(compiler)
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            built = Path(scratch) / library.name
            log.info("compiling the CPU kernels, once, with %s", compiler)
            _compile(compiler, built)
            os.replace(built, library)
    return library


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None (after one warning) where they cannot be built."""
    if os.environ.get("FLEXBENCH_NO_COMPILE"):
        return None
    try:
        return ctypes.CDLL(str(_library_path()))
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        warnings.warn(
            f"flexbench runs its slow reference kernels on the CPU: {reason}; "
            "install a C++ compiler (g++ or clang++) for the fast ones",
            RuntimeWarning,
            stacklevel=2,
        )
        # Worker processes inherit the decision, and so do not warn again.
        os.environ["FLEXBENCH_NO_COMPILE"] = "1"
        return None


def prepare(say: Callable[[str], None]) -> None:
    """Compile now what the first call would; `say` hears of the wait, or why it cannot be done.

    Processes started afterwards inherit the outcome.
    """
    compiler = _compiler()
    if compiler and not os.environ.get("FLEXBENCH_NO_COMPILE") and not _target(compiler).exists():
        say("compiling the CPU kernels, once")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        library()
    for warning in caught:
        say(str(warning.message))


_available: bool | None = None


def compiled() -> bool:
    """Whether the compiled kernels are to be had.

    A trace cannot look, and takes what was found before, or else that they are.
    """
    global _available
    if _available is None and not torch.compiler.is_compiling():
        _available = library() is not None
    return _available is not False
