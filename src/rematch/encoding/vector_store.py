"""Vectors on disk: one SQLite file per model, one row per input.

The name of the file is a digest of all that the model's vectors depend on
(:func:`~rematch.encoding.fingerprint.describe_model`); the key of a row is the input's content
key. SQLite commits a batch as a whole or not at all, whatever kills the process. Each row also has
a checksum.
"""

import json
import os
import sqlite3
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from rematch.encoding.fingerprint import describe_model, digest_of
from rematch.errors import StorageError
from rematch.files import writing


class VectorStore:
    """The vectors of one model in a directory.

    Args:
        directory: Where the file is; created if needed. It may hold the stores of other models.
        model: The model that the vectors are from. Another model, or the same one with other
            settings, has another file.
        warn: Called with a message when the file or a row turns out to be damaged.

    Raises:
        StorageError: If the directory cannot be written.
    """

    def __init__(
        self,
        directory: Path | str,
        model: SentenceTransformer,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        description = json.dumps(describe_model(model), indent=1, sort_keys=True, default=str)
        self.path = Path(directory) / f"{digest_of(description)[:16]}.sqlite"
        self.warn = warn
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open(description)
        except (OSError, sqlite3.OperationalError) as error:
            raise StorageError(
                f"{self.path}: cannot be written ({error}). Choose another directory for it."
            ) from None
        except sqlite3.DatabaseError:
            self._start_over(description)

    def _open(self, description: str) -> None:
        self.database = sqlite3.connect(self.path, timeout=600, isolation_level=None)
        if self.database.execute("pragma quick_check(1)").fetchone() != ("ok",):
            raise sqlite3.DatabaseError
        self.database.execute("pragma journal_mode = wal")
        self.database.execute("create table if not exists model (description text)")
        self.database.execute(
            "create table if not exists vectors (key blob primary key, shape text, vector blob, "
            "crc integer)"
        )
        if self.database.execute("select count(*) from model").fetchone() == (0,):
            self.database.execute("insert into model values (?)", [description])

    def _start_over(self, description: str) -> None:
        """Move a damaged file aside and create an empty one."""
        self.database.close()
        damaged = self.path.with_suffix(".torn")
        os.replace(self.path, damaged)
        for suffix in ("-wal", "-shm"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)
        self.warn(
            f"{self.path}: the file is damaged and was renamed to {damaged.name}; its vectors are "
            "computed again"
        )
        self._open(description)

    def get(self, keys: Sequence[bytes]) -> dict[bytes, NDArray[np.float32]]:
        """The vectors stored under these keys; keys without an intact vector are left out."""
        vectors = {}
        for key in keys:
            row = self.database.execute(
                "select shape, vector, crc from vectors where key = ?", [key]
            ).fetchone()
            if row is None:
                continue
            shape, content, checksum = row
            if zlib.crc32(content) == checksum:
                vectors[key] = np.frombuffer(content, np.float32).reshape(json.loads(shape))
            else:
                self.warn(f"{self.path}: a vector is damaged; it is computed again")
        return vectors

    def put(self, vectors: Mapping[bytes, NDArray[np.float32]]) -> None:
        """Store the vectors of a batch, all of them or none.

        Raises:
            StorageError: If they cannot be written.
        """
        rows = []
        for key, vector in vectors.items():
            content = vector.tobytes()
            rows.append((key, json.dumps(vector.shape), content, zlib.crc32(content)))
        with writing(self.path):
            try:
                self.database.execute("begin immediate")
                self.database.executemany(
                    "insert or replace into vectors values (?, ?, ?, ?)", rows
                )
                self.database.execute("commit")
            except sqlite3.Error:
                if self.database.in_transaction:
                    self.database.execute("rollback")
                raise

    def close(self) -> None:
        """Close the file."""
        self.database.close()

    def __len__(self) -> int:
        return int(self.database.execute("select count(*) from vectors").fetchone()[0])
