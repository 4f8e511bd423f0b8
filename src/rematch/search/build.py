"""From a corpus to an index, as a stream: read, compare with what is there, encode, write.

1. Documents are read window by window, no more than :data:`WINDOW_BYTES` of picture files at a
   time.
2. Those whose stamp is the one in the index are left alone. Of the others the content is hashed;
   what was encoded before, under whatever name, is not encoded again.
3. The rest goes to :meth:`rematch.encoding.encoder.Encoder.stream` in batches of like length.
4. Rows are written every :data:`FLUSH_SECONDS`, in one commit: a run that was killed goes on
   behind its last one.
5. What is no longer in the corpus is taken out at the end.

Memory holds a window, the batches ahead of the model, and some 32 bytes for each document of the
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

from rematch.data.corpus import Corpus, Document, Found
from rematch.data.images import CheckedPicture, EncodedPicture
from rematch.encoding.encoder import Encoder, Measured, look_at_picture, plan
from rematch.errors import DataError, RematchError
from rematch.files import write_json
from rematch.scoring import truncate
from rematch.search.index import Index
from rematch.search.storage import is_local, quoted

WINDOW, WINDOW_BYTES = 1024, 64 << 20
FLUSH_SECONDS, FLUSH_ROWS = 2.0, 4096
_ENOUGH_TO_JUDGE = 100  # documents, before a share of failures stops the run
_COMPACT_AFTER = 64  # commits


Progress = Callable[[int, int | None], None]


@dataclass
class Report:
    """What a run did: counts of documents, and which ones failed and why."""

    seen: int = 0
    unchanged: int = 0
    encoded: int = 0
    reused: int = 0
    deleted: int = 0
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Read:
    """A document that was read, and what is to be encoded of it."""

    document: Document
    stamp: int
    given: dict[str, Any]
    new: bool

    def row(self, key: bytes, vectors: NDArray[np.float32], dimensions: int) -> dict[str, Any]:
        """The index's row.

        Args:
            key: Of the content.
            vectors: (D,), or (1 + K, D) with the token vectors.
            dimensions: To be kept of the first.
        """
        document = self.document
        stored = document.image.content if isinstance(document.image, EncodedPicture) else None
        path = str(document.image.resolve()) if isinstance(document.image, Path) else None
        vectors = np.atleast_2d(vectors)
        return document.metadata | {
            "id": document.id,
            "vector": truncate(vectors[:1], dimensions)[0],
            "tokens": vectors[1:],
            "text": document.text,
            "path": path,
            "image": stored,
            "content_hash": key.hex(),
            "stamp": self.stamp,
        }


class Numbers:
    """A growing set of 64-bit numbers, eight bytes each."""

    def __init__(self, numbers: NDArray[np.uint64]) -> None:
        self.many, self.few = np.sort(numbers), set[int]()

    def __contains__(self, number: int) -> bool:
        at = int(np.searchsorted(self.many, np.uint64(number)))
        return number in self.few or (at < len(self.many) and int(self.many[at]) == number)

    def add(self, number: int) -> None:
        self.few.add(number)
        if len(self.few) > 65_536:
            self.many = np.sort(np.concatenate([self.many, np.fromiter(self.few, np.uint64)]))
            self.few.clear()


class Known:
    """What an index holds, and what this run has met."""

    def __init__(self, index: Index) -> None:
        kind = np.dtype([("id", "u8"), ("stamp", "i8"), ("content", "u8")])
        parts = [np.zeros(0, kind)]
        for batch in index.scan(["id", "stamp", "content_hash"]):
            part = np.zeros(batch.num_rows, kind)
            part["id"] = [number_of(i) for i in batch["id"].to_pylist()]
            part["stamp"] = batch["stamp"].to_numpy()
            part["content"] = [int(h[:16], 16) for h in batch["content_hash"].to_pylist()]
            parts.append(part)
        rows = np.concatenate(parts)
        order = np.argsort(rows["id"])
        self.ids, self.stamps = rows["id"][order], rows["stamp"][order]
        self.contents = Numbers(rows["content"])
        self.met = Numbers(np.zeros(0, np.uint64))

    def stamp(self, name: str) -> int | None:
        """The stamp of a document in the index."""
        number = np.uint64(number_of(name))
        at = int(np.searchsorted(self.ids, number))
        return int(self.stamps[at]) if at < len(self.ids) and self.ids[at] == number else None


def number_of(name: str) -> int:
    """A document's id as 64 bits."""
    return xxh3_64_intdigest(name.encode())


R = TypeVar("R", Read, Document)


