"""Vectors on disk: one SQLite file per model, filled batch by batch, found again by the content of
what was encoded.

What a vector depends on is its key: the model (weights, configuration, chat template, tokenizer,
picture settings, prompts, libraries and this package's code) names the file; the input's text and
pictures name the row. SQLite commits a batch whole or not at all, whatever kills the process; each
row carries a checksum besides.
"""

import json
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedConfig, PreTrainedModel
from xxhash import xxh3_128

from rematch.errors import DataError

FINGERPRINT = "2:"  # how fingerprints of this kind begin; those before it knew no configuration
_BOOKKEEPING = frozenset(
    "_name_or_path architectures auto_map dtype torch_dtype transformers_version id2label "
    "label2id problem_type use_cache return_dict output_attentions output_hidden_states initializer_range initializer_factor".split()
)  # of a configuration: vectors do not depend on it
_MODULES = (  # turn inputs into vectors; an edit of another one leaves everybody's vectors valid
    "prompts tokens model backbone/module backbone/reading backbone/turns backbone/pictures "
    "backbone/key_values backbone/lora data/images data/inputs encoding/encoder"
).split()
_LIBRARIES = ("torch", "transformers", "sentence-transformers", "pillow")


def describe(model: SentenceTransformer) -> dict[str, Any]:
    """All that a model's vectors depend on to the last bit, as digests and settings."""
    return _settings(model) | {
        "weights": _weights(model),
        "modules": str(model),
        "truncate_dim": model.truncate_dim,
        "attention": {name: config._attn_implementation for name, config in _configs(model)},
        "device": model.device.type,
        "code": _code(),
        "libraries": {name: version(name) for name in _LIBRARIES},
    }


def fingerprint(model: SentenceTransformer) -> str:
    """Digest of what makes two vectors comparable: weights (rounded to bfloat16, so that it does
    not matter in which precision they were loaded), configuration, chat template, tokenizer,
    picture settings, prompts.
    """
    content = _settings(model) | {"weights": _weights(model, torch.bfloat16)}
    return FINGERPRINT + _digest(json.dumps(content, sort_keys=True, default=str))


def _settings(model: SentenceTransformer) -> dict[str, Any]:
    processor = getattr(model[0], "processor", None) or model.tokenizer
    tokenizer = getattr(processor, "tokenizer", processor)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {
        "template": _digest(str(getattr(processor, "chat_template", None))),
        "tokenizer": _digest(_vocabulary(backend) if backend is not None else repr(tokenizer)),
        "pictures": str(getattr(processor, "image_processor", None)),
        "max_seq_length": model.max_seq_length,
        "prompts": model.prompts,
        "configuration": {name: _configuration(config) for name, config in _configs(model)},
    }


def _configs(model: SentenceTransformer) -> Iterator[tuple[str, PreTrainedConfig]]:
    """(name, configuration) of each Transformers model, and of the parts that it is composed of."""

    def parts(name: str, config: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
        yield name, config
        for key, value in vars(config).items():
            if isinstance(value, PreTrainedConfig):
                yield from parts(f"{name}.{key}", value)

    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not name.startswith(inside):
            inside += (name + ".",)
            yield from parts(name, module.config)


def _configuration(config: PreTrainedConfig) -> dict[str, Any]:
    """What differs from the defaults, so that a setting that a later Transformers adds changes
    nothing.
    """
    values = config.to_dict()
    try:
        usual = type(config)().to_dict()
    except Exception:  # a few have settings without a default; of these all count
        usual = {}
    parts = {key for key, value in vars(config).items() if isinstance(value, PreTrainedConfig)}
    different = (
        {k for k, v in values.items() if k not in usual or usual[k] != v} - parts - _BOOKKEEPING
    )
    return {"model_type": config.model_type} | {key: values[key] for key in different}


def _weights(model: SentenceTransformer, dtype: torch.dtype | None = None) -> str:
    digest = xxh3_128()
    for name, value in sorted(model.state_dict().items()):
        value = value.to(dtype) if dtype and value.is_floating_point() else value
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _vocabulary(tokenizer: Any) -> str:
    """A fast tokenizer without the padding and truncation that its last call has left behind."""
    content = json.loads(tokenizer.to_str())
    return json.dumps(
        {k: v for k, v in content.items() if k not in ("padding", "truncation")}, sort_keys=True
    )


def _digest(text: str) -> str:
    return xxh3_128(text.encode()).hexdigest()


@cache
def _code() -> str:
    """Digest of those modules of this package that turn inputs into vectors."""
    digest = xxh3_128()
    root = Path(__file__).parents[1]
    for module in _MODULES:
        digest.update((root / f"{module}.py").read_bytes())
    return digest.hexdigest()


class VectorStore:
    """The vectors of one model in ``directory``.

    Args:
        directory: Created if need be; may hold the stores of other models.
        model: Whose vectors they are; another model, or the same with other settings, has another
            file.
        warn: Told what was found broken.

    Raises:
        DataError: If the directory cannot be written.
    """

    def __init__(
        self,
        directory: Path | str,
        model: SentenceTransformer,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        description = json.dumps(describe(model), indent=1, sort_keys=True, default=str)
        self.path = Path(directory) / f"{_digest(description)[:16]}.sqlite"
        self.warn = warn
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open(description)
        except (OSError, sqlite3.OperationalError) as error:
            raise DataError(
                f"{self.path}: cannot be written ({error}). Choose another --cache."
            ) from None
        except sqlite3.DatabaseError:
            self._start_afresh(description)

    def _open(self, description: str) -> None:
        self.database = sqlite3.connect(self.path, timeout=600, isolation_level=None)
        if self.database.execute("pragma quick_check(1)").fetchone() != ("ok",):
            raise sqlite3.DatabaseError
        self.database.execute("pragma journal_mode = wal")
        self.database.execute("create table if not exists model (description text)")
        self.database.execute(
            "create table if not exists vectors (key blob primary key, shape text, vector blob, "
            "crc integer)"
        )
        if self.database.execute("select count(*) from model").fetchone() == (0,):
            self.database.execute("insert into model values (?)", [description])

    def _start_afresh(self, description: str) -> None:
        self.database.close()
        torn = self.path.with_suffix(".torn")
        os.replace(self.path, torn)
        for rest in ("-wal", "-shm"):
            Path(f"{self.path}{rest}").unlink(missing_ok=True)
        self.warn(f"{self.path}: torn, put aside as {torn.name}; what it held is encoded again")
        self._open(description)

    def get(self, keys: Sequence[bytes]) -> dict[bytes, NDArray[np.float32]]:
        """Those of the keys' vectors that are there and whole."""
        found = {}
        for key in keys:
            row = self.database.execute(
                "select shape, vector, crc from vectors where key = ?", [key]
            ).fetchone()
            if row is None:
                continue
            shape, blob, crc = row
            if zlib.crc32(blob) == crc:
                found[key] = np.frombuffer(blob, np.float32).reshape(json.loads(shape))
            else:
                self.warn(f"{self.path}: a vector is damaged; it is encoded again")
        return found

    def put(self, vectors: dict[bytes, NDArray[np.float32]]) -> None:
        """Add the vectors of a batch, all of them or none."""
        rows = [
            (k, json.dumps(v.shape), b := v.tobytes(), zlib.crc32(b)) for k, v in vectors.items()
        ]
        self.database.execute("begin immediate")
        self.database.executemany("insert or replace into vectors values (?, ?, ?, ?)", rows)
        self.database.execute("commit")

    def __len__(self) -> int:
        return int(self.database.execute("select count(*) from vectors").fetchone()[0])
