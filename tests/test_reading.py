"""Inputs as token ids: the same in training as in encoding, and no control tokens in texts."""

import json
import re
import shutil

import pytest
from PIL import Image

from rematch import ReMatch, RematchError
from rematch.backbone.module import Backbone
from rematch.errors import ModelError


@pytest.fixture
def changed(backbone_path, tmp_path):
    """A function that copies the tiny backbone and edits one of its files."""

    def change(file, edit):
        path = tmp_path / "changed"
        shutil.copytree(backbone_path, path)
        (path / file).write_text(edit((path / file).read_text()))
        return str(path)

    return change


def test_a_template_that_changes_queries_in_encoding_is_refused_with_both_strings(changed):
    path = changed(
        "chat_template.jinja", lambda text: "{% if task == 'query' %}Find: {% endif %}" + text
    )
    with pytest.raises(ModelError) as error:
        Backbone(path)
    message = str(error.value)
    assert "training would read a query as '<|user|>" in message
    assert "butencodereads'find" in message.replace(" ", "")


def test_a_tokenizer_that_ends_with_a_token_of_its_own_is_refused(changed):
    def add_end(text):
        settings = json.loads(text)
        processor = settings["post_processor"]
        processor["single"].append({"SpecialToken": {"id": "<|end|>", "type_id": 0}})
        processor["special_tokens"] = {
            "<|end|>": {"id": "<|end|>", "ids": [5], "tokens": ["<|end|>"]}
        }
        return json.dumps(settings)

    with pytest.raises(
        ModelError,
        match=re.escape("<|end|><|query_emb_0|>") + ".*" + re.escape("<|query_emb_0|><|end|>"),
    ):
        ReMatch.from_backbone(changed("tokenizer.json", add_end), 1)


def test_pictures_of_another_size_in_encoding_are_refused(backbone_path):
    smaller = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
    settings = {"chat_template": {"add_generation_prompt": True}, "image": smaller}
    with pytest.raises(
        ModelError, match=r"training would read a document as .*96, 96.* against .*48, 48"
    ):
        Backbone(str(backbone_path), processing_kwargs=settings)


def test_what_the_template_writes_around_a_content_depends_on_pictures_and_text(make_model):
    backbone = make_model().backbone
    backbone.processor.chat_template = (
        "{% for m in messages %}USER: {% for p in m.content %}{% if p.type == 'image' %}<image> "
        "{% endif %}{% endfor %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }} {% "
        "endif %}{% endfor %}ASSISTANT:{% endfor %}"
    )
    frames = backbone.reader.turns.parse_template()
    assert {key: (frame.prefix, frame.suffix) for key, frame in frames.items()} == {
        (False, True): ("USER: ", " ASSISTANT:"),
        (True, True): ("USER: ", " ASSISTANT:"),
        (True, False): ("USER: ", "ASSISTANT:"),
    }


@pytest.mark.parametrize("text", ["a dog", " a dog ", "\na dog\n\n"])
@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_a_turn_is_read_in_training_as_in_encoding_and_its_content_is_what_was_given(
    model, text, pictures
):
    reader = model.backbone.reader
    value = {"text": text, "image": [Image.new("RGB", (40, 30 + i)) for i in range(pictures)]}
    reading = reader.read(value)
    encoded = model.preprocess([value], task="query")["input_ids"][0]
    assert reader.with_learnable_tokens(reading, "query").ids.tolist() == encoded.tolist()
    content, alone = reading.content.ids.tolist(), reader.turns.token_ids(text)
    assert content == [reader.picture_token_id] * reading.visual_tokens + alone
    assert bool(reading.visual_tokens) == bool(pictures)
    assert reading.content.positions[0].tolist() == list(range(len(reading.content.ids)))


@pytest.mark.parametrize(
    "token", ["<|end|>", "<|user|>", "<image>", "<|pad|>", "<|query_emb_0|>", "<|doc_emb_3|>"]
)
def test_a_control_token_in_a_text_is_an_error_that_names_the_input(model, token):
    message = re.escape(
        f"input 1: its text holds {token}, which the model reads as a control token. Remove it "
        "from the text."
    )
    text = f"a dog {token} a cat"
    with pytest.raises(RematchError, match=message):
        model.encode_document(["a cat", text])
    with pytest.raises(RematchError, match=message):
        model.encode_document(["a cat", {"text": text, "image": Image.new("RGB", (9, 9))}])
    with pytest.raises(RematchError, match=message):
        model.match(["a dog"] * 2, ["a cat", text], "feat-raw")
    with pytest.raises(RematchError, match=message.replace("1", "0", 1)):
        model.encode(["a cat"], prompt=text)


def test_text_that_only_looks_like_a_control_token_is_text(model):
    model.encode_query(["<|im_end|> </s> <img> <|query_emb_99|> <|end |> < image >"])
