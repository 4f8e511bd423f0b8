"""Tiny models of real architectures, built offline from their config classes, with real processors
and chat templates.

Video processors need a torchvision, and the one on PyPI does not fit a CPU build of torch; see
``tiny_backbones.py``.
"""

import json
from functools import cache
from pathlib import Path

import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from rematch.prompts import MATCH_DOCUMENT, MATCH_QUERY, MATCH_QUESTION, MATCH_TASK, NO, YES

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEMPLATES = Path(__file__).parent / "data" / "chat_templates"  # its README names the sources
CORPUS = [
    YES,
    NO,
    MATCH_TASK,
    MATCH_QUERY,
    MATCH_DOCUMENT,
    MATCH_QUESTION,
    "\n\n",
    "You are a helpful assistant.",
    "system user assistant User: Assistant: USER: ASSISTANT:",
    "the red cat 0123456789",
    "a dog, number",
]


def template(family):
    return (TEMPLATES / f"{family}.jinja").read_text()


@cache
def words(llama=False):
    """Learn a small vocabulary and its merges.

    It is byte-level, as in most families, or has Llama's "▁" and byte fallback.
    """
    learner = Tokenizer(models.BPE())
    if llama:
        learner.pre_tokenizer = pre_tokenizers.Metaspace()
        first, alphabet = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))], ["▁"]
    else:
        learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        first, alphabet = [], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=first,
        initial_alphabet=alphabet,
        show_progress=False,
        min_frequency=1,
    )
    learner.train_from_iterator(CORPUS, trainer)
    learned = json.loads(learner.to_str())["model"]
    vocabulary, merges = learned["vocab"], [tuple(pair) for pair in learned["merges"]]
    if llama:
        vocabulary["▁▁"] = len(vocabulary)
        merges.insert(0, ("▁", "▁"))  # Llama's first merge: blanks before a word join
    return vocabulary, merges


def tokenizer(kind, special, ordinary=(), named=None, **settings):
    """Make a tokenizer of a family's class with its special tokens.

    Args:
        kind: The class; the generic one for Llama 3's, which has no class of its own.
        special: Tokens that the model reads as control tokens.
        ordinary: Tokens that are added as text, such as those of tool calls.
        named: Special tokens that the processor looks up by attribute.
        settings: ``bos_token`` and the like.
    """
    vocabulary, merges = words(kind is t.LlamaTokenizer)
    if kind is t.PreTrainedTokenizerFast:
        whole = Tokenizer(models.BPE(dict(vocabulary), list(merges)))
        whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        whole.decoder = decoders.ByteLevel()
        bos = settings["bos_token"]
        whole.add_special_tokens([bos])
        whole.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, whole.token_to_id(bos))],
        )
        tok = kind(tokenizer_object=whole, extra_special_tokens=named or {}, **settings)
    else:
        tok = kind(
            vocab=dict(vocabulary),
            merges=list(merges),
            extra_special_tokens=named or {},
            **settings,
        )
    tok.add_special_tokens({"additional_special_tokens": [*special, *(named or {}).values()]})
    tok.add_tokens(list(ordinary))
    tok.model_max_length = 4096
    return tok


def qwen_tokenizer(*special, named=None):
    """Make the tokenizer of Qwen 2, 2.5 and 3, which other families use too."""
    chat = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}
    return tokenizer(
        t.Qwen2Tokenizer, (*chat, *special), ("<tool_call>", "</tool_call>"), named, **ends
    )


def ids(tok, **names):
    return {key: tok.convert_tokens_to_ids(token) for key, token in names.items()}


# ---- Qwen ---------------------------------------------------------------------------------------

QWEN = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_pad|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
)


def qwen_ids(tok):
    start, end, image, video = QWEN[:4]
    return ids(
        tok,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )


def qwen_processor(kind, tok, family, patch=14, pixels=(784, 3136)):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    images = Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=2,
        temporal_patch_size=2,
        min_pixels=pixels[0],
        max_pixels=pixels[1],
    )
    video = t.Qwen3VLVideoProcessor() if kind is t.Qwen3VLProcessor else t.Qwen2VLVideoProcessor()
    return kind(images, tok, video, chat_template=template(family))


def qwen2_vl(text=(), vision=(), pixels=(784, 3136)):
    tok = qwen_tokenizer(*QWEN)
    config = t.Qwen2VLConfig(
        text_config=TEXT | {"vocab_size": len(tok), "rope_parameters": MROPE} | dict(text),
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
        }
        | dict(vision),
        **qwen_ids(tok),
    )
    return t.Qwen2VLForConditionalGeneration(config), qwen_processor(
        t.Qwen2VLProcessor, tok, "qwen2_vl", pixels=pixels
    )


def qwen2_5_vl():
    tok = qwen_tokenizer(*QWEN)
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "out_hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 32,
    }
    config = t.Qwen2_5_VLConfig(
        text_config=TEXT | {"vocab_size": len(tok), "rope_parameters": MROPE},
        vision_config=vision | {"fullatt_block_indexes": [1], "window_size": 56},
        **qwen_ids(tok),
    )
    return t.Qwen2_5_VLForConditionalGeneration(config), qwen_processor(
        t.Qwen2_5_VLProcessor, tok, "qwen2_5_vl"
    )


