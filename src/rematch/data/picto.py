"""Picto scenes: up to four emoji on a 2×2 grid over a coloured background, drawn from a seed and
described in plain English.

:func:`caption` describes a :class:`Scene`, :func:`render` draws it, and :func:`near_miss` changes
exactly one property of it. A fifth of the *combinations* of objects is held out
(:func:`is_held_out`): training never shows them. The artwork and its licences are in
``rematch/assets/picto``.
"""

import json
import random
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

import numpy as np
from PIL import Image

SIZE = 96  # pixels of a scene's edge
CELL = SIZE // 2
TRAIN_STYLES = ("noto", "twemoji")
UNSEEN_STYLE = "fluent"  # of queries in the tests; never trained
CELLS = ("top left", "top right", "bottom left", "bottom right")
COLOURS = {
    "red": (222, 92, 92),
    "orange": (244, 166, 84),
    "yellow": (246, 228, 116),
    "green": (122, 194, 116),
    "blue": (104, 152, 228),
    "purple": (166, 118, 208),
    "pink": (248, 176, 206),
    "brown": (158, 116, 86),
    "gray": (150, 150, 154),
    "white": (248, 248, 248),
}
HELD_OUT_SHARE = 5  # one combination in five is held out for validation and test

_SPRITE = 64  # pixels of a sprite in the sheets
_COLUMNS = 16


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        cells: Name of the object in each cell, in the order of :data:`CELLS`; ``""`` if empty.
        background: Name of the background colour.
    """

    cells: tuple[str, str, str, str]
    background: str

    @property
    def objects(self) -> list[str]:
        """Names of the objects in reading order, repeated ones included."""
        return [name for name in self.cells if name]


@cache
def _object_rows() -> dict[str, dict[str, str]]:
    rows = json.loads((files("rematch") / "assets/picto/objects.json").read_text())
    return {row["name"]: row for row in rows}


@cache
def objects() -> dict[str, str]:
    """Return all objects with their categories, in the order of the sprite sheets.

    >>> objects()["dog"]
    'mammal'
    """
    return {name: row["category"] for name, row in _object_rows().items()}


def categories() -> list[str]:
    """Return the twenty categories of objects."""
    return list(dict.fromkeys(objects().values()))


def with_article(name: str) -> str:
    """Return the name of an object or colour with its indefinite article.

    >>> with_article("owl"), with_article("dog"), with_article("ufo"), with_article("socks")
    ('an owl', 'a dog', 'a ufo', 'some socks')
    """
    row = _object_rows().get(name)
    if row:
        return f"{row['article']} {name}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def caption(scene: Scene) -> str:
    """Describe a scene in one English phrase.

    The phrase determines the scene, except that it leaves open the row or column of one or two
    objects.

    >>> caption(Scene(("dog", "", "pizza", ""), "blue"))
    'a dog above a pizza, on a blue background'
    >>> caption(Scene(("dog", "owl", "", "pizza"), "red"))
    'a dog left of an owl, above a pizza on the right, on a red background'
    """
    rows = [[n for n in scene.cells[:2] if n], [n for n in scene.cells[2:] if n]]
    phrases = [" left of ".join(map(with_article, row)) for row in rows if row]
    if len(scene.objects) == 3:
        lone = 0 if len(rows[0]) == 1 else 1
        phrases[lone] += " on the left" if scene.cells[2 * lone] else " on the right"
    separator = ", above " if len(scene.objects) > 2 else " above "
    return f"{separator.join(phrases)}, on {with_article(scene.background)} background"


def is_held_out(scene: Scene) -> bool:
    """Return whether a scene's combination is held out for validation and test.

    The combination is the set of objects; in scenes with one kind of object it is the object, its
    count and the background. A checksum decides, so that the result is the same on every machine.
    """
    kinds = sorted(set(scene.objects))
    key = (
        "|".join(kinds)
        if len(kinds) > 1
        else f"{kinds[0]}|{len(scene.objects)}|{scene.background}"
    )
    return zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0


_SHAPES: dict[int, list[tuple[int, ...]]] = {
    1: [(0,), (1,), (2,), (3,)],
    2: [(0, 1), (2, 3), (0, 2), (1, 3)],  # side by side or one above the other, never diagonal
    3: [(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)],
    4: [(0, 1, 2, 3)],
}


def sample_scene(
    rng: random.Random,
    *,
    held_out: bool = False,
    count: int | None = None,
    repeats: int = 0,
    distinct: bool = False,
) -> Scene:
    """Sample a scene.

    Args:
        rng: Source of randomness; the scene depends on its state alone.
        held_out: Whether to sample from the held-out combinations instead of the training ones.
        count: Number of objects, 1 to 4; sampled by default.
        repeats: Number of cells that one object fills; with 0, a fifth of the scenes repeat an
            object by chance.
        distinct: Whether all objects differ.
    """
    names, colours = list(objects()), list(COLOURS)
    for _ in range(10_000):
        n = count or rng.choices((1, 2, 3, 4), (1, 4, 3, 3))[0]
        sample = rng.sample(names, n)
        copies = repeats or (
            rng.randint(2, n) if n > 1 and not distinct and rng.random() < 0.2 else 1
        )
        sample = [sample[0]] * copies + sample[copies:]
        rng.shuffle(sample)
        cells = ["", "", "", ""]
        for cell, name in zip(rng.choice(_SHAPES[n]), sample, strict=True):
            cells[cell] = name
        scene = Scene((cells[0], cells[1], cells[2], cells[3]), rng.choice(colours))
        if is_held_out(scene) == held_out:
            return scene
    raise AssertionError("no such scene in 10,000 draws")


CHANGES = ("swap", "object", "count", "colour")


def near_miss(scene: Scene, rng: random.Random, changes: tuple[str, ...] = CHANGES) -> Scene:
    """Return a scene with exactly one change, and therefore another caption; it is held out if
    ``scene`` is.

    The change is one of ``changes``: two objects swap places (swap), an object is replaced
    (object), an object is added or removed (count), the background gets another colour (colour).
    If none of them is possible, another of the four is made.
    """
    held_out = is_held_out(scene)
    order = rng.sample(changes, len(changes)) + rng.sample(CHANGES, len(CHANGES))
    for change in order:
        for _ in range(40):
            other = _change(scene, change, rng)
            if other and is_held_out(other) == held_out and caption(other) != caption(scene):
                return other
    raise AssertionError(f"no near-miss for {scene}")


def _change(scene: Scene, change: str, rng: random.Random) -> Scene | None:
    """Make a change to a scene; ``None`` if it is impossible."""
    cells = list(scene.cells)
    filled = [i for i, name in enumerate(cells) if name]
    empty = [i for i, name in enumerate(cells) if not name]
    if change == "colour":
        return replace(scene, background=rng.choice([c for c in COLOURS if c != scene.background]))
    if change == "swap":
        if len(filled) < 2:
            return None
        i, j = rng.sample(filled, 2)
        cells[i], cells[j] = cells[j], cells[i]
    elif change == "object":
        cells[rng.choice(filled)] = rng.choice(list(objects()))
    elif len(filled) > 2 and (not empty or rng.random() < 0.5):
        cells[rng.choice(filled)] = ""
    elif empty and len(filled) >= 2:
        cells[rng.choice(empty)] = rng.choice([cells[filled[0]], rng.choice(list(objects()))])
    else:
        return None
    if tuple(i for i, name in enumerate(cells) if name) not in _SHAPES[4 - cells.count("")]:
        return None
    return Scene((cells[0], cells[1], cells[2], cells[3]), scene.background)


@cache
def _sprites(style: str) -> dict[str, Image.Image]:
    with (files("rematch") / f"assets/picto/{style}.png").open("rb") as file:
        sheet = Image.open(file).convert("RGBA")
    boxes = [(i % _COLUMNS * _SPRITE, i // _COLUMNS * _SPRITE) for i in range(len(objects()))]
    return {
        name: sheet.crop((x, y, x + _SPRITE, y + _SPRITE))
        for name, (x, y) in zip(objects(), boxes, strict=True)
    }


def sprite(name: str, style: str) -> Image.Image:
    """Return the artwork of an object, RGBA, 64×64 px."""
    return _sprites(style)[name]


def render(scene: Scene, style: str, seed: int, *, augment: bool = False) -> Image.Image:
    """Draw a scene as RGB, 96×96 px; equal arguments give equal pictures.

    Args:
        scene: The scene.
        style: ``"noto"``, ``"twemoji"`` or ``"fluent"``.
        seed: Seed of the small variations of place, size and shade between drawings of a scene.
        augment: Whether to vary the colours, shading and tilt of the artwork strongly, as training
            pictures do. Without it, a model memorises the two training styles and does not
            generalise to a third.
    """
    rng = np.random.default_rng(seed)
    shade = rng.normal(0, 8 if augment else 4, 3)
    canvas = Image.new(
        "RGB",
        (SIZE, SIZE),
        tuple(np.clip(np.add(COLOURS[scene.background], shade), 0, 255).astype(int)),
    )
    for cell, name in enumerate(scene.cells):
        if not name:
            continue
        edge = int(rng.integers(34, 47)) if augment else int(rng.integers(40, 47))
        art = sprite(name, style)
        if augment:
            art = art.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
        art = art.resize((edge, edge), Image.Resampling.BILINEAR)
        if augment:
            art = _recolour(art, rng)
        x, y = rng.integers(0, CELL - edge + 1, 2)
        canvas.paste(art, (cell % 2 * CELL + int(x), cell // 2 * CELL + int(y)), art)
    return canvas


def _recolour(sprite: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Mix the colour channels, change the gamma, and shade from top to bottom."""
    pixels = np.asarray(sprite, np.float32) / 255
    rgb = pixels[..., :3]
    mix = np.eye(3) + rng.normal(0, 0.2, (3, 3))
    rgb = rgb @ (mix / np.maximum(mix.sum(0), 0.5)).astype(np.float32)
    if rng.random() < 0.15:
        rgb = np.broadcast_to(rgb.mean(-1, keepdims=True), rgb.shape)
    gamma = np.clip(np.exp(rng.normal(0, 0.35)), 0.4, 2.5)
    slope = 1 + rng.normal(0, 0.25) * np.linspace(-1, 1, len(rgb), dtype=np.float32)[:, None, None]
    rgb = np.clip(np.clip(rgb, 0, 1) ** np.float32(gamma) * slope, 0, 1)
    return Image.fromarray(
        (np.concatenate([rgb, pixels[..., 3:]], -1) * 255).astype(np.uint8), "RGBA"
    )


