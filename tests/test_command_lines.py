"""Nothing that a command line, a recipe, a model or a data file says ends in a traceback.

Every line is refused in one line (exit code 2), or runs. The command must foresee each.
"""

import io
import json
import os
import random
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from shared_search import build_index, save_picture

from rematch import cli
from rematch.train.recipe import Data, Lora, Loss, Model, Source, Train

NOT_UTF8 = os.fsdecode(b"\xff\xfe")
HUGE = ("4294967296", "9223372036854775808", "1" + "0" * 30, "9" * 5000)
NO_INTEGERS = ("nan", "inf", "²", "1.5", "1e3", "0x10", "", " ", "-1000000", NOT_UTF8, "1\0")
NO_NUMBERS = ("nan", "-nan", "inf", "-inf", "1e400", "1e300", "-1", "²", "1,5", "", NOT_UTF8)
NO_PATHS = (
    "",
    "s3://bucket/x",
    "foo://",
    "http://[x",
    "a\0b",
    NOT_UTF8,
    "x" * 300,
    "y/" * 3000,
    "/dev/null",
    "/dev/zero",
)
NO_TEXTS = (NOT_UTF8, "a\0b", "a" + NOT_UTF8)
ODD_TEXTS = ("²", "nope", "a\nb", "\x1b[31m", "-", "s3://", "foo://", "x" * 3000, "{}", "'; --")
DEEP = "[" * 5000 + "]" * 5000


def run(*arguments: object) -> tuple[int, str]:
    """Run the command in this process; returns its exit code and its errors."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    argv, sys.argv = sys.argv, ["rematch", *map(str, arguments)]
    code = 0
    try:
        with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
            cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = argv
    streams[1].flush()
    return code, streams[1].buffer.getvalue().decode("utf-8", "surrogateescape")


def outcome(counts, arguments, names=()) -> str:
    """Run a line, count what came of it, and return its error.

    ``names`` are words of which the error must hold one; then the line must be refused.
    """
    code, errors = run(*arguments)
    shown = [str(argument)[:80] for argument in arguments]
    lines = [line for line in errors.replace("\r", "\n").splitlines() if "error: " in line]
    assert code in (0, 2), (shown, errors[-2000:])
    assert "Traceback" not in errors, shown
    assert len(lines) == (code == 2), (shown, errors[-2000:])
    if names:
        assert code == 2, shown
        assert any(name.lower() in lines[0].lower() for name in names), (shown, lines[0])
    counts["refused in one line" if code else "ran"] += 1
    return lines[0] if lines else ""


@pytest.fixture(scope="module")
def place(saved_model, searcher, tmp_path_factory):
    """Files that the lines name; models and outputs are such that nothing heavy starts."""
    folder = tmp_path_factory.mktemp("lines")
    (folder / "empty-model").mkdir()
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "empty").write_bytes(b"")
    (folder / "empty.jsonl").write_bytes(b"")
    os.mkfifo(folder / "pipe")
    rows = [{"query": f"a {i}", "positive": f"b {i}", "positives": [f"b {i}"]} for i in range(3)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save_picture(folder / "pictures" / "1.png", 1)
    (folder / "corpus.jsonl").write_text('{"text": "b 1"}\n{"text": "b 2"}')
    build_index(searcher, folder / "corpus.jsonl", folder / "idx")
    write_recipe(folder / "recipe.yaml", folder)
    return folder


def write_recipe(path, folder):
    train = {"output": str(folder / "trained"), "steps": 1, "batch_size": 2, "workers": 0}
    model = {"backbone": str(folder / "empty-model")}
    path.write_text(yaml.safe_dump({"train": train, "model": model}))


def commands(place) -> dict[str, tuple[object, list[str], dict[str, list[str]]]]:
    """Each command: its function, its arguments, and its required options.

    The models are empty folders and the outputs exist, so that valid lines are refused late.
    """
    text = {name: str(place / name) for name in ("recipe.yaml", "rows.jsonl", "idx", "pictures")}
    model = str(place / "empty-model")
    return {
        "train": (cli.train, [text["recipe.yaml"]], {}),
        "mine": (cli.mine, [model, text["rows.jsonl"]], {"output": str(place / "m.jsonl")}),
        "evaluate": (cli.evaluate, [model], {"benchmark": text["rows.jsonl"]}),
        "index": (cli.index, [model, text["pictures"]], {"output": str(place / "new.idx")}),
        "search": (cli.search, [text["idx"]], {"text": "a", "model": model}),
        "serve": (cli.serve, [model], {"port": "0"}),
        "data export": (cli.export, ["picto", text["pictures"]], {}),
        "demo": (cli.demo, [], {"output": str(place / "binary")}),
    }


def parameters(function) -> list[SimpleNamespace]:
    """Name, kind and flag (empty for an argument) of each parameter of a command."""
    hints = get_type_hints(function, include_extras=True)
    described = []
    for name, parameter in signature(function).parameters.items():
        kind, details = get_args(hints[name])[:2]
        kinds = get_args(kind) or (kind,)
        is_argument = type(details).__name__ == "ArgumentInfo"
        declared = [flag for flag in details.param_decls or () if flag.startswith("--")]
        flag = "" if is_argument else (declared or ["--" + name.replace("_", "-")])[0]
        described.append(
            SimpleNamespace(
                name=name,
                flag=flag,
                kind=next(k for k in (bool, int, float, Path, str, list[str]) if k in kinds),
                details=details,
                may_be_empty=parameter.default == "" or name == "instruction",
            )
        )
    return described


def line(place, command: str, parameter, value: str) -> list[str]:
    """The command's valid line with another value of one parameter."""
    function, arguments, options = commands(place)[command]
    arguments, options = list(arguments), dict(options)
    if parameter.flag:
        options[parameter.name] = value
    else:
        names = [p.name for p in parameters(function) if not p.flag]
        position = names.index(parameter.name)
        arguments[position:] = [value, *arguments[position + 1 :]]
    flags = {p.name: p.flag for p in parameters(function)}
    typed = [f"{flags[name]}={value}" for name, value in options.items()]
    return [*command.split(), *typed, "--", *arguments]