def qwen3_vl():
    tok = qwen_tokenizer(*QWEN)
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "out_hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 32,
    }
    config = t.Qwen3VLConfig(
        text_config=TEXT
        | {"vocab_size": len(tok), "rope_parameters": MROPE | {"mrope_interleaved": True}},
        vision_config=vision
        | {"deepstack_visual_indexes": [0], "num_position_embeddings": 64, "patch_size": 14},
        **qwen_ids(tok),
    )
    return t.Qwen3VLForConditionalGeneration(config), qwen_processor(
        t.Qwen3VLProcessor, tok, "qwen3_vl"
    )


# ---- others -------------------------------------------------------------------------------------


def siglip(size):
    return t.SiglipVisionConfig(**VISION, image_size=size, patch_size=14, vision_use_head=False)


def llava():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    tok = tokenizer(t.LlamaTokenizer, ("<image>",), add_bos_token=True, **ends)
    config = t.LlavaConfig(
        text_config=t.LlamaConfig(**TEXT, vocab_size=len(tok)),
        vision_config=t.CLIPVisionConfig(
            **VISION, image_size=56, patch_size=14, projection_dim=16
        ),
        image_seq_length=16,
        **ids(tok, image_token_index="<image>"),
    )
    processor = t.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tok,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("llava"),
    )
    return t.LlavaForConditionalGeneration(config), processor


def llava_onevision():
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    tok = qwen_tokenizer("<image>", "<video>")
    grids = [[28, 28], [28, 56], [56, 28]]
    config = t.LlavaOnevisionConfig(
        text_config=t.Qwen2Config(**TEXT, vocab_size=len(tok)),
        vision_config=siglip(28),
        image_grid_pinpoints=grids,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        **ids(tok, image_token_index="<image>", video_token_index="<video>"),
    )
    size = {"height": 28, "width": 28}
    processor = t.LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=grids),
        tok,
        t.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=template("llava_onevision"),
    )
    return t.LlavaOnevisionForConditionalGeneration(config), processor


IDEFICS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
TILES = tuple(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7))


def idefics_config(kind, tok):
    return kind(
        text_config=t.LlamaConfig(**TEXT, vocab_size=len(tok), pad_token_id=tok.pad_token_id),
        vision_config=VISION | {"image_size": 56, "patch_size": 14},
        scale_factor=2,
        pad_token_id=tok.pad_token_id,
        **ids(tok, image_token_id="<image>"),
    )


def idefics3():
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    ends = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "pad_token": "<|reserved_special_token_0|>",
    }
    tok = tokenizer(t.PreTrainedTokenizerFast, TILES, named=IDEFICS, **ends)
    edge = {"longest_edge": 56}
    images = Idefics3ImageProcessorPil(size=edge, max_image_size=edge)
    processor = t.Idefics3Processor(
        images, tok, image_seq_len=4, chat_template=template("idefics3")
    )
    return t.Idefics3ForConditionalGeneration(idefics_config(t.Idefics3Config, tok)), processor


def smolvlm():
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    ends = {
        "bos_token": "<|im_start|>",
        "eos_token": "<end_of_utterance>",
        "pad_token": "<|im_end|>",
    }
    tok = tokenizer(
        t.GPT2Tokenizer,
        ("<|endoftext|>", *TILES),
        named=IDEFICS,
        unk_token="<|endoftext|>",
        **ends,
    )
    edge = {"longest_edge": 56}
    images = SmolVLMImageProcessorPil(size=edge, max_image_size=edge)
    video = t.SmolVLMVideoProcessor(size=edge, max_image_size=edge)
    processor = t.SmolVLMProcessor(
        images, tok, video, image_seq_len=4, chat_template=template("smolvlm")
    )
    return t.SmolVLMForConditionalGeneration(idefics_config(t.SmolVLMConfig, tok)), processor


def internvl():
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
    }
    boxes = ("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
    tok = qwen_tokenizer(*boxes, named=names | {"video_token": "<video>"})
    size = {"height": 56, "width": 56}
    config = t.InternVLConfig(
        text_config=t.Qwen2Config(**TEXT, vocab_size=len(tok)),
        vision_config=VISION | {"image_size": [56, 56], "patch_size": [14, 14]},
        image_seq_length=4,
        downsample_ratio=0.5,
        **ids(tok, image_token_id="<IMG_CONTEXT>"),
    )
    processor = t.InternVLProcessor(
        GotOcr2ImageProcessorPil(size=size, crop_to_patches=False),
        tok,
        t.InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=template("internvl"),
    )
    return t.InternVLForConditionalGeneration(config), processor


def gemma3():
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    names = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    ends = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    tok = tokenizer(
        t.PreTrainedTokenizerFast, ("<start_of_turn>", "<end_of_turn>"), named=names, **ends
    )
    config = t.Gemma3Config(
        text_config=TEXT
        | {"vocab_size": len(tok), "sliding_window": 64, "query_pre_attn_scalar": 8},
        vision_config=siglip(56),
        mm_tokens_per_image=4,
        **ids(
            tok,
            image_token_id="<image_soft_token>",
            boi_token_index="<start_of_image>",
            eoi_token_index="<end_of_image>",
        ),
    )
    images = Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    processor = t.Gemma3Processor(
        images, tok, image_seq_length=4, chat_template=template("gemma3")
    )
    return t.Gemma3ForConditionalGeneration(config), processor


FAMILIES = {
    family.__name__: family
    for family in (
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        llava,
        llava_onevision,
        smolvlm,
        idefics3,
        internvl,
        gemma3,
    )
}
