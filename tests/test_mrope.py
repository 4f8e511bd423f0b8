"""Qwen2-VL's three-dimensional positions in packed matching, on a tiny model (its processor would
need torchvision).
"""

import pytest
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from rematch.backbone.module import Backbone
from rematch.backbone.pictures import Pictures, feature_inputs, picture_features
from rematch.backbone.reading import Reader
from rematch.matching import Question, Segment, View, lay_out, pack

IMAGE, START, END = 5, 3, 4


class Bare(Backbone):
    """A backbone around a model in memory, without a processor."""

    def __init__(self, model):
        torch.nn.Module.__init__(self)
        self.model = model
        self.reader = Reader.__new__(Reader)
        self.reader._rope_index = self.base.get_rope_index


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    text = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [1, 1, 2],
            "rope_theta": 10000.0,
        },
    }
    vision = {
        "depth": 2,
        "embed_dim": 16,
        "hidden_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "mlp_ratio": 2,
    }
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return Bare(Qwen2VLForConditionalGeneration(config).double().eval())


def picture_segment(backbone, before, height, width, after):
    """Text, a picture of height × width merged patches, text; and its patches and grid."""
    ids = torch.tensor([*before, START, *[IMAGE] * (height * width), END, *after])
    grid = torch.tensor([1, 2 * height, 2 * width])
    pixels = torch.randn(4 * height * width, 3 * 2 * 4 * 4, dtype=torch.float64)
    tokens = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).int(),
        "image_grid_thw": grid[None],
    }
    positions = backbone.reader._positions(tokens)
    return Segment(ids, positions), pixels, grid


def text_segment(backbone, *ids):
    ids = torch.tensor(ids)
    return Segment(ids, backbone.reader._positions({"input_ids": ids}))


@pytest.mark.parametrize("joint", [False, True])
def test_segment_positions_join_to_those_of_the_whole_sequence(backbone, joint):
    prompt, slot = text_segment(backbone, 10, 11), text_segment(backbone, 12, 13)
    query, _, grid_q = picture_segment(backbone, [20], 2, 3, [21, 22])
    document, _, grid_d = picture_segment(backbone, [30, 31], 3, 2, [32])
    questions = [Question(View.RAW_RAW, 0)]
    segments = lay_out(prompt, {"raw": query}, [{"raw": document}], slot, questions, 1, joint)
    if not joint:
        segments = segments[1:]  # without the documents' prompt, an ordinary sequence
    packed = pack([segments], 0)
    ids = packed.input_ids
    whole, _ = backbone.base.get_rope_index(
        ids, (ids == IMAGE).int(), image_grid_thw=torch.stack([grid_q, grid_d])
    )
    assert torch.equal(packed.position_ids, whole)


@pytest.mark.parametrize("joint", [False, True])
def test_packed_documents_equal_one_at_a_time(backbone, joint):
    torch.manual_seed(1)
    prompt, slot = text_segment(backbone, 10, 11), text_segment(backbone, 12, 13)
    query, *query_picture = picture_segment(backbone, [20], 2, 2, [21])
    documents = [
        picture_segment(backbone, [30], 2, 3, [31]),
        picture_segment(backbone, [33, 34], 1, 2, [35]),
    ]

    def logits(chosen):
        views = [{"raw": segment} for segment, _, _ in chosen]
        segments = lay_out(
            prompt,
            {"raw": query},
            views,
            slot,
            [Question(View.RAW_RAW, i) for i in range(len(chosen))],
            1,
            joint,
        )
        pictures = [query_picture, *[(pixels, grid) for _, pixels, grid in chosen]]
        visions = [
            {"pixel_values": pixels, "image_grid_thw": grid[None]} for pixels, grid in pictures
        ]
        tokens = [int(grid.prod()) // 4 for _, grid in pictures]
        with torch.no_grad():
            features = picture_features(backbone.base, Pictures.collect(visions, tokens))
            return backbone.answer_logits(vars(pack([segments], 0)) | feature_inputs(features))[0]

    together = logits(documents)
    separate = torch.stack([logits([document])[0] for document in documents])
    assert (
        together - separate
    ).abs().max() <= 1e-6  # the rotary tables and norms of Qwen2-VL are float32
    assert (together[0] - together[1]).abs().max() > 1e-3
