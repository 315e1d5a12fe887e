"""The DALI engine on a GPU: pixels, finished batches, streams and speed. Needs a CUDA device.

Where there is none, all of this is skipped, and `test_dali_graph` still builds, places and
serialises the graphs. The last tests here need no GPU: they hold the hand-over between streams.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali")

from headrace.pipelines import engines, recipes, stream
from headrace.pipelines.approximation import APPROXIMATIONS
from headrace.pipelines.batch import Batch, Erased, Mixed
from headrace.pipelines.engines.device_stage import device_stage
from headrace.pipelines.loader import open_loader
from headrace.pipelines.masks import BlockMask
from headrace.pipelines.ops import (
    RAND_AUGMENT_OPERATIONS,
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
    ViewOp,
)
from headrace.pipelines.recipe import Augmentation, Mix, RandomErasing, View
from headrace.shards.store import Store, open_store
from tests.dali_cases import (
    CPU,
    in_small_groups,
    levels_apart,
    make_work,
    one_view,
    photo_and_smooth_pictures,
    run_dali,
    run_reference,
)

pytestmark = pytest.mark.dali

CUDA = torch.device("cuda")
SAME = 1e-3
CUT = CenterCrop(140)


def on_a_gpu(test: Callable[..., None]) -> Callable[..., None]:
    without = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(without(test))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return list(photo_and_smooth_pictures())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = tmp_path_factory.mktemp("pictures")
    (root / "all").mkdir()
    for index in range(64):
        picture = photo_and_smooth_pictures()[index % 6]
        picture.rotate(index).save(root / "all" / f"{index}.jpg", quality=92)
    return open_store(root)


def on_the_host(batches: Sequence[Batch]) -> list[Batch]:
    return [batch.to(CPU) for batch in batches]


def assert_same(made: Sequence[Batch], expected: Sequence[Batch], tolerance: float = SAME) -> None:
    for mine, theirs in zip(on_the_host(made), on_the_host(expected), strict=True):
        for a, b in zip(mine.tensors(), theirs.tensors(), strict=True):
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            if a.is_floating_point():
                assert float((a.float() - b.float()).abs().max()) <= tolerance
            else:
                assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------- pixels

GEOMETRY: list[tuple[ViewOp, ...]] = [
    (RandomResizedCrop(96, (0.05, 0.4)),),
    (RandomResizedCrop(64, interpolation="bilinear"),),
    (Resize(120), CenterCrop(101)),
    (RandomCrop(160, 30),),
    (CUT, Flip()),
]
VALUES: list[ViewOp] = [
    ColorJitter(0.8, 0.8, 0.8, 0.2, 0.8),
    ColorJitter(0.4, 0.4, 0.2, 0.1, additive_brightness=True),
    Grayscale(0.5),
    GaussianBlur(0.7, (0.5, 2.0)),
    Solarize(0.5, 100),
    *(
        RandAugment(num_ops=1, probability=1.0, interpolation="bilinear", operations=(name,))
        for name in RAND_AUGMENT_OPERATIONS
    ),
    RandAugment(interpolation="bilinear"),
]


@on_a_gpu
@pytest.mark.parametrize(
    ("ops", "levels"),
    [*((ops, 1.0) for ops in GEOMETRY), *(((CUT, op), 2.0) for op in VALUES)],
    ids=str,
)
def test_ops_are_the_references(
    pictures: list[Image.Image], ops: tuple[ViewOp, ...], levels: float
) -> None:
    augmentation = one_view(*ops)
    work = [make_work(augmentation, pictures, seed=seed) for seed in range(2)]
    made = on_the_host(run_dali(augmentation, work, device=CUDA))
    assert levels_apart(made, run_reference(augmentation, work)).max() <= levels


@on_a_gpu
@pytest.mark.parametrize("name", recipes.NAMED)
def test_recipes_are_the_references_and_the_cpu_graphs(
    pictures: list[Image.Image], name: str
) -> None:
    augmentation = in_small_groups(recipes.NAMED[name]())
    work = [make_work(augmentation, pictures[:4], "JPEG", seed=seed) for seed in range(2)]
    made = on_the_host(run_dali(augmentation, work, device=CUDA))
    assert levels_apart(made, run_reference(augmentation, work)).max() <= 4
    assert levels_apart(made, run_dali(augmentation, work)).mean() <= 1


@on_a_gpu
def test_a_region_has_the_pixels_of_the_whole_picture(pictures: list[Image.Image]) -> None:
    alone = one_view(RandomResizedCrop(32, (0.02, 0.5), interpolation="bilinear"))
    beside = Augmentation("two", (*alone.views, View("other", (CenterCrop(16),))))
    for seed in range(3):
        (a,) = run_dali(alone, [make_work(alone, pictures, "JPEG", seed=seed)], device=CUDA)
        (b,) = run_dali(beside, [make_work(beside, pictures, "JPEG", seed=seed)], device=CUDA)
        apart = (a.views[0].int() - b.views[0].int()).abs().double().mean((1, 2, 3))
        assert float(apart.max()) <= 0.5


# --------------------------------------------------------------------------------- finished batches

FINISHED = Augmentation(
    "finished",
    (
        View(
            "view",
            (RandomResizedCrop(64), Flip()),
            mask=BlockMask(16, (0.1, 0.5), min_patches=1),
            erase=RandomErasing(0.8, fill="rand", count=(1, 2)),
        ),
    ),
    group=2,
    mix=Mix(0.8, 1.0, scope="pair"),
)


@on_a_gpu
@pytest.mark.parametrize("erase", ["const", "rand"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, SAME), (torch.float16, 4e-3)])
def test_finished_batches_are_the_device_stages(
    pictures: list[Image.Image], erase: str, dtype: torch.dtype, tolerance: float
) -> None:
    (view,) = FINISHED.views
    erasing = RandomErasing(0.8, fill="const" if erase == "const" else "rand", count=(1, 2))
    augmentation = replace(FINISHED, views=(replace(view, erase=erasing),))
    work = [make_work(augmentation, pictures, seed=seed) for seed in range(3)]
    mean, std = augmentation.mean, augmentation.std
    expected = [
        device_stage(batch, mean, std, device=CUDA, dtype=dtype)
        for batch in run_dali(augmentation, work, device=CUDA)
    ]
    made = run_dali(augmentation, work, device=CUDA, finished=dtype)
    assert_same(made, expected, tolerance)
    for batch in made:
        assert batch.views[0].device.type == CUDA.type
        assert batch.masks[0] is not None
        assert batch.masks[0].device.type == CUDA.type


@on_a_gpu
def test_batches_that_are_held_stay_as_they_are(pictures: list[Image.Image]) -> None:
    work = [make_work(FINISHED, pictures, seed=seed) for seed in range(12)]
    held: list[Batch] = []
    copies: list[Batch] = []
    engine = engines.open_engine("dali", FINISHED, device=CUDA, finished=torch.float32)
    for batch in engine.run(iter(work)):
        held.append(batch)
        copies.append(batch.map(torch.clone))
    engine.close()
    assert_same(held, copies, 0)


# ------------------------------------------------------------------------------ streams and speed


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    """torch raises where the host would wait for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode(before)


