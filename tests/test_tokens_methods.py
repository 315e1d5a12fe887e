"""What iBOT, DINOv2 and I-JEPA promise beyond the contract, and the blocks that they stand on."""

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from headrace.pipelines.batch import Batch
from headrace.pipelines.masks import BlockMask, MultiBlockMask, RandomMask
from headrace.training.backbones import EncoderFactory
from headrace.training.blocks.dino_head import DinoHead
from headrace.training.blocks.drop_path import KeyedDropPath
from headrace.training.blocks.tokens import (
    embed_patches,
    encode_tokens,
    kept_patches,
    masked_patches,
    most_masked,
    take,
)
from headrace.training.method import Facts, Method, Progress
from headrace.training.preset import ConfigError
from tests.tiny_methods import (
    batch_of,
    build,
    make_batch,
    module_of,
    progress_at,
    sgd,
    share,
    small_preset,
    train_step,
)

NAMES = ["ibot", "dinov2"]


def painted(batch: Batch, view: int, places: Tensor) -> Batch:
    """The batch with pixels of this view's patches (bool [B, 64], 4 pixels each) replaced."""
    hidden = places.view(-1, 8, 8).repeat_interleave(4, 1).repeat_interleave(4, 2)
    views = list(batch.views)
    views[view] = torch.where(hidden[:, None], 9.0, views[view])
    return replace(batch, views=tuple(views))


def mask_of(batch: Batch, view: int = 0) -> Tensor:
    mask = batch.masks[view]
    assert mask is not None
    return mask


# ---- blocks


