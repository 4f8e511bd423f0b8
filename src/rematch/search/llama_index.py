"""An index as a LlamaIndex retriever."""

from typing import Any

from rematch.errors import RematchError
from rematch.search.index import Index

try:
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import ImageNode, NodeWithScore, QueryBundle, TextNode
except ImportError as error:
    raise RematchError(
        "LlamaIndex's adapter needs llama-index-core: pip install 'rematch-mm[llama-index]'."
    ) from error


class ReMatchRetriever(BaseRetriever):  # type: ignore[misc]
    """Finds the documents of an index; a query bundle may have an ``image_path``.

    Args:
        index: An opened index, or where it lies.
        top: How many documents.
        where: A condition in SQL on metadata.
        rerank: Stages such as ``"feat:100,raw:10"``.
    """

    def __init__(
        self, index: Index | str, top: int = 10, where: str = "", rerank: str = ""
    ) -> None:
        self.index = Index.open(index) if isinstance(index, str) else index
        self.top, self.where, self.rerank = top, where, rerank
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        query: dict[str, Any] = {"text": query_bundle.query_str} if query_bundle.query_str else {}
        if query_bundle.image_path:
            query["image"] = query_bundle.image_path
        found = []
        for hit in self.index.search(query, self.top, where=self.where, rerank=self.rerank):
            about = {
                "id_": hit.id,
                "text": hit.text,
                "metadata": hit.metadata | {"scored_by": hit.by},
            }
            node = ImageNode(image_path=hit.path, **about) if hit.path else TextNode(**about)
            found.append(NodeWithScore(node=node, score=hit.score))
        return found
