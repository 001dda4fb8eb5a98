"""Settings of a training run as dataclasses, and named presets."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from panfpn_fast._errors import UserError
from panfpn_fast.data.categories import BUILT_IN
from panfpn_fast.data.datasets import FILE_KINDS
from panfpn_fast.data.loader import check_workers
from panfpn_fast.data.rules import ReadingRules

_MOST_PIXELS = 65_536
"""Upper limit for the shorter edge and for crops; larger numbers are mistakes, which would exhaust the memory."""

_MOST_ADAMW_RATE = 0.005
"""Upper limit for the learning rate of AdamW. The rates of SGD are above it, and networks diverge with them."""

LOGGERS = ("wandb", "mlflow")
"""Values of `TrainConfig.loggers`."""

OF_INIT = "init"
"""The value of `TrainConfig.preset` that stands for the network of the initial weights."""


@dataclass
class DataConfig:
    """Sources of images and annotations, and their augmentation.

    Attributes:
        kind: "coco_panoptic", "coco_instances", "yolo", "labelme", "masks", "cityscapes" or "synthetic".
        images: Folder of the images (cityscapes: the folder that holds leftImg8bit and gtFine). For yolo also a key of
            data.yaml; empty for "train".
        annotations: The JSON for coco_panoptic, whose PNGs are in the folder of the same name, and for coco_instances;
            data.yaml for yolo; the folder of the JSON files for labelme; the folder of the masks for masks; the split
            for cityscapes.
        val_images: Like `images`, for evaluation; empty for no evaluation. For yolo empty for "val", where
            data.yaml has it.
        val_annotations: Like `annotations`, for evaluation. For yolo empty for `annotations`.
        background: Class of the pixels that no annotation covers: "stuff" for one stuff class, "background", or "void".
            It and the next four are for annotations that are not panoptic; see `panfpn_fast.data.ReadingRules`.
        stuff: Names of the classes that are stuff; all others are things.
        classes: Names of the classes, where the annotations do not list them.
        label_divisor: Meaning of the values of id masks: 0 for instances of one class, 1 for classes, D for
            class * D + instance.
        void_values: Values of id masks that are void.
        categories: Name of a built-in set of classes: "coco_panoptic", "cityscapes" or "synthetic"; empty for the
            classes that the annotations list. COCO's presets set "coco_panoptic".
        boxes: Where the boxes of instances come from: "annotation" for the boxes of the annotated masks, resized and
            mirrored with the image, as in detectron2; "mask" for boxes around the masks after all transforms. After
            `crop`, boxes are always around the masks.
        synthetic_count: Number of synthetic scenes to train on.
        synthetic_val_count: Number of synthetic scenes to evaluate on, made from another seed; 0 for no evaluation.
        short_edges: Lengths in pixels; training draws the shorter edge from them.
        max_edge: Upper limit for the longer edge.
        continuous_edges: Whether short_edges holds the ends of a range to draw from instead of a list.
        crop: Height and width of random crops; empty for no cropping.
        crop_most_of_one_class: Largest share of one class in a crop; other crops are drawn again.
        flip: Probability of mirroring.
        quarter_turns: Whether images are rotated by a random multiple of 90 degrees.
        exposure: Largest factor by which the values of an image are multiplied or divided at random; 1 for none.
        photometric: Whether brightness, contrast and colors are changed at random.
        val_short_edge: Length of the shorter edge in evaluation; the network keeps it for its predictions.
        val_max_edge: Upper limit for the longer edge in evaluation; the network keeps it, too.
    """

    kind: str = "coco_panoptic"
    images: str = ""
    annotations: str = ""
    val_images: str = ""
    val_annotations: str = ""
    background: str = "stuff"
    stuff: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    label_divisor: int = 0
    void_values: list[int] = field(default_factory=list)
    categories: str = ""
    boxes: str = "annotation"
    synthetic_count: int = 2000
    synthetic_val_count: int = 50
    short_edges: list[int] = field(default_factory=lambda: [640, 672, 704, 736, 768, 800])
    max_edge: int = 1333
    continuous_edges: bool = False
    crop: list[int] = field(default_factory=list)
    crop_most_of_one_class: float = 1.0
    flip: float = 0.5
    quarter_turns: bool = False
    exposure: float = 1.0
    photometric: bool = False
    val_short_edge: int = 800
    val_max_edge: int = 1333

    def rules(self) -> ReadingRules:
        """Returns how annotations that are not panoptic are read.

        Raises:
            UserError: If a setting is invalid.
        """
        return ReadingRules(
            self.background,
            tuple(self.stuff),
            tuple(self.classes),
            self.label_divisor,
            tuple(self.void_values),
        )


@dataclass
class SolverConfig:
    """Settings of the optimizer and its schedule.

    Attributes:
        steps: Number of steps.
        batch_size: Images in a step, over all processes and all parts.
        accumulate: Parts into which the images of a step are divided, to save memory. The gradients of the parts are
            averaged before the weights change.
        optimizer: "sgd" (with momentum) or "adamw".
        learning_rate: Learning rate after the warm-up.
        base_batch_size: Batch size that `learning_rate` is meant for: the learning rate is multiplied by
            batch_size / base_batch_size; 0 for a learning rate that is used as it is.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of all parameters except those of normalization layers.
        warmup_steps: Steps over which the learning rate rises linearly.
        warmup_factor: Factor on the learning rate at the first step.
        schedule: "steps" for a learning rate that falls at the milestones, or "cosine" for half a cosine from the first
            to the last step.
        milestones: Steps after which the learning rate is multiplied by `gamma`, with the schedule "steps".
        gamma: See `milestones`.
        final_factor: Factor on the learning rate at the end of the schedule "cosine".
        clip_gradients: Limit for the norm of all gradients together; 0 for no limit.
        ema: Decay of an exponential moving average of the weights, which is then evaluated and saved; 0 for none.
    """

    steps: int = 90_000
    batch_size: int = 16
    accumulate: int = 1
    optimizer: str = "sgd"
    learning_rate: float = 0.02
    base_batch_size: int = 0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_steps: int = 1000
    warmup_factor: float = 1e-3
    schedule: str = "steps"
    milestones: list[int] = field(default_factory=lambda: [60_000, 80_000])
    gamma: float = 0.1
    final_factor: float = 0.0
    clip_gradients: float = 0.0
    ema: float = 0.0

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after the warm-up, scaled with the batch if `base_batch_size` is set."""
        scale = self.batch_size / self.base_batch_size if self.base_batch_size else 1.0
        return self.learning_rate * scale


