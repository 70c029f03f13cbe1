"""The server's flags: what is refused, before anything is started."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from otil_xdit.errors import FlagError
from otil_xdit.serve import main as serve_main
from otil_xdit.serve.logs import JsonLines
from otil_xdit.serve.main import main
from otil_xdit.serve.planning import RanksLaunch, check_served
from otil_xdit.serve.settings import API_KEY_VARIABLE, read_settings

WRONG = {
    "port": ("--port 70000", "argument --port: '70000'; give a whole number from 0 to 65535"),
    "queue": ("--max_queue -1", "argument --max_queue: '-1'; give a whole number from 0"),
    "timeout": ("--request_timeout soon", "argument --request_timeout: 'soon'; give a number from 0.1"),
    "not a number": ("--request_timeout nan", "argument --request_timeout: 'nan'; give a number"),
    "folder": ("--lora_dir /nowhere", "argument --lora_dir: /nowhere: no such directory"),
    "key": ("--api_key= ", "argument --api_key: is empty"),
    "address": ("--host 192.0.2.1 --port 80", "--host 192.0.2.1 --port 80: Cannot assign requested address"),
    "prompt": ("--port 0 --prompt a", "--prompt does not go together with serve: requests bring their prompts"),
    "replicas": ("--port 0 --data-parallel-degree=2", "--data_parallel_degree does not go together with serve"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_flag_is_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags, message = WRONG[case]
    assert main(["--model", "tiny-sd", *flags.split(" ")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"xfuser: error: {message}")


def test_all_other_flags_are_the_launchers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "sesame")
    given = ["--model=tiny-sd", "--max-queue", "3", "--lora_dir", str(tmp_path), "--parallel", "otil", "--height=64"]
    settings, others = read_settings(given)
    assert (settings.model, settings.name, settings.max_queue) == ("tiny-sd", "tiny-sd", 3)
    assert (settings.api_key, settings.lora_dir) == ("sesame", str(tmp_path))
    assert others == ["--model=tiny-sd", "--parallel", "otil", "--height=64"]
    check_served(others)
    with pytest.raises(FlagError, match="--profile"):
        check_served(["--profile"])


def test_another_machines_ranks_are_started_again_until_this_process_is_told_to_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rank that was killed ends with more than 128, as this process does when it is told to."""
    ends = [137, 1, 139, 143]
    monkeypatch.setattr(serve_main, "plan_ranks", lambda *flags: RanksLaunch(("--node_rank=1",), {}))
    monkeypatch.setattr(serve_main, "run_to_end", lambda command, environment: ends.pop(0))
    monkeypatch.setattr(serve_main.time, "sleep", lambda seconds: None)
    assert main(["--model", "tiny-sd", "--port", "0"]) == 143 and not ends
    ends += [137] * 3
    assert main(["--model", "tiny-sd", "--port", "0", "--max_restarts", "2"]) == 1 and not ends


def test_the_log_is_json_with_what_is_told() -> None:
    record = logging.makeLogRecord({"name": "a", "levelname": "INFO", "msg": "%s b", "args": ("x",), "request": "1"})
    line = json.loads(JsonLines().format(record))
    assert (line["message"], line["level"], line["request"]) == ("x b", "info", "1") and "args" not in line
