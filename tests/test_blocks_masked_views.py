"""Masked global views: what iBOT's and DINOv2's students and teachers see of them."""

from typing import Any

import pytest
import torch

from headrace.pipelines.masks import BlockMask
from headrace.training.backbones import EncoderFactory
from headrace.training.blocks.tokens import (
    embed_patches,
    encode_tokens,
)
from headrace.training.method import Facts
from headrace.training.preset import ConfigError
from tests.masked_checks import mask_of, painted
from tests.tiny_methods import (
    batch_of,
    build,
    module_of,
    progress_at,
    small_preset,
)

NAMES = ["ibot", "dinov2"]


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
        teacher_head = method.teacher_head.classes if name == "ibot" else method.teacher_heads[-1]
        targets = teacher_head(whole)
        for sample in range(4):
            count = int(mask[sample].sum())
            for key, expected in (("student_patch", every), ("teacher_patch", targets)):
                ours = embeddings[key][sample, view, :count]
                torch.testing.assert_close(
                    ours, expected[sample][mask[sample]], rtol=1e-4, atol=1e-5
                )


@pytest.mark.parametrize("name", NAMES)
def test_masks_have_to_fit(name: str) -> None:
    preset, module = small_preset(name), module_of(name)
    pixels = tuple(view.shape[0] for view in preset.augmentation.flat_views)
    make = EncoderFactory("test_vit", {"img_size": 32, "patch_size": 4, "dynamic_img_size": True})
    masks = tuple(view.mask for view in preset.augmentation.flat_views)
    for given, text in [
        ((), "needs masks on the augmentation's two global views"),
        ((masks[0], None), "needs masks on the augmentation's two global views"),
        (
            (masks[0], BlockMask(8)),
            "have 4 pixels, and the augmentation's masks have patch_pixels 8",
        ),
    ]:
        with pytest.raises(ConfigError, match=text):
            module.build(preset.objective, make, Facts(0, 64, pixels, 16, 4, 20, masks=given))
    with pytest.raises(ConfigError, match="two global views of one size"):
        module.build(preset.objective, make, Facts(0, 64, (32,), 16, 4, 20, masks=masks))
    with pytest.raises(ConfigError, match="needs a timm VisionTransformer"):
        module.build(
            preset.objective,
            EncoderFactory("test_resnet", {}),
            Facts(0, 64, pixels, 16, 4, 20, masks=masks),
        )