class Builder:
    """One run over a corpus.

    Args:
        index: To be filled; nobody else may write to it (:meth:`Index.alone`).
        encoder: Of the index's model.
        most_failures: The share of documents that may fail.
        progress: Told (documents seen, of how many).
    """

    def __init__(
        self, index: Index, encoder: Encoder, most_failures: float, progress: Progress
    ) -> None:
        self.index, self.encoder, self.most_failures, self.progress = (
            index,
            encoder,
            most_failures,
            progress,
        )
        self.report, self.known = Report(), Known(index)
        self.tokens = bool(index.about["tokens"])
        self.underway: dict[bytes, list[Read]] = {}  # being encoded: which documents wait for it
        self.ready: dict[bytes, NDArray[np.float32]] = {}  # encoded, not written yet
        self.rows: dict[bool, list[dict[str, Any]]] = {
            True: [],
            False: [],
        }  # to be written: new ones, others
        self.bytes, self.commits, self.written = 0, 0, time.monotonic()

    def run(self, corpus: Corpus) -> None:
        """Write what is new or has changed."""
        for keys, vectors, errors in self.encoder.stream(
            self._batches(corpus),
            "document",
            multi_vector=self.tokens,
            workers=self.encoder.workers,
        ):
            found = iter(vectors)
            for place, key in enumerate(keys):
                waiting = self.underway.pop(key)
                if place in errors:
                    for one in waiting:
                        self.fail(one.document.id, errors[place])
                    continue
                self.ready[key] = next(found)
                self.report.encoded += 1
                self.report.reused += len(waiting) - 1
                for one in waiting:
                    self._write(one, key, self.ready[key])
            self._flush(now=False)
            self.judge()
        self._flush()

    # ---- in -------------------------------------------------------------------------------------

    def _batches(self, corpus: Corpus) -> Iterator[tuple[list[bytes], list[Any]]]:
        with ThreadPoolExecutor(8) as threads:
            for window in self._windows(corpus, threads):
                measured = self.encoder.measure(
                    [r.given for r in window], "document", multi_vector=self.tokens
                )
                fresh: dict[bytes, Measured] = {}
                seen_before: dict[bytes, list[Read]] = {}
                for one, found in zip(window, measured, strict=True):
                    if isinstance(found, RematchError):
                        self.fail(one.document.id, found)
                    elif found.key in self.ready:
                        self.report.reused += 1
                        self._write(one, found.key, self.ready[found.key])
                    elif found.key in self.underway:
                        self.underway[found.key].append(one)
                    elif int.from_bytes(found.key[:8], "big") in self.known.contents:
                        seen_before.setdefault(found.key, []).append(one)
                        fresh[found.key] = found
                    else:
                        self.underway[found.key] = [one]
                        fresh[found.key] = found
                for key, vectors in self._vectors_of(list(seen_before)):
                    del fresh[key]
                    for one in seen_before.pop(key):
                        self.report.reused += 1
                        self._write(one, key, vectors)
                self.underway |= seen_before
                self._flush(now=False)
                self.judge()
                self.progress(self.report.seen, corpus.size)
                given = {key: self.underway[key][0].given for key in fresh}
                for batch in plan(list(fresh.values()), self.encoder.batch_tokens):
                    yield [m.key for m in batch], [given[m.key] for m in batch]

    def _windows(
        self, corpus: Iterable[Found], threads: ThreadPoolExecutor
    ) -> Iterator[list[Read]]:
        """Documents that are new or may have changed, read."""
        window: list[Read] = []
        size, most = (
            0,
            WINDOW // 16,
        )  # the first ones are small, so that there is soon something to encode
        for some in _chunks(corpus, 16):
            for name, found in threads.map(self._read, some):
                if one := self.admit(name, found):
                    window.append(one)
                    picture = one.given.get("image")
                    size += len(picture.content) if isinstance(picture, EncodedPicture) else 0
            if len(window) >= most or size >= WINDOW_BYTES:
                yield window
                window, size, most = [], 0, min(2 * most, WINDOW)
        yield window

    def _read(self, found: Found) -> tuple[str, Read | RematchError | None]:
        """(id, what was read, or why it could not be; nothing if the index has it as it is)."""
        if isinstance(found, tuple):
            return found
        try:
            stamp, before = found.stamp(), self.known.stamp(found.id)
            if stamp == before:
                return found.id, None
            given = found.read(self.index.about["document_instructions"])
            if isinstance(
                found.image, Path
            ):  # what is sent to a worker is where it lies, and what it must be
                given["image"] = CheckedPicture(found.image, *look_at_picture(given["image"]))
            return found.id, Read(found, stamp, given, before is None)
        except RematchError as error:
            return found.id, error

    def admit(self, name: str, found: R | RematchError | None) -> R | None:
        """Count a document; what is left of it is to be encoded.

        Args:
            name: Its id.
            found: The document, or why it cannot be used; nothing if the index has it as it is.
        """
        if number_of(name) in self.known.met:
            found = DataError(f"{name}: the id stands twice in the corpus; the first one counts.")
        self.known.met.add(number_of(name))
        self.report.seen += 1
        if found is None:
            self.report.unchanged += 1
            return None
        if not isinstance(found, RematchError):
            try:
                self.index.make_room(
                    (found.document if isinstance(found, Read) else found).metadata
                )
                return found
            except DataError as error:
                found = error
        self.fail(name, found)
        return None

    def _vectors_of(self, keys: Sequence[bytes]) -> Iterator[tuple[bytes, NDArray[np.float32]]]:
        """Vectors in the index, by the content that they were made of."""
        names = ["content_hash", "vector"] + ["tokens"] * self.tokens
        for some in _chunks(keys, 500):
            among = ", ".join(quoted(key.hex()) for key in some)
            rows = (
                self.index.table.search()
                .where(f"content_hash IN ({among})")
                .select(names)
                .to_list()
            )
            for row in {row["content_hash"]: row for row in rows}.values():
                tokens = np.asarray(row["tokens"] if self.tokens else [], np.float32)
                vector = np.zeros(
                    (1, tokens.shape[1] if self.tokens else len(row["vector"])), np.float32
                )
                vector[0, : len(row["vector"])] = row["vector"]
                yield (
                    bytes.fromhex(row["content_hash"]),
                    np.concatenate([vector, tokens]) if self.tokens else vector,
                )

    # ---- out ------------------------------------------------------------------------------------

    def _write(self, one: Read, key: bytes, vectors: NDArray[np.float32]) -> None:
        row = one.row(key, vectors, self.index.about["dimensions"])
        self.rows[one.new].append(row)
        self.bytes += len(row["image"] or b"")

    def _flush(self, *, now: bool = True) -> None:
        count = len(self.rows[True]) + len(self.rows[False])
        waited = time.monotonic() - self.written > FLUSH_SECONDS
        if not count or not (now or waited or count >= FLUSH_ROWS or self.bytes >= WINDOW_BYTES):
            return
        for new in (True, False):
            self.index.add(self.rows[new], new=new)
            self.commits += bool(self.rows[new])
        for key in self.ready:
            self.known.contents.add(int.from_bytes(key[:8], "big"))
        self.rows, self.bytes = {True: [], False: []}, 0
        self.ready.clear()
        self.written = time.monotonic()

    def fail(self, name: str, error: RematchError) -> None:
        self.report.failures[name] = str(error).removeprefix("input 0: ")  # of a batch of its own

    def judge(self, *, at_the_end: bool = False) -> None:
        failed, seen = len(self.report.failures), self.report.seen
        too_many = seen >= _ENOUGH_TO_JUDGE and failed > self.most_failures * seen
        if too_many or (at_the_end and 0 < failed == seen):
            self._flush()
            name, why = next(iter(self.report.failures.items()))
            raise DataError(
                f"{failed} of {seen} documents cannot be read, such as {name}: {why} Mend the "
                "corpus, or allow more with --max-failures."
            )

    def delete_the_rest(self) -> None:
        gone: list[str] = []
        for batch in self.index.scan(["id"]):
            gone += [
                name for name in batch["id"].to_pylist() if number_of(name) not in self.known.met
            ]
        if gone:
            self.index.delete(gone)
            self.report.deleted, self.commits = len(gone), self.commits + 1


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some


