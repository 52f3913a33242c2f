"""A rendezvous that ignores stale store keys after torchrun restarts the ranks.

torchrun keeps one store for a job over all restarts, and old keys stay in it. A restarted rank
would read the addresses on which the others listened before they were killed. torchrun's restart
count cannot tell attempts apart: a machine that joins another machine's restart counts none. So
rank 0 listens on a port and announces it in the store. A rank that reaches rank 0 on that port has
found the living attempt, and uses its name as the prefix of all keys.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import Any

from tunesmith.distributed.env import restarted

ANNOUNCED = "tunesmith/attempt"
COUNTED = "tunesmith/attempts"
_SECONDS = 5.0
"""How long an answer of the first rank may take."""
_PAUSE = 0.1


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """`store` is for a process group; `first` is false if this job has started ranks before."""

    store: Any
    first: bool


@contextmanager
def rendezvous(rank: int, *, timeout: timedelta) -> Iterator[Rendezvous]:
    """The store in which to make the process group of this attempt, inside the `with`.

    Raises:
        TimeoutError: the first rank of this attempt was not found.
    """
    from torch.distributed.rendezvous import rendezvous as torch_rendezvous

    store: Any = next(iter(torch_rendezvous("env://", timeout=timeout)))[0]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        yield Rendezvous(store, first=not restarted())  # the first rank's own, and as old as it
    elif rank == 0:
        with announced_attempt(store) as name:
            yield _rendezvous(store, name)
    else:
        yield _rendezvous(store, find_attempt(store, os.environ["MASTER_ADDR"], timeout))


def _rendezvous(store: Any, name: str) -> Rendezvous:
    from torch.distributed.distributed_c10d import PrefixStore

    return Rendezvous(PrefixStore(name, store), first=name.startswith("1-"))


@contextmanager
def announced_attempt(store: Any) -> Iterator[str]:
    """A name for the attempt of the first rank, told to whoever connects inside the `with`."""
    name = f"{store.add(COUNTED, 1)}-{secrets.token_hex(8)}"
    with _listener() as listener:
        Thread(target=_tell, args=(listener, name.encode()), daemon=True).start()
        store.set(ANNOUNCED, f"{listener.getsockname()[1]} {name}")
        try:
            yield name
        finally:
            with suppress(OSError):  # wakes the thread, which closing alone would not
                listener.shutdown(socket.SHUT_RDWR)


def find_attempt(store: Any, host: str, timeout: timedelta) -> str:
    """The name of the attempt that is alive: of an announcement whose author answers.

    Raises:
        TimeoutError: there was none in this time.
    """
    until = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < until:
        port, name = store.get(ANNOUNCED).decode().split()
        if _answer(host, int(port)) == name:
            return name
        time.sleep(_PAUSE)
    raise TimeoutError(f"rank 0 did not answer on {host}")


def _listener() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _tell(listener: socket.socket, name: bytes) -> None:
    with suppress(OSError):  # of the listener, when all have met
        while True:
            asker, _ = listener.accept()
            with asker, suppress(OSError):  # one that left asks again
                asker.sendall(name)


def _answer(host: str, port: int) -> str | None:
    try:
        with socket.create_connection((host, port), timeout=_SECONDS) as connection:
            connection.settimeout(_SECONDS)
            return connection.makefile("rb").read(64).decode("ascii", "replace")
    except OSError:
        return None
