"""Write docs/openapi.json, the API of `rematch serve INDEX`; a test compares it with the
application.
"""

import tempfile
from pathlib import Path

from rematch.files import write_json
from rematch.model import ReMatch
from rematch.search.index import Index
from rematch.serve.app import create_app
from rematch.serve.engine import Engine

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        Index.create(Path(folder) / "index", ReMatch("rematch-tiny"), name="rematch-tiny")
        app = create_app(Engine(str(Path(folder) / "index")))
        write_json(Path(__file__).parents[1] / "docs/openapi.json", app.openapi())
