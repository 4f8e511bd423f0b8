"""The command ``rematch``: parse, call, print. Heavy imports happen inside the commands."""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rematch import __version__
from rematch.errors import RematchError

if TYPE_CHECKING:
    from rematch.matching import View

app = typer.Typer(
    help="Multimodal retrieval from a multimodal LLM: train, evaluate, search.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Benchmark data.", no_args_is_help=True)
app.add_typer(data_app, name="data")


def _print_version(version: bool) -> None:
    if version:
        typer.echo(f"rematch {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Directory for the report.")] = Path("rematch-demo"),
    steps: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Training steps per model; by default as many as fit into five minutes.",
        ),
    ] = None,
) -> None:
    """Fine-tune the tiny base in two ways, evaluate, search, report; in under five minutes."""
    from rematch.demo.command import DemoOptions, run_demo

    run_demo(DemoOptions(output=output, steps=steps))


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML; see recipes/.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings as section.key=value, such as train.steps=200."),
    ] = None,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate",
            help="Only print memory and time per step; reads the backbone's config, no weights.",
        ),
    ] = False,
    gpus: Annotated[
        int, typer.Option(min=1, help="With --estimate: number of GPUs that share the batch.")
    ] = 1,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="With --estimate: the GPUs also share the weights.")
    ] = False,
    gpu_memory: Annotated[
        float | None,
        typer.Option(
            min=0.1, help="With --estimate: GB of one GPU; exit code 2 if the run needs more."
        ),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            help="With --estimate: TFLOP/s that one GPU achieves, such as 40 % of its peak.",
        ),
    ] = None,
    pictures: Annotated[
        int,
        typer.Option(
            min=0,
            max=3,
            help="With --estimate: how many of query, positive and negative have a picture.",
        ),
    ] = 3,
) -> None:
    """Train a retriever from a recipe."""
    from rematch.train.command import TrainOptions, run_train

    run_train(
        TrainOptions(
            recipe=recipe,
            overrides=tuple(overrides or ()),
            estimate=estimate,
            gpus=gpus,
            fsdp=fsdp,
            gpu_memory=gpu_memory,
            tflops=tflops,
            pictures=pictures,
        )
    )


