"""How many training steps fit into the demo's time on this machine."""

import time
from dataclasses import dataclass

import numpy as np
import torch

from rematch.train.build import build_collator, build_loss, build_model, precision_of
from rematch.train.recipe import Recipe
from rematch.train.sources import build_dataset

MINUTES = 5.0
MIN_STEPS, MAX_STEPS = 30, 100  # with 30, both models are far above chance (docs/log.md)
TIMED_STEPS = 4  # of which the first does not count
_LOADING = 15.0  # seconds that are not measured: imports, the report
_START = 4.0  # seconds of a training run besides its steps
# share of the remaining time to plan with: real steps took up to 1.25 times as long as timed ones
_SHARE = 0.7


@dataclass(frozen=True)
class Pace:
    """The speed of this machine.

    Attributes:
        step_seconds: Duration of a training step of each model.
        evaluation_seconds: Duration of evaluating one model.
        remaining_seconds: Time that remains for training and evaluating.
    """

    step_seconds: dict[str, float]
    evaluation_seconds: float
    remaining_seconds: float

    @classmethod
    def measure(
        cls, recipes: dict[str, Recipe], evaluation_seconds: float, start: float
    ) -> "Pace":
        """Time a few steps of each recipe.

        Args:
            recipes: Recipe of each model.
            evaluation_seconds: Duration of evaluating one model.
            start: Time at which the demo started, as ``time.monotonic()``.
        """
        step_seconds = {name: seconds_per_step(recipe) for name, recipe in recipes.items()}
        remaining = MINUTES * 60 - _LOADING - (time.monotonic() - start)
        return cls(step_seconds, evaluation_seconds, remaining)

    @property
    def steps(self) -> int:
        """The steps per model that fit, at least ``MIN_STEPS`` and at most ``MAX_STEPS``.

        >>> Pace({"contrastive": 1.0, "rematch": 3.0}, 20.0, remaining_seconds=260.0).steps
        33
        >>> Pace({"contrastive": 5.0, "rematch": 9.0}, 20.0, remaining_seconds=240.0).steps
        30
        """
        other = len(self.step_seconds) * (self.evaluation_seconds + _START)
        training = self.remaining_seconds * _SHARE - other
        return max(MIN_STEPS, min(MAX_STEPS, int(training / sum(self.step_seconds.values()))))

    def duration(self, steps: int) -> float:
        """Seconds of training and evaluating all models with so many steps each."""
        evaluations = len(self.step_seconds) * self.evaluation_seconds
        return steps * sum(self.step_seconds.values()) + evaluations

    def explain(self, steps: int, *, requested: bool) -> str:
        """One sentence on the number of steps and the reason for it.

        Args:
            steps: Training steps per model.
            requested: Whether the user chose the number.
        """
        timings = ", ".join(f"{name} {s:.2f} s" for name, s in self.step_seconds.items())
        sentence = (
            f"{steps} training steps per model (time per step: {timings}; per evaluation: "
            f"{self.evaluation_seconds:.0f} s)"
        )
        if requested:
            return f"{sentence}, as requested."
        late = (self.duration(steps) - self.remaining_seconds) / 60
        if late > 0:
            return (
                f"{sentence}: the minimum for both models to be above chance. On this machine the "
                f"demo will take about {MINUTES + late:.1f} minutes instead of {MINUTES:.0f}."
            )
        if steps == MAX_STEPS:
            return f"{sentence}: the maximum of the demo."
        return f"{sentence}: as many as fit into {MINUTES:.0f} minutes on this machine."


def seconds_per_step(recipe: Recipe) -> float:
    """Time a few training steps: the median of collating a batch, forward and backward pass."""
    model = build_model(recipe).train()
    loss, collator = build_loss(recipe, model), build_collator(recipe, model)
    rows, size = build_dataset(recipe), recipe.train.batch_size
    bf16 = precision_of(recipe).bf16
    seconds = []
    for step in range(TIMED_STEPS):
        start = time.perf_counter()
        batch = collator([rows[step * size + i] for i in range(size)])["batch"]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            total = torch.stack(list(loss([batch]).values())).sum()
        total.backward()  # type: ignore[no-untyped-call]
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))
