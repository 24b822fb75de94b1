import pytest
import torch
from sklearn.datasets import load_digits

from jlt.evaluation.features import EXTRACTORS, Pixels
from jlt.evaluation.protocol import measure, real_against_real, reference

PIXELS = Pixels(8)


@pytest.fixture(scope="module")
def digits():
    images = torch.from_numpy((load_digits().images * 15).astype("uint8"))[:, None]
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]


@pytest.fixture(scope="module")
def held_out(digits):
    return reference(digits[:500], PIXELS, "500 digits")


def test_values_do_not_depend_on_batches(digits, held_out):
    whole = measure(digits[500:800], held_out, PIXELS, batch_size=300)
    assert set(whole) == {"FD (pixels 8 x 8)", "KD (pixels 8 x 8)"}
    for split in (digits[500:800], digits[500:800].split(77), iter(digits[500:800].split(1))):
        values = measure(split, held_out, PIXELS, batch_size=7)
        for name in whole:
            assert values[name].value == pytest.approx(whole[name].value, rel=1e-6)  # float32 features


def test_real_images_score_better_than_noise_and_keep_the_floor(digits, held_out):
    floor = real_against_real(digits[500:], held_out, PIXELS, count=300)
    noise = torch.randint(0, 256, (300, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    values = measure(noise, held_out, PIXELS)
    for name in floor:
        assert abs(floor[name].value) < 0.05 * values[name].value


def test_fewer_real_images_have_a_higher_frechet_floor(digits, held_out):
    """The small-sample bias that the floor exists to show."""
    floors = [real_against_real(digits[500:], held_out, PIXELS, n)["FD (pixels 8 x 8)"].value for n in (1200, 300, 75)]
    assert floors[0] < floors[1] < floors[2]


def test_floor_is_drawn_by_its_seed_from_the_whole_set(digits, held_out):
    ordered = torch.cat([digits[500:800], torch.zeros_like(digits[:300])])  # as a data set in class order
    scores = [real_against_real(ordered, held_out, PIXELS, 300, seed)["FD (pixels 8 x 8)"].value for seed in (0, 0, 1)]
    assert scores[0] == scores[1] != scores[2]
    first = measure(ordered[:300], held_out, PIXELS)["FD (pixels 8 x 8)"].value
    assert scores[0] > 2 * first  # half of the draw is black


def test_efficientnet_distances_are_named_after_it_and_never_fid(digits):
    extractor = EXTRACTORS["efficientnet-lite0"]()
    real = reference(digits[:6], extractor, "6 digits")
    values = measure(digits[6:12], real, extractor)
    assert set(values) == {"FD (EfficientNet-Lite0)", "KD (EfficientNet-Lite0)"}
    assert measure(digits[:6], real, extractor)["FD (EfficientNet-Lite0)"].value == pytest.approx(0, abs=1e-6)


def test_misuse_is_refused_with_both_values(digits, held_out):
    with pytest.raises(ValueError, match=r"made with pixels 8 x 8 \(\w+\), not with pixels 4 x 4 \(\w+\)"):
        measure(digits, held_out, Pixels(4))
    with pytest.raises(ValueError, match="needs 500 images besides the reference's, got 300"):
        real_against_real(digits[:300], held_out, PIXELS, 500)
    with pytest.raises(ValueError, match="at least 2 images a side, got 1 and 500"):
        measure(digits[:1], held_out, PIXELS)
    with pytest.raises(ValueError, match="batch size is 0"):
        measure(digits, held_out, PIXELS, batch_size=0)
    with pytest.raises(ValueError, match="at least 2 images a side, got 0 and 500"):
        measure([], held_out, PIXELS)
