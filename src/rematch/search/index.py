"""The index: a LanceDB table with one row per document, in a directory or on an object store.

A row has ``id``, the unit-length ``vector`` (D), optionally the K token vectors ``tokens`` (K, D),
``text``, ``path`` or the picture's file ``image``, ``content_hash`` (the content key), ``stamp``
(:meth:`rematch.data.document.Document.stamp`), and a column for each name in the corpus' metadata.
The fingerprint of the model is stored with the table; searching with another model is refused.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from rematch.data.clips import FRAMES, Clip
from rematch.data.document import Document, Media, Metadata, Value
from rematch.data.images import EncodedPicture, PictureFile
from rematch.data.instructions import (
    DocumentKind,
    choose,
    instruction_table,
    query_kind,
    query_text,
    with_instruction,
)
from rematch.data.pages import PdfPage
from rematch.encoding.fingerprint import FINGERPRINT_FORMAT, model_fingerprint
from rematch.errors import DataError, ModelError
from rematch.model import ReMatch
from rematch.scoring import truncate
from rematch.search import approximate
from rematch.search.cascade import Ranked, Stage, parse_stages, rerank
from rematch.search.columns import CORPUS, RESERVED, literal, new_columns
from rematch.search.condition import Condition, RawSQL, parse
from rematch.search.hits import Hit, Hits
from rematch.search.retrieval import (
    MODES,
    Candidates,
    Mode,
    Retrieval,
    add_words_column,
    build_full_text_index,
    has_full_text_index,
)
from rematch.search.schema import IndexSettings, as_table, settings_of, table_schema
from rematch.search.storage import (
    LiveTable,
    UnreadableIndexError,
    create_table,
    is_in,
    is_local,
    reading,
    writing,
)

Query = str | Path | Image.Image | PictureFile | Mapping[str, Any]


_FACET_ROWS = 10_000
_KIND_ROWS, _KIND_PICTURES = 1_000, 50
_KINDS: tuple[DocumentKind, ...] = ("text", "image", "page", "video")


class UnknownDocumentError(DataError):
    """The index has no document with the id."""


class _Version(NamedTuple):
    """What is found out once for each version of the table.

    Attributes:
        number: The version.
        kind: What most documents are, by up to 1,000 at equal distances; of those with a text and
            no file, up to 50 are looked at for a stored picture.
        has_words: Whether there is a full-text index.
    """

    number: int
    kind: DocumentKind
    has_words: bool


class Index:
    """An index on disk. Use :meth:`create` or :meth:`open`.

    It follows what other processes write to it, within a second. A search reads one version from
    beginning to end.

    Attributes:
        uri: Its directory or URI.
        settings: What is stored with it: model, dimensions, corpus and so on.
    """

    def __init__(self, uri: str, model: ReMatch | None = None, version: int | None = None) -> None:
        self.uri = uri
        self._live = LiveTable(uri, version)
        self._checked_table = self._live.current()
        self.settings = settings_of(self._checked_table.schema, uri)
        self._model = model
        self._counted: _Version | None = None
        if model is not None:
            self._check(model)

    @property
    def table(self) -> Any:
        """The LanceDB table at its latest version.

        Raises:
            UnreadableIndexError: If it is there no more, or another model made it meanwhile.
        """
        table = self._live.current()
        if table is not self._checked_table:
            settings = settings_of(table.schema, self.uri)
            if settings.fingerprint != self.settings.fingerprint:
                raise UnreadableIndexError(
                    f"{self.uri}: was replaced by an index of another model, "
                    f"{settings.model}. Open it again."
                )
            self.settings, self._checked_table = settings, table
        return table

    @classmethod
    def create(
        cls,
        uri: str | Path,
        model: ReMatch,
        *,
        name: str,
        corpus: str = "",
        dimensions: int = 0,
        tokens: bool = False,
        instructions: Mapping[str, str] | None = None,
        frames: int = FRAMES,
        store_pictures: bool = False,
    ) -> "Index":
        """Create an empty index.

        Args:
            uri: A directory without an index, or an object store's URI.
            model: The model that will encode documents and queries.
            name: Name or directory to load the model by when the index is searched.
            corpus: Name of the corpus that will be indexed.
            dimensions: How many of the vectors' first dimensions to keep (Matryoshka); 0 for all.
            tokens: Whether to store the K token vectors too, for MaxSim.
            instructions: Query instructions that replace the model's, by kind
                (:mod:`rematch.data.instructions`).
            frames: How many frames stand for a video; those of the corpus.
            store_pictures: Whether to store pictures of files, and of pages, so that the files
                need not stay where they are. Videos are not stored.

        Raises:
            DataError: If the place cannot be written, or ``dimensions`` is more than the model
                has.
        """
        width = model.get_embedding_dimension()
        if dimensions > width:
            raise DataError(
                f"--dimensions {dimensions}: the model's vectors have only {width}. Give at most "
                f"{width}."
            )
        settings = IndexSettings(
            model=name,
            fingerprint=model_fingerprint(model),
            dimensions=dimensions or width,
            tokens=max(1, model.fusion.num_tokens) if tokens else 0,
            document_instructions=model.backbone.document_instructions,
            corpus=corpus,
            instructions=instruction_table(model.prompts, instructions),
            frames=frames,
            store_pictures=store_pictures,
        )
        schema = table_schema(settings, model.backbone.width)
        create_table(str(uri), schema)
        index = cls(str(uri))
        index._model = model  # its fingerprint need not be checked
        return index

    @classmethod
    def open(
        cls, uri: str | Path, model: ReMatch | str | None = None, version: int | None = None
    ) -> "Index":
        """Open an existing index.

        Args:
            uri: Its directory or URI.
            model: The model, or its present name or directory; by default the model is loaded by
                its stored name when it is first needed.
            version: An earlier version of the index, to read from.

        Raises:
            DataError: If there is no index, or no such version.
            ModelError: If the index was made by another model.
        """
        return cls(str(uri), ReMatch(model) if isinstance(model, str) else model, version)

    @property
    def model(self) -> ReMatch:
        """The model that made the index, loaded when it is first needed."""
        if self._model is None:
            try:
                model = ReMatch(self.settings.model)
            except ModelError as error:
                raise ModelError(
                    f"{self.uri}: its model is no longer at {self.settings.model}. Give its new "
                    f"place with --model. ({error})"
                ) from error
            self._check(model)
            self._model = model
        return self._model

    def _check(self, model: ReMatch) -> None:
        """Raise an error unless the model's vectors can be compared with the index's."""
        fingerprint = self.settings.fingerprint
        if not fingerprint.startswith(FINGERPRINT_FORMAT):
            raise ModelError(
                f"{self.uri}: was made by an earlier version of rematch, which did not record the "
                "model's configuration, so its vectors may not be comparable with this model's. "
                "Index the corpus again, with another --output or after removing this index."
            )
        if model_fingerprint(model) != fingerprint:
            raise ModelError(
                f"{self.uri}: was made by another model ({self.settings.model}), whose vectors "
                "cannot be compared with this one's. Search it with that model, or index the "
                "corpus again."
            )
        width = model.get_embedding_dimension()
        if width < self.settings.dimensions:
            raise ModelError(
                f"{self.uri}: has {self.settings.dimensions} dimensions, but the model has "
                f"truncate_dim={width}. Load the model without it, or with a larger one."
            )

    def __len__(self) -> int:
        def count() -> int:
            table = self.table
            with reading(self.uri):
                return int(table.count_rows())

        return self._live.read(count)

    @property
    def metadata_columns(self) -> list[str]:
        """Columns to filter by, besides ``id``, ``text`` and ``path``."""
        return _metadata_columns(self._live.read(lambda: self.table).schema)

    # ---- search ---------------------------------------------------------------------------------

    @overload
    def search(
        self,
        query: list[Any],
        top: int = 10,
        *,
        filter: str | RawSQL = "",
        rerank: str | Sequence[Stage] = (),
        exact: bool = False,
        probes: int = 40,
        instruction: str | None = None,
        mode: Mode = "auto",
    ) -> list[Hits]: ...

    @overload
    def search(
        self,
        query: Query,
        top: int = 10,
        *,
        filter: str | RawSQL = "",
        rerank: str | Sequence[Stage] = (),
        exact: bool = False,
        probes: int = 40,
        instruction: str | None = None,
        mode: Mode = "auto",
    ) -> Hits: ...

    def search(
        self,
        query: Query | list[Any],
        top: int = 10,
        *,
        filter: str | RawSQL = "",
        rerank: str | Sequence[Stage] = (),
        exact: bool = False,
        probes: int = 40,
        instruction: str | None = None,
        mode: Mode = "auto",
    ) -> Hits | list[Hits]:
        """The best documents for a query, or for each query of a list.

        Args:
            query: Text; a picture; the path of one; ``{"text": …, "image": …}``; or a list of
                queries.
            top: Number of hits per query.
            filter: Condition on the metadata, such as ``"year > 2000 AND place = 'Rome'"``
                (:mod:`rematch.search.condition`), or :class:`~rematch.search.condition.RawSQL`.
            rerank: Stages that rerank the nearest documents, such as ``"feat:100,raw:10"``
                (:mod:`rematch.search.cascade`).
            exact: Whether to scan all vectors even if there is an approximate index.
            probes: Number of cells of an approximate index to search.
            instruction: Instruction before each query, which reranking reads too; by default that
                of :meth:`instruction`, and none if it is empty.
            mode: What the first stage compares: ``vector``, ``text`` (BM25 over the words of text
                and metadata), or ``hybrid`` (both, fused by their ranks); by default hybrid for a
                query without a picture if the documents have words, otherwise vector.

        Returns:
            Hits, best first; for a list of queries, one such list per query. Its ``warnings`` name
            documents that could not be reranked because their picture is missing or broken.

        Raises:
            RematchError: If a query, the condition or ``rerank`` is invalid.
        """
        queries = query if isinstance(query, list) else [query]
        if not queries:
            return []
        condition = self.condition(filter)
        stages: list[Stage] = []
        if not isinstance(rerank, str):
            stages = list(rerank)
        elif rerank.strip():
            stages = parse_stages(rerank, self.settings, self.model.backbone.width)
        modes = [self.mode(value, mode) for value in queries]
        instructions = [
            self.instruction(value) if instruction is None else instruction for value in queries
        ]
        inputs = list(map(with_instruction, queries, instructions))
        vectors: Sequence[NDArray[np.float32] | None] = [None] * len(inputs)
        if stages or any(value != "text" for value in modes):
            vectors = self.model.encode_query(inputs, show_progress_bar=False)
        hits = [
            self._live.read(partial(self._search, *parts, top, condition, stages, exact, probes))
            for parts in zip(inputs, vectors, modes, map(query_text, queries), strict=True)
        ]
        for query_hits, text in zip(hits, instructions, strict=True):
            query_hits.instruction = text.strip()
        return hits if isinstance(query, list) else hits[0]

    def mode(self, query: Query, mode: Mode = "auto") -> Mode:
        """What the first stage of a search compares.

        Args:
            query: The query.
            mode: As for :meth:`search`.

        Raises:
            DataError: If the mode is unknown, or the query or the documents have no words.
        """
        if mode not in MODES:
            raise DataError(f"--mode {mode} is unknown; choose {', '.join(MODES)}.")
        if mode == "vector":
            return mode
        has_words = self._version().has_words
        if mode == "auto":
            return "hybrid" if has_words and query_kind(query) == "text" else "vector"
        if not has_words:
            raise DataError(
                f"--mode {mode}: the index has no full-text index, because no document has words "
                "or an earlier version of rematch made it. Run `rematch index` with the same "
                "corpus and --output to add one, or use --mode vector."
            )
        if not query_text(query).strip():
            raise DataError(f"--mode {mode}: the query has no words. Give it text.")
        return mode

    def similar(self, document_id: str, top: int = 10, *, filter: str | RawSQL = "") -> Hits:
        """The documents nearest to a document of the index, without itself.

        Args:
            document_id: Its id.
            top: Number of hits.
            filter: As for :meth:`search`.

        Raises:
            UnknownDocumentError: If the index has no such document.
            DataError: If the condition is invalid.
        """
        condition = self.condition(filter)
        rows = self._rows(is_in("id", [document_id]), ["vector"])
        if not len(rows):
            raise UnknownDocumentError(f"{document_id}: the index has no document with this id.")
        vector = np.asarray(rows["vector"][0].as_py(), np.float32)

        def search() -> Hits:
            retrieval = self._retrieval(self.table, top + 1, condition, (), False, 40)
            candidates = retrieval.by_vector(vector)
            ranked = [
                Ranked(row, float(candidates.scores[row]), candidates.by)
                for row, name in enumerate(candidates.rows["id"].to_pylist())
                if name != document_id
            ]
            return Hits(self._hits(candidates, ranked[:top]))

        return self._live.read(search)

    def facets(self, most: int = 12) -> dict[str, list[Value]]:
        """Columns of the metadata with few values, as the first 10,000 documents have them.

        Args:
            most: Number of values up to which a column counts.

        Returns:
            By column its values, in order; columns with only one are left out.
        """
        columns = self.metadata_columns
        rows = self._rows("", columns, _FACET_ROWS) if columns else pa.table({})
        facets: dict[str, list[Value]] = {}
        for name in columns:
            values = rows[name].drop_null().unique().to_pylist()
            if 1 < len(values) <= most and all(len(str(value)) < 40 for value in values):
                facets[name] = sorted(values)
        return facets

    def instruction(self, query: Query) -> str:
        """The instruction that a search puts before a query, by what most documents are."""
        return choose(instruction_table(self.settings.instructions), query, self._version().kind)

    def _version(self) -> _Version:
        def count() -> _Version:
            table, counted = self.table, self._counted
            with reading(self.uri):
                number = int(table.version)
                if counted and counted.number == number:
                    return counted
                return _Version(number, _kind_of_most(table), has_full_text_index(table))

        self._counted = self._live.read(count)
        return self._counted

    def _search(
        self,
        query: Query,
        vector: NDArray[np.float32] | None,
        mode: Mode,
        text: str,
        top: int,
        condition: Condition | RawSQL | None,
        stages: Sequence[Stage],
        exact: bool,
        probes: int,
    ) -> Hits:
        table = self.table
        count = max([top, *(stage.count for stage in stages)])
        retrieval = self._retrieval(table, count, condition, stages, exact, probes)
        if mode == "text":
            candidates = retrieval.by_text(text)
        else:
            assert vector is not None
            truncated = truncate(vector[None], self.settings.dimensions)[0]
            candidates = (
                retrieval.by_vector(truncated)
                if mode == "vector"
                else retrieval.by_both(truncated, text)
            )
        load_inputs = partial(self._load_inputs, table)
        model = self.model if stages else None
        ranking, unreadable = rerank(model, query, vector, candidates, stages, load_inputs)
        warnings = [
            f"{candidates.rows['id'][row].as_py()}: its picture is missing or broken, so it was "
            f"not reranked by {stage}."
            for row, stage in unreadable.items()
        ]
        return Hits(self._hits(candidates, ranking[:top]), warnings, mode=mode)

    def condition(self, filter: str | RawSQL) -> Condition | RawSQL | None:
        """A condition as :meth:`search` takes it, parsed; ``None`` if it is empty.

        Raises:
            DataError: If it is not a condition on this index.
        """
        if isinstance(filter, RawSQL):
            return filter
        return parse(filter, self._live.read(lambda: self.table).schema) if filter else None

    def nearest(
        self,
        vector: NDArray[np.float32],
        count: int,
        condition: Condition | RawSQL | None = None,
        stages: Sequence[Stage] = (),
        *,
        exact: bool = False,
        probes: int = 40,
    ) -> pa.Table:
        """The documents nearest to a vector.

        Args:
            vector: A query's vector, with the index's dimensions.
            count: Number of documents.
            condition: A condition as from :meth:`condition`.
            stages: The stages that will rerank the documents and need columns for it.
            exact: As for :meth:`search`.
            probes: As for :meth:`search`.

        Returns:
            The documents' rows, nearest first, with ``_distance`` and ``_rowid``.
        """
        return self._live.read(
            lambda: (
                self._retrieval(self.table, count, condition, stages, exact, probes)
                .by_vector(vector)
                .rows
            )
        )

    def _retrieval(
        self,
        table: Any,
        count: int,
        condition: Condition | RawSQL | None,
        stages: Sequence[Stage],
        exact: bool,
        probes: int,
    ) -> Retrieval:
        columns = ["id", "text", "path", *_metadata_columns(table.schema)]
        if any(stage.reads("vector") for stage in stages):
            columns.append("vector")
        if any(stage.reads("tokens") for stage in stages):
            columns.append("tokens")
        return Retrieval(table, self.uri, count, columns, condition, exact, probes)

    def _hits(self, candidates: Candidates, ranked: Sequence[Ranked]) -> list[Hit]:
        rows = candidates.rows
        records = rows.select(["id", "text", "path", *_metadata_columns(rows.schema)]).to_pylist()
        hits = []
        for row, score, by in ranked:
            record = records[row]
            hits.append(
                Hit(
                    id=record["id"],
                    score=score,
                    by=by,
                    first_rank=row + 1,
                    vector_rank=candidates.vector_ranks[row],
                    text_rank=candidates.text_ranks[row],
                    text=record["text"] or "",
                    path=record["path"] or "",
                    metadata=_metadata(record),
                )
            )
        return hits

    def _load_inputs(self, table: Any, rows: pa.Table) -> list[Any]:
        """The inputs that the documents of a table's rows with ``_rowid`` were encoded from."""
        records = rows.select(["id", "text", "path", "_rowid"]).to_pylist()
        row_ids = [
            record["_rowid"]
            for record in records
            if record["path"] is None or self.settings.store_pictures
        ]
        pictures = self._stored_pictures(table, row_ids)
        instruction = self.settings.document_instructions
        return [
            self._document(record, pictures.get(record["_rowid"])).item().as_input(instruction)
            for record in records
        ]

    def _stored_pictures(self, table: Any, row_ids: list[int]) -> dict[int, bytes | None]:
        """By row id the files of pictures that are stored in a table."""
        if not row_ids:
            return {}
        with reading(self.uri):
            rows = table.take_row_ids(row_ids).select(["image"]).with_row_id().to_arrow()
        return dict(zip(rows["_rowid"].to_pylist(), rows["image"].to_pylist(), strict=True))

    def _document(
        self, record: dict[str, Any], picture: bytes | None, metadata: Metadata | None = None
    ) -> Document:
        """A document from a row with ``id``, ``text`` and ``path``, and its stored picture."""
        name, path, text = record["id"], record["path"], record["text"] or ""
        image: Media | None = None
        if picture:
            image = EncodedPicture(name, picture)
        elif path:
            image = PdfPage.parse(path) or Clip.parse(path, self.settings.frames) or Path(path)
        return Document(name, text, image, metadata or {})

    # ---- documents ------------------------------------------------------------------------------

    def with_stored_picture(self, ids: Sequence[str]) -> set[str]:
        """Those of the ids whose document has a picture that is stored in the index."""
        if not ids:
            return set()
        # as a condition, image IS NOT NULL would read the pictures of all documents
        columns = {"id": "id", "is_stored": "image IS NOT NULL"}
        rows = self._rows(is_in("id", ids), columns).to_pylist()
        return {row["id"] for row in rows if row["is_stored"]}

    def documents(self, ids: Sequence[str]) -> list[Document]:
        """Documents as they were indexed; ids that the index lacks are left out."""
        if not ids:
            return []
        rows = self._rows(is_in("id", ids))
        return [self._document(r, r["image"], _metadata(r)) for r in rows.to_pylist()]

    def path(self, document_id: str) -> str:
        """Where a document's file was, also if its picture is stored; empty if it had none."""
        paths = self._rows(is_in("id", [document_id]), ["path"])["path"].to_pylist()
        return (paths[0] or "") if paths else ""

    def sample(self, count: int) -> list[Document]:
        """Up to this many documents at equal distances from one another."""

        def take() -> pa.Table:
            table = self.table
            with reading(self.uri):
                columns = ["id", "text", "path", "image"]
                return _spread(table, count).select(columns).to_arrow()

        return [self._document(r, r["image"]) for r in self._live.read(take).to_pylist()]

    def texts(self, count: int) -> list[str]:
        """The texts of up to this many documents that have one."""
        texts: list[str] = self._rows("text != ''", ["text"], count)["text"].to_pylist()
        return texts

    def probe(self) -> None:
        """Read as little as shows that the index can be read.

        Raises:
            UnreadableIndexError: If it cannot.
        """
        self._rows("", ["id"], 1)

    def _rows(
        self,
        condition: str,
        columns: list[str] | dict[str, str] | None = None,
        count: int | None = None,
    ) -> pa.Table:
        """Rows that a condition of our own lets through; by default all columns but vectors.

        A dictionary of columns has SQL by their names.
        """

        def read() -> pa.Table:
            table = self.table
            names = columns or ["id", "text", "path", "image", *_metadata_columns(table.schema)]
            with reading(self.uri):
                request = table.search().select(names)
                if condition:
                    request = request.where(condition)
                return (request.limit(count) if count else request).to_arrow()

        return self._live.read(read)

    # ---- rows -----------------------------------------------------------------------------------

    def scan(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """These columns of all rows, in batches."""
        with reading(self.uri):
            yield from self.table.search().select(columns).to_batches(65_536)

    def add_metadata_columns(self, metadata: Metadata) -> None:
        """Add a column for each name in a document's metadata that the table lacks.

        Raises:
            DataError: If a name cannot be a column, or a value has another type than its column.
                No column is added then.
        """
        columns = new_columns(self.table.schema, metadata)
        if columns:
            with writing(self.uri):
                self.table.add_columns(pa.schema(columns))

    def add(self, records: Sequence[dict[str, Any]], *, new: bool) -> None:
        """Add documents, or replace those with the same ids, in one commit.

        Args:
            records: The rows, one dictionary each.
            new: Whether the index has none of their ids, so that it need not look for them.
        """
        if not records:
            return
        rows = as_table(records, self.table.schema)
        with writing(self.uri):
            if new and is_local(self.uri):
                self.table.add(rows)
            else:
                merge = (
                    self.table.merge_insert("id")
                    .when_matched_update_all()
                    .when_not_matched_insert_all()
                )
                merge.execute(rows)

    def delete(self, ids: Sequence[str]) -> None:
        """Delete documents."""
        with writing(self.uri):
            for start in range(0, len(ids), 500):
                self.table.delete(is_in("id", ids[start : start + 500]))

    def compact(self, keep: timedelta = timedelta(days=7)) -> None:
        """Merge small files and update the approximate index.

        Args:
            keep: Versions of the index that are older than this are removed.
        """
        with writing(self.uri):
            self.table.optimize(cleanup_older_than=keep)

    @property
    def has_unindexed_rows(self) -> bool:
        """Whether the full-text or the approximate index lacks rows, which searches then scan."""
        with reading(self.uri):
            return any(index.num_unindexed_rows for index in self.table.list_indices())

    def upgrade(self) -> None:
        """Add the columns that an index of an earlier version lacks."""
        with writing(self.uri):
            add_words_column(self.table, self.metadata_columns)
            if CORPUS not in self.table.schema.names:
                self.table.add_columns({CORPUS: literal(self.settings.corpus)})

    def build_full_text(self) -> None:
        """Build the full-text index if documents have words and there is none yet."""
        with writing(self.uri):
            build_full_text_index(self.table)

    @property
    def has_full_text(self) -> bool:
        """Whether words can be searched for."""
        return self._version().has_words

    def build_ann(self, kind: str = "auto") -> str:
        """Build an approximate index over the vectors, replacing one of another kind.

        Args:
            kind: A kind as for :func:`rematch.search.approximate.build`.

        Returns:
            The kind that was built, or ``none``.

        Raises:
            DataError: If the kind is unknown, or there are too few documents for it.
        """
        with writing(self.uri):
            return approximate.build(self.table, kind)

    @property
    def ann(self) -> str:
        """The kind of the approximate index, or ``none``."""
        return approximate.kind_of(self.table)

    def versions(self) -> list[dict[str, Any]]:
        """The versions that can be opened, each with ``version`` and ``timestamp``."""
        return [{k: v[k] for k in ("version", "timestamp")} for v in self.table.list_versions()]

    def restore(self, version: int) -> None:
        """Make an earlier version the latest."""
        with writing(self.uri):
            self.table.restore(version)


def _spread(table: Any, count: int) -> Any:
    """A query for up to this many rows of a table, at equal distances from one another."""
    size = int(table.count_rows())
    count = min(size, count)
    return table.take_offsets([row * size // count for row in range(count)])


def _kind_of_most(table: Any) -> DocumentKind:
    """What most documents of a table are."""
    rows = _spread(table, _KIND_ROWS).select(["path", "text"]).with_row_id().to_arrow().to_pylist()
    unclear = [row["_rowid"] for row in rows if row["path"] is None and row["text"]]
    counts = Counter(_kind(row["path"] or "") for row in rows if row["path"] or not row["text"])
    if unclear:  # pictures are large
        sample = Random(0).sample(unclear, min(len(unclear), _KIND_PICTURES))
        columns = {"is_stored": "image IS NOT NULL"}
        is_stored = table.take_row_ids(sample).select(columns).to_arrow()["is_stored"].to_pylist()
        pictures = round(len(unclear) * sum(is_stored) / len(sample))
        counts.update(image=pictures, text=len(unclear) - pictures)
    return max(_KINDS, key=lambda kind: counts[kind])  # the first of equal ones


def _kind(path: str) -> DocumentKind:
    """What a document is, by its path; one without path and text is a stored picture."""
    if PdfPage.parse(path):
        return "page"
    return "video" if Clip.parse(path) else "image"


def _metadata_columns(schema: pa.Schema) -> list[str]:
    return [n for n in schema.names if n not in RESERVED and not n.startswith("_")]


def _metadata(record: dict[str, Any]) -> Metadata:
    """The metadata in a row, in a dictionary with nothing else but reserved columns."""
    return {
        name: value
        for name, value in record.items()
        if name not in RESERVED and not name.startswith("_") and value is not None
    }
