"""The HTTP API against its schema: generated requests never crash it, and responses fit."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from shared_server import card_engine, running

from rematch.serve.engine import Engine
from rematch.serve.limits import Limits

OPERATIONS = {
    "POST /v1/embeddings",
    "POST /v1/rerank",
    "POST /v2/rerank",
    "POST /v1/search",
    "POST /v1/attention",
    "GET /v1/documents/{name}/picture",
    "GET /v1/documents/{name}/file",
    "GET /v1/facets",
    "GET /v1/examples",
    "GET /v1/models",
    "GET /health",
    "GET /ready",
    "GET /metrics",
}


@pytest.fixture(scope="module")
def engine(saved_model, tmp_path_factory) -> Engine:
    return card_engine(saved_model, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def operations(engine):
    with running(engine, limits=Limits(inputs=8, text=500)) as address:
        schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        yield {
            f"{operation.method.upper()} {operation.path}": operation for operation in operations
        }


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_no_request_crashes_and_every_response_fits_the_schema(operations, name):
    assert operations.keys() == OPERATIONS

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operations[name].as_strategy())
    def check(case):
        # the schema cannot say that a query must not be empty; such requests get status 400
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    check()
