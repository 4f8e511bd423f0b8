"""What a search returns."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rematch.data.document import Metadata
from rematch.search.retrieval import Mode


@dataclass(frozen=True)
class Hit:
    """A document that a search returns.

    Attributes:
        id: The document's id.
        score: Its score; ``by`` says which one.
        by: ``"cosine"``, ``"bm25"`` (words), ``"rrf"`` (both fused), ``"maxsim"``, or the view
            whose P(yes) the score is.
        first_rank: Its rank, from 1, before it was reranked.
        vector_rank: Its rank by cosine, from 1; 0 if it was not among the nearest, or vectors were
            not compared.
        text_rank: Its rank by words, from 1; 0 if it was not among the best matches, or words were
            not compared.
        text: Its text.
        path: Path of its picture, if that is a file.
        metadata: Its other values in the corpus.
    """

    id: str
    score: float
    by: str = "cosine"
    first_rank: int = 0
    vector_rank: int = 0
    text_rank: int = 0
    text: str = ""
    path: str = ""
    metadata: Metadata = field(default_factory=dict)


class Hits(list[Hit]):
    """The hits of a query, best first.

    Attributes:
        warnings: What the search could not do as asked, a sentence for each document.
        instruction: The instruction that was put before the query; empty if there was none.
        mode: What the first stage compared: ``"vector"``, ``"text"`` or ``"hybrid"``.
    """

    def __init__(
        self,
        hits: Iterable[Hit] = (),
        warnings: Sequence[str] = (),
        instruction: str = "",
        mode: Mode = "vector",
    ) -> None:
        super().__init__(hits)
        self.warnings = list(warnings)
        self.instruction, self.mode = instruction, mode
