"""Every family of backbones that the documentation names: training, loading, encoding and
matching, or a refusal.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

QWEN2 = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
SMOL_PICTURE = "<fake_token_around_image><global-img><image><fake_token_around_image>"
CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
ONEVISION = "<|im_start|>user {}<|im_end|><|im_start|>assistant\n"
SMOL, IDEFICS = (
    f"{bos}User:{{}}<end_of_utterance>\nAssistant:"
    for bos in ("<|im_start|>", "<|begin_of_text|>")
)
QUERY = "the red cat"

# For each family, as its real template writes them: the turn of a text, the turn of a picture, and
# the content of both.
TURNS = {
    "qwen2_vl": (
        QWEN2 + CHATML.format(QUERY),
        QWEN2 + CHATML.format(QWEN_PICTURE),
        QWEN_PICTURE + QUERY,
    ),
    "qwen2_5_vl": (
        QWEN2 + CHATML.format(QUERY),
        QWEN2 + CHATML.format(QWEN_PICTURE),
        QWEN_PICTURE + QUERY,
    ),
    "qwen3_vl": (CHATML.format(QUERY), CHATML.format(QWEN_PICTURE), QWEN_PICTURE + QUERY),
    "llava": (
        f"<s> USER: {QUERY} ASSISTANT:",
        "<s> USER: <image>\nASSISTANT:",
        "<image>\n" + QUERY,
    ),
    "llava_onevision": (
        ONEVISION.format("\n" + QUERY),
        ONEVISION.format("<image>"),
        "<image>\n" + QUERY,
    ),
    "smolvlm": (SMOL.format(" " + QUERY), SMOL.format(SMOL_PICTURE), SMOL_PICTURE + QUERY),
    "idefics3": (IDEFICS.format(" " + QUERY), IDEFICS.format(SMOL_PICTURE), SMOL_PICTURE + QUERY),
    "internvl": (
        CHATML.format(QUERY),
        CHATML.format("<img><IMG_CONTEXT></img>\n"),
        "<img><IMG_CONTEXT></img>\n" + QUERY,
    ),
}
WORKING = tuple(TURNS)
# `make install` puts it there, where no library imports it
TORCHVISION = Path(sys.prefix) / "torchvision-for-tests"


@pytest.fixture(scope="module")
def measurements(tmp_path_factory):
    """The measurements of tests/tiny_backbones.py for each family."""
    assert TORCHVISION.is_dir(), f"{TORCHVISION} is missing; `make install` puts it there"
    output = tmp_path_factory.mktemp("backbones")
    script = Path(__file__).with_name("tiny_backbones.py")
    paths = [str(TORCHVISION), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.run(
        [sys.executable, script, output, *WORKING, "gemma3"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return {path.stem: json.loads(path.read_text()) for path in output.glob("*.json")}


@pytest.mark.parametrize("family", WORKING)
def test_family_trains_and_gives_the_same_vectors_on_every_way(measurements, family):
    result = measurements[family]
    assert "error" not in result, result
    losses = [result[name] for name in ("contrastive", "orthogonality", "matching", "grad_norm")]
    assert np.isfinite(losses).all()
    assert min(losses) > 0
    assert result["loaded"] < 1e-5  # loaded from disk as it was trained
    assert result["alone"] < 1e-5  # alone as in a padded batch
    assert result["features"] < 1e-5  # from the vision tower's features as from pictures


@pytest.mark.parametrize("family", WORKING)
def test_limits_of_pixels_are_those_of_the_checkpoint(measurements, family):
    """A picture of 56 x 56 is four patches, or one if it may have 1,568 pixels."""
    backbone, trained, loaded, encoded = measurements[family]["visual_tokens"]
    assert trained == loaded == encoded
    assert [backbone, trained] == ([4, 1] if "qwen" in family else [backbone, backbone])


@pytest.mark.parametrize("family", WORKING)
def test_an_attention_map_is_the_first_pictures_grid_of_tokens(measurements, family):
    """Of a picture of 90 x 40 pixels."""
    shapes = measurements[family]["attention"]
    grids = {"llava": (4, 4), "smolvlm": (2, 2), "idefics3": (2, 2)}
    if family in ("llava_onevision", "internvl"):
        assert "form no grid: the model cuts pictures into tiles" in shapes
    else:
        assert shapes == [[4, *grids.get(family, (1, 3))]] * 2


@pytest.mark.parametrize("family", WORKING)
@pytest.mark.parametrize("matching", ["match", "match jointly"])
def test_family_answers_packed_questions_as_single_ones(measurements, family, matching):
    for view, (packed, single) in measurements[family][matching].items():
        np.testing.assert_allclose(packed, single, atol=1e-5, err_msg=view)
        assert len(set(packed)) == 3, view  # no two documents are equal in any view


@pytest.mark.parametrize("family", WORKING)
def test_a_joint_question_is_an_ordinary_chat(measurements, family):
    """Mask and positions are those that the model itself gives an ordinary chat."""
    packed, _ = measurements[family]["match jointly"]["raw-raw"]
    np.testing.assert_allclose(packed, measurements[family]["chats"], atol=1e-5)


@pytest.mark.parametrize("family", WORKING)
def test_training_reads_the_tokens_that_encoding_reads(measurements, family):
    readings = measurements[family]["readings"]
    assert len(readings) == 16
    for kind, (in_training, encoded, *texts) in readings.items():
        assert in_training == encoded, (kind, texts)


@pytest.mark.parametrize("family", WORKING)
def test_turns_and_questions_have_the_structure_of_the_real_template(measurements, family):
    text, picture, content = TURNS[family]
    readings, tail = (
        measurements[family]["readings"],
        "".join(f"<|query_emb_{i}|>" for i in range(4)),
    )
    assert readings["text, query"][2] == text + tail
    assert readings["picture, query"][2] == picture + tail
    assert readings["two pictures, query"][2].count("assistant") == picture.count("assistant")
    assert readings["both, query"][2].endswith(content + text.split(QUERY)[1] + tail)
    contents = {
        kind: readings[f"{kind}, query"][4] for kind in ("text", "both", "blanks", "lines")
    }
    contents["blanks"] = contents["blanks"].lstrip()  # SentencePiece decodes one blank less
    assert contents == {
        "text": QUERY,
        "both": content,
        "blanks": "the red cat ",
        "lines": "\n\nthe red\n\ncat\n",
    }

    prompt = "Is the document relevant to the query? Answer only Yes or No."
    turn = text.replace(QUERY, prompt + "\nQuery:\n{}\nDocument:\n{}\nRelevant?")
    expected = turn.format(QUERY, content.replace(QUERY, "a dog"))
    # SentencePiece begins each segment with a blank
    question = measurements[family]["question"]
    assert re.sub(" ?\n ?", "\n", question) == re.sub(" ?\n ?", "\n", expected)


@pytest.mark.parametrize("family", WORKING)
def test_control_tokens_in_a_text_are_refused_on_every_way(measurements, family):
    special, accepted, ordinary = measurements[family]["control"]
    assert len(special) >= 8 + 5  # the learnable ones and the family's
    assert accepted == []
    assert bool(ordinary) == (
        family.startswith("qwen") or family in ("llava_onevision", "internvl")
    )


def test_bidirectional_pictures_are_refused_with_the_reason(measurements):
    message = measurements["gemma3"]["error"]
    assert "Gemma3ForConditionalGeneration" in message
    assert "see those behind them" in message
    assert "Qwen2-VL" in message
