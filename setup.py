"""Build of the C core, and the commit it is built from; metadata and settings live in pyproject.toml."""

import subprocess
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
    """The C compiler takes assembly, too; setuptools does not know."""

    def build_extensions(self) -> None:
        self.compiler.src_extensions = [*self.compiler.src_extensions, ".S"]
        super().build_extensions()


bake_commit()
setup(
    cffi_modules=["glidefs/core/build.py:ffi"],
    cmdclass={"build_ext": BuildCore},
    # cffi keeps to what all later versions of Python have, too: one wheel is for all of them.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
