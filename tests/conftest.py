"""Every test runs on one thread, without the network, and draws the same examples each time."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Before whoever imports gRPC. Tests start processes while it is in use: its handlers would set its threads going in the child,
# between fork and exec, and now and then the child hangs there.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")


def pytest_configure(config: pytest.Config) -> None:
    """Set what holds for the whole run before any test module is imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Begun in a shell's background we are deaf to Ctrl-C, and so would be every command that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    settings.register_profile("house", deadline=None, derandomize=True, max_examples=40, database=None)
    settings.load_profile("house")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A command that runs in this process sets its own number; two threads beside other work wait for each other by turns."""
    yield
    torch.set_num_threads(1)