@app.command()
def mine(
    model: Annotated[str, typer.Argument(help="Checkpoint directory, hub name, or rematch-tiny.")],
    data: Annotated[
        Path, typer.Argument(help="A .jsonl or .parquet file with query and positive.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="The .jsonl file of training data to write; a report is written beside it."
        ),
    ],
    corpus: Annotated[
        Path | None, typer.Option(help="Further documents: a folder of pictures, or a file.")
    ] = None,
    negatives: Annotated[
        int, typer.Option(min=1, help="Maximum number of negatives per query.")
    ] = 4,
    candidates: Annotated[
        int, typer.Option(min=1, help="Number of nearest documents to judge per query.")
    ] = 30,
    yes: Annotated[
        float, typer.Option(min=0, max=1, help="P(yes) from which a candidate is dropped.")
    ] = 0.5,
    margin: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Distance that a candidate's P(yes) must keep below the positive's.",
        ),
    ] = 0.0,
    view: Annotated[
        str,
        typer.Option(
            "--view",
            "--views",
            help="View of the matching head: feat-feat (vectors only), feat-raw, raw-feat or "
            "raw-raw.",
        ),
    ] = "feat-feat",
) -> None:
    """Find hard negatives for your own data; the matching head drops false negatives."""
    if not data.is_file():
        raise RematchError(
            f"{data}: no such file. Give a .jsonl or .parquet file with query and positive."
        )
    from rematch.train.command import MineOptions, run_mine

    run_mine(
        MineOptions(
            model=model,
            data=data,
            output=output,
            corpus=corpus,
            negatives=negatives,
            candidates=candidates,
            yes=yes,
            margin=margin,
            view=_views(view, "--views")[0],
        )
    )


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(help="Directory or hub name of any SentenceTransformer.")
    ] = "rematch-tiny",
    benchmark: Annotated[
        str,
        typer.Option(
            help="picto, picto-validation, picto-visdoc, picto-video, mmeb, mmeb-v2, visdoc, "
            "video, vidore-v1, vidore-v2, zeroshot; a set of MMEB-V2; or your own .yaml, .jsonl, "
            ".parquet or BEIR folder."
        ),
    ] = "picto",
    output: Annotated[
        Path | None,
        typer.Option(help="Directory for scores.json, predictions.parquet and report.html."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the benchmark; by default MMEB is downloaded.")
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="Evaluate only these tasks, separated by commas.")
    ] = "",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Number of queries of each task; by default all.")
    ] = None,
    skip_missing: Annotated[
        bool, typer.Option(help="Leave out tasks whose data is missing or broken, with a warning.")
    ] = False,
    frames: Annotated[
        int, typer.Option(min=1, help="Number of frames that stand for a video.")
    ] = 8,
    document_instructions: Annotated[
        bool | None,
        typer.Option(help="Put instructions before documents; by default as in training."),
    ] = None,
    rerank: Annotated[
        int, typer.Option(min=0, help="Also rerank this many candidates by the matching head.")
    ] = 0,
    views: Annotated[
        str,
        typer.Option(
            help="Views of the matching head, separated by commas: raw-raw, feat-feat, …"
        ),
    ] = "raw-raw",
    maxsim: Annotated[
        bool, typer.Option(help="Also rank by MaxSim over the token vectors.")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Directory of cached vectors; by default OUTPUT/vectors.")
    ] = None,
    save_vectors: Annotated[
        bool, typer.Option(help="Write each task's vectors to OUTPUT/arrays.")
    ] = False,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a forward pass.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that prepare batches.")
    ] = None,
    min_pixels: Annotated[
        int | None, typer.Option(min=1, help="Scale smaller pictures up, if the model can.")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Scale larger pictures down, if the model can.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Score a model on a benchmark: Hit@1 per task, per meta-task, in and out of distribution."""
    from rematch.evaluate.command import EvaluateOptions, run

    run(
        EvaluateOptions(
            model=model,
            benchmark=benchmark,
            output=output,
            data=data,
            tasks=[name.strip() for name in tasks.split(",") if name.strip()],
            limit=limit,
            skip_missing=skip_missing,
            frames=frames,
            document_instructions=document_instructions,
            rerank=rerank,
            views=_views(views, "--views") if rerank else _views("raw-raw", "--views"),
            maxsim=maxsim,
            cache=cache,
            save_vectors=save_vectors,
            batch_tokens=batch_tokens,
            workers=workers,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            trust_remote_code=trust_remote_code,
        )
    )


@app.command()
def index(
    model: Annotated[
        str, typer.Argument(help="Checkpoint directory or hub name; rematch-tiny if left out.")
    ],
    corpus: Annotated[
        str | None,
        typer.Argument(
            help="A folder of pictures, a .jsonl or .parquet file, or a Hugging Face data set."
        ),
    ] = None,
    output: Annotated[
        str,
        typer.Option(
            help="Directory, or URI on an object store; an existing index is brought up to date."
        ),
    ] = "rematch.idx",
    tokens: Annotated[
        bool, typer.Option(help="Store the K token vectors too, for --rerank maxsim.")
    ] = False,
    dimensions: Annotated[
        int, typer.Option(min=0, help="Keep only this many dimensions; 0 for all.")
    ] = 0,
    ann: Annotated[
        str,
        typer.Option(
            help="Approximate index: auto (int8 above 100,000), none, float, int8, binary, pq, "
            "hnsw."
        ),
    ] = "auto",
    add: Annotated[
        bool, typer.Option(help="Keep documents in the index that are not in CORPUS.")
    ] = False,
    max_failures: Annotated[
        float, typer.Option(min=0, max=1, help="Share of documents that may be unreadable.")
    ] = 0.2,
    engine: Annotated[
        str, typer.Option(help="local, or ray for many processes or machines.")
    ] = "local",
    actors: Annotated[int, typer.Option(min=1, help="With ray: number of encoders.")] = 2,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a forward pass, padding included.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Number of processes that prepare batches.")
    ] = None,
) -> None:
    """Encode a corpus into an index. Run it again to update the index or to resume."""
    if corpus is None:
        model, corpus = "rematch-tiny", model
    from rematch.search.command import IndexOptions, run_index

    run_index(
        IndexOptions(
            model=model,
            corpus=corpus,
            output=output,
            tokens=tokens,
            dimensions=dimensions,
            ann=ann,
            add=add,
            max_failures=max_failures,
            engine=engine,
            actors=actors,
            batch_tokens=batch_tokens,
            workers=workers,
        )
    )


@app.command()
def search(
    index: Annotated[str, typer.Argument(help="The output of `rematch index`.")],
    text: Annotated[str | None, typer.Option(help="Query text.")] = None,
    image: Annotated[Path | None, typer.Option(help="Query picture.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of hits.")] = 10,
    filter: Annotated[
        str, typer.Option(help='Condition in SQL on metadata, such as "year > 2000".')
    ] = "",
    rerank: Annotated[str, typer.Option(help="Stages such as maxsim:200,feat:100,raw:10.")] = "",
    exact: Annotated[
        bool, typer.Option(help="Scan all vectors even if there is an approximate index.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Name or directory of the index's model, if it has moved.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Search an index by text, by picture, or by both."""
    if not text and not image:
        raise RematchError("no query. Give --text, --image, or both.")
    from rematch.search.command import SearchOptions, run_search

    run_search(
        SearchOptions(
            index=index,
            text=text,
            image=image,
            top=top,
            filter=filter,
            rerank=rerank,
            exact=exact,
            model=model,
            as_json=as_json,
        )
    )


@app.command()
def serve(
    target: Annotated[
        str, typer.Argument(help="An index, served with a search page, or a model.")
    ],
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free port.")
    ] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen on; by default this machine only.")
    ] = "127.0.0.1",
    model: Annotated[
        str | None, typer.Option(help="Name or directory of the index's model, if it has moved.")
    ] = None,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            help="File with one API key per line; or set REMATCH_API_KEYS, separated by commas."
        ),
    ] = None,
    image_hosts: Annotated[
        str,
        typer.Option(
            help="Hosts whose pictures may be fetched by URL, separated by commas; default: none."
        ),
    ] = "",
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a forward pass, padding included.")
    ] = 4096,
    waiting: Annotated[
        int, typer.Option(min=1, help="Longest queue; further calls are refused with 429.")
    ] = 512,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds after which a request is answered with 504.")
    ] = 60.0,
    batching: Annotated[
        bool, typer.Option(help="Compute calls that wait together, in batches.")
    ] = True,
    most_rerank: Annotated[
        int, typer.Option(min=0, help="Documents that a stage of a search may rerank.")
    ] = 200,
) -> None:
    """Serve embeddings, reranking and search over HTTP, with a search page."""
    from rematch.serve.command import ServeOptions, run_server

    run_server(
        ServeOptions(
            target=target,
            port=port,
            host=host,
            model=model,
            api_keys=api_keys,
            image_hosts=image_hosts,
            batch_tokens=batch_tokens,
            waiting=waiting,
            timeout=timeout,
            batching=batching,
            most_rerank=most_rerank,
        )
    )


