"""Build Picto's sprite sheets from openly licensed emoji art.

    python scripts/build_sprites.py DIR

``DIR`` holds the unpacked npm packages ``emoji-datasource-google``, ``emoji-datasource-twitter``,
``@lobehub/fluent-emoji-3d`` and ``emojibase-data`` (``npm install --prefix DIR NAME…`` puts them
in ``DIR/node_modules``). The result is one 64-pixel sprite sheet per style and ``objects.json``
(names and categories in sheet order), written to ``src/rematch/assets/picto``.
"""

import json
import sys
from pathlib import Path

from PIL import Image

SIZE, COLUMNS = 64, 16
OUT = Path(__file__).parents[1] / "src" / "rematch" / "assets" / "picto"
STYLES = {
    "noto": "emoji-datasource-google/img/google/64/{code}.png",
    "twemoji": "emoji-datasource-twitter/img/twitter/64/{code}.png",
    "fluent": "@lobehub/fluent-emoji-3d/assets/{code}.webp",
}

# category: emojibase labels, each "label", or "label=name" where a plainer word exists.
OBJECTS = {
    "mammal": (
        "dog face=dog, cat face=cat, lion, horse face=horse, pig face=pig, mouse face=mouse, "
        "fox, panda, elephant, zebra"
    ),
    "bird": "rooster, penguin, eagle, duck, swan, owl, flamingo, peacock, parrot, turkey",
    "reptile": "frog, crocodile, turtle, lizard, snake, T-Rex=dinosaur",
    "sea animal": "whale, dolphin, fish, shark, octopus, crab, lobster, shrimp, squid, seal",
    "insect": (
        "snail, butterfly, ant, honeybee=bee, lady beetle=ladybug, cricket, mosquito, worm, "
        "scorpion"
    ),
    "plant": (
        "rose, sunflower, tulip, palm tree=palm, cactus, mushroom, maple leaf=leaf, "
        "four leaf clover=clover, evergreen tree=pine, lotus"
    ),
    "fruit": (
        "grapes, melon, watermelon, lemon, banana, pineapple, red apple=apple, pear, cherries, "
        "strawberry, kiwi fruit=kiwi, coconut"
    ),
    "vegetable": (
        "tomato, avocado, eggplant, potato, carrot, ear of corn=corn, cucumber, broccoli, "
        "garlic, onion"
    ),
    "meal": (
        "bread, croissant, pretzel, pancakes, cheese wedge=cheese, bacon, hamburger=burger, "
        "french fries=fries, pizza, taco, popcorn, sushi, spaghetti"
    ),
    "dessert": (
        "ice cream, doughnut=donut, cookie, birthday cake=cake, cupcake, pie, "
        "chocolate bar=chocolate, candy, lollipop, custard"
    ),
    "drink": (
        "baby bottle=bottle, glass of milk=milk, hot beverage=coffee, teapot, wine glass=wine, "
        "cocktail glass=cocktail, beer mug=beer, beverage box=juice, bubble tea"
    ),
    "vehicle": (
        "locomotive, bus, ambulance, taxi, tractor, motor scooter=scooter, bicycle, sailboat, "
        "ship, helicopter, rocket, flying saucer=ufo"
    ),
    "building": (
        "house, hospital, bank, school, castle, church, mosque, tent, ferris wheel, fountain"
    ),
    "sports gear": (
        "soccer ball, baseball, basketball, american football=football, bowling=bowling pins, "
        "badminton=racket, boxing glove, fishing pole, sled, trophy"
    ),
    "toy": (
        "yo-yo, kite, crystal ball, magic wand, game die=dice, puzzle piece, teddy bear, "
        "balloon, video game=gamepad, bullseye=target"
    ),
    "clothing": (
        "glasses, necktie=tie, t-shirt=shirt, jeans, scarf, gloves, socks, dress, backpack, "
        "high-heeled shoe=heel, crown, top hat"
    ),
    "instrument": (
        "saxophone, trumpet, accordion, guitar, musical keyboard=piano, violin, banjo, drum, "
        "maracas, flute"
    ),
    "device": (
        "microphone, headphone=headphones, mobile phone=phone, battery, laptop, camera, "
        "light bulb, flashlight, alarm clock, microscope, telescope"
    ),
    "tool": (
        "hammer, axe, carpentry saw=saw, wrench, screwdriver, magnet, ladder, key, "
        "bow and arrow=bow, paperclip, scissors, locked=lock"
    ),
    "household item": (
        "door, mirror, chair, toilet, bathtub, broom, basket, bucket, toothbrush, spoon, "
        "shopping cart, umbrella, luggage=suitcase, bell, candle"
    ),
}
# Mass nouns and pairs take "some".
SOME = (
    "bacon, beer, bread, broccoli, candy, cheese, chocolate, coffee, corn, garlic, juice, milk, "
    "popcorn, spaghetti, sushi, wine, bubble tea, bowling pins, cherries, fries, glasses, gloves, "
    "grapes, headphones, jeans, maracas, pancakes, scissors, socks"
).split(", ")


