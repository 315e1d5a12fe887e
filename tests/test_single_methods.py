"""What single methods promise beyond the contract that test_methods.py holds all of them to."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headrace.training.backbones import EncoderFactory
from headrace.training.method import Facts, Progress
from headrace.training.preset import ConfigError
from tests.tiny_methods import (
    CLASSES,
    batch_of,
    build,
    module_of,
    progress_at,
    sgd,
    small_preset,
    train_step,
)


def test_dino_moves_its_center_once_per_step_from_all_micro_batches() -> None:
    whole = batch_of("dino")
    halves = [
        replace(
            whole,
            views=tuple(view[rows] for view in whole.views),
            labels=whole.labels[rows],
            ids=whole.ids[rows],
        )
        for rows in (slice(0, 8), slice(8, 16))
    ]
    one, two = (build("dino", "test_vit", drop_path=0.2) for _ in range(2))
    optimizers = [sgd(method) for method in (one, two)]
    for step in range(3):
        losses = [
            train_step(one, optimizers[0], [whole], progress_at(step)),
            train_step(two, optimizers[1], halves, progress_at(step)),
        ]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    assert one.get_buffer("center").any()
    torch.testing.assert_close(one.get_buffer("center"), two.get_buffer("center"))
    expected = 0.1 * build("dino", "test_vit").embed(whole, progress_at(0))["teacher"].mean((0, 1))
    fresh = build("dino", "test_vit")
    train_step(fresh, sgd(fresh), [whole], progress_at(0))
    torch.testing.assert_close(fresh.get_buffer("center"), expected)


def test_dino_clips_each_parameter_and_holds_the_prototypes() -> None:
    method = build("dino", "test_vit", freeze_last_layer_epochs=1, clip=0.01)
    prototypes = method.get_parameter("student_head.prototypes.weight")
    for step, held in [(0, True), (3, True), (4, False)]:
        method.zero_grad()
        method(batch_of("dino"), progress_at(step))[0]["loss"].backward()
        unclipped = {k: p.grad.clone() for k, p in method.named_parameters() if p.grad is not None}
        method.after_backward(progress_at(step))
        assert (prototypes.grad is None) == held
        for key, parameter in method.named_parameters():
            if parameter.grad is not None:
                factor = min(1.0, 0.01 / (float(unclipped[key].norm()) + 1e-6))
                torch.testing.assert_close(parameter.grad, unclipped[key] * factor)
    assert any(gradient.norm() > 0.01 for gradient in unclipped.values())


def test_dino_teacher_starts_as_the_student_and_ends_still() -> None:
    method = build("dino", "test_resnet")
    student = dict(method.named_parameters())
    for key, value in method.encoder.named_parameters():
        assert torch.equal(value, student[f"student.{key}"])
    before = {key: value.clone() for key, value in method.encoder.named_parameters()}
    # The momentum is 1 at the end of the run.
    last = Progress(step=10**6 - 1, total_steps=10**6, steps_per_epoch=10, seed=0)
    train_step(method, sgd(method, 0.1), [batch_of("dino")], last)
    for key, value in method.encoder.named_parameters():
        torch.testing.assert_close(value, before[key], rtol=0, atol=1e-8)


def test_dino_may_learn_the_lengths_of_prototypes() -> None:
    changes: dict[str, Any] = {"normalize_prototypes": False, "teacher_momentum": 0.5}
    method, batch = build("dino", "test_vit", **changes), batch_of("dino")
    lengths = method.get_parameter("student_head.prototypes.lengths")
    train_step(method, sgd(method, 1.0), [batch], progress_at(0))
    assert (lengths - 1).abs().max() > 1e-3
    followed = method.get_parameter("teacher_head.prototypes.lengths")
    torch.testing.assert_close(followed, (1 + lengths) / 2)
    held = build("dino", "test_vit", freeze_last_layer_epochs=1, **changes)
    train_step(held, sgd(held, 1.0), [batch], progress_at(0))
    assert (held.get_parameter("student_head.prototypes.lengths") == 1).all()


def test_dino_wants_its_global_views_first() -> None:
    recipe = small_preset("dino")
    for pixels in [(32,), (32, 16, 32), (16, 16, 32)]:
        with pytest.raises(ConfigError, match="two global views of one size"):
            module_of("dino").build(
                recipe.objective,
                EncoderFactory("test_resnet", {}),
                Facts(0, 64, pixels, 16, 4, 20),
            )


def test_mae_encoder_sees_the_kept_patches_alone() -> None:
    method, batch = build("mae", "test_vit"), batch_of("mae", samples=2)
    mask = batch.masks[0]
    assert mask is not None
    prediction = method.embed(batch, progress_at(0))["prediction"]
    painted = batch.views[0].clone()
    hidden = mask.view(2, 8, 8).repeat_interleave(4, 1).repeat_interleave(4, 2)
    painted.masked_fill_(hidden[:, None], 100.0)
    changed = replace(batch, views=(painted,))
    torch.testing.assert_close(method.embed(changed, progress_at(0))["prediction"], prediction)
    painted = batch.views[0].masked_fill(~hidden[:, None], 100.0)
    changed = replace(batch, views=(painted,))
    assert not torch.allclose(method.embed(changed, progress_at(0))["prediction"], prediction)


def test_mae_puts_tokens_back_where_they_were() -> None:
    """With nothing masked the encoder's tokens are timm's own, in order."""
    method = build("mae", "test_vit").eval()
    x = batch_of("mae", samples=2).views[0]
    kept = torch.arange(64).expand(2, -1)
    encode: Any = method.encode
    features: Any = method.encoder.forward_features
    torch.testing.assert_close(encode(x, kept), features(x))


def test_mae_decoder_has_each_token_in_its_place() -> None:
    """Around blocks that do nothing: the kept patches' tokens, and mask tokens everywhere else."""
    method = build("mae", "test_vit")
    decoder: Any = method.decoder
    decoder.blocks = decoder.norm = decoder.pixels = nn.Identity()
    tokens, kept = torch.randn(2, 1 + 3, 64), torch.tensor([[1, 5, 40], [0, 2, 63]])
    painted = decoder(tokens, kept) - decoder.positions[1:]
    expected = decoder.mask_token.expand(2, 64, -1).clone()
    for sample in range(2):
        expected[sample, kept[sample]] = decoder.embed(tokens[sample, 1:])
    torch.testing.assert_close(painted, expected)


