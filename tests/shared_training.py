"""Small training runs on the tiny backbone, and what they log."""

import json
import socket

import torch
from transformers import TrainerCallback

from rematch import ReMatch
from rematch.errors import TrainingError
from rematch.train.recipe import Recipe


def small_recipe(backbone, output, **sections):
    """Eight steps with LoRA, dropout, gradient cache and checkpoints; sections change settings."""
    settings = {
        "model": {
            "backbone": str(backbone),
            "num_tokens": 2,
            "lora": {"r": 4, "alpha": 8, "dropout": 0.2},
        },
        "loss": {"learn_temperature": True, "gradient_cache": True},
        "train": {
            "output": str(output),
            "steps": 8,
            "batch_size": 4,
            "save_every": 2,
            "log_every": 1,
            "workers": 0,
        },
    }
    for name, changes in sections.items():
        settings[name] = settings.get(name, {}) | changes
    return Recipe.model_validate(settings)


def step_logs(output):
    """The log entries of a finished run that have a loss."""
    return [row for row in json.loads((output / "log.json").read_text()) if "loss" in row]


def write_rows(path, rows):
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def free_port():
    """A TCP port that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Interrupt(TrainerCallback):
    """Ends a run after a step, before that is saved."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise TrainingError("interrupted")


def assert_same_run(output, expected):
    """The same losses in the log, and the same weights."""
    losses, expected_losses = (
        [row["loss"] for row in step_logs(path)] for path in (output, expected)
    )
    assert losses == expected_losses
    weights, expected_weights = (ReMatch(path).state_dict() for path in (output, expected))
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)
    assert not list(output.glob("checkpoint-*"))
