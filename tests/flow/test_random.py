"""Counter-based randomness: the published vectors, the distributions, and independence of batching."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jlt.flow.random import MASK, Stream, kept, normal, permutation, philox, uniform, words

KNOWN = [  # Random123's kat_vectors for philox4x32-10: counter, key, result
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK, MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_published_words(
    counter: tuple[int, int, int, int], key: tuple[int, int], result: tuple[int, int, int, int]
) -> None:
    first, *rest = counter
    words = philox((torch.tensor([first]), *rest), key)
    assert tuple(int(word) for word in words) == result


@given(st.integers(0, 2**40), st.integers(0, 2**31), st.integers(1, 13))
def test_noise_of_an_image_does_not_depend_on_its_batch(seed: int, step: int, cut: int) -> None:
    index = torch.arange(14)
    whole = normal(seed, Stream.NOISE, step, index, (3, 5))
    parts = torch.cat([normal(seed, Stream.NOISE, step, part, (3, 5)) for part in (index[:cut], index[cut:])])
    assert torch.equal(whole, parts)
    backwards = normal(seed, Stream.NOISE, step, index.flip(0), (3, 5)).flip(0)
    assert torch.equal(whole, backwards)


def test_normal_numbers_have_the_moments_of_a_standard_normal() -> None:
    n = normal(7, Stream.NOISE, 0, torch.arange(2000), (10, 50)).double().flatten()
    for power, expected, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        # 5 standard errors of the sample moment
        assert (n**power).mean().item() == pytest.approx(expected, abs=5 * math.sqrt(variance / len(n)))
    pairs = n.reshape(-1, 500)
    assert (pairs[:, :250] * pairs[:, 250:]).mean().abs() < 5 / math.sqrt(len(n) / 2)  # the two of a Box-Muller pair


@pytest.mark.parametrize("change", ["seed", "stream", "step", "index"])
def test_every_argument_matters(change: str) -> None:
    base = {"seed": 3, "stream": Stream.TIME, "step": 5, "index": torch.arange(1000)}
    other = base | {"seed": 4, "stream": Stream.FLIP, "step": 6, "index": torch.arange(1000) + 1000}
    a, b = uniform(**base), uniform(**base | {change: other[change]})  # type: ignore[arg-type]
    assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 5 / math.sqrt(1000)
    assert (a != b).all()


def test_uniform_numbers_fill_the_open_interval_evenly() -> None:
    u = uniform(0, Stream.TIME, 0, torch.arange(100_000))
    assert u.min() > 0
    assert u.max() < 1
    counts = torch.histc(u, 10, 0, 1)
    assert (counts - 10_000).abs().max() < 5 * math.sqrt(9000)


@given(st.integers(0, 2**63 - 1), st.integers(1, 400))
def test_a_permutation_holds_everything_once(seed: int, size: int) -> None:
    assert torch.equal(permutation(seed, Stream.DATA_ORDER, 0, size).sort().values, torch.arange(size))


FIRST_WORDS = {  # of seed 2^33 + 7 at step 5, image 3
    Stream.INITIAL_WEIGHTS: 2730263463, Stream.DATA_ORDER: 595236204, Stream.TIME: 719471487,
    Stream.NOISE: 1206999519, Stream.LABEL_DROP: 4016444, Stream.FLIP: 969414387, Stream.SAMPLE_NOISE: 3665819476,
    Stream.HELD_OUT_NOISE: 1180287812, Stream.DROPOUT: 1728912153, Stream.SOLVER_NOISE: 2163190904,
}  # fmt: skip


def test_a_number_is_the_one_it_was_since_runs_resume_on_them() -> None:
    """Written down when the streams were first pinned: another value here is another run there."""
    at, image = torch.tensor([3]), torch.tensor([0])
    assert {stream: words(2**33 + 7, stream, 5, at, 1).item() for stream in Stream} == FIRST_WORDS
    assert normal(1, Stream.NOISE, 2, image, (3,))[0].tolist() == pytest.approx([-2.4730587, -0.6579513, 0.0919401])
    assert uniform(1, Stream.TIME, 2, at).item() == pytest.approx(0.99352413, abs=1e-7)
    assert permutation(1, Stream.DATA_ORDER, 2, 8).tolist() == [4, 5, 0, 7, 1, 2, 6, 3]
    assert kept(1, 2, at, 3, (8,), 0.5)[0].int().tolist() == [1, 0, 0, 0, 1, 1, 1, 0]


def test_no_global_state_is_read_or_written() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = normal(0, Stream.NOISE, 0, torch.arange(3), (4,))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(normal(0, Stream.NOISE, 0, torch.arange(3), (4,)), first)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.99])
def test_dropout_keeps_the_stated_share_independently_at_every_site(rate: float) -> None:
    masks = torch.stack([kept(5, 9, torch.arange(200), site, (20, 25), rate) for site in (0, 1)]).double()
    share, count = 1 - rate, masks[0].numel()
    for mask in masks:
        assert mask.mean().item() == pytest.approx(share, abs=5 * math.sqrt(rate * share / count) + 2**-17)
    centred = masks - share
    products = [centred[0] * centred[1], centred[0][:-1] * centred[0][1:], centred[0, ..., :-1] * centred[0, ..., 1:]]
    for product in products:  # sites, images and neighbours (which share a word) know nothing of each other
        assert product.mean().abs().item() <= 5 * rate * share / math.sqrt(product.numel()) + 2**-17


@given(st.integers(0, 2**40), st.integers(0, 2**31), st.integers(1, 13), st.integers(0, 2**10))
def test_dropout_of_an_image_does_not_depend_on_its_batch(seed: int, step: int, cut: int, site: int) -> None:
    index = torch.arange(14)
    whole = kept(seed, step, index, site, (3, 5), 0.3)
    assert torch.equal(whole, torch.cat([kept(seed, step, part, site, (3, 5), 0.3) for part in index.split(cut)]))
