"""Recipes that look at one box of a picture decode that box only, to the same pixels."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali")

from headrace.pipelines import recipes
from headrace.pipelines.engines import SampleError
from headrace.pipelines.engines.dali.columns import (
    decodes_region,
    picture_prefix,
    plan_columns,
    region_columns,
)
from headrace.pipelines.engines.dali.describe import graph_of
from headrace.pipelines.ops import CenterCrop, Flip, RandomResizedCrop, Resize
from headrace.pipelines.recipe import Augmentation, View
from tests.dali_cases import (
    file_bytes,
    levels_apart,
    make_work,
    one_view,
    photo_and_smooth_pictures,
    run_dali,
    run_reference,
    work_of,
)

pytestmark = pytest.mark.dali

# Small boxes, so that most of their borders lie within JPEG's blocks of 16 pixels.
CROP = RandomResizedCrop(32, (0.02, 0.5), interpolation="bilinear")
ALONE = one_view(CROP, Flip())
# The same draws for the first view, and a second one, which has the whole picture decoded.
BESIDE = Augmentation("two", (*ALONE.views, View("other", (CenterCrop(16),))))


def test_who_decodes_a_region() -> None:
    found = {name for name, recipe in recipes.NAMED.items() if decodes_region(recipe())}
    assert {"mae", "deit", "supervised", "ijepa", "spark"} <= found
    assert not found & {"simclr", "dino", "center", "jigsaw"}
    assert decodes_region(ALONE)
    assert not decodes_region(BESIDE)
    assert not decodes_region(replace(ALONE, views=(replace(ALONE.views[0], count=2),)))
    assert not decodes_region(one_view(Resize(40), CenterCrop(32)))


@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": sampling, "progressive": progressive, "quality": quality}
        for sampling, progressive, quality in (
            ("4:4:4", False, 95),
            ("4:2:2", False, 80),
            ("4:2:0", False, 40),
            ("4:2:0", False, 95),
            ("4:2:0", True, 80),
            ("4:1:1", False, 80),
        )
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_a_box_has_the_pixels_of_the_whole_picture(options: dict[str, object]) -> None:
    pictures = [
        picture.crop((0, 0, picture.width - cut, picture.height - 3 * cut))
        for cut, picture in enumerate(photo_and_smooth_pictures())
    ]
    encoded = [file_bytes(picture, "JPEG", **options) for picture in pictures]
    sizes = [(picture.height, picture.width) for picture in pictures]
    for seed in range(3):
        (alone,) = run_dali(ALONE, [work_of(ALONE, encoded, sizes, seed=seed)])
        (beside,) = run_dali(BESIDE, [work_of(BESIDE, encoded, sizes, seed=seed)])
        assert torch.equal(alone.views[0], beside.views[0])


@pytest.mark.parametrize("kind", ["PPM", "PNG", "WEBP"])
def test_other_files_too(kind: str) -> None:
    pictures = photo_and_smooth_pictures()
    (alone,) = run_dali(ALONE, [make_work(ALONE, pictures, kind)])
    (beside,) = run_dali(BESIDE, [make_work(BESIDE, pictures, kind)])
    assert torch.equal(alone.views[0], beside.views[0])


def test_rotated_grey_and_four_colours_too() -> None:
    picture = photo_and_smooth_pictures()[0]
    rotated = Image.Exif()
    rotated[0x0112] = 6
    encoded = [
        file_bytes(picture, "JPEG", exif=rotated),
        file_bytes(picture.convert("L"), "JPEG"),
        file_bytes(picture.convert("CMYK"), "JPEG"),
    ]
    sizes = [(picture.height, picture.width)] * 3
    work = work_of(ALONE, encoded, sizes)
    (alone,) = run_dali(ALONE, [work])
    (beside,) = run_dali(BESIDE, [work_of(BESIDE, encoded, sizes)])
    assert torch.equal(alone.views[0], beside.views[0])
    assert levels_apart([alone], run_reference(ALONE, [work])).max() <= 0.4  # of resizing


def test_a_file_without_its_end_is_refused_wherever_the_box_is() -> None:
    """The box of the first sample lies in the part that is there; the graph decodes all of it."""
    picture = photo_and_smooth_pictures()[0]
    whole = file_bytes(picture, "JPEG")
    size = (picture.height, picture.width)
    work = work_of(ALONE, [whole[: len(whole) * 3 // 4]], [size], first_id=5)
    at_the_top = {"box": np.array([[0, 0, 16, 16]], np.int32)}
    (view,) = work.plan.views
    views = (replace(view, ops=(at_the_top, *view.ops[1:])),)
    work = replace(work, plan=replace(work.plan, views=views))
    with pytest.raises(SampleError, match="sample 5 cannot be decoded: DALI refuses it"):
        run_dali(ALONE, [work])


def test_bytes_after_the_end_are_no_damage() -> None:
    picture = photo_and_smooth_pictures()[0]
    whole = file_bytes(picture, "JPEG")
    size = (picture.height, picture.width)
    longer = np.concatenate([whole, np.zeros(7, np.uint8)])
    (made,) = run_dali(ALONE, [work_of(ALONE, [whole, longer], [size] * 2)])
    (expected,) = run_dali(ALONE, [work_of(ALONE, [whole, whole], [size] * 2)])
    assert torch.equal(made.views[0], expected.views[0])


@pytest.mark.parametrize("true_side", [40, 160], ids=["smaller", "larger"])
def test_a_picture_of_another_size_is_named(true_side: int) -> None:
    encoded = [file_bytes(Image.new("RGB", (side, side)), "JPEG") for side in (80, true_side)]
    augmentation = one_view(RandomResizedCrop(16, (0.9, 1.0)))
    work = work_of(augmentation, encoded, [(80, 80)] * 2, first_id=4)
    with pytest.raises(SampleError, match=f"{true_side} x {true_side} .*index says 80 x 80") as e:
        run_dali(augmentation, [work])
    assert e.value.sample_id == 5


def test_columns_say_what_is_decoded_and_where_the_box_is_in_it() -> None:
    pictures = photo_and_smooth_pictures()[:3]
    plan = make_work(ALONE, pictures).plan
    plain = plan_columns(ALONE, plan)
    columns = region_columns(plain, plan, np.array([False, True, False]))
    box = plan.views[0].ops[0]["box"]
    start = columns[picture_prefix(0, 0, 0) + "start"]
    assert columns["region.start"].tolist() == [box[0, :2].tolist(), [0, 0], box[2, :2].tolist()]
    assert columns["region.shape"][1].tolist() == plan.sizes[1].tolist()
    assert np.array_equal(columns["region.start"] + start, box[:, :2])
    assert np.array_equal(columns[picture_prefix(0, 0, 0) + "shape"], box[:, 2:])
    assert columns.keys() == {*plain, "region.start", "region.shape"}


@pytest.mark.parametrize("augmentation", [ALONE, BESIDE], ids=["alone", "beside"])
def test_the_graph_has_one_decoder(augmentation: Augmentation) -> None:
    operators = [node.operator for node in graph_of(augmentation, "cpu").nodes]
    region = decodes_region(augmentation)
    decoder = "fn.decoders.image_slice" if region else "fn.decoders.image"
    assert [name for name in operators if "decoders" in name] == [decoder]
    assert ("fn.peek_image_shape" in operators) == region
