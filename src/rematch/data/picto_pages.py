"""Picto's pages and clips: small sets of visual documents and of videos, in the forms of MMEB-V2.

A page has a title and a grid of six named emoji of one category. Three pages on each of the twenty
categories make the corpus of two sets: "Which page shows a dog and a cat?", where a page with both
is right and a page with one of them half as right; and "Which pages are about mammals?", where any
page of the right document counts. A clip has four frames of a scene, in which one thing changes.

:func:`picto_v2_tasks` makes the tasks, :func:`export_picto_v2` writes them to disk in the
benchmark's own form, from where they are read like any other set.
"""

import io
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from rematch.data import picto
from rematch.data.mmeb_v2_table import PICTO_VIDEO_SETS, PICTO_VISDOC_SETS, SetV2
from rematch.data.picto import COLOURS, Scene
from rematch.data.schema import Item, RetrievalTask
from rematch.prompts import DOCUMENT_INSTRUCTIONS

WIDTH, HEIGHT = 192, 256  # pixels of a page
PAGES = 3  # on each category
QUERIES = 60
FRAMES = 4  # of a clip
CHANGES = ("replaced", "appears", "disappears", "swap", "background")
_SEED = 20260103
_SETS = {data_set.name: data_set for data_set in (*PICTO_VISDOC_SETS, *PICTO_VIDEO_SETS)}
_PER_PAGE = 6


def picto_v2_tasks(names: Sequence[str], limit: int | None = None) -> list[RetrievalTask]:
    """Make Picto's sets of visual documents and of videos; always the same.

    Args:
        names: Names of the sets.
        limit: Only make this many queries of each, but all documents.
    """
    tasks = []
    for name in names:
        data_set = _SETS[name]
        task = _page_task(data_set) if data_set.modality == "visdoc" else _clip_task(data_set)
        task.queries, task.candidates = task.queries[:limit], task.candidates[:limit]
        task.answers = task.answers[:limit] if task.answers else None
        task.grades = task.grades[:limit] if task.grades else None
        tasks.append(task)
    return tasks


def _empty_task(data_set: SetV2) -> RetrievalTask:
    return RetrievalTask(
        data_set.name,
        data_set.meta_task,
        [],
        [],
        [],
        answers=[],
        metric=data_set.metric,
        modality=data_set.modality,
    )


# ---- pages --------------------------------------------------------------------------------------


