"""Requests and responses of the HTTP API, apart from how they are computed."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rematch.search.condition import MAX_LENGTH
from rematch.search.retrieval import Mode

Value = TypeVar("Value")
_List = Annotated[
    list[Value], Field(fail_fast=True)
]  # one error at most, not one for each element


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore")  # clients of other servers send fields of their own


class _Request(_Lenient):
    @model_validator(mode="before")
    @classmethod
    def _check_unicode(cls, value: Any) -> Any:
        """JSON can spell half a character, which no tokenizer or database can encode."""
        remaining = [value]
        while remaining:
            node = remaining.pop()
            if isinstance(node, str):
                try:
                    node.encode()
                except UnicodeEncodeError:
                    raise ValueError("a text has half a character (a lone surrogate)") from None
            elif isinstance(node, dict):
                remaining += [*node.keys(), *node.values()]
            elif isinstance(node, list):
                remaining += node
        return value


class ImageURL(_Lenient):
    """A picture's URL, as in OpenAI's chat messages."""

    url: str


class TextPart(_Lenient):
    """The text of a message."""

    type: Literal["text"]
    text: str


class ImagePart(_Lenient):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: ImageURL


class Message(_Lenient):
    """A chat message, whose content is embedded."""

    role: str = "user"
    content: str | _List[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class Multimodal(_Lenient):
    """Text, a picture, or both; ``image`` is a data URL."""

    text: str = ""
    image: str | None = None


class EmbeddingRequest(_Request):
    """OpenAI's request, or vLLM's with ``messages`` instead of ``input``."""

    input: str | _List[str] | None = Field(None, examples=["a dog"])
    messages: _List[Message] | None = None
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(
        None, ge=1, description="keep only this many leading dimensions (Matryoshka)"
    )
    task: Literal["query", "document"] | None = Field(
        None, description="what is embedded; by default a document"
    )
    input_type: str | None = Field(
        None,
        description="other APIs' name for task: query, document, search_query, search_document "
        "or passage",
    )


class Embedding(BaseModel):
    """A vector, as numbers or as base64 of float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Number of tokens, including those that pictures become."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    """OpenAI's response."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class RerankRequest(_Request):
    """Jina's and Cohere's request; queries and documents may have pictures."""

    query: str | Multimodal
    documents: _List[str | Multimodal] = Field(min_length=1)
    model: str | None = None
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = False


class RerankResult(BaseModel):
    """A document, by its index in the request; ``relevance_score`` is P(yes)."""

    index: int
    relevance_score: float
    document: dict[str, Any] | None = None


class RerankResponse(BaseModel):
    """Jina's and Cohere's response, best first."""

    id: str
    model: str
    results: list[RerankResult]
    usage: Usage
    meta: dict[str, Any] = {}


class SearchRequest(_Request):
    """A query of text, a picture, or both; or a document of the index, to find similar ones."""

    text: str = ""
    image: str | None = None
    like: str | None = Field(
        None, max_length=4096, description="id of a document, in place of text and image"
    )
    top: int = Field(10, ge=1, le=200)
    filter: str = Field(
        "",
        max_length=MAX_LENGTH,
        description="a condition on the metadata, such as year > 2000 AND place = 'Rome'",
    )
    rerank: str = Field("", max_length=100, description="stages such as feat:100,raw:10")
    instruction: str | None = Field(
        None,
        max_length=2000,
        description="text before the query, in place of the one that the index chooses; empty "
        "for none",
    )
    mode: Mode = Field(
        "auto",
        description="what is compared: vectors, words (text) or both (hybrid); auto is hybrid for "
        "a query of text if documents have words",
    )


class SearchHit(BaseModel):
    """A document that the search returns."""

    id: str
    score: float
    by: str
    first_rank: int = Field(description="rank before reranking, from 1")
    vector_rank: int = Field(description="rank by cosine, from 1; 0 if not among the nearest")
    text_rank: int = Field(description="rank by words, from 1; 0 if not among the best matches")
    text: str
    has_picture: bool
    page: int | None = Field(description="number of the page, of a PDF file")
    start: float | None = Field(description="where it begins in seconds, of a video")
    metadata: dict[str, str | float | bool | None]


class SearchResponse(BaseModel):
    """Hits, best first."""

    hits: list[SearchHit]
    warnings: list[str] = Field([], description="documents that could not be reranked, and why")
    instruction: str = Field("", description="the text that was put before the query")
    mode: Mode = Field(description="what was compared: vector, text or hybrid")
    milliseconds: float


class AttentionRequest(_Request):
    """A query as in a search, or a document of the index by its id."""

    text: str = ""
    image: str | None = None
    id: str | None = None


class AttentionResponse(BaseModel):
    """Data URLs of pictures, darkened where the learnable tokens do not look: ``together`` for all
    tokens, ``tokens`` for each of the first six.
    """

    together: str
    tokens: list[str]


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    owned_by: str = "rematch"
    dimensions: int
    documents: int = Field(0, description="number of documents in the index, if there is one")
    tasks: list[str]


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorBody(BaseModel):
    """What is wrong, in OpenAI's format."""

    message: str
    type: str
    code: int


class ErrorResponse(BaseModel):
    """The response for every error."""

    error: ErrorBody
