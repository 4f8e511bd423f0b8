"""Build an index with encoders on one machine or many, by Ray Data.

The driver compares the corpus with the index. Ray's actors load and encode what is new, and write
it as Lance fragments beside the index's. The driver commits the fragments every few seconds. An
actor that dies is replaced, and its documents are encoded again. Equal contents are encoded once
per block of documents, not once per corpus.
"""

import json
import logging
import pickle
import time
from collections.abc import Iterator
from typing import Any

import torch

from rematch.data.corpus import Corpus
from rematch.data.document import Unreadable
from rematch.encoding.encoder import Encoder
from rematch.errors import DataError, RematchError, StorageError
from rematch.model import ReMatch
from rematch.search.build import FLUSH_SECONDS, Builder, Progress, Report
from rematch.search.documents import DocumentEncoder, LoadedDocument
from rematch.search.index import Index
from rematch.search.schema import as_table
from rematch.search.storage import TABLE, write_lock, writing

try:
    import lance
    import ray
except ImportError as error:
    raise RematchError(
        "--engine ray needs Ray and Lance: pip install 'rematch-mm[ray]'."
    ) from error

BLOCK = 512  # documents that an actor takes at once


class Worker:
    """An encoder in a process of its own.

    Args:
        uri: Directory or URI of the index.
        model: Name or directory of the model.
        corpus: Name of the corpus.
        batch_tokens: Tokens of a forward pass; ``None`` for those that fit the machine.
    """

    def __init__(self, uri: str, model: str, corpus: str, batch_tokens: int | None) -> None:
        self.index, self.corpus = Index.open(uri, ReMatch(model)), corpus
        encoder = Encoder(self.index.model, batch_tokens=batch_tokens, workers=0)
        self.document_encoder = DocumentEncoder(encoder, self.index.settings)

    def __call__(self, block: dict[str, Any]) -> dict[str, list[str]]:
        """Encode a block of documents and write them as fragments, which are not committed yet.

        Args:
            block: Columns ``document`` (pickled) and ``is_new``.

        Returns:
            A column ``result`` with one value: counts, fragments and failures as JSON.
        """
        loaded: list[LoadedDocument] = []
        unreadable: list[Unreadable] = []
        for pickled, is_new in zip(block["document"], block["is_new"], strict=True):
            document = self.document_encoder.load(pickle.loads(pickled), is_new=bool(is_new))
            if isinstance(document, Unreadable):
                unreadable.append(document)
            else:
                loaded.append(document)
        contents, broken = self.document_encoder.group(loaded)
        unreadable += broken
        batches = self.document_encoder.batches(contents)
        rows: list[dict[str, Any]] = []
        encoded_count = 0
        for encoded, broken in self.document_encoder.encode(batches, workers=0):
            unreadable += broken
            encoded_count += len(encoded)
            for content in encoded:
                rows += content.records(self.index.settings, self.corpus)
        changed = {document.id for document in loaded if not document.is_new}
        result = {
            "fragments": self._write_fragments(rows),
            "changed": [row["id"] for row in rows if row["id"] in changed],
            "encoded": encoded_count,
            "rows": len(rows),
            "failures": {document.id: str(document.error) for document in unreadable},
        }
        return {"result": [json.dumps(result)]}

    def _write_fragments(self, rows: list[dict[str, Any]]) -> list[Any]:
        if not rows:
            return []
        table = as_table(rows, self.index.table.schema)
        uri = f"{self.index.uri}/{TABLE}.lance"
        fragments = lance.fragment.write_fragments(table, uri, schema=table.schema)
        return [fragment.to_json() for fragment in fragments]


