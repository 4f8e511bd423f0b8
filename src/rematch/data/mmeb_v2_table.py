"""MMEB-V2's sets of visual documents and of videos as a table; its 36 sets of images are MMEB's
(:mod:`rematch.data.mmeb_table`). Picto's small sets of the same kinds are in it too.

To add a set, add a row.
"""

from dataclasses import dataclass
from typing import Literal

from rematch.data.schema import Metric, Modality
from rematch.prompts import PAGE_INSTRUCTION, VIDEO_INSTRUCTION

Form = Literal["pages", "labels", "captions", "clips", "momentseeker", "options"]
Layout = Literal["lettered", "numbered", "listed", "joined", "yes-no"]
METRICS: dict[Modality, Metric] = {"image": "hit@1", "video": "hit@1", "visdoc": "ndcg@5"}

FIND_PAGE = "Find a document image that matches the given query: "
QUESTION = (
    "Given a video and a question, select the most accurate answer from the provided candidates. "
    "Return only the exact text of your chosen answer. Question: "
)


@dataclass(frozen=True)
class SetV2:
    """A set of visual documents or of videos.

    Attributes:
        name: Name in the published tables.
        modality: ``"visdoc"`` or ``"video"``; decides the metric.
        meta_task: The group whose mean it counts in.
        repository: Where it is on the hub, and the name of its folder on disk.
        form: What its rows are. ``pages``: BEIR with pictures, every page a candidate.
            ``labels``: a video and its label; the candidates are all labels, or the row's own.
            ``captions``: a caption and its video; every video is a candidate. ``clips``: a
            description and a video; its clips are candidates. ``momentseeker``: the same, with
            candidates by path. ``options``: a question on a video; its options are candidates.
        instruction: Instruction of the queries.
        document_instruction: Instruction of the documents.
        config: Name of the configuration that has the rows; BEIR's three have fixed names.
        split: Name of the split.
        language: The only language of queries that counts (ViDoRe V2).
        frames: Folder of a video set's frames and, with another root, of its videos.
        columns: Columns of a video's name and of the text that goes with it: label, caption or
            question.
        options: Columns of the options (``options``), or the single column of their list.
        layout: How the question lists its options, and what the candidates are (``numbered``: the
            options with their letters).
        subsets: The configurations that the set is made of, if there are several.
        labels: Number of labels there are, if the rows need not have all.
        published: Whether the set is one of MMEB-V2's 78.
    """

    name: str
    modality: Modality
    meta_task: str
    repository: str
    form: Form
    instruction: str
    document_instruction: str
    config: str = ""
    split: str = "test"
    language: str = ""
    frames: str = ""
    columns: tuple[str, str] = ("video_id", "caption")
    options: tuple[str, ...] = ()
    layout: Layout = "lettered"
    subsets: tuple[str, ...] = ()
    labels: int = 0
    published: bool = True

    @property
    def metric(self) -> Metric:
        """The metric that means are taken of."""
        return METRICS[self.modality]

    @property
    def ood(self) -> bool:
        """Whether the set is out of distribution."""
        return self.meta_task == "visdoc OOD"


def _pages(
    name: str,
    group: str,
    repository: str,
    split: str = "test",
    language: str = "",
    published: bool = True,
) -> SetV2:
    return SetV2(
        name,
        "visdoc",
        group,
        repository,
        "pages",
        FIND_PAGE,
        PAGE_INSTRUCTION,
        split=split,
        language=language,
        published=published,
    )


def _labels(name: str, repository: str, folder: str, instruction: str, labels: int = 0) -> SetV2:
    return SetV2(
        name,
        "video",
        "video classification",
        f"VLM2Vec/{repository}",
        "labels",
        instruction,
        "",
        frames=f"video_cls/{folder}",
        columns=("video_id", "pos_text"),
        labels=labels,
    )


def _captions(
    name: str,
    instruction: str,
    columns: tuple[str, str] = ("video_id", "caption"),
    repository: str = "",
    config: str = "",
    split: str = "test",
) -> SetV2:
    return SetV2(
        name,
        "video",
        "video retrieval",
        repository or f"VLM2Vec/{name}",
        "captions",
        instruction,
        VIDEO_INSTRUCTION,
        config=config,
        split=split,
        frames=f"video_ret/{name}",
        columns=columns,
    )