def wrong_values(place, parameter) -> list[str]:
    """Values that no parameter of this kind takes."""
    values = {
        bool: (),
        int: (*HUGE, *NO_INTEGERS),
        float: NO_NUMBERS,
        Path: (*NO_PATHS, str(place / "pipe")),
        str: NO_TEXTS,
        list[str]: ("nothing", "=", "no.such.key=1", NOT_UTF8),
    }[parameter.kind]
    if parameter.kind is str and not parameter.may_be_empty:
        values = ("", *values)
    return list(values)


def odd_values(place, command: str, parameter) -> list[str]:
    """Values of the right kind that may still not do."""
    if command == "demo" or parameter.name in ("directory", "host"):
        return []  # the demo would run; hosts are looked up on the network
    files = [place / "missing.x", place, place / "binary", place / "empty", "/proc/self/mem"]
    if parameter.kind is Path:
        return [*map(str, files)]
    return [*ODD_TEXTS, str(place), str(place / "binary")] if parameter.kind is str else []


def test_every_number_has_limits(place):
    for command, (function, *_) in commands(place).items():
        for parameter in parameters(function):
            if parameter.kind in (int, float):
                limits = parameter.details.min, parameter.details.max
                assert None not in limits, (command, parameter.name)


def test_hostile_lines(place, tally):
    """Some 800 lines: every parameter of every command with every value of its kind."""
    counts = tally("Command lines")
    for command, (function, *_) in commands(place).items():
        for parameter in parameters(function):
            names = [parameter.flag or parameter.name]
            names += ["override", "unknown key"] if parameter.kind == list[str] else []
            for value in wrong_values(place, parameter):
                outcome(counts, line(place, command, parameter, value), names)
            for value in odd_values(place, command, parameter):
                outcome(counts, line(place, command, parameter, value))
    assert counts.total() >= 300
    assert sorted(path.name for path in place.iterdir() if path.suffix == ".idx") == []


def test_lines_that_were_accepted_or_broke(place, tally):
    """What the rules above do not reach: options that do not go together, and output."""
    counts = partial(outcome, tally("Command lines"))
    model, rows, idx = (place / name for name in ("empty-model", "rows.jsonl", "idx"))
    counts(["evaluate", model, "--benchmark", rows, "--views", "nope"], ["--views nope"])
    counts(["evaluate", model, "--benchmark", rows, "--tasks", ","], ["--tasks"])
    counts(["index", model, place / "empty.jsonl", "--output", place / "e.idx"], ["no documents"])
    for uri in ("s3://", "foo://", "foo://x", "s3:///", "://"):
        counts(["search", uri, "--text", "a"], [uri])
        counts(["serve", uri], [uri])
        counts(["index", "rematch-tiny", place / "pictures", "--output", uri], [uri])
    counts(["serve", model, "--port", 0, "--api-keys", place / "binary"], ["--api-keys"])
    for host in ("127.0.0.1:80", "[", "a" * 80, "ä..b", " "):
        counts(["serve", model, "--port", 0, "--host", host], ["cannot listen"])
    counts(["mine", model, rows, "--output", place / "m.jsonl", "--views", ","], ["--views"])
    for text in ("a\nb\x1b[31m[bold]", "a" * 60_000):
        counts(["search", idx, f"--text={text}", "--top", 1])
    for argument in ("", "-", "--", "--no-such-option", "no-such-command", NOT_UTF8, "²"):
        counts([argument])


