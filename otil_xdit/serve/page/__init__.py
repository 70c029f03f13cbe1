"""The page at ``/``: plain HTML, CSS and a script, served from the package; it talks to the server's own API."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Response

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' blob: data:",
        "form-action 'none'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
"""Nothing from elsewhere, nothing inline: a prompt that is shown can never become a script."""

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page/script.js": ("script.js", "text/javascript; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""Path, the file in this folder, and its media type."""

HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_router() -> APIRouter:
    """Return the routes of the page and its files; they need no key, as they show nothing but a form."""
    router = APIRouter(include_in_schema=False)
    for path, (name, kind) in FILES.items():
        _add_file(router, path, files(__name__).joinpath(name).read_bytes(), kind)
    return router


def _add_file(router: APIRouter, path: str, content: bytes, kind: str) -> None:
    @router.get(path)
    async def file() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)
