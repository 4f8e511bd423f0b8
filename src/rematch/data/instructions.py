"""Instructions before queries that come without any: in a search, and in custom evaluation data.

A model is trained with an instruction before each query, such as "Find me an everyday image that
matches the given caption: ". So one is put before a query, chosen from a table by what is asked
with (text, a picture, or both) and by what most documents are.

The table is :data:`rematch.prompts.QUERY_INSTRUCTIONS`, in which the model's ``prompts``
(``config_sentence_transformers.json``) and then the corpus (``rematch index --instructions``)
replace entries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rematch.data.images import EXTENSIONS
from rematch.data.schema import RetrievalTask
from rematch.errors import DataError
from rematch.files import read_json
from rematch.prompts import QUERY_INSTRUCTIONS

DocumentKind = Literal["image", "page", "video", "text"]


def choose(table: Mapping[str, str], query: Any, kind: DocumentKind) -> str:
    """The instruction for a query to documents of a kind.

    >>> choose(QUERY_INSTRUCTIONS, {"image": "dog.jpg"}, "text")
    'Find an image caption describing the given everyday image.'
    """
    return table[f"{query_kind(query)}-{kind}"]


def instruction_table(
    model_prompts: Mapping[str, str], corpus_table: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The query instructions of an index.

    Args:
        model_prompts: The ``prompts`` of the model; names that are not in the table are ignored.
        corpus_table: Instructions that replace the model's.

    >>> instruction_table({"query": "", "text-image": "Find a scene: "})["text-image"]
    'Find a scene: '
    """
    prompts = {name: text for name, text in model_prompts.items() if name in QUERY_INSTRUCTIONS}
    return QUERY_INSTRUCTIONS | prompts | dict(corpus_table or {})


def instruct(task: RetrievalTask, table: Mapping[str, str]) -> None:
    """Give the queries of a task their instructions, if the data came without."""
    if not task.chooses_instructions:
        return
    with_picture = sum(document.image is not None for document in task.documents)
    kind: DocumentKind = "image" if 2 * with_picture > len(task.documents) else "text"
    for number, query in enumerate(task.queries):
        text = with_instruction(query.as_input(), choose(table, query.as_input(), kind))["text"]
        task.queries[number] = replace(query, instruction=text.removesuffix(query.text))


def read_table(path: Path) -> dict[str, str]:
    """Read the instructions of a corpus from a JSON file.

    Raises:
        DataError: If the file is not an object of instructions by known names.
    """
    names = ", ".join(QUERY_INSTRUCTIONS)
    table = read_json(path)
    if not isinstance(table, dict):
        raise DataError(
            f"{path}: holds a {type(table).__name__}. Write an object with instructions by name: "
            f"{names}."
        )
    for name, text in table.items():
        if name not in QUERY_INSTRUCTIONS:
            raise DataError(f"{path}: {name!r} is not the name of an instruction. Use {names}.")
        if not isinstance(text, str):
            raise DataError(f"{path}: {name} = {text!r} is not text. Write the instruction.")
    return table


def query_kind(query: Any) -> str:
    """What is asked with: ``text``, ``image`` or ``text+image``.

    >>> query_kind("a dog"), query_kind("dog.jpg"), query_kind({"text": "red", "image": "dog.jpg"})
    ('text', 'image', 'text+image')
    """
    text, image = _parts(query)
    if image is None:
        return "text"
    return "text+image" if text else "image"


def query_text(query: Any) -> str:
    """The text of a query, empty if it has none.

    >>> query_text("a dog"), query_text("dog.jpg"), query_text({"text": "red", "image": "dog.jpg"})
    ('a dog', '', 'red')
    """
    return _parts(query)[0]


def with_instruction(query: Any, instruction: str) -> Any:
    """The query with an instruction before its text.

    >>> with_instruction("a dog", "Find a picture of:")
    {'text': 'Find a picture of: a dog'}
    >>> with_instruction("dog.jpg", "Find such pictures. ")
    {'text': 'Find such pictures.', 'image': 'dog.jpg'}
    >>> with_instruction("a dog", "")
    'a dog'
    """
    text, image = _parts(query)
    if not instruction.strip() or (image is None and not text.strip()):
        return query
    separator = " " if text and not instruction[-1].isspace() else ""
    with_text = {"text": f"{instruction}{separator}{text}" if text else instruction.rstrip()}
    return with_text if image is None else with_text | {"image": image}


def _parts(query: Any) -> tuple[str, Any]:
    """Text and pictures of a query; ``None`` without pictures."""
    if isinstance(query, Mapping):
        image = query.get("image")
        without = isinstance(image, Sequence) and not isinstance(image, str) and not len(image)
        return query.get("text") or "", None if without else image
    if isinstance(query, str) and not query.lower().endswith(EXTENSIONS):
        return query, None
    return "", query
