"""From the body of a request to inputs that the model takes.

Every input is a dictionary, never a string, so that no text of a client is taken for a path.
Decoding a picture takes time: call these functions in a thread, not in the event loop.
"""

from collections.abc import Sequence
from typing import TypedDict

from PIL import Image

from rematch.serve.limits import ClientError, Limits
from rematch.serve.pictures import pictures_from
from rematch.serve.schemas import EmbeddingRequest, ImagePart, Message, Multimodal


class Input(TypedDict, total=False):
    """A query or document: text, pictures, or both."""

    text: str
    image: Image.Image | list[Image.Image]


def embedding_inputs(body: EmbeddingRequest, limits: Limits) -> list[Input]:
    """The inputs of an embedding request.

    Raises:
        ClientError: If there are none or too many, or one of them is empty, too large, or not a
            readable picture.
    """
    if (body.input is None) == (body.messages is None):
        raise ClientError("send either input or messages.")
    if body.messages is not None:
        return [_message_input(body.messages, limits)]
    texts = [body.input] if isinstance(body.input, str) else body.input
    assert texts is not None
    if not texts:
        raise ClientError("input is an empty list. Send at least one text.")
    if len(texts) > limits.inputs:
        raise ClientError(
            f"{len(texts)} inputs; this server takes {limits.inputs} in a request.", 413
        )
    return [_text_input(text, limits) for text in texts]


def multimodal_inputs(values: Sequence[str | Multimodal], limits: Limits) -> list[Input]:
    """One input for each text or combination of text and picture.

    Raises:
        ClientError: If there are too many pictures, or an input is empty, too large, or not a
            readable picture.
    """
    parts = [Multimodal(text=value) if isinstance(value, str) else value for value in values]
    inputs: list[Input] = []
    for value in parts:
        if value.image is None and not value.text.strip():
            raise ClientError("an empty query or document. Give it text, a picture, or both.")
        inputs.append(_text_input(value.text, limits) if value.text.strip() else Input())
    urls = {i: value.image for i, value in enumerate(parts) if value.image is not None}
    pictures = pictures_from(list(urls.values()), limits)
    for i, picture in zip(urls, pictures, strict=True):
        inputs[i]["image"] = picture
    return inputs


def _message_input(messages: list[Message], limits: Limits) -> Input:
    if len(messages) != 1:
        raise ClientError(f"{len(messages)} messages; one is embedded at a time, so send one.")
    content = messages[0].content
    if isinstance(content, str):
        return _text_input(content, limits)
    urls = [part.image_url.url for part in content if isinstance(part, ImagePart)]
    text = " ".join(part.text for part in content if not isinstance(part, ImagePart))
    model_input = _text_input(text, limits) if text.strip() else Input()
    if urls:
        model_input["image"] = list(pictures_from(urls, limits))
    if not model_input:
        raise ClientError("the message is empty. Send text, a picture, or both.")
    return model_input


def _text_input(text: str, limits: Limits) -> Input:
    if not text.strip():
        raise ClientError("an empty text. Send a text with at least one visible character.")
    if len(text) > limits.text:
        raise ClientError(
            f"a text of {len(text):,} characters; this server takes {limits.text:,}.", 413
        )
    return Input(text=text)
