"""Recipes run on a Ray cluster: the work of one process each, wherever the cluster has a core to spare."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence

from tersor.errors import BadInput, TersorError
from tersor.recipes import Recipe
from tersor.survey.records import Outcome

Pair = tuple[Recipe, float]
LOCAL = "local"
"""The address that starts Ray on this machine alone."""


def on_cluster(
    address: str,
    work: Callable[[str, float], Outcome],
    pairs: Sequence[Pair],
    lost: Callable[[Recipe, float, str], Outcome],
) -> Iterator[Outcome]:
    """Outcomes as they come, each task with one core. Ray itself restarts nothing: a recipe that kills its process
    would kill the next.

    ``address``: ``local``, ``auto`` (a cluster that runs on this machine) or ``host:port``. ``work(recipe's name,
    bits)`` is sent to the other machines, so all it needs must be there under the same paths. ``lost`` makes the
    outcome of a task whose process died. Raises BadInput when Ray is not installed or no cluster answers.
    """
    # Without this Ray reports the use of a survey to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise BadInput("--ray needs Ray, which is not installed: pip install 'tersor[ray]'.") from error
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(
                address=None if address == LOCAL else address,
                include_dashboard=False if address == LOCAL else None,
                log_to_driver=False,
                logging_level="error",
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise BadInput(
                f"No Ray cluster answers at --ray {address} ({error}); start one with `ray start --head`, or give "
                f"--ray local."
            ) from error
    try:

        def plain(name: str, bits: float) -> Outcome:
            """Ray takes nothing callable but functions."""
            return work(name, bits)

        task = ray.remote(num_cpus=1, max_retries=0)(plain)
        running = {task.remote(recipe.name, bits): (recipe, bits) for recipe, bits in pairs}
        while running:
            ready, _ = ray.wait(list(running), num_returns=1)
            recipe, bits = running.pop(ready[0])
            try:
                outcome = ray.get(ready[0])
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
                outcome = lost(recipe, bits, f"Its process on the cluster ended: {error}")
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, TersorError) else error) from None
            yield outcome
    finally:
        if started:
            ray.shutdown()
