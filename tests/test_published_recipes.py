"""Every preset of a paper, held against a table of its published numbers and where they stand.

A number that moves in a method's file has to move here too, with its source.
"""

from typing import NamedTuple

import pytest

from headrace.training.catalogue import find_method, method_names
from headrace.training.optim import Schedule

OURS = {"cifar", "cifar_masks", "deit_cifar", "demo"}
"""Presets for CPUs, which no paper has."""


class Published(NamedTuple):
    """Learning rates as the optimiser gets them: at this batch size."""

    backbone: str
    batch_size: int
    epochs: float
    optimizer: str
    peak: float
    final: float
    warmup_epochs: float
    weight_decay: float
    final_weight_decay: float | None
    schedule: str


PUBLISHED = {
    # facebookresearch/barlowtwins, README and main.py
    "barlow_twins:imagenet": Published(
        "resnet50", 2048, 1000, "lars", 1.6, 0.0016, 10, 1e-06, None, "cosine"
    ),
    # google-deepmind/deepmind-research byol/configs/byol.py
    "byol:imagenet": Published(
        "resnet50", 4096, 1000, "lars", 3.2, 0.0, 10, 1.5e-06, None, "cosine"
    ),
    "byol:imagenet_300": Published(
        "resnet50", 4096, 300, "lars", 4.8, 0.0, 10, 1e-06, None, "cosine"
    ),
    "byol:imagenet_100": Published(
        "resnet50", 4096, 100, "lars", 7.2, 0.0, 10, 1e-06, None, "cosine"
    ),
    # HobbitLong/CMC train_CMC.py
    "cmc:imagenet": Published("resnet50", 128, 240, "sgd", 0.03, 0.0, 0, 0.0001, None, "steps"),
    # Hénaff et al. 2019 (v2), appendix A; van den Oord et al. 2018 (v1), section 3.2
    "cpc:imagenet": Published("resnet50", 512, 200, "adamw", 0.0004, 0.0, 0, 0.0, None, "constant"),
    "cpc:v1_imagenet": Published(
        "resnet101", 512, 100, "adamw", 0.0002, 0.0, 0, 0.0, None, "constant"
    ),
    # facebookresearch/deepcluster main.py; mmselfsup deepcluster-sobel_resnet50_8xb64-steplr-200e
    "deepcluster:imagenet": Published(
        "vgg16_bn", 256, 200, "sgd", 0.05, 0.0, 0, 1e-05, None, "constant"
    ),
    "deepcluster:resnet50_imagenet": Published(
        "resnet50", 512, 200, "sgd", 0.1, 0.0, 0, 1e-05, None, "constant"
    ),
    # facebookresearch/swav, scripts/*.sh and README
    "deepcluster_v2:imagenet": Published(
        "resnet50", 4096, 800, "larc", 4.8, 0.0048, 10, 1e-06, None, "cosine"
    ),
    # facebookresearch/deit main.py
    "deit:imagenet": Published(
        "deit_base_distilled_patch16_224",
        1024,
        300,
        "adamw",
        0.001,
        1e-05,
        5,
        0.05,
        None,
        "whole_cosine",
    ),
    "deit:s16_imagenet": Published(
        "deit_small_distilled_patch16_224",
        1024,
        300,
        "adamw",
        0.001,
        1e-05,
        5,
        0.05,
        None,
        "whole_cosine",
    ),
    # Hjelm et al. 2019, appendix A
    "dim:imagenet": Published("resnet50", 64, 100, "adamw", 0.0001, 0.0, 0, 0.0, None, "constant"),
    "dim:global_imagenet": Published(
        "resnet50", 64, 100, "adamw", 0.0001, 0.0, 0, 0.0, None, "constant"
    ),
    # facebookresearch/dino main_dino.py and README
    "dino:imagenet": Published(
        "vit_small_patch16_224", 512, 100, "adamw", 0.001, 1e-06, 10, 0.04, 0.4, "cosine"
    ),
    "dino:imagenet_300": Published(
        "vit_small_patch16_224", 1024, 300, "adamw", 0.002, 1e-06, 10, 0.04, 0.4, "cosine"
    ),
    "dino:imagenet_resnet50": Published(
        "resnet50", 512, 100, "sgd", 0.06, 1e-06, 10, 0.0001, None, "cosine"
    ),
    # facebookresearch/dinov2 configs/train/vitl16_short.yaml
    "dinov2:imagenet": Published(
        "vit_large_patch16_224", 2048, 200, "adamw", 0.0056568542, 1e-06, 20, 0.04, 0.4, "cosine"
    ),
    # google-research/simclr README; Chen et al. 2020 (v2), appendix B
    "distill:imagenet": Published(
        "resnet50", 4096, 400, "lars", 6.4, 0.0, 20, 0.0001, None, "cosine"
    ),
    # bytedance/ibot README, ViT-S/16
    "ibot:imagenet": Published(
        "vit_small_patch16_224", 1024, 800, "adamw", 0.002, 1e-06, 10, 0.04, 0.4, "cosine"
    ),
    # facebookresearch/ijepa configs/in1k_vith14_ep300.yaml
    "ijepa:imagenet": Published(
        "vit_huge_patch14_224", 2048, 300, "adamw", 0.001, 1e-06, 40, 0.04, 0.4, "cosine"
    ),
    # mangye16/Unsupervised_Embedding_Learning cifar.py; NPID for ImageNet
    "invariant_spread:imagenet": Published(
        "resnet50", 256, 200, "sgd", 0.03, 0.0, 0, 0.0001, None, "steps"
    ),
    "invariant_spread:cifar_resnet18": Published(
        "resnet18", 128, 200, "sgd", 0.03, 0.0, 0, 0.0005, None, "steps"
    ),
    # facebookresearch/mae PRETRAIN.md
    "mae:imagenet": Published(
        "vit_base_patch16_224", 4096, 800, "adamw", 0.0024, 0.0, 40, 0.05, None, "cosine"
    ),
    "mae:vit_large": Published(
        "vit_large_patch16_224", 4096, 800, "adamw", 0.0024, 0.0, 40, 0.05, None, "cosine"
    ),
    "mae:vit_huge": Published(
        "vit_huge_patch14_224", 4096, 800, "adamw", 0.0024, 0.0, 40, 0.05, None, "cosine"
    ),
    # facebookresearch/moco main_moco.py and README; He et al. 2019, figure 2
    "moco:imagenet": Published("resnet50", 256, 200, "sgd", 0.03, 0.0, 0, 0.0001, None, "cosine"),
    "moco:v1_imagenet": Published("resnet50", 256, 200, "sgd", 0.03, 0.0, 0, 0.0001, None, "steps"),
    "moco:end_to_end": Published("resnet50", 1024, 200, "sgd", 0.12, 0.0, 0, 0.0001, None, "steps"),
    "moco:memory_bank": Published("resnet50", 256, 200, "sgd", 0.03, 0.0, 0, 0.0001, None, "steps"),
    # facebookresearch/moco-v3 CONFIG.md
    "moco_v3:imagenet": Published(
        "vit_base_patch16_224", 4096, 300, "adamw", 0.0024, 0.0, 40, 0.1, None, "cosine"
    ),
    "moco_v3:vit_s16_imagenet": Published(
        "vit_small_patch16_224", 4096, 300, "adamw", 0.0024, 0.0, 40, 0.1, None, "cosine"
    ),
    "moco_v3:resnet50_imagenet": Published(
        "resnet50", 4096, 100, "lars", 9.6, 0.0, 10, 1e-06, None, "cosine"
    ),
    # zhirongw/lemniscate.pytorch main.py and README
    "npid:imagenet": Published("resnet50", 256, 200, "sgd", 0.03, 0.0, 0, 0.0001, None, "steps"),
    "npid:imagenet_softmax": Published(
        "resnet50", 256, 200, "sgd", 0.03, 0.0, 0, 0.0001, None, "steps"
    ),
    # MoCo v2's numbers
    "pair:imagenet": Published("resnet50", 256, 200, "sgd", 0.03, 0.0, 0, 0.0001, None, "cosine"),
    # salesforce/PCL main_pcl.py and README
    "pcl:imagenet": Published("resnet50", 256, 200, "sgd", 0.03, 0.0, 0, 0.0001, None, "cosine"),
    "pcl:v1_imagenet": Published("resnet50", 256, 200, "sgd", 0.03, 0.0, 0, 0.0001, None, "steps"),
    # Mitrovic et al. 2021, appendix E; Tomasev et al. 2022 (v2), appendix
    "relic:imagenet": Published(
        "resnet50", 4096, 1000, "lars", 3.2, 0.0, 10, 1.5e-06, None, "cosine"
    ),
    # as relic
    "relic_v2:imagenet": Published(
        "resnet50", 4096, 1000, "lars", 3.2, 0.0, 10, 1.5e-06, None, "cosine"
    ),
    "relic_v2:imagenet_no_masks": Published(
        "resnet50", 4096, 1000, "lars", 3.2, 0.0, 10, 1.5e-06, None, "cosine"
    ),
    # google-research/simclr README
    "simclr:imagenet": Published(
        "resnet50", 4096, 1000, "lars", 4.8, 0.0, 10, 1e-06, None, "cosine"
    ),
    "simclr:v2_imagenet": Published(
        "resnet50", 4096, 800, "lars", 6.4, 0.0, 40, 0.0001, None, "cosine"
    ),
    # facebookresearch/simsiam main_simsiam.py and README
    "simsiam:imagenet": Published("resnet50", 512, 100, "sgd", 0.1, 0.0, 0, 0.0001, None, "cosine"),
    "simsiam:imagenet_800": Published(
        "resnet50", 512, 800, "sgd", 0.1, 0.0, 0, 0.0001, None, "cosine"
    ),
    # keyu-tian/SparK pretrain/utils/arg_util.py and README
    "spark:imagenet": Published(
        "resnet50", 4096, 1600, "lamb", 0.0032, 3.2e-06, 40, 0.04, 0.2, "cosine"
    ),
    # pytorch/examples imagenet/main.py; DeiT as above
    "supervised:imagenet": Published(
        "resnet50", 256, 90, "sgd", 0.1, 0.0, 0, 0.0001, None, "steps"
    ),
    "supervised:vit_b16_imagenet": Published(
        "vit_base_patch16_224", 64, 30, "adamw", 0.001, 0.0, 0, 0.01, None, "cosine"
    ),
    "supervised:deit_s16_imagenet": Published(
        "vit_small_patch16_224", 1024, 300, "adamw", 0.001, 1e-05, 5, 0.05, None, "whole_cosine"
    ),
    # facebookresearch/swav, scripts/*.sh and README
    "swav:imagenet": Published(
        "resnet50", 4096, 800, "larc", 4.8, 0.0048, 10, 1e-06, None, "cosine"
    ),
    "swav:small_batch_imagenet": Published(
        "resnet50", 256, 400, "larc", 0.6, 0.0006, 0, 1e-06, None, "cosine"
    ),
    # facebookresearch/vicreg main_vicreg.py and README
    "vicreg:imagenet": Published(
        "resnet50", 2048, 1000, "lars", 1.6, 0.0016, 10, 1e-06, None, "cosine"
    ),
    "vicreg:imagenet_100": Published(
        "resnet50", 512, 100, "lars", 0.6, 0.0006, 10, 1e-06, None, "cosine"
    ),
}


def test_the_table_has_every_preset_of_a_paper() -> None:
    declared = {
        f"{method}:{preset}"
        for method in method_names()
        for preset in find_method(method).presets
        if preset not in OURS
    }
    assert declared == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_numbers(name: str) -> None:
    method, _, preset_name = name.partition(":")
    preset, published = find_method(method).presets[preset_name], PUBLISHED[name]
    optim = preset.optim
    schedule = Schedule(optim, preset.batch_size, preset.epochs)
    last = schedule.learning_rate_at(1.0) if optim.schedule != "steps" else 0.0
    declared = published._replace(
        backbone=preset.backbone,
        batch_size=preset.batch_size,
        epochs=preset.epochs,
        optimizer=optim.name,
        warmup_epochs=optim.warmup_epochs,
        weight_decay=optim.weight_decay,
        final_weight_decay=optim.final_weight_decay,
        schedule=optim.schedule,
    )
    assert declared == published
    assert schedule.peak == pytest.approx(published.peak, rel=1e-6)
    if optim.schedule in ("cosine", "whole_cosine"):
        assert last == pytest.approx(published.final, rel=1e-6, abs=1e-12)
