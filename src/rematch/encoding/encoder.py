"""Encode many inputs with any SentenceTransformer, as its ``encode`` would, and faster.

1. Each distinct input is encoded once; inputs are told apart by their text and the bytes of their
   pictures.
2. Batches hold inputs of like length within a budget of tokens, pictures counted as what they
   become.
3. Worker processes decode and tokenize the next batches while the accelerator computes. On a CPU
   there is nothing to wait for: each worker prepares and computes batches of its own, with one
   thread.
4. Vectors go to disk batch by batch (:mod:`rematch.encoding.vector_store`), so that an interrupted
   run goes on where it was.
5. Under ``torchrun`` the processes share the batches.

Batches follow from the inputs alone, not from what is known already, from workers or processes: a
run that was cut or shared gives the same vectors (to the last bit, where it computes with as many
threads).
"""

import io
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from sentence_transformers.util.distributed import get_rank, get_world_size
from torch import Tensor
from torch.nn.functional import normalize, pad
from torch.utils.data import DataLoader, Dataset
from xxhash import xxh3_128

from rematch.backbone.memory import default_batch_tokens, is_out_of_memory
from rematch.console import say
from rematch.data.images import (
    EXTENSIONS,
    CheckedPicture,
    EncodedPicture,
    ZippedPicture,
    load_image,
)
from rematch.data.inputs import pictures_and_text
from rematch.encoding.vector_store import VectorStore
from rematch.errors import ImageError, RematchError
from rematch.model import ReMatch

_MOST = 256  # inputs in a batch, however short


@dataclass(frozen=True)
class Measured:
    """What is known of an input before it is encoded: who it is, and how long."""

    key: bytes
    tokens: int
    is_text: bool = False


