"""The C core as Python sees it: owners with ``close()``, plain numbers in, plain numbers out.

The only package that imports the extension. Names are loaded from their modules
(``from glidefs.core.engine import Engine``) so that tools which need none of the core start fast.
"""
