"""The cffi definition of the C core, which ``setup.py`` builds as ``glidefs.core._core`` (API mode).

The declarations are read from the headers ``csrc/glide_*.h`` that are named below, so these stay the
only contract: their constants become ``#define NAME ...``, for the compiler to fill in, and the rest is taken
as it is.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from cffi import FFI

_ROOT = Path(os.path.abspath(__file__)).parents[2]
_SOURCES = _ROOT / "csrc"
LIBRARIES = ["uring", "zstd", "ssl", "crypto"]
"""What the core is linked with."""
_HEADERS = ("glide_core.h", "glide_packs.h", "glide_vhost.h")


def declarations(header: str) -> str:
    """What cffi's parser takes of the text of the header: its only preprocessor lines are constants."""
    text = re.sub(r"/\*.*?\*/", " ", header, flags=re.DOTALL)
    text = re.sub(r"^\s*#\s*define\s+(\w+)\s+\S.*$", r"#define \1 ...", text, flags=re.MULTILINE)
    return re.sub(r"^\s*#\s*(?!define\s+\w+\s+\.\.\.).*$", "", text, flags=re.MULTILINE)


def sources() -> list[str]:
    """The C and assembly files of the core, relative to the project, without the C tests in ``csrc/test``."""
    machine = platform.machine()
    found = [path for path in _SOURCES.rglob("*.c") if path.parent.name != "test"]
    if machine not in ("aarch64", "arm64"):
        found = [path for path in found if not path.name.endswith("_neon.c")]
    if machine == "x86_64":
        found += _SOURCES.rglob("*.S")
    return [os.path.relpath(path, _ROOT) for path in sorted(found)]


ffi = FFI()
for header in _HEADERS:
    ffi.cdef(declarations((_SOURCES / header).read_text(encoding="utf-8")))
ffi.set_source(
    "glidefs.core._core",
    "#include <stdint.h>\n#include <stddef.h>\n#include <stdbool.h>\n#include <sys/types.h>\n"
    + "".join(f'#include "{header}"\n' for header in _HEADERS),
    sources=sources(),
    include_dirs=[os.path.relpath(_SOURCES, _ROOT)],
    depends=[os.path.relpath(path, _ROOT) for path in sorted(_SOURCES.rglob("*.h"))],
    libraries=LIBRARIES,
    define_macros=[("_GNU_SOURCE", "1")],
    extra_compile_args=["-std=gnu11", "-O2", "-g", "-fvisibility=hidden", "-fno-strict-aliasing", "-pthread"],
    extra_link_args=["-pthread"],
)
