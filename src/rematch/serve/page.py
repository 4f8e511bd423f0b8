"""The search page: serves exactly three files of the package."""

from importlib.resources import files

from fastapi import FastAPI, Response

_MEDIA_TYPES = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}


def add_page(app: FastAPI, most_rerank: int) -> None:
    """Serve the page at ``/`` and its other files below ``/page``.

    Args:
        app: The application.
        most_rerank: Documents that a stage of a search may rerank; the page asks for no more.
    """
    folder = files("rematch") / "assets/page"
    content = {name: (folder / name).read_text() for name in _MEDIA_TYPES}
    most = f'data-most="{most_rerank}"'
    content["index.html"] = content["index.html"].replace('data-most=""', most)

    @app.get("/", include_in_schema=False)
    def index() -> Response:
        return Response(content["index.html"], media_type="text/html")

    @app.get("/page/{name}", include_in_schema=False)
    def page_file(name: str) -> Response:
        if name not in content:
            return Response("not found", 404)
        return Response(content[name], media_type=_MEDIA_TYPES[name])