@dataclass
class TrainConfig:
    """Settings of a training run.

    Attributes:
        preset: Name of the network's preset; "init" for the network whose weights `init` names.
        model: Fields of PanopticFPNConfig that differ from the preset. The classes come from the data, and
            `short_edge` and `max_edge` are `data.val_short_edge` and `data.val_max_edge`.
        data: See `DataConfig`.
        solver: See `SolverConfig`.
        lambda_instance: Weight of the instance branch's losses.
        lambda_semantic: Weight of the semantic branch's loss.
        lambda_panoptic: Weight of the differentiable panoptic quality as a loss; 0 turns it off.
        rpn_samples: Anchors of each image that the region proposal network learns from.
        box_samples: Proposals of each image that the box and mask heads learn from.
        alternate: Whether steps train the two branches in turn instead of together.
        init: Initial weights: a checkpoint, or a ResNet with the names of torchvision or detectron2; empty for random.
        freeze_at: Number of parts of the backbone that do not learn: 1 is the stem, 2 also the first stage; 0 is none.
        precision: "float32", "bfloat16" or "float16", by autocast.
        channels_last: Memory format of the network and its features.
        seed: Seed of weights, order, augmentation and sampling.
        workers: Number of processes that load images, for each process that trains.
        subset: Number of images to train on; 0 for all.
        skip_bad: Whether unreadable images are counted and replaced instead of raising an error; the evaluation leaves
            them out.
        log_every: Steps from one line of the log to the next.
        checkpoint_every: Steps from one checkpoint to the next.
        evaluate_every: Steps from one evaluation to the next; 0 evaluates only at the end.
        best_by: Figure of the evaluation by which `best.pth` is chosen, such as "PQ_things" or "mIoU"; empty for "PQ",
            or for "mask_AP" if the network has no branch for stuff.
        early_stop: Evaluations in a row without a better figure that end the run; 0 for no early end.
        pictures: Number of evaluation images that each evaluation draws as `gallery.png` and for the loggers; 0 for
            none.
        loggers: Loggers besides `log.jsonl` and TensorBoard, which are always written (TensorBoard if it is installed):
            "wandb" and "mlflow".
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
    best_by: str = ""
    early_stop: int = 0
    pictures: int = 4
    loggers: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Checks the values.

        Raises:
            UserError: If a value is invalid; the message names the field.
        """
        for name, value, choices in (
            ("data.kind", self.data.kind, (*FILE_KINDS, "synthetic")),
            ("data.boxes", self.data.boxes, ("annotation", "mask")),
            ("precision", self.precision, ("float32", "bfloat16", "float16")),
            ("solver.optimizer", self.solver.optimizer, ("sgd", "adamw")),
            ("solver.schedule", self.solver.schedule, ("steps", "cosine")),
            *(("loggers", logger, LOGGERS) for logger in self.loggers),
        ):
            if value not in choices:
                raise UserError(f"{name}: expected one of {', '.join(choices)}, got {value!r:.40}")
        data, solver = self.data, self.solver
        for name, number, least in (
            ("data.synthetic_count", data.synthetic_count, 1),
            ("data.synthetic_val_count", data.synthetic_val_count, 0),
            ("data.max_edge", data.max_edge, 1),
            ("data.exposure", data.exposure, 1),
            ("data.val_short_edge", data.val_short_edge, 1),
            ("data.val_max_edge", data.val_max_edge, 1),
            ("solver.steps", solver.steps, 1),
            ("solver.batch_size", solver.batch_size, 1),
            ("solver.accumulate", solver.accumulate, 1),
            ("solver.learning_rate", solver.learning_rate, 0),
            ("solver.base_batch_size", solver.base_batch_size, 0),
            ("solver.weight_decay", solver.weight_decay, 0),
            ("solver.warmup_steps", solver.warmup_steps, 0),
            ("solver.warmup_factor", solver.warmup_factor, 0),
            ("solver.gamma", solver.gamma, 0),
            ("solver.clip_gradients", solver.clip_gradients, 0),
            ("lambda_instance", self.lambda_instance, 0),
            ("lambda_semantic", self.lambda_semantic, 0),
            ("lambda_panoptic", self.lambda_panoptic, 0),
            ("rpn_samples", self.rpn_samples, 2),
            ("box_samples", self.box_samples, 4),
            ("log_every", self.log_every, 1),
            ("checkpoint_every", self.checkpoint_every, 1),
            ("evaluate_every", self.evaluate_every, 0),
            ("subset", self.subset, 0),
            ("early_stop", self.early_stop, 0),
            ("pictures", self.pictures, 0),
        ):
            if not least <= number < math.inf:  # also false for NaN
                raise UserError(f"{name}: expected at least {least}, got {number}")
        for name, numbers, least in (
            ("data.short_edges", data.short_edges, 1),
            ("data.crop", data.crop, 1),
            ("solver.milestones", solver.milestones, 0),
        ):
            if any(number < least for number in numbers):
                raise UserError(f"{name}: expected numbers of at least {least}, got {numbers}")
        for name, numbers in (
            ("data.short_edges", data.short_edges),
            ("data.crop", data.crop),
            ("data.val_short_edge", [data.val_short_edge]),
        ):
            if any(number > _MOST_PIXELS for number in numbers):
                raise UserError(f"{name}: expected at most {_MOST_PIXELS} pixels, got {max(numbers)}")
        if not data.short_edges:
            raise UserError("data.short_edges: expected at least one number of pixels, got none")
        if data.continuous_edges and (
            len(data.short_edges) != 2 or data.short_edges[0] > data.short_edges[1]
        ):
            raise UserError(
                "data.short_edges: expected [least, most], because data.continuous_edges is true, "
                f"got {data.short_edges}"
            )
        for name, share in (
            ("data.flip", data.flip),
            ("data.crop_most_of_one_class", data.crop_most_of_one_class),
            ("solver.final_factor", solver.final_factor),
        ):
            if not 0 <= share <= 1:
                raise UserError(f"{name}: expected a number from 0 to 1, got {share}")
        if not 0 <= solver.momentum < 1:
            raise UserError(f"solver.momentum: expected a number from 0 to below 1, got {solver.momentum}")
        self._check_combinations()
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed: expected a whole number from 0 to below 2**63, got {self.seed}")
        check_workers(self.workers)
        if not 0 <= self.freeze_at <= 5:
            raise UserError(f"freeze_at: expected 0 to 5, got {self.freeze_at}")
        if not 0 <= self.solver.ema < 1:
            raise UserError(f"solver.ema: expected a number from 0 to below 1, got {self.solver.ema}")
        if self.data.categories and self.data.categories not in BUILT_IN:
            raise UserError(
                f"data.categories: expected one of {', '.join(BUILT_IN)}, or nothing for the classes that the "
                f"annotations list, got {self.data.categories!r}"
            )
        self.data.rules()
        for name in ("short_edge", "max_edge"):
            if name in self.model:
                raise UserError(f"model.{name}: expected data.val_{name} instead, which also sets it")
        if len(self.data.crop) not in (0, 2):
            raise UserError(f"data.crop: expected nothing or [height, width], got {self.data.crop}")

    def _check_combinations(self) -> None:
        """Checks the settings that depend on each other."""
        solver = self.solver
        if solver.batch_size % solver.accumulate:
            raise UserError(
                f"solver.accumulate: expected a divisor of solver.batch_size ({solver.batch_size}), "
                f"got {solver.accumulate}"
            )
        if solver.optimizer == "adamw" and solver.peak_learning_rate > _MOST_ADAMW_RATE:
            scaled = ", scaled with the batch," if solver.base_batch_size else ""
            raise UserError(
                f"solver.learning_rate: expected at most {_MOST_ADAMW_RATE}{scaled} with solver.optimizer=adamw, "
                f"got {solver.peak_learning_rate:g}; try solver.learning_rate=0.0001"
            )
        if self.early_stop and not self.evaluate_every:
            raise UserError(
                "early_stop: expected 0, because the run evaluates only at the end; set evaluate_every to a number of "
                f"steps, or early_stop=0; got {self.early_stop}"
            )
        if self.preset == OF_INIT and not self.init:
            raise UserError(
                "init: expected a checkpoint, because preset=init takes its network, got nothing; set init=PATH"
            )


