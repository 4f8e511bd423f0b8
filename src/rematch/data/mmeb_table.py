"""MMEB's 36 data sets as a table, and the instructions that its targets begin with."""

from dataclasses import dataclass
from typing import Literal

CandidateKey = Literal["text", "image", "image+text"]

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
        name: Name in MMEB-eval and in the published tables; in MMEB-train ``-`` may be ``_``.
        meta_task: The meta-task whose mean it counts in.
        candidate_key: What identifies a candidate; candidates that agree in it are the same
            document.
        ood: Whether it is out of distribution, that is, has no training set.
    """

    name: str
    meta_task: str
    candidate_key: CandidateKey = "text"
    ood: bool = False

    @property
    def kind(self) -> str:
        """Kind of its text targets, a key of :data:`~rematch.prompts.DOCUMENT_INSTRUCTIONS`."""
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
    # several objects of the same picture are targets
    DataSet("RefCOCO-Matching", "grounding", "image+text", ood=True),
    DataSet("Visual7W-Pointing", "grounding", "image+text", ood=True),
)

# What the text of a picture target begins with; the rest, if any, belongs to the target itself.
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
EXCLUDED = frozenset({"CIFAR-100"})  # has a folder in MMEB-eval, but counts in no mean


def find_data_set(name: str) -> DataSet | None:
    """Return the data set of a name as MMEB-eval or MMEB-train writes it, or ``None``.

    >>> find_data_set("ImageNet_1K").name
    'ImageNet-1K'
    """
    by_name = {d.name: d for d in DATA_SETS} | {d.name.replace("-", "_"): d for d in DATA_SETS}
    return by_name.get(name)