class Encoder:
    """Encodes lists of inputs.

    Args:
        model: Any SentenceTransformer that takes the inputs' modalities.
        store: Where vectors are kept; ``None`` keeps nothing.
        batch_tokens: Tokens of a forward pass, padding included; by default 2,048 on a CPU, 16,384
            elsewhere.
        workers: Processes that prepare batches; by default as many as there are cores, at most
            eight; 0 for none.
        progress: Told (done, of how many) distinct inputs.
        warn: Told what the user should know.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        store: VectorStore | None = None,
        *,
        batch_tokens: int | None = None,
        workers: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        warn: Callable[[str], None] = say,
    ) -> None:
        self.model = model.eval()
        self.store = store
        self.batch_tokens = batch_tokens or default_batch_tokens(model.device)
        self.workers = min(8, os.cpu_count() or 1) if workers is None else workers
        self.progress, self.warn = progress, warn
        self.encoded = self.found = 0
        self._picture_tokens: dict[int, int] = {}
        self._texts: dict[
            bytes, NDArray[np.float32]
        ] = {}  # labels and answers, which many tasks share

    def encode(
        self, inputs: Sequence[Any], task: str, *, multi_vector: bool = False
    ) -> NDArray[np.float32]:
        """Vectors of queries or documents.

        Args:
            inputs: N inputs, as for ``encode``.
            task: ``"query"`` or ``"document"``.
            multi_vector: The K token vectors besides; ReMatch models only.

        Returns:
            (N, D), or as many dimensions as the model's ``truncate_dim`` keeps, as ``encode``
            gives them; with ``multi_vector`` (N, 1 + K, D), the embedding, zero where it is
            truncated, and then its token vectors.

        Raises:
            RematchError: If an input cannot be read, or one alone does not fit into memory.
        """
        if multi_vector and not isinstance(self.model, ReMatch):
            raise RematchError(
                "token vectors (MaxSim) are there in ReMatch models only. Leave them out."
            )
        if not inputs:
            return self._nothing(multi_vector)
        measured = [whole(one) for one in self.measure(inputs, task, multi_vector=multi_vector)]
        first = {m.key: i for i, m in reversed(list(enumerate(measured)))}
        vectors = {key: self._texts[key] for key in first if key in self._texts}
        if self.store is not None:
            vectors |= self.store.get([key for key in first if key not in vectors])
        self.found += len(vectors)
        if get_world_size() > 1:
            # what another process adds from here on must not change what this one leaves out
            dist.barrier()
        batches = plan([measured[i] for i in first.values()], self.batch_tokens)
        todo = [
            left for batch in batches if (left := [m.key for m in batch if m.key not in vectors])
        ]
        total = sum(map(len, todo))
        self.encoded += total
        mine = todo[get_rank() :: get_world_size()]
        done = 0
        workers = min(
            self.workers, len(mine) // 8
        )  # fewer batches are done before processes have started
        batches_of_mine = ((keys, [inputs[first[k]] for k in keys]) for keys in mine)
        for keys, batch, errors in self.stream(
            batches_of_mine, task, multi_vector=multi_vector, workers=workers
        ):
            if errors:
                raise next(iter(errors.values()))
            new = dict(zip(keys, batch, strict=True))
            if self.store is not None:
                self.store.put(new)
            vectors |= new
            done += len(keys) * get_world_size()
            if self.progress:
                self.progress(min(done, total), total)
        if get_world_size() > 1:
            shared: list[Any] = [None] * get_world_size()
            dist.all_gather_object(shared, {k: vectors[k] for b in mine for k in b})
            vectors |= {k: v for part in shared for k, v in part.items()}
        self._texts |= {m.key: vectors[m.key] for m in measured if m.is_text}
        return np.stack([vectors[m.key] for m in measured])

    # ---- before ---------------------------------------------------------------------------------

    def measure(
        self, inputs: Sequence[Any], task: str, *, multi_vector: bool = False
    ) -> list[Measured | RematchError]:
        """Each input's identity and length, or what is wrong with it, without decoding a picture."""
        task += "+" if multi_vector else ""
        objects = list({id(value): value for value in inputs}.values())
        with ThreadPoolExecutor(8) as threads:
            looked = list(threads.map(_try_to_look, objects))
        texts = ["" if isinstance(one, RematchError) else one[0] for one in looked]
        tokenizer = getattr(self.model[0], "tokenizer", None) or self.model.tokenizer
        lengths = (
            [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
            if texts
            else []
        )
        known: dict[int, Measured | RematchError] = {}
        for value, one, length in zip(objects, looked, lengths, strict=True):
            if isinstance(one, RematchError):
                known[id(value)] = one
                continue
            text, digests, areas = one
            parts = [task.encode(), text.encode(), *digests]
            key = xxh3_128(
                b"".join(len(part).to_bytes(8, "little") + part for part in parts)
            ).digest()
            known[id(value)] = Measured(
                key, length + sum(map(self._tokens_of_picture, areas)), not areas
            )
        return [known[id(value)] for value in inputs]

    def _tokens_of_picture(self, area: int) -> int:
        """How many tokens a picture of about so many pixels becomes, found out with a blank one."""
        step = round(4 * math.log2(area))
        if step not in self._picture_tokens:
            edge = max(28, round(2 ** (step / 8)))
            features = self._prepare([{"image": Image.new("RGB", (edge, edge))}], "document")
            self._picture_tokens[step] = (
                int(features["attention_mask"].sum()) if "attention_mask" in features else 1
            )
        return self._picture_tokens[step]

    # ---- the model ------------------------------------------------------------------------------

    def stream(
        self,
        batches: Iterable[tuple[Any, list[Any]]],
        task: str,
        *,
        multi_vector: bool = False,
        workers: int,
    ) -> Iterator[tuple[Any, NDArray[np.float32], dict[int, RematchError]]]:
        """Encode batches as they come, some of them ahead.

        Args:
            batches: (whatever names it, its inputs); taken from one by one.
            task: ``"query"`` or ``"document"``.
            multi_vector: The K token vectors besides.
            workers: Processes.

        Returns:
            For each batch in turn its name, (b, D) or (b, 1 + K, D) vectors of those inputs that
            could be read, and by its place in the batch what is wrong with each other one.
        """
        waiting: deque[tuple[Any, list[Any]]] = deque()

        def inputs() -> Iterator[list[Any]]:
            for name, batch in batches:
                waiting.append((name, batch))
                yield batch

        on_cpu = self.model.device.type == "cpu"
        loader = DataLoader(
            _Work(self, task, on_cpu),
            batch_size=None,
            sampler=inputs(),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            multiprocessing_context="fork" if workers else None,
        )
        with warnings.catch_warnings():  # an index may be open; these processes never use it
            warnings.filterwarnings("ignore", message="lance(db fork support| is not fork-safe)")
            done = iter(loader)
        for made, errors in done:
            name, batch = waiting.popleft()
            kept = [value for i, value in enumerate(batch) if i not in errors]
            if not kept:
                yield name, self._nothing(multi_vector), errors
                continue
            vectors = (made if on_cpu else self._forward(kept, made, task)).numpy()
            yield (
                name,
                vectors if multi_vector else vectors[:, 0, : self.model.truncate_dim],
                errors,
            )

    def _nothing(self, multi_vector: bool) -> NDArray[np.float32]:
        """The vectors of no inputs."""
        width = self.model.get_embedding_dimension() or 0  # a module need not know its width
        if not multi_vector:
            return np.zeros((0, width), np.float32)
        return np.zeros(
            (0, 1 + max(1, self.model.fusion.num_tokens), self.model.backbone.width), np.float32
        )

    def _vectors(self, batch: list[Any], task: str) -> Tensor:
        return self._forward(batch, self._prepare(batch, task), task)

    def _prepare(self, batch: list[Any], task: str) -> dict[str, Any]:
        """What ``SentenceTransformer.encode`` hands to the model."""
        inputs = (
            batch
            if isinstance(self.model, ReMatch)
            else [_plain(value, i) for i, value in enumerate(batch)]
        )
        names = ("query",) if task == "query" else ("document", "passage", "corpus")
        name = next((n for n in names if n in self.model.prompts), self.model.default_prompt_name)
        try:
            return dict(
                self.model.preprocess(inputs, prompt=self.model.prompts.get(name), task=task)
            )
        except RematchError:
            raise
        except (ValueError, TypeError) as error:
            raise RematchError(
                f"{type(self.model[0]).__name__} cannot take {_kind(inputs)} "
                f"({str(error).splitlines()[0]}). Use a model for these inputs, or --tasks "
                "without them."
            ) from error

    @torch.inference_mode()
    def _forward(self, batch: list[Any], features: dict[str, Any], task: str) -> Tensor:
        try:
            out = self.model(batch_to_device(features, self.model.device), task=task)
            fused: Tensor = out["sentence_embedding"][..., : self.model.truncate_dim].float()[
                :, None
            ]  # as encode does
            if "multi_vector" in out:
                tokens = normalize(out["multi_vector"].float(), dim=-1)
                fused = torch.cat([pad(fused, (0, tokens.shape[-1] - fused.shape[-1])), tokens], 1)
            return fused.cpu()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if len(batch) == 1:
            raise RematchError(
                "out of memory with a single input. Shorten it, use smaller pictures, or a "
                "machine with more memory."
            )
        half = len(batch) // 2
        self.warn(f"out of memory with {len(batch)} inputs; going on with {half} at a time")
        parts = (batch[:half], batch[half:])
        return torch.cat([self._vectors(part, task) for part in parts])


def plan(inputs: Sequence[Measured], tokens: int) -> list[list[Measured]]:
    """Batches of inputs of like length, longest first, none with more tokens after padding than
    ``tokens``, unless it is a single input.

    >>> [len(batch) for batch in plan([Measured(b"", n) for n in (1, 8, 4, 4, 3)], 8)]
    [1, 2, 2]
    """
    batches: list[list[Measured]] = []
    for one in sorted(inputs, key=lambda m: (-m.tokens, m.key)):
        room = (
            batches
            and (len(batches[-1]) + 1) * batches[-1][0].tokens <= tokens
            and len(batches[-1]) < _MOST
        )
        batches[-1].append(one) if room else batches.append([one])
    return batches


class _Work(Dataset[Any]):
    """What a worker does with a batch: (vectors or features of what can be read, errors of the
    rest).
    """

    def __init__(self, encoder: Encoder, task: str, on_cpu: bool) -> None:
        self.encoder, self.task = encoder, task
        self.work = encoder._vectors if on_cpu else encoder._prepare

    def __getitem__(self, batch: list[Any]) -> tuple[Any, dict[int, RematchError]]:
        try:
            return self.work(batch, self.task), {}
        except RematchError as error:
            errors = {
                i: broken for i, value in enumerate(batch) if (broken := self._broken(value))
            }
            if not errors:
                raise error
        kept = [value for i, value in enumerate(batch) if i not in errors]
        return self.work(kept, self.task) if kept else None, errors

    def _broken(self, value: Any) -> RematchError | None:
        try:
            self.encoder._prepare([value], self.task)
        except RematchError as error:
            return error
        return None


def whole(one: Measured | RematchError) -> Measured:
    """What :meth:`Encoder.measure` found, or its error raised."""
    if isinstance(one, RematchError):
        raise one
    return one


def _try_to_look(value: Any) -> tuple[str, list[bytes], list[int]] | RematchError:
    try:
        return _look_at(value)
    except RematchError as error:
        return error


def _look_at(value: Any) -> tuple[str, list[bytes], list[int]]:
    """(text, a digest of each picture, its pixels) without decoding a file."""
    if isinstance(value, dict):
        text, pictures = value.get("text") or "", value.get("image")
    elif isinstance(value, str) and not value.lower().endswith(EXTENSIONS):
        text, pictures = value, None
    else:
        text, pictures = "", value
    pictures = (
        [] if pictures is None else pictures if isinstance(pictures, list | tuple) else [pictures]
    )
    found = [look_at_picture(picture) for picture in pictures]
    return text, [digest for digest, _ in found], [area for _, area in found]


def look_at_picture(source: Any) -> tuple[bytes, int]:
    """(digest, pixels) of a picture; a file is not decoded.

    Raises:
        ImageError: If it cannot be read.
    """
    if isinstance(source, CheckedPicture):
        return source.digest, source.pixels
    if isinstance(source, Image.Image):
        head = f"{source.mode}{source.size}".encode()
        return xxh3_128(head + source.tobytes()).digest(), source.width * source.height
    source = source if isinstance(source, ZippedPicture | EncodedPicture) else Path(source)
    try:
        content = source.read_bytes()
        width, height = Image.open(io.BytesIO(content)).size
    except ImageError:
        raise
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        load_image(source)  # says what is wrong with it
        raise
    return xxh3_128(content).digest(), width * height


def _plain(value: Any, row: int) -> Any:
    """An input as any SentenceTransformer takes it: text, a decoded picture, or a dictionary of
    both.
    """
    pictures, text = pictures_and_text(value, row)
    if not pictures:
        return text
    picture = pictures[0] if len(pictures) == 1 else pictures
    return {"text": text, "image": picture} if text else picture


def _kind(inputs: Sequence[Any]) -> str:
    kinds = {
        "text": any(isinstance(x, str) for x in inputs),
        "pictures": any(not isinstance(x, str) for x in inputs),
    }
    return " and ".join(kind for kind, there in kinds.items() if there)
