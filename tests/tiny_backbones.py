"""Tiny models of real architectures, built offline from their config classes and real processors, and put to use.

    python tests/tiny_backbones.py DIRECTORY NAME …      # writes DIRECTORY/NAME.json: what was found, or the error

A script and no test: video processors want a torchvision, and the one on PyPI fits no CPU build of this torch; it is
importable after two declarations, which the process of the other tests shall do without.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

if __name__ == "__main__":
    torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import transformers as t
from PIL import Image
from transformers import AutoTokenizer

from rematch import ReMatch
from rematch.backbone import resolve
from rematch.errors import RematchError
from rematch.losses import ReMatchLoss
from rematch.matching import VIEWS
from rematch.train.collator import Collator
from rematch.train.recipe import load_recipe
from rematch.train.run import train

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
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def tokenizer(*special, **named):
    """The packaged base's words, with the family's special tokens; some families look theirs up by attribute."""
    found = AutoTokenizer.from_pretrained(resolve("rematch-base"), extra_special_tokens=named)
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *special, *named.values()]})
    found.model_max_length = 4096
    return found


def template(picture):
    """ChatML, with what the family writes where a picture stands."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{% if p.type == 'image' %}" + picture + "{% else %}{{ p.text }}{% endif %}"
        "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def ids(tok, **names):
    return {key: tok.convert_tokens_to_ids(token) for key, token in names.items()}


# ---- Qwen -----------------------------------------------------------------------------------------------------------

QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def qwen_ids(tok):
    start, end, image, video = QWEN
    return ids(tok, image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end)


def qwen_processor(kind, tok, patch=14, pixels=(784, 3136)):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    images = Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=2, temporal_patch_size=2, min_pixels=pixels[0], max_pixels=pixels[1]
    )
    video = t.Qwen3VLVideoProcessor() if kind is t.Qwen3VLProcessor else t.Qwen2VLVideoProcessor()
    start, end, image, _ = QWEN
    return kind(images, tok, video, chat_template=template(start + image + end))


def qwen2_vl(text=(), vision=(), pixels=(784, 3136)):
    tok = tokenizer(*QWEN)
    config = t.Qwen2VLConfig(
        text_config=TEXT | {"vocab_size": len(tok), "rope_parameters": MROPE} | dict(text),
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2} | dict(vision),
        **qwen_ids(tok),
    )
    return t.Qwen2VLForConditionalGeneration(config), qwen_processor(t.Qwen2VLProcessor, tok, pixels=pixels)


def qwen2_5_vl():
    tok = tokenizer(*QWEN)
    vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
    config = t.Qwen2_5_VLConfig(
        text_config=TEXT | {"vocab_size": len(tok), "rope_parameters": MROPE},
        vision_config=vision | {"fullatt_block_indexes": [1], "window_size": 56},
        **qwen_ids(tok),
    )
    return t.Qwen2_5_VLForConditionalGeneration(config), qwen_processor(t.Qwen2_5_VLProcessor, tok)


def qwen3_vl():
    tok = tokenizer(*QWEN)
    vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
    config = t.Qwen3VLConfig(
        text_config=TEXT | {"vocab_size": len(tok), "rope_parameters": MROPE | {"mrope_interleaved": True}},
        vision_config=vision | {"deepstack_visual_indexes": [0], "num_position_embeddings": 64, "patch_size": 14},
        **qwen_ids(tok),
    )
    return t.Qwen3VLForConditionalGeneration(config), qwen_processor(t.Qwen3VLProcessor, tok)


# ---- others ---------------------------------------------------------------------------------------------------------


def siglip(size):
    return t.SiglipVisionConfig(**VISION, image_size=size, patch_size=14, vision_use_head=False)


def llava_onevision():
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    tok = tokenizer("<image>", "<video>")
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
        chat_template=template("<image>"),
    )
    return t.LlavaOnevisionForConditionalGeneration(config), processor


IDEFICS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}


def idefics_config(kind, tok):
    return kind(
        text_config=t.LlamaConfig(**TEXT, vocab_size=len(tok), pad_token_id=tok.pad_token_id),
        vision_config=VISION | {"image_size": 56, "patch_size": 14},
        scale_factor=2,
        pad_token_id=tok.pad_token_id,
        **ids(tok, image_token_id="<image>"),
    )


def idefics3():
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tok, edge = tokenizer(**IDEFICS), {"longest_edge": 56}
    images = Idefics3ImageProcessorPil(size=edge, max_image_size=edge)
    processor = t.Idefics3Processor(images, tok, image_seq_len=4, chat_template=template("<image>"))
    return t.Idefics3ForConditionalGeneration(idefics_config(t.Idefics3Config, tok)), processor


