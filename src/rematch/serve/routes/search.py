"""Search in the index, and what the search page shows of its documents."""

import time
from functools import partial
from typing import Any, Literal

from fastapi import APIRouter, Query, Request, Response

from rematch.serve.inputs import multimodal_inputs
from rematch.serve.limits import ClientError
from rematch.serve.schemas import (
    AttentionRequest,
    AttentionResponse,
    Multimodal,
    SearchHit,
    SearchRequest,
    SearchResponse,
)
from rematch.serve.service import ServiceDependency

router = APIRouter()


@router.post("/v1/search")
async def search(
    request: Request, body: SearchRequest, service: ServiceDependency
) -> SearchResponse:
    """The nearest documents of the index, reranked if the request says so."""
    started = time.perf_counter()
    if not body.text.strip() and body.image is None:
        raise ClientError("no query. Send text, image, or both.")
    engine = service.engine
    await service.in_thread(request, engine.check_filter, body.filter)
    query = Multimodal(text=body.text, image=body.image)
    stages = engine.stages(body.rerank, service.most_rerank)
    inputs = await service.prepare(request, multimodal_inputs, [query], service.limits)
    mode = await service.in_thread(request, engine.mode, inputs[0], body.mode)
    instructed, instruction = await service.in_thread(
        request, engine.instruct, inputs[0], body.instruction
    )
    lengths = await service.prepare(request, engine.measure, [instructed])
    tokens = await service.prepare(request, engine.search_tokens, lengths[0], stages)
    settings: dict[str, Any] = {"top": body.top, "filter": body.filter, "rerank": stages}
    settings |= {"instruction": instruction, "mode": mode}
    key = ("search", *settings.values())
    kind = ("search", frozenset(stage.by for stage in stages))
    compute = partial(engine.search, **settings)
    (hits,) = await service.compute(request, key, compute, inputs, [tokens], kind)
    ids_with_picture = await service.in_thread(request, engine.ids_with_picture, hits)
    return SearchResponse(
        hits=[
            SearchHit(
                id=hit.id,
                score=hit.score,
                by=hit.by,
                first_rank=hit.first_rank,
                vector_rank=hit.vector_rank,
                text_rank=hit.text_rank,
                text=hit.text,
                has_picture=hit.id in ids_with_picture,
                metadata=hit.metadata,
            )
            for hit in hits
        ],
        warnings=hits.warnings,
        instruction=instruction,
        mode=mode,
        milliseconds=round(1000 * (time.perf_counter() - started), 1),
    )


@router.get(
    "/v1/documents/{name:path}/picture",
    responses={200: {"content": {"image/jpeg": {}}}},
    response_class=Response,
)
async def picture(
    request: Request,
    name: str,
    service: ServiceDependency,
    edge: int = Query(320, ge=16, le=2048),
) -> Response:
    """A document's picture as JPEG; its longer side has at most ``edge`` pixels."""
    content = await service.in_thread(request, service.engine.picture, name, edge)
    headers = {"Cache-Control": "private, no-cache"}  # the index may have another one by now
    return Response(content, media_type="image/jpeg", headers=headers)


@router.post("/v1/attention")
async def attention(
    request: Request, body: AttentionRequest, service: ServiceDependency
) -> AttentionResponse:
    """Where the learnable tokens look in a picture."""
    engine = service.engine
    task: Literal["query", "document"]
    if body.id is not None:
        task = "document"
        inputs = [await service.prepare(request, engine.document, body.id)]
    else:
        task = "query"
        query = Multimodal(text=body.text, image=body.image)
        inputs = await service.prepare(request, multimodal_inputs, [query], service.limits)
    if "image" not in inputs[0]:
        raise ClientError(
            "there is no picture to look at. Send one, or the id of a document that has one."
        )
    tokens = await service.prepare(request, engine.measure, inputs)
    compute = partial(engine.attention_maps, task=task)
    key = ("attention", task)
    (maps,) = await service.compute(request, key, compute, inputs, tokens, "attention")
    together, *single = await service.in_thread(request, engine.overlays, inputs[0]["image"], maps)
    return AttentionResponse(together=together, tokens=single)


@router.get("/v1/examples")
async def examples(request: Request, service: ServiceDependency) -> list[str]:
    """A few texts of the index, as examples of queries."""
    return await service.in_thread(request, service.engine.examples)
