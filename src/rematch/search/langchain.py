"""An index as a LangChain retriever."""

from typing import Any

from rematch.errors import RematchError
from rematch.search.condition import RawSQL
from rematch.search.index import Index
from rematch.search.retrieval import Mode

try:
    from langchain_core.callbacks import CallbackManagerForRetrieverRun
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever
    from pydantic import InstanceOf
except ImportError as error:
    raise RematchError(
        "the LangChain adapter needs langchain-core: pip install 'rematch-mm[langchain]'."
    ) from error


class ReMatchRetriever(BaseRetriever):
    """Retrieves documents from an index.

    Attributes:
        index: An opened :class:`~rematch.search.index.Index`.
        top: Number of documents to return.
        filter: Condition on the metadata, as for :meth:`rematch.Index.search`.
        rerank: Stages that rerank the nearest documents, such as ``"feat:100,raw:10"``.
        instruction: Instruction before each query; by default the index chooses it.
        mode: ``vector``, ``text`` or ``hybrid``; by default the index chooses it.
    """

    index: Any  # pydantic cannot validate an Index
    top: int = 10
    filter: str | InstanceOf[RawSQL] = ""
    rerank: str = ""
    instruction: str | None = None
    mode: Mode = "auto"

    @classmethod
    def open(cls, uri: str, **settings: Any) -> "ReMatchRetriever":
        """A retriever on the index at ``uri``, with these attributes."""
        return cls(index=Index.open(uri), **settings)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        hits = self.index.search(
            query,
            self.top,
            filter=self.filter,
            rerank=self.rerank,
            instruction=self.instruction,
            mode=self.mode,
        )
        return [
            Document(
                id=hit.id,
                page_content=hit.text,
                metadata=hit.metadata
                | {"path": hit.path, "score": hit.score, "scored_by": hit.by},
            )
            for hit in hits
        ]