def _options(
    name: str,
    columns: tuple[str, str],
    options: tuple[str, ...],
    layout: Layout,
    config: str = "",
    split: str = "test",
    subsets: tuple[str, ...] = (),
) -> SetV2:
    return SetV2(
        name,
        "video",
        "video QA",
        f"VLM2Vec/{name}",
        "options",
        QUESTION,
        "",
        config=config,
        split=split,
        frames=f"video_qa/{name}",
        columns=columns,
        options=options,
        layout=layout,
        subsets=subsets,
    )


MVBENCH = tuple(
    "episodic_reasoning action_sequence action_prediction action_antonym fine_grained_action "
    "unexpected_action object_existence object_interaction object_shuffle moving_direction "
    "action_localization scene_transition action_count moving_count moving_attribute state_change "
    "fine_grained_pose character_order egocentric_navigation counterfactual_inference".split()
)
_CLIP = "Find the clip that corresponds to the described scene in the given video: "

VIDEO_SETS = (
    _labels("K700", "Kinetics-700", "K700", "Recognize the category of the video content.", 700),
    _labels(
        "SmthSmthV2",
        "SmthSmthV2",
        "SSv2",
        "What actions or object interactions are being performed by the person in the video?",
    ),
    _labels(
        "HMDB51",
        "HMDB51",
        "HMDB51",
        "What actions or objects interactions are the person in the video doing?",
        51,
    ),
    _labels(
        "UCF101",
        "UCF101",
        "UCF101",
        "What activities or sports are being performed by the person in the video?",
        101,
    ),
    _labels(
        "Breakfast",
        "Breakfast",
        "Breakfast",
        "Recognize the breakfast type that the person is cooking in the video.",
        10,
    ),
    _options(
        "MVBench",
        ("video", "question"),
        ("candidates",),
        "numbered",
        split="train",
        subsets=MVBENCH,
    ),
    _options("Video-MME", ("videoID", "question"), ("options",), "lettered"),
    _options(
        "NExTQA", ("video", "question"), ("a0", "a1", "a2", "a3", "a4"), "listed", config="MC"
    ),
    _options("EgoSchema", ("video_idx", "question"), ("option",), "joined", config="Subset"),
    _options("ActivityNetQA", ("video_name", "question"), (), "yes-no"),
    _captions(
        "DiDeMo",
        "Find a video that includes the following described scenes: ",
        columns=("video", "caption"),
    ),
    _captions(
        "MSR-VTT",
        "Find a video that contains the following visual content: ",
        config="test_1k",
    ),
    _captions("MSVD", "Find the video snippet that corresponds to the given summary: "),
    _captions(
        "VATEX",
        "Select a video that fits the description provided: ",
        columns=("videoID", "enCap"),
    ),
    _captions(
        "YouCook2",
        "Find a video that demonstrates the following action while making a recipe: ",
        columns=("id", "sentence"),
        repository="lmms-lab/YouCook2",
        split="val",
    ),
    *(
        SetV2(
            name,
            "video",
            "moment retrieval",
            f"VLM2Vec/{name}",
            "clips",
            _CLIP,
            VIDEO_INSTRUCTION,
            frames=f"video_mret/{folder}",
            columns=("video_path", "query"),
        )
        for name, folder in (("QVHighlight", "QVHighlight"), ("Charades-STA", "Charades_STA"))
    ),
    SetV2(
        "MomentSeeker",
        "video",
        "moment retrieval",
        "VLM2Vec/MomentSeeker",
        "momentseeker",
        "Find the clip that corresponds to the given text: ",
        "Understand the content of the provided video clip.",
        frames="video_mret/MomentSeeker",
        columns=("input_frames", "query"),
    ),
)
# MomentSeeker's instruction where the query has a picture, and where it has a video
MOMENT_WITH_PICTURE = "Select the video clip that aligns with the given text and image: "
MOMENT_WITH_VIDEO = "Find the clip that corresponds to the given sentence and video segment: "

_V1, _V2, _VISRAG, _OOD = "ViDoRe V1", "ViDoRe V2", "VisRAG", "visdoc OOD"
_SYNTHETIC = ("artificial_intelligence", "energy", "government_reports", "healthcare_industry")
_TRANSLATED = ("biomedical_lectures_v2", "economics_reports_v2", "esg_reports_v2")

