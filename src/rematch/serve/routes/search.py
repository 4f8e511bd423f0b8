"""Search in the index, and what the search page shows of its documents."""

import time
from functools import partial
from typing import Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse

from rematch.data.clips import Clip
from rematch.data.pages import PdfPage
from rematch.search.hits import Hit, Hits
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
_FILE_TYPES = {
    ".pdf": "application/pdf",
    ".mp4": "video/mp4",
    ".mov": "video/quicktime",
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
}


@router.post("/v1/search")
async def search(
    request: Request, body: SearchRequest, service: ServiceDependency
) -> SearchResponse:
    """The nearest documents of the index, reranked if the request says so."""
    started = time.perf_counter()
    if body.like is not None:
        return await _search_similar(request, body, service, started)
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
    return _response(hits, ids_with_picture, started, instruction)


async def _search_similar(
    request: Request, body: SearchRequest, service: ServiceDependency, started: float
) -> SearchResponse:
    """The documents nearest to a document of the index; the model does not run for it."""
    if body.text.strip() or body.image is not None or body.rerank.strip():
        raise ClientError("like is searched for alone. Leave out text, image and rerank.")
    if body.mode not in ("auto", "vector"):
        raise ClientError(f"mode {body.mode}: like compares vectors. Leave out mode.")
    engine = service.engine
    await service.in_thread(request, engine.check_filter, body.filter)
    hits = await service.in_thread(request, engine.similar, body.like, body.top, body.filter)
    ids_with_picture = await service.in_thread(request, engine.ids_with_picture, hits)
    return _response(hits, ids_with_picture, started)


def _response(
    hits: Hits, ids_with_picture: set[str], started: float, instruction: str = ""
) -> SearchResponse:
    return SearchResponse(
        hits=[_search_hit(hit, hit.id in ids_with_picture) for hit in hits],
        warnings=hits.warnings,
        instruction=instruction.strip(),
        mode=hits.mode,
        milliseconds=round(1000 * (time.perf_counter() - started), 1),
    )


def _search_hit(hit: Hit, has_picture: bool) -> SearchHit:
    page, clip = PdfPage.parse(hit.path), Clip.parse(hit.path)
    return SearchHit(
        id=hit.id,
        score=hit.score,
        by=hit.by,
        first_rank=hit.first_rank,
        vector_rank=hit.vector_rank,
        text_rank=hit.text_rank,
        text=hit.text,
        has_picture=has_picture,
        page=page and page.number,
        start=clip and clip.start,
        metadata=hit.metadata,
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


@router.get(
    "/v1/documents/{name:path}/file",
    responses={200: {"content": {"application/pdf": {}, "video/*": {}}}},
    response_class=FileResponse,
)
async def file(request: Request, name: str, service: ServiceDependency) -> FileResponse:
    """The PDF file or the video that a document is from."""
    path = await service.in_thread(request, service.engine.file, name)
    kind = _FILE_TYPES[path.suffix.lower()]
    return FileResponse(path, media_type=kind, headers={"Cache-Control": "private, no-cache"})


@router.get("/v1/facets")
async def facets(
    request: Request, service: ServiceDependency
) -> dict[str, list[str | float | bool | None]]:
    """Columns of the metadata with few values, to filter by."""
    return await service.in_thread(request, service.engine.facets)


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
