"""Pages for people: that of the API, one file with all that it needs, and the files of the dashboard.

They hold nothing of this host, so they need no token; the dashboard asks for one. They fetch from nowhere
else, run no script but their own, and may not be put into another site's frame.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

DOCS_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
"""A page may run what is in it, and load and send nothing."""
_PLACE = b"{DOCUMENT}"


def docs(document: bytes) -> bytes:
    """The page about the API, with the OpenAPI document ``document`` (JSON) in it."""
    page = files("glidefs.api").joinpath("static", "docs.html").read_bytes()
    return page.replace(_PLACE, document.replace(b"<", b"\\u003c"))


UI_FILES = {
    "/ui": ("index.html", "text/html; charset=utf-8"),
    "/ui/style.css": ("style.css", "text/css; charset=utf-8"),
    "/ui/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/ui/table.js": ("table.js", "text/javascript; charset=utf-8"),
    "/ui/detail.js": ("detail.js", "text/javascript; charset=utf-8"),
    "/ui/format.js": ("format.js", "text/javascript; charset=utf-8"),
}
"""Path of each file, its name in glidefs/api/static, and its type."""
UI_PATHS = frozenset(UI_FILES)
UI_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def ui_files() -> Iterator[tuple[str, Callable[[Request], Awaitable[Response]]]]:
    """Path of each file of the dashboard, and what answers it."""
    for path, (name, kind) in UI_FILES.items():
        yield path, _file(name, kind)


def _file(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def send(request: Request) -> Response:
        # Read when it is asked for: most daemons are never looked at, and the files are small.
        data = files("glidefs.api").joinpath("static", name).read_bytes()
        return Response(data, headers={**UI_HEADERS, "Content-Type": kind})

    return send
