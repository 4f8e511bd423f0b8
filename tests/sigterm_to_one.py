"""Train without interruption; train again, with SIGTERM to one of two processes, and resume.

torchrun --nproc_per_node=2 tests/sigterm_to_one.py RECIPE DIRECTORY
"""

import gc
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from transformers import TrainerCallback

from rematch.errors import TrainingError
from rematch.train.checkpoints import check_checkpoint, newest_checkpoint
from rematch.train.recipe import load_recipe
from rematch.train.run import train


class Signal(TrainerCallback):
    """Sends SIGTERM to the second process after its second step."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 2 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def main(recipe, directory):
    train(load_recipe(recipe, [f"train.output={directory / 'whole'}"]), quiet=True)
    stopped = load_recipe(recipe, [f"train.output={directory / 'stopped'}"])
    try:
        train(stopped, callbacks=(Signal(),), quiet=True)
    except TrainingError as error:
        (directory / f"error-{dist.get_rank()}.txt").write_text(str(error))
    checkpoint = newest_checkpoint(directory / "stopped.partial")
    check_checkpoint(checkpoint)
    (directory / f"checkpoint-{dist.get_rank()}.txt").write_text(checkpoint.name)
    dist.barrier()
    train(stopped, quiet=True)
    gc.collect()  # see test_parallel.worker
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
