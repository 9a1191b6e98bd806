"""The machine under the process: how its threads wait, and how many there are."""

import os
import subprocess
import sys

import pytest

from llmworks.core.errors import UserError
from llmworks.core.machine import SPIN_COUNT, bound_spinning, get_thread_count, set_threads


def read_spin_count(**given: str) -> str:
    """What libgomp itself reports when torch is imported after llmworks, in a fresh process."""
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", "import llmworks, torch; torch.ones(9)"],
        env={**clean, "OMP_DISPLAY_ENV": "verbose", **given},
        capture_output=True,
        text=True,
        check=True,
    )
    return next(line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line).partition("=")[2].strip(" '")


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is the OpenMP library of torch on Linux")
def test_waiting_threads_sleep_early_and_a_users_setting_wins() -> None:
    assert read_spin_count() == str(SPIN_COUNT)
    assert read_spin_count(OMP_WAIT_POLICY="passive") == "0"


@pytest.mark.parametrize(("name", "value"), [("GOMP_SPINCOUNT", "7"), ("OMP_WAIT_POLICY", "active")])
def test_a_users_way_to_wait_is_kept(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for one in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(one, raising=False)
    monkeypatch.setenv(name, value)
    bound_spinning()
    assert os.environ[name] == value
    assert {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys() == {name}


def test_thread_count_is_the_variable_or_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMWORKS_THREADS", "3")
    assert get_thread_count() == 3
    monkeypatch.delenv("LLMWORKS_THREADS")
    assert get_thread_count() == os.cpu_count()
    for wrong in ("two", "0", "-1", "²"):
        monkeypatch.setenv("LLMWORKS_THREADS", wrong)
        with pytest.raises(UserError, match="positive integer"):
            get_thread_count()


def test_set_threads_reaches_torch_and_processes_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    try:
        set_threads(2)
        assert torch.get_num_threads() == 2
        assert os.environ["OMP_NUM_THREADS"] == "2"
    finally:
        torch.set_num_threads(before)