def smolvlm():
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    tok, edge = tokenizer(**IDEFICS), {"longest_edge": 56}
    images = SmolVLMImageProcessorPil(size=edge, max_image_size=edge)
    video = t.SmolVLMVideoProcessor(size=edge, max_image_size=edge)
    processor = t.SmolVLMProcessor(images, tok, video, image_seq_len=4, chat_template=template("<image>"))
    return t.SmolVLMForConditionalGeneration(idefics_config(t.SmolVLMConfig, tok)), processor


def internvl():
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tok, size = tokenizer(**names, video_token="<video>"), {"height": 56, "width": 56}
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
        chat_template=template("<IMG_CONTEXT>\n"),
    )
    return t.InternVLForConditionalGeneration(config), processor


def gemma3():
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tok = tokenizer(**names)
    config = t.Gemma3Config(
        text_config=TEXT | {"vocab_size": len(tok), "sliding_window": 64, "query_pre_attn_scalar": 8},
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
    processor = t.Gemma3Processor(images, tok, image_seq_length=4, chat_template=template("<start_of_image>"))
    return t.Gemma3ForConditionalGeneration(config), processor


FAMILIES = {
    f.__name__: f for f in (qwen2_vl, qwen2_5_vl, qwen3_vl, llava_onevision, smolvlm, idefics3, internvl, gemma3)
}


# ---- what is done with each -----------------------------------------------------------------------------------------


def own_data(directory):
    """Twelve triplets: texts, pictures of several sizes, and both."""
    rng = np.random.default_rng(0)
    rows = []
    for i, (width, height) in enumerate([(56, 56), (90, 40), (40, 90)] * 4):
        for name in ("a", "b"):
            noise = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(noise).save(directory / f"{name}{i}.png")
        query = [f"the cat {i}", {"text": "the red cat", "image": f"a{i}.png"}, {"image": f"a{i}.png"}][i % 3]
        rows.append({"query": query, "positive": {"image": f"b{i}.png"}, "negative": f"a dog, number {i}"})
    file = directory / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def put_to_use(path, directory):
    """Train an adapter with all losses, load it, encode and match; figures for the test to judge."""
    data = own_data(directory)
    settings = [f"model.backbone={path}", f"data.source={data}", f"train.output={directory / 'model'}"]
    settings += ["model.num_tokens=4", "model.lora.r=4", "train.steps=2", "train.batch_size=6", "train.workers=0"]
    settings += ["train.mini_batch_tokens=400", "loss.gradient_cache=true", "train.log_every=1"]
    (directory / "recipe.yaml").write_text("{}")
    trained = train(load_recipe(directory / "recipe.yaml", settings), quiet=True)
    log = [row for row in json.loads((directory / "model" / "log.json").read_text()) if "loss" in row]
    found = {name: log[-1][name] for name in ("contrastive", "orthogonality", "matching", "grad_norm")}

    model = ReMatch(directory / "model")
    pictures = [Image.open(directory / f"a{i}.png") for i in range(3)]
    inputs = ["the cat", {"text": "the red cat", "image": pictures[1]}, {"image": pictures[2]}, {"image": pictures[0]}]
    vectors = model.encode_query(inputs)
    found["loaded"] = float(np.abs(vectors - trained.encode_query(inputs)).max())
    found["alone"] = float(np.abs(vectors - np.stack([model.encode_query(one) for one in inputs])).max())

    rows = [{"query": one, "positive": inputs[i - 1], "negative": "a dog"} for i, one in enumerate(inputs)]
    batch = Collator(model, tokens=300)(rows)["batch"]
    loss = ReMatchLoss(model)
    with torch.no_grad():  # the frozen tower's features, handed in, against the ordinary way through the processor
        embedded = torch.cat([loss.embed(step, batch, loss.see(batch))[0] for step in batch.embedding]).mean(1)
    seen = torch.nn.functional.normalize(embedded[batch.inputs[:, 0]], dim=-1)
    found["features"] = float(np.abs(vectors - seen.numpy()).max())

    documents = ["a dog", {"image": pictures[0]}, {"image": pictures[1]}]
    found["match"] = {}
    for view in VIEWS:
        packed = model.match([inputs[1]] * 3, documents, view)
        many = model.match([inputs[1]] * 18, documents * 6, view)  # the query runs once, the documents behind it
        assert np.allclose(many, np.tile(packed, 6), atol=1e-5), (view, many, packed)
        single = [float(model.match([inputs[1]], [document], view)[0]) for document in documents]
        found["match"][view] = [packed.tolist(), single]
    return found


def main(output, names):
    for name in names:
        directory = output / name
        directory.mkdir(parents=True)
        torch.manual_seed(0)
        model, processor = FAMILIES[name]()
        path = directory / "backbone"
        model.save_pretrained(path)
        processor.save_pretrained(path)
        try:
            found = put_to_use(path, directory)
        except RematchError as error:
            found = {"error": str(error)}
        (output / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
