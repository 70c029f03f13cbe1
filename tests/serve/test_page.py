"""The page: what is served of it, without a browser."""

from __future__ import annotations

import re

from fastapi.testclient import TestClient

from otil_xdit.serve.app import create_app
from otil_xdit.serve.page import FILES
from otil_xdit.serve.schemas import GenerationBody
from otil_xdit.serve.settings import ServeSettings
from tests.support.fake_engine import FakeEngine

OWN_CONTROLS = {"key", "shape", "width", "height", "lora_weight"}
"""Controls of the form that are no fields of the API."""


def client(**settings: str) -> TestClient:
    return TestClient(create_app(FakeEngine(), ServeSettings("tiny-sdxl", **settings)))  # type: ignore[arg-type]


def test_the_page_needs_nothing_from_elsewhere_and_nothing_inline() -> None:
    server = client()
    for path, (_, kind) in FILES.items():
        answer = server.get(path)
        assert answer.status_code == 200 and answer.headers["content-type"] == kind
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", answer.text)
    page = server.get("/").text
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page)
    assert {f"/{one}" for one in re.findall(r'(?:src|href)="([^"]+)"', page)} == set(FILES) - {"/"}


def test_its_controls_are_fields_of_the_api() -> None:
    names = set(re.findall(r'<(?:input|textarea|select)[^>]*\sname="(\w+)"', client().get("/").text))
    assert names - OWN_CONTROLS <= set(GenerationBody.model_fields) and names > OWN_CONTROLS


def test_only_the_page_is_open_to_who_has_no_key() -> None:
    server = client(api_key="secret")
    assert [server.get(path).status_code for path in FILES] == [200] * len(FILES)
    assert server.get("/facts").status_code == 401
    facts = server.get("/facts", headers={"authorization": "Bearer secret"}).json()
    assert (facts["ranks"], facts["max_steps"], facts["loras"]) == (2, 150, []) and "otil" in facts["parallel"]


def test_facts_of_a_model_that_loads_are_not_there_yet() -> None:
    engine = FakeEngine()
    engine.facts = None
    assert TestClient(create_app(engine, ServeSettings("tiny-sdxl"))).get("/facts").status_code == 503
