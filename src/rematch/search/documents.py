"""From documents to rows of an index: load them, group them by content, encode each content once.

Both the local build and the workers of Ray consist of these steps.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rematch.data.clips import Clip
from rematch.data.document import Document, Metadata, Unreadable, unreadable
from rematch.data.images import CheckedPicture, EncodedPicture
from rematch.data.pages import PdfPage
from rematch.encoding.encoder import Encoder
from rematch.encoding.inputs import MeasuredInput, batches_by_length, inspect_picture
from rematch.scoring import truncate
from rematch.search.columns import CORPUS, WORDS
from rematch.search.retrieval import words_of
from rematch.search.schema import IndexSettings


@dataclass(frozen=True)
class LoadedDocument:
    """A document and the input to encode for it.

    Attributes:
        document: The document.
        stamp: Its stamp, from before it was loaded.
        value: The input.
        is_new: Whether the index has no document of this id.
    """

    document: Document
    stamp: int
    value: dict[str, Any]
    is_new: bool

    @property
    def id(self) -> str:
        """The document's id."""
        return self.document.id

    @property
    def metadata(self) -> Metadata:
        """The document's metadata."""
        return self.document.metadata

    @property
    def loaded_bytes(self) -> int:
        """Size of the picture's file or of the frames, if they are in memory."""
        pictures = self.value.get("image")
        listed = pictures if isinstance(pictures, list) else [pictures]
        return sum(len(p.content) for p in listed if isinstance(p, EncodedPicture))


@dataclass(frozen=True)
class Content:
    """Documents with the same text and picture, which are encoded as one.

    Attributes:
        measured: Their content key and length.
        documents: The documents; there is at least one.
    """

    measured: MeasuredInput
    documents: list[LoadedDocument]


@dataclass(frozen=True)
class EncodedContent:
    """Documents with the same text and picture, and its vectors.

    Attributes:
        key: The content key.
        vectors: The embedding (D,), or with the token vectors (1 + K, D).
        documents: The documents.
    """

    key: bytes
    vectors: NDArray[np.float32]
    documents: list[LoadedDocument]

    def records(self, settings: IndexSettings, corpus: str) -> list[dict[str, Any]]:
        """The documents' rows in an index with these settings.

        Args:
            settings: The settings.
            corpus: Name of the documents' corpus.
        """
        vectors = np.atleast_2d(self.vectors)
        shared = {
            "vector": truncate(vectors[:1], settings.dimensions)[0],
            "tokens": vectors[1:],
            "content_hash": self.key.hex(),
            CORPUS: corpus,
        }
        return [shared | _columns(d, settings.store_pictures) for d in self.documents]


def _columns(loaded: LoadedDocument, store_pictures: bool) -> dict[str, Any]:
    document = loaded.document
    image = document.image
    path = None
    if isinstance(image, Path):
        path = str(image.resolve())
    elif isinstance(image, PdfPage | Clip):
        path = str(replace(image, path=image.path.resolve()))
    picture = loaded.value.get("image")
    is_stored = isinstance(image, EncodedPicture) or (
        store_pictures and isinstance(picture, EncodedPicture | CheckedPicture)
    )
    return document.metadata | {
        "id": document.id,
        "text": document.text,
        "path": path,
        "image": picture.read_bytes() if picture is not None and is_stored else None,
        "stamp": loaded.stamp,
        WORDS: words_of(document.text, document.metadata),
    }


class DocumentEncoder:
    """Encodes documents for an index.

    Args:
        encoder: Encoder of the index's model.
        settings: Settings of the index.

    Attributes:
        waiting: By content key, the documents whose content is being encoded. A document that is
            added here gets the same vectors.
    """

    def __init__(self, encoder: Encoder, settings: IndexSettings) -> None:
        self.encoder = encoder
        self.document_instructions = settings.document_instructions
        self.multi_vector = settings.tokens > 0
        self.waiting: dict[bytes, list[LoadedDocument]] = {}

    def load(self, document: Document, *, is_new: bool) -> LoadedDocument | Unreadable:
        """Load a document's picture and check that it can be read.

        A picture on disk is replaced by its path and digest, so that it takes no memory until it
        is encoded.
        """
        try:
            stamp = document.stamp()
            value = document.load_input(self.document_instructions)
            if isinstance(document.image, Path):
                value["image"] = CheckedPicture(document.image, *inspect_picture(value["image"]))
        except Exception as error:  # whatever a document raises, the others are not affected
            return unreadable(document.id, error)
        return LoadedDocument(document, stamp, value, is_new)

    def group(self, documents: Sequence[LoadedDocument]) -> tuple[list[Content], list[Unreadable]]:
        """Group documents by content; those that cannot be read are returned apart."""
        measured, errors = self.encoder.measure_readable(
            [document.value for document in documents], "document", multi_vector=self.multi_vector
        )
        contents: dict[bytes, Content] = {}
        for i, m in measured.items():
            contents.setdefault(m.key, Content(m, [])).documents.append(documents[i])
        failed = [Unreadable(documents[i].id, error) for i, error in errors.items()]
        return list(contents.values()), failed

    def batches(self, contents: Sequence[Content]) -> Iterator[dict[bytes, Any]]:
        """Batches of inputs by content key; their documents wait for the vectors."""
        for content in contents:
            self.waiting[content.measured.key] = content.documents
        measured = [content.measured for content in contents]
        for keys in batches_by_length(measured, self.encoder.batch_tokens):
            yield {key: self.waiting[key][0].value for key in keys}

    def encode(
        self, batches: Iterable[dict[bytes, Any]], workers: int
    ) -> Iterator[tuple[list[EncodedContent], list[Unreadable]]]:
        """Encode batches as they come.

        Args:
            batches: Inputs by content key, from :meth:`batches`.
            workers: Number of processes that prepare batches.

        Returns:
            For each batch its encoded contents, and the documents that cannot be read.
        """
        for batch in self.encoder.stream(
            batches, "document", multi_vector=self.multi_vector, workers=workers
        ):
            failed = [
                Unreadable(document.id, error)
                for key, error in batch.errors.items()
                for document in self.waiting.pop(key)
            ]
            encoded = [
                EncodedContent(key, vectors, self.waiting.pop(key))
                for key, vectors in batch.vectors.items()
            ]
            yield encoded, failed
