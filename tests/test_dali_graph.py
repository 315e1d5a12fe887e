"""The DALI engine's graphs, a GPU's included, without a GPU: placement, copies, size."""

from collections.abc import Callable
from functools import cache

import pytest
import torch

pytest.importorskip("nvidia.dali")

from nvidia.dali import backend

from headrace.pipelines import engines, recipes
from headrace.pipelines.engines.dali.describe import (
    Graph,
    draws_random_numbers,
    graph_of,
)
from headrace.pipelines.engines.dali.graph import build_pipeline
from headrace.pipelines.engines.dali.nodes import Placement
from headrace.pipelines.masks import RandomMask
from headrace.pipelines.ops import (
    CenterCrop,
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    RandAugment,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    Solarize,
)
from headrace.pipelines.recipe import Augmentation, Mix, RandomErasing, View

pytestmark = pytest.mark.dali

ALL_OPS = Augmentation(
    "all",
    (
        View(
            "random",
            (
                RandomResizedCrop(32),
                Flip(),
                ColorJitter(0.4, 0.4, 0.4, 0.1, additive_brightness=True),
                Grayscale(),
                GaussianBlur(),
                Solarize(),
                RandAugment(),
            ),
            count=2,
            mask=RandomMask(16),
            erase=RandomErasing(fill="rand", count=(1, 2)),
        ),
        View("padded", (Resize(40), RandomCrop(32, 4)), erase=RandomErasing(fill="const")),
        View("test", (Resize(40), CenterCrop(32))),
    ),
)
MIXED = Augmentation("mixed", (View("view", (RandomResizedCrop(32),)),), group=2, mix=Mix())
CASES: dict[str, Callable[[], Augmentation]] = {
    **recipes.NAMED,
    "all": lambda: ALL_OPS,
    "mixed": lambda: MIXED,
}

ON_THE_HOST = {"fn.external_source", "fn.per_frame", "fn.peek_image_shape", "fn._shape"}


def finished_dtype(augmentation: Augmentation) -> torch.dtype | None:
    """What a GPU is asked for: finished views, where the graph can finish them."""
    cuda = torch.device("cuda")
    return torch.float32 if engines.finishes("dali", augmentation, cuda, torch.float32) else None


@cache
def graph(name: str, placement: Placement) -> Graph:
    augmentation = CASES[name]()
    return graph_of(augmentation, placement, finished_dtype(augmentation))


@pytest.mark.parametrize("name", CASES)
def test_gpu_graph_differs_in_placement_and_decoder_only(name: str) -> None:
    on_cpu, on_gpu = graph(name, "cpu").nodes, graph(name, "gpu").nodes
    assert len(on_cpu) == len(on_gpu) > 5
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        assert (cpu.name, cpu.operator) == (gpu.name, gpu.operator)
        assert [name for name, _ in cpu.inputs] == [name for name, _ in gpu.inputs]
        assert cpu.placement == "cpu"
        assert {place for _, place in cpu.inputs} <= {"cpu"}
        if cpu.operator.startswith("fn.decoders."):
            assert set(gpu.arguments) - set(cpu.arguments) == {("jpeg_fancy_upsampling", "True")}
            assert set(cpu.arguments) <= set(gpu.arguments)
        else:
            assert cpu.arguments == gpu.arguments


@pytest.mark.parametrize("name", CASES)
def test_gpu_graph_runs_on_the_gpu(name: str) -> None:
    """All that touches pictures; what is copied there are the Plan's numbers, once each."""
    drawn = graph(name, "gpu")
    nodes = drawn.nodes
    placement = {node.name: node.placement for node in nodes}
    for node in nodes:
        if node.operator in ON_THE_HOST:
            assert node.placement == "cpu", node
        elif node.operator.startswith("fn.decoders."):
            assert node.placement == "mixed"
        else:
            assert node.placement == "gpu", node
            of_pictures = [name for name, _ in node.inputs if placement[name] != "cpu"]
            if node.operator.startswith("math."):  # of copied numbers too
                assert {place for _, place in node.inputs} == {"gpu"}, node
            else:
                assert of_pictures or node.operator == "fn.constant", node
    assert set(drawn.copies().values()) <= {"fn.external_source"}


@pytest.mark.parametrize("name", CASES)
def test_outputs_of_a_gpu_graph_are_on_the_gpu(name: str) -> None:
    augmentation = CASES[name]()
    drawn = graph(name, "gpu")
    *made, shape = (place for _, place in drawn.outputs)
    masks = sum(view.mask is not None for view in augmentation.flat_views)
    assert made == ["gpu"] * (len(augmentation.views) + masks)
    assert shape == "cpu"
    assert len(drawn.copies()) >= masks


@pytest.mark.parametrize("placement", ["cpu", "gpu"])
@pytest.mark.parametrize("name", CASES)
def test_no_operator_draws_random_numbers_or_calls_python(name: str, placement: Placement) -> None:
    nodes = graph(name, placement).nodes
    assert [node.operator for node in nodes if node.draws_random_numbers] == []
    for node in nodes:
        assert not any(word in node.operator for word in ("random", "noise", "python", "numba"))
    branches = {"fn._conditional.split", "fn._conditional.merge"}
    assert not branches & {node.operator for node in nodes}


@pytest.mark.parametrize("name", ["random__Uniform", "RandomResizedCrop", "noise__Gaussian"])
def test_random_operators_would_be_seen(name: str) -> None:
    schema = backend.GetSchema(name)  # pyright: ignore[reportAttributeAccessIssue]
    assert draws_random_numbers(schema)


@pytest.mark.parametrize("name", CASES)
def test_gpu_graph_serialises_without_a_gpu(name: str) -> None:
    augmentation = CASES[name]()
    finished = finished_dtype(augmentation)
    written = build_pipeline(augmentation, "gpu", finished=finished).serialize()
    assert b"jpeg_fancy_upsampling" in written
    assert (b"CropMirrorNormalize" in written) == (finished is not None)


def test_the_vocabulary_is_in_the_graph() -> None:
    operators = {node.operator for name in ("all", "mixed") for node in graph(name, "gpu").nodes}
    assert operators >= {
        "fn.coord_transform", "fn.crop_mirror_normalize", "fn.equalize", "fn.erase", "fn.filter",
        "fn.flip", "fn.gaussian_blur", "fn.permute_batch", "fn.reductions.max", "fn.resize",
        "fn.slice", "fn.stack", "fn.warp_affine",
    }  # fmt: skip


# Kernels, or a few each, that a GPU runs for a batch: a bound on what launching them costs.
GPU_NODES = {"mae": 10, "supervised": 10, "simclr": 130, "dino": 420, "deit": 140, "deit3": 60}


@pytest.mark.parametrize("name", GPU_NODES)
def test_graphs_stay_small(name: str) -> None:
    counts = graph(name, "gpu").counts()
    print(name, counts)
    assert counts["gpu"] <= GPU_NODES[name]
    assert counts["decoding"] == 1
    assert counts["copies"] < counts["inputs"]
    assert counts["all"] == sum(counts[kind] for kind in ("inputs", "decoding", "host", "gpu"))
