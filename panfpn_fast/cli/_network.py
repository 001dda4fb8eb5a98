"""How a command uses a network: the options of its edges, and the lines that state what is used."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from panfpn_fast.cli._common import pixels, positive

if TYPE_CHECKING:
    from panfpn_fast.inference import Predictor
    from panfpn_fast.models import PanopticFPNConfig


def describe(weights: str, predictor: Predictor) -> str:
    """Returns one line that states a network's file, the edges that it is used with, and its classes."""
    return (
        f"{weights}: shorter edge {predictor.short_edge}, longer edge at most {predictor.max_edge} pixels; "
        f"{predictor.categories!r}"
    )


def usual_size(config: PanopticFPNConfig) -> tuple[int, int]:
    """Returns the height and width of an image with sides as 2 to 3, resized with the network's edges."""
    from panfpn_fast.data.images import resized_shape

    return resized_shape(2000, 3000, config.short_edge, config.max_edge, config.resize)


def add_edges(parser: argparse.ArgumentParser) -> None:
    """Adds `--short-edge` and `--max-edge`."""
    parser.add_argument(
        "--short-edge",
        type=pixels,
        metavar="PIXELS",
        help="resize the shorter edge to this (default: the edge that the network was evaluated with)",
    )
    parser.add_argument(
        "--max-edge",
        type=positive,
        metavar="PIXELS",
        help="limit for the longer edge (default: the network's)",
    )
