"""MMEB as a table: its 36 data sets, and the words that its targets begin with."""

from dataclasses import dataclass
from typing import Literal

Identity = Literal["text", "image", "image+text"]

_DEFAULT_KIND = {
    "classification": "label",
    "vqa": "answer",
    "retrieval": "caption",
    "grounding": "crop",
}


@dataclass(frozen=True)
class DataSet:
    """One of MMEB's data sets.

    Attributes:
        name: As in MMEB-eval and in the published tables; in MMEB-train ``-`` may be ``_``.
        meta_task: Which mean it counts in.
        identity: What tells its candidates apart: two that agree in it are one document.
        ood: Out of distribution: it has no training set.
    """

    name: str
    meta_task: str
    identity: Identity = "text"
    ood: bool = False

    @property
    def kind(self) -> str:
        """Kind of its textual targets, a key of :data:`~rematch.prompts.DOCUMENT_INSTRUCTIONS`."""
        return _DEFAULT_KIND[self.meta_task]


DATA_SETS = (
    DataSet("ImageNet-1K", "classification"),
    DataSet("N24News", "classification"),
    DataSet("HatefulMemes", "classification"),
    DataSet("VOC2007", "classification"),
    DataSet("SUN397", "classification"),
    DataSet("Place365", "classification", ood=True),
    DataSet("ImageNet-A", "classification", ood=True),
    DataSet("ImageNet-R", "classification", ood=True),
    DataSet("ObjectNet", "classification", ood=True),
    DataSet("Country211", "classification", ood=True),
    DataSet("OK-VQA", "vqa"),
    DataSet("A-OKVQA", "vqa"),
    DataSet("DocVQA", "vqa"),
    DataSet("InfographicsVQA", "vqa"),
    DataSet("ChartQA", "vqa"),
    DataSet("Visual7W", "vqa"),
    DataSet("ScienceQA", "vqa", ood=True),
    DataSet("VizWiz", "vqa", ood=True),
    DataSet("GQA", "vqa", ood=True),
    DataSet("TextVQA", "vqa", ood=True),
    DataSet("VisDial", "retrieval", "image"),
    DataSet("CIRR", "retrieval", "image+text"),
    DataSet("VisualNews_t2i", "retrieval", "image"),
    DataSet("VisualNews_i2t", "retrieval"),
    DataSet("MSCOCO_t2i", "retrieval", "image"),
    DataSet("MSCOCO_i2t", "retrieval"),
    DataSet("NIGHTS", "retrieval", "image+text"),
    DataSet("WebQA", "retrieval", "image"),
    DataSet("FashionIQ", "retrieval", "image+text", ood=True),
    DataSet("Wiki-SS-NQ", "retrieval", "image", ood=True),
    DataSet("OVEN", "retrieval", "image+text", ood=True),
    DataSet("EDIS", "retrieval", "image", ood=True),
    DataSet("MSCOCO", "grounding", "image+text"),
    DataSet("RefCOCO", "grounding", "image+text", ood=True),
    DataSet(
        "RefCOCO-Matching", "grounding", "image+text", ood=True
    ),  # several objects of one picture are targets
    DataSet("Visual7W-Pointing", "grounding", "image+text", ood=True),
)

# What targets with a picture begin with; the rest, if there is any, is the target's own text.
TARGET_INSTRUCTIONS = (
    "Represent the given Wikipedia image with related text information: ",
    "Represent the given image with related text information: ",
    "Represent the given cropped image of the object.",
    "Represent the given cropped image of the object",
    "Represent the given Wikipedia image.",
    "Represent the given Wikipedia image",
    "Represent the given news image.",
    "Represent the given image.",
    "Represent the given image",
    "Select the portion of the image that follows the language expressions: ",
)
LEFT_OUT = frozenset({"CIFAR-100"})  # has a folder in MMEB-eval, but counts in no mean


def find(name: str) -> DataSet | None:
    """The data set of that name, written as in MMEB-eval or as in MMEB-train.

    >>> find("ImageNet_1K").name
    'ImageNet-1K'
    """
    by_name = {d.name: d for d in DATA_SETS} | {d.name.replace("-", "_"): d for d in DATA_SETS}
    return by_name.get(name)
