"""The device guard that tracing CUDA tensors needs; a CPU build of torch has none for CUDA, so one is compiled.

It does nothing: fake tensors (`torch._subclasses.fake_tensor`) have no storage, and no kernel is launched.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

_SOURCE = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace { c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard; }
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
"""

_FLAGS = ("-shared", "-fPIC", "-std=c++20", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}")


def why_no_guard() -> str:
    """Return why CUDA tensors cannot be traced here; empty where they can."""
    if torch.cuda._is_compiled() or shutil.which("g++"):
        return ""
    return "a CPU build of torch needs g++ to trace CUDA tensors"


def load_guard() -> None:
    """Let this process trace CUDA tensors; the library is compiled once a machine and version of torch."""
    if not torch.cuda._is_compiled():
        ctypes.CDLL(str(_library()))


def _library() -> Path:
    folder = Path(tempfile.gettempdir()) / f"otil-xdit-cuda-guard-{os.getuid()}"
    library = folder / f"{torch.__version__}.so"
    if not library.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            source, built = Path(scratch) / "guard.cpp", Path(scratch) / "guard.so"
            source.write_text(_SOURCE)
            includes = [f"-I{path}" for path in include_paths()]
            libraries = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
            command = ["g++", *_FLAGS, *includes, str(source), "-o", str(built), *libraries, "-lc10"]
            subprocess.run(command, check=True)
            os.replace(built, library)  # another process may do the same at this time
    return library
