"""The one form in which every reader hands out data: items, triplets for training, tasks for evaluation."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

Picture = Image.Image | Path


@dataclass(frozen=True)
class Item:
    """A query or a document: text, a picture, or both, and the instruction that goes before the text.

    Attributes:
        text: May be empty if there is a picture.
        image: A decoded picture, the path of one, or several paths.
        instruction: Kept apart from the text so that it can be left off (target instructions are an ablation).
        key: Identity of a document within its task; two items with one key are one document.
    """

    text: str = ""
    image: Picture | list[Path] | None = None
    instruction: str = ""
    key: str = ""

    def as_input(self, instruction: bool = True) -> dict[str, object]:
        """The ``{"text", "image"}`` dictionary that a model encodes.

        >>> Item("a dog", instruction="Represent the image caption: ").as_input()
        {'text': 'Represent the image caption: a dog'}
        """
        text = (self.instruction if instruction else "") + self.text
        parts: dict[str, object] = {"text": text} if text else {}
        if self.image is not None:
            parts["image"] = self.image
        return parts


@dataclass(frozen=True)
class Triplet:
    """One training sample: a query, its document, and a hard negative if there is one."""

    query: Item
    positive: Item
    negative: Item | None = None


@dataclass
class RetrievalTask:
    """One evaluation task.

    Attributes:
        name: As in the benchmark's tables.
        meta_task: ``"classification"``, ``"vqa"``, ``"retrieval"`` or ``"grounding"``.
        queries: The queries.
        documents: Every distinct document of the task.
        candidates: For each query the indices of its candidate documents; the **first is the answer**.
        ood: Whether the task is out of distribution.
    """

    name: str
    meta_task: str
    queries: list[Item]
    documents: list[Item]
    candidates: list[list[int]]
    ood: bool = False
