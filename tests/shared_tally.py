"""Counts of what tests of hostile input tried, for the table in docs/reliability.md."""

import json
from collections import Counter, defaultdict
from pathlib import Path


class Tally:
    """Outcomes by group, such as ``tally("Filters")["refused"] += 1``."""

    def __init__(self) -> None:
        self.outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def __call__(self, group: str) -> Counter[str]:
        return self.outcomes[group]

    def save(self, folder: Path) -> None:
        """Write a file for each group."""
        folder.mkdir(parents=True, exist_ok=True)
        for group, counts in self.outcomes.items():
            (folder / f"{group}.json").write_text(json.dumps(counts, indent=2))
