"""What is served, and how the server is doing."""

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from rematch.serve.schemas import ModelCard, ModelList
from rematch.serve.service import ERRORS, ServiceDependency

router = APIRouter()


@router.get("/v1/models", responses=ERRORS)
def models(service: ServiceDependency) -> ModelList:
    """What is served."""
    engine = service.engine
    card = ModelCard(
        id=engine.name,
        dimensions=engine.model.backbone.width,
        documents=0 if engine.index is None else len(engine.index),
        tasks=["embeddings", "rerank"] + ([] if engine.index is None else ["search"]),
    )
    return ModelList(data=[card])


@router.get("/health")
def health() -> dict[str, str]:
    """Whether the process is alive."""
    return {"status": "ok"}


@router.get("/ready")
def ready(service: ServiceDependency) -> dict[str, str | int]:
    """Whether the model is loaded and takes requests, and how many calls are waiting."""
    return {"status": "ready", "waiting": len(service.batcher.queue)}


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(service: ServiceDependency) -> Response:
    """Metrics for Prometheus."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)
