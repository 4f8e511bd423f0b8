"""``rematch demo``: the life of a model in five minutes, and a report of it."""

from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils import logging

from rematch.demo.report import check_output, write_reports
from rematch.demo.run import demonstrate
from rematch.errors import RematchError


@dataclass(frozen=True)
class DemoOptions:
    """The command's options; see ``rematch demo --help``."""

    output: Path = Path("rematch-demo")
    steps: int | None = None


def run_demo(options: DemoOptions) -> Path:
    """Run the demo, write both reports, and say where they are.

    Returns:
        Path of the HTML report.

    Raises:
        RematchError: If the output is a file, or cannot be written.
    """
    if options.output.exists() and not options.output.is_dir():
        raise RematchError(f"{options.output} is a file. Give a directory with --output.")
    check_output(options.output)
    logging.disable_progress_bar()
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, speed_estimate_period=60) as progress:
        results = demonstrate(progress, options.steps)
    path = write_reports(options.output, results)
    console = Console(soft_wrap=True, highlight=False)
    console.print(_scores(results.content["arms"]), results.content["verdict"], sep="\n")
    console.print(f"\nReport: {escape(str(path))}")
    return path


def _scores(arms: dict[str, dict[str, float]]) -> Table:
    """Hit@1 of the models."""
    columns = {"overall": "overall", "ind": "IND", "ood": "OOD", "style": "style"}
    table = Table("Hit@1 (%)", *columns.values(), box=SIMPLE)
    for name, scores in arms.items():
        table.add_row(name, *(f"{scores[column]:.1f}" for column in columns))
    return table
