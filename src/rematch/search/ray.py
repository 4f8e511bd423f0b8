"""The same building, spread by Ray Data over encoders on one machine or many.

The driver goes through the corpus and finds what is new; Ray's actors read and encode it and write
Lance fragments where the index lies; the driver commits these every few seconds. An actor that
dies is replaced, and its documents are encoded again. Equal contents are encoded once per block of
documents, not once per corpus.
"""

import json
import logging
import pickle
import time
from typing import Any

from rematch.data.corpus import Corpus, Document, Found
from rematch.encoding.encoder import Encoder, plan
from rematch.errors import DataError, RematchError
from rematch.model import ReMatch
from rematch.search.build import FLUSH_SECONDS, Builder, Progress, Read, Report, settle
from rematch.search.index import Index
from rematch.search.storage import TABLE, writing

try:
    import lance
    import ray
except ImportError as error:
    raise RematchError(
        "--engine ray needs Ray and Lance: pip install 'rematch-mm[ray]'."
    ) from error

BLOCK = 512  # documents that an actor takes at once


class Worker:
    """An encoder in a process of its own."""

    def __init__(self, uri: str, model: str) -> None:
        self.index = Index.open(uri, ReMatch(model))
        self.encoder = Encoder(self.index.model, workers=0)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Encode documents and write them as fragments that nobody sees before they are committed."""
        about, failures, reads = self.index.about, {}, list[Read]()
        for pickled, new in zip(batch["document"], batch["new"], strict=True):
            document = pickle.loads(pickled)
            try:
                given = document.read(about["document_instructions"])
                reads.append(Read(document, document.stamp(), given, bool(new)))
            except RematchError as error:
                failures[document.id] = str(error)
        tokens = bool(about["tokens"])
        waiting: dict[bytes, list[Read]] = {}
        fresh = {}
        for one, found in zip(
            reads,
            self.encoder.measure([r.given for r in reads], "document", multi_vector=tokens),
            strict=True,
        ):
            if isinstance(found, RematchError):
                failures[one.document.id] = str(found)
            else:
                waiting.setdefault(found.key, []).append(one)
                fresh[found.key] = found
        batches = plan(list(fresh.values()), self.encoder.batch_tokens)
        given_batches = (
            ([m.key for m in b], [waiting[m.key][0].given for m in b]) for b in batches
        )
        rows = []
        for keys, vectors, errors in self.encoder.stream(
            given_batches, "document", multi_vector=tokens, workers=0
        ):
            left = iter(vectors)
            for place, key in enumerate(keys):
                if place in errors:
                    failures |= {one.document.id: str(errors[place]) for one in waiting[key]}
                    continue
                vector = next(left)
                rows += [one.row(key, vector, about["dimensions"]) for one in waiting[key]]
        written = []
        if rows:
            table = self.index.rows(rows)
            written = lance.fragment.write_fragments(
                table, f"{self.index.uri}/{TABLE}.lance", schema=table.schema
            )
        changed = {r.document.id for r in reads if not r.new}
        done = {
            "fragments": [fragment.to_json() for fragment in written],
            "changed": [row["id"] for row in rows if row["id"] in changed],
            "encoded": len({row["content_hash"] for row in rows}),
            "rows": len(rows),
            "failures": failures,
        }
        return {"done": [json.dumps(done)]}


def build(
    index: Index,
    corpus: Corpus,
    model: str,
    actors: int,
    *,
    keep: bool = False,
    most_failures: float = 0.2,
    ann: str = "auto",
    progress: Progress = lambda *_: None,
) -> Report:
    """As :func:`rematch.search.build.build`, with encoders in so many processes of Ray.

    Args:
        model: The model's name or directory, where every machine finds it.
        actors: How many encoders; each takes a GPU if there is one, else a CPU.

    Raises:
        DataError: As there.
    """
    with index.alone():
        builder = Builder(index, Encoder(index.model, workers=0), most_failures, progress)
        return settle(builder, corpus, lambda: _run(builder, corpus, model, actors), keep, ann)


def _run(builder: Builder, corpus: Corpus, model: str, actors: int) -> None:
    import torch

    index, report = builder.index, builder.report
    todo: list[dict[str, Any]] = []
    for found in corpus:
        if document := builder.admit(*_look(builder, found)):
            new = builder.known.stamp(document.id) is None
            todo.append({"document": pickle.dumps(document), "new": new})
        builder.progress(report.seen, corpus.size)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        if todo:
            gpus = 1 if torch.cuda.is_available() else 0
            blocks = max(1, min(len(todo), max(actors, -(-len(todo) // BLOCK))))
            results = ray.data.from_items(todo, override_num_blocks=blocks).map_batches(
                Worker,
                fn_constructor_args=[index.uri, model],
                batch_size=None,
                compute=ray.data.ActorPoolStrategy(size=min(actors, blocks)),
                num_gpus=gpus,
            )
            waiting: list[dict[str, Any]] = []
            since = time.monotonic()
            for row in results.iter_rows():
                waiting.append(json.loads(row["done"]))
                if time.monotonic() - since > FLUSH_SECONDS:
                    _commit(builder, waiting)
                    waiting, since = [], time.monotonic()
            _commit(builder, waiting)
    finally:
        if started:
            ray.shutdown()


def _look(builder: Builder, found: Found) -> tuple[str, Document | RematchError | None]:
    if isinstance(found, tuple):
        return found
    try:
        return found.id, None if found.stamp() == builder.known.stamp(found.id) else found
    except RematchError as error:
        return found.id, error


def _commit(builder: Builder, done: list[dict[str, Any]]) -> None:
    index, report = builder.index, builder.report
    uri = f"{index.uri}/{TABLE}.lance"
    fragments = [
        lance.FragmentMetadata.from_json(json.dumps(f)) for one in done for f in one["fragments"]
    ]
    changed = [name for one in done for name in one["changed"]]
    with writing(index.uri):
        if changed:
            index.delete(changed)
        if fragments:
            version = lance.dataset(uri).version
            lance.LanceDataset.commit(
                uri, lance.LanceOperation.Append(fragments), read_version=version
            )
            index.table.checkout_latest()
            builder.commits += 1
    for one in done:
        report.encoded += one["encoded"]
        report.reused += one["rows"] - one["encoded"]
        for name, why in one["failures"].items():
            builder.fail(name, DataError(why))
