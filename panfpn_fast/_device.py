"""Devices by name, and errors of memory."""

from __future__ import annotations

from typing import Any

import torch


def resolve_device(device: Any) -> torch.device:
    """Returns a device by its name; a number is that of a GPU; None chooses a GPU if there is one, else the CPU.

    Raises:
        TypeError: If `device` is not a string, a torch.device, an integer or None.
        ValueError: If this machine does not have the device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device, bool) or not isinstance(device, (str, torch.device, int)):
        raise TypeError(
            f"device: expected a string, a torch.device, an integer or None, got {type(device).__name__}"
        )
    name = device_name(device)
    try:
        checked = torch.device(name)
        if checked.type == "meta" or (checked.type == "cpu" and checked.index):
            raise RuntimeError(f"{checked} has no memory")
        torch.empty(0, device=checked)
    # RuntimeError, or AssertionError from a torch that was built without the device. Their messages can fill a page.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = "" if torch.cuda.is_available() else _missing_cuda(str(name))
        raise ValueError(
            f"device: expected a device of this machine, got {str(device)!r}; it has {_devices()}{reason}"
        ) from error
    return checked


def device_name(device: Any) -> Any:
    """Returns "cuda:N" for the number N of a GPU, as text or as an integer; anything else stays as it is."""
    text = str(device)
    return f"cuda:{text}" if text.isascii() and text.isdecimal() else device


def _devices() -> str:
    """Returns the names of this machine's devices, separated by commas."""
    found = ["cpu"]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count > 0:
        found.append("cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}")
    if torch.backends.mps.is_available():
        found.append("mps")
    return ", ".join(found)


def _missing_cuda(name: str) -> str:
    """Returns why a GPU is not found, and a remedy; an empty string for other devices."""
    if not name.startswith("cuda"):
        return ""
    if torch.version.cuda is None:
        return ". This torch was built without CUDA; install a CUDA build of torch"
    return ". torch finds no NVIDIA driver; compare the output of nvidia-smi"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: on a GPU, in torch's CPU allocator (which has no error type of its own), or in Python."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
