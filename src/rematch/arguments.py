"""What every argument of the command line must be, whichever command it belongs to."""

import math
from inspect import unwrap
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand

from rematch.errors import shortened

_LONGEST_PATH, _LONGEST_NAME = 4095, 255  # bytes, on Linux
_MAY_BE_EMPTY = frozenset({"instruction"})  # to leave out what is there by default
# texts that may name a file or folder of this machine, or something elsewhere
_PLACES = frozenset({"model", "corpus", "output", "benchmark", "index", "target"})


class Command(TyperCommand):
    """A command that checks its arguments as they were typed, before they are converted."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        typed, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        kinds = get_type_hints(unwrap(self.callback)) if self.callback else {}
        parameters: list[Any] = self.params
        for parameter in parameters:
            values = typed.get(parameter.name)
            for value in values if isinstance(values, list | tuple) else [values]:
                complaint = ""
                if isinstance(value, str):
                    kind = kinds.get(parameter.name, str)
                    may_be_empty = parameter.default == "" or parameter.name in _MAY_BE_EMPTY
                    complaint = _complaint(parameter.name, kind, may_be_empty, value)
                if complaint:
                    raise typer.BadParameter(complaint, ctx=ctx, param=parameter)
        try:
            remaining: list[str] = super().parse_args(ctx, args)
        except typer.BadParameter as error:
            value = typed.get(error.param.name) if error.param else None
            if isinstance(value, str):
                error.message = f"{shortened(value)}: {error.message}"
            raise
        return remaining


def _complaint(name: str, kind: Any, may_be_empty: bool, value: str) -> str:
    """What is wrong with an argument and what to do, or an empty string."""
    if not (value or may_be_empty):
        return "is empty. Give a value, or leave the option out."
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"{shortened(value)} is not UTF-8. Convert the text, or rename the file."
    if "\0" in value:
        return f"{shortened(value)} holds a null character. Remove it."
    kinds = get_args(kind) or (kind,)  # of X | None
    if float in kinds:
        return _number_complaint(value)
    if Path in kinds:
        return _url_complaint(value) or _path_complaint(value)
    return _path_complaint(value) if name in _PLACES else ""


def _number_complaint(value: str) -> str:
    try:
        finite = math.isfinite(float(value))
    except ValueError:
        return ""  # the conversion explains it
    return "" if finite else f"{value} is not a finite number. Give one within the limits."


def _url_complaint(value: str) -> str:
    if "://" not in value:
        return ""
    return f"{shortened(value)} is a URL. Give a file or folder of this machine."


def _path_complaint(value: str) -> str:
    longest = max(len(part.encode()) for part in value.split("/"))
    if longest > _LONGEST_NAME or len(value.encode()) > _LONGEST_PATH:
        return f"{value[:40]!r}… is too long for the name of a file. Shorten it."
    path = Path(value)
    try:
        is_special = path.exists() and not (path.is_file() or path.is_dir())
    except OSError as error:  # no permission to look
        return f"{shortened(value)} cannot be read ({error.strerror}). Check its permissions."
    if is_special:
        return f"{shortened(value)} is a device or a pipe. Give a file or a folder."
    return ""
