"""The search page in a real browser."""

import json
import shutil

import pytest
from PIL import Image
from shared_documents import save_pdf, save_video
from shared_search import save_picture
from shared_server import running

from rematch import ReMatch
from rematch.data.corpus import open_corpus
from rematch.encoding.encoder import Encoder
from rematch.search.build import build
from rematch.search.index import Index
from rematch.serve.engine import Engine
from rematch.serve.limits import Limits

CHROMIUM = shutil.which("chromium")
COLOURS = ("red", "green", "blue", "white", "black", "orange", "purple", "brown", "pink", "grey")


@pytest.fixture(scope="module")
def served(saved_model, tmp_path_factory):
    """(address, engine, folder) of a server over ten cards with pictures and one without."""
    folder = tmp_path_factory.mktemp("shop")
    rows = []
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (90, 60), colour).save(folder / f"{colour}.png")
        rows.append(
            {
                "id": f"{colour} card",
                "image": f"{colour}.png",
                "text": f"a {colour} card",
                "year": 2000 + i,
            }
        )
    rows.append({"id": "words", "text": "a card without a picture"})
    (folder / "cards.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = ReMatch(str(saved_model))
    index = Index.create(folder / "cards.idx", model, name=str(saved_model))
    build(index, open_corpus(folder / "cards.jsonl"), Encoder(model, workers=0))
    engine = Engine(str(folder / "cards.idx"))
    with running(engine, Limits(pixels=100_000)) as address:
        yield address, engine, folder


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium; `make test` installs Debian's where it can")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, served):
    """The page; a request to another machine or an error in the console fails the test."""
    page = browser.new_page(viewport={"width": 1000, "height": 800})
    problems = []

    def check_request(request):
        if not request.url.startswith((served[0], "data:", "blob:")):
            problems.append(request.url)

    def check_console(message):
        if message.type == "error" and "status of 4" not in message.text:
            problems.append(message.text)

    page.on("request", check_request)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", check_console)
    page.goto(served[0])
    page.wait_for_function("() => document.querySelectorAll('#examples button').length === 4")
    yield page
    page.close()
    assert not problems


def results(page, status="result"):
    page.wait_for_function(
        f"() => document.getElementById('status').textContent.includes({status!r})"
    )
    page.wait_for_function("() => !document.getElementById('results').classList.contains('busy')")
    return [
        card.get_attribute("aria-label").split(": ", 1)[1]
        for card in page.query_selector_all(".card")
    ]


def test_text_picture_and_both(page, served):
    _, engine, folder = served
    assert "11 documents" in page.inner_text("#about")
    page.fill("#text", "a red card")
    page.keyboard.press("Enter")
    assert results(page) == [hit.text for hit in engine.index.search("a red card", 12)]
    page.wait_for_function(
        "() => [...document.querySelectorAll('.card img')].every((i) => i.complete && "
        "i.naturalWidth)"
    )
    page.fill("#text", "")
    page.set_input_files("#file", folder / "blue.png")
    page.wait_for_function("() => !document.getElementById('thumb').hidden")
    alone = results(page)
    assert alone == [hit.text for hit in engine.index.search({"image": folder / "blue.png"}, 12)]
    page.fill("#text", "a green card")
    page.click("#form button[type=submit]")
    page.wait_for_timeout(300)
    both = results(page)
    assert both == [
        hit.text
        for hit in engine.index.search({"text": "a green card", "image": folder / "blue.png"}, 12)
    ]
    page.click("#clear")
    assert page.is_hidden("#thumb")


def test_reranking_says_what_it_moved(page, served):
    engine = served[1]
    page.fill("#text", "a brown card")
    page.keyboard.press("Enter")
    results(page)
    page.check("#rerank")
    page.wait_for_function(
        "() => document.getElementById('status').textContent.includes('reranking')"
    )
    hits = engine.index.search("a brown card", 12, rerank="raw:12")
    moved = sum(hit.first_rank != place for place, hit in enumerate(hits, 1))
    assert f"reranking moved {moved} of them" in page.inner_text("#status")
    assert results(page) == [hit.text for hit in hits]
    assert len(page.query_selector_all(".moved")) == moved > 0
    assert "P(yes)" in page.inner_text(".card .score >> nth=0")


def test_the_page_reranks_no_more_than_the_server_allows(browser, served):
    for most in (2, 0):
        with running(served[1], most_rerank=most) as address:
            page = browser.new_page()
            page.goto(f"{address}/?q=a+brown+card&rerank=1")
            results(page)
            assert page.inner_text("#status").startswith("11 results"), page.inner_text("#status")
            assert page.is_visible("#rerank") == (most > 0)
            assert page.inner_text("#results").count("P(yes)") == most
            page.close()


def test_filter_no_results_and_errors(page):
    page.fill("#text", "a card")
    page.fill("#filter", "year = 2003")
    page.keyboard.press("Enter")
    assert results(page) == ["a white card"]
    page.fill("#filter", "year = 1900")
    page.keyboard.press("Enter")
    assert results(page, "No document meets the conditions") == []
    page.fill("#filter", "yeer = 1")
    page.keyboard.press("Enter")
    assert results(page, "The columns are id, text, path, year") == []
    assert "error" in page.get_attribute("#status", "class")
    page.fill("#text", "")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "() => document.getElementById('status').textContent.includes('Type a query')"
    )


