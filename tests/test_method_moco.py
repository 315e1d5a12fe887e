"""MoCo: its key encoder, queue and bank, and whose statistics a query and its key have."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from headrace.pipelines.batch import Batch
from headrace.training.backbones import EncoderFactory
from headrace.training.blocks.memory import Queue, RowMemory
from headrace.training.method import Facts
from headrace.training.methods import moco
from headrace.training.preset import ConfigError, Preset
from headrace.training.world import World
from tests.precision import in_float64
from tests.tiny_methods import (
    ENCODERS,
    batch_of,
    build,
    make_batch,
    progress_at,
    sgd,
    share,
    small_preset,
    train_step,
)
from tests.two_ranks import Call, assert_agrees, smooth, train, uneven


def moco_of(encoder: str = "test_vit", **changes: Any) -> moco.Moco:
    method = build("moco", encoder, **changes)
    assert isinstance(method, moco.Moco)
    return method


def test_moco_moves_its_key_encoder_before_the_keys_are_made() -> None:
    """Parameters by the momentum, buffers by their own batches."""
    method, batch = moco_of("test_resnet", teacher_momentum=0.9), batch_of("moco")
    train_step(method, sgd(method, 0.1), [batch], progress_at(0))
    before, student = (
        {name: p.detach().clone() for name, p in part.named_parameters()}
        for part in (method.key_encoder, method.encoder)
    )
    buffers = {name: b.clone() for name, b in method.key_encoder.named_buffers()}
    method.before_step(progress_at(1))
    for name, parameter in method.key_encoder.named_parameters():
        expected = 0.9 * before[name] + 0.1 * student[name]
        torch.testing.assert_close(parameter, expected)
    assert any(not torch.equal(before[name], student[name]) for name in before)
    for name, buffer in method.key_encoder.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    # The rest of the step leaves it alone, and it makes the keys.
    moved = copy.deepcopy(method.key_encoder), copy.deepcopy(method.key_projection)
    _, embeddings = method(batch, progress_at(1))
    with torch.no_grad():
        assert torch.equal(embeddings["key"], moved[1](moved[0](batch.views[1])))


def test_moco_queue_takes_all_keys_after_the_step_oldest_out_first() -> None:
    method, batches = moco_of(), [batch_of("moco", seed=seed) for seed in range(3)]
    queue = method.memory
    assert isinstance(queue, Queue)
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(32))
    start, keys, optimizer = queue.rows.clone(), [], sgd(method)
    for step, batch in enumerate(batches):
        method.before_step(progress_at(step))
        halves = [share(batch, slice(0, 8)), share(batch, slice(8, 16))]
        with torch.no_grad():
            made = method.embed(batch, progress_at(step))["key"]
        keys.append(nn.functional.normalize(made, dim=1))
        method.before_step = lambda progress: None  # has been
        train_step(method, optimizer, halves, progress_at(step))
        del method.before_step
        if step == 0:
            torch.testing.assert_close(queue.rows, torch.cat([keys[0], start[16:]]))
    torch.testing.assert_close(queue.rows, torch.cat([keys[2], keys[1]]))
    assert queue.cursor == 16


def statistics_of_one_sample(method: moco.Moco, batch: Batch, changed: int) -> tuple[bool, bool]:
    """Whether sample 0's query and key change with both pictures of another sample."""
    views = tuple(view.clone() for view in batch.views)
    for view in views:
        view[changed] = view[changed].flip(-1) + 1
    with torch.no_grad():
        one, other = (
            copy.deepcopy(method).embed(each, progress_at(0))
            for each in (batch, replace(batch, views=views))
        )
    return tuple(
        not torch.allclose(one[name][0], other[name][0], rtol=1e-3, atol=1e-4)
        for name in ("query", "key")
    )  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(
    ("changed", "expected"), [(1, (True, False)), (4, (False, True)), (5, (False, False))]
)
def test_moco_query_and_key_have_their_statistics_from_different_samples(
    changed: int, expected: tuple[bool, bool]
) -> None:
    """Groups of 4 in 16: the query's is 0 to 3, the key's 0, 4, 8 and 12."""
    method = moco_of("test_resnet", batch_norm_group=4)
    assert statistics_of_one_sample(method, batch_of("moco"), changed) == expected


def test_moco_without_groups_has_the_statistics_of_the_batch() -> None:
    method = moco_of("test_resnet", batch_norm_group=0)
    assert statistics_of_one_sample(method, batch_of("moco"), 5) == (True, True)


def test_everything_decays() -> None:
    assert [group["decay"] for group in build("moco", "test_resnet").param_groups()] == [True]


