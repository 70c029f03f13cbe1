"""What layers may ask for has one signature, whoever answers: the run, a dry run, or a test's fake."""

from __future__ import annotations

from inspect import Parameter, getmembers, isfunction, signature

import pytest

from otil_xdit.dryrun.stand_ins import RecordingCommunicator
from otil_xdit.exchange.communicator import OtilCommunicator
from otil_xdit.exchange.protocol import Communicator
from tests.support.communicators import FakeCommunicator, WholeMapCommunicator

METHODS = [name for name, _ in getmembers(Communicator, isfunction) if not name.startswith("_")]


def parameters(method: object) -> list[Parameter]:
    return list(signature(method).parameters.values())


@pytest.mark.parametrize(
    "kind",
    [OtilCommunicator, RecordingCommunicator, FakeCommunicator, WholeMapCommunicator],
    ids=lambda kind: kind.__name__,
)
def test_it_answers_every_request_of_the_protocol(kind: type) -> None:
    assert {"gather", "halo", "moments", "norm_halo", "collect"} < set(METHODS)
    for name in METHODS:
        assert parameters(getattr(kind, name)) == parameters(getattr(Communicator, name)), name


def test_a_fake_has_a_clock() -> None:
    fake = FakeCommunicator()
    fake.clock.tick()
    fake.begin()
    assert fake.clock.step == 0 and fake.begun == 1
