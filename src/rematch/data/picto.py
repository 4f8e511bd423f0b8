"""Picto scenes: a few emoji on a 2×2 grid over a coloured background, drawn from a seed, described
in plain English.

A :class:`Scene` is what there is to see; :func:`caption` says it, :func:`render` draws it,
:func:`near_miss` changes exactly one thing. Scenes whose *combination* of objects falls into the
held-out fifth (:func:`is_held_out`) are never shown in training. The art and its licences lie in
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
OOD_STYLE = "fluent"
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
HELD_OUT_SHARE = 5  # one combination in five is kept for the tests

_SPRITE = 64  # pixels of a sprite in the sheets
_COLUMNS = 16


@dataclass(frozen=True)
class Scene:
    """What a picture shows: an object or nothing (``""``) in each of the four cells, and a
    background colour.
    """

    cells: tuple[str, str, str, str]
    background: str

    @property
    def objects(self) -> list[str]:
        """Names of the objects in reading order, repeats included."""
        return [name for name in self.cells if name]


@cache
def _rows() -> dict[str, dict[str, str]]:
    rows = json.loads((files("rematch") / "assets/picto/objects.json").read_text())
    return {row["name"]: row for row in rows}


@cache
def objects() -> dict[str, str]:
    """Every nameable object and its category, in the order of the sprite sheets.

    >>> objects()["dog"]
    'mammal'
    """
    return {name: row["category"] for name, row in _rows().items()}


def categories() -> list[str]:
    """The twenty categories of objects."""
    return list(dict.fromkeys(objects().values()))


def with_article(name: str) -> str:
    """The name of an object as it stands in a sentence.

    >>> with_article("owl"), with_article("dog"), with_article("ufo"), with_article("socks")
    ('an owl', 'a dog', 'a ufo', 'some socks')
    """
    row = _rows().get(name)
    return f"{row['article'] if row else 'an' if name[0] in 'aeiou' else 'a'} {name}"


def caption(scene: Scene) -> str:
    """The scene in one English phrase, which determines it up to the free row or column of one or
    two objects.

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
    """Whether the scene's combination belongs to the tests: its set of objects, or for one kind of
    object the object, its count and the background. Decided by a checksum, so that it is the same
    on every machine.
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
    """Draw a scene.

    Args:
        rng: Source of randomness; the scene follows from its state alone.
        held_out: Draw from the combinations kept for the tests instead of the training ones.
        count: Number of objects (1 to 4); drawn when not given.
        repeats: One object stands in this many cells (0: a fifth of the scenes repeat one by
            chance).
        distinct: All objects differ.
    """
    names, colours = list(objects()), list(COLOURS)
    for _ in range(10_000):
        n = count or rng.choices((1, 2, 3, 4), (1, 4, 3, 3))[0]
        chosen = rng.sample(names, n)
        copies = repeats or (
            rng.randint(2, n) if n > 1 and not distinct and rng.random() < 0.2 else 1
        )
        chosen = [chosen[0]] * copies + chosen[copies:]
        rng.shuffle(chosen)
        cells = ["", "", "", ""]
        for cell, name in zip(rng.choice(_SHAPES[n]), chosen, strict=True):
            cells[cell] = name
        scene = Scene((cells[0], cells[1], cells[2], cells[3]), rng.choice(colours))
        if is_held_out(scene) == held_out:
            return scene
    raise AssertionError("no such scene in 10,000 draws")


CHANGES = ("swap", "object", "count", "colour")


def near_miss(scene: Scene, rng: random.Random, changes: tuple[str, ...] = CHANGES) -> Scene:
    """A scene of the same split that differs in exactly one thing, and therefore in its caption.

    The thing is one of ``changes``: two objects swap places, one object becomes another, one comes
    or goes, the background gets another colour. One that cannot be had is replaced by another of
    the four.
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


def render(scene: Scene, style: str, seed: int, *, augment: bool = False) -> Image.Image:
    """Draw a scene: RGB, 96×96 px, the same for the same arguments.

    Args:
        scene: What to draw.
        style: ``"noto"``, ``"twemoji"`` or ``"fluent"``.
        seed: Decides the small differences of place, size and shade between two drawings of one
            scene.
        augment: Vary the art's colours, shading and tilt strongly, as the training pictures do;
            without it a model learns the two training styles by heart and knows nothing of a
            third.
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
        sprite = _sprites(style)[name]
        if augment:
            sprite = sprite.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
        sprite = sprite.resize((edge, edge), Image.Resampling.BILINEAR)
        if augment:
            sprite = _recolour(sprite, rng)
        x, y = rng.integers(0, CELL - edge + 1, 2)
        canvas.paste(sprite, (cell % 2 * CELL + int(x), cell // 2 * CELL + int(y)), sprite)
    return canvas


def _recolour(sprite: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Mix the colour channels, bend the brightness, shade from top to bottom."""
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
    """One cell of a drawn scene: RGB, 48×48 px."""
    x, y = cell % 2 * CELL, cell // 2 * CELL
    return picture.crop((x, y, x + CELL, y + CELL))


def unique_objects(scene: Scene) -> list[str]:
    """Objects that stand in exactly one cell, so that "the dog" names a place."""
    return [name for name, n in Counter(scene.objects).items() if n == 1]


def neighbours(scene: Scene) -> list[tuple[str, str, int]]:
    """Every (relation, anchor object, cell) such that "the object <relation> the <anchor>" names
    that cell.

    >>> neighbours(Scene(("dog", "", "pizza", ""), "blue"))
    [('below', 'dog', 2), ('above', 'pizza', 0)]
    """
    unique = unique_objects(scene)
    steps: tuple[tuple[str, int, int], ...] = (
        ("left of", 0, 1),
        ("right of", 1, 0),
        ("left of", 2, 3),
        ("right of", 3, 2),
    )
    steps += (("above", 0, 2), ("below", 2, 0), ("above", 1, 3), ("below", 3, 1))
    found = [
        (relation, scene.cells[anchor], cell)
        for relation, cell, anchor in steps
        if scene.cells[cell] and scene.cells[anchor] in unique
    ]
    return sorted(found, key=lambda item: scene.cells.index(item[1]))
