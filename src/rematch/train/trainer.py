"""The trainer: sentence-transformers' own, in the plan's order, with checkpoints to trust and more
in the log.
"""

import json
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformerTrainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from rematch.backbone.lora import restore
from rematch.errors import TrainingError
from rematch.files import write_json
from rematch.train.batch import Batch

logger = logging.get_logger("rematch")
COMPLETE = "complete.json"
SKIPPED_SHOWN = 20
STUCK_AFTER = 400  # steps
PEAK_TFLOPS = {  # dense bfloat16, from the makers' data sheets
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


class Trainer(SentenceTransformerTrainer):  # type: ignore[misc]  # sentence-transformers ships no types
    """Feeds :class:`~rematch.train.batch.Batch` to the loss.

    Logged besides each loss and the gradient's norm: Yes/No accuracy per view pair with d+ and d-,
    the mean |cosine| between the token vectors of an input, samples and tokens a second, samples
    skipped so far, peak memory, and on known GPUs the share of their peak arithmetic (MFU). A loss
    that is not a number stops the run with the step and the samples.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tokens = self._samples = 0
        self._skipped: set[str] = set()
        self._since = time.monotonic()
        self._warned = False

    def collect_features(self, inputs: dict[str, Any]) -> tuple[list[Any], None]:
        return [inputs["batch"]], None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        batch: Batch = inputs["batch"]
        self._report_skipped(batch.skipped)
        with (
            self.accelerator.autocast()
        ):  # around all forward passes of the step: weights are converted once
            result = super().compute_loss(model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if not torch.isfinite(loss):
            shown = ", ".join(batch.ids[:20]) + (" …" if len(batch.ids) > 20 else "")
            raise TrainingError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()}. The samples of "
                f"this step: {shown}. Look at them, lower train.learning_rate, or train without "
                "half precision."
            )
        if torch.is_grad_enabled():
            self._samples += len(batch.inputs)
            self._tokens += batch.tokens
        return result

    def _report_skipped(self, skipped: list[str]) -> None:
        """Name samples that were left out: each once in ``skipped.txt``, the first on the terminal
        too.
        """
        if not skipped:
            return
        file = Path(self.args.output_dir) / "skipped.txt"
        if file.exists() and not self._skipped:
            self._skipped.update(file.read_text().splitlines())  # of a run that was cut off
        new = [line for line in dict.fromkeys(skipped) if line not in self._skipped]
        with file.open("a") as stream:
            stream.writelines(line + "\n" for line in new)
        for line in new[: max(0, SKIPPED_SHOWN - len(self._skipped))]:
            logger.warning(f"skipped, another sample takes its place: {line}")
        self._skipped.update(new)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = logs | self._measured()
        super().log(logs, start_time)

    def _measured(self) -> dict[str, float]:
        seconds = time.monotonic() - self._since
        world = self.args.world_size
        found: dict[str, float] = self.loss.pop_metrics()
        if self._skipped:
            found["skipped"] = len(self._skipped)
        found["samples_per_second"] = round(self._samples * world / seconds, 2)
        found["tokens_per_second"] = round(self._tokens * world / seconds, 1)
        if torch.cuda.is_available():
            found["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            name = torch.cuda.get_device_name()
            peak = next((value for key, value in PEAK_TFLOPS.items() if key in name), None)
            if peak:
                weights = sum(p.numel() for p in self.model.parameters())
                passes = (
                    8 if self.loss.gradient_cache else 6
                )  # multiplications and additions per weight and token
                found["mfu"] = round(passes * weights * self._tokens / seconds / (peak * 1e12), 4)
        self._tokens = self._samples = 0
        self._since = time.monotonic()
        answers = [value for key, value in found.items() if key.startswith("match_accuracy")]
        if answers and self.state.global_step >= STUCK_AFTER and not self._warned:
            mean = sum(answers) / len(answers)
            if 46 < mean < 54:
                self._warned = True
                logger.warning(
                    f"step {self.state.global_step}: Yes/No answers are {mean:.0f} % right, no "
                    "better than guessing. The matching stage helps only if the backbone can "
                    "answer such questions: look at the data's negatives, or use a stronger "
                    "backbone."
                )
        return found

    def _build_dataloader(
        self, dataset: Any, batch_size: int, dataset_kind: str
    ) -> DataLoader[Any]:
        """In the order of the plan."""
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
        """Rows are made by a transform, so that the stored columns are not those the model sees."""

    # ---- checkpoints ----------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        directory = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            own = {n: p for n, p in self.loss.state_dict().items() if not n.startswith("model.")}
            torch.save(own, directory / "loss.pt")
        self.accelerator.wait_for_everyone()  # for the others' shards, if there are any
        if self.args.should_save:  # written last, in one go: a checkpoint without it was cut off
            sizes = {
                str(f.relative_to(directory)): f.stat().st_size
                for f in directory.rglob("*")
                if f.is_file()
            }
            write_json(directory / COMPLETE, {"step": self.state.global_step, "files": sizes})

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """In the first process; the library's own lets all processes write the same files at once."""
        if self.args.should_save:
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            transformers.Trainer._load_from_checkpoint(self, checkpoint_path, model)
        elif (
            self.model.backbone.has_adapter
        ):  # only what was trained: the base is there, perhaps in 4 bits
            restore(self.model.backbone.model, Path(checkpoint_path))
            fusion = Path(checkpoint_path) / "1_MultiTokenFusion" / "model.safetensors"
            self.model.fusion.load_state_dict(load_file(fusion))
        else:
            super()._load_from_checkpoint(checkpoint_path)
        self.loss.load_state_dict(
            torch.load(Path(checkpoint_path) / "loss.pt", map_location="cpu"), strict=False
        )

    def _load_best_model(self) -> None:
        """The library's own logs an error and goes on with the last weights."""
        check_checkpoint(Path(self.state.best_model_checkpoint))
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def newest_checkpoint(directory: Path) -> Path | None:
    """The last whole checkpoint in a directory; ones that were cut off do not count."""
    whole: Iterable[Path] = (mark.parent for mark in directory.glob(f"checkpoint-*/{COMPLETE}"))
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def check_checkpoint(checkpoint: Path) -> None:
    """Check that a checkpoint still has every file that it was written with, at its full size.

    Raises:
        TrainingError: If it has not; the message names the file.
    """
    remedy = "Restore it, or remove the checkpoint: the run then continues from the one before it, or starts again."
    try:
        sizes = json.loads((checkpoint / COMPLETE).read_text())["files"]
    except (ValueError, TypeError, KeyError):
        raise TrainingError(
            f"{checkpoint / COMPLETE}: does not list the files of its checkpoint, so they cannot "
            f"be checked. {remedy}"
        ) from None
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            raise TrainingError(
                f"{file}: is missing, so the run cannot be resumed from this checkpoint. {remedy}"
            )
        if (now := file.stat().st_size) != size:
            raise TrainingError(
                f"{file}: has {now:,} bytes, but was written with {size:,}, so the run cannot be "
                f"resumed from this checkpoint. {remedy}"
            )


class StopOnSignal(TrainerCallback):  # type: ignore[misc]  # transformers ships no types for it
    """On SIGTERM, finish the step, write a checkpoint, and leave; ``stopped`` tells that it
    happened.

    Several processes stop after the same step, even if the signal reaches only one of them or each
    at another step. Python hands signals to the main thread only: a run in another thread does not
    listen.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._before: Any = None
        self._listening = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._stop)
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
        """Give SIGTERM back to whoever listened before."""
        if self._listening:
            signal.signal(signal.SIGTERM, self._before)
            self._listening = False
