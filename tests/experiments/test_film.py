"""The path from noise to image as pictures: what is in them."""

import io

import torch
from PIL import Image

from jlt.data.representations import Pixels
from jlt.data.shards import Affine
from jlt.experiments.film import Film, film, gif, strip
from jlt.flow import TARGETS
from jlt.nn import Transformer, TransformerConfig
from jlt.sampling import Generator, Making


def generator() -> Generator:
    model = Transformer(TransformerConfig(4, 1, 1, 16, 1, 2, num_classes=3))
    header = {"name": "JLT-1x16/1", "step": 5, "floor": 0.05}
    return Generator(model, TARGETS["x"], Pixels(1), Affine((0.0,), (1.0,)), None, header, "ema-0.9", "abc")


def test_a_film_begins_with_the_noise_and_ends_with_the_image() -> None:
    made, labels = generator(), torch.tensor([0, 1, 2])
    path = film(made, labels, Making(seed=4, steps=5, grid="uniform"))
    samples = made.sample(labels, seed=4, steps=5, grid="uniform")
    assert path.times == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    assert torch.equal(path.noisy[-1], samples.images)
    assert torch.equal(path.clean[-1], samples.images)
    assert (path.clean[0] == 128).all()  # an untrained network predicts 0, the middle grey, rounded
    assert path.noisy[0].float().std() > 50


def test_a_strip_has_two_rows_an_image_and_shows_both_ends() -> None:
    path = film(generator(), torch.tensor([0, 1, 2]), Making(steps=30))
    picture = strip(path, columns=4)
    assert (picture.width - 64) % 3 == 0
    tile = picture.crop((picture.width - 64, 0, picture.width, 64)).convert("L")
    last = Image.fromarray(path.noisy[-1, 0, 0].numpy()).resize((64, 64), Image.Resampling.NEAREST)
    assert tile.tobytes() == last.tobytes()


def test_an_animation_has_a_frame_a_time() -> None:
    images = torch.randint(0, 256, (7, 3, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with Image.open(io.BytesIO(gif(Film(tuple(i / 6 for i in range(7)), images, images), columns=2))) as animation:
        assert animation.n_frames == 7
        assert animation.size == (64 + 2 + 64, 64 + 2 + 64)
        animation.seek(6)
        assert animation.info["duration"] == 1000
