"""``rematch`` with FSDP2 on CPUs: accelerate, which offers it on GPUs only, is patched.

torchrun --nproc_per_node=2 tests/sharded_on_cpu.py train RECIPE …
"""

import inspect
import sys
import textwrap

import torch
from accelerate import state
from torch.distributed.fsdp import FSDPModule

source = textwrap.dedent(inspect.getsource(state.AcceleratorState.__init__))
changed = source.replace(
    "DistributedType.MULTI_GPU,", "DistributedType.MULTI_GPU, DistributedType.MULTI_CPU,"
)
assert changed != source, "accelerate no longer chooses FSDP in the way that is patched here"
exec(compile(changed, __file__, "exec"), vars(state))
state.AcceleratorState.__init__ = vars(state).pop("__init__")
torch.cpu.current_device = lambda: torch.device("cpu")

if __name__ == "__main__":
    from rematch import cli
    from rematch.train.trainer import Trainer

    training_step = Trainer.training_step

    def checked_step(self, *args, **kwargs):
        assert self.is_fsdp_enabled
        assert all(type(p.data).__name__ == "DTensor" for p in self.model.parameters())
        backbone = self.model.backbone
        one_by_one = {isinstance(n, FSDPModule) for n in backbone.base.language_model.layers}
        assert one_by_one == {backbone.matching != "reuse"}
        policy = self.accelerator.state.fsdp_plugin.mixed_precision_policy
        assert (policy.reduce_dtype, policy.output_dtype) == (torch.float32, None)
        return training_step(self, *args, **kwargs)

    Trainer.training_step = checked_step
    sys.argv[0] = "rematch"
    cli.main()
