"""The way to a Ray cluster: one that runs already, or one that is started on this machine."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

from vlm.errors import UserError

ANSWER_SECONDS = 5.0


def connect(address: str | None = None, num_cpus: int | None = None) -> tuple[Any, bool]:
    """(the module `ray`, connected; whether this call did it). None starts a cluster here, of `num_cpus` cores.

    "auto" finds the cluster of this machine. An address is HOST:PORT, or what else `ray.init` takes.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--on ray needs Ray: pip install 'vlm-less-supervision[ray]'") from None
    if ray.is_initialized():
        return ray, False
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit() and "/" not in host:
        try:  # Ray itself asks for two minutes
            socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
        except OSError as error:
            raise UserError(f"--address {address}: no Ray cluster answers ({error.strerror or error})") from None
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a job without a GPU keeps its environment
    ours: dict[str, Any] = {"num_cpus": num_cpus, "include_dashboard": False} if address is None else {}
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **ours)
    except ConnectionError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--address {address}: no Ray cluster answers ({reason}). One that asks for a token needs the same "
            "RAY_AUTH_MODE and token here"
        ) from None
    return ray, True
