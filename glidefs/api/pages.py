"""Pages for people. Each is one file with all that it needs: no other request, to this host or another."""

from __future__ import annotations

from importlib.resources import files

HEADERS = {
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