VISDOC_SETS = (
    *(
        _pages(f"ViDoRe_{name}", _V1, f"vidore/{name}_test_subsampled_beir")
        for name in ("arxivqa", "docvqa", "infovqa", "tabfquad")
    ),
    *(
        _pages(f"ViDoRe_{name}", _V1, f"vidore/{name}_test_beir")
        for name in ("tatdqa", "shiftproject", *(f"syntheticDocQA_{s}" for s in _SYNTHETIC))
    ),
    _pages("ViDoRe_esg_reports_human_labeled_v2", _V2, "vidore/esg_reports_human_labeled_v2"),
    *(_pages(f"ViDoRe_{name}_multilingual", _V2, f"vidore/{name}") for name in _TRANSLATED),
    *(
        _pages(f"VisRAG_{name}", _VISRAG, f"openbmb/VisRAG-Ret-Test-{name}", split="train")
        for name in ("ArxivQA", "ChartQA", "MP-DocVQA", "SlideVQA", "InfoVQA", "PlotQA")
    ),
    # -doc counts any page of the right document, -page only the right page
    _pages("ViDoSeek-page", _OOD, "VLM2Vec/ViDoSeek-page-fixed"),
    _pages("ViDoSeek-doc", _OOD, "VLM2Vec/ViDoSeek"),
    _pages("MMLongBench-page", _OOD, "VLM2Vec/MMLongBench-page-fixed"),
    _pages("MMLongBench-doc", _OOD, "VLM2Vec/MMLongBench-doc"),
)
# ViDoRe V2 with its English queries alone, which does not count in MMEB-V2
ENGLISH_SETS = tuple(
    _pages(f"ViDoRe_{name}", _V2, f"vidore/{name}", language="english", published=False)
    for name in _TRANSLATED
)

PICTO_VISDOC_SETS = tuple(
    SetV2(
        f"Picto-Pages-{what}",
        "visdoc",
        "Picto pages",
        f"Picto-Pages-{what}",
        "pages",
        FIND_PAGE,
        PAGE_INSTRUCTION,
        published=False,
    )
    for what in ("page", "doc")
)
PICTO_VIDEO_SETS = (
    SetV2(
        "Picto-Clips-T2V",
        "video",
        "video retrieval",
        "Picto-Clips-T2V",
        "captions",
        "Find a video that contains the following visual content: ",
        VIDEO_INSTRUCTION,
        frames="video_ret/Picto-Clips-T2V",
        published=False,
    ),
    SetV2(
        "Picto-Clips-QA",
        "video",
        "video QA",
        "Picto-Clips-QA",
        "options",
        QUESTION,
        "",
        frames="video_qa/Picto-Clips-QA",
        columns=("video", "question"),
        options=("candidates",),
        layout="numbered",
        published=False,
    ),
    SetV2(
        "Picto-Clips-Change",
        "video",
        "video classification",
        "Picto-Clips-Change",
        "labels",
        "Recognize the change that happens in the video.",
        "",
        frames="video_cls/Picto-Clips-Change",
        columns=("video_id", "pos_text"),
        published=False,
    ),
)

GROUPS: dict[str, tuple[SetV2, ...]] = {
    "visdoc": VISDOC_SETS,
    "video": VIDEO_SETS,
    "vidore-v1": tuple(s for s in VISDOC_SETS if s.meta_task == _V1),
    "vidore-v2": (*(s for s in VISDOC_SETS if s.meta_task == _V2), *ENGLISH_SETS),
    "picto-visdoc": PICTO_VISDOC_SETS,
    "picto-video": PICTO_VIDEO_SETS,
}


def sets_named(name: str) -> list[SetV2]:
    """The sets that a name stands for: a group, the name of a set, or that of a repository, also
    without its owner. A repository of ViDoRe's that the table lacks is read like those it has.

    >>> [s.name for s in sets_named("vidore/esg_reports_v2")]
    ['ViDoRe_esg_reports_v2_multilingual', 'ViDoRe_esg_reports_v2']
    >>> [s.name for s in sets_named("visrag-ret-test-chartqa")]
    ['VisRAG_ChartQA']
    """
    if name in GROUPS:
        return list(GROUPS[name])
    sets = [*VISDOC_SETS, *ENGLISH_SETS, *VIDEO_SETS]
    lower = name.lower()
    by_name = [s for s in sets if s.name.lower() == lower]
    if by_name:
        return by_name
    matches = [
        s for s in sets if lower in (s.repository.lower(), s.repository.lower().split("/")[-1])
    ]
    if not matches and lower.startswith("vidore/"):
        return [beir_set(name.split("/", 1)[1], name)]
    return matches


def beir_set(name: str, repository: str) -> SetV2:
    """A set in BEIR's form with pictures that the table does not have."""
    return _pages(name, "visdoc", repository, published=False)
