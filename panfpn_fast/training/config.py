"""What a training run is made of: dataclasses, and presets of them by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass
class DataConfig:
    """Where images and annotations come from, and how they are changed.

    Attributes:
        kind: "coco_panoptic", "cityscapes" or "synthetic".
        images: Folder of the images (cityscapes: the folder that holds leftImg8bit and gtFine).
        annotations: coco_panoptic: the JSON; its PNGs lie in the folder of the same name. cityscapes: the split.
        val_images: The same for evaluation; empty: none.
        val_annotations: The same.
        categories: Name of a known data set; empty: those that the JSON lists.
        synthetic_count: Number of synthetic scenes to train on.
        synthetic_val_count: Number of synthetic scenes to evaluate on, of another seed.
        short_edges: Lengths of the shorter edge to choose from in training.
        max_edge: Upper limit for the longer edge.
        continuous_edges: short_edges are the least and the greatest of a range.
        crop: Height and width of random crops; empty: none.
        crop_most_of_one_class: Crops with a greater share of one class are drawn again.
        flip: Probability of mirroring.
        photometric: Whether colours are changed at random.
        val_short_edge: Length of the shorter edge in evaluation.
        val_max_edge: Upper limit for the longer edge in evaluation.
    """

    kind: str = "coco_panoptic"
    images: str = ""
    annotations: str = ""
    val_images: str = ""
    val_annotations: str = ""
    categories: str = "coco_panoptic"
    synthetic_count: int = 2000
    synthetic_val_count: int = 50
    short_edges: list[int] = field(default_factory=lambda: [640, 672, 704, 736, 768, 800])
    max_edge: int = 1333
    continuous_edges: bool = False
    crop: list[int] = field(default_factory=list)
    crop_most_of_one_class: float = 1.0
    flip: float = 0.5
    photometric: bool = False
    val_short_edge: int = 800
    val_max_edge: int = 1333


@dataclass
class SolverConfig:
    """How the weights are moved.

    Attributes:
        steps: How many.
        batch_size: Images in a step, over all processes.
        learning_rate: After the warm-up.
        momentum: Of SGD.
        weight_decay: Of all parameters but those of normalisations.
        warmup_steps: Steps over which the learning rate rises linearly.
        warmup_factor: What it begins with, as a factor.
        milestones: Steps after which it falls.
        gamma: By this factor.
        clip_gradients: Greatest norm of all gradients together; 0: any.
        ema: Decay of an exponential moving average of the weights, which is what is evaluated and kept; 0: none.
    """

    steps: int = 90_000
    batch_size: int = 16
    learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_steps: int = 1000
    warmup_factor: float = 1e-3
    milestones: list[int] = field(default_factory=lambda: [60_000, 80_000])
    gamma: float = 0.1
    clip_gradients: float = 0.0
    ema: float = 0.0


@dataclass
class TrainConfig:
    """A training run.

    Attributes:
        preset: Name of the network's preset.
        model: Fields of PanopticFPNConfig that differ from it. Classes come from the data.
        data: See DataConfig.
        solver: See SolverConfig.
        lambda_instance: Weight of the instance branch's losses.
        lambda_semantic: Weight of the semantic branch's loss.
        lambda_panoptic: Weight of the differentiable panoptic quality as a loss; 0: without it.
        rpn_samples: Anchors of each image that the region proposal network learns from.
        box_samples: Proposals of each image that the box and mask heads learn from.
        alternate: Steps train the two branches in turn instead of together.
        init: Weights to begin with: a checkpoint, or a ResNet of torchvision's or detectron2's naming; empty: random.
        freeze_at: Stages of the backbone that keep their weights: 1 is the stem, 2 the first stage too; 0: none.
        precision: "float32", "bfloat16" or "float16", by autocast.
        channels_last: Memory format of the network and its features.
        seed: Of weights, order, transforms and sampling.
        workers: Processes that load images, for each process that trains.
        subset: Train on so many images only; 0: all.
        skip_bad: Images that cannot be read are counted and replaced, not an error.
        log_every: Steps between two lines of the log.
        checkpoint_every: Steps between two checkpoints.
        evaluate_every: Steps between two evaluations; 0: only at the end.
    """

    preset: str = "panoptic_fpn_r50"
    model: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
    lambda_instance: float = 1.0
    lambda_semantic: float = 0.5
    lambda_panoptic: float = 0.0
    rpn_samples: int = 256
    box_samples: int = 512
    alternate: bool = False
    init: str = ""
    freeze_at: int = 2
    precision: str = "float32"
    channels_last: bool = True
    seed: int = 0
    workers: int = 4
    subset: int = 0
    skip_bad: bool = False
    log_every: int = 20
    checkpoint_every: int = 5000
    evaluate_every: int = 0

    def check(self) -> None:
        """Looks for values that cannot be.

        Raises:
            ValueError: Names the field.
        """
        for name, value, choices in (
            ("data.kind", self.data.kind, ("coco_panoptic", "cityscapes", "synthetic")),
            ("precision", self.precision, ("float32", "bfloat16", "float16")),
        ):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        for name, number, least in (
            ("solver.steps", self.solver.steps, 1),
            ("solver.batch_size", self.solver.batch_size, 1),
            ("rpn_samples", self.rpn_samples, 2),
            ("box_samples", self.box_samples, 4),
            ("log_every", self.log_every, 1),
            ("checkpoint_every", self.checkpoint_every, 1),
            ("evaluate_every", self.evaluate_every, 0),
            ("subset", self.subset, 0),
            ("workers", self.workers, 0),
        ):
            if number < least:
                raise ValueError(f"{name}: expected at least {least}, got {number}")
        if not 0 <= self.freeze_at <= 5:
            raise ValueError(f"freeze_at: expected 0 to 5, got {self.freeze_at}")
        if not 0 <= self.solver.ema < 1:
            raise ValueError(f"solver.ema: expected a number from 0 to below 1, got {self.solver.ema}")
        if len(self.data.crop) not in (0, 2):
            raise ValueError(f"data.crop: expected nothing or [height, width], got {self.data.crop}")


def _cityscapes() -> TrainConfig:
    return TrainConfig(
        preset="panoptic_fpn_r50_cityscapes",
        data=DataConfig(
            kind="cityscapes",
            annotations="train",
            val_annotations="val",
            categories="cityscapes",
            short_edges=[512, 2048],
            continuous_edges=True,
            max_edge=4096,
            crop=[512, 1024],
            photometric=True,
            val_short_edge=1024,
            val_max_edge=2048,
        ),
        solver=SolverConfig(
            steps=65_000, batch_size=32, learning_rate=0.01, milestones=[40_000, 55_000], warmup_steps=1000
        ),
        lambda_semantic=1.0,
    )


_SMALL_MODEL: dict[str, Any] = {
    "backbone": "resnet10_narrow",
    "backbone_norm": "gn",
    "fpn_channels": 64,
    "anchor_sizes": [16, 32, 64, 128, 256],
    "box_head_channels": 256,
    "mask_head_channels": 64,
    "mask_head_convs": 2,
    "semantic_channels": 64,
    "semantic_groups": 16,
    "stuff_area_threshold": 64,
    "rpn_pre_nms_topk": 300,
    "rpn_post_nms_topk": 200,
}


def _tiny() -> TrainConfig:
    return TrainConfig(
        model=dict(_SMALL_MODEL),
        data=DataConfig(
            kind="synthetic",
            categories="synthetic",
            short_edges=[128],
            max_edge=1000,
            val_short_edge=128,
            val_max_edge=1000,
        ),
        solver=SolverConfig(
            steps=800,
            batch_size=4,
            learning_rate=0.02,
            milestones=[580, 730],
            warmup_steps=50,
            clip_gradients=5.0,
        ),
        lambda_semantic=1.0,
        box_samples=96,
        freeze_at=0,
        workers=1,
        checkpoint_every=250,
    )


def _nuclei() -> TrainConfig:
    return TrainConfig(
        model={
            "backbone_norm": "gn",
            "stride_in_1x1": False,
            # Where there is nothing these images are black, as the padding is.
            "pixel_mean": [0.0, 0.0, 0.0],
            "pixel_std": [50.0, 50.0, 50.0],
            "anchor_sizes": [8, 16, 32, 64, 128],
            "detections_per_image": 400,
            "rpn_pre_nms_topk": 2000,
            "stuff_area_threshold": 64,
        },
        data=DataConfig(
            categories="",
            short_edges=[384, 768],
            continuous_edges=True,
            max_edge=1333,
            crop=[384, 384],
            val_short_edge=512,
            photometric=True,
        ),
        solver=SolverConfig(
            steps=6000,
            batch_size=8,
            learning_rate=0.02,
            milestones=[4500, 5500],
            warmup_steps=500,
            clip_gradients=5.0,
        ),
        freeze_at=0,
        checkpoint_every=500,
    )


def get_train_preset(name: str) -> TrainConfig:
    """Returns a new copy of a preset.

    Args:
        name: "1x" and "3x" (detectron2's schedules for COCO), "cityscapes" (the paper's), "tiny" (synthetic scenes on a
            CPU) or "nuclei".

    Raises:
        ValueError: There is no such preset; the message lists those there are.
    """
    presets: dict[str, TrainConfig] = {
        "1x": TrainConfig(),
        "3x": dataclasses.replace(
            TrainConfig(), solver=SolverConfig(steps=270_000, milestones=[210_000, 250_000])
        ),
        "cityscapes": _cityscapes(),
        "tiny": _tiny(),
        "nuclei": _nuclei(),
    }
    if name not in presets:
        raise ValueError(f"preset: expected one of {', '.join(presets)}, got {name!r}")
    return presets[name]
