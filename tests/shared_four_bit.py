"""4-bit models on the tiny backbone."""

import torch
from PIL import Image
from transformers import BitsAndBytesConfig

from rematch.train.recipe import Recipe


def four_bit(compute=torch.float32):  # what training chooses where bfloat16 is not native
    """Model arguments that load weights in 4 bits."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )
    return {"quantization_config": config}


def four_bit_recipe(backbone, output, **train):
    """A run of three steps on 4-bit weights; ``train`` changes its settings."""
    settings = {
        "model": {
            "backbone": str(backbone),
            "num_tokens": 2,
            "lora": {"r": 4, "alpha": 8, "dropout": 0.2},
            "four_bit": True,
        },
        "loss": {"learn_temperature": True, "gradient_cache": True},
        "train": {
            "output": str(output),
            "steps": 3,
            "batch_size": 4,
            "save_every": 1,
            "learning_rate": 1e-2,
            "log_every": 1,
            "workers": 0,
        }
        | train,
    }
    return Recipe.model_validate(settings)


def inputs():
    """A text, a picture, and both."""
    picture = Image.new("RGB", (96, 96), (200, 30, 30))
    return ["a dog above a pizza", picture, {"text": "the red one", "image": picture}]