def _cityscapes() -> TrainConfig:
    return TrainConfig(
        preset="panoptic_fpn_r50_cityscapes",
        data=DataConfig(
            kind="cityscapes",
            annotations="train",
            val_annotations="val",
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
            **_SMALL_MODEL,
            # The background of these images is black, like the padding.
            "pixel_mean": [0.0, 0.0, 0.0],
            "pixel_std": [50.0, 50.0, 50.0],
            # Most nuclei have 20 to 40 pixels after resizing, so P2, whose stride is 4, detects them.
            "anchor_sizes": [20, 40, 80, 160, 320],
            "mask_head_convs": 3,
            "detections_per_image": 400,
            "rpn_pre_nms_topk": 2000,
            "rpn_post_nms_topk": 1000,
        },
        data=DataConfig(
            short_edges=[384, 640],
            continuous_edges=True,
            max_edge=1333,
            crop=[256, 256],
            quarter_turns=True,
            exposure=2.0,
            val_short_edge=512,
        ),
        solver=SolverConfig(
            steps=4200,
            batch_size=4,
            optimizer="adamw",
            learning_rate=0.001,
            weight_decay=0.05,
            schedule="cosine",
            warmup_steps=100,
            clip_gradients=5.0,
            ema=0.995,
        ),
        box_samples=128,
        freeze_at=0,
        workers=1,
        checkpoint_every=300,
        evaluate_every=600,
    )


