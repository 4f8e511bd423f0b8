"""Run the tests of hostile input and write what they tried into docs/reliability.md.

python scripts/reliability.py
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
START, END = "<!-- tried -->\n", "<!-- end of tried -->"


def main() -> None:
    """Run, and write the table."""
    files = sorted(
        path for path in (ROOT / "tests").glob("test_*.py") if "tally" in path.read_text()
    )
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--tally", folder, *files], check=True
        )
        lines = ["| group | inputs | outcomes |", "|---|--:|---|"]
        for path in sorted(Path(folder).glob("*.json")):
            counts = json.loads(path.read_text())
            outcomes = ", ".join(
                f"{count:,} {outcome}" for outcome, count in sorted(counts.items())
            )
            lines.append(f"| {path.stem} | {sum(counts.values()):,} | {outcomes} |")
    before, _, rest = PAGE.read_text().partition(START)
    text = before + START + "\n".join(lines) + "\n" + END + rest.partition(END)[2]
    scratch = PAGE.with_suffix(".tmp")
    scratch.write_text(text)
    scratch.replace(PAGE)


if __name__ == "__main__":
    main()
