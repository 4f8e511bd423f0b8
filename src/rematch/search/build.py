"""From a corpus to an index, as a stream: load, compare with the index, encode, write.

1. Documents are loaded window by window, with at most :data:`WINDOW_BYTES` of picture files at a
   time.
2. Documents whose stamp is the same as in the index are skipped. The content of the others is
   hashed, and content that was encoded before, under whatever id, is not encoded again.
3. The rest goes to :meth:`rematch.encoding.encoder.Encoder.stream` in batches of similar length.
4. Rows are written every :data:`FLUSH_SECONDS`, in one commit. A run that was killed resumes after
   its last commit.
5. Documents that are no longer in the corpus are deleted at the end, and the full-text index and
   the approximate index are built or brought up to date.

Memory holds a window, the batches ahead of the model, and about 32 bytes for each document of the
index.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from rematch.data.corpus import Corpus
from rematch.data.document import Document, Metadata, Unchanged, Unreadable, unreadable
from rematch.encoding.encoder import Encoder
from rematch.errors import DataError, StorageError
from rematch.files import write_json
from rematch.search.columns import CORPUS
from rematch.search.documents import Content, DocumentEncoder, EncodedContent, LoadedDocument
from rematch.search.index import Index
from rematch.search.storage import REPORT, is_in, is_local, reading, write_lock

WINDOW, WINDOW_BYTES = 1024, 64 << 20
FLUSH_SECONDS, FLUSH_ROWS = 2.0, 4096
_CHUNK = 16  # documents that are loaded in parallel
_MIN_DOCUMENTS = 100  # before a share of failures stops the run
_COMPACT_AFTER = 64  # commits
_RECENT_HASHES = 65_536
_LONGEST_REASON = 600  # characters, of a failure
MOST_COLUMNS = 1_000

Progress = Callable[[int, int | None], None]
T = TypeVar("T")
D = TypeVar("D", Document, LoadedDocument)


@dataclass
class Report:
    """Counts of the documents of a run, and why some failed.

    Attributes:
        documents: Documents of the corpus.
        unchanged: Those that the index had already.
        encoded: Contents that were encoded.
        reused: Documents whose content was encoded before.
        deleted: Documents of the index that are no longer in the corpus.
        failures: Reasons of the failed documents by their ids.
    """

    documents: int = 0
    unchanged: int = 0
    encoded: int = 0
    reused: int = 0
    deleted: int = 0
    failures: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The counts as ``report.json`` has them."""
        counts = asdict(self)
        return {"seen": counts.pop("documents")} | counts


class HashSet:
    """A growing set of 64-bit hashes that takes little more than eight bytes for each.

    Args:
        hashes: The first elements.
    """

    def __init__(self, hashes: NDArray[np.uint64]) -> None:
        self.sorted_hashes, self.recent = np.sort(hashes), set[int]()

    def __contains__(self, number: int) -> bool:
        if number in self.recent:
            return True
        place = int(np.searchsorted(self.sorted_hashes, np.uint64(number)))
        return place < len(self.sorted_hashes) and int(self.sorted_hashes[place]) == number

    def add(self, number: int) -> None:
        self.recent.add(number)
        if len(self.recent) > _RECENT_HASHES:
            recent = np.fromiter(self.recent, np.uint64)
            self.sorted_hashes = np.sort(np.concatenate([self.sorted_hashes, recent]))
            self.recent.clear()


class IndexedDocuments:
    """Ids, stamps and contents of the documents of an index, stored compactly.

    Args:
        index: The index.
        corpus: Name of the corpus that it is brought up to date with.

    Attributes:
        contents: Hashes of the contents that the index has vectors of.
    """

    def __init__(self, index: Index, corpus: str) -> None:
        fields = [("id", "u8"), ("stamp", "i8"), ("content", "u8"), ("is_foreign", "?")]
        dtype = np.dtype(fields)
        parts = [np.zeros(0, dtype)]
        with reading(index.uri):
            batches = list(index.scan(["id", "stamp", "content_hash", CORPUS]))
        for batch in batches:
            part = np.zeros(batch.num_rows, dtype)
            part["id"] = [id_hash(i) for i in batch["id"].to_pylist()]
            part["stamp"] = batch["stamp"].to_numpy()
            part["content"] = [
                content_hash(bytes.fromhex(key)) for key in batch["content_hash"].to_pylist()
            ]
            part["is_foreign"] = [name != corpus for name in batch[CORPUS].to_pylist()]
            parts.append(part)
        rows = np.concatenate(parts)
        order = np.argsort(rows["id"])
        self.ids, self.stamps = rows["id"][order], rows["stamp"][order]
        self.foreign = rows["is_foreign"][order]
        self.contents = HashSet(rows["content"])

    def _place(self, document_id: str) -> int | None:
        number = np.uint64(id_hash(document_id))
        place = int(np.searchsorted(self.ids, number))
        return place if place < len(self.ids) and self.ids[place] == number else None

    def __contains__(self, document_id: str) -> bool:
        return self._place(document_id) is not None

    def is_foreign(self, document_id: str) -> bool:
        """Whether the index has a document with this id from another corpus."""
        place = self._place(document_id)
        return place is not None and bool(self.foreign[place])

    def stamp(self, document_id: str) -> int | None:
        """The stamp of a document; ``None`` if the index has none with this id from the corpus."""
        place = self._place(document_id)
        return None if place is None or self.foreign[place] else int(self.stamps[place])