def _finetune() -> TrainConfig:
    return TrainConfig(
        preset=OF_INIT,
        init="detectron2://COCO-PanopticSegmentation/panoptic_fpn_R_50_3x",
        solver=SolverConfig(
            steps=3000,
            batch_size=8,
            learning_rate=0.01,
            base_batch_size=16,
            warmup_steps=200,
            schedule="cosine",
            clip_gradients=5.0,
        ),
        checkpoint_every=250,
        evaluate_every=250,
        early_stop=6,
    )


def get_train_preset(name: str) -> TrainConfig:
    """Returns a new copy of a preset.

    Args:
        name: "1x" and "3x" (detectron2's schedules for COCO), "finetune" (from a trained network to other classes),
            "cityscapes" (the paper's schedule), "tiny" (synthetic scenes on a CPU) or "nuclei" (many small things of
            one class, on a CPU).

    Raises:
        ValueError: If there is no such preset; the message lists the presets.
    """
    coco = TrainConfig(data=DataConfig(categories="coco_panoptic"))
    presets: dict[str, TrainConfig] = {
        "1x": coco,
        "3x": dataclasses.replace(coco, solver=SolverConfig(steps=270_000, milestones=[210_000, 250_000])),
        "finetune": _finetune(),
        "cityscapes": _cityscapes(),
        "tiny": _tiny(),
        "nuclei": _nuclei(),
    }
    if name not in presets:
        raise ValueError(f"preset: expected one of {', '.join(presets)}, got {name!r}")
    return presets[name]
