"""A slow link between the ranks of one machine: network namespaces, virtual Ethernet and `tc`'s token bucket.

Each rank has a namespace with one interface, `DEVICE`. Two ranks' interfaces are the two ends of one cable; more hang
on a bridge in a namespace of its own. Every direction of every cable is shaped to the same rate by a token bucket
(`tbf`), which holds data back and does not lose it unless `QUEUE_MS` of it wait. No delay is emulated (that needs the
kernel's `netem`, which not every kernel has): a small message takes as long as on this machine's own network stack.

It needs root, Linux, and iproute2's `ip` and `tc`. Addresses exist inside the namespaces only, and nothing outside them
is changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence

import psutil
import torch

PREFIX = "otil-bench-"
"""Of the names of all namespaces; the process id of the bench follows, by which a killed one's are known."""

DEVICE = "veth0"
BRIDGE = "switch0"

BURST_BYTES, BURST_SECONDS = 16 << 10, 1e-3
"""Size of the token bucket: what may pass at once after a pause. Little, because small messages come after pauses; but
at high rates the kernel's timer could not refill a small bucket in time."""

QUEUE_MS = 400

COMMAND_SECONDS = 20.0

Command = tuple[str, ...]


class LinkError(RuntimeError):
    """A command that makes the link failed; the message is one line."""

    code = 1


def check_possible(text: str) -> None:
    """Refuse ``--link`` where this process may not make one.

    Raises:
        ValueError: naming what is missing.
    """
    if not sys.platform.startswith("linux"):
        raise ValueError(f"--link {text} needs Linux's network namespaces; this is {sys.platform}")
    if torch.cuda.is_available():
        raise ValueError(
            f"--link {text} shapes the sockets of ranks on the CPU, and NCCL's messages between cards take other ways; "
            "hide the cards (CUDA_VISIBLE_DEVICES=-1) or leave it out"
        )
    if os.geteuid() != 0:
        raise ValueError(f"--link {text} needs root, for network namespaces; run it as root or leave it out")
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        raise ValueError(f"--link {text} needs iproute2; {' and '.join(missing)} not found")


def address(rank: int) -> str:
    """Return a rank's address inside its namespace."""
    return f"10.77.0.{rank + 1}"


def make_commands(names: Sequence[str], bridge: str) -> list[Command]:
    """Return what makes the namespaces and the cables between them.

    Args:
        names: of the namespaces, one a rank.
        bridge: name of the namespace that joins more than two.
    """
    spaces = [*names, bridge] if len(names) > 2 else list(names)
    commands: list[Command] = [("ip", "netns", "add", name) for name in spaces]
    if len(names) > 2:
        commands += [
            ("ip", "-n", bridge, "link", "add", BRIDGE, "type", "bridge"),
            ("ip", "-n", bridge, "link", "set", BRIDGE, "up"),
        ]
        for rank, name in enumerate(names):
            port = f"port{rank}"
            commands += [
                _cable(name, port, bridge),
                ("ip", "-n", bridge, "link", "set", port, "master", BRIDGE, "up"),
            ]
    else:
        commands.append(_cable(names[0], DEVICE, names[1]))
    for rank, name in enumerate(names):
        commands += [
            ("ip", "-n", name, "address", "add", f"{address(rank)}/24", "dev", DEVICE),
            ("ip", "-n", name, "link", "set", "lo", "up"),
            ("ip", "-n", name, "link", "set", DEVICE, "up"),
            # Steps have pauses between messages. A connection shall not start slowly again after each.
            ("ip", "netns", "exec", name, "sh", "-c", "echo 0 > /proc/sys/net/ipv4/tcp_slow_start_after_idle"),
        ]
    return commands


def shape_commands(names: Sequence[str], bridge: str, rate: float) -> list[Command]:
    """Return what shapes both directions of every rank's cable to `rate` bytes per second."""
    ends = [(name, DEVICE) for name in names]
    if len(names) > 2:
        ends += [(bridge, f"port{rank}") for rank in range(len(names))]
    burst = max(BURST_BYTES, round(rate * BURST_SECONDS))
    bucket = ("tbf", "rate", f"{round(8 * rate)}bit", "burst", f"{burst}b", "latency", f"{QUEUE_MS}ms")
    return [("tc", "-n", name, "qdisc", "replace", "dev", device, "root", *bucket) for name, device in ends]


def _cable(name: str, peer: str, peer_name: str) -> Command:
    return ("ip", "link", "add", DEVICE, "netns", name, "type", "veth", "peer", "name", peer, "netns", peer_name)


class Namespaces:
    """The namespaces of a run; a context that makes and removes them.

    Args:
        ranks: 2 or more.
        execute: runs a command and gives what it printed.
    """

    def __init__(self, ranks: int, execute: Callable[[Command], str] | None = None) -> None:
        assert ranks >= 2, "one rank has nobody to talk to"
        self.names = [f"{PREFIX}{os.getpid()}-{rank}" for rank in range(ranks)]
        self._bridge = f"{PREFIX}{os.getpid()}-switch"
        self._execute = execute or run_command

    def __enter__(self) -> Namespaces:
        remove_stale(self._execute)
        try:
            for command in make_commands(self.names, self._bridge):
                self._execute(command)
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def shape(self, rate: float) -> None:
        """Limit every direction of every cable to `rate` bytes per second."""
        for command in shape_commands(self.names, self._bridge, rate):
            self._execute(command)

    def remove(self) -> None:
        """Remove what there is; processes inside must have ended."""
        there = existing(self._execute)
        for name in (*self.names, self._bridge):
            if name in there:
                self._execute(("ip", "netns", "delete", name))

    def inside(self, rank: int) -> Command:
        """Return what to put before a command that shall run in a rank's namespace."""
        return ("ip", "netns", "exec", self.names[rank])

    @property
    def environment(self) -> dict[str, str]:
        """What the ranks' processes need to find each other."""
        return {"MASTER_ADDR": address(0), "GLOO_SOCKET_IFNAME": DEVICE}


def existing(execute: Callable[[Command], str]) -> list[str]:
    """Return the names of all namespaces of this machine that begin with `PREFIX`."""
    lines = execute(("ip", "netns", "list")).splitlines()
    return [line.split()[0] for line in lines if line.startswith(PREFIX)]


def remove_stale(execute: Callable[[Command], str]) -> None:
    """Remove the namespaces of runs that do not exist any more: they were killed."""
    for name in existing(execute):
        owner = name.removeprefix(PREFIX).split("-")[0]
        if not (owner.isdecimal() and psutil.pid_exists(int(owner))) or int(owner) == os.getpid():
            execute(("ip", "netns", "delete", name))


def run_command(command: Command) -> str:
    """Run a command in a session of its own, so that no key press ends it halfway.

    Returns:
        What it printed.

    Raises:
        LinkError: with the last line that it said.
    """
    done = subprocess.run(
        command, capture_output=True, text=True, start_new_session=True, timeout=COMMAND_SECONDS, check=False
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise LinkError(f"{' '.join(command)}: {said[-1] if said else f'exit code {done.returncode}'}")
    return done.stdout