def test_bad_uploads(page, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    page.set_input_files("#file", tmp_path / "notes.txt")
    page.wait_for_function(
        "() => document.getElementById('status').textContent.includes('is not a picture')"
    )
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    page.set_input_files("#file", tmp_path / "broken.png")
    page.wait_for_function(
        "() => document.getElementById('status').textContent.includes('not a readable picture')"
    )
    save_picture(tmp_path / "large.png", 1, 400)
    page.set_input_files("#file", tmp_path / "large.png")
    page.wait_for_function(
        "() => document.getElementById('status').textContent.includes('400×400')"
    )
    assert "at most 100,000" in page.inner_text("#status")


def test_detail_with_attention_by_keyboard_alone(page, served):
    page.focus("#text")
    page.keyboard.type("a pink card")
    page.keyboard.press("Enter")
    results(page)
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "card":
            break
    page.keyboard.press("Enter")
    page.wait_for_selector("#detail[open]")
    assert page.inner_text("#detail-title") == served[1].index.search("a pink card", 1)[0].id
    page.wait_for_function("() => document.querySelector('#detail-map img').naturalWidth > 0")
    assert len(page.query_selector_all("#token-maps img")) == 4
    assert "year" in page.inner_text("#detail-metadata")
    page.keyboard.press("Escape")
    assert page.is_hidden("#detail")


def test_the_querys_own_attention(page, served):
    page.set_input_files("#file", served[2] / "red.png")
    results(page)
    page.click(".card >> nth=0")
    page.wait_for_function("() => document.querySelector('#query-map img').naturalWidth > 0")
    assert page.is_visible("#query-map")


def test_examples_and_a_phone_in_the_dark(browser, served):
    phone = browser.new_context(
        viewport={"width": 360, "height": 740}, color_scheme="dark", has_touch=True
    )
    page = phone.new_page()
    page.goto(served[0])
    page.wait_for_selector("#examples button")
    page.tap("#examples button >> nth=0")
    assert results(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, (
        "nothing stands out at the side"
    )
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(28, 25, 23)"
    phone.close()


def test_the_page_prompts_for_a_key(browser, served):
    with running(served[1], keys=["secret"]) as address:
        page = browser.new_page()
        page.on("dialog", lambda dialog: dialog.accept("secret"))
        page.goto(address)
        page.wait_for_selector("#examples button")
        page.fill("#text", "a card")
        page.keyboard.press("Enter")
        assert len(results(page)) == 11
        page.close()


MARKUP = (
    "<img src=x onerror=window.ran=1>",
    '"><script>window.ran=1</script>',
    "javascript:window.ran=1",
    "${window.ran=1}`",
    "<svg/onload=window.ran=1>",
    "</span><iframe srcdoc='<script>parent.ran=1</script>'>",
    "<style>*{display:none}</style>",
)


@pytest.fixture(scope="module")
def hostile(saved_model, tmp_path_factory):
    """(address, ids) of a server over documents whose every text is markup."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = []
    for i, markup in enumerate(MARKUP):
        picture = folder / (markup.replace("/", "∕") + ".png")
        Image.new("RGB", (40, 30), COLOURS[i]).save(picture)
        row = {"id": f"{i} {markup}", "image": picture.name, "text": f"{markup} {i}"}
        rows.append(row | {"note": markup, "url": "javascript:window.ran=1"})
    (folder / "hostile.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = ReMatch(str(saved_model))
    index = Index.create(folder / "hostile.idx", model, name=str(saved_model))
    build(index, open_corpus(folder / "hostile.jsonl"), Encoder(model, workers=0))
    with running(Engine(str(folder / "hostile.idx"))) as address:
        yield address, [row["id"] for row in rows]


def test_markup_is_shown_and_never_runs(browser, hostile, tmp_path):
    """Names, captions, metadata, queries and names of uploads are texts to the page."""
    address, ids = hostile
    page = browser.new_page()
    problems, expected = [], []
    page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("framenavigated", lambda frame: expected.append(frame.url))
    page.goto(address)
    page.wait_for_function("() => document.querySelectorAll('#examples button').length === 4")
    for query in (MARKUP[0], MARKUP[1]):
        page.fill("#text", query)
        page.keyboard.press("Enter")
        assert sorted(results(page)) == sorted(f"{m} {i}" for i, m in enumerate(MARKUP))
    for card in range(len(MARKUP)):
        page.click(f".card >> nth={card}")
        page.wait_for_selector("#detail[open]")
        assert page.inner_text("#detail-title") in ids
        assert "javascript:window.ran=1" in page.inner_text("#detail-metadata")
        page.wait_for_function("() => !document.getElementById('detail-status').textContent")
        page.keyboard.press("Escape")
    upload = tmp_path / (MARKUP[0] + ".png")
    Image.new("RGB", (20, 20), "red").save(upload)
    page.set_input_files("#file", upload)
    results(page)
    assert MARKUP[0] in page.inner_text("#hint")
    page.fill("#filter", "<img src=x onerror=window.ran=1>")
    page.keyboard.press("Enter")
    page.wait_for_selector("#status.error")
    inside = "#results script, #results iframe, #results svg, #detail script, [onerror]"
    assert page.query_selector_all("#detail a:not(#source)") == []
    assert page.query_selector_all(inside) == []
    assert page.evaluate("window.ran") is None
    assert {url.split("?")[0] for url in expected} == {f"{address}/"}, "no other page opened"
    assert not [problem for problem in problems if "status of 4" not in problem], problems
    page.close()


def test_the_policy_blocks_inline_code(browser, hostile):
    """If markup did get into the page, its code would not run."""
    address, _ = hostile
    page = browser.new_page()
    messages = []
    page.on("console", lambda message: messages.append(message.text))
    response = page.goto(address)
    policy = response.headers["content-security-policy"]
    assert "unsafe" not in policy
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.ran = 1";
            document.body.append(script);
            const box = document.createElement("div");
            box.innerHTML = ""
                + "<img src=x onerror='window.ran=2'><a href='javascript:window.ran=3'>x";
            document.body.append(box);
            box.querySelector("a").click();
            box.querySelector("img").dispatchEvent(new Event("error"));
        }"""
    )
    page.wait_for_timeout(300)
    assert page.evaluate("window.ran") is None
    assert sum("Content Security Policy" in message for message in messages) >= 3, messages
    page.close()


@pytest.fixture(scope="module")
def library(saved_model, tmp_path_factory):
    """(address, folder) of a server over pictures, a PDF file and a video."""
    folder = tmp_path_factory.mktemp("library")
    for number in range(14):
        save_picture(folder / "photos" / f"{number:02}.png", number)
        text = {"text": f"photo {number}", "place": ("Rome", "O'Hara")[number % 2], "year": 2000}
        (folder / "photos" / f"{number:02}.json").write_text(json.dumps(text))
    save_pdf(folder / "report.pdf", ["A red fox", "Two owls"], "Animals")
    save_video(folder / "clip.mp4", ["red", "blue", "white"])
    model = ReMatch(str(saved_model))
    index = Index.create(folder.parent / "library.idx", model, name=str(saved_model), frames=2)
    corpus = open_corpus(folder, frames=2, segments=2)
    build(index, corpus, Encoder(model, workers=0))
    with running(Engine(index.uri)) as address:
        yield address, folder


@pytest.fixture
def library_page(browser, library):
    page = browser.new_page(viewport={"width": 1000, "height": 800})
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(library[0])
    page.wait_for_function("() => document.querySelectorAll('#examples button').length === 4")
    yield page
    page.close()
    assert not problems


def test_the_address_has_the_query_and_going_back_restores_it(library_page):
    page = library_page
    page.fill("#text", "owls")
    page.select_option("#mode", "text")
    page.keyboard.press("Enter")
    assert results(page, "by words in") == ["Animals, page 2"]
    page.select_option("#facets select[name=place]", label="O'Hara")
    assert results(page, "No document meets the conditions") == []
    assert "facet%3Aplace=" in page.url
    page.go_back()
    assert results(page, "by words in") == ["Animals, page 2"]
    assert page.input_value("#facets select[name=place]") == ""
    page.goto(page.url)
    assert results(page, "by words in") == ["Animals, page 2"]
    assert (page.input_value("#text"), page.input_value("#mode")) == ("owls", "text")


def test_more_results_facets_and_modes(library_page):
    page = library_page
    page.fill("#text", "photo")
    page.keyboard.press("Enter")
    assert len(results(page, "by words and vectors in")) == 12
    page.click("#more")
    assert len(results(page, "18 results")) == 18
    assert page.is_hidden("#more")
    page.select_option("#facets select[name=place]", label="Rome")
    assert len(results(page, "7 results")) == 7
    page.select_option("#mode", "vector")
    results(page, "by vectors in")
    assert "everyday image" in page.get_attribute("#status", "title")


def test_more_like_this(library_page, library):
    page = library_page
    page.fill("#text", "photo 3")
    page.keyboard.press("Enter")
    assert results(page)[0] == "photo 3"
    page.click(".card >> nth=0")
    page.click("#like")
    names = results(page, "like photos/03.png by vectors")
    assert len(names) == 12
    assert "photo 3" not in names
    assert page.is_hidden("#detail")
    page.go_back()
    assert results(page)[0] == "photo 3"


def test_pages_and_videos_are_shown_with_a_link_to_their_place(library_page, library):
    page, (address, folder) = library_page, library
    page.fill("#text", "owls")
    page.keyboard.press("Enter")
    assert results(page)[0] == "Animals, page 2"
    page.click(".card >> nth=0")
    link = page.wait_for_selector("#source:not([hidden])")
    assert link.inner_text() == "Open the file at page 2"
    url = link.get_attribute("href")
    assert url.endswith("#page=2")
    answer = page.request.get(f"{address}/{url.split('#')[0]}")
    assert answer.headers["content-type"] == "application/pdf"
    assert answer.body() == (folder / "report.pdf").read_bytes()
    page.keyboard.press("Escape")
    page.fill("#filter", "id = 'clip.mp4#t=2,4'")
    page.keyboard.press("Enter")
    assert results(page, "1 result") == ["clip.mp4#t=2,4, video from 0:02"]
    page.wait_for_function("() => document.querySelector('.card img')?.naturalWidth")
    page.click(".card >> nth=0")
    link = page.wait_for_selector("#source:not([hidden])")
    assert link.inner_text() == "Play the video from 0:02"
    url = link.get_attribute("href")
    part = page.request.get(f"{address}/{url.split('#')[0]}", headers={"Range": "bytes=0-9"})
    assert (part.status, part.headers["content-type"]) == (206, "video/mp4")
    assert page.request.get(f"{address}/v1/documents/photos%2F03.png/file").status == 404


def test_warnings_are_shown(library_page, library):
    page, (_, folder) = library_page, library
    (folder / "photos" / "00.png").rename(folder / "moved")
    page.fill("#text", "photo 0")
    page.check("#rerank")
    page.keyboard.press("Enter")
    results(page)
    assert "photos/00.png: its picture is missing" in page.inner_text("#warnings")
    (folder / "moved").rename(folder / "photos" / "00.png")
