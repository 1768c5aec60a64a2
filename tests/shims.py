"""Libraries that stand between a daemon and the C library, to let calls fail that nothing else makes fail."""

import shutil
import subprocess
from pathlib import Path

import pytest


def shim(folder: Path, source: str) -> Path:
    """Build a library for LD_PRELOAD from C source; skip where nothing can build it."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here to build what stands before the C library")
    written, library = folder / "shim.c", folder / "shim.so"
    written.write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, written, "-ldl"], check=True)
    return library
