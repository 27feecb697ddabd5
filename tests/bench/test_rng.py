"""The counter-based generator against the published test vectors of its reference implementation (Random123)."""

from __future__ import annotations

import pytest
import torch

from tsdfm_bench.rng import Streams, _round_constants, _rounds, philox4x32


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), key[0] | key[1] << 32)
    assert tuple(int(word) for word in words) == expected


def test_words_of_any_shape_are_broadcast():
    row, column = torch.arange(3)[None, :], torch.arange(2)[:, None]
    zero = torch.zeros((), dtype=torch.int64)
    together = philox4x32((row, zero, column, zero), 7)
    for i in range(2):
        for j in range(3):
            alone = philox4x32((torch.tensor(j), zero, torch.tensor(i), zero), 7)
            assert [int(word[i, j]) for word in together] == [int(word) for word in alone]


def test_one_place_is_what_all_places_are():
    streams = Streams.of(1, "cell", 4)
    everywhere = streams.uniform("token", 5, 9)
    rows, positions = torch.tensor([3, 0]), torch.tensor([8, 2])
    assert torch.equal(streams.uniform_at("token", 5, rows, positions), everywhere[rows, positions])


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)])
def test_an_accelerators_arithmetic_has_the_bits_of_a_cpus(shape):
    """On a CPU the rounds are NumPy's, elsewhere torch's."""
    key = 0x9E3779B97F4A7C15
    words = [torch.randint(0, 1 << 32, shape, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    halves = torch.stack([words[0], words[2]]), torch.stack([words[3], words[1]])
    even, odd = _rounds(*halves, *_round_constants(key, len(shape), torch.device("cpu")))
    assert isinstance(even, torch.Tensor)
    for ours, theirs in zip(philox4x32(tuple(words), key), (even[0], odd[0], even[1], odd[1]), strict=True):
        assert torch.equal(ours, theirs)
