"""The search page: three files of the package, no others."""

from importlib.resources import files

from fastapi import FastAPI, Response

_FILES = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}


def add_page(app: FastAPI) -> None:
    """Serve the page at ``/`` and what it needs below ``/page``."""
    content = {name: (files("rematch") / "assets/page" / name).read_text() for name in _FILES}

    @app.get("/", include_in_schema=False)
    def index() -> Response:
        return Response(content["index.html"], media_type="text/html")

    @app.get("/page/{name}", include_in_schema=False)
    def part(name: str) -> Response:
        if name not in content:
            return Response("not found", 404)
        return Response(content[name], media_type=_FILES[name])
