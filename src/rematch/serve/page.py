"""The search page: serves exactly three files of the package."""

from importlib.resources import files

from fastapi import FastAPI, Response

_MEDIA_TYPES = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}


def add_page(app: FastAPI) -> None:
    """Serve the page at ``/`` and its other files below ``/page``."""
    folder = files("rematch") / "assets/page"
    content = {name: (folder / name).read_text() for name in _MEDIA_TYPES}

    @app.get("/", include_in_schema=False)
    def index() -> Response:
        return Response(content["index.html"], media_type="text/html")

    @app.get("/page/{name}", include_in_schema=False)
    def page_file(name: str) -> Response:
        if name not in content:
            return Response("not found", 404)
        return Response(content[name], media_type=_MEDIA_TYPES[name])
