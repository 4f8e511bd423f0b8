"""The approximate index over a table's vectors, which LanceDB builds and searches."""

from typing import Any

from lancedb.index import HnswSq, IvfFlat, IvfPq, IvfRq, IvfSq

from rematch.errors import DataError

KINDS = {"float": IvfFlat, "int8": IvfSq, "binary": IvfRq, "pq": IvfPq, "hnsw": HnswSq}
EXACT_UP_TO = 100_000  # documents; a scan of fewer takes no time that a person notices
_MIN_DOCUMENTS = 256  # that LanceDB can cluster


def build(table: Any, kind: str) -> str:
    """Build an approximate index, replacing one of another kind.

    Args:
        table: A LanceDB table with the column ``vector``.
        kind: ``float`` (cells of whole vectors); ``int8``, ``binary`` or ``pq`` (compressed
            vectors, the best rescored with whole ones); ``hnsw`` (graphs over int8); ``none`` to
            drop the index; ``auto`` for ``int8`` above 100,000 documents.

    Returns:
        The kind that was built, or ``none``.

    Raises:
        DataError: If the kind is unknown, or there are too few documents for it.
    """
    check_kind(kind)
    if kind == "none":
        for name in _types_by_name(table):
            table.drop_index(name)
        return "none"
    documents = table.count_rows()
    if kind == "auto":
        if documents <= EXACT_UP_TO:
            return "none"
        kind = "int8"
    if documents < _MIN_DOCUMENTS:
        raise DataError(
            f"--ann {kind}: there are {documents} documents, and an approximate index needs "
            f"{_MIN_DOCUMENTS}. Leave out --ann: with so few documents, an exact scan is fast."
        )
    table.create_index("vector", config=KINDS[kind](distance_type="cosine"), replace=True)
    return kind


def check_kind(kind: str) -> None:
    """Check the value of ``--ann``.

    Raises:
        DataError: If the kind is unknown.
    """
    if kind not in ("auto", "none", *KINDS):
        raise DataError(f"--ann {kind} is unknown; choose auto, none, {', '.join(KINDS)}.")


def kind_of(table: Any) -> str:
    """The kind of a table's approximate index, or ``none``."""
    types = list(_types_by_name(table).values())
    if not types:
        return "none"
    name = types[0].replace("_", "").lower().removeprefix("ivf")  # IVF_HNSW_SQ is HnswSq
    for kind, config in KINDS.items():
        if config.__name__.lower().removeprefix("ivf") == name:
            return kind
    return types[0]


def _types_by_name(table: Any) -> dict[str, str]:
    """LanceDB's type of each index on the vectors, by the index's name."""
    return {
        index.name: str(index.index_type)
        for index in table.list_indices()
        if "vector" in index.columns
    }