# ---- recipes ------------------------------------------------------------------------------------


def recipe_keys() -> dict[str, object]:
    """The field of each key of a recipe."""
    keys = {}
    sections = {"model": Model, "model.lora": Lora, "data": Data, "loss": Loss, "train": Train}
    for section, settings in sections.items():
        keys |= {f"{section}.{name}": field for name, field in settings.model_fields.items()}
    return keys


def is_number(annotation) -> bool:
    options = get_args(annotation) if get_origin(annotation) is not Annotated else [annotation]
    return bool({int, float} & {annotation, *options})


def test_every_number_of_a_recipe_has_limits():
    fields = recipe_keys() | {f"source.{k}": field for k, field in Source.model_fields.items()}
    for key, field in fields.items():
        if is_number(field.annotation) and bool not in get_args(field.annotation):
            limits = {name for limit in field.metadata for name in vars_of(limit)}
            assert limits & {"gt", "ge"}, key
            assert limits & {"lt", "le"}, key


def vars_of(limit) -> list[str]:
    return [name for name in ("gt", "ge", "lt", "le") if getattr(limit, name, None) is not None]


def test_hostile_settings(place, tally):
    """Each key of a recipe with values that no number is, and with others of any kind."""
    counts = tally("Recipes")
    drawn = random.Random(15)
    deep = "[" * 400 + "]" * 400
    wrong = (".nan", ".inf", "-.inf", "-1000000000", "1e300", "1" + "0" * 30, "[1]", "{}", "²")
    odd = ('"\\0"', '"\\ud800"', "[]", "{a: 1}", deep, "2001-99-99", "0b_", "&a [*a]", '""', "!!x")
    for key, field in recipe_keys().items():
        number = is_number(field.annotation)
        for value in drawn.sample(wrong, 5) if number else ():
            name = key if "bf16" not in key else "train"
            outcome(counts, ["train", place / "recipe.yaml", f"{key}={value}"], [name])
        for value in drawn.sample(odd, 4):
            outcome(counts, ["train", place / "recipe.yaml", f"{key}={value}"])


def test_settings_that_were_accepted_or_broke(place, backbone_path, tally):
    counts = tally("Recipes")
    for setting in (
        "train.output=.",
        "train.output=..",
        "train.output=/",
        "train.output=s3://x/y",
        "train.report_to=[nope]",
        "model.num_tokens=100000000",
        "train.workers=100000",
        "data.source=[{path: x, split: /etc}]",
        "train.seed=-1",
    ):
        key = setting.partition("=")[0]
        outcome(counts, ["train", place / "recipe.yaml", setting], [key])
    wide = [f"model.backbone={backbone_path}", "loss.matryoshka=[99999]"]
    outcome(counts, ["train", place / "recipe.yaml", *wide], ["loss.matryoshka"])
    large = ["train.steps=100000000", "train.batch_size=1000000"]
    outcome(counts, ["train", place / "recipe.yaml", *large], ["train.steps"])
    assert not (place / "trained").exists()


def test_hostile_recipe_files(place, tmp_path, tally):
    bomb = "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 12))
    contents = [
        b"\xff\xfe\x00train",
        bytes(range(256)),
        b"\xef\xbb\xbf{",
        b"train: {steps: \xff}",
        DEEP.encode(),
        ("{a: " * 3000 + "1" + "}" * 3000).encode(),
        b"train: {steps: 2001-99-99}",
        b"train: {steps: 0b_}",
        b"train: {steps: " + b"9" * 5000 + b"}",
        b"train: {steps: 0x" + b"f" * 9000 + b"}",
        b"a: &a {<<: *a}",
        b"? [a, b]\n: c",
        b"1: 2",
        b"null: {}",
        b"train: &t [*t]",
        b"!!python/object/apply:os.system [id]",
        b"!!timestamp x",
        b"!!int ''",
        b"!!float .",
        b"x0: &x0 [1]\n" + bomb.encode(),
        b"a\x00b: 1",
        b'"k\\x1b[31m\\n": 1',
        b"k" * 5000 + b": 1",
        b"model: {lora: [1]}",
        b"train: {output: 5}",
        b"loss: {matryoshka: [" + b"x, " * 5000 + b"]}",
        b"# " + b"x" * 2_000_000,
        b"train: [",
        b"- 1",
        b"5",
    ]
    for number, content in enumerate(contents):
        path = tmp_path / f"recipe-{number}.yaml"
        path.write_bytes(content)
        outcome(tally("Recipes"), ["train", path, "model.backbone=/nowhere"], [path.name])


