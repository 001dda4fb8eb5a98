"""Reads the instructions and loops of kernels from the machine code that ptxas has made, without a GPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from support.processes import run


@dataclass(frozen=True)
class Loop:
    """The instructions between the target of a backward branch and the branch, with those of inner loops."""

    instructions: Counter[str]

    @property
    def length(self) -> int:
        return self.instructions.total()

    def count(self, pattern: str) -> int:
        """Returns how many instructions match a pattern from their beginning."""
        return sum(count for name, count in self.instructions.items() if re.match(pattern, name))


def tool(name: str) -> str | None:
    """Returns a program of the CUDA toolkit, from PATH or from Triton's wheel; None if it is in neither."""
    spec = importlib.util.find_spec("triton.backends.nvidia")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    return shutil.which(name) or next(
        (found for folder in folders if (found := shutil.which(name, path=str(Path(folder, "bin"))))), None
    )


def listings(cubin: Path) -> dict[str, list[tuple[int, str, str]]]:
    """Returns address, name and operands of each kernel's instructions; empty without a disassembler."""
    disassembler = tool("cuobjdump")
    if disassembler is None:
        return {}
    found = {}
    for part in run([disassembler, "-sass", cubin]).stdout.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        found[name.strip()] = [
            (int(address, 16), instruction, operands)
            for address, instruction, operands in re.findall(
                r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", body
            )
        ]
    return found


def loops(listing: list[tuple[int, str, str]]) -> list[Loop]:
    """Returns the loops that branches close, except branches to themselves, which fill the end of the code."""
    bounds = set()
    for address, name, operands in listing:
        target = re.search(r"0x([0-9a-f]+)\s*$", operands)
        if name.startswith("BRA") and target is not None and int(target.group(1), 16) < address:
            bounds.add((int(target.group(1), 16), address))
    return [
        Loop(Counter(name for address, name, _ in listing if first <= address <= last))
        for first, last in sorted(bounds)
    ]
