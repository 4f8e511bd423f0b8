"""The index: one LanceDB table with a row per document, in a directory or on an object store.

A row holds ``id``, the unit-length ``vector`` (D), if wanted the K ``tokens`` (K, D), ``text``,
``path`` or the picture's file (``image``), ``content_hash``, ``stamp``
(:meth:`~rematch.data.corpus.Document.stamp`), and whatever metadata the corpus brings, a column
each. Which model made it stands in the table; a search with another is refused.
"""

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rematch.data.corpus import Document, Metadata
from rematch.data.images import EncodedPicture
from rematch.encoding.vector_store import FINGERPRINT, fingerprint
from rematch.errors import DataError, ModelError
from rematch.model import ReMatch
from rematch.scoring import truncate
from rematch.search.cascade import Stage, parse, reorder
from rematch.search.columns import OWN, in_condition, new_columns
from rematch.search.storage import TABLE, exists, is_local, quoted, writing

ANN = {
    "float": "IVF_FLAT",
    "int8": "IVF_SQ",
    "binary": "IVF_RQ",
    "pq": "IVF_PQ",
    "hnsw": "IVF_HNSW_SQ",
}
EXACT_UP_TO = 100_000  # rows: below it a scan is as fast as a person notices


class Index:
    """An index on disk. Use :meth:`create` or :meth:`open`.

    Attributes:
        uri: Where it lies.
        about: ``model``, ``fingerprint``, ``dimensions``, ``tokens``, ``document_instructions``,
            ``corpus``.
    """

    def __init__(self, uri: str, table: Any, model: ReMatch | None = None) -> None:
        self.uri, self.table = uri, table
        content = (table.schema.metadata or {}).get(b"rematch")
        if content is None:
            raise DataError(f"{uri}: its table was not made by `rematch index`.")
        self.about: dict[str, Any] = json.loads(content)
        self._model = model
        if model is not None:
            self._check(model)

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
    ) -> "Index":
        """An empty index.

        Args:
            uri: A directory that does not hold an index yet, or an object store's URI.
            model: Whose vectors it will hold.
            name: What to load the model by, when it is searched.
            corpus: What it will be an index of.
            dimensions: Keep only so many of the vectors' first dimensions (Matryoshka).
            tokens: Keep the K token vectors besides, for MaxSim.

        Raises:
            DataError: If it cannot be written there, or ``dimensions`` are more than the model
                has.
        """
        width = model.get_embedding_dimension()
        if dimensions > width:
            raise DataError(
                f"--dimensions {dimensions}: the model's vectors have {width}. Give at most that."
            )
        about = {
            "model": name,
            "fingerprint": fingerprint(model),
            "dimensions": dimensions or width,
            "tokens": max(1, model.fusion.num_tokens) if tokens else 0,
            "document_instructions": model.backbone.document_instructions,
            "corpus": corpus,
        }
        fields = [
            pa.field("id", pa.string(), nullable=False),
            pa.field("vector", pa.list_(pa.float32(), dimensions or width)),
        ]
        if tokens:
            fields.append(
                pa.field("tokens", pa.list_(pa.list_(pa.float16(), model.backbone.width)))
            )
        fields += [
            pa.field("text", pa.string()),
            pa.field("path", pa.string()),
            pa.field("image", pa.large_binary()),
            pa.field("content_hash", pa.string()),
            pa.field("stamp", pa.int64()),
        ]
        with writing(str(uri)):
            table = lancedb.connect(str(uri)).create_table(
                TABLE, schema=pa.schema(fields, metadata={"rematch": json.dumps(about)})
            )
        index = cls(str(uri), table)
        index._model = model  # whose fingerprint that is
        return index

    @classmethod
    def open(
        cls, uri: str | Path, model: ReMatch | str | None = None, version: int | None = None
    ) -> "Index":
        """An index that is there.

        Args:
            uri: Its directory or URI.
            model: The model, or where it lies now; by default it is loaded by the name it had,
                when it is needed.
            version: An earlier state, to read.

        Raises:
            DataError: If there is no index.
            ModelError: If it was made by another model.
        """
        if not exists(uri):
            raise DataError(
                f"{uri}: no index there. Make one with `rematch index MODEL CORPUS --output "
                f"{uri}`."
            )
        table = lancedb.connect(str(uri)).open_table(TABLE)
        if version is not None:
            known = [v["version"] for v in table.list_versions()]
            if version not in known:
                raise DataError(
                    f"{uri}: has no version {version}; it has {known[0]} to {known[-1]}."
                )
            table.checkout(version)
        return cls(str(uri), table, ReMatch(model) if isinstance(model, str) else model)

    @property
    def model(self) -> ReMatch:
        """The model that made it, loaded when first asked for."""
        if self._model is None:
            try:
                model = ReMatch(self.about["model"])
            except ModelError as error:
                raise ModelError(
                    f"{self.uri}: its model is not where it was. Say where with --model. ({error})"
                ) from error
            self._check(model)
            self._model = model
        return self._model

    def _check(self, model: ReMatch) -> None:
        made_by = self.about["fingerprint"]
        if not made_by.startswith(FINGERPRINT):
            raise ModelError(
                f"{self.uri}: was made by an earlier version of rematch, which did not record the "
                "model's configuration, so it is unknown whether its vectors can be compared with "
                "this model's. Index the corpus again, with another --output or after removing "
                "this index."
            )
        if fingerprint(model) != made_by:
            raise ModelError(
                f"{self.uri}: was made by another model ({self.about['model']}), whose vectors "
                "cannot be compared with this one's. Search it with that model, or index the "
                "corpus anew."
            )
        if (width := model.get_embedding_dimension()) < self.about["dimensions"]:
            raise ModelError(
                f"{self.uri}: keeps {self.about['dimensions']} dimensions, but the model has "
                f"truncate_dim={width}. Load the model without it, or with a larger one."
            )

    def __len__(self) -> int:
        return int(self.table.count_rows())

    @property
    def metadata_columns(self) -> list[str]:
        """What can be filtered by, besides ``id``, ``text`` and ``path``."""
        return [name for name in self.table.schema.names if name not in OWN]

    # ---- search ---------------------------------------------------------------------------------

    def search(
        self,
        query: Any,
        top: int = 10,
        *,
        where: str = "",
        rerank: str | Sequence[Stage] = (),
        exact: bool = False,
        probes: int = 40,
    ) -> Any:
        """The best documents for a query, or for each of several.

        Args:
            query: Text; a picture; a path of one; ``{"text": …, "image": …}``; or a list of
                queries.
            top: How many.
            where: A condition in SQL on the metadata, such as ``"year > 2000 AND place =
                'Rome'"``.
            rerank: What reorders the best, such as ``"feat:100,raw:10"``
                (:mod:`rematch.search.cascade`).
            exact: Scan every vector even if there is an approximate index.
            probes: Of an approximate index, how many of its cells are looked into.

        Returns:
            Hits, best first; a list of such lists for a list of queries.

        Raises:
            RematchError: If a query, the condition or ``rerank`` cannot be used.
        """
        queries = query if isinstance(query, list) else [query]
        if not queries:
            return []
        stages = (
            parse(rerank, self.about, self.model.backbone.width)
            if isinstance(rerank, str)
            else list(rerank)
        )
        wide: NDArray[np.float32] = self.model.encode_query(queries, show_progress_bar=False)
        vectors = truncate(wide, self.about["dimensions"])
        found = []
        for one, vector, whole in zip(queries, vectors, wide, strict=True):
            rows = self._nearest(
                vector, max([top, *(s.count for s in stages)]), where, stages, exact, probes
            )
            found.append(reorder(self, one, whole, rows, stages)[:top])
        return found if isinstance(query, list) else found[0]

    def _nearest(
        self,
        vector: NDArray[np.float32],
        count: int,
        where: str,
        stages: Sequence[Stage],
        exact: bool,
        probes: int,
    ) -> pa.Table:
        columns = ["id", "text", "path", *self.metadata_columns, "_distance"]
        columns += ["vector"] * any("feat" in s.views for s in stages)
        columns += ["tokens"] * any(s.views == "maxsim" for s in stages)
        asked = (
            self.table.search(vector, vector_column_name="vector")
            .distance_type("cosine")
            .limit(count)
        )
        asked = asked.select(columns).with_row_id(True)
        if where:
            asked = asked.where(where, prefilter=True)
        asked = asked.bypass_vector_index() if exact else asked.nprobes(probes).refine_factor(10)
        try:
            return asked.to_arrow()
        except (
            Exception
        ) as error:  # a condition can make LanceDB's parser panic, which is an Exception alone
            if not where:
                raise
            names = ", ".join(["id", "text", "path", *map(in_condition, self.metadata_columns)])
            raise DataError(
                f"--filter {where}: {str(error).splitlines()[0][:200]}. Write a condition in SQL "
                f"on {names}."
            ) from None

    def pictures(self, row_ids: Sequence[int]) -> list[bytes | None]:
        """The stored files of pictures that came out of a data set."""
        found = self.table.take_row_ids(list(row_ids)).select(["image"]).with_row_id().to_arrow()
        by_row = dict(zip(found["_rowid"].to_pylist(), found["image"].to_pylist(), strict=True))
        return [by_row[i] for i in row_ids]

    def with_stored_picture(self, ids: Sequence[str]) -> set[str]:
        """Those of the documents whose picture lies in the index."""
        among = ", ".join(map(quoted, ids))
        found = (
            self.table.search().where(f"id IN ({among}) AND image IS NOT NULL").select(["id"])
            if ids
            else None
        )
        return set(found.to_arrow()["id"].to_pylist()) if found is not None else set()

    def documents(self, ids: Sequence[str]) -> list[Document]:
        """Documents as they were indexed, those of the ids that are there."""
        names = ["id", "text", "path", "image", *self.metadata_columns]
        among = ", ".join(map(quoted, ids))
        rows = self.table.search().where(f"id IN ({among})").select(names).to_list() if ids else []
        return [
            Document(
                row["id"],
                row["text"] or "",
                EncodedPicture(row["id"], row["image"])
                if row["image"]
                else Path(row["path"])
                if row["path"]
                else None,
                {name: row[name] for name in self.metadata_columns if row[name] is not None},
            )
            for row in rows
        ]

    # ---- rows -----------------------------------------------------------------------------------

    def rows(self, records: Sequence[dict[str, Any]]) -> pa.Table:
        """Records as a table in the index's schema."""
        schema = self.table.schema
        columns: list[Any] = []
        for field in schema:
            values: list[Any] = [record.get(field.name) for record in records]
            if field.name == "vector":
                flat = np.concatenate(values).astype(np.float32)
                columns.append(
                    pa.FixedSizeListArray.from_arrays(pa.array(flat), field.type.list_size)
                )
            elif field.name == "tokens":
                stacked = np.stack(values).astype(np.float16)  # (N, K, D)
                inner = pa.FixedSizeListArray.from_arrays(
                    pa.array(stacked.ravel()), stacked.shape[2]
                )
                places = pa.array(np.arange(len(stacked) + 1, dtype=np.int32) * stacked.shape[1])
                columns.append(pa.ListArray.from_arrays(places, inner))
            else:
                columns.append(pa.array(values, field.type))
        return pa.table(columns, schema=schema)

    def scan(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """All rows' columns, a part at a time."""
        yield from self.table.search().select(columns).to_batches(65_536)

    def make_room(self, metadata: Metadata) -> None:
        """A column for each new name in a document's metadata.

        Raises:
            DataError: As :func:`~rematch.search.columns.new_columns`; nothing has been written
                then.
        """
        if new := new_columns(self.table.schema, metadata):
            with writing(self.uri):
                self.table.add_columns(pa.schema(new))

    def add(self, records: Sequence[dict[str, Any]], *, new: bool) -> None:
        """Add documents, replacing those of the same id; all of them or none.

        Args:
            records: One dictionary per row.
            new: They are known not to be there, so that none is looked for.
        """
        if not records:
            return
        with writing(self.uri):
            if new and is_local(self.uri):
                self.table.add(self.rows(records))
            else:
                merge = (
                    self.table.merge_insert("id")
                    .when_matched_update_all()
                    .when_not_matched_insert_all()
                )
                merge.execute(self.rows(records))

    def delete(self, ids: Sequence[str]) -> None:
        """Take documents out."""
        with writing(self.uri):
            for start in range(0, len(ids), 500):
                self.table.delete(f"id IN ({', '.join(map(quoted, ids[start : start + 500]))})")

    def compact(self, keep: timedelta = timedelta(days=7)) -> None:
        """Merge small files, bring the approximate index up to date, and forget versions older
        than ``keep``.
        """
        with writing(self.uri):
            self.table.optimize(cleanup_older_than=keep)

    def build_ann(self, kind: str = "auto") -> str:
        """An approximate index over the vectors, built by LanceDB.

        Args:
            kind: ``float`` (cells of whole vectors), ``int8``, ``binary``, ``pq`` (compressed, the
                best rescored with whole vectors), ``hnsw`` (graphs over int8), which replace one
                of another kind; ``none`` drops it; ``auto``: ``int8`` above 100,000 documents.

        Returns:
            The kind that was built, or ``none``.

        Raises:
            DataError: If the kind is unknown, or there are too few documents for it.
        """
        if kind not in ("auto", "none", *ANN):
            raise DataError(f"--ann {kind} is unknown; choose auto, none, {', '.join(ANN)}.")
        rows = len(self)
        if kind == "none":
            with writing(self.uri):
                for name in self._ann_indices():
                    self.table.drop_index(name)
        if kind == "none" or (kind == "auto" and rows <= EXACT_UP_TO):
            return "none"
        kind = "int8" if kind == "auto" else kind
        if rows < 256:
            raise DataError(
                f"--ann {kind}: {rows} documents are too few to divide; a scan is exact and quick."
            )
        with writing(self.uri):
            self.table.create_index(
                metric="cosine", vector_column_name="vector", index_type=ANN[kind], replace=True
            )
        return kind

    @property
    def ann(self) -> str:
        """Kind of the approximate index, or ``none``."""
        kinds = {value.replace("_", "").lower(): name for name, value in ANN.items()}
        for index_type in self._ann_indices().values():
            return kinds.get(index_type.replace("_", "").lower(), index_type)
        return "none"

    def _ann_indices(self) -> dict[str, str]:
        """Name and LanceDB's type of each index on the vectors."""
        return {
            index.name: str(index.index_type)
            for index in self.table.list_indices()
            if "vector" in index.columns
        }

    def versions(self) -> list[dict[str, Any]]:
        """Its states that can still be opened: ``version`` and ``timestamp``."""
        return [{k: v[k] for k in ("version", "timestamp")} for v in self.table.list_versions()]

    def restore(self, version: int) -> None:
        """Make an earlier version the latest."""
        with writing(self.uri):
            self.table.restore(version)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While it is written. On an object store nothing is locked, and rows are merged by id
        instead.

        Raises:
            DataError: If another process writes, or the directory cannot be written.
        """
        if not is_local(self.uri):
            yield
            return
        path = Path(self.uri) / ".lock"
        try:
            file = path.open("a")
        except OSError as error:
            raise DataError(f"{self.uri}: cannot be written ({error.strerror}).") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(
                    f"{self.uri}: another process is writing to it. Wait until it is done."
                ) from None
            yield
