"""Every string a model reads: task instructions, the matching prompt, the learnable tokens' names.
Pure text.

The paper does not print its matching prompt; the wording here is ours. The backbone's own chat
template goes around it ("MVQDM++").
"""

from typing import Literal

TokenInit = Literal["random", "small", "last", "mean", "mixed"]  # how learnable tokens start

YES, NO = "Yes", "No"

# One user turn: TASK, QUERY, DOCUMENT, QUESTION; the assistant answers with one token. What all
# questions share comes first, so that a question of its own costs a few tokens.
MATCH_TASK = "Is the document relevant to the query? Answer only Yes or No."
MATCH_QUERY = "\nQuery:\n"
MATCH_DOCUMENT = "\nDocument:\n"
MATCH_QUESTION = "\nRelevant?"

# Target-side ("document") instructions per kind of target; MMEB has them for pictures only
# (ReMatch adds the others).
DOCUMENT_INSTRUCTIONS = {
    "label": "Represent the class label: ",
    "answer": "Represent the answer: ",
    "caption": "Represent the image caption: ",
    "image": "Represent the given image.",
    "crop": "Represent the given cropped image of the object.",
}
ADDED_INSTRUCTIONS = {DOCUMENT_INSTRUCTIONS[kind] for kind in ("label", "answer", "caption")}

# Those of MMEB-V2.
PAGE_INSTRUCTION = "Understand the content of the provided document image."
VIDEO_INSTRUCTION = "Understand the content of the provided video."

# Query instructions of a search, by what is asked with and what is searched for. MMEB's wordings,
# where MMEB has such a task.
QUERY_INSTRUCTIONS = {
    "text-image": "Find me an everyday image that matches the given caption: ",
    "image-image": "Find a day-to-day image that looks similar to the provided image.",
    "text+image-image": "Given an image, find a similar everyday image with the described "
    "changes: ",
    "text-page": "Find a document image that matches the given query: ",
    "image-page": "Find a document image that looks similar to the provided image.",
    "text+image-page": "Find a document image that matches the given image and query: ",
    "text-video": "Find a video that contains the following visual content: ",
    "image-video": "Find a video that looks similar to the provided image.",
    "text+image-video": "Find a video that matches the given image and text: ",
    "text-text": "Find a text that matches the given query: ",
    "image-text": "Find an image caption describing the given everyday image.",
    "text+image-text": "Represent the given image with the following question: ",
}


def query_token(i: int) -> str:
    """Name of the i-th learnable query token.

    >>> query_token(0)
    '<|query_emb_0|>'
    """
    return f"<|query_emb_{i}|>"


def document_token(i: int) -> str:
    """Name of the i-th learnable document token.

    >>> document_token(3)
    '<|doc_emb_3|>'
    """
    return f"<|doc_emb_{i}|>"
