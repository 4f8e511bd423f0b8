"""``POST /v1/rerank`` and ``/v2/rerank``, as Jina's and Cohere's clients call them."""

import uuid

import numpy as np
from fastapi import APIRouter, Request

from rematch.serve.inputs import multimodal_inputs
from rematch.serve.limits import ClientError
from rematch.serve.schemas import Multimodal, RerankRequest, RerankResponse, RerankResult, Usage
from rematch.serve.service import ServiceDependency

router = APIRouter()


@router.post("/v1/rerank")
@router.post("/v2/rerank")
async def rerank(
    request: Request, body: RerankRequest, service: ServiceDependency
) -> RerankResponse:
    """Documents in the order of the matching head's P(yes)."""
    engine, limits = service.engine, service.limits
    if len(body.documents) > limits.inputs:
        raise ClientError(
            f"{len(body.documents)} documents; this server takes {limits.inputs}.", 413
        )
    inputs = await service.prepare(
        request, multimodal_inputs, [body.query, *body.documents], limits
    )
    lengths = await service.prepare(request, engine.measure, inputs)
    query, *documents = inputs
    value, tokens = (query, documents), engine.match_tokens(lengths[0], lengths[1:])
    (scores,) = await service.compute(request, "match", engine.match, [value], [tokens], "match")
    order = np.argsort(-scores, kind="stable")[: body.top_n]
    results = [
        RerankResult(
            index=int(i),
            relevance_score=float(scores[i]),
            document={"text": _text(body.documents[i])} if body.return_documents else None,
        )
        for i in order
    ]
    usage = Usage(prompt_tokens=sum(lengths), total_tokens=sum(lengths))
    return RerankResponse(id=str(uuid.uuid4()), model=engine.name, results=results, usage=usage)


def _text(document: str | Multimodal) -> str:
    return document if isinstance(document, str) else document.text
