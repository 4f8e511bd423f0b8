"""Copy a trained model into the package as ``rematch-tiny``.

    python scripts/package_tiny.py rematch-model

Weights are stored in half precision (the limit is 16 MB) and declared as float32, so that they
load as float32. Recipe and training log are copied too. The query instructions of Picto's trained
tasks become the model's prompts, so that searches use them. ``rematch evaluate rematch-tiny
--output src/rematch/assets/tiny`` writes the scores.
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from rematch.files import PartialDirectory, remove

TINY = Path(__file__).parents[1] / "src" / "rematch" / "assets" / "tiny"
# by what is asked with and what is searched (rematch.data.picto_tasks)
PROMPTS = {
    "text-image": "Find me an image that matches the given caption: ",
    "image-text": "Find an image caption describing the given image.",
    "text+image-image": "Find a similar image with the described change: ",
    "text+image-text": "Represent the given image with the following question: ",
}
LEFT_OUT = shutil.ignore_patterns("tensorboard", "README.md", "training_args.bin")


def halve(directory: Path) -> None:
    """Rewrite every safetensors file of a directory in half precision."""
    for path in directory.rglob("*.safetensors"):
        weights = load_file(path)
        save_file(
            {name: weight.half() for name, weight in weights.items()}, path, {"format": "pt"}
        )


def add_prompts(config: Path) -> None:
    """Add the query instructions to the prompts of a model."""
    content = json.loads(config.read_text())
    content["prompts"] |= PROMPTS
    config.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Copy, halve, add the prompts, and print the size."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with PartialDirectory(TINY) as partial:
        partial.empty()
        shutil.copytree(sys.argv[1], partial.path, ignore=LEFT_OUT, dirs_exist_ok=True)
        halve(partial.path)
        add_prompts(partial.path / "config_sentence_transformers.json")
        if TINY.exists():
            remove(TINY)
        partial.publish()
    size = sum(file.stat().st_size for file in TINY.rglob("*") if file.is_file())
    print(f"{TINY}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
