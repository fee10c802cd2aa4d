"""How one of several processes ends."""

import os
import sys
from typing import NoReturn


def leave(status: int = 0) -> NoReturn:
    """End this process, which has done its work, without taking Python down around its threads.

    A thread of gloo may still let go of a tensor of the last collective, for which it waits for
    Python's lock. If the interpreter goes down meanwhile, the waiting thread is ended by force and
    aborts the process: work that is done would look like a crash. Destroying the process group is
    not enough, because DistributedDataParallel keeps it alive (PyTorch 2.14).
    """
    distributed = sys.modules.get("torch.distributed")  # imported by those who need it alone
    done = status == 0 and distributed is not None and distributed.is_available()
    if done and distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
