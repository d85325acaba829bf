"""Build of the C core; metadata and tool settings live in pyproject.toml."""

from setuptools import setup

setup(cffi_modules=["glidefs/core/build.py:ffi"])
