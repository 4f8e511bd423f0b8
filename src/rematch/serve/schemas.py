"""What the HTTP API takes and gives, apart from how it is computed."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")  # clients of other servers send fields of theirs


class _Request(_Part):
    @model_validator(mode="before")
    @classmethod
    def _is_unicode(cls, value: Any) -> Any:
        """JSON can spell half a character, which nothing behind this can encode."""
        waiting = [value]
        while waiting:
            one = waiting.pop()
            if isinstance(one, str):
                try:
                    one.encode()
                except UnicodeEncodeError:
                    raise ValueError("a text holds half a character (a lone surrogate)") from None
            elif isinstance(one, dict):
                waiting += [*one.keys(), *one.values()]
            elif isinstance(one, list):
                waiting += one
        return value


class ImageURL(_Part):
    """As in OpenAI's chat messages."""

    url: str


class TextPart(_Part):
    """Part of a message."""

    type: Literal["text"]
    text: str


class ImagePart(_Part):
    """Part of a message."""

    type: Literal["image_url"]
    image_url: ImageURL


class Message(_Part):
    """One turn, whose content is embedded."""

    role: str = "user"
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class Multimodal(_Part):
    """Text, a picture, or both; ``image`` is a data URL."""

    text: str = ""
    image: str | None = None


class EmbeddingRequest(_Request):
    """OpenAI's request, and as vLLM's with ``messages`` instead of ``input``."""

    input: str | list[str] | None = Field(None, examples=["a dog"])
    messages: list[Message] | None = None
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(
        None, ge=1, description="keep only the first so many (Matryoshka)"
    )
    task: Literal["query", "document"] | None = Field(
        None, description="what is embedded; by default a document"
    )
    input_type: str | None = Field(
        None, description="the same, as others call it: query, document, search_query, …"
    )


class Embedding(BaseModel):
    """One vector, as numbers or as base64 of float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens read, pictures counted as what they become."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    """OpenAI's response."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class RerankRequest(_Request):
    """Jina's and Cohere's request; queries and documents may be pictures."""

    query: str | Multimodal
    documents: list[str | Multimodal] = Field(min_length=1)
    model: str | None = None
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = False


class RerankResult(BaseModel):
    """One document, by its place in the request; ``relevance_score`` is P(yes) of the matching
    head.
    """

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
    """A query of text, a picture, or both."""

    text: str = ""
    image: str | None = None
    top: int = Field(10, ge=1, le=200)
    filter: str = Field("", max_length=2000, description="a condition in SQL on metadata")
    rerank: str = Field("", max_length=100, description="stages such as feat:100,raw:10")


class SearchHit(BaseModel):
    """One result."""

    id: str
    score: float
    by: str
    nearest: int = Field(description="its place by cosine, from 1, before anything reordered")
    text: str
    has_picture: bool
    metadata: dict[str, str | float | bool | None]


class SearchResponse(BaseModel):
    """Results, best first."""

    hits: list[SearchHit]
    milliseconds: float


class AttentionRequest(_Request):
    """A query as in a search, or a document of the index by its id."""

    text: str = ""
    image: str | None = None
    id: str | None = None


class AttentionResponse(BaseModel):
    """Pictures as data URLs, darkened where the tokens do not look: all tokens, and each of the
    first six.
    """

    together: str
    tokens: list[str]


class ModelCard(BaseModel):
    """One model."""

    id: str
    object: Literal["model"] = "model"
    owned_by: str = "rematch"
    dimensions: int
    documents: int = Field(0, description="in the index, if one is served")
    tasks: list[str]


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorBody(BaseModel):
    """What is wrong, in OpenAI's shape."""

    message: str
    type: str
    code: int


class ErrorResponse(BaseModel):
    """An error."""

    error: ErrorBody
