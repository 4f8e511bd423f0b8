"""Prepare docstrings for the documentation site: a griffe extension that mkdocs.yml loads.

Docstrings here are in Google style. Two of their habits are not Markdown: Sphinx roles such as
``:class:`~rematch.search.index.Index``` and doctests without a code fence.
"""

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":\w+:`(~?)([\w.]+)`")
DOCTEST = re.compile(r"^([ ]*)>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)


def to_markdown(docstring: str) -> str:
    """Turn Sphinx roles into cross-references where the target has a page, and doctests into code
    blocks.
    """

    def reference(role: re.Match[str]) -> str:
        short, target = role.groups()
        label = target.rpartition(".")[2] if short else target
        return f'<autoref identifier="{target}" optional><code>{label}</code></autoref>'

    def fence(doctest: re.Match[str]) -> str:
        indent = doctest[1]
        return f"{indent}```pycon\n{doctest[0]}\n{indent}```"

    return DOCTEST.sub(fence, ROLE.sub(reference, docstring))


class DocstringMarkdown(Extension):
    """Apply :func:`to_markdown` to every docstring."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring before it is parsed into sections."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
