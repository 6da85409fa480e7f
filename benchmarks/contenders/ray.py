"""Ray: an actor on a local cluster of 2 CPUs; tensors as numpy arrays, which its object store hands on uncopied."""

from __future__ import annotations

import logging
import os
import tempfile
from typing import Any

import ray
import torch

from benchmarks.contenders.functions import echo, noop, sink

OBJECT_STORE_NBYTES = 2 << 30


class _Server:
    """The actor. What arrives is read-only memory of the object store."""

    def __init__(self) -> None:
        torch.set_num_threads(1)

    def noop(self) -> None:
        noop()

    def echo(self, x: Any) -> Any:
        return echo(x)

    def sink(self, x: Any) -> None:
        sink(x)


class Ray:
    """One actor, called from the driver."""

    def start(self) -> None:
        """See `Contender.start`."""
        torch.set_num_threads(1)
        os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")
        self._directory = tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_NBYTES,
            _temp_dir=self._directory.name,
        )
        self._actor: Any = ray.remote(_Server).remote()
        self.noop()

    def stop(self) -> None:
        """See `Contender.stop`."""
        ray.shutdown()
        self._directory.cleanup()

    def noop(self) -> None:
        """See `Contender.noop`."""
        ray.get(self._actor.noop.remote())

    def noops(self, n: int) -> None:
        """See `Contender.noops`."""
        ray.get([self._actor.noop.remote() for _ in range(n)])

    def echo(self, x: torch.Tensor) -> torch.Tensor:
        """See `Contender.echo`."""
        return torch.as_tensor(ray.get(self._actor.echo.remote(x.numpy())))

    def sink(self, x: torch.Tensor) -> None:
        """See `Contender.sink`."""
        ray.get(self._actor.sink.remote(x.numpy()))
