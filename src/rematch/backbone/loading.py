"""Loading the weights of a backbone: a whole checkpoint, or an adapter on its base."""

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from sentence_transformers.util import load_file_path
from torch import OutOfMemoryError
from transformers import AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from rematch.backbone import lora
from rematch.backbone.fingerprint import base_fingerprint
from rematch.errors import ModelError, RematchError, first_line, shortened
from rematch.files import read_json

PACKAGED = {"rematch-base": "assets/base", "rematch-tiny": "assets/tiny"}
_FUSION = "rematch.tokens.MultiTokenFusion"
_ADAPTER_FILE = "adapter_model.safetensors"
_LARGEST_VOCABULARY = 10_000_000


@contextmanager
def loading(name: str, remedy: str) -> Iterator[None]:
    """Turn whatever libraries raise over the files of a model into a ModelError of one line.

    Args:
        name: Name of the model, for the error.
        remedy: What to do, for the error.
    """
    try:
        yield
    except (RematchError, MemoryError, OutOfMemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers are written in Rust and panic with a BaseException
        raise ModelError(f"{name}: cannot be loaded ({first_line(error)}). {remedy}") from error


def resolve(name: str) -> str:
    """Return the directory of a packaged or local model; a hub name is returned unchanged.

    Raises:
        ModelError: If the name is almost that of a packaged model, or cannot be one.
    """
    if name in PACKAGED:
        return str(files("rematch") / PACKAGED[name])
    try:
        if Path(name).is_dir():
            return str(Path(name).resolve())
    except (OSError, ValueError) as error:  # too long, or with a null character
        raise ModelError(
            f"{shortened(name)}: not a model ({first_line(error)}). Give a directory or a hub "
            "name."
        ) from None
    if "://" in name:
        raise ModelError(f"{name}: models are not loaded from URLs. Give a directory or hub name.")
    if "/" not in name and (similar := get_close_matches(name, PACKAGED, 1, cutoff=0.85)):
        raise ModelError(f"{name}: no such model. Did you mean {similar[0]}?")
    return name


def is_checkpoint(name: str) -> bool:
    """Whether this is a ReMatch model: neither its backbone nor another SentenceTransformer."""
    return _FUSION in module_types(name)


def module_types(name: str) -> list[str]:
    """Types of the modules of a SentenceTransformer; none if this is no SentenceTransformer."""
    remedy = "Copy it again, or check its name and your connection to the hub."
    with loading(f"{name}: its modules.json", remedy):
        path = load_file_path(resolve(name), "modules.json")
        modules = read_json(Path(path)) if path else []
        return [module["type"] for module in modules]


def packaged_name(path: str) -> str:
    """Return the name of the packaged model in a directory; any other path unchanged."""
    return next((name for name in PACKAGED if resolve(name) == path), path)


def adapter_directory(path: str, **hub: Any) -> str:
    """Return the directory of a saved adapter, downloading it from the hub if needed.

    Args:
        path: Directory or hub name.
        hub: Arguments of ``snapshot_download``, such as ``revision``.

    Raises:
        ModelError: If the adapter's weights are missing.
    """
    if not Path(path).is_dir():
        path = snapshot_download(path, **hub)
    if not (Path(path) / _ADAPTER_FILE).is_file():
        raise ModelError(
            f"{path}: this checkpoint is an adapter, but adapter_model.safetensors is not there; "
            "without it the model would answer as its untrained base. Copy the file back or save "
            "the model again."
        )
    return path


def base_of_adapter(directory: str) -> str:
    """Return the path or hub name of the base that a saved adapter belongs to."""
    settings = read_json(Path(directory) / "adapter_config.json")
    return resolve(str(settings["base_model_name_or_path"]))


def load_model(path: str, config: PreTrainedConfig, **kwargs: Any) -> tuple[PreTrainedModel, str]:
    """Load a whole model.

    Args:
        path: Directory or hub name.
        config: Configuration of the model.
        kwargs: Further arguments of ``from_pretrained``.

    Returns:
        The model with its LM head, and its fingerprint.

    Raises:
        ModelError: If weights are missing.
    """
    model, report = AutoModelForMultimodalLM.from_pretrained(
        path, config=config, output_loading_info=True, **kwargs
    )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{path}: {len(missing)} weights are missing ({', '.join(missing[:3])}, …); they "
            "would be random. The checkpoint is incomplete: download or save it again."
        )
    fingerprint = base_fingerprint(model, path, kwargs.get("cache_dir"))
    lora.prevent_repacking(model)
    return model, fingerprint


def load_model_with_adapter(
    directory: str, config: PreTrainedConfig, fingerprint: str | None, **kwargs: Any
) -> tuple[PreTrainedModel, str]:
    """Load an adapter on its base.

    Args:
        directory: Directory of the adapter.
        config: Configuration of the base.
        fingerprint: Fingerprint of the base the adapter was trained on; ``None`` skips the check.
        kwargs: Further arguments of ``from_pretrained``, for the base.

    Returns:
        The base with its LM head and the adapter, and the fingerprint of the base.

    Raises:
        ModelError: If the base is not the one that the adapter was trained on.
    """
    base = base_of_adapter(directory)
    kwargs.pop("revision", None)  # that of the adapter
    model, base_print = load_model(base, config, **kwargs)
    if fingerprint and fingerprint != base_print:
        raise ModelError(
            f"{directory}: this adapter was trained on another base than {base}, whose "
            f"fingerprint is {base_print}; that of the adapter's base was {fingerprint}. Point "
            "base_model_name_or_path in its adapter_config.json to the base it was trained on."
        )
    vocabulary = read_json(Path(directory) / "rematch.json")["vocabulary"]
    if not isinstance(vocabulary, int) or not 0 < vocabulary <= _LARGEST_VOCABULARY:
        raise ModelError(
            f"{directory}: rematch.json gives the size {shortened(vocabulary)} of the vocabulary. "
            "Copy the checkpoint again."
        )
    resize_vocabulary(model, vocabulary)
    with _without_warnings():  # the LM head's tied copy of the token rows is reported as missing
        mismatched = lora.load(model, Path(directory))
    if mismatched:
        raise ModelError(
            f"{directory}: its adapter does not fit the base {base} "
            f"({', '.join(mismatched[:3])}, …). Point base_model_name_or_path in "
            "adapter_config.json to the base it was trained on."
        )
    return model, base_print


def resize_vocabulary(model: PreTrainedModel, size: int) -> None:
    """Grow the input embedding to ``size`` rows.

    Many released models have spare rows; if there are enough of them, nothing changes.
    """
    if size > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(size, mean_resizing=False)


@contextmanager
def _without_warnings() -> Iterator[None]:
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