# ---- models -------------------------------------------------------------------------------------


def damaged_models(saved_model, folder):
    """Copies of a model, each with damage; yields what the damage is, and the directory."""
    files = sorted(path for path in saved_model.rglob("*") if path.is_file())
    files = [path for path in files if path.suffix != ".md"]
    weights = [path for path in files if path.suffix == ".safetensors"]

    def pickled(path):
        import torch

        path.unlink()
        torch.save({"weight": Path}, path.with_name("pytorch_model.bin"))

    def text(content):
        return lambda path: path.write_text(content)

    def cut(path):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def folder_of_that_name(path):
        path.unlink()
        path.mkdir()

    def not_finite(value):
        def damage(path):
            arrays = load_file(path)
            name = sorted(arrays)[0]
            arrays[name] = np.full_like(arrays[name], value)
            save_file(arrays, path, metadata={"format": "pt"})

        return damage

    def other_shapes(path):
        save_file({k: v[:-1] for k, v in load_file(path).items()}, path, metadata={"format": "pt"})

    def setting(name, value):
        def damage(path):
            content = json.loads(path.read_text())
            for part in (content, content.get("text_config"), content.get("vision_config")):
                if isinstance(part, dict) and name in part:
                    part[name] = value
            path.write_text(json.dumps(content))

        return damage

    damages = [
        (path, name, damage)
        for path in files
        for name, damage in (
            ("missing", Path.unlink),
            ("[]", text("[]")),
            ("null", text("null")),
            ("deep", text(DEEP)),
            ("binary", lambda path: path.write_bytes(bytes(range(256)))),
            ("cut", cut),
            ("empty", text("")),
            ("folder", folder_of_that_name),
            ("text", text('{"model_type": 7, "a": {}}')),
        )
    ]
    chosen = random.Random(15).sample(damages, 24)
    chosen += [
        (path, name, damage)
        for path in weights
        for name, damage in (
            ("NaN", not_finite(np.nan)),
            ("infinite", not_finite(np.inf)),
            ("pickled", pickled),
            ("shapes", other_shapes),
            ("cut", cut),
        )
    ]
    config, fusion = saved_model / "config.json", saved_model / "1_MultiTokenFusion/config.json"
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        chosen += [(config, f"{name}={value}", setting(name, value)) for value in (10**9, -1)]
    for value in (10**8, -1, "x", 2):
        chosen.append((fusion, f"num_tokens={value}", setting("num_tokens", value)))
    chosen.append((saved_model / "tokenizer_config.json", "[]", text("[]")))
    for number, (path, name, damage) in enumerate(chosen):
        copy = folder / f"model-{number}"
        shutil.copytree(saved_model, copy)
        damage(copy / path.relative_to(saved_model))
        yield f"{path.name}: {name}", copy


def test_damaged_models(saved_model, place, tmp_path, tally):
    """A damaged model is refused, or it did not need the file; it never gives other results."""
    counts = tally("Model directories")
    query = ["search", place / "idx", "--text", "b 1", "--json", "--model"]
    for damage, model in damaged_models(saved_model, tmp_path):
        error = outcome(counts, [*query, model])
        if ".safetensors: " in damage:
            assert error, damage
        shutil.rmtree(model)


def test_damaged_configs_are_not_estimated(place, backbone_path, tmp_path, tally):
    """``--estimate`` reads nothing but the config."""
    original = json.loads((backbone_path / "config.json").read_text())
    contents = ["[]", "null", DEEP, "", "{}", '{"model_type": "bert"}', '{"model_type": 7}']
    for part in ("text_config", "vision_config"):
        for value in (None, 5, [], {}):
            contents.append(json.dumps(original | {part: value}))
        for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
            for value in (10**9, 0, -1, "x"):
                contents.append(json.dumps(original | {part: original[part] | {name: value}}))
    counts = tally("Model directories")
    for content in contents:
        (tmp_path / "config.json").write_text(content)
        options = ["--estimate", f"model.backbone={tmp_path}"]
        outcome(counts, ["train", place / "recipe.yaml", *options])


# ---- data ---------------------------------------------------------------------------------------

