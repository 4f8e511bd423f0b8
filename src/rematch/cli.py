"""The command ``rematch``: parse, call, print. Heavy imports happen inside the commands."""

import io
import logging
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rematch import __version__
from rematch.arguments import Command
from rematch.errors import RematchError, first_line

if TYPE_CHECKING:
    from rematch.matching import View

_UsageError: Any = typer.BadParameter.__mro__[1]  # of the click that typer uses
_LONGEST_MESSAGE = 2_000  # characters
_MOST_PIXELS = 1_000_000_000
_MOST_TOKENS = 100_000_000  # of a forward pass
_MOST_WORKERS = 256

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


@app.command(cls=Command)
def demo(
    output: Annotated[Path, typer.Option(help="Directory for the report.")] = Path("rematch-demo"),
    steps: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=1_000_000,
            help="Training steps per model; by default as many as fit into five minutes.",
        ),
    ] = None,
) -> None:
    """Fine-tune the tiny base in two ways, evaluate, search, report; in about five minutes."""
    from rematch.demo.command import DemoOptions, run_demo

    run_demo(DemoOptions(output=output, steps=steps))


@app.command(cls=Command)
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
            help="Only print the memory that a step takes, and with --tflops its time; reads the "
            "backbone's config, no weights.",
        ),
    ] = False,
    gpus: Annotated[
        int,
        typer.Option(
            min=1, max=100_000, help="With --estimate: number of GPUs that share the batch."
        ),
    ] = 1,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="With --estimate: the GPUs also share the weights.")
    ] = False,
    gpu_memory: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=1e6,
            help="With --estimate: GB of one GPU; exit code 2 if the run needs more.",
        ),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=1e6,
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


@app.command(cls=Command)
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
        int, typer.Option(min=1, max=10_000, help="Maximum number of negatives per query.")
    ] = 4,
    candidates: Annotated[
        int,
        typer.Option(min=1, max=10_000, help="Number of nearest documents to judge per query."),
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
            view=_view(view),
        )
    )


@app.command(cls=Command)
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
        int | None,
        typer.Option(
            min=1, max=1_000_000_000, help="Number of queries of each task; by default all."
        ),
    ] = None,
    skip_missing: Annotated[
        bool, typer.Option(help="Leave out tasks whose data is missing or broken, with a warning.")
    ] = False,
    frames: Annotated[
        int, typer.Option(min=1, max=64, help="Number of frames that stand for a video.")
    ] = 8,
    document_instructions: Annotated[
        bool | None,
        typer.Option(help="Put instructions before documents; by default as in training."),
    ] = None,
    rerank: Annotated[
        int,
        typer.Option(
            min=0, max=100_000, help="Also rerank this many candidates by the matching head."
        ),
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
        int | None, typer.Option(min=1, max=_MOST_TOKENS, help="Tokens of a forward pass.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, max=_MOST_WORKERS, help="Processes that prepare batches."),
    ] = None,
    min_pixels: Annotated[
        int | None,
        typer.Option(min=1, max=_MOST_PIXELS, help="Scale smaller pictures up, if the model can."),
    ] = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            min=1, max=_MOST_PIXELS, help="Scale larger pictures down, if the model can."
        ),
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
            tasks=_names(tasks, "--tasks") if tasks else [],
            limit=limit,
            skip_missing=skip_missing,
            frames=frames,
            document_instructions=document_instructions,
            rerank=rerank,
            views=_views(views, "--views"),
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


