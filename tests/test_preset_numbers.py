"""The optimiser's numbers of every preset, written down a second time, and where they come from.

The table was made of the presets, so that by itself it proves that no number moves unnoticed, and
no more. `COMPARED` names the methods whose rows were then held against the file that is named above
them (2026-11-28); for the others that is where to look. "No paper has this run" is said where it is
so.
"""

from typing import NamedTuple

import pytest

from headrace.training.catalogue import find_method, method_names
from headrace.training.optim import Schedule

COMPARED = {
    "barlow_twins",  # batch, epochs, rates, decay, warm-up, end of the cosine
    "byol",  # rates, decays, warm-up; the batch of 4096 is the paper's
    "deit",  # all
    "dino",  # the preset `imagenet`, the code's defaults; not the commands of the README
    "dinov2",  # all; epochs of 1250 steps count twice, as passes
    "ijepa",  # all
    "spark",  # batch, epochs, rate, decays, warm-up; not the end of the cosine
    "swav",  # the preset `small_batch_imagenet`
    "vicreg",  # rate, batch, decay, end of the cosine; the README's lengths not
}
"""Read against their source, and what of it."""

OURS = {"cifar", "cifar_masks", "deit_cifar", "demo"}
"""Presets for CPUs."""


class Written(NamedTuple):
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


