"""When the kernels of the fused engine are compiled anew: for a change in them alone."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from headrace.pipelines.engines.fused import render

FOLDER = Path(render.__file__).parent


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_an_edited_kernel_has_another_digest_and_no_other_file_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for path in FOLDER.glob("*.py"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(render, "__file__", str(tmp_path / "render.py"))
    before = render._digest()
    with (tmp_path / f"{name}.py").open("a") as file:
        file.write("# edited\n")
    assert (render._digest() != before) == (name in render.KERNEL_FILES)


def keys(sources: str) -> list[Any]:
    """What numba compares before it takes machine code out of its cache."""
    compiled = render._compiled(sources)
    return [function._cache._index_key((), function.targetctx.codegen()) for function in compiled]


def test_machine_code_is_taken_from_the_cache_for_equal_sources_only() -> None:
    assert keys("these") == keys("these")
    for these, others in zip(keys("these"), keys("others"), strict=True):
        assert these != others
