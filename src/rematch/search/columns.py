"""Metadata as columns of LanceDB: which names it can keep and search, and how a condition in SQL
writes them.
"""

from unicodedata import category

import pyarrow as pa

from rematch.data.corpus import Metadata
from rematch.errors import DataError

OWN = ("id", "vector", "tokens", "text", "path", "image", "content_hash", "stamp")


def new_columns(schema: pa.Schema, metadata: Metadata) -> list[pa.Field]:
    """The columns that a document's metadata needs besides those of the schema.

    Raises:
        DataError: If a name cannot be a column's, or a value is of another kind than its column's.
    """
    new = []
    spelt = {name.casefold(): name for name in schema.names}
    for name, value in metadata.items():
        _check_name(name)
        if spelt.setdefault(name.casefold(), name) != name:
            raise DataError(
                f"metadata {name!r} differs from {spelt[name.casefold()]!r} only in case. Spell "
                "them alike."
            )
        if value is None:
            continue
        kind = (
            pa.bool_()
            if isinstance(value, bool)
            else pa.float64()
            if isinstance(value, float)
            else pa.string()
        )
        if name not in schema.names:
            new.append(pa.field(name, kind))
        elif schema.field(name).type != kind:
            raise DataError(
                f"metadata {name} = {value!r} is no {schema.field(name).type}, as with other "
                "documents."
            )
    return new


def _check_name(name: str) -> None:
    if name.casefold() in OWN or name.startswith("_"):
        raise DataError(f"metadata {name!r} is a name of the index's own. Rename it.")
    if not name.strip():
        raise DataError(f"metadata {name!r} has an empty name. Give it one.")
    if (
        name == "*"
        or "." in name
        or "`" in name
        or any(category(character) in ("Cc", "Cs") for character in name)
    ):
        raise DataError(
            f"metadata {name!r} cannot be a column: '*' is not a name, and dots, backticks, "
            "control characters and lone surrogates are not allowed in one. Rename it."
        )


def in_condition(name: str) -> str:
    """A metadata's name as a condition in SQL has it.

    >>> in_condition("year"), in_condition("year of birth")
    ('year', '`year of birth`')
    """
    return name if name.isascii() and name.isidentifier() else f"`{name}`"
