"""Ranks of one attempt find each other, whatever an earlier one has left in torchrun's store."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from tunesmith.distributed.rendezvous import (
    ANNOUNCED,
    announced_attempt,
    find_attempt,
    rendezvous,
)

PATIENCE = timedelta(seconds=30)
BRIEF = timedelta(seconds=0.5)


@pytest.fixture
def store() -> Any:
    """A store as the launcher of a job keeps it."""
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def test_an_attempt_is_found_by_all_others(store: Any) -> None:
    with announced_attempt(store) as name:
        assert [find_attempt(store, "localhost", PATIENCE) for _ in range(3)] == [name] * 3


def test_an_attempt_that_has_ended_is_not_taken_for_the_next(store: Any) -> None:
    with announced_attempt(store) as old:
        pass
    with pytest.raises(TimeoutError):
        find_attempt(store, "localhost", BRIEF)
    with ThreadPoolExecutor() as pool:
        early = pool.submit(find_attempt, store, "localhost", PATIENCE)
        with announced_attempt(store) as new:
            assert early.result() == new != old


@pytest.fixture
def stranger() -> Iterator[int]:
    """A port on which something else listens, as when a freed one was given away."""
    with socket.create_server(("", 0)) as server:
        server.settimeout(0.05)

        def serve() -> None:
            while server.fileno() != -1:
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                except OSError:
                    return
                with connection:
                    connection.sendall(b"220 mail\r\n")

        with ThreadPoolExecutor() as pool:
            pool.submit(serve)
            yield server.getsockname()[1]
            server.close()


def test_something_else_on_an_old_port_is_not_taken_for_it(store: Any, stranger: int) -> None:
    store.set(ANNOUNCED, f"{stranger} tunesmith-00")
    with pytest.raises(TimeoutError):
        find_attempt(store, "localhost", BRIEF)


def test_keys_of_an_attempt_are_its_own(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with rendezvous(0, timeout=PATIENCE) as first:
        first.store.set("address", "old")
        with rendezvous(1, timeout=PATIENCE) as other:
            assert other.store.get("address") == b"old"
            assert other.first
    with rendezvous(0, timeout=PATIENCE) as second, rendezvous(1, timeout=PATIENCE) as other:
        assert not other.store.check(["address"])
        assert not second.first
        assert not other.first
