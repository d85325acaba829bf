"""Build of the C core, and the commit it is built from; metadata and settings live in pyproject.toml."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def git(*args: str) -> str:
    """What git says of this tree; empty where it is none of git, as in a source archive."""
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def bake_commit() -> None:
    """Write the commit where `glidefs.version` finds it. A source archive keeps that of its making."""
    if git("rev-parse", "--show-toplevel") != str(ROOT):
        return
    commit = git("describe", "--tags", "--always", "--dirty", "--abbrev=12")
    target = ROOT / "glidefs" / "_commit.py"
    text = f'"""Made by setup.py."""\n\nCOMMIT = {commit!r}\n'.replace("'", '"')
    if commit and (not target.exists() or target.read_text() != text):
        target.write_text(text)


class BuildCore(build_ext):
    """The C compiler takes assembly, too, and several files at once; setuptools does not know."""

    def build_extensions(self) -> None:
        self.compiler.src_extensions = [*self.compiler.src_extensions, ".S"]
        compile_all = self.compiler.compile

        def compile_side_by_side(sources: list[str], *args: object, **options: object) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = pool.map(lambda source: compile_all([source], *args, **options), sources)
                return [name for names in made for name in names]

        self.compiler.compile = compile_side_by_side
        super().build_extensions()


bake_commit()
setup(
    cffi_modules=["glidefs/core/build.py:ffi"],
    cmdclass={"build_ext": BuildCore},
    # cffi keeps to what all later versions of Python have, too: one wheel is for all of them.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
