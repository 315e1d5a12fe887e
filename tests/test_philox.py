"""Philox against Random123's published vectors and against an oracle in plain Python."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.pipelines import philox
from headrace.pipelines.philox import uniforms, words

WORD = st.integers(0, 2**32 - 1)


def oracle(seed: int, counter: tuple[int, ...]) -> tuple[int, ...]:
    """The round function as the paper's figure gives it, on Python's integers."""
    left, high, right, low = counter[0], counter[1], counter[2], counter[3]
    for turn in range(10):
        key_0 = (seed % 2**32 + turn * 0x9E3779B9) % 2**32
        key_1 = (seed // 2**32 + turn * 0xBB67AE85) % 2**32
        first = divmod(0xD2511F53 * left, 2**32)
        second = divmod(0xCD9E8D57 * right, 2**32)
        left, high, right, low = (
            second[0] ^ high ^ key_0,
            second[1],
            first[0] ^ low ^ key_1,
            first[1],
        )
    return left, high, right, low


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_random123_known_answers(counter: str, key: str, expected: str) -> None:
    counter_words, key_words, answer = (
        [int(word, 16) for word in line.split()] for line in (counter, key, expected)
    )
    seed = key_words[0] | key_words[1] << 32
    assert words(seed, np.array([counter_words], np.uint32)).tolist() == [answer]
    assert oracle(seed, tuple(counter_words)) == tuple(answer)


@given(
    seed=st.integers(0, 2**64 - 1),
    counters=st.lists(st.tuples(WORD, WORD, WORD, WORD), max_size=5),
)
def test_philox_equals_the_oracle(seed: int, counters: list[tuple[int, ...]]) -> None:
    array = np.array(counters, np.uint32).reshape(-1, 4)
    assert [tuple(row) for row in words(seed, array).tolist()] == [
        oracle(seed, counter) for counter in counters
    ]


def test_philox_compiles_once_whatever_the_memory() -> None:
    counters = np.arange(64, dtype=np.uint32).reshape(16, 4)
    expected = words(1, counters)
    read_only = counters.copy()
    read_only.flags.writeable = False
    for same in (read_only, np.asfortranarray(counters), np.repeat(counters, 2, axis=0)[::2]):
        assert np.array_equal(words(1, same), expected)
    assert len(philox._philox.signatures) == 1


def test_uniforms_are_in_the_half_open_unit_interval() -> None:
    values = uniforms(np.array([[0, 1], [2**31, 2**32 - 1]], np.uint32))
    assert values.dtype == np.float64
    assert values.tolist() == [[0.0, 2.0**-32], [0.5, 1 - 2.0**-32]]


def test_every_bit_of_philox_is_fair() -> None:
    counters = np.zeros((20_000, 4), np.uint32)
    counters[:, 0] = np.arange(20_000)
    bits = np.unpackbits(words(5, counters).view(np.uint8), axis=1)
    # Standard deviation of the mean is 0.0035; 128 bits, so five of them never happen by chance.
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / np.sqrt(20_000)


@pytest.mark.parametrize(
    ("seed", "counters", "message"),
    [
        (-1, np.zeros((1, 4), np.uint32), "seed is -1"),
        (2**64, np.zeros((1, 4), np.uint32), "seed is"),
        (0, np.zeros((1, 3), np.uint32), r"uint32 \[1, 3\]"),
        (0, np.zeros(4, np.uint32), r"must be uint32 \[n, 4\]"),
        (0, np.zeros((1, 4), np.int64), "int64"),
    ],
)
def test_philox_refuses_other_seeds_and_counters(
    seed: int, counters: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        words(seed, counters)
