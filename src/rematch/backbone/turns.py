"""One user turn in a backbone's chat template: rendered, tokenized, and what the template writes
around the content.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from rematch.errors import ModelError, RematchError

TEXT_FEATURES = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})
_MARK = "\ue000"  # stands for a user's text; no template has it


@dataclass(frozen=True)
class Frame:
    """What the chat template writes around a user's content, as text and as token ids."""

    prefix: str
    suffix: str
    prefix_ids: list[int]
    suffix_ids: list[int]


def user_turn(pictures: Sequence[Image.Image], text: str) -> list[dict[str, Any]]:
    """An input as a chat of one turn, pictures first."""
    content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
    if text:
        content.append({"type": "text", "text": text})
    return [{"role": "user", "content": content}]


class Turns:
    """Renders and tokenizes turns with a backbone's processor.

    Attributes:
        frames: What stands around the content, by whether it has pictures and whether it has text.

    Raises:
        ModelError: If the chat template cannot take a user turn of text and a picture.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.frames = self.read_template()
        self._control_tokens: dict[int, re.Pattern[str]] = {}

    def render(self, pictures: Sequence[Image.Image], text: str) -> str:
        """A turn as the template writes it, up to where the assistant would answer."""
        turn = user_turn(pictures, text)
        return str(
            self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        )

    def read_template(self) -> dict[tuple[bool, bool], Frame]:
        """The frames; templates write other things before a picture than before text ("User:" and
        "User: ").
        """
        picture = Image.new("RGB", (1, 1))
        try:
            text, shown, both = (
                self.render([], _MARK),
                self.render([picture], ""),
                self.render([picture], _MARK),
            )
            (prefix, suffix), (start, end) = text.split(_MARK), both.split(_MARK)
        except Exception as error:
            raise ModelError(
                f"the chat template cannot render a user turn of text and a picture ({error}). "
                "Use a backbone whose template takes structured content."
            ) from error
        before_picture = _shared_start(prefix, start)
        if not start.removeprefix(before_picture).strip():
            raise ModelError(
                "the chat template leaves pictures out. Use a backbone whose template takes "
                "pictures."
            )
        if shown.startswith(start):  # what is written behind a picture belongs to it ("<image> ")
            after_picture = shown.removeprefix(start)
        else:  # unless it is there for the text's sake
            after_picture = _shared_start(suffix[::-1], shown[::-1])[::-1]
        return {
            (False, True): self._frame(prefix, prefix + "a", suffix),
            (True, True): self._frame(before_picture, start + "a", end),
            (True, False): self._frame(
                before_picture, shown.removesuffix(after_picture), after_picture
            ),
        }

    def _frame(self, prefix: str, before_suffix: str, suffix: str) -> Frame:
        """The suffix is tokenized behind something, where a tokenizer that puts a space before a
        text puts none.
        """
        behind = self.ids(before_suffix + suffix)[len(self.ids(before_suffix)) :]
        return Frame(prefix, suffix, self.opening_ids(prefix), behind)

    def refuse_control_tokens(self, text: str, row: int) -> None:
        """A user's text must be nothing but text.

        Raises:
            RematchError: If it holds one of the tokenizer's special tokens or of the processor's
                placeholders: it would end the turn, or stand for a picture.
        """
        size = len(self.tokenizer)  # learnable tokens are added after the backbone has been loaded
        if size not in self._control_tokens:
            added = self.tokenizer.added_tokens_decoder.values()
            placeholders = (
                getattr(self.processor, f"{kind}_token", None)
                for kind in ("image", "video", "audio")
            )
            tokens = {token.content for token in added if token.special} | {
                *filter(None, placeholders)
            }
            longest_first = sorted(tokens, key=len, reverse=True)
            self._control_tokens[size] = re.compile(
                "|".join(map(re.escape, longest_first)) or "(?!)"
            )
        if token := self._control_tokens[size].search(text):
            raise RematchError(
                f"input {row}: its text holds {token[0]}, which the model reads as a control "
                "token. Take it out."
            )

    def ids(self, text: str) -> list[int]:
        """Of a part of a turn."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def opening_ids(self, text: str) -> list[int]:
        """Of a text that opens a sequence: the template or the tokenizer puts BOS before it, where
        a model has one.
        """
        ids, bos = self.ids(text), self.tokenizer.bos_token_id
        adds_bos = bos in self.tokenizer.encode(text)[:1] and ids[:1] != [bos]
        return [bos, *ids] if adds_bos else ids

    def tokenize(
        self, text: str, pictures: list[Image.Image], *, bare: bool = False
    ) -> dict[str, Tensor]:
        """The processor's output for one text, its token features without the batch dimension.

        Args:
            text: A rendered turn; as ``apply_chat_template`` has it, the tokenizer adds BOS unless
                it is there.
            pictures: Whose placeholders it holds.
            bare: Add no BOS: it is a part of a turn.
        """
        bos = self.tokenizer.bos_token
        has_bos = bos is not None and text.startswith(bos)
        features = self.processor(
            text=[text],
            images=[pictures] if pictures else None,
            return_mm_token_type_ids=True,
            padding=False,
            return_tensors="pt",
            **({"add_special_tokens": False} if bare or has_bos else {}),
        )
        return {
            name: value[0] if name in TEXT_FEATURES else value for name, value in features.items()
        }


def _shared_start(a: str, b: str) -> str:
    """What two texts begin with in common.

    >>> _shared_start("User: ", "User:<image>")
    'User:'
    """
    return a[
        : next(
            (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
        )
    ]
