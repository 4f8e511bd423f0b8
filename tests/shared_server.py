"""A server over six coloured cards, for tests of the HTTP API."""

import base64
import io
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from PIL import Image

from rematch import ReMatch
from rematch.data.corpus import open_corpus
from rematch.encoding.encoder import Encoder
from rematch.search.build import build
from rematch.search.index import Index
from rematch.serve.app import create_app
from rematch.serve.connections import server_config
from rematch.serve.engine import Engine

COLOURS = ("red", "green", "blue", "white", "black", "orange")
NOISE = Image.effect_noise((60, 40), 80).convert("RGB")


def file_of(picture: Image.Image, picture_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, picture_format)
    return buffer.getvalue()


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def card_engine(model_path: Path, folder: Path) -> Engine:
    """An engine whose index, ``folder / "cards.idx"``, holds a picture of each colour."""
    cards = folder / "cards"
    cards.mkdir()
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (48, 40), colour).save(cards / f"{colour}.png")
        (cards / f"{colour}.json").write_text(
            json.dumps({"text": f"a {colour} card", "year": 2000 + i})
        )
    model = ReMatch(str(model_path))
    path = folder / "cards.idx"
    index = Index.create(path, model, name=str(model_path), tokens=True)
    build(index, open_corpus(cards), Encoder(model, workers=0))
    return Engine(str(path))


@contextmanager
def running(engine: Engine, *arguments, **settings) -> Iterator[str]:
    """The address of a real server in a thread."""
    server = uvicorn.Server(server_config(create_app(engine, *arguments, **settings), port=0))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


def post(url: str, body: dict, seconds: float = 60) -> tuple[int, dict, dict]:
    """(status, headers, content) of a response."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:
            return response.status, dict(response.headers), json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), json.load(error)
