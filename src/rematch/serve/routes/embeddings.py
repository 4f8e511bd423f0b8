"""``POST /v1/embeddings``, as OpenAI's and vLLM's clients call it."""

import base64
from typing import Literal

import numpy as np
from fastapi import APIRouter, Request
from numpy.typing import NDArray

from rematch.scoring import truncate
from rematch.serve.inputs import embedding_inputs
from rematch.serve.limits import ClientError
from rematch.serve.schemas import Embedding, EmbeddingRequest, EmbeddingResponse, Usage
from rematch.serve.service import ServiceDependency

router = APIRouter()

_TASKS: dict[str, Literal["query", "document"]] = {
    "query": "query",
    "search_query": "query",
    "document": "document",
    "search_document": "document",
    "passage": "document",
}


@router.post("/v1/embeddings")
async def embeddings(
    request: Request, body: EmbeddingRequest, service: ServiceDependency
) -> EmbeddingResponse:
    """Vectors of texts, or of the content of a message with pictures."""
    engine = service.engine
    width = engine.model.backbone.width
    task = body.task or _TASKS.get(body.input_type or "document")
    if task is None:
        raise ClientError(f"input_type {body.input_type!r} is unknown; use query or document.")
    inputs = await service.prepare(request, embedding_inputs, body, service.limits)
    if body.dimensions and body.dimensions > width:
        raise ClientError(f"dimensions {body.dimensions}: the vectors have {width}.")
    tokens = await service.prepare(request, engine.measure, inputs)
    embed = engine.embed_queries if task == "query" else engine.embed_documents
    rows = await service.compute(request, ("embed", task), embed, inputs, tokens, "embed")
    vectors = truncate(np.stack(rows), body.dimensions or width)
    return EmbeddingResponse(
        data=[
            Embedding(index=i, embedding=_encoded(vector, body.encoding_format))
            for i, vector in enumerate(vectors)
        ],
        model=engine.name,
        usage=Usage(prompt_tokens=sum(tokens), total_tokens=sum(tokens)),
    )


def _encoded(
    vector: NDArray[np.float32], encoding_format: Literal["float", "base64"]
) -> list[float] | str:
    if encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers
