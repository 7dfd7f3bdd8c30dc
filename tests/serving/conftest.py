"""A running server with the bundled pair."""

import pytest
from running import Running


@pytest.fixture(scope="session")
def server():
    running = Running("--max-batch", "8", "--max-queue", "64")
    yield running
    assert running.end() == (0, "")
    assert not any("Traceback" in line for line in running.said), running.said