def draw_page(title: str, names: Sequence[str], style: str) -> Image.Image:
    """Draw a page: a title, and emoji in two columns with their names below.

    Args:
        title: The title.
        names: Names of up to six objects.
        style: The style of the emoji.
    """
    page = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(page)
    pen.text((WIDTH / 2, 14), title, "black", ImageFont.load_default(18), anchor="mm")
    pen.line((12, 28, WIDTH - 12, 28), "gray")
    for i, name in enumerate(names):
        left, top = 24 + 84 * (i % 2), 32 + 74 * (i // 2)
        sprite = picto.sprite(name, style).resize((58, 58), Image.Resampling.BILINEAR)
        page.paste(sprite, (left, top), sprite)
        place = (left + 29, top + 65)
        pen.text(place, name, "black", ImageFont.load_default(12), anchor="mm")
    return page


def _pages() -> list[tuple[str, list[str]]]:
    """Category and objects of every page."""
    rng = random.Random(_SEED)
    pages = []
    for category in picto.categories():
        members = [name for name, other in picto.objects().items() if other == category]
        for _ in range(PAGES):
            pages.append((category, rng.sample(members, _PER_PAGE)))
    return pages


def _page_task(data_set: SetV2) -> RetrievalTask:
    task = _empty_task(data_set)
    assert task.answers is not None
    task.grades = []
    pages = _pages()
    rng = random.Random(f"{_SEED}/{data_set.name}")
    for i, (category, names) in enumerate(pages):
        number = i % PAGES + 1
        title = f"{category.capitalize()}s, page {number}"
        picture = draw_page(title, names, rng.choice(picto.TRAIN_STYLES))
        key = f"{category.replace(' ', '-')}.pdf#page={number}"
        task.documents.append(Item("", picture, data_set.document_instruction, key))
    by_document = data_set.name.endswith("-doc")
    categories = picto.categories()
    for i in range(len(categories) if by_document else QUERIES):
        if by_document:
            text = f"Which pages are about {categories[i]}s?"
            grades = {j: 1.0 for j, (category, _) in enumerate(pages) if category == categories[i]}
        else:
            first, second = rng.sample(pages[i % len(pages)][1], 2)
            text = (
                f"Which page shows {picto.with_article(first)} and {picto.with_article(second)}?"
            )
            counts = [(first in names) + (second in names) for _, names in pages]
            grades = {j: float(count) for j, count in enumerate(counts) if count}
        task.queries.append(Item(text, None, data_set.instruction, f"q{i}"))
        task.answers.append(list(grades))
        task.grades.append(list(grades.values()))
    return task


# ---- clips --------------------------------------------------------------------------------------


def _change(scene: Scene, change: str, rng: random.Random) -> tuple[Scene, str, str]:
    """A scene after a change, a phrase that describes it, and the object or colour that it is
    about.
    """
    cells = list(scene.cells)
    first, second = (i for i, name in enumerate(cells) if name)
    free = [i for i, name in enumerate(cells) if not name]
    new = rng.choice([name for name in picto.objects() if name not in cells])
    if change == "background":
        colour = rng.choice([c for c in COLOURS if c != scene.background])
        return replace(scene, background=colour), f"the background turns {colour}", colour
    if change == "appears":
        cells[rng.choice(free)] = answer = new
        phrase = f"{picto.with_article(new)} appears"
    elif change == "disappears":
        answer, cells[first] = cells[first], ""
        phrase = f"the {answer} disappears"
    elif change == "swap":
        answer = cells[second]
        cells[first], cells[second] = cells[second], cells[first]
        phrase = f"the {cells[second]} and the {answer} swap places"
    else:
        phrase = f"the {cells[first]} turns into {picto.with_article(new)}"
        cells[first] = answer = new
    a, b, c, d = cells
    return Scene((a, b, c, d), scene.background), phrase, answer


def _clip(rng: random.Random, change: str) -> tuple[list[Image.Image], str, str, Scene]:
    """Frames of a clip, its caption, what the change is about, and its first scene."""
    before = picto.sample_scene(rng, held_out=True, count=2, distinct=True)
    after, phrase, answer = _change(before, change, rng)
    style, seed, cut = rng.choice(picto.TRAIN_STYLES), rng.getrandbits(32), rng.randint(1, 3)
    frames = [picto.render(before if i < cut else after, style, seed + i) for i in range(FRAMES)]
    return frames, f"{picto.caption(before)}; then {phrase}", answer, before


def _clip_task(data_set: SetV2) -> RetrievalTask:
    task = _empty_task(data_set)
    assert task.answers is not None
    rng = random.Random(f"{_SEED}/{data_set.name}")
    texts: dict[str, int] = {}

    def text(kind: str, content: str) -> int:
        if content not in texts:
            texts[content] = len(task.documents)
            item = Item(content, None, DOCUMENT_INSTRUCTIONS[kind], content)
            task.documents.append(item)
        return texts[content]

    for i in range(QUERIES):
        changes = CHANGES[:2] if data_set.form == "options" else CHANGES
        change = changes[i % len(changes)]
        frames, caption, answer, scene = _clip(rng, change)
        name = f"clip{i:03}"
        if data_set.form == "captions":
            task.answers.append([len(task.documents)])
            task.documents.append(Item("", frames, data_set.document_instruction, name))
            task.queries.append(Item(caption, None, data_set.instruction, name))
            continue
        query = Item("", frames, data_set.instruction, name)
        if data_set.form == "labels":
            task.answers.append([text("label", change)])
        else:
            others = [n for n in picto.objects() if n != answer and n not in scene.objects]
            options = [answer, *scene.objects, *rng.sample(others, 2)]
            rng.shuffle(options)
            listed = [f"({letter}) {o}" for letter, o in zip("ABCDE", options, strict=True)]
            question = "What is new at the end?"
            query = replace(query, text="\n".join([question, "Options:", *listed]))
            numbers = [text("answer", option) for option in listed]
            right = numbers[options.index(answer)]
            task.answers.append([right])
            task.candidates.append([right, *(n for n in numbers if n != right)])
        task.queries.append(query)
    return task


# ---- on disk ------------------------------------------------------------------------------------


def export_picto_v2(directory: Path) -> None:
    """Write all sets into a folder in the forms of MMEB-V2.

    Pages: ``visdoc-tasks/NAME/{queries,corpus,qrels}/test-*.parquet``. Clips:
    ``video-tasks/NAME/test.jsonl`` and ``video-tasks/frames/…/NAME/CLIP/*.png``.

    Args:
        directory: The folder.
    """
    for task in picto_v2_tasks(list(_SETS)):
        data_set = _SETS[task.name]
        folder = directory / f"{data_set.modality}-tasks" / task.name
        if data_set.modality == "visdoc":
            _write_pages(folder, task)
        else:
            _write_clips(directory / "video-tasks", folder, data_set, task)


def _write_pages(folder: Path, task: RetrievalTask) -> None:
    assert task.answers is not None
    tables = {
        "queries": [{"query-id": q.key, "query": q.text} for q in task.queries],
        "corpus": [
            {"corpus-id": page.key, "image": {"bytes": _png(page.image), "path": f"{i}.png"}}
            for i, page in enumerate(task.documents)
        ],
        "qrels": [
            {"query-id": query.key, "corpus-id": task.documents[j].key, "score": int(grade)}
            for i, query in enumerate(task.queries)
            for j, grade in zip(task.answers[i], task.relevance(i), strict=True)
        ],
    }
    for config, rows in tables.items():
        (folder / config).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / config / "test-00000-of-00001.parquet")


def _png(image: object) -> bytes:
    assert isinstance(image, Image.Image)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _write_clips(root: Path, folder: Path, data_set: SetV2, task: RetrievalTask) -> None:
    assert task.answers is not None
    rows: list[dict[str, object]] = []
    video, text = data_set.columns
    for i, query in enumerate(task.queries):
        answer = task.documents[task.answers[i][0]]
        clip = answer if data_set.form == "captions" else query
        for number, frame in enumerate(clip.image if isinstance(clip.image, list) else ()):
            place = root / "frames" / data_set.frames / query.key
            place.mkdir(parents=True, exist_ok=True)
            assert isinstance(frame, Image.Image)
            frame.save(place / f"{number}.png")
        row: dict[str, object] = {video: query.key, text: query.text}
        if data_set.form == "labels":
            row[text] = answer.text
        elif data_set.form == "options":
            question, _, *options = query.text.split("\n")
            bare = [option[4:] for option in options]
            row |= {text: question, "candidates": bare, "answer": answer.text[4:]}
        rows.append(row)
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
