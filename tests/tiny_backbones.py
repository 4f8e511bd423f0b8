"""Tiny models of real architectures, built offline from their config classes and real processors,
and put to use.

    python tests/tiny_backbones.py DIRECTORY NAME …      # writes DIRECTORY/NAME.json: what was found, or the error

A script and no test: video processors want a torchvision, and the one on PyPI fits no CPU build of
this torch; it is importable after two declarations, which the process of the other tests shall do
without.
"""

import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch

if __name__ == "__main__":
    torch.library.define(
        "torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )
    torch.library.define(
        "torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )

import transformers as t
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from rematch import ReMatch
from rematch.errors import RematchError
from rematch.matching import Question, View
from rematch.prompts import MATCH_DOCUMENT, MATCH_QUERY, MATCH_QUESTION, MATCH_TASK, NO, YES
from rematch.train.collator import Collator
from rematch.train.loss import ReMatchLoss
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
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


TEMPLATES = (
    Path(__file__).parent / "data" / "chat_templates"
)  # its README says where they are from
CORPUS = [
    YES,
    NO,
    MATCH_TASK,
    MATCH_QUERY,
    MATCH_DOCUMENT,
    MATCH_QUESTION,
    "\n\n",
    "You are a helpful assistant.",
]
CORPUS += [
    "system user assistant User: Assistant: USER: ASSISTANT:",
    "the red cat 0123456789",
    "a dog, number",
]


def template(family):
    return (TEMPLATES / f"{family}.jinja").read_text()


@cache
def words(llama=False):
    """A small vocabulary and its merges: byte-level, as in most families, or with Llama's "▁" and
    byte fallback.
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
    """A family's own tokenizer class with its special tokens.

    Args:
        kind: The class; Llama 3's has no name of its own.
        special: Tokens that the model reads as control tokens.
        ordinary: Tokens that were added as text, such as those of tool calls.
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
    """Qwen 2's, 2.5's and 3's, which other families build on."""
    chat = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}
    return tokenizer(
        t.Qwen2Tokenizer, (*chat, *special), ("<tool_call>", "</tool_call>"), named, **ends
    )


def ids(tok, **names):
    return {key: tok.convert_tokens_to_ids(token) for key, token in names.items()}


# ---- Qwen ---------------------------------------------------------------------------------------

QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_pad|>")
QWEN += (
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
    tok, edge = (
        tokenizer(t.PreTrainedTokenizerFast, TILES, named=IDEFICS, **ends),
        {"longest_edge": 56},
    )
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
    tok, size = (
        qwen_tokenizer(*boxes, named=names | {"video_token": "<video>"}),
        {"height": 56, "width": 56},
    )
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
    f.__name__: f
    for f in (
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


# ---- what is done with each ---------------------------------------------------------------------


def own_data(directory):
    """Twelve triplets: texts, pictures of several sizes, and both."""
    rng = np.random.default_rng(0)
    rows = []
    for i, (width, height) in enumerate([(56, 56), (90, 40), (40, 90)] * 4):
        for name in ("a", "b"):
            noise = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(noise).save(directory / f"{name}{i}.png")
        query = [
            f"the cat {i}",
            {"text": "the red cat", "image": f"a{i}.png"},
            {"image": f"a{i}.png"},
        ][i % 3]
        rows.append(
            {"query": query, "positive": {"image": f"b{i}.png"}, "negative": f"a dog, number {i}"}
        )
    file = directory / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def readings(model, pictures):
    """For inputs of every kind: ids as training reads them, as ``encode`` does, and both as text;
    and the content.
    """
    kinds = {
        "text": "the red cat",
        "blanks": "  the red cat ",
        "lines": "\n\nthe red\n\ncat\n",
        "picture": pictures[0],
        "both": {"text": "the red cat", "image": pictures[0]},
        "both with lines": {"text": "\nthe red cat \n", "image": pictures[1]},
        "two pictures": {"image": pictures[:2]},
        "two and text": {"text": "the red cat", "image": pictures[1:]},
    }
    reader, rows = model.backbone.reader, {}
    for kind, value in kinds.items():
        reading = reader.read(value)
        for task in ("query", "document"):
            own, encoded = (
                reader.with_learnable_tokens(reading, task).ids,
                model.preprocess([value], task=task)["input_ids"][0],
            )
            texts = [reader.describe(ids) for ids in (own, encoded, reading.content.ids)]
            rows[f"{kind}, {task}"] = [own.tolist(), encoded.tolist(), *texts]
    return rows


def question(model, query, document):
    """What a matching question reads, as text: all but the prompt that its document sees."""
    reader = model.backbone.reader
    packed, _ = model.backbone.questions.pack(
        [(reader.read(query), [reader.read(document)])], [[Question(View.RAW_RAW, 0)]]
    )
    return reader.describe(packed.input_ids[0][packed.segments[0] > 0])


def control_tokens(model):
    """Every special token; those that are not refused, and by whom; and the added tokens that are
    ordinary text.
    """
    backbone = model.backbone
    added = backbone.tokenizer.added_tokens_decoder.values()
    special = [token.content for token in added if token.special]
    ways = {
        "train": lambda text: backbone.reader.read(text, 1),
        "preprocess": lambda text: backbone.preprocess(["a dog", text]),
        "prompt": lambda text: backbone.preprocess(["a dog"], prompt=text),
        "encode": lambda text: model.encode_query(["a dog", text]),
        "match": lambda text: model.match(["a dog", "a dog"], ["a dog", text]),
    }
    accepted = []
    for number, token in enumerate(special):
        for way in list(ways)[
            : 5 if number == 0 else 3
        ]:  # the last two go the way of the first two
            try:
                ways[way](f"the {token} cat")
                accepted.append([way, token])
            except RematchError as error:
                if f"its text holds {token}, which the model reads as a control token" not in str(
                    error
                ):
                    accepted.append([way, token, str(error)])
    ordinary = [token.content for token in added if not token.special]
    model.encode_query(
        [f"the {token} cat" for token in [*ordinary, "a < b <| c |> <a href> [INST]"]]
    )
    return special, accepted, ordinary


def put_to_use(path, directory):
    """Train an adapter with all losses, load it, encode and match; figures for the test to judge."""
    data = own_data(directory)
    settings = [
        f"model.backbone={path}",
        f"data.source={data}",
        f"train.output={directory / 'model'}",
    ]
    settings += [
        "model.num_tokens=4",
        "model.lora.r=4",
        "train.steps=2",
        "train.batch_size=6",
        "train.workers=0",
    ]
    settings += ["train.mini_batch_tokens=400", "loss.gradient_cache=true", "train.log_every=1"]
    if (
        "qwen" in directory.name
    ):  # the others scale pictures to a fixed size, or cut them into tiles
        settings += ["model.max_pixels=1568"]
    (directory / "recipe.yaml").write_text("{}")
    trained = train(load_recipe(directory / "recipe.yaml", settings), quiet=True)
    log = [
        row for row in json.loads((directory / "model" / "log.json").read_text()) if "loss" in row
    ]
    found = {
        name: log[-1][name] for name in ("contrastive", "orthogonality", "matching", "grad_norm")
    }

    model = ReMatch(directory / "model")
    pictures = [Image.open(directory / f"a{i}.png") for i in range(3)]
    inputs = [
        "the cat",
        {"text": "the red cat", "image": pictures[1]},
        {"image": pictures[2]},
        {"image": pictures[0]},
    ]
    vectors = model.encode_query(inputs)
    found["loaded"] = float(np.abs(vectors - trained.encode_query(inputs)).max())
    found["alone"] = float(
        np.abs(vectors - np.stack([model.encode_query(one) for one in inputs])).max()
    )

    found["readings"] = readings(model, pictures)
    found["question"] = question(model, "the red cat", {"text": "a dog", "image": pictures[0]})
    found["control"] = control_tokens(model)
    square = {"image": Image.new("RGB", (56, 56), "red")}
    picture_token = model.backbone.reader.picture_token_id
    found["visual_tokens"] = [
        ReMatch.from_backbone(str(path), 4).backbone.reader.read(square).visual_tokens,
        trained.backbone.reader.read(square).visual_tokens,
        model.backbone.reader.read(square).visual_tokens,
        int((model.preprocess([square])["input_ids"] == picture_token).sum()),
    ]

    rows = [
        {"query": one, "positive": inputs[i - 1], "negative": "a dog"}
        for i, one in enumerate(inputs)
    ]
    batch = Collator(model, batch_tokens=300)(rows)["batch"]
    loss = ReMatchLoss(model)
    with (
        torch.no_grad()
    ):  # the frozen tower's features, handed in, against the ordinary way through the processor
        embedded = torch.cat(
            [loss.embed(step, loss.passes(batch))[0] for step in batch.embedding]
        ).mean(1)
    seen = torch.nn.functional.normalize(embedded[batch.inputs[:, 0]], dim=-1)
    found["features"] = float(np.abs(vectors - seen.numpy()).max())

    documents = ["a dog", {"image": pictures[0]}, {"image": pictures[1]}]
    found["match"] = {}
    for view in View:
        packed = model.match([inputs[1]] * 3, documents, view)
        # the query is computed once, the documents behind it
        p_yes = 1 / (1 + np.exp(-model.score(inputs[1], documents * 6, view)))
        assert np.allclose(p_yes, np.tile(packed, 6), atol=1e-5), (view, p_yes, packed)
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