def id_hash(document_id: str) -> int:
    """64-bit hash of a document's id."""
    return xxh3_64_intdigest(document_id.encode())


def content_hash(key: bytes) -> int:
    """64-bit hash of a content, from its content key."""
    return int.from_bytes(key[:8], "big")


class Builder:
    """A run that brings an index up to date with a corpus.

    Args:
        index: The index; nobody else may write to it (:func:`~rematch.search.storage.write_lock`).
        encoder: Encoder of the index's model.
        corpus: The documents.
        replace: Whether they replace documents with the same ids from other corpora.
        max_failures: Share of documents that may fail.
        progress: Called with the number of documents so far and their total, if it is known.
    """

    def __init__(
        self,
        index: Index,
        encoder: Encoder,
        corpus: Corpus,
        replace: bool,
        max_failures: float,
        progress: Progress,
    ) -> None:
        index.upgrade()
        self.index, self.encoder = index, encoder
        self.corpus, self.replace = corpus, replace
        self.max_failures, self.progress = max_failures, progress
        self.report = Report()
        self.document_encoder = DocumentEncoder(encoder, index.settings)
        self.indexed = IndexedDocuments(index, corpus.name)
        self.corpus_ids = HashSet(np.zeros(0, np.uint64))
        self.unreadable_ids = set[int]()  # those of them that may not be the document's own
        self.unwritten: dict[bytes, NDArray[np.float32]] = {}  # vectors of the rows below
        self.new_rows: list[dict[str, Any]] = []
        self.changed_rows: list[dict[str, Any]] = []
        self.unwritten_bytes = self.commits = 0
        self.last_write = time.monotonic()

    def run(self, *, keep: bool, ann: str) -> Report:
        """Update the index, then its files and its approximate index.

        The report is written even if the run fails. Arguments as for :func:`build`.
        """
        index = self.index
        try:
            self.encode_corpus()
            self.check_failures(final=True)
            if not keep:
                self._delete_missing()
        except BaseException:
            with suppress(Exception):
                self._write_report()
            raise
        kind = index.ann
        many_files = self.commits >= _COMPACT_AFTER
        if many_files or self.report.deleted or index.has_unindexed_rows:  # of a killed run too
            index.compact()
        index.build_full_text()
        if kind == "none" or ann not in ("auto", kind):
            index.build_ann(ann)
        self._write_report()
        return self.report

    def encode_corpus(self) -> None:
        """Encode and write the documents that are new or have changed."""
        batches = self._batches()
        for contents, failed in self.document_encoder.encode(batches, self.encoder.workers):
            for document in failed:
                self.fail(document)
            for content in contents:
                self.report.encoded += 1
                self.report.reused += len(content.documents) - 1
                self.unwritten[content.key] = content.vectors
                self._add_rows(content)
            self._flush_if_due()
            self.check_failures()
        self._flush()

    # ---- reading --------------------------------------------------------------------------------

    def _batches(self) -> Iterator[dict[bytes, Any]]:
        with ThreadPoolExecutor(8) as threads:
            for window in self._windows(threads):
                contents, failed = self.document_encoder.group(window)
                for document in failed:
                    self.fail(document)
                contents = self._reuse_vectors(contents)
                self._flush_if_due()
                self.check_failures()
                self.progress(self.report.documents, self.corpus.size)
                yield from self.document_encoder.batches(contents)

    def _windows(self, threads: ThreadPoolExecutor) -> Iterator[list[LoadedDocument]]:
        """Documents that are new or may have changed, loaded.

        The first windows are small, so that there is soon something to encode.
        """
        window: list[LoadedDocument] = []
        size, limit = 0, WINDOW // 16
        for chunk in _chunks(self.corpus.since(self.indexed.stamp), _CHUNK):
            for result in threads.map(self._load, chunk):
                document = self.register(result)
                if document:
                    window.append(document)
                    size += document.loaded_bytes
            if len(window) >= limit or size >= WINDOW_BYTES:
                yield window
                window, size, limit = [], 0, min(2 * limit, WINDOW)
        yield window

    def _load(
        self, document: Document | Unreadable | Unchanged
    ) -> LoadedDocument | Unchanged | Unreadable:
        result = self.compare(document)
        if not isinstance(result, Document):
            return result
        is_new = result.id not in self.indexed
        return self.document_encoder.load(result, is_new=is_new)

    def compare(
        self, document: Document | Unreadable | Unchanged
    ) -> Document | Unchanged | Unreadable:
        """Compare a document's stamp with the index; the document if it is new or may differ."""
        if isinstance(document, Unreadable | Unchanged):
            return document
        if not self.replace and self.indexed.is_foreign(document.id):
            error = DataError(
                f"{document.id}: the index has a document with this id from another corpus. Give "
                "it another id, use another --output, or replace the other one with --replace."
            )
            return Unreadable(document.id, error)
        try:
            stamp = document.stamp()
        except Exception as error:
            return unreadable(document.id, error)
        return Unchanged(document.id) if stamp == self.indexed.stamp(document.id) else document

    def register(self, document: D | Unchanged | Unreadable) -> D | None:
        """Count a document of the corpus.

        Returns:
            The document if it is to be encoded, and the index has columns for its metadata.
        """
        self.report.documents += 1
        number = id_hash(document.id)
        is_unreadable = isinstance(document, Unreadable)
        is_taken = number in self.corpus_ids and number not in self.unreadable_ids
        if is_taken and not is_unreadable:
            error = DataError(
                f"{document.id}: the id occurs twice in the corpus; only the first document with "
                "it is indexed."
            )
            self.fail(Unreadable(document.id, error))
            return None
        self.corpus_ids.add(number)
        if isinstance(document, Unreadable):
            # perhaps named by its row, and another document has this id
            if not is_taken:
                self.unreadable_ids.add(number)
            self.fail(document)
            return None
        self.unreadable_ids.discard(number)
        if isinstance(document, Unchanged):
            self.report.unchanged += 1
            return None
        try:
            self._check_columns(document.metadata)
            self.index.add_metadata_columns(document.metadata)
        except StorageError:
            raise
        except DataError as error:
            self.fail(Unreadable(document.id, error))
            return None
        return document

    def _check_columns(self, metadata: Metadata) -> None:
        """Refuse metadata that would give the index too many columns, each of which costs time."""
        names = self.index.table.schema.names
        new = metadata.keys() - set(names)
        if len(names) + len(new) > MOST_COLUMNS:
            raise DataError(
                f"its metadata has {len(new)} names that no other document has, and the index "
                f"would have more than {MOST_COLUMNS:,} columns. Use the same names in all "
                "documents."
            )

    def _reuse_vectors(self, contents: Sequence[Content]) -> list[Content]:
        """Give documents the vectors that their content has already; return the other contents."""
        others: list[Content] = []
        in_index: dict[bytes, Content] = {}
        for content in contents:
            key = content.measured.key
            if key in self.unwritten:
                self._add_reused(content, self.unwritten[key])
            elif key in self.document_encoder.waiting:
                self.document_encoder.waiting[key] += content.documents
            elif content_hash(key) in self.indexed.contents:
                in_index[key] = content
            else:
                others.append(content)
        for key, vectors in self._indexed_vectors(list(in_index)):
            self._add_reused(in_index.pop(key), vectors)
        return others + list(in_index.values())

    def _indexed_vectors(
        self, keys: Sequence[bytes]
    ) -> Iterator[tuple[bytes, NDArray[np.float32]]]:
        """Vectors in the index by content key; keys without a row are left out."""
        multi_vector = self.document_encoder.multi_vector
        columns = ["content_hash", "vector", *(["tokens"] if multi_vector else [])]
        for chunk in _chunks(keys, 500):
            condition = is_in("content_hash", [key.hex() for key in chunk])
            with reading(self.index.uri):
                rows = self.index.table.search().where(condition).select(columns).to_list()
            for row in {row["content_hash"]: row for row in rows}.values():
                vectors = np.asarray([row["vector"]], np.float32)
                if multi_vector:
                    tokens = np.asarray(row["tokens"], np.float32)
                    padding = tokens.shape[1] - vectors.shape[1]
                    vectors = np.concatenate([np.pad(vectors, ((0, 0), (0, padding))), tokens])
                yield bytes.fromhex(row["content_hash"]), vectors

    # ---- writing --------------------------------------------------------------------------------

    def _add_reused(self, content: Content, vectors: NDArray[np.float32]) -> None:
        self.report.reused += len(content.documents)
        self._add_rows(EncodedContent(content.measured.key, vectors, content.documents))

    def _add_rows(self, content: EncodedContent) -> None:
        records = content.records(self.index.settings, self.corpus.name)
        for document, record in zip(content.documents, records, strict=True):
            rows = self.new_rows if document.is_new else self.changed_rows
            rows.append(record)
            self.unwritten_bytes += len(record["image"] or b"")

    def _flush_if_due(self) -> None:
        waited = time.monotonic() - self.last_write
        rows = len(self.new_rows) + len(self.changed_rows)
        if waited > FLUSH_SECONDS or rows >= FLUSH_ROWS or self.unwritten_bytes >= WINDOW_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self.new_rows and not self.changed_rows:
            return
        for rows, new in ((self.new_rows, True), (self.changed_rows, False)):
            if rows:
                self.index.add(rows, new=new)
                self.commits += 1
        for key in self.unwritten:
            self.indexed.contents.add(content_hash(key))
        self.unwritten.clear()
        self.new_rows, self.changed_rows, self.unwritten_bytes = [], [], 0
        self.last_write = time.monotonic()

    def fail(self, document: Unreadable) -> None:
        """Record a failure."""
        # the error counts inputs in a batch of the document's own
        reason = str(document.error).removeprefix("input 0: ")
        if len(reason) > _LONGEST_REASON:
            reason = reason[: _LONGEST_REASON - 1] + "…"
        name, others = document.id, 1
        while name in self.report.failures:
            others += 1
            name = f"{document.id} ({others})"
        self.report.failures[name] = reason

    def check_failures(self, *, final: bool = False) -> None:
        """Stop the run if too many documents fail.

        Args:
            final: Whether this was the last document; then it also stops if all of them failed.

        Raises:
            DataError: If too many documents fail.
        """
        failed, total = len(self.report.failures), self.report.documents
        too_many = total >= _MIN_DOCUMENTS and failed > self.max_failures * total
        if too_many or (final and 0 < failed == total):
            self._flush()
            document_id, reason = next(iter(self.report.failures.items()))
            raise DataError(
                f"{failed} of {total} documents cannot be indexed, such as {document_id}: "
                f"{reason} Fix the corpus, or allow more failures with --max-failures."
            )

    def _delete_missing(self) -> None:
        """Delete the documents that are no longer in the corpus.

        Those of other corpora stay, and so do the parts of a file that cannot be read.
        """
        with reading(self.index.uri):
            missing = [
                document_id
                for batch in self.index.scan(["id", CORPUS])
                for document_id, name in zip(
                    batch["id"].to_pylist(), batch[CORPUS].to_pylist(), strict=True
                )
                if name == self.corpus.name
                and id_hash(document_id) not in self.corpus_ids
                and id_hash(document_id.rpartition("#")[0]) not in self.unreadable_ids
            ]
        if missing:
            self.index.delete(missing)
            self.report.deleted = len(missing)
            self.commits += 1

    def _write_report(self) -> None:
        if not is_local(self.index.uri):
            return
        content = {
            "corpus": self.corpus.name,
            "documents": len(self.index),
            "about": asdict(self.index.settings),
            "last_run": self.report.as_json(),
        }
        write_json(Path(self.index.uri) / REPORT, content)


def build(
    index: Index,
    corpus: Corpus,
    encoder: Encoder,
    *,
    keep: bool = False,
    replace: bool = False,
    max_failures: float = 0.2,
    ann: str = "auto",
    progress: Progress = lambda *_: None,
) -> Report:
    """Bring an index up to date with a corpus.

    Args:
        index: A new index, or one from an earlier run, even if that was killed.
        corpus: The documents.
        encoder: Encoder of the index's model.
        keep: Whether documents that are no longer in the corpus stay in the index; those of other
            corpora always do.
        replace: Whether documents of the corpus replace those with the same ids from other
            corpora, instead of being left out.
        max_failures: Share of documents that may fail, checked from the hundredth document on.
        ann: Approximate index, as for :meth:`~rematch.search.index.Index.build_ann`.
        progress: Called with the number of documents so far and their total, if it is known.

    Returns:
        Counts and failures; ``report.json`` in the index's directory has them too.

    Raises:
        DataError: If too many documents fail. What was written before stays, and the same call
            resumes from there.
        StorageError: If another process is writing, or the index is damaged or cannot be written.
    """
    with write_lock(index.uri):
        builder = Builder(index, encoder, corpus, replace, max_failures, progress)
        return builder.run(keep=keep, ann=ann)


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
