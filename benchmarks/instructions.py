"""What an instruction before the query gives: Hit@1 with the task's own, the one that a search
chooses, and none, on the same queries in one run.

    python benchmarks/instructions.py --model rematch-tiny --stamps photos

``--stamps`` is a folder of captioned pictures, such as Tux Paint's stamps (docs/search.md): each
caption searches for its picture. Picto's queries are those of the validation split.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from rematch import ReMatch
from rematch.data.corpus import open_corpus
from rematch.data.document import Document
from rematch.data.instructions import instruct, instruction_table
from rematch.data.picto_tasks import evaluation_tasks
from rematch.data.schema import Item, RetrievalTask
from rematch.encoding.encoder import Encoder
from rematch.evaluate.metrics import paired_interval
from rematch.evaluate.run import evaluate
from rematch.files import write_json

RESULTS = Path(__file__).parent / "results" / "instructions.json"
TASKS = ("Picto-T2I", "Picto-I2T", "Picto-Edit", "Picto-Style")


def stamps(folder: Path) -> RetrievalTask:
    """Each caption with its picture; pictures whose caption is not theirs alone are left out."""
    documents = [d for d in open_corpus(folder) if isinstance(d, Document) and d.text]
    captions = [document.text for document in documents]
    documents = [d for d in documents if captions.count(d.text) == 1]
    return RetrievalTask(
        "Tux Paint stamps",
        "retrieval",
        [Item(document.text) for document in documents],
        [replace(document, text="").item() for document in documents],
        [],
        answers=[[number] for number in range(len(documents))],
    )


def arms(task: RetrievalTask, table: dict[str, str]) -> dict[str, RetrievalTask]:
    """The task with its own instructions (if it has them), with chosen ones, and with none."""
    plain = [replace(query, instruction="") for query in task.queries]
    chosen = replace(task, queries=list(plain), chooses_instructions=True)
    instruct(chosen, table)
    variants = {"chosen": chosen, "none": replace(task, queries=plain)}
    return {"own": task} | variants if task.queries[0].instruction else variants


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="rematch-tiny")
    parser.add_argument("--stamps", type=Path, help="folder of captioned pictures")
    parser.add_argument("--queries", type=int, default=100)
    args = parser.parse_args()
    model = ReMatch(args.model)
    encoder = Encoder(model)
    table = instruction_table(model.prompts)
    tasks = evaluation_tasks(TASKS, split="validation", queries=args.queries)
    if args.stamps:
        tasks.append(stamps(args.stamps))
    rows = {}
    for task in tasks:
        variants = arms(task, table)
        results = dict(zip(variants, evaluate(encoder, list(variants.values()))[0], strict=True))
        interval = paired_interval([results["chosen"].hits[None]], [results["none"].hits[None]])
        rows[task.name] = {
            "queries": len(task.queries),
            "hit@1": {name: round(result.scores["hit@1"], 1) for name, result in results.items()},
            "hit@10": {
                name: round(result.scores["hit@10"], 1) for name, result in results.items()
            },
            "chosen - none": [round(v, 1) for v in (interval.mean, interval.low, interval.high)],
        }
        Console().print(task.name, rows[task.name])
    write_json(RESULTS, {"model": args.model, "tasks": rows})


if __name__ == "__main__":
    main()
