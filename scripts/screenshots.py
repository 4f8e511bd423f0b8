"""Take the screenshots in docs/images: the search page with Picto scenes, in Debian's Chromium."""

import json
import random
import shutil
import tempfile
import threading
import time
from pathlib import Path

import uvicorn
from PIL import Image
from playwright.sync_api import sync_playwright

from rematch.data import picto
from rematch.data.corpus import open_corpus
from rematch.encoding.encoder import Encoder
from rematch.model import ReMatch
from rematch.search.build import build
from rematch.search.index import Index
from rematch.serve.app import create_app
from rematch.serve.engine import Engine

if __name__ == "__main__":
    images = Path(__file__).parents[1] / "docs/images"
    images.mkdir(exist_ok=True)
    rng = random.Random(4)
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        rows, captions = [], []
        for i in range(150):
            scene = picto.sample_scene(rng, held_out=True)
            captions.append(picto.caption(scene))
            picto.render(scene, "noto", i).resize((288, 288), Image.Resampling.LANCZOS).save(
                folder / f"{i:03}.png"
            )
            rows.append(
                {"id": f"scene {i:03}", "image": f"{i:03}.png", "objects": len(scene.objects)}
            )
        (folder / "scenes.jsonl").write_text("\n".join(map(json.dumps, rows)))
        model = ReMatch("rematch-tiny")
        index = Index.create(folder / "index", model, name="rematch-tiny")
        build(index, open_corpus(folder / "scenes.jsonl"), Encoder(model))
        server = uvicorn.Server(
            uvicorn.Config(create_app(Engine(str(folder / "index"))), port=0, log_level="warning")
        )
        threading.Thread(target=server.run, daemon=True).start()
        while not server.started:
            time.sleep(0.05)
        address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        # a query whose answer is in the index and is found
        query = next(
            caption
            for caption, row in zip(captions, rows, strict=True)
            if row["objects"] == 2 and index.search(caption, 1)[0].id == row["id"]
        )
        page = browser.new_page(viewport={"width": 1000, "height": 700})
        page.goto(address)
        page.fill("#text", query)
        page.click("#form button[type=submit]")
        page.wait_for_timeout(2000)
        page.screenshot(path=images / "search-page.png")
        page.click(".card >> nth=0")
        page.wait_for_timeout(2000)
        page.screenshot(path=images / "search-detail.png")
        phone = browser.new_context(
            viewport={"width": 380, "height": 700}, color_scheme="dark"
        ).new_page()
        phone.goto(address)
        phone.set_input_files("#file", folder / "003.png")
        phone.wait_for_timeout(2000)
        phone.screenshot(path=images / "search-phone.png")
        browser.close()
        server.should_exit = True
