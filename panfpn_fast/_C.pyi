"""Types of the native module, which csrc/module.cpp defines. The ops are not in it: importing it registers them."""

from typing import Any

import numpy.typing as npt

def build_info() -> dict[str, str]: ...

# Any object with the buffer protocol works; NumPy types ndarray as one from Python 3.12 on.
def count_label_pairs(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> list[tuple[int, int, int]]: ...
