"""Routes for those who look: the live view as data, and the files of the dashboard.

The files hold nothing of this host, so they need no token: the page asks for one. They fetch from nowhere
else, run no script but their own, and may not be put into another site's frame.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from fastapi import Request, Response

from glidefs.api.pools import Pool
from glidefs.api.shared import Shared

Handler = Callable[[Request], Awaitable[Response]]

STATIC = Path(__file__).parent / "static"
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


def looking_routes(
    live: Callable[[], bytes], live_of: Callable[[str], bytes], pool: Pool
) -> tuple[tuple[str, str, Handler], ...]:
    """Method, path and handler of each route. Who asks within a second gets one answer."""
    shared = Shared(partial(pool.run, live))

    async def all_of_them(request: Request) -> Response:
        """GET /api/live."""
        return Response(await shared.get(), media_type="application/json")

    async def one(request: Request) -> Response:
        """GET /api/live/{name}."""
        document = await pool.run(live_of, request.path_params["name"])
        return Response(document, media_type="application/json")

    return (
        ("GET", "/api/live", all_of_them),
        ("GET", "/api/live/{name}", one),
        *(("GET", path, _file(name, kind)) for path, (name, kind) in UI_FILES.items()),
    )


def _file(name: str, kind: str) -> Handler:
    async def send(request: Request) -> Response:
        # Read when it is asked for: most daemons are never looked at, and the files are small.
        data = (STATIC / name).read_bytes()
        return Response(data, headers={**UI_HEADERS, "Content-Type": kind})

    return send