@pytest.mark.parametrize("options", [{}, {"dynamic_img_size": True}, {"reg_tokens": 2}])
def test_tokens_are_timm_s_own(options: dict[str, Any]) -> None:
    encoder: Any = timm.create_model(
        "test_vit", num_classes=0, img_size=32, patch_size=4, **options
    )
    x = torch.randn(2, 3, 32, 32)
    tokens = encode_tokens(encoder, embed_patches(encoder, x))
    torch.testing.assert_close(tokens, encoder.forward_features(x))
    if options.get("dynamic_img_size"):
        x = torch.randn(2, 3, 16, 24)
        tokens = encode_tokens(encoder, embed_patches(encoder, x))
        torch.testing.assert_close(tokens, encoder.forward_features(x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_mask_token_stands_where_the_mask_is(dynamic: bool) -> None:
    """It has the position of the patch whose place it takes."""
    encoder: Any = timm.create_model(
        "test_vit", num_classes=0, img_size=32, patch_size=4, dynamic_img_size=dynamic
    )
    x, mask, token = torch.randn(2, 3, 32, 32), torch.rand(2, 64) < 0.3, torch.randn(1, 1, 64)
    whole, hidden = embed_patches(encoder, x), embed_patches(encoder, x, mask, token)
    assert torch.equal(hidden[:, 0], whole[:, 0])
    assert torch.equal(hidden[:, 1:][~mask], whole[:, 1:][~mask])
    expected = (token[0] + encoder.pos_embed[0, 1:]).expand(2, -1, -1)
    torch.testing.assert_close(hidden[:, 1:][mask], expected[mask])


def test_padding_is_not_seen() -> None:
    """Padded samples have the tokens that they have alone, without padding."""
    encoder: Any = timm.create_model("test_vit", num_classes=0, img_size=32, patch_size=4)
    tokens, counted = torch.randn(3, 7, 64), torch.zeros(3, 7, dtype=torch.bool)
    for sample, length in enumerate((7, 4, 1)):
        counted[sample, :length] = True
    padded = encode_tokens(encoder, tokens, counted)
    for sample, length in enumerate((7, 4, 1)):
        alone = encode_tokens(encoder, tokens[sample : sample + 1, :length])
        torch.testing.assert_close(
            padded[sample : sample + 1, :length], alone, rtol=1e-4, atol=1e-5
        )


def test_masked_patches_pads_and_cuts() -> None:
    mask = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    places, counted = masked_patches(mask, 2)
    assert places[0].tolist() == [1, 3]
    assert places[1, 0] == 4
    assert counted.tolist() == [[True, True], [True, False], [False, False]]
    assert kept_patches(mask, 2).tolist() == [[0, 2], [0, 1], [0, 1]]
    assert torch.equal(take(torch.arange(5.0).expand(3, 5)[..., None], places)[0, :, 0], places[0])


@pytest.mark.parametrize("mask", [BlockMask(4, (0.1, 0.5), 4), RandomMask(4, 0.6), BlockMask(4)])
def test_no_mask_is_larger_than_the_largest(mask: BlockMask | RandomMask) -> None:
    recipe = small_preset("ibot").augmentation
    view = replace(recipe.views[0], mask=mask)
    drawn = make_batch(replace(recipe, views=(view, *recipe.views[1:])), samples=64)
    sizes = mask_of(drawn).sum(dim=1)
    assert 0.9 * most_masked(mask, 64) - 2 < sizes.max() <= most_masked(mask, 64)


def test_learnt_lengths_are_weight_norm_s() -> None:
    """dino `vision_transformer.py`, `DINOHead`, with norm_last_layer=False."""
    head = DinoHead(6, 8, 4, 10, learn_lengths=True)
    theirs = weight_norm(nn.Linear(4, 10, bias=False))
    x = torch.randn(3, 6)
    with torch.no_grad():
        assert head.prototypes.lengths is not None
        head.prototypes.lengths.uniform_(0.5, 2)
        parametrized: Any = theirs.parametrizations
        parametrized.weight.original0.copy_(head.prototypes.lengths)
        parametrized.weight.original1.copy_(head.prototypes.weight)
    torch.testing.assert_close(head(x), theirs(head.directions(x)))
    assert {name for name, _ in head.prototypes.named_parameters()} == {"weight", "lengths"}
    assert len(list(DinoHead(6, 8, 4, 10).prototypes.parameters())) == 1


# ---- iBOT and DINOv2


@pytest.mark.parametrize("name", NAMES)
def test_student_does_not_see_what_is_masked(name: str) -> None:
    method, batch = build(name, "test_vit"), batch_of(name)
    assert mask_of(batch).any(dim=1).sum() > 2, "some of the samples have to be masked"
    embeddings = method.embed(batch, progress_at(0))
    hidden = method.embed(painted(batch, 0, mask_of(batch)), progress_at(0))
    for key in ("student", "student_patch"):
        torch.testing.assert_close(hidden[key], embeddings[key])
    masked = mask_of(batch).any(dim=1)
    changed = (hidden["teacher"] - embeddings["teacher"]).abs().amax(dim=-1) > 1e-6
    assert torch.equal(changed[:, 0], masked), "the teacher sees the whole view"
    assert not changed[:, 1].any()
    seen = method.embed(painted(batch, 0, ~mask_of(batch)), progress_at(0))
    assert not torch.allclose(seen["student"][:, 0], embeddings["student"][:, 0])


@pytest.mark.parametrize("name", NAMES)
def test_patches_are_those_of_the_same_place(name: str) -> None:
    """Without masks in its way the student says of each place what a whole pass says of it."""
    method: Any = build(name, "test_vit").eval()
    batch = batch_of(name, samples=4)
    method.mask_token.data.zero_()
    embeddings = method.embed(batch, progress_at(0))
    head = method.student_head.classes if name == "ibot" else method.student_heads[-1]
    for view in range(2):
        mask = mask_of(batch, view)
        tokens = embed_patches(method.student, batch.views[view], mask, method.mask_token)
        every = head(encode_tokens(method.student, tokens)[:, 1:])
        whole = method.encoder.forward_features(batch.views[view])[:, 1:]
        told = (method.teacher_head.classes if name == "ibot" else method.teacher_heads[-1])(whole)
        for sample in range(4):
            count = int(mask[sample].sum())
            for key, expected in (("student_patch", every), ("teacher_patch", told)):
                ours = embeddings[key][sample, view, :count]
                torch.testing.assert_close(
                    ours, expected[sample][mask[sample]], rtol=1e-4, atol=1e-5
                )


@pytest.mark.parametrize("name", NAMES)
def test_centers_move_once_per_step_from_all_micro_batches(name: str) -> None:
    changes: dict[str, Any] = {"drop_path": 0.2}
    changes |= {"centering": "mean", "koleo_weight": 0.0} if name == "dinov2" else {}
    one, two = (build(name, "test_vit", **changes) for _ in range(2))
    whole = batch_of(name)
    halves = [share(whole, slice(0, 8)), share(whole, slice(8, 16))]
    optimizers = [sgd(method) for method in (one, two)]
    for step in range(2):
        losses = [
            train_step(one, optimizers[0], [whole], progress_at(step)),
            train_step(two, optimizers[1], halves, progress_at(step)),
        ]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for center in ("center", "patch_center"):
        assert one.get_buffer(center).any()
        torch.testing.assert_close(one.get_buffer(center), two.get_buffer(center))


@pytest.mark.parametrize("name", NAMES)
def test_patch_center_follows_the_patches_of_the_code(name: str) -> None:
    """iBOT's those of all patches, DINOv2's those of masked ones."""
    changes: dict[str, Any] = {"centering": "mean"} if name == "dinov2" else {}
    method: Any = build(name, "test_vit", **changes)
    batch = batch_of(name)
    head = method.teacher_head.classes if name == "ibot" else method.teacher_heads[-1]
    rows = []
    with torch.no_grad():
        for view in range(2):
            logits = head(method.encoder.forward_features(batch.views[view])[:, 1:])
            rows.append(logits.flatten(0, 1) if name == "ibot" else logits[mask_of(batch, view)])
    train_step(method, sgd(method), [batch], progress_at(0))
    expected = 0.1 * torch.cat(rows).mean(dim=0)
    torch.testing.assert_close(method.patch_center, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("ibot", {"shared_head": False, "patch_out_dim": 24}), ("dinov2", {"separate_heads": True})],
)
def test_patches_may_have_prototypes_of_their_own(name: str, changes: dict[str, Any]) -> None:
    method, shared = build(name, "test_vit", **changes), build(name, "test_vit")
    assert len(list(method.parameters())) > len(list(shared.parameters()))
    outputs, embeddings = method(batch_of(name), progress_at(0))
    outputs["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in method.parameters() if p.requires_grad)
    assert embeddings["student_patch"].shape[-1] == (24 if name == "ibot" else 48)
    train_step(method, sgd(method), [batch_of(name)], progress_at(0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frozen", [0, 1])
def test_prototypes_are_held(name: str, frozen: int) -> None:
    method = build(name, "test_vit", freeze_last_layer_epochs=frozen)
    method(batch_of(name), progress_at(0))[0]["loss"].backward()
    method.after_backward(progress_at(0))
    held = {key for key, p in method.named_parameters() if p.requires_grad and p.grad is None}
    assert (len(held) > 0) == bool(frozen)
    assert all("prototypes" in key for key in held)


@pytest.mark.parametrize("name", NAMES)
def test_masks_have_to_fit(name: str) -> None:
    recipe, module = small_preset(name), module_of(name)
    pixels = tuple(view.size for view in recipe.augmentation.flat_views)
    make = EncoderFactory("test_vit", {"img_size": 32, "patch_size": 4, "dynamic_img_size": True})
    masks = tuple(view.mask for view in recipe.augmentation.flat_views)
    for given, text in [
        ((), "needs masks on the augmentation's two global views"),
        ((masks[0], None), "needs masks on the augmentation's two global views"),
        (
            (masks[0], BlockMask(8)),
            "have 4 pixels, and the augmentation's masks have patch_pixels 8",
        ),
    ]:
        with pytest.raises(ConfigError, match=text):
            module.build(recipe.objective, make, Facts(0, 64, pixels, 16, 4, 20, masks=given))
    with pytest.raises(ConfigError, match="two global views of one size"):
        module.build(recipe.objective, make, Facts(0, 64, (32,), 16, 4, 20, masks=masks))
    with pytest.raises(ConfigError, match="needs a timm VisionTransformer"):
        module.build(
            recipe.objective,
            EncoderFactory("test_resnet", {}),
            Facts(0, 64, pixels, 16, 4, 20, masks=masks),
        )


def test_ibot_temperatures_move_by_epoch() -> None:
    method: Any = build(
        "ibot",
        "test_vit",
        teacher_temperature=0.3,
        warmup_teacher_temperature=0.1,
        teacher_patch_temperature=0.4,
        warmup_teacher_patch_temperature=0.2,
        warmup_teacher_temperature_epochs=3,
    )
    batch = batch_of("ibot")
    embeddings = method.embed(batch, progress_at(0))
    for epoch, (of_classes, of_patches) in enumerate([(0.1, 0.2), (0.2, 0.3), (0.3, 0.4)]):
        constant: Any = build(
            "ibot",
            "test_vit",
            teacher_temperature=of_classes,
            teacher_patch_temperature=of_patches,
            warmup_teacher_temperature_epochs=0,
        )
        ours, expected = (
            each.objective(embeddings, batch, progress_at(4 * epoch + 3))
            for each in (method, constant)
        )
        torch.testing.assert_close(ours, expected)


def test_dinov2_clips_backbone_and_heads_each_as_a_whole() -> None:
    method: Any = build("dinov2", "test_vit", separate_heads=True, clip=0.01)
    method(batch_of("dinov2"), progress_at(0))[0]["loss"].backward()
    method.after_backward(progress_at(0))
    parts = [
        [*method.student.parameters(), method.mask_token],
        *(head.parameters() for head in method.student_heads),
    ]
    for part in parts:
        norm = torch.nn.utils.get_total_norm([p.grad for p in part if p.grad is not None])
        torch.testing.assert_close(norm, torch.tensor(0.01), rtol=1e-3, atol=0)


def test_dinov2_deeper_layers_learn_slower() -> None:
    """dinov2 `utils/param_groups.py`, get_vit_lr_decay_rate, for a backbone of three blocks."""
    method = build("dinov2", "test_vit", layer_decay=0.5, patch_embed_scale=0.2)
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    for group in method.param_groups():
        parameters: Any = group["params"]
        for parameter in parameters:
            name = names[id(parameter)]
            if ".blocks." in name and name.startswith("student."):
                layer = int(name.split(".")[2]) + 1
            elif any(part in name for part in ("pos_embed", "patch_embed", "mask_token", "cls_")):
                layer = 0
            else:
                assert name.startswith(("student_heads.", "student.norm."))
                layer = 4
            scale = 0.5 ** (4 - layer) * (0.2 if "patch_embed" in name else 1.0)
            assert group["learning_rate_scale"] == pytest.approx(scale), name
            decays = not (name.endswith(".bias") or "norm" in name or "gamma" in name)
            assert group["decay"] == decays, name


def test_dinov2_drops_paths_alike_in_all_blocks() -> None:
    method: Any = build("dinov2", "test_vit", drop_path=0.3)
    layers = [m for m in method.student.modules() if isinstance(m, KeyedDropPath)]
    assert [layer.probability for layer in layers] == [0.3] * 6
    assert len({layer.layer for layer in layers}) == 6
    assert not any(isinstance(m, KeyedDropPath) for m in method.encoder.modules())


def test_dinov2_sinkhorn_needs_no_center() -> None:
    method: Any = build("dinov2", "test_vit", centering="sinkhorn")
    batch = batch_of("dinov2")
    for step in range(2):
        train_step(method, sgd(method), [batch], progress_at(step))
    assert not method.center.any()
    assert not method.patch_center.any()
    logits = method.embed(batch, progress_at(2))["teacher"]
    codes = method.target(logits, method.center, 0.1).flatten(0, 1)
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(32))
    spread = codes.sum(dim=0) / codes.sum()
    softmax = (logits / 0.1).flatten(0, 1).softmax(dim=1).sum(dim=0) / 32
    assert (spread - 1 / 48).abs().max() < 0.5 * (softmax - 1 / 48).abs().max()


def test_dinov2_temperature_moves_by_step() -> None:
    method: Any = build("dinov2", "test_vit", warmup_teacher_temperature_epochs=2)
    method.options = replace(
        method.options, warmup_teacher_temperature=0.1, teacher_temperature=0.8
    )
    ours = [method.teacher_temperature(progress_at(step)) for step in range(10)]
    assert ours == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.8, 0.8])


# ---- I-JEPA


def test_ijepa_context_is_all_that_its_encoder_sees() -> None:
    method, batch = build("ijepa", "test_vit"), batch_of("ijepa", samples=4)
    embeddings = method.embed(batch, progress_at(0))
    removed = mask_of(batch)[:, 0]
    elsewhere = method.embed(painted(batch, 0, removed), progress_at(0))
    torch.testing.assert_close(elsewhere["prediction"], embeddings["prediction"])
    assert not torch.allclose(elsewhere["target"], embeddings["target"])
    inside = method.embed(painted(batch, 0, ~removed), progress_at(0))
    assert not torch.allclose(inside["prediction"], embeddings["prediction"])


def unpadded_loss(method: Any, batch: Batch, sample: int) -> Tensor:
    """ijepa `train.py`, one sample and one block at a time, each of its own length."""
    mask, picture = mask_of(batch)[sample], batch.views[0][sample : sample + 1]
    kept = (~mask[0]).nonzero().flatten()[: method.context_places]
    context = embed_patches(method.context_encoder, picture)[:, kept]
    context = encode_tokens(method.context_encoder, context)
    features = method.encoder.forward_features(picture)
    features = nn.functional.layer_norm(features, features.shape[-1:])
    predictor, losses = method.predictor, []
    for block in mask[1:]:
        places = block.nonzero().flatten()
        tokens = torch.cat(
            [
                predictor.embed(context) + predictor.positions[kept],
                predictor.mask_token + predictor.positions[places],
            ],
            dim=1,
        )
        predicted = predictor.out(predictor.norm(predictor.blocks(tokens)[:, len(kept) :]))
        losses.append(nn.functional.smooth_l1_loss(predicted, features[:, places]))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("context_share", [0.6, 0.15])
def test_ijepa_padding_changes_nothing(context_share: float) -> None:
    """Groups of different sizes in one batch, contexts that are cut included."""
    method: Any = build("ijepa", "test_vit", context_share=context_share)
    batch = batch_of("ijepa", samples=16)
    contexts, blocks = (~mask_of(batch)[:, 0]).sum(1), mask_of(batch)[:, 1].sum(1)
    assert len(contexts.unique()) > 1
    assert len(blocks.unique()) > 1
    assert (contexts.max() > method.context_places) == (context_share == 0.15)
    ours = method(batch, progress_at(0))[0]["loss"]
    expected = torch.stack([unpadded_loss(method, batch, sample) for sample in range(16)]).mean()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
    gradients = []
    for loss in (ours, expected):
        method.zero_grad()
        loss.backward()
        gradients.append([p.grad.clone() for p in method.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("side", [8, 14, 16, 28])
def test_ijepa_has_room_for_every_block(side: int) -> None:
    recipe = small_preset("ijepa").augmentation
    mask = MultiBlockMask(4, min_keep=4)
    ops = (replace(recipe.views[0].ops[0], size=4 * side),)  # pyright: ignore[reportCallIssue]
    view = replace(recipe.views[0], ops=ops, mask=mask)
    largest = module_of("ijepa").largest_target(mask, side)
    found = max(
        int(
            mask_of(make_batch(replace(recipe, views=(view,), group=1), 64, seed))[:, 1:]
            .sum(-1)
            .max()
        )
        for seed in range(4)
    )
    assert found == largest


def test_ijepa_target_encoder_follows_on_a_straight_line() -> None:
    method: Any = build("ijepa", "test_vit", teacher_momentum=0.5)
    before = {key: value.clone() for key, value in method.encoder.state_dict().items()}
    at = Progress(step=10, total_steps=20, steps_per_epoch=4, seed=5)
    train_step(method, sgd(method, 1.0), [batch_of("ijepa")], at)
    student = method.context_encoder.state_dict()
    for key, value in method.encoder.state_dict().items():
        expected = 0.75 * before[key] + 0.25 * student[key]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(method.encoder.pos_embed, before["pos_embed"])


def test_ijepa_says_what_it_needs() -> None:
    recipe, module = small_preset("ijepa"), module_of("ijepa")
    make = EncoderFactory("test_vit", {"img_size": 32, "patch_size": 4, "global_pool": "avg"})

    def built(objective: object, *masks: object) -> Method:
        given: Any = masks
        return module.build(objective, make, Facts(0, 64, (32,), 16, 4, 20, masks=given))

    mask = recipe.augmentation.views[0].mask
    for masks in [(), (None,), (BlockMask(4),), (mask, mask)]:
        with pytest.raises(ConfigError, match="needs one view with a MultiBlockMask"):
            built(recipe.objective, *masks)
    with pytest.raises(ConfigError, match="have 4 pixels, and the augmentation's masks"):
        built(recipe.objective, MultiBlockMask(8))
    with pytest.raises(ConfigError, match="multiple of 4 and of predictor_heads"):
        built(replace(recipe.objective, predictor_heads=5), mask)