@on_a_gpu
@pytest.mark.parametrize("engine", ["dali", "fused"])
@pytest.mark.parametrize("name", ["mae", "simclr", "deit"])
@pytest.mark.usefixtures("no_synchronisation")
def test_nothing_in_the_loop_waits_for_the_gpu(store: Store, engine: str, name: str) -> None:
    augmentation = in_small_groups(recipes.NAMED[name]())
    with open_loader(
        store,
        augmentation,
        batch_size=16,
        engine=engine,
        device=CUDA,
        approximate=APPROXIMATIONS,
    ) as loader:
        total = torch.zeros((), device=CUDA)
        for batch in itertools.chain(loader, loader):
            total += batch.views[0].float().sum()  # the consumer's work, on its own stream


@on_a_gpu
@pytest.mark.parametrize("name", ["mae", "simclr"])
def test_a_loader_gives_what_the_cpus_gives(store: Store, name: str) -> None:
    augmentation = recipes.NAMED[name]()

    def batches(device: torch.device) -> list[Batch]:
        with open_loader(store, augmentation, batch_size=16, engine="dali", device=device) as made:
            return list(made)

    for mine, theirs in zip(batches(CUDA), batches(CPU), strict=True):
        assert torch.equal(mine.ids.cpu(), theirs.ids)
        for a, b in zip(mine.views, theirs.views, strict=True):
            levels = float((a.cpu() - b).abs().mean()) * 255 * max(augmentation.std)
            assert levels <= 4


