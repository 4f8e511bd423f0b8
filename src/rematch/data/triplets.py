"""Custom training data: JSONL or parquet with the columns ``query``, ``positive`` and, optionally,
``negative``.
"""

from pathlib import Path

from rematch.data.rows import load_rows, parse_item
from rematch.data.schema import Triplet
from rematch.errors import DataError


def load_triplets(path: Path | str, allow_missing: bool = False) -> list[Triplet]:
    """Load training samples from a file.

    Each cell holds text, the path of a picture (relative to the file), or ``{"text": …, "image":
    …}``.

    Args:
        path: A .jsonl or .parquet file.
        allow_missing: Whether pictures may be missing; opening one later raises an ImageError.

    Raises:
        DataError: If the file is missing or holds no samples, a line does not parse, a column is
            missing or empty, or a picture is missing; the message names the file and the row.
    """
    path = Path(path)
    triplets = []
    for row, record in load_rows(path):
        if not isinstance(record, dict) or not {"query", "positive"} <= record.keys():
            content = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"{path}:{row}: needs the columns 'query' and 'positive' (and may have "
                f"'negative'); has {content}."
            )
        items = {
            name: parse_item(record[name], path, row, name, allow_missing)
            for name in ("query", "positive", "negative")
            if record.get(name)
        }
        if missing := {"query", "positive"} - items.keys():
            raise DataError(
                f"{path}:{row}: {missing.pop()!r} is empty. Fill it in or delete the row."
            )
        triplets.append(Triplet(items["query"], items["positive"], items.get("negative")))
    if not triplets:
        raise DataError(f"{path}: holds no samples.")
    return triplets