@data_app.command()
def export(
    benchmark: Annotated[str, typer.Argument(help="Name of the benchmark: picto.")],
    directory: Annotated[Path, typer.Argument(help="Directory to create; it must not exist yet.")],
    layout: Annotated[
        str,
        typer.Option("--format", help="Layout of the files: mmeb-train, mmeb-eval or mmeb-v2."),
    ] = "mmeb-eval",
    samples: Annotated[
        int, typer.Option(min=1, help="With mmeb-train: number of samples per task.")
    ] = 2000,
) -> None:
    """Write a benchmark to disk in a layout of MMEB's or MMEB-V2's."""
    if benchmark != "picto":
        raise RematchError(f"benchmark {benchmark!r} is unknown; this version has: picto.")
    from rematch.data.mmeb_export import export_picto

    export_picto(directory, layout, samples=samples)
    typer.echo(f"Written: {directory}")


def _views(names: str, option: str) -> "tuple[View, ...]":
    """Views from their names, separated by commas."""
    from rematch.matching import View

    views = [name.strip() for name in names.split(",")]
    for name in views:
        if name not in list(View):
            raise RematchError(f"{option} {name} is unknown; choose from {', '.join(View)}.")
    return tuple(View(name) for name in views)


def main() -> None:
    """Entry point: an error that the user can fix is one line and an exit code, no traceback."""
    # on CPUs, bitsandbytes warns of kernels that nothing here uses
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app()
    except RematchError as error:
        # an error of a data worker has the worker's traceback as its text; the message comes last
        last_line = str(error).strip().splitlines()[-1]
        prefix = f"{type(error).__module__}.{type(error).__name__}: "
        typer.echo(f"error: {last_line.removeprefix(prefix)}", err=True)
        sys.exit(error.exit_status)
    except OSError as error:
        path = f"{error.filename}: " if error.filename else ""
        typer.echo(
            f"error: {path}{error.strerror or error}. Fix the cause and try again.", err=True
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