def build(
    index: Index,
    corpus: Corpus,
    encoder: Encoder,
    *,
    keep: bool = False,
    most_failures: float = 0.2,
    ann: str = "auto",
    progress: Progress = lambda *_: None,
) -> Report:
    """Bring an index up to date with a corpus.

    Args:
        index: New, or from an earlier run, also one that was killed.
        corpus: The documents.
        encoder: Of the index's model.
        keep: Leave documents in the index that are not in the corpus.
        most_failures: The share of documents that may fail, judged from the hundredth on.
        ann: As for :meth:`~rematch.search.index.Index.build_ann`.
        progress: Told (documents seen, of how many).

    Returns:
        What was done; ``report.json`` in the index's directory holds it, too.

    Raises:
        DataError: If too many documents fail, another process writes, or the index cannot be
            written. What was written by then stays, and the same call goes on from there.
    """
    with index.alone():
        builder = Builder(index, encoder, most_failures, progress)
        return settle(builder, corpus, lambda: builder.run(corpus), keep, ann)


def settle(
    builder: Builder, corpus: Corpus, run: Callable[[], None], keep: bool, ann: str
) -> Report:
    """Run, judge, take out what is gone, write the report whatever happens, and see to the files
    and the ANN index.
    """
    index, report = builder.index, builder.report
    try:
        run()
        builder.judge(at_the_end=True)
        if not keep:
            builder.delete_the_rest()
    except BaseException:
        with suppress(DataError):
            _write_report(index, corpus, report)
        raise
    kind = index.ann
    if builder.commits and (builder.commits >= _COMPACT_AFTER or report.deleted or kind != "none"):
        index.compact()
    if kind == "none" or ann not in ("auto", kind):
        index.build_ann(ann)
    _write_report(index, corpus, report)
    return report


def _write_report(index: Index, corpus: Corpus, report: Report) -> None:
    if not is_local(index.uri):
        return
    content = {
        "corpus": corpus.name,
        "documents": len(index),
        "about": index.about,
        "last_run": asdict(report),
    }
    try:
        write_json(Path(index.uri) / "report.json", content)
    except OSError as error:
        raise DataError(
            f"{index.uri}: report.json cannot be written ({error.strerror})."
        ) from None