CELLS = (
    None,
    5,
    True,
    ["a", 5],
    [["a"]],
    {"text": 5},
    {"image": {}},
    {"x": 1},
    "",
    " ",
    "\ud800",
    "a\0b",
    "x" * 300 + ".png",
    "a\0.png",
    {"image": "/dev/null.png"},
)
LINES = (
    b"{",
    b"[]",
    b"null",
    b"5",
    b"\xff",
    b'{"query": ' + DEEP.encode() + b"}",
    b"9" * 5000,
    b"NaN",
    b"\0" * 100,
)


def evaluate(counts, place, source, *options, names=()):
    return outcome(
        counts, ["evaluate", place / "empty-model", "--benchmark", source, *options], names
    )


def test_hostile_rows(place, tmp_path, tally):
    counts = tally("Evaluation data")
    valid = {"query": "a", "positives": ["b"], "candidates": ["c"]}
    rows = [
        json.dumps(valid | {column: value}).encode()
        for column in valid
        for cell in CELLS
        for value in (cell, [cell])
    ]
    for number, row in enumerate([*rows, *LINES, b""]):
        path = tmp_path / f"rows-{number}.jsonl"
        path.write_bytes(row)
        evaluate(counts, place, path)
    beir = {"_id": "1", "title": "t", "text": "x", "image": []}
    judgements = [b"1\t1\tnan", b"1\t1", b"1\t2\t1", b"\xff\t1\t1", b"\0", b'"' + b"x" * 200_000]
    lines = [json.dumps(beir | {c: v}).encode() for c in beir for v in CELLS]
    cases = [("corpus.jsonl", row) for row in [*lines, *LINES]]
    cases += [("queries.jsonl", row) for row in [*lines, *LINES]]
    cases += [("qrels/test.tsv", row) for row in judgements]
    for number, (file, content) in enumerate(cases):
        folder = tmp_path / f"beir-{number}"
        (folder / "qrels").mkdir(parents=True)
        for name in ("corpus.jsonl", "queries.jsonl"):
            (folder / name).write_text(json.dumps(beir))
        (folder / "qrels/test.tsv").write_text("1\t1\t1")
        (folder / file).write_bytes(content)
        evaluate(counts, place, folder)
    for number, content in enumerate(
        (
            b"\xff",
            DEEP.encode(),
            b"tasks: [{name: a/b, data: x}]",
            b"tasks: 5",
            b"\0",
            b"a: &a {<<: *a}",
        )
    ):
        path = tmp_path / f"tasks-{number}.yaml"
        path.write_bytes(content)
        evaluate(counts, place, path, names=[path.name])


def test_hostile_published_files(place, tmp_path, tally):
    """Files in the layouts of MMEB and of the zero-shot sets, with cells of other types."""
    counts = tally("Evaluation data")
    valid = {"qry_text": "a", "qry_img_path": "", "tgt_text": ["b"], "tgt_img_path": [""]}
    cells = (5, 1.5, b"\xff", ["a", "b"], [5], [[]], {"a": 1}, "a\0", "x" * 300, [], None)
    cases = [(column, cell) for column in valid for cell in cells]
    for number, (column, cell) in enumerate(cases):
        file = tmp_path / f"mmeb-{number}" / "Picto-Count" / "test-0.parquet"
        file.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist([valid | {column: cell}]), file)
        options = ["--data", file.parents[1], "--tasks", "Picto-Count"]
        evaluate(counts, place, "picto", *options)
    file.write_bytes(b"PAR1" + b"\xff" * 100)
    evaluate(counts, place, "picto", *options, names=["parquet"])
    sugar = {"filename": "1.png", "caption": "a", "negative_caption": "b"}
    contents = [
        json.dumps({"0": sugar | {c: cell}}) for c in sugar for cell in (5, None, [1], "\0")
    ]
    contents += [DEEP, "{", "[]", '{"0": 5}', '{"0": null}', "9" * 5000]
    for number, content in enumerate(contents):
        folder = tmp_path / f"sugar-{number}"
        save_picture(folder / "1.png", 1)
        (folder / "add_obj.json").write_text(content)
        options = ["--data", folder, "--tasks", "SugarCrepe add-obj"]
        evaluate(counts, place, "zeroshot", *options)
    for number, content in enumerate((*contents, '{"images": [5]}', '{"images": 5}')):
        folder = tmp_path / f"flickr-{number}"
        folder.mkdir()
        (folder / "dataset_flickr30k.json").write_text(content)
        options = ["--data", folder, "--tasks", "Flickr30K i2t"]
        evaluate(counts, place, "zeroshot", *options)
