"""An index as a LlamaIndex retriever."""

from typing import Any

from rematch.errors import RematchError
from rematch.search.condition import RawSQL
from rematch.search.index import Index
from rematch.search.retrieval import Mode

try:
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import ImageNode, NodeWithScore, QueryBundle, TextNode
except ImportError as error:
    raise RematchError(
        "the LlamaIndex adapter needs llama-index-core: pip install 'rematch-mm[llama-index]'."
    ) from error


class ReMatchRetriever(BaseRetriever):  # type: ignore[misc]
    """Retrieves documents from an index; a query bundle may have an ``image_path``.

    Args:
        index: An opened index, or its directory or URI.
        top: Number of documents to return.
        filter: Condition on the metadata, as for :meth:`rematch.Index.search`.
        rerank: Stages that rerank the nearest documents, such as ``"feat:100,raw:10"``.
        instruction: Instruction before each query; by default the index chooses it.
        mode: ``vector``, ``text`` or ``hybrid``; by default the index chooses it.
    """

    def __init__(
        self,
        index: Index | str,
        top: int = 10,
        filter: str | RawSQL = "",
        rerank: str = "",
        instruction: str | None = None,
        mode: Mode = "auto",
    ) -> None:
        self.index = Index.open(index) if isinstance(index, str) else index
        self.top, self.filter, self.rerank = top, filter, rerank
        self.instruction, self.mode = instruction, mode
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        query: dict[str, Any] = {"text": query_bundle.query_str} if query_bundle.query_str else {}
        if query_bundle.image_path:
            query["image"] = query_bundle.image_path
        nodes = []
        hits = self.index.search(
            query,
            self.top,
            filter=self.filter,
            rerank=self.rerank,
            instruction=self.instruction,
            mode=self.mode,
        )
        for hit in hits:
            fields = {
                "id_": hit.id,
                "text": hit.text,
                "metadata": hit.metadata | {"scored_by": hit.by},
            }
            node = ImageNode(image_path=hit.path, **fields) if hit.path else TextNode(**fields)
            nodes.append(NodeWithScore(node=node, score=hit.score))
        return nodes
