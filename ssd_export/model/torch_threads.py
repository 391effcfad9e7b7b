"""The CPU threads that torch takes in this process."""

from __future__ import annotations

import torch

from ssd_export.machine import num_cpus


def set_torch_threads(count: int | None) -> None:
    """Sets torch's threads; None leaves them to torch, within the CPUs that this process may
    use.
    """
    torch.set_num_threads(count or min(num_cpus(), torch.get_num_threads()))
