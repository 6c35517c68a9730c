"""The survey: every recipe at every number of bits, each result kept as soon as it is there."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from torch import nn

from tersor import pipeline
from tersor.anatomy import cache_folder
from tersor.errors import BadInput
from tersor.recipes import Recipe, chosen
from tersor.stages.context import Progress, silent
from tersor.stages.options import Options
from tersor.stages.text import prepare_texts
from tersor.stages.weights import check_finite
from tersor.survey.bench import (
    Bench,
    blank,
    measure_gradients,
    measure_shared,
    open_bench,
    run_recipe,
    shared_measured,
)
from tersor.survey.cluster import on_cluster
from tersor.survey.manual import write_manual
from tersor.survey.page import setting, write_page
from tersor.survey.records import Database, Outcome
from tersor.survey.verdicts import Verdict, verdicts

STAGE = "survey"
DATABASE = "survey.sqlite"
PAGE = "survey.html"

Told = Callable[[Outcome], None]


@dataclass(frozen=True)
class Request:
    """What a survey is asked for.

    ``processes``: recipes run side by side. ``ray``: address of a Ray cluster to run them on instead, ``local`` for one
    of this machine. ``retry``: run again what failed before. ``docs``: folder for a page of documentation for each
    recipe.
    """

    model: str | Path | nn.Module
    output: Path
    bits: tuple[float, ...]
    options: Options
    recipes: tuple[str, ...] | None = None
    processes: int = 1
    ray: str | None = None
    retry: bool = False
    docs: Path | None = None
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        if not self.bits or not all(0.5 <= bits <= 8 for bits in self.bits):
            raise BadInput(
                f"--bits {','.join(f'{bits:g}' for bits in self.bits)} cannot be used; give numbers from 0.5 to 8, "
                f"such as 2,3,4."
            )
        if len(set(self.bits)) < len(self.bits):
            raise BadInput(f"--bits {','.join(f'{bits:g}' for bits in self.bits)} names a number twice.")
        if self.processes < 1:
            raise BadInput(f"--workers {self.processes} cannot be used; give a whole number of at least 1.")
        if (self.processes > 1 or self.ray is not None) and isinstance(self.model, nn.Module):
            raise BadInput("A model that is already in memory is surveyed in one process; give its folder instead.")
        if self.processes > 1 and self.ray is not None:
            raise BadInput("--workers and --ray exclude each other: on a cluster, Ray says how many run side by side.")


@dataclass(frozen=True)
class Survey:
    """All that is known of a model after a survey, results of earlier ones in the same folder included."""

    model: str
    outcomes: tuple[Outcome, ...]
    verdicts: tuple[Verdict, ...]
    page: Path
    database: Path
    new: int
    setting: Mapping[str, str]
    """What results were measured on, for people."""


def run_survey(request: Request, *, progress: Progress = silent, told: Told | None = None) -> Survey:
    """Run what is not in the database yet, and write the page. ``told`` gets each new outcome.

    A recipe that fails is recorded with its error, and the survey goes on. Killed and run again, it repeats nothing
    that was finished. Raises a :class:`~tersor.errors.TersorError` for bad input.
    """
    picked = chosen(request.recipes)
    _make_folder(request.output)
    with pipeline.one_thread_each():
        bench = _open(_alone(request), progress)
        measure_shared(bench)
        database = Database(request.output / DATABASE)
        try:
            return _run(request, bench, picked, database, progress, told)
        finally:
            database.close()


def _alone(request: Request) -> Request:
    """The request for when nothing runs beside it, as while what all recipes share is measured."""
    workers = request.options.workers
    if workers is None:
        return request
    return replace(request, options=replace(request.options, workers=workers * request.processes))


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"The folder {path} cannot be made ({error.strerror}); give another --output.") from error


def _open(request: Request, progress: Progress) -> Bench:
    context = pipeline.light_context(request.model, request.options, progress=progress, cache_dir=request.cache_dir)
    context.check_streamed()
    texts = prepare_texts(
        context.source,
        request.options,
        cache=cache_folder(request.cache_dir),
        workers=context.workers,
        progress=progress,
    )
    bench = open_bench(context, texts, request.output / "work")
    check_finite(bench.context)
    return bench


def _run(
    request: Request,
    bench: Bench,
    picked: dict[str, Recipe],
    database: Database,
    progress: Progress,
    told: Told | None,
) -> Survey:
    steps = len(bench.context.anatomy.blocks) + 1
    pairs = [(recipe, bits) for bits in request.bits for recipe in picked.values()]
    progress(STAGE, 0, len(pairs) * steps)
    open_pairs, done, new = [], 0, 0

    def keep(outcome: Outcome) -> None:
        nonlocal done, new
        database.add(outcome)
        done, new = done + 1, new + 1
        _written(request, bench, database)
        progress(STAGE, done * steps, len(pairs) * steps)
        if told is not None:
            told(outcome)

    for recipe, bits in pairs:
        outline = blank(bench, recipe, bits)[0]
        before = database.find(outline)
        if before is not None and not (request.retry and before.status == "failed"):
            done += 1
        elif outline.status != "measured":
            keep(outline)
        else:
            open_pairs.append((recipe, bits))
    progress(STAGE, done * steps, len(pairs) * steps)
    measure_gradients(bench, [recipe for recipe, _ in open_pairs])
    if request.ray is not None and open_pairs:
        work = partial(_elsewhere, _for_cluster(request))
        for outcome in on_cluster(request.ray, work, open_pairs, partial(_lost, bench)):
            keep(outcome)
    elif request.processes == 1:
        for recipe, bits in open_pairs:
            keep(
                run_recipe(bench, recipe, bits, lambda block: progress(STAGE, done * steps + block, len(pairs) * steps))
            )
    else:
        for outcome in _side_by_side(request, bench, open_pairs):
            keep(outcome)
    found = _written(request, bench, database, new)
    if request.docs is not None:
        write_manual(request.docs, chosen(None), found.outcomes, found.verdicts, setting(bench))
    return found


def _written(request: Request, bench: Bench, database: Database, new: int = 0) -> Survey:
    """The page as of now; it is written after every result, so that a long survey can be watched."""
    outcomes = database.outcomes(bench.context.source.fingerprint(), bench.key)
    known = chosen(None)
    found = verdicts(known, outcomes)
    page = request.output / PAGE
    write_page(page, bench, known, outcomes, found)
    facts = setting(bench)
    model = str(bench.context.source.origin)
    return Survey(model, tuple(outcomes), tuple(found), page, request.output / DATABASE, new, facts)


def _side_by_side(request: Request, bench: Bench, pairs: list[tuple[Recipe, float]]) -> Iterator[Outcome]:
    """Outcomes as they come, from a few processes that take one recipe after the other: importing takes seconds.

    One that dies takes nothing with it but the recipe it was at.
    """
    spawn = multiprocessing.get_context("spawn")
    waiting = list(reversed(pairs))
    processes: dict[Connection, Any] = {}
    running: dict[Connection, tuple[Recipe, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < request.processes:
                orders = next((one for one in processes if one not in running), None)
                if orders is None:
                    orders, theirs = spawn.Pipe()
                    processes[orders] = spawn.Process(target=_child, args=(request, theirs), daemon=True)
                    processes[orders].start()
                    theirs.close()
                running[orders] = recipe, bits = waiting.pop()
                with suppress(ConnectionError):  # of one that died meanwhile; what is read from it then ends at once
                    orders.send((recipe.name, bits))
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                recipe, bits = running.pop(ready)
                try:
                    outcome = ready.recv()
                except (EOFError, ConnectionError):
                    process = processes.pop(ready)
                    process.join()
                    ready.close()
                    why = f"Its process ended with code {process.exitcode}, perhaps for want of memory."
                    outcome = _lost(bench, recipe, bits, why)
                yield outcome
    finally:
        for process in processes.values():
            process.terminate()


def _for_cluster(request: Request) -> Request:
    """The request with paths that do not depend on the current folder, for one core."""

    def fixed(name: str | None) -> str | None:
        return str(Path(name).absolute()) if name is not None and Path(name).exists() else name

    options = replace(
        request.options, workers=1, text=fixed(request.options.text), eval_text=fixed(request.options.eval_text)
    )
    return replace(
        request,
        model=request.model if isinstance(request.model, nn.Module) else fixed(str(request.model)) or "",
        output=request.output.absolute(),
        options=options,
        recipes=None if request.recipes is None else tuple(fixed(name) or name for name in request.recipes),
        cache_dir=None if request.cache_dir is None else request.cache_dir.absolute(),
    )


def _lost(bench: Bench, recipe: Recipe, bits: float, why: str) -> Outcome:
    return replace(blank(bench, recipe, bits)[0], status="failed", error=why)


def _child(request: Request, orders: Connection) -> None:
    """What a process of its own does: recipes at numbers of bits, one after the other."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with pipeline.one_thread_each():
        picked, bench = _prepared(request)
        while True:
            name, bits = orders.recv()
            orders.send(run_recipe(bench, picked[name], bits, lambda _: None))


def _end_with_parent() -> None:
    """A survey that is killed cannot stop its processes; nobody would read what they find."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _elsewhere(request: Request, name: str, bits: float) -> Outcome:
    """One recipe at one number of bits, in another process that sees the same folders."""
    with pipeline.one_thread_each():
        picked, bench = _prepared(request)
        return run_recipe(bench, picked[name], bits, lambda _: None)


def _prepared(request: Request) -> tuple[dict[str, Recipe], Bench]:
    """The recipes by name, and the bench with what they share."""
    bench = _open(request, silent)
    if not shared_measured(bench):
        raise BadInput(
            f"The folder {request.output.absolute()} with what recipes share is not visible to all processes of "
            f"the survey; put --output on a disk that every machine of the cluster has under that path."
        )
    return chosen(request.recipes), bench
