"""The trainer: sentence-transformers' own, with a fixed order of samples, checkpoints that are
marked when complete, and more metrics in the log.
"""

import re
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformerTrainer
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from rematch.backbone.lora import restore
from rematch.errors import TrainingError
from rematch.train.batch import Batch
from rematch.train.checkpoints import check_checkpoint, loading, mark_complete
from rematch.train.scale import Movement, ScaledSteps, scaled_parts

logger = logging.get_logger("rematch")
SAMPLES_NAMED = 20  # samples that a message names at most
WARNING_AFTER = 400  # steps after which a run should have learned something
LEAST_MOVEMENT = 0.01  # of learnable tokens and projector in a run, relative to their size
PEAK_TFLOPS = {  # dense bfloat16, from the vendors' data sheets
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


class Trainer(SentenceTransformerTrainer):  # type: ignore[misc]  # untyped library
    """Passes :class:`~rematch.train.batch.Batch` to the loss.

    Besides each loss and the gradient norm, it logs the accuracy of Yes and No for each view with
    d+ and with d-, the mean |cosine| between the token vectors of an input, samples and tokens per
    second, how far weights have moved (:class:`~rematch.train.scale.Movement`), the number of
    samples skipped so far, peak memory, and on GPUs in ``PEAK_TFLOPS`` the share of peak
    arithmetic (MFU). A loss that is not finite stops the run; the error names the step and the
    samples.

    Args:
        args: Arguments of ``SentenceTransformerTrainer``.
        factors: What the learning rates of :func:`~rematch.train.scale.scaled_parts` are
            multiplied by; no factor means 1.
        trained_before: Whether tokens and projector come from an earlier run, so that they need
            not move far.
        kwargs: Further arguments of ``SentenceTransformerTrainer``.
    """

    def __init__(
        self,
        *args: Any,
        factors: dict[str, float],
        trained_before: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            # accelerate's policy would round embeddings and the sums of gradients to bfloat16
            is_bf16 = self.accelerator.mixed_precision == "bf16"
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if is_bf16 else None, reduce_dtype=torch.float32
            )
        self._factors = factors
        self._movement = Movement(self.model, trains_projector=self.loss.shows_embeddings)
        self._warns_of_standstill = not trained_before
        self._tokens = self._samples = 0  # since the last log entry
        self._last_log = time.monotonic()
        self._skipped: set[str] = set()
        self._warned_of_guessing = False

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Collect nothing for a model card, which is our own: it would read 1,000 samples."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if is_new:
            parts = scaled_parts(self.model)
            factors = [(r, factor) for name, factor in self._factors.items() for r in parts[name]]
            ScaledSteps(optimizer, factors)
        return optimizer

    def collect_features(self, inputs: dict[str, Any]) -> tuple[list[Any], None]:
        return [inputs["batch"]], None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        batch: Batch = inputs["batch"]
        self._report_skipped(batch.skipped)
        # around all forward passes of the step, so that weights are converted once
        with self.accelerator.autocast():
            result = super().compute_loss(model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if not torch.isfinite(loss):
            names = ", ".join(batch.ids[:SAMPLES_NAMED])
            if len(batch.ids) > SAMPLES_NAMED:
                names += ", …"
            raise TrainingError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()}. The samples of "
                f"this step are {names}. Check them, lower train.learning_rate, or set "
                "train.bf16=false."
            )
        if torch.is_grad_enabled():
            self._samples += len(batch.inputs)
            self._tokens += batch.tokens
        return result

    def _report_skipped(self, skipped: list[str]) -> None:
        """Write each skipped sample once to ``skipped.txt``, and warn of the first ones."""
        if not skipped:
            return
        if not self._skipped:
            self._skipped = self._listed_skipped()
        new = [line for line in dict.fromkeys(skipped) if line not in self._skipped]
        with self._skipped_file.open("a") as stream:
            stream.writelines(line + "\n" for line in new)
        for line in new[: max(0, SAMPLES_NAMED - len(self._skipped))]:
            logger.warning(f"skipped, another sample takes its place: {line}")
        self._skipped.update(new)

    @property
    def _skipped_file(self) -> Path:
        return Path(self.args.output_dir) / "skipped.txt"

    def _listed_skipped(self) -> set[str]:
        """What all processes have skipped, and the run that this one resumes."""
        if not self._skipped_file.exists():
            return set()
        return set(self._skipped_file.read_text(errors="replace").splitlines())

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_loss" in logs:  # the latter is in the last entry
            moved = self._movement.shares()
            logs = logs | {name: round(share, 6) for name, share in moved.items()}
            if self.state.global_step >= min(WARNING_AFTER, self.state.max_steps):
                self._warn_of_standstill(moved)
        if "loss" in logs:
            metrics = self._metrics()
            self._warn_of_guessing(metrics)
            logs = logs | metrics
        super().log(logs, start_time)

    def _metrics(self) -> dict[str, float]:
        """The metrics since the last log entry, of which the counts start again."""
        seconds = time.monotonic() - self._last_log
        metrics: dict[str, float] = self.loss.pop_metrics()
        if skipped := self._listed_skipped():
            metrics["skipped"] = len(skipped)
        processes = self.args.world_size
        metrics["samples_per_second"] = round(self._samples * processes / seconds, 2)
        metrics["tokens_per_second"] = round(self._tokens * processes / seconds, 1)
        if torch.cuda.is_available():
            metrics["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            gpu = torch.cuda.get_device_name()
            peak = next((PEAK_TFLOPS[n] for n in PEAK_TFLOPS if re.search(rf"\b{n}\b", gpu)), None)
            if peak:
                weights = sum(p.numel() for p in self.model.parameters())
                flop = 8 if self.loss.gradient_cache else 6  # per weight and token
                rate = flop * weights * self._tokens / seconds
                metrics["mfu"] = round(rate / (peak * 1e12), 4)
        self._tokens = self._samples = 0
        self._last_log = time.monotonic()
        return metrics

    def _warn_of_guessing(self, metrics: dict[str, float]) -> None:
        """Warn once if Yes/No answers are still no better than guesses."""
        accuracies = [metrics[name] for name in metrics if name.startswith("match_accuracy")]
        if self._warned_of_guessing or not accuracies or self.state.global_step < WARNING_AFTER:
            return
        mean = sum(accuracies) / len(accuracies)
        if 46 < mean < 54:
            self._warned_of_guessing = True
            logger.warning(
                f"step {self.state.global_step}: {mean:.0f} % of the Yes/No answers are correct, "
                "no better than guessing. Matching helps only if the backbone can answer such "
                "questions. Check the hard negatives of the data, or use a stronger backbone."
            )

    def _warn_of_standstill(self, moved: dict[str, float]) -> None:
        """Warn once if learnable tokens or projector are nearly what they were at the start."""
        names = {"moved_tokens": "learnable tokens", "moved_projector": "projector"}
        still = [name for name in names if moved.get(name, 1) < LEAST_MOVEMENT]
        if not self._warns_of_standstill or not still:
            return
        self._warns_of_standstill = False
        shares = ", ".join(f"{names[name]}: {moved[name]:.2%}" for name in still)
        logger.warning(
            f"step {self.state.global_step}: how far weights have moved, relative to their size: "
            f"{shares}, rest of the model: {moved['moved_model']:.2%}. What hardly moves stays as "
            "it was initialized and has learned next to nothing. Train for more steps, raise "
            "train.learning_rate, and leave train.scale_learning_rates on."
        )

    def _build_dataloader(
        self, dataset: Any, batch_size: int, dataset_kind: str
    ) -> DataLoader[Any]:
        """Loads rows in the order of the dataset."""
        return DataLoader(
            dataset,
            batch_size,
            collate_fn=self.data_collator,
            drop_last=dataset_kind == "train",
            num_workers=self.args.dataloader_num_workers,
            persistent_workers=self.args.dataloader_num_workers > 0 and dataset_kind == "train",
            prefetch_factor=1 if self.args.dataloader_num_workers else None,
        )

    def validate_column_names(self, dataset: Any, dataset_name: str | None = None) -> None:
        """Accepts every dataset: a transform makes the rows, so its stored columns differ."""

    # ---- checkpoints ----------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        directory = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            state = self.loss.state_dict()
            weights_of_loss = {n: state[n] for n in state if not n.startswith("model.")}
            torch.save(weights_of_loss, directory / "loss.pt")
        self.accelerator.wait_for_everyone()  # other processes may still write their shards
        if self.args.should_save:
            mark_complete(directory, self.state.global_step)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Saves in the first process; the library's own lets all write the same files at once."""
        if self.args.should_save:
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
        with loading(Path(checkpoint_path), "its model"):
            self._load_weights(checkpoint_path, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with loading(Path(checkpoint), "its optimizer or schedule"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with loading(Path(checkpoint), "its state of random numbers"):
            super()._load_rng_state(checkpoint)

    def _load_weights(self, checkpoint_path: str, model: Any) -> None:
        checkpoint = Path(checkpoint_path)
        if self.is_fsdp_enabled:
            transformers.Trainer._load_from_checkpoint(self, checkpoint_path, model)
        elif self.model.backbone.has_adapter:
            # only what trains: the base is loaded already, perhaps in 4 bits
            restore(self.model.backbone.model, checkpoint)
            fusion = load_file(checkpoint / "1_MultiTokenFusion" / "model.safetensors")
            self.model.fusion.load_state_dict(fusion)
        else:
            super()._load_from_checkpoint(checkpoint_path)
        weights_of_loss = torch.load(checkpoint / "loss.pt", map_location="cpu")
        self.loss.load_state_dict(weights_of_loss, strict=False)

    def _load_best_model(self) -> None:
        """Loads the best checkpoint or fails; the library's own would keep the last weights."""
        check_checkpoint(Path(self.state.best_model_checkpoint))
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class StopOnSignal(TrainerCallback):  # type: ignore[misc]  # untyped library
    """On SIGTERM, finishes the step, writes a checkpoint and ends the run.

    All processes stop after the same step, even if the signal reaches only one of them, or each at
    another step. Python handles signals in the main thread only: a run in another thread ignores
    SIGTERM.

    Attributes:
        stopped: Whether SIGTERM has arrived.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._previous_handler: Any = None
        self._listening = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._stop)
            self._listening = True

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if args.world_size > 1:
            stopped = torch.tensor(int(self.stopped), device=args.device)
            dist.all_reduce(stopped, dist.ReduceOp.MAX)
            self.stopped = bool(stopped)
        if self.stopped and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Reinstall the previous handler of SIGTERM."""
        if self._listening:
            signal.signal(signal.SIGTERM, self._previous_handler)
            self._listening = False
