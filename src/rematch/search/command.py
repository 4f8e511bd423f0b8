"""``rematch index`` and ``rematch search``: run, and print what came of it."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

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
from rematch.data.clips import FRAMES
from rematch.data.corpus import Corpus, open_corpus
from rematch.data.instructions import read_table
from rematch.data.pages import PdfPage
from rematch.encoding.encoder import Encoder
from rematch.errors import DataError, RematchError
from rematch.model import ReMatch
from rematch.search.approximate import check_kind
from rematch.search.build import Report, build
from rematch.search.hits import Hits
from rematch.search.index import Index
from rematch.search.retrieval import Mode
from rematch.search.storage import REPORT, exists, is_local

_FAILURES_PRINTED = 5
_SCORE_NAMES = {"cosine": "cosine", "bm25": "BM25", "rrf": "RRF", "maxsim": "MaxSim"}
_TINY = (
    "rematch-tiny knows Picto's emoji scenes and little else; train a model for your own pictures."
)


@dataclass(frozen=True)
class IndexOptions:
    """Options of ``rematch index``; see its ``--help``."""

    model: str
    corpus: str
    output: str
    tokens: bool = False
    dimensions: int = 0
    ann: str = "auto"
    instructions: Path | None = None
    frames: int | None = None
    segments: float = 0
    store_pictures: bool = False
    add: bool = False
    replace: bool = False
    max_failures: float = 0.2
    engine: str = "local"
    actors: int = 2
    batch_tokens: int | None = None
    workers: int | None = None


@dataclass(frozen=True)
class SearchOptions:
    """Options of ``rematch search``; see its ``--help``."""

    index: str
    text: str | None = None
    image: Path | None = None
    top: int = 10
    filter: str = ""
    rerank: str = ""
    instruction: str | None = None
    mode: str = "auto"
    exact: bool = False
    model: str | None = None
    as_json: bool = False


def run_index(options: IndexOptions) -> Report:
    """Create an index or bring it up to date, and print a summary.

    Raises:
        RematchError: If an option does not fit, or the index cannot be built.
    """
    check_kind(options.ann)
    if options.engine not in ("local", "ray"):
        raise RematchError(f"--engine {options.engine} is unknown; choose local or ray.")
    is_update = exists(options.output)
    frames = options.frames
    if frames is None:
        frames = Index.open(options.output).settings.frames if is_update else FRAMES
    corpus = open_corpus(options.corpus, frames, options.segments)
    if next(iter(corpus), None) is None:
        raise DataError(f"{options.corpus}: holds no documents. Check that it is the right one.")
    model = ReMatch(options.model)
    index = _open_or_create(options, corpus, model, is_update)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(show_speed=True),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("documents", total=corpus.size)
        settings: dict[str, Any] = {
            "keep": options.add,
            "replace": options.replace,
            "max_failures": options.max_failures,
            "ann": options.ann,
            "progress": lambda count, total: progress.update(bar, completed=count, total=total),
        }
        if options.engine == "ray":
            from rematch.search.ray import build as build_with_ray

            report = build_with_ray(
                index,
                corpus,
                options.model,
                options.actors,
                batch_tokens=options.batch_tokens,
                **settings,
            )
        else:
            encoder = Encoder(
                model, batch_tokens=options.batch_tokens, workers=options.workers, warn=say
            )
            report = build(index, corpus, encoder, **settings)
    _print_summary(index, report, options)
    return report


def _open_or_create(
    options: IndexOptions, corpus: Corpus, model: ReMatch, is_update: bool
) -> Index:
    instructions = read_table(options.instructions) if options.instructions else {}
    if not is_update:
        is_directory = Path(options.model).is_dir()
        return Index.create(
            options.output,
            model,
            name=str(Path(options.model).resolve()) if is_directory else options.model,
            corpus=corpus.name,
            dimensions=options.dimensions,
            tokens=options.tokens,
            instructions=instructions,
            frames=options.frames or FRAMES,
            store_pictures=options.store_pictures,
        )
    index = Index.open(options.output, model)
    settings = index.settings
    if instructions and not instructions.items() <= settings.instructions.items():
        raise DataError(
            f"{options.output}: was made with other query instructions. Leave out --instructions, "
            "search with --instruction, or make another index, with another --output."
        )
    if options.tokens and not settings.tokens:
        raise DataError(
            f"{options.output}: was made without --tokens. Make another index, with another "
            "--output."
        )
    if options.dimensions and options.dimensions != settings.dimensions:
        raise DataError(
            f"{options.output}: has vectors of {settings.dimensions} dimensions. Make another "
            "index, with another --output."
        )
    if options.frames and options.frames != settings.frames:
        raise DataError(
            f"{options.output}: was made with --frames {settings.frames}. Make another index, "
            "with another --output."
        )
    if options.store_pictures and not settings.store_pictures:
        raise DataError(
            f"{options.output}: was made without --store-pictures. Make another index, with "
            "another --output."
        )
    if corpus.name != settings.corpus and not options.add:
        raise DataError(
            f"{options.output}: is an index of {settings.corpus}. To add {corpus.name} to it, use "
            "--add; otherwise choose another --output."
        )
    return index


def _print_summary(index: Index, report: Report, options: IndexOptions) -> None:
    counts = [f"{report.encoded:,} encoded"]
    if report.unchanged:
        counts.append(f"{report.unchanged:,} unchanged")
    if report.reused:
        counts.append(f"{report.reused:,} with content that was encoded before")
    if report.deleted:
        counts.append(f"{report.deleted:,} deleted because the corpus no longer has them")
    console = Console(soft_wrap=True, highlight=False)
    console.print(escape(f"{len(index):,} documents in {options.output}: {', '.join(counts)}."))
    if report.failures:
        say(
            f"{len(report.failures):,} of {report.documents:,} documents cannot be indexed; what "
            "the index had of them stays:"
        )
        for document_id, reason in list(report.failures.items())[:_FAILURES_PRINTED]:
            say(f"  {document_id!r}: {reason}")
        others = len(report.failures) - _FAILURES_PRINTED
        if others > 0 and is_local(index.uri):
            say(f"  … all of them are in {options.output}/{REPORT}")
        elif others > 0:  # an object store has no report
            say(f"  … and {others:,} more")
    if options.model == "rematch-tiny":
        say(_TINY)


def run_search(options: SearchOptions) -> None:
    """Search an index and print the hits.

    Raises:
        RematchError: If there is no query or no index, or an option does not fit.
    """
    query: dict[str, Any] = {}
    if options.text:
        query["text"] = options.text
    if options.image:
        query["image"] = options.image
    index = Index.open(options.index, options.model)
    if not len(index):
        raise DataError(f"{options.index}: the index is empty. Run `rematch index` first.")
    hits = index.search(
        query,
        options.top,
        filter=options.filter,
        rerank=options.rerank,
        instruction=options.instruction,
        mode=cast(Mode, options.mode),  # which it checks
        exact=options.exact,
    )
    for warning in hits.warnings:
        say(warning)
    if options.as_json:
        for hit in hits:
            sys.stdout.write(json.dumps(asdict(hit), ensure_ascii=False) + "\n")
        return
    Console().print(_table(hits, index.metadata_columns))
    if hits.instruction:
        Console().print(f"[dim]Query instruction: {escape(hits.instruction)}", highlight=False)
    if not hits:
        Console().print("No document meets the condition." if options.filter else "No documents.")
    if index.settings.model == "rematch-tiny":
        say(_TINY)


def _table(hits: Hits, metadata_columns: list[str]) -> Table:
    are_pages = all(PdfPage.parse(hit.path) for hit in hits)
    names = [
        name
        for name in metadata_columns
        if any(name in hit.metadata for hit in hits)
        and not (are_pages and name in ("page", "pages"))  # their ids say it
    ]
    with_text = any(hit.text for hit in hits)
    table = Table("")
    table.add_column("document", overflow="fold")
    if with_text:
        table.add_column("text")
    for name in names:
        table.add_column(escape(name))
    table.add_column("score", justify="right")
    table.add_column("by")
    if hits.mode == "hybrid":
        table.add_column("vector/text rank", justify="right")
    for rank, hit in enumerate(hits, 1):
        cells = [hit.id]
        if with_text:
            cells.append(_shortened(hit.text))
        cells += [str(hit.metadata.get(name, "")) for name in names]
        score_name = _SCORE_NAMES.get(hit.by, f"P(yes), {hit.by}")
        row = [str(rank), *map(escape, cells), f"{hit.score:.3f}", score_name]
        if hits.mode == "hybrid":
            row.append(f"{hit.vector_rank or '–'}/{hit.text_rank or '–'}")
        table.add_row(*row)
    return table


def _shortened(text: str, limit: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