def crop(picture: Image.Image, cell: int) -> Image.Image:
    """Return a cell of a drawn scene, RGB, 48×48 px."""
    x, y = cell % 2 * CELL, cell // 2 * CELL
    return picture.crop((x, y, x + CELL, y + CELL))


def unique_objects(scene: Scene) -> list[str]:
    """Return the objects that are in exactly one cell, so that "the dog" identifies a cell."""
    return [name for name, n in Counter(scene.objects).items() if n == 1]


def neighbours(scene: Scene) -> list[tuple[str, str, int]]:
    """Return every (relation, anchor, cell) for which "the object <relation> the <anchor>" is the
    object in that cell.

    >>> neighbours(Scene(("dog", "", "pizza", ""), "blue"))
    [('below', 'dog', 2), ('above', 'pizza', 0)]
    """
    unique = unique_objects(scene)
    adjacent_cells = (  # relation, cell, anchor's cell
        ("left of", 0, 1),
        ("right of", 1, 0),
        ("left of", 2, 3),
        ("right of", 3, 2),
        ("above", 0, 2),
        ("below", 2, 0),
        ("above", 1, 3),
        ("below", 3, 1),
    )
    relations = [
        (relation, scene.cells[anchor], cell)
        for relation, cell, anchor in adjacent_cells
        if scene.cells[cell] and scene.cells[anchor] in unique
    ]
    return sorted(relations, key=lambda relation: scene.cells.index(relation[1]))
