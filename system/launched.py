"""What a launcher says of a process: which of how many it is, and where rank 0 is.

It is in the environment, and differs by what MLX adds up with: a hosts file for the
ring, devices for JACCL, addresses for NCCL; of MPI only numbers are known.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from system.errors import InputError

#: Says where rank 0 listens, "host:port", where what the launcher says will not do.
ADDRESS = "MLX_T5_ADDRESS"


class Place(NamedTuple):
    """Which of how many this process is, by which of MLX's means they add up, and where
    rank 0 listens."""

    rank: int
    size: int
    backend: str
    host: str
    port: int


def place_in(environment: "os._Environ[str] | dict[str, str]") -> Place | None:
    """What a launcher says about this process; None where it is the only one.

    Raises:
        InputError: what it says is odd, or lacks where rank 0 is.
    """
    said = environment.get
    if said("MLX_RANK") and said("MLX_HOSTFILE"):
        hosts = [_address(host[0]) for host in _listed(said("MLX_HOSTFILE"))]
        ports = [_address(a)[1] for h in _listed(said("MLX_HOSTFILE")) for a in h]
        size, backend = len(hosts), "ring"
        host, port = hosts[0][0] if hosts else "", max(ports, default=0) + 1
    elif said("MLX_RANK") and said("MLX_JACCL_COORDINATOR"):
        size, backend = len(_listed(said("MLX_IBV_DEVICES") or "")), "jaccl"
        host, port = _address(said("MLX_JACCL_COORDINATOR"))
        port += 1
    elif said("MLX_RANK") and said("NCCL_HOST_IP"):
        size, backend = _number(said("MLX_WORLD_SIZE")), "nccl"
        host, port = said("NCCL_HOST_IP"), _number(said("NCCL_PORT")) + 1
    elif said("OMPI_COMM_WORLD_SIZE") or said("PMI_SIZE"):
        size = _number(said("OMPI_COMM_WORLD_SIZE") or said("PMI_SIZE"))
        backend, host, port = "mpi", "", 0
    else:
        return None
    if size < 2:
        return None
    names = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    rank = _number(next((said(name) for name in names if said(name)), None))
    if not 0 <= rank < size:
        raise InputError(f"the launcher says that this is rank {rank} of {size}")
    if said(ADDRESS):
        host, port = _address(said(ADDRESS))
    if not host:
        raise InputError(f"MPI does not say where rank 0 is: {ADDRESS}=HOST:PORT does")
    if not 0 < port < 1 << 16:
        raise InputError(
            f"rank 0 would listen at port {port}, which there is not: "
            f"{ADDRESS}=HOST:PORT names another"
        )
    return Place(rank, size, backend, host, port)


def _listed(path: str) -> list[Any]:
    """What a launcher's file lists; nothing where it has but one process."""
    try:
        text = Path(path).read_text("utf-8")
        listed = json.loads(text) if text.strip() else []
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"the launcher's file cannot be read: {error}") from None
    if not isinstance(listed, list) or not all(
        isinstance(host, list) and host for host in listed
    ):
        raise InputError(f"the launcher's file {path} lists no hosts")
    return listed


def _address(text: Any) -> tuple[str, int]:
    host, _, port = str(text).rpartition(":")
    if not host:
        raise InputError(f"'{text}' is no address: HOST:PORT is one")
    return host.strip("[]"), _number(port)


def _number(text: str | None) -> int:
    if not (text and text.isascii() and text.isdecimal() and len(text) < 10):
        raise InputError(f"the launcher says '{text}' where a number has to be")
    return int(text)