@app.command(cls=Command)
def index(
    model: Annotated[
        str, typer.Argument(help="Checkpoint directory or hub name; rematch-tiny if left out.")
    ],
    corpus: Annotated[
        str | None,
        typer.Argument(
            help="A folder of pictures, PDF files and videos, a .jsonl or .parquet file, or a "
            "Hugging Face data set."
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
        int,
        typer.Option(min=0, max=1_000_000, help="Keep only this many dimensions; 0 for all."),
    ] = 0,
    ann: Annotated[
        str,
        typer.Option(
            help="Approximate index: auto (int8 above 100,000), none, float, int8, binary, pq, "
            "hnsw."
        ),
    ] = "auto",
    instructions: Annotated[
        Path | None,
        typer.Option(help="JSON file of query instructions by kind, in place of the model's."),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Frames that stand for a video; 8 in a new index."),
    ] = None,
    segments: Annotated[
        float,
        typer.Option(
            min=0, max=86_400, help="Seconds of a video that are a document; 0 for all of it."
        ),
    ] = 0,
    store_pictures: Annotated[
        bool,
        typer.Option(
            help="Store the pictures of files and pages too, so that the files may move."
        ),
    ] = False,
    add: Annotated[
        bool,
        typer.Option(help="Add another corpus; documents that are not in CORPUS stay."),
    ] = False,
    replace: Annotated[
        bool,
        typer.Option(help="Replace documents of other corpora that have the same ids."),
    ] = False,
    max_failures: Annotated[
        float, typer.Option(min=0, max=1, help="Share of documents that may fail.")
    ] = 0.2,
    engine: Annotated[
        str, typer.Option(help="local, or ray for many processes or machines.")
    ] = "local",
    actors: Annotated[
        int, typer.Option(min=1, max=10_000, help="With ray: number of encoders.")
    ] = 2,
    batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=_MOST_TOKENS, help="Tokens of a forward pass, padding included."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, max=_MOST_WORKERS, help="Number of processes that prepare batches."),
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
            instructions=instructions,
            frames=frames,
            segments=segments,
            store_pictures=store_pictures,
            add=add,
            replace=replace,
            max_failures=max_failures,
            engine=engine,
            actors=actors,
            batch_tokens=batch_tokens,
            workers=workers,
        )
    )


@app.command(cls=Command)
def search(
    index: Annotated[str, typer.Argument(help="The output of `rematch index`.")],
    text: Annotated[str | None, typer.Option(help="Query text.")] = None,
    image: Annotated[Path | None, typer.Option(help="Query picture.")] = None,
    top: Annotated[int, typer.Option(min=1, max=100_000, help="Number of hits.")] = 10,
    filter: Annotated[
        str,
        typer.Option(help="""Condition on metadata, such as "year > 2000 AND place = 'Rome'"."""),
    ] = "",
    rerank: Annotated[str, typer.Option(help="Stages such as maxsim:200,feat:100,raw:10.")] = "",
    instruction: Annotated[
        str | None,
        typer.Option(
            help='Text before the query, in place of the one that the index chooses; "" for none.'
        ),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="What is compared: vector, text (words) or hybrid (both); auto is hybrid for a "
            "query of text if documents have words, otherwise vector."
        ),
    ] = "auto",
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
            instruction=instruction,
            mode=mode,
            exact=exact,
            model=model,
            as_json=as_json,
        )
    )


