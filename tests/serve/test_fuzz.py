"""Random requests by the served OpenAPI: no traceback, no 5xx, every answer as it is described; minutes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from otil_xdit.serve.app import create_app
from otil_xdit.serve.settings import ServeSettings
from tests.support.app_thread import app_in_a_thread
from tests.support.fake_engine import FakeEngine

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "1250"))
"""Requests for each route at most; some have few that differ."""

ADDRESS = os.environ.get("FUZZ_ADDRESS")
"""Of a server to fuzz instead of the app round an engine without ranks."""


APP = create_app(FakeEngine(), ServeSettings("tiny-sdxl", max_pixels=256 * 256, max_images=2, max_steps=4))
ROUTES = schemathesis.openapi.from_dict(APP.openapi())


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    if ADDRESS is not None:
        yield ADDRESS
        return
    with app_in_a_thread(APP) as made:
        yield made


@pytest.fixture(scope="module")
def statuses() -> Iterator[Counter[int]]:
    counted: Counter[int] = Counter()
    yield counted
    print(f"\n{sum(counted.values())} requests: {dict(sorted(counted.items()))}")
    assert {200, 400} <= set(counted)


@ROUTES.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_requests(case: schemathesis.Case, address: str, statuses: Counter[int]) -> None:
    answer = case.call(base_url=address, timeout=60)
    statuses[answer.status_code] += 1
    assert "Traceback" not in answer.text
    checks = [not_a_server_error, status_code_conformance, response_schema_conformance]
    case.validate_response(answer, checks=checks)