TABLE = {
    # facebookresearch/barlowtwins, README and main.py
    "barlow_twins:imagenet": Written(
        "resnet50", 2048, 1000, "lars", 1.6, 0.0016, 10, 1e-06, None, "cosine"
    ),
    # google-deepmind/deepmind-research byol/configs/byol.py
    "byol:imagenet": Written("resnet50", 4096, 1000, "lars", 3.2, 0.0, 10, 1.5e-06, None, "cosine"),
    "byol:imagenet_300": Written(
        "resnet50", 4096, 300, "lars", 4.8, 0.0, 10, 1e-06, None, "cosine"
    ),
    "byol:imagenet_100": Written(
        "resnet50", 4096, 100, "lars", 7.2, 0.0, 10, 1e-06, None, "cosine"
    ),
    # HobbitLong/CMC README; train_CMC.py as of 0f2b643 has 400 epochs of 256 images
    "cmc:imagenet": Written("resnet50", 128, 240, "sgd", 0.03, 0.0, 0, 0.0001, None, "steps"),
    # Hénaff et al. 2019 (v2), appendix A; van den Oord et al. 2018 (v1), section 3.2
    "cpc:imagenet": Written("resnet50", 512, 200, "adamw", 0.0004, 0.0, 0, 0.0, None, "constant"),
    "cpc:v1_imagenet": Written(
        "resnet101", 512, 100, "adamw", 0.0002, 0.0, 0, 0.0, None, "constant"
    ),
    # facebookresearch/deepcluster main.py; mmselfsup deepcluster-sobel_resnet50_8xb64-steplr-200e
    "deepcluster:imagenet": Written(
        "vgg16_bn", 256, 200, "sgd", 0.05, 0.0, 0, 1e-05, None, "constant"
    ),
    "deepcluster:resnet50_imagenet": Written(
        "resnet50", 512, 200, "sgd", 0.1, 0.0, 0, 1e-05, None, "constant"
    ),
    # facebookresearch/swav, scripts/*.sh and README
    "deepcluster_v2:imagenet": Written(
        "resnet50", 4096, 800, "larc", 4.8, 0.0048, 10, 1e-06, None, "cosine"
    ),
    # facebookresearch/deit main.py
    "deit:imagenet": Written(
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
    "deit:s16_imagenet": Written(
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
    # no paper has this run: Hjelm et al. 2019, appendix A, for smaller pictures
    "dim:imagenet": Written("resnet50", 64, 100, "adamw", 0.0001, 0.0, 0, 0.0, None, "constant"),
    "dim:global_imagenet": Written(
        "resnet50", 64, 100, "adamw", 0.0001, 0.0, 0, 0.0, None, "constant"
    ),
    # facebookresearch/dino main_dino.py and README
    "dino:imagenet": Written(
        "vit_small_patch16_224", 512, 100, "adamw", 0.001, 1e-06, 10, 0.04, 0.4, "cosine"
    ),
    "dino:imagenet_300": Written(
        "vit_small_patch16_224", 1024, 300, "adamw", 0.002, 1e-06, 10, 0.04, 0.4, "cosine"
    ),
    "dino:imagenet_resnet50": Written(
        "resnet50", 512, 100, "sgd", 0.06, 1e-06, 10, 0.0001, None, "cosine"
    ),
    # facebookresearch/dinov2 configs/ssl_default_config.yaml
    "dinov2:imagenet": Written(
        "vit_large_patch16_224", 2048, 200, "adamw", 0.0056568542, 1e-06, 20, 0.04, 0.4, "cosine"
    ),
    # google-research/simclr README; Chen et al. 2020 (v2), appendix B
    "distill:imagenet": Written(
        "resnet50", 4096, 400, "lars", 6.4, 0.0, 20, 0.0001, None, "cosine"
    ),
    # bytedance/ibot README, ViT-S/16
    "ibot:imagenet": Written(
        "vit_small_patch16_224", 1024, 800, "adamw", 0.002, 1e-06, 10, 0.04, 0.4, "cosine"
    ),
    # facebookresearch/ijepa configs/in1k_vith14_ep300.yaml
    "ijepa:imagenet": Written(
        "vit_huge_patch14_224", 2048, 300, "adamw", 0.001, 1e-06, 40, 0.04, 0.4, "cosine"
    ),
    # mangye16/Unsupervised_Embedding_Learning cifar.py; no paper has the run on ImageNet: NPID's
    "invariant_spread:imagenet": Written(
        "resnet50", 256, 200, "sgd", 0.03, 0.0, 0, 0.0001, None, "steps"
    ),
    "invariant_spread:cifar_resnet18": Written(
        "resnet18", 128, 200, "sgd", 0.03, 0.0, 0, 0.0005, None, "steps"
    ),
    # facebookresearch/mae PRETRAIN.md
    "mae:imagenet": Written(
        "vit_base_patch16_224", 4096, 800, "adamw", 0.0024, 0.0, 40, 0.05, None, "cosine"
    ),
    "mae:vit_large": Written(
        "vit_large_patch16_224", 4096, 800, "adamw", 0.0024, 0.0, 40, 0.05, None, "cosine"
    ),
    "mae:vit_huge": Written(
        "vit_huge_patch14_224", 4096, 800, "adamw", 0.0024, 0.0, 40, 0.05, None, "cosine"
    ),
    # facebookresearch/moco main_moco.py and README; He et al. 2019, figure 2
    "moco:imagenet": Written("resnet50", 256, 200, "sgd", 0.03, 0.0, 0, 0.0001, None, "cosine"),
    "moco:v1_imagenet": Written("resnet50", 256, 200, "sgd", 0.03, 0.0, 0, 0.0001, None, "steps"),
    "moco:end_to_end": Written("resnet50", 1024, 200, "sgd", 0.12, 0.0, 0, 0.0001, None, "steps"),
    "moco:memory_bank": Written("resnet50", 256, 200, "sgd", 0.03, 0.0, 0, 0.0001, None, "steps"),
    # facebookresearch/moco-v3 CONFIG.md
    "moco_v3:imagenet": Written(
        "vit_base_patch16_224", 4096, 300, "adamw", 0.0024, 0.0, 40, 0.1, None, "cosine"
    ),
    "moco_v3:vit_s16_imagenet": Written(
        "vit_small_patch16_224", 4096, 300, "adamw", 0.0024, 0.0, 40, 0.1, None, "cosine"
    ),
    "moco_v3:resnet50_imagenet": Written(
        "resnet50", 4096, 100, "lars", 9.6, 0.0, 10, 1e-06, None, "cosine"
    ),
    # zhirongw/lemniscate.pytorch main.py and README
    "npid:imagenet": Written("resnet50", 256, 200, "sgd", 0.03, 0.0, 0, 0.0001, None, "steps"),
    "npid:imagenet_softmax": Written(
        "resnet50", 256, 200, "sgd", 0.03, 0.0, 0, 0.0001, None, "steps"
    ),
    # no paper has this run: MoCo v2's numbers
    "pair:imagenet": Written("resnet50", 256, 200, "sgd", 0.03, 0.0, 0, 0.0001, None, "cosine"),
    # salesforce/PCL main_pcl.py and README
    "pcl:imagenet": Written("resnet50", 256, 200, "sgd", 0.03, 0.0, 0, 0.0001, None, "cosine"),
    "pcl:v1_imagenet": Written("resnet50", 256, 200, "sgd", 0.03, 0.0, 0, 0.0001, None, "steps"),
    # Mitrovic et al. 2021, appendix E; Tomasev et al. 2022 (v2), appendix
    "relic:imagenet": Written(
        "resnet50", 4096, 1000, "lars", 3.2, 0.0, 10, 1.5e-06, None, "cosine"
    ),
    # as relic
    "relic_v2:imagenet": Written(
        "resnet50", 4096, 1000, "lars", 3.2, 0.0, 10, 1.5e-06, None, "cosine"
    ),
    "relic_v2:imagenet_no_masks": Written(
        "resnet50", 4096, 1000, "lars", 3.2, 0.0, 10, 1.5e-06, None, "cosine"
    ),
    # google-research/simclr README
    "simclr:imagenet": Written("resnet50", 4096, 1000, "lars", 4.8, 0.0, 10, 1e-06, None, "cosine"),
    "simclr:v2_imagenet": Written(
        "resnet50", 4096, 800, "lars", 6.4, 0.0, 40, 0.0001, None, "cosine"
    ),
    # facebookresearch/simsiam main_simsiam.py and README
    "simsiam:imagenet": Written("resnet50", 512, 100, "sgd", 0.1, 0.0, 0, 0.0001, None, "cosine"),
    "simsiam:imagenet_800": Written(
        "resnet50", 512, 800, "sgd", 0.1, 0.0, 0, 0.0001, None, "cosine"
    ),
    # keyu-tian/SparK pretrain/utils/arg_util.py and README
    "spark:imagenet": Written(
        "resnet50", 4096, 1600, "lamb", 0.0032, 3.2e-06, 40, 0.04, 0.2, "cosine"
    ),
    # pytorch/examples imagenet/main.py; no paper has vit_b16_imagenet; DeiT as above
    "supervised:imagenet": Written("resnet50", 256, 90, "sgd", 0.1, 0.0, 0, 0.0001, None, "steps"),
    "supervised:vit_b16_imagenet": Written(
        "vit_base_patch16_224", 64, 30, "adamw", 0.001, 0.0, 0, 0.01, None, "cosine"
    ),
    "supervised:deit_s16_imagenet": Written(
        "vit_small_patch16_224", 1024, 300, "adamw", 0.001, 1e-05, 5, 0.05, None, "whole_cosine"
    ),
    # facebookresearch/swav, scripts/*.sh and README
    "swav:imagenet": Written("resnet50", 4096, 800, "larc", 4.8, 0.0048, 10, 1e-06, None, "cosine"),
    "swav:small_batch_imagenet": Written(
        "resnet50", 256, 400, "larc", 0.6, 0.0006, 0, 1e-06, None, "cosine"
    ),
    # facebookresearch/vicreg main_vicreg.py and README
    "vicreg:imagenet": Written(
        "resnet50", 2048, 1000, "lars", 1.6, 0.0016, 10, 1e-06, None, "cosine"
    ),
    "vicreg:imagenet_100": Written(
        "resnet50", 512, 100, "lars", 0.6, 0.0006, 10, 1e-06, None, "cosine"
    ),
}


def test_the_table_has_every_preset_but_the_small_ones() -> None:
    declared = {
        f"{method}:{preset}"
        for method in method_names()
        for preset in find_method(method).presets
        if preset not in OURS
    }
    assert declared == TABLE.keys()
    assert set(method_names()) >= COMPARED


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_has_the_numbers_of_the_table(name: str) -> None:
    method, _, preset_name = name.partition(":")
    preset, published = find_method(method).presets[preset_name], TABLE[name]
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
