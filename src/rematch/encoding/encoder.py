"""Encode many inputs with any SentenceTransformer: the vectors of its ``encode``, but faster.

1. Each distinct input is encoded once. Inputs are told apart by their content keys.
2. Batches hold inputs of similar length, within a budget of tokens. A picture counts as the tokens
   that it becomes.
3. Worker processes decode and tokenize the next batches while the accelerator computes. On a CPU
   there is nothing to wait for: each worker prepares and computes batches of its own, with one
   thread.
4. Vectors are stored batch by batch (:mod:`rematch.encoding.vector_store`), so that an interrupted
   run can be resumed.
5. Under ``torchrun`` the processes share the batches.

The inputs alone decide the batches, not the vectors that are stored already, nor the number of
workers or processes. So an interrupted or distributed run gives the same vectors, to the last bit
if it computes with the same number of threads.
"""

import io
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from sentence_transformers.util.distributed import get_rank, get_world_size
from torch import Tensor
from torch.nn.functional import normalize, pad
from torch.utils.data import DataLoader, Dataset

from rematch.backbone.memory import default_batch_tokens, is_out_of_memory
from rematch.console import say
from rematch.data.inputs import pictures_and_text
from rematch.encoding.inputs import (
    InputContent,
    MeasuredInput,
    batches_by_length,
    inspect_input,
)
from rematch.encoding.vector_store import VectorStore
from rematch.errors import RematchError, TooLongError, first_line
from rematch.model import ReMatch

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class EncodedBatch:
    """The result of a batch, by the keys of its inputs.

    Attributes:
        vectors: Vectors of the readable inputs, each (D,) or (1 + K, D), in the batch's order.
        errors: Errors of the unreadable inputs.
    """

    vectors: dict[bytes, Floats]
    errors: dict[bytes, RematchError]


