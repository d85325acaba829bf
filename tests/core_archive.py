"""The C core as a static library with a sanitizer, compiled once for all programs that are linked with it.

    python tests/core_archive.py asan|tsan     print the command that compiles and links a program with it

Kept in ``build/core`` by a hash of what it is made of; processes that want the same one wait for the first.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "build" / "core"
FLAGS = ["-std=gnu11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Icsrc"]
FLAGS += ["-fno-omit-frame-pointer", "-fno-strict-aliasing", "-pthread"]
SANITIZERS = {
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-fsanitize=thread"],
}


def compiler(sanitizer: str) -> list[str]:
    """The compiler (the variable CC, or cc) with the flags of all that is linked with ``core_archive``."""
    name, *options = shlex.split(os.environ.get("CC", "cc"))
    # Whatever it is called, one compiler makes one library.
    return [os.path.realpath(shutil.which(name) or name), *options, *FLAGS, *SANITIZERS[sanitizer]]


def link_command(sanitizer: str, program: Path | str, *files: Path | str) -> list[str]:
    """Compiles ``files`` into ``program`` and links it with the core. It is for the project's directory."""
    from glidefs.core.build import LIBRARIES

    archive = str(core_archive(sanitizer))
    libraries = [f"-l{name}" for name in LIBRARIES]
    return [*compiler(sanitizer), "-o", str(program), *map(str, files), archive, *libraries]


def core_archive(sanitizer: str) -> Path:
    """The library; compiled unless it is there. Raises CalledProcessError; stderr has the reason."""
    from glidefs.core.build import sources

    command = compiler(sanitizer)
    archive = PLACE / f"{_hash_of(command)}.a"
    PLACE.mkdir(parents=True, exist_ok=True)
    with (PLACE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not archive.exists():
            work = Path(tempfile.mkdtemp(dir=PLACE))
            try:
                _compile(command, sources(), work)
                (work / "core.a").rename(archive)
            finally:
                shutil.rmtree(work)
    return archive


def _hash_of(command: list[str]) -> str:
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
    made = hashlib.sha256(version + b"\0".join(os.fsencode(part) for part in command))
    for path in sorted((ROOT / "csrc").rglob("*.[chS]")):
        made.update(b"\0%s\0" % os.fsencode(path.relative_to(ROOT)) + path.read_bytes())
    return made.hexdigest()[:32]


def _compile(command: list[str], files: list[str], work: Path) -> None:
    def compile_one(number: int) -> str:
        made = str(work / f"{number}.o")
        subprocess.run([*command, "-c", files[number], "-o", made], cwd=ROOT, check=True)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, range(len(files))))
    subprocess.run(["ar", "crs", str(work / "core.a"), *objects], check=True)


if __name__ == "__main__":
    print(shlex.join(link_command(sys.argv[1], *sys.argv[2:])))