@on_a_gpu
@pytest.mark.bench
@pytest.mark.parametrize("name", ["mae", "simclr", "dino"])
def test_a_gpu_is_faster_than_a_core(pictures: list[Image.Image], name: str) -> None:
    """No benchmark: a graph that fell back to the host, or waits, would be seen."""
    augmentation = recipes.NAMED[name]()
    work = make_work(augmentation, pictures * 10, "JPEG")

    def seconds(device: torch.device, batches: int) -> float:
        engine = engines.open_engine(
            "dali", augmentation, device=device, threads=1, finished=torch.float32
        )
        run = engine.run(itertools.repeat(work, batches + 2))
        for _ in range(2):
            next(run)
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in run:
            pass
        torch.cuda.synchronize()
        engine.close()
        return (time.perf_counter() - started) / batches

    on_gpu, on_core = seconds(CUDA, 20), seconds(CPU, 1)
    samples = len(work.encoded)
    print(
        f"{name}: {samples / on_gpu:,.0f} images/s on the GPU, {samples / on_core:,.0f} on a core"
    )
    assert on_gpu < on_core


# ------------------------------------------------------------------- the hand-over, without a GPU


@dataclass
class FakeStream:
    waited: list[object] = field(default_factory=list)

    def wait_event(self, event: object) -> None:
        self.waited.append(event)


def full_batch() -> Batch:
    """Every tensor that a Batch can hold."""
    numbers = (torch.arange(2) + index for index in itertools.count())
    return Batch(
        views=(next(numbers), next(numbers)),
        labels=next(numbers),
        ids=next(numbers),
        masks=(next(numbers), None),
        epoch=0,
        position=0,
        draws={"own": next(numbers)},
        erased=(Erased(next(numbers), next(numbers), next(numbers)), None),
        mixed=Mixed(next(numbers), next(numbers), next(numbers), next(numbers)),
    )


def test_the_consumers_stream_waits_and_keeps_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    consumer, event, batch = FakeStream(), object(), full_batch()
    recorded: list[tuple[int, Any]] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: consumer)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, to: recorded.append((id(tensor), to))
    )
    given: Any = event
    assert stream.receive(batch, given, CUDA) is batch
    assert consumer.waited == [event]
    assert all(to is consumer for _, to in recorded)
    assert {tensor for tensor, _ in recorded} == {id(tensor) for tensor in batch.tensors()}
    assert len(recorded) == 13


def test_what_is_on_the_host_is_pinned_before_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(id(tensor))
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = full_batch()
    on_device = replace(batch, views=tuple(view.to("meta") for view in batch.views))
    made = stream._pinned(on_device)
    assert set(pinned) == {id(tensor) for tensor in batch.tensors()} - {
        id(view) for view in batch.views
    }
    assert all(view.device.type == "meta" for view in made.views)


def test_the_worker_has_a_stream_of_its_own_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stream._side_stream(CPU).__enter__() is None
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or "side")
    monkeypatch.setattr(torch.cuda, "stream", lambda side: f"within {side}")
    assert stream._side_stream(CUDA) == "within side"  # pyright: ignore[reportComparisonOverlap]
    assert made == [CUDA]


def test_an_engine_copies_a_gpus_outputs_to_torchs_memory() -> None:
    from headrace.pipelines.engines.dali.engine import DaliEngine

    output = torch.arange(24).view(2, 3, 4)
    on_gpu = DaliEngine(one_view(CUT), CUDA, 1, None, ())
    assert on_gpu._owned(output).data_ptr() != output.data_ptr()
    on_cpu = DaliEngine(one_view(CUT), CPU, 1, None, ())
    assert on_cpu._owned(output).data_ptr() == output.data_ptr()
    assert on_cpu._owned(output[:, 1]).is_contiguous()