class Encoder:
    """Encodes lists of inputs.

    Args:
        model: Any SentenceTransformer that takes the inputs' modalities.
        store: Where vectors are kept; ``None`` keeps none.
        batch_tokens: Tokens of a forward pass, padding included; by default 2,048 on a CPU and
            16,384 elsewhere.
        workers: Number of processes that prepare batches; by default as many as there are cores,
            at most eight; 0 for none.
        progress: Called with the number of distinct inputs encoded so far and their total.
        warn: Called with each warning.

    Attributes:
        encoded: Number of inputs that were encoded.
        reused: Number of inputs whose vectors were there already.
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
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # under torchrun
        share = (os.cpu_count() or 1) // processes
        self.workers = min(8, max(1, share)) if workers is None else workers
        self.progress, self.warn = progress, warn
        self.encoded = self.reused = 0
        self._picture_tokens: dict[int, int] = {}
        self._text_vectors: dict[bytes, Floats] = {}  # labels and answers, which many tasks share

    def encode(self, inputs: Sequence[Any], task: str, *, multi_vector: bool = False) -> Floats:
        """Vectors of queries or documents.

        Args:
            inputs: N inputs, as for ``encode``.
            task: ``"query"`` or ``"document"``.
            multi_vector: Whether to return the K token vectors too; ReMatch models only.

        Returns:
            (N, D), as ``encode`` returns them; D is the model's ``truncate_dim`` if it has one.
            With ``multi_vector`` (N, 1 + K, D): the embedding, padded with zeros where it is
            truncated, and then the token vectors.

        Raises:
            RematchError: If an input cannot be read, or a single one does not fit into memory.
        """
        if multi_vector and not isinstance(self.model, ReMatch):
            raise RematchError(
                "only ReMatch models have token vectors, which MaxSim needs. Leave MaxSim out."
            )
        if not inputs:
            return self._no_vectors(multi_vector)
        measured = self.measure(inputs, task, multi_vector=multi_vector)
        distinct: dict[bytes, MeasuredInput] = {}
        values: dict[bytes, Any] = {}
        for m, value in zip(measured, inputs, strict=True):
            distinct.setdefault(m.key, m)
            values.setdefault(m.key, value)
        vectors = self._stored_vectors(list(distinct))
        self.reused += len(vectors)
        if get_world_size() > 1:
            # vectors that another process stores from here on must not change this one's batches
            dist.barrier()
        batches = [
            [key for key in batch if key not in vectors]
            for batch in batches_by_length(distinct.values(), self.batch_tokens)
        ]
        batches = [batch for batch in batches if batch]
        self.encoded += sum(map(len, batches))
        vectors |= joined(lambda: self._encode_share(batches, values, task, multi_vector))
        self._text_vectors |= {m.key: vectors[m.key] for m in measured if m.is_text}
        return np.stack([vectors[m.key] for m in measured])

    def _stored_vectors(self, keys: list[bytes]) -> dict[bytes, Floats]:
        vectors = {key: self._text_vectors[key] for key in keys if key in self._text_vectors}
        if self.store is not None:
            vectors |= self.store.get([key for key in keys if key not in vectors])
        return vectors

    def _encode_share(
        self,
        batches: list[list[bytes]],
        inputs: Mapping[bytes, Any],
        task: str,
        multi_vector: bool,
    ) -> dict[bytes, Floats]:
        """Encode this process's share of the batches."""
        processes = get_world_size()
        share = batches[get_rank() :: processes]
        total, completed = sum(map(len, batches)), 0
        vectors: dict[bytes, Floats] = {}
        for batch in self.stream(
            ({key: inputs[key] for key in keys} for keys in share),
            task,
            multi_vector=multi_vector,
            # a few batches take less time than starting the processes
            workers=min(self.workers, len(share) // 8),
        ):
            if batch.errors:
                raise next(iter(batch.errors.values()))
            if self.store is not None:
                self.store.put(batch.vectors)
            vectors |= batch.vectors
            completed += len(batch.vectors) * processes
            if self.progress:
                self.progress(min(completed, total), total)
        return vectors

    # ---- measuring ------------------------------------------------------------------------------

    def measure(
        self, inputs: Sequence[Any], task: str, *, multi_vector: bool = False
    ) -> list[MeasuredInput]:
        """Key and length of each input, without decoding a picture.

        Args:
            inputs: The inputs.
            task: ``"query"`` or ``"document"``.
            multi_vector: Whether their token vectors are wanted; such inputs have other keys.

        Raises:
            RematchError: If an input cannot be read.
        """
        measured, errors = self.measure_readable(inputs, task, multi_vector=multi_vector)
        if errors:
            raise errors[min(errors)]
        return [measured[i] for i in range(len(inputs))]

    def measure_readable(
        self, inputs: Sequence[Any], task: str, *, multi_vector: bool = False
    ) -> tuple[dict[int, MeasuredInput], dict[int, RematchError]]:
        """:meth:`measure` for the inputs that can be read.

        Returns:
            The measured inputs, and the errors of the others, both by the input's position.
        """
        objects = {id(value): value for value in inputs}
        contents: dict[int, InputContent] = {}
        errors: dict[int, RematchError] = {}
        with ThreadPoolExecutor(8) as threads:
            results = threads.map(_inspect, objects.values())
            for number, result in zip(objects, results, strict=True):
                if isinstance(result, RematchError):
                    errors[number] = result
                else:
                    contents[number] = result
        lengths = self._text_lengths([content.text for content in contents.values()])
        key_task = f"{task}+" if multi_vector else task
        measured = {}
        for (number, content), length in zip(contents.items(), lengths, strict=True):
            tokens = length + sum(self._tokens_of_picture(p.pixels) for p in content.pictures)
            measured[number] = MeasuredInput(content.key(key_task), tokens, not content.pictures)
        positions = [(i, id(value)) for i, value in enumerate(inputs)]
        return (
            {i: measured[number] for i, number in positions if number in measured},
            {i: errors[number] for i, number in positions if number in errors},
        )

    def lengths(self, inputs: Sequence[Mapping[str, Any]]) -> list[int]:
        """Length of each input in tokens, estimated if it has pictures; they are not digested.

        Args:
            inputs: Dictionaries with ``text``, ``image`` (opened pictures), or both.
        """
        lengths = self._text_lengths([value.get("text") or "" for value in inputs])
        for i, value in enumerate(inputs):
            pictures = value.get("image") or []
            for picture in pictures if isinstance(pictures, list) else [pictures]:
                lengths[i] += self._tokens_of_picture(picture.width * picture.height)
        return lengths

    def _text_lengths(self, texts: list[str]) -> list[int]:
        if not texts:
            return []
        tokenizer = getattr(self.model[0], "tokenizer", None) or self.model.tokenizer
        if not callable(tokenizer):  # StaticEmbedding's; the lengths only decide the batches
            return [len(text) for text in texts]
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def _tokens_of_picture(self, pixels: int) -> int:
        """How many tokens a picture of about this size becomes, measured with a blank picture."""
        size = round(4 * math.log2(pixels))
        if size not in self._picture_tokens:
            edge = max(28, round(2 ** (size / 8)))
            features = self._prepare([{"image": Image.new("RGB", (edge, edge))}], "document")
            self._picture_tokens[size] = (
                int(features["attention_mask"].sum()) if "attention_mask" in features else 1
            )
        return self._picture_tokens[size]

    # ---- computing ------------------------------------------------------------------------------

    def stream(
        self,
        batches: Iterable[Mapping[bytes, Any]],
        task: str,
        *,
        multi_vector: bool = False,
        workers: int,
    ) -> Iterator[EncodedBatch]:
        """Encode batches as they come, preparing the next ones ahead.

        Args:
            batches: Inputs by their keys; taken from the iterable one by one.
            task: ``"query"`` or ``"document"``.
            multi_vector: Whether to return the K token vectors too.
            workers: Number of worker processes.

        Returns:
            What came of each batch, in order.
        """
        pending: deque[Mapping[bytes, Any]] = deque()

        def inputs() -> Iterator[list[Any]]:
            for batch in batches:
                pending.append(batch)
                yield list(batch.values())

        on_cpu = self.model.device.type == "cpu"
        loader = DataLoader(
            _Preparation(self, task, compute=on_cpu, as_bytes=workers > 0),
            batch_size=None,
            sampler=inputs(),
            num_workers=workers,
            # features with pixels are large, vectors are small
            prefetch_factor=(4 if on_cpu else 1) if workers else None,
            multiprocessing_context="fork" if workers else None,
        )
        with warnings.catch_warnings():  # an index may be open; the workers never use it
            warnings.filterwarnings("ignore", message="lance(db fork support| is not fork-safe)")
            prepared_batches = iter(loader)
        for prepared, errors in prepared_batches:
            batch = pending.popleft()
            readable = [key for i, key in enumerate(batch) if i not in errors]
            keyed_errors = {key: errors[i] for i, key in enumerate(batch) if i in errors}
            if not readable:
                yield EncodedBatch({}, keyed_errors)
                continue
            if not on_cpu:
                if workers:
                    prepared = torch.load(io.BytesIO(prepared), weights_only=False)
                values = [batch[key] for key in readable]
                prepared, errors = self._forward_or_errors(values, prepared, task)
                keyed_errors |= {readable[i]: error for i, error in errors.items()}
                readable = [key for key in readable if key not in keyed_errors]
            vectors: Floats = prepared.numpy()
            if not multi_vector:
                vectors = vectors[:, 0, : self.model.truncate_dim]
            yield EncodedBatch(dict(zip(readable, vectors, strict=True)), keyed_errors)

    def _no_vectors(self, multi_vector: bool) -> Floats:
        """The vectors of no inputs, (0, D) or (0, 1 + K, D)."""
        if multi_vector:
            token_count = max(1, self.model.fusion.num_tokens)
            return np.zeros((0, 1 + token_count, self.model.backbone.width), np.float32)
        width = self.model.get_embedding_dimension() or 0  # some modules do not know their width
        return np.zeros((0, width), np.float32)

    def _vectors(self, batch: list[Any], task: str) -> Tensor:
        return self._forward(batch, self._prepare(batch, task), task)

    def _prepare(self, batch: list[Any], task: str) -> dict[str, Any]:
        """The features that ``SentenceTransformer.encode`` passes to the model."""
        if not isinstance(self.model, ReMatch):
            batch = [_decoded(value, i) for i, value in enumerate(batch)]
        names = ("query",) if task == "query" else ("document", "passage", "corpus")
        name = next((n for n in names if n in self.model.prompts), self.model.default_prompt_name)
        prompt = self.model.prompts.get(name)
        try:
            return dict(self.model.preprocess(batch, prompt=prompt, task=task))
        except RematchError:
            raise
        except (ValueError, TypeError) as error:
            raise RematchError(
                f"{type(self.model[0]).__name__} cannot take {_modalities(batch)} "
                f"({str(error).splitlines()[0]}). Use a model for these inputs, or --tasks "
                "without them."
            ) from error

    def _forward_or_errors(
        self, batch: list[Any], features: dict[str, Any], task: str
    ) -> tuple[Tensor, dict[int, RematchError]]:
        """Vectors of the inputs that fit into memory; errors of the others by position."""
        try:
            return self._forward(batch, features, task), {}
        except TooLongError:
            vectors: list[Tensor] = []
            errors: dict[int, RematchError] = {}
        for i, value in enumerate(batch):
            try:
                vectors.append(self._vectors([value], task))
            except TooLongError as error:
                errors[i] = error
        return torch.cat(vectors) if vectors else torch.zeros(0, 1, 0), errors

    @torch.inference_mode()
    def _forward(self, batch: list[Any], features: dict[str, Any], task: str) -> Tensor:
        """Vectors of a batch, (b, 1, D) or (b, 1 + K, D); halved if memory runs out."""
        try:
            out = self.model(batch_to_device(features, self.model.device), task=task)
            # truncated before the conversion to float32, as encode does
            embedding = out["sentence_embedding"][..., : self.model.truncate_dim].float()
            vectors: Tensor = embedding[:, None]
            if "multi_vector" in out:
                tokens = normalize(out["multi_vector"].float(), dim=-1)
                padding = (0, tokens.shape[-1] - vectors.shape[-1])
                vectors = torch.cat([pad(vectors, padding), tokens], 1)
            return vectors.cpu()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if len(batch) == 1:
            raise TooLongError(
                "out of memory with a single input. Shorten it, use smaller pictures, or a "
                "machine with more memory."
            )
        half = len(batch) // 2
        self.warn(f"out of memory with {len(batch)} inputs; continuing with {half} at a time")
        return torch.cat([self._vectors(part, task) for part in (batch[:half], batch[half:])])


def joined(compute: Callable[[], dict[Any, Any]]) -> dict[Any, Any]:
    """What all processes compute, each a share of it.

    An error of one process is raised in all of them, which would wait for its share otherwise.

    Args:
        compute: Returns the share of this process.

    Raises:
        RematchError: The error of the first process that has one.
    """
    if get_world_size() == 1:
        return compute()
    share: dict[Any, Any] | RematchError
    try:
        share = compute()
    except RematchError as error:
        share = error
    shares: list[Any] = [None] * get_world_size()
    dist.all_gather_object(shares, share)
    for share in shares:
        if isinstance(share, RematchError):
            raise share
    return {key: value for share in shares for key, value in share.items()}


class _Preparation(Dataset[Any]):
    """The work of a worker process on a batch.

    Args:
        encoder: The encoder.
        task: ``"query"`` or ``"document"``.
        compute: Whether the worker computes vectors, instead of only preparing features.
        as_bytes: Whether features are returned as bytes, which go through a pipe: as tensors they
            would take more of /dev/shm than many containers have.
    """

    def __init__(self, encoder: Encoder, task: str, *, compute: bool, as_bytes: bool) -> None:
        self.encoder, self.task = encoder, task
        self.work = encoder._vectors if compute else encoder._prepare
        self.as_bytes = as_bytes and not compute

    def __getitem__(self, batch: list[Any]) -> tuple[Any, dict[int, RematchError]]:
        prepared, errors = self._prepared(batch)
        if not self.as_bytes or prepared is None:
            return prepared, errors
        stream = io.BytesIO()
        torch.save(prepared, stream)
        return stream.getvalue(), errors

    def _prepared(self, batch: list[Any]) -> tuple[Any, dict[int, RematchError]]:
        """Vectors or features of the readable inputs; errors of the others by position.

        Whatever preparing an input raises is that input's error, and so is a lack of memory for
        it alone.
        """
        try:
            return self.work(batch, self.task), {}
        except Exception as error:
            errors = self._errors(batch, error)
            if not errors:
                raise
        readable = [value for i, value in enumerate(batch) if i not in errors]
        return self.work(readable, self.task) if readable else None, errors

    def _errors(self, batch: list[Any], error_of_batch: Exception) -> dict[int, RematchError]:
        # whether an input fits into memory, only computing it tells
        work = self.work if isinstance(error_of_batch, TooLongError) else self.encoder._prepare
        errors = {}
        for i, value in enumerate(batch):
            try:
                work([value], self.task)
            except Exception as error:
                errors[i] = _as_input_error(error)
        return errors


def _inspect(value: Any) -> InputContent | RematchError:
    try:
        return inspect_input(value)
    except Exception as error:
        return _as_input_error(error)


def _as_input_error(error: Exception) -> RematchError:
    if isinstance(error, RematchError):
        return error
    return RematchError(f"input 0: cannot be used ({first_line(error)}). Fix or remove it.")


def _decoded(value: Any, position: int) -> Any:
    """An input as any SentenceTransformer takes it.

    That is a text, a decoded picture, or a dictionary of both.
    """
    pictures, text = pictures_and_text(value, position)
    if not pictures:
        return text
    picture = pictures[0] if len(pictures) == 1 else pictures
    return {"text": text, "image": picture} if text else picture


def _modalities(inputs: Sequence[Any]) -> str:
    """What kinds of inputs these are, for an error message."""
    modalities = []
    if any(isinstance(value, str) for value in inputs):
        modalities.append("text")
    if any(not isinstance(value, str) for value in inputs):
        modalities.append("pictures")
    return " and ".join(modalities)
