"""One user turn in a backbone's chat template: rendering it, tokenizing it, and finding what the
template writes around the content.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from rematch.errors import ModelError, RematchError

TEXT_FEATURES = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})
_MARK = "\ue000"  # stands for a user's text; no template contains it


@dataclass(frozen=True)
class Frame:
    """What the chat template writes before and after a user's content, as text and token ids."""

    prefix: str
    suffix: str
    prefix_ids: list[int]
    suffix_ids: list[int]


def user_turn(pictures: Sequence[Image.Image], text: str) -> list[dict[str, Any]]:
    """Return an input as a chat of one user turn, pictures first."""
    content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
    if text:
        content.append({"type": "text", "text": text})
    return [{"role": "user", "content": content}]


class Turns:
    """Renders and tokenizes user turns with a backbone's processor.

    Args:
        processor: Processor of the backbone.

    Raises:
        ModelError: If the chat template cannot take a user turn of text and a picture.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self._frames = self.parse_template()
        self._control_tokens: dict[int, re.Pattern[str]] = {}

    def frame(self, *, pictures: bool, text: bool) -> Frame:
        """Return what the template writes around a content with pictures, with text, or both."""
        return self._frames[pictures, text]

    def render(self, pictures: Sequence[Image.Image], text: str) -> str:
        """Return a user turn as the template writes it, up to where the assistant answers."""
        turn = user_turn(pictures, text)
        return str(
            self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        )

    def parse_template(self) -> dict[tuple[bool, bool], Frame]:
        """Find the frames by rendering a text, a picture, and both.

        Templates may write different things before a picture and before a text ("User:" and
        "User: ").

        Returns:
            The frames by (content has pictures, content has text).

        Raises:
            ModelError: If the chat template cannot take a user turn of text and a picture.
        """
        picture = Image.new("RGB", (1, 1))
        try:
            text_turn = self.render([], _MARK)
            picture_turn = self.render([picture], "")
            both_turn = self.render([picture], _MARK)
            before_text, after_text = text_turn.split(_MARK)
            before_both, after_both = both_turn.split(_MARK)
        except Exception as error:
            raise ModelError(
                f"the chat template cannot render a user turn of text and a picture ({error}). "
                "Use a backbone whose template takes structured content."
            ) from error
        before_picture = _common_prefix(before_text, before_both)
        if not before_both.removeprefix(before_picture).strip():
            raise ModelError(
                "the chat template leaves pictures out. Use a backbone whose template takes "
                "pictures."
            )
        if picture_turn.startswith(before_both):
            # what follows the picture in both turns, such as a space, belongs to the picture
            after_picture = picture_turn.removeprefix(before_both)
        else:
            # what follows the picture before a text belongs to the text
            after_picture = _common_prefix(after_text[::-1], picture_turn[::-1])[::-1]
        picture_content = picture_turn.removesuffix(after_picture)
        return {
            (False, True): self._make_frame(before_text, before_text + "a", after_text),
            (True, True): self._make_frame(before_picture, before_both + "a", after_both),
            (True, False): self._make_frame(before_picture, picture_content, after_picture),
        }

    def _make_frame(self, prefix: str, before_suffix: str, suffix: str) -> Frame:
        """Make a frame; its suffix is tokenized after a content.

        At the start of a text, a tokenizer may put a space that is absent after a content.
        """
        start = len(self.token_ids(before_suffix))
        suffix_ids = self.token_ids(before_suffix + suffix)[start:]
        return Frame(prefix, suffix, self.opening_ids(prefix), suffix_ids)

    def refuse_control_tokens(self, text: str, row: int) -> None:
        """Raise an error if a user's text holds a control token.

        These are the tokenizer's special tokens and the processor's placeholders. One of them in a
        text would end the turn or stand for a picture.

        Args:
            text: Text of the input.
            row: Row of the input in the batch, for the error.

        Raises:
            RematchError: If the text holds a control token.
        """
        token = self._control_token_pattern().search(text)
        if token:
            raise RematchError(
                f"input {row}: its text holds {token[0]}, which the model reads as a control "
                "token. Remove it from the text."
            )

    def _control_token_pattern(self) -> re.Pattern[str]:
        size = len(self.tokenizer)  # learnable tokens are added after the backbone has been loaded
        if size not in self._control_tokens:
            tokens = {
                token.content
                for token in self.tokenizer.added_tokens_decoder.values()
                if token.special
            }
            for kind in ("image", "video", "audio"):
                placeholder = getattr(self.processor, f"{kind}_token", None)
                if placeholder:
                    tokens.add(placeholder)
            longest_first = sorted(tokens, key=len, reverse=True)
            pattern = "|".join(map(re.escape, longest_first)) or "(?!)"
            self._control_tokens[size] = re.compile(pattern)
        return self._control_tokens[size]

    def token_ids(self, text: str) -> list[int]:
        """Tokenize a part of a turn, without BOS."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def opening_ids(self, text: str) -> list[int]:
        """Tokenize a text that opens a sequence.

        BOS comes first if the model has one, whether the template or the tokenizer writes it.
        """
        ids, bos = self.token_ids(text), self.tokenizer.bos_token_id
        adds_bos = bos in self.tokenizer.encode(text)[:1] and ids[:1] != [bos]
        return [bos, *ids] if adds_bos else ids

    def tokenize(
        self, text: str, pictures: list[Image.Image], *, bare: bool = False
    ) -> dict[str, Tensor]:
        """Run the processor on one text.

        Args:
            text: A rendered turn. As in ``apply_chat_template``, the tokenizer adds BOS unless the
                text begins with it.
            pictures: The pictures whose placeholders the text holds.
            bare: Whether the text is only a part of a turn, so that no BOS is added.

        Returns:
            The processor's features, those of tokens without the batch dimension.
        """
        bos = self.tokenizer.bos_token
        has_bos = bos is not None and text.startswith(bos)
        options = {"add_special_tokens": False} if bare or has_bos else {}
        features = self.processor(
            text=[text],
            images=[pictures] if pictures else None,
            return_mm_token_type_ids=True,
            padding=False,
            return_tensors="pt",
            **options,
        )
        return {
            name: value[0] if name in TEXT_FEATURES else value for name, value in features.items()
        }


def _common_prefix(a: str, b: str) -> str:
    """Return the longest text that both texts begin with.

    >>> _common_prefix("User: ", "User:<image>")
    'User:'
    """
    length = 0
    while a[: length + 1] == b[: length + 1] and length < min(len(a), len(b)):
        length += 1
    return a[:length]