@app.command(cls=Command)
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
        int,
        typer.Option(
            min=1,
            max=_MOST_TOKENS,
            help="Tokens of the calls that are computed together, padding included; the matching "
            "head divides them into passes of 2,048 tokens on a CPU, of 16,384 elsewhere.",
        ),
    ] = 4096,
    waiting: Annotated[
        int,
        typer.Option(
            min=1, max=1_000_000, help="Longest queue; further calls are refused with 429."
        ),
    ] = 512,
    timeout: Annotated[
        float,
        typer.Option(
            min=0.1, max=86_400, help="Seconds after which a request is answered with 504."
        ),
    ] = 60.0,
    batching: Annotated[
        bool, typer.Option(help="Compute calls that wait together, in batches.")
    ] = True,
    most_rerank: Annotated[
        int,
        typer.Option(min=0, max=100_000, help="Documents that a stage of a search may rerank."),
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


@data_app.command(cls=Command)
def export(
    benchmark: Annotated[str, typer.Argument(help="Name of the benchmark: picto.")],
    directory: Annotated[Path, typer.Argument(help="Directory to create; it must not exist yet.")],
    layout: Annotated[
        str,
        typer.Option("--format", help="Layout of the files: mmeb-train, mmeb-eval or mmeb-v2."),
    ] = "mmeb-eval",
    samples: Annotated[
        int,
        typer.Option(min=1, max=10_000_000, help="With mmeb-train: number of samples per task."),
    ] = 2000,
    queries: Annotated[
        int,
        typer.Option(
            min=50, max=200, help="With mmeb-eval: number of queries per task, a multiple of 50."
        ),
    ] = 200,
) -> None:
    """Write a benchmark to disk in a layout of MMEB's or MMEB-V2's."""
    if benchmark != "picto":
        raise RematchError(f"benchmark {benchmark!r} is unknown; this version has: picto.")
    from rematch.data.mmeb_export import export_picto

    export_picto(directory, layout, samples=samples, queries=queries)
    typer.echo(f"Written: {directory}")


def _names(text: str, option: str) -> list[str]:
    """Names separated by commas."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise RematchError(f"{option} {text!r} holds no name. Give names separated by commas.")
    return names


def _views(text: str, option: str) -> "tuple[View, ...]":
    """Views from their names, separated by commas."""
    from rematch.matching import View

    names = _names(text, option)
    for name in names:
        if name not in list(View):
            raise RematchError(f"{option} {name} is unknown; choose from {', '.join(View)}.")
    return tuple(View(name) for name in names)


def _view(text: str) -> "View":
    """A single view from its name."""
    views = _views(text, "--views")
    if len(views) > 1:
        raise RematchError(f"--views {text}: mining asks about one view. Give one of them.")
    return views[0]


def main() -> None:
    """Entry point: whatever goes wrong is one line, not a traceback.

    The exit code is 2 if the command line or an input is wrong, and 1 if a place on disk is, or
    nobody foresaw the error.
    """
    # on CPUs, bitsandbytes warns of kernels that nothing here uses
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may not be encodable
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(standalone_mode=False, prog_name="rematch")
    except RematchError as error:
        _print_error(_message(error))
        sys.exit(error.exit_status)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _print_error(f"{place}{error.strerror or error}. Fix the cause and try again.")
        sys.exit(1)
    except _UsageError as error:
        _print_usage_error(error)
        sys.exit(2)
    except typer.Abort:  # Ctrl-C
        sys.exit(130)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # libraries in Rust panic with a BaseException
        _print_error(_unforeseen(error))
        sys.exit(1)
    if isinstance(code, int) and code:
        sys.exit(code)


def _message(error: RematchError) -> str:
    """What an error says, without the traceback that an error of a data worker has as its text."""
    text = str(error).strip()
    if "Traceback (most recent call last)" not in text:
        return text
    prefix = f"{type(error).__module__}.{type(error).__name__}: "
    return text.splitlines()[-1].removeprefix(prefix)


def _print_usage_error(error: Any) -> None:
    """Print what is wrong with the arguments; only the help, if there are none."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return
    command = error.ctx.command_path if error.ctx else "rematch"
    _print_error(f"{error.format_message().rstrip(' .')}. See `{command} --help`.")


def _unforeseen(error: BaseException) -> str:
    """What to print of an error that nobody foresaw; its traceback is written to a file."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            f"out of memory ({first_line(error)}). Lower --batch-tokens or "
            "train.mini_batch_tokens, or use a machine with more."
        )
    details = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="rematch-", suffix=".txt", delete=False, errors="backslashreplace"
        ) as file:
            file.write(details)
        place = f"is in {file.name}"
    except OSError:
        sys.stderr.write(details)
        place = "is above"
    return f"unforeseen: {first_line(error)}. Its traceback {place}. Please report it as a bug."


def _print_error(text: str) -> None:
    """Print one line without control characters."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    if len(line) > _LONGEST_MESSAGE:
        line = f"{line[: _LONGEST_MESSAGE // 2]} … {line[-_LONGEST_MESSAGE // 2 :]}"
    typer.echo(f"error: {line}", err=True)


if __name__ == "__main__":
    main()