def article(name: str) -> str:
    """The article of a name; "ufo" starts with a consonant sound."""
    if name in SOME:
        return "some"
    return "an" if name[0] in "aeiou" and name != "ufo" else "a"


def find(root: Path, pattern: str, code: str) -> Path | None:
    """The picture of an emoji; file names may leave out the FE0F variation selector."""
    bare = code.replace("-fe0f", "")
    for variant in (code, bare, bare + "-fe0f"):
        path = root / pattern.format(code=variant)
        if path.exists():
            return path
    return None


def main() -> None:
    """Write the sheets and the list of objects."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    root = Path(sys.argv[1])
    if (root / "node_modules").is_dir():
        root /= "node_modules"
    codes = {
        emoji["label"]: emoji["hexcode"].lower()
        for emoji in json.loads((root / "emojibase-data/en/data.json").read_text())
    }
    objects, missing = [], []
    for category, labels in OBJECTS.items():
        for entry in labels.split(", "):
            label, _, name = entry.partition("=")
            paths = {style: find(root, p, codes.get(label, "?")) for style, p in STYLES.items()}
            if all(paths.values()):
                objects.append(
                    {
                        "name": name or label,
                        "category": category,
                        "emoji": codes[label],
                        "paths": paths,
                    }
                )
            else:
                missing.append(label)
    if missing:
        print(f"left out because a style lacks them: {', '.join(missing)}")
    for style in STYLES:
        sheet = Image.new("RGBA", (SIZE * COLUMNS, SIZE * -(-len(objects) // COLUMNS)))
        for i, entry in enumerate(objects):
            sprite = Image.open(entry["paths"][style]).convert("RGBA")
            sprite = sprite.crop(sprite.getbbox())  # without the margin, which styles differ in
            sprite.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
            if max(sprite.size) < SIZE:
                scale = SIZE / max(sprite.size)
                sprite = sprite.resize(
                    [max(1, round(s * scale)) for s in sprite.size], Image.Resampling.LANCZOS
                )
            x, y = i % COLUMNS * SIZE, i // COLUMNS * SIZE
            sheet.paste(sprite, (x + (SIZE - sprite.width) // 2, y + (SIZE - sprite.height) // 2))
        sheet.save(OUT / f"{style}.png", optimize=True)
        print(f"{style}.png: {(OUT / f'{style}.png').stat().st_size / 1e6:.2f} MB")
    rows = [
        {k: e[k] for k in ("name", "category", "emoji")} | {"article": article(e["name"])}
        for e in objects
    ]
    body = ",\n".join(json.dumps(row) for row in rows)
    (OUT / "objects.json").write_text(f"[\n{body}\n]\n")
    print(f"{len(objects)} objects in {len({e['category'] for e in objects})} categories")


if __name__ == "__main__":
    main()
