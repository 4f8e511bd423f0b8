"""``rematch index`` and ``rematch search``."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from rematch.console import say
from rematch.data.corpus import Corpus, open_corpus
from rematch.encoding.encoder import Encoder
from rematch.errors import DataError, RematchError
from rematch.model import ReMatch
from rematch.search.build import Report, build
from rematch.search.index import ANN, Index
from rematch.search.storage import exists

_FAILURES_SHOWN = 5
_BY = {"cosine": "cosine", "maxsim": "MaxSim"}
_TINY = (
    "rematch-tiny knows Picto's emoji scenes and little else; train a model for your own pictures."
)


@dataclass(frozen=True)
class IndexOptions:
    """The command's options; see ``rematch index --help``."""

    model: str
    corpus: str
    output: str
    tokens: bool = False
    dimensions: int = 0
    ann: str = "auto"
    add: bool = False
    max_failures: float = 0.2
    engine: str = "local"
    actors: int = 2
    batch_tokens: int | None = None
    workers: int | None = None


def run_index(options: IndexOptions) -> Report:
    """Make an index or bring it up to date, and say what was done.

    Raises:
        RematchError: If an option does not fit, or as for building.
    """
    if options.ann not in ("auto", "none", *ANN):
        raise DataError(f"--ann {options.ann} is unknown; choose auto, none, {', '.join(ANN)}.")
    if options.engine not in ("local", "ray"):
        raise RematchError(f"--engine {options.engine} is unknown; choose local or ray.")
    corpus = open_corpus(options.corpus)
    model = ReMatch(options.model)
    index = _index(options, corpus, model)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(show_speed=True),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        bar = shown.add_task("documents", total=corpus.size)
        settings: dict[str, Any] = {
            "keep": options.add,
            "most_failures": options.max_failures,
            "ann": options.ann,
            "progress": lambda done, total: shown.update(bar, completed=done, total=total),
        }
        if options.engine == "ray":
            from rematch.search.ray import build as build_with_ray

            report = build_with_ray(index, corpus, options.model, options.actors, **settings)
        else:
            encoder = Encoder(
                model, batch_tokens=options.batch_tokens, workers=options.workers, warn=say
            )
            report = build(index, corpus, encoder, **settings)
    _tell(index, report, options)
    return report


def _index(options: IndexOptions, corpus: Corpus, model: ReMatch) -> Index:
    if not exists(options.output):
        return Index.create(
            options.output,
            model,
            name=str(Path(options.model).resolve())
            if Path(options.model).is_dir()
            else options.model,
            corpus=corpus.name,
            dimensions=options.dimensions,
            tokens=options.tokens,
        )
    index = Index.open(options.output, model)
    kept = index.about
    if options.tokens and not kept["tokens"]:
        raise DataError(f"{options.output}: was made without --tokens. Make another index.")
    if options.dimensions and options.dimensions != kept["dimensions"]:
        raise DataError(
            f"{options.output}: keeps {kept['dimensions']} dimensions. Make another index."
        )
    if corpus.name != kept["corpus"] and not options.add:
        raise DataError(
            f"{options.output}: is an index of {kept['corpus']}. To add {corpus.name} to it, say "
            "--add; otherwise choose another --output."
        )
    return index


def _tell(index: Index, report: Report, options: IndexOptions) -> None:
    done = [f"{report.encoded:,} encoded"]
    for count, what in (
        (report.unchanged, "unchanged"),
        (report.reused, "with a content that was encoded before"),
        (report.deleted, "no longer there and taken out"),
    ):
        done += [f"{count:,} {what}"] if count else []
    console = Console(soft_wrap=True, highlight=False)
    console.print(escape(f"{len(index):,} documents in {options.output}: {', '.join(done)}."))
    if report.failures:
        say(
            f"{len(report.failures):,} of {report.seen:,} documents cannot be read and are not in "
            "the index:"
        )
        for name, why in list(report.failures.items())[:_FAILURES_SHOWN]:
            say(f"  {name!r}: {why}")
        if len(report.failures) > _FAILURES_SHOWN:
            say(f"  … all of them are in {options.output}/report.json")
    if options.model == "rematch-tiny":
        say(_TINY)


def run_search(
    uri: str,
    query: dict[str, Any],
    *,
    top: int = 10,
    where: str = "",
    rerank: str = "",
    exact: bool = False,
    model: str | None = None,
    as_json: bool = False,
) -> None:
    """Search and print; options as for :meth:`~rematch.search.index.Index.search`."""
    index = Index.open(uri, model)
    if not len(index):
        raise DataError(f"{uri}: the index is empty.")
    hits = index.search(query, top, where=where, rerank=rerank, exact=exact)
    if as_json:
        for hit in hits:
            sys.stdout.write(json.dumps(asdict(hit), ensure_ascii=False) + "\n")
        return
    names = [name for name in index.metadata_columns if any(name in hit.metadata for hit in hits)]
    with_text = any(hit.text for hit in hits)
    table = Table("")
    table.add_column("document", overflow="fold")
    for name in [*(["text"] if with_text else []), *names]:
        table.add_column(escape(name))
    table.add_column("score", justify="right")
    table.add_column("by")
    for rank, hit in enumerate(hits, 1):
        cells = [
            hit.id,
            *([_short(hit.text)] if with_text else []),
            *(str(hit.metadata.get(n, "")) for n in names),
        ]
        table.add_row(
            str(rank),
            *map(escape, cells),
            f"{hit.score:.3f}",
            _BY.get(hit.by, f"P(yes), {hit.by}"),
        )
    Console().print(table)
    if not hits:
        Console().print("Nothing meets the condition." if where else "Nothing was found.")
    if index.about["model"] == "rematch-tiny":
        say(_TINY)


def _short(text: str, most: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