class RayBuilder(Builder):
    """A run whose encoders are actors of Ray.

    Further arguments as for :class:`~rematch.search.build.Builder`.

    Args:
        model: Name or directory of the model.
        actors: Number of actors.
        batch_tokens: Tokens of a forward pass; ``None`` for those that fit the machine.
    """

    def __init__(
        self, index: Index, *args: Any, model: str, actors: int, batch_tokens: int | None
    ) -> None:
        super().__init__(index, Encoder(index.model, workers=0), *args)
        self.model, self.actors, self.batch_tokens = model, actors, batch_tokens

    def encode_corpus(self) -> None:
        """Encode and write the documents that are new or have changed."""
        documents = self._changed_documents()
        if not documents:
            return
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        ray.data.DataContext.get_current().enable_progress_bars = False
        started_here = not ray.is_initialized()
        if started_here:
            ray.init(log_to_driver=False, include_dashboard=False)
        try:
            self._encode(documents)
        finally:
            if started_here:
                ray.shutdown()

    def _changed_documents(self) -> list[dict[str, Any]]:
        """Rows of ``document`` (pickled) and ``is_new``, for documents that are to be encoded."""
        rows = []
        for document in self.corpus.since(self.indexed.stamp):
            changed = self.register(self.compare(document))
            if changed:
                is_new = changed.id not in self.indexed
                rows.append({"document": pickle.dumps(changed), "is_new": is_new})
            self.progress(self.report.documents, self.corpus.size)
        return rows

    def _encode(self, documents: list[dict[str, Any]]) -> None:
        blocks = max(self.actors, -(-len(documents) // BLOCK))
        blocks = min(len(documents), blocks)
        rows = ray.data.from_items(documents, override_num_blocks=blocks).map_batches(
            Worker,
            fn_constructor_args=[self.index.uri, self.model, self.corpus.name, self.batch_tokens],
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=min(self.actors, blocks)),
            num_gpus=1 if torch.cuda.is_available() else 0,
        )
        results: list[dict[str, Any]] = []
        last_commit = time.monotonic()
        for row in self._results(rows):
            results.append(json.loads(row["result"]))
            if time.monotonic() - last_commit > FLUSH_SECONDS:
                self._commit(results)
                results, last_commit = [], time.monotonic()
                self.check_failures()
        self._commit(results)

    def _results(self, rows: Any) -> Iterator[dict[str, Any]]:
        """The rows as they come; an error of a worker is one line, without its traceback."""
        try:
            yield from rows.iter_rows()
        except (ray.exceptions.RayError, OSError) as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            reason = lines[-1].strip()[:300] if lines else type(error).__name__
            raise StorageError(
                f"{self.index.uri}: a worker failed ({reason}). What was written before is "
                "intact. Fix the cause and run the command again."
            ) from error

    def _commit(self, results: list[dict[str, Any]]) -> None:
        """Commit the fragments of blocks, in the place of the rows that have changed."""
        uri = f"{self.index.uri}/{TABLE}.lance"
        fragments = [
            lance.FragmentMetadata.from_json(json.dumps(fragment))
            for result in results
            for fragment in result["fragments"]
        ]
        changed = [document_id for result in results for document_id in result["changed"]]
        with writing(self.index.uri):
            if changed:
                self.index.delete(changed)
            if fragments:
                append = lance.LanceOperation.Append(fragments)
                version = lance.dataset(uri).version
                lance.LanceDataset.commit(uri, append, read_version=version)
                self.index.table.checkout_latest()
                self.commits += 1
        for result in results:
            self.report.encoded += result["encoded"]
            self.report.reused += result["rows"] - result["encoded"]
            for document_id, reason in result["failures"].items():
                self.fail(Unreadable(document_id, DataError(reason)))


def build(
    index: Index,
    corpus: Corpus,
    model: str,
    actors: int,
    *,
    batch_tokens: int | None = None,
    keep: bool = False,
    replace: bool = False,
    max_failures: float = 0.2,
    ann: str = "auto",
    progress: Progress = lambda *_: None,
) -> Report:
    """Bring an index up to date with a corpus, with encoders in processes of Ray.

    Further arguments and the result as for :func:`rematch.search.build.build`.

    Args:
        model: Name or directory of the model, valid on every machine.
        actors: Number of encoders. Each takes a GPU if there is one, otherwise a CPU core.
        batch_tokens: Tokens of a forward pass; ``None`` for those that fit the machine.

    Raises:
        DataError: If too many documents fail, another process is writing, or the index cannot be
            written.
    """
    with write_lock(index.uri):
        builder = RayBuilder(
            index,
            corpus,
            replace,
            max_failures,
            progress,
            model=model,
            actors=actors,
            batch_tokens=batch_tokens,
        )
        return builder.run(keep=keep, ann=ann)
