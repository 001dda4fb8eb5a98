"""Where to compute."""

from __future__ import annotations

from typing import Any

import torch


def check_device(device: Any) -> torch.device:
    """Makes a device from its name; None is a GPU if there is one, else the CPU.

    Raises:
        TypeError: It is of another kind.
        ValueError: The machine does not have it.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device: expected a string, a torch.device or None, got {type(device).__name__}")
    try:
        checked = torch.device(device)
        torch.empty(0, device=checked)
    # RuntimeError, or AssertionError from a torch that was built without the device.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device: expected a device of this machine, got {str(device)!r} ({reason})"
        ) from error
    return checked
