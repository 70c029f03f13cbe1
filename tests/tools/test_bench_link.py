"""The shaped link of `otil-xdit bench`: what is refused, the commands that make it, and a real one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch

from otil_xdit.tools import main as tools
from otil_xdit.tools.bench import link
from otil_xdit.tools.common.links import LinkRequest, parse_shaped_link


@pytest.mark.usefixtures("no_start")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("os.geteuid", lambda: 1000), "--link 1gbit needs root"),
        (("sys.platform", "darwin"), "--link 1gbit needs Linux's network namespaces; this is darwin"),
        (("shutil.which", lambda name: None), "--link 1gbit needs iproute2; ip and tc not found"),
    ],
)
def test_a_link_that_cannot_be_made_is_refused(
    change: tuple[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(change[0], change[1])
    with pytest.raises(SystemExit):
        tools.main(["bench", "--link", "1gbit"])
    assert message in capsys.readouterr().err


def test_a_link_is_asked_for_by_rate_or_ratio() -> None:
    assert parse_shaped_link("20MB/s").rate == 20e6
    assert parse_shaped_link("1gbit").rate == 125e6
    assert parse_shaped_link(".5mbit").rate == 62500
    assert parse_shaped_link("ratio=2.5") == LinkRequest("ratio=2.5", ratio=2.5)


class Recorder:
    """Takes the place of a shell; `fails` is a word at which it fails."""

    def __init__(self, there: list[str], fails: str = "") -> None:
        self.there, self.fails = there, fails
        self.commands: list[link.Command] = []

    def __call__(self, command: link.Command) -> str:
        if self.fails and self.fails in command:
            raise link.LinkError("no such thing")
        self.commands.append(command)
        if command[:3] == ("ip", "netns", "add"):
            self.there.append(command[3])
        if command[:3] == ("ip", "netns", "delete"):
            self.there.remove(command[3])
        return "\n".join(f"{name} (id: 3)" for name in self.there)


def test_two_ranks_share_a_cable_and_four_a_switch() -> None:
    two, four = Recorder([]), Recorder([])
    with link.Namespaces(2, two) as spaces:
        spaces.shape(20e6)
        assert spaces.inside(1) == ("ip", "netns", "exec", f"otil-bench-{os.getpid()}-1")
    with link.Namespaces(4, four) as spaces:
        spaces.shape(20e6)
    cables = [command for command in two.commands if "veth" in command]
    assert len(cables) == 1 and not any("bridge" in command for command in two.commands)
    assert sum("veth" in command for command in four.commands) == 4
    assert sum("master" in command for command in four.commands) == 4
    for recorder, ends in ((two, 2), (four, 8)):
        buckets = [" ".join(command) for command in recorder.commands if "tbf" in command]
        assert len(set(buckets)) == ends and all("rate 160000000bit burst 20000b" in bucket for bucket in buckets)
        assert not recorder.there


def test_what_was_made_is_removed_when_the_rest_fails() -> None:
    shell = Recorder([], fails="veth")
    with pytest.raises(link.LinkError), link.Namespaces(2, shell):
        pass
    assert not shell.there and any("add" in command for command in shell.commands)


def test_only_namespaces_of_ended_benches_are_stale() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    shell = Recorder([f"otil-bench-{ended.pid}-0", f"otil-bench-{os.getppid()}-0", "somebody-elses"])
    link.remove_stale(shell)
    assert shell.there == [f"otil-bench-{os.getppid()}-0", "somebody-elses"]


def test_no_link_between_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"--link 1gbit shapes the sockets of ranks on the CPU.*CUDA_VISIBLE_DEVICES"):
        link.check_possible("1gbit")


def no_link() -> str:
    """Why this machine cannot make namespaces and shape them, or an empty string."""
    try:
        link.check_possible("1gbit")
        with link.Namespaces(2) as spaces:
            spaces.shape(1e6)
    except (ValueError, link.LinkError) as error:
        return str(error)
    return ""


@pytest.fixture
def can_link() -> None:
    reason = no_link()
    if reason:
        pytest.skip(reason)


@pytest.mark.usefixtures("can_link")
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_real_link_is_made_shaped_and_removed(ranks: int) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    link.run_command(("ip", "netns", "add", f"otil-bench-{ended.pid}-0"))
    with link.Namespaces(ranks) as spaces:
        assert sorted(namespaces_of(os.getpid()))[:ranks] == spaces.names and not namespaces_of(ended.pid)
        spaces.shape(10e6)
        spaces.shape(20e6)
        listed = link.run_command(("tc", "-n", spaces.names[1], "qdisc", "show", "dev", link.DEVICE))
        assert "tbf" in listed and "rate 160Mbit" in listed
        assert throughput(spaces) < 1.3 * 20e6
    assert not namespaces_of(os.getpid())


SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 4000), timeout=20) as sender:
    sender.sendall(bytes(4_000_000)); sender.shutdown(socket.SHUT_WR); sender.recv(1)
"""
RECEIVE = """
import socket, sys, time
with socket.create_server((sys.argv[1], 4000)) as server:
    server.settimeout(20)
    print("listening", flush=True)
    sender, _ = server.accept()
    started, received = time.perf_counter(), 0
    while part := sender.recv(1 << 16):
        received += len(part)
    print(received / (time.perf_counter() - started)); sender.sendall(b"x")
"""


def throughput(spaces: link.Namespaces) -> float:
    """Bytes per second of one TCP connection from the first rank's namespace to the second's."""
    receive = [*spaces.inside(1), sys.executable, "-c", RECEIVE, link.address(1)]
    with subprocess.Popen(receive, stdout=subprocess.PIPE, text=True) as receiver:
        assert receiver.stdout is not None and receiver.stdout.readline() == "listening\n"
        subprocess.run([*spaces.inside(0), sys.executable, "-c", SEND, link.address(1)], check=True, timeout=30)
        return float(receiver.stdout.read())


def namespaces_of(owner: int) -> list[str]:
    if shutil.which("ip") is None:
        return []
    return [name for name in link.existing(link.run_command) if name.startswith(f"{link.PREFIX}{owner}-")]
