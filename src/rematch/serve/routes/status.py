"""What is served, and how the server is doing."""

from anyio import move_on_after
from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from rematch.serve.limits import ClientError
from rematch.serve.schemas import ErrorResponse, ModelCard, ModelList
from rematch.serve.service import ERRORS, ServiceDependency

router = APIRouter()

_PROBE_SECONDS = 3.0  # longer than an index that is being replaced is waited for


@router.get("/v1/models", responses=ERRORS)
def models(service: ServiceDependency) -> ModelList:
    """What is served."""
    engine = service.engine
    card = ModelCard(
        id=engine.name,
        dimensions=engine.model.backbone.width,
        documents=engine.document_count(),
        tasks=["embeddings", "rerank"] + ([] if engine.index is None else ["search"]),
    )
    return ModelList(data=[card])


@router.get("/health")
async def health() -> dict[str, str]:
    """Whether the event loop runs."""
    return {"status": "ok"}


@router.get("/ready", responses={503: {"model": ErrorResponse}})
async def ready(request: Request, service: ServiceDependency) -> dict[str, str | int]:
    """Whether requests are served: the index can be read, and the model's thread goes on."""
    if service.batcher.stalled_seconds() > service.timeout / 2:
        raise ClientError("the model's thread does not go on. Restart the server.", 503)
    with move_on_after(_PROBE_SECONDS) as probing:
        await service.in_thread(request, service.engine.probe)
    if probing.cancelled_caught:
        raise ClientError("the index does not answer. Check the storage that it is on.", 503)
    return {"status": "ready", "waiting": len(service.batcher.queue)}


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(service: ServiceDependency) -> Response:
    """Metrics for Prometheus."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)