def test_mae_does_not_take_another_mask_for_its_own() -> None:
    method, batch = build("mae", "test_vit"), batch_of("mae")
    assert method(batch, progress_at(0))[0]["loss"].isfinite()
    mask = batch.masks[0]
    assert mask is not None
    fewer = mask.clone()
    fewer[0, int(mask[0].byte().argmax())] = False
    assert method(replace(batch, masks=(fewer,)), progress_at(1))[0]["loss"].isnan()
    for masks, text in [((None,), "no mask"), ((mask[:, :16],), "a mask over 16 patches")]:
        with pytest.raises(ConfigError, match=text):
            method(replace(batch, masks=masks), progress_at(1))


def test_supervised_ignores_samples_without_label() -> None:
    method, batch = build("supervised", "test_vit").eval(), batch_of("supervised")
    labels = batch.labels.clone()
    labels[10:] = -1
    partly = method(replace(batch, labels=labels), progress_at(0))[0]["loss"]
    first = replace(batch, views=(batch.views[0][:10],), labels=labels[:10], ids=batch.ids[:10])
    torch.testing.assert_close(partly, method(first, progress_at(0))[0]["loss"])
    nothing = method(replace(batch, labels=labels.fill_(-1)), progress_at(0))[0]["loss"]
    assert nothing == 0


def test_supervised_evaluates_the_labelled_samples() -> None:
    method, batch = build("supervised", "test_resnet").eval(), batch_of("supervised")
    with torch.no_grad():
        order = method.embed(batch, progress_at(0))["logits"].argsort(dim=1, descending=True)
    labels = torch.stack([order[row, row % CLASSES] for row in range(16)])
    labels[3] = -1
    results = method.evaluate(replace(batch, labels=labels))
    ranks = [row for row in range(16) if row != 3]
    assert results["top1"].tolist() == [rank == 0 for rank in ranks]
    assert results["top5"].tolist() == [rank < 5 for rank in ranks]


def test_supervised_says_what_it_needs() -> None:
    module, objective = module_of("supervised"), small_preset("supervised").objective
    factory = EncoderFactory("test_resnet", {})
    with pytest.raises(ConfigError, match="needs labels"):
        module.build(objective, factory, Facts(0, 64, (32,), 16, 4, 20))
    with pytest.raises(ConfigError, match="one view"):
        module.build(objective, factory, Facts(9, 64, (32, 32), 16, 4, 20))


def test_supervised_decays_everything_where_asked() -> None:
    method = build("supervised", "test_resnet", decay_everything=True)
    assert [group["decay"] for group in method.param_groups()] == [True]
    method = build("supervised", "test_resnet", decay_everything=False)
    assert [group["decay"] for group in method.param_groups()] == [True, False]


@pytest.mark.parametrize("name", ["supervised", "deit"])
def test_tokens_and_positions_see_no_decay(name: str) -> None:
    method = build(name, "test_vit")
    with_decay, without = method.param_groups()
    assert [with_decay["decay"], without["decay"]] == [True, False]
    encoder: Any = method.encoder

    def holds(group: dict[str, Any], parameter: Tensor) -> bool:
        return any(each is parameter for each in group["params"])

    for free in (encoder.pos_embed, encoder.cls_token, encoder.blocks[0].norm1.weight):
        assert holds(without, free)
    assert holds(with_decay, encoder.blocks[0].attn.qkv.weight)


def test_simclr_moves_what_it_compares_with() -> None:
    """The method hands the loss its keys with their gradient."""
    method, batch = build("simclr", "test_vit"), batch_of("simclr")
    own = torch.randn(16, 2, 8, requires_grad=True)
    method.objective({"projection": own}, batch, progress_at(0))["loss"].backward()
    direct = own.detach().clone().requires_grad_()
    temperature = small_preset("simclr").objective.temperature
    module_of("simclr").nt_xent(direct, direct, 0, temperature)[0].backward()
    assert own.grad is not None
    assert direct.grad is not None
    torch.testing.assert_close(own.grad, direct.grad)


def test_simclr_wants_two_views() -> None:
    with pytest.raises(ConfigError, match="two views of one size"):
        module_of("simclr").build(
            small_preset("simclr").objective,
            EncoderFactory("test_resnet", {}),
            Facts(0, 64, (32, 32, 16), 16, 4, 20),
        )