# ---- the other dictionaries


def single(augmentation: Any) -> Any:
    return replace(augmentation, views=(replace(augmentation.views[0], count=1),))


def bank_of(momentum: float = 0.5) -> tuple[moco.Moco, Preset]:
    preset = small_preset("moco", dictionary="bank", bank_momentum=momentum)
    preset = replace(preset, augmentation=single(preset.augmentation))
    factory = EncoderFactory("test_vit", {**ENCODERS["test_vit"], "img_size": 32})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        method = moco.build(preset.objective, factory, Facts(0, 64, (32,), 16, 4, 20))
    return method, preset


def test_moco_bank_moves_the_rows_of_the_batch_alone() -> None:
    method, preset = bank_of(momentum=0.25)
    batch = make_batch(preset.augmentation)
    bank = method.memory
    assert isinstance(bank, RowMemory)
    assert len(bank) == 64
    before, optimizer = bank.rows.clone(), sgd(method)
    with torch.no_grad():
        query = method.embed(batch, progress_at(0))["query"]
    halves = [share(batch, slice(0, 8)), share(batch, slice(8, 16))]
    train_step(method, optimizer, halves, progress_at(0))
    expected = before.clone()
    moved = 0.25 * before[batch.ids] + 0.75 * nn.functional.normalize(query, dim=1)
    expected[batch.ids] = nn.functional.normalize(moved, dim=1)
    torch.testing.assert_close(bank.rows, expected)
    assert "key_encoder" not in dict(method.named_children())


def test_moco_bank_draws_negatives_of_the_step() -> None:
    method, preset = bank_of()
    batch = make_batch(preset.augmentation)
    with torch.no_grad():
        losses = [method(batch, progress_at(step))[0]["loss"] for step in (0, 0, 1)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_moco_end_to_end_trains_through_its_keys() -> None:
    method, batch = moco_of(dictionary="batch"), batch_of("moco")
    _, embeddings = method(batch, progress_at(0))
    leaves = {name: value.detach().requires_grad_() for name, value in embeddings.items()}
    method.objective(leaves, batch, progress_at(0))["loss"].backward()
    assert all(leaf.grad is not None and leaf.grad.any() for leaf in leaves.values())
    # The queue's keys take none.
    method = moco_of()
    _, embeddings = method(batch, progress_at(0))
    leaves = {name: value.detach().requires_grad_() for name, value in embeddings.items()}
    method.objective(leaves, batch, progress_at(0))["loss"].backward()
    assert leaves["query"].grad is not None
    assert leaves["key"].grad is None


@pytest.mark.dist
@pytest.mark.parametrize("dictionary", ["batch", "bank"])
def test_moco_other_dictionaries_on_two_ranks(dictionary: str, on_two_ranks: Call) -> None:
    with in_float64():
        if dictionary == "bank":
            method, preset = bank_of()
        else:
            method, preset = moco_of(dictionary=dictionary), small_preset("moco")
        method = smooth(method)
        batches = [uneven(make_batch(preset.augmentation, 16, seed)) for seed in range(3)]
        one = train(method, preset, batches, 0, 1e-2, World())
        two = on_two_ranks(train, method, preset, batches, 0, 1e-2)
        assert two[0]["digest"] == two[1]["digest"]
        for seen in two:
            assert_agrees(seen, one)


# ---- what build refuses


@pytest.mark.parametrize(
    ("changes", "pixels", "batch", "message"),
    [
        ({"queue_size": 40}, (32, 32), 16, "no multiple of the batch of 16"),
        ({"queue_size": 8}, (32, 32), 16, "no multiple of the batch of 16"),
        ({}, (32, 32, 16), 16, r"needs 2 view\(s\) of one size"),
        ({"dictionary": "bank"}, (32, 32), 16, r"needs 1 view\(s\) of one size"),
        ({"batch_norm_group": 16}, (32, 32), 16, "two or more groups of 16 samples"),
        ({"batch_norm_group": 6}, (32, 32), 16, "whole ones on each of 1 rank"),
        ({"projection_layers": 0}, (32, 32), 16, "one layer or more"),
    ],
)
def test_moco_refuses(
    changes: dict[str, Any], pixels: tuple[int, ...], batch: int, message: str
) -> None:
    objective = small_preset("moco", **changes).objective
    with pytest.raises(ConfigError, match=message):
        moco.build(objective, EncoderFactory("test_resnet", {}), Facts(0, 64, pixels, batch, 4, 20))


def test_moco_on_a_vision_transformer_needs_no_groups() -> None:
    assert moco_of("test_vit", batch_norm_group=16)
