"""The path from noise to image: as a film strip, one column a time, and as an animated GIF."""

import io
from dataclasses import dataclass, replace

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from jlt.experiments.plots import grid
from jlt.sampling import Generator, Making


@dataclass(frozen=True)
class Film:
    """What n images were at s times, the last of them 1: `noisy` is z and `clean` the predicted x, both decoded."""

    times: tuple[float, ...]
    noisy: UInt8[Tensor, "s n c h w"]
    clean: UInt8[Tensor, "s n c h w"]


def film(generator: Generator, labels: Tensor, how: Making) -> Film:
    """Sample these labels once more, in one batch, and keep every step."""
    seen: list[tuple[float, Tensor, Tensor]] = []

    def decode(z: Tensor) -> Tensor:
        return generator.representation.decode(generator.affine.restore(z)).cpu()

    samples = generator.sample(
        labels, **vars(replace(how, batch_size=len(labels))), progress=False,
        callback=lambda i, t, z, x: seen.append((t, decode(z), decode(x))),
    )  # fmt: skip
    seen.append((1.0, samples.images, samples.images))
    times, noisy, clean = zip(*seen, strict=True)
    return Film(times, torch.stack(noisy), torch.stack(clean))


def strip(film: Film, columns: int = 10) -> Image.Image:
    """Lay out two rows an image, z above the predicted x, at up to `columns` of the times, first and last included."""
    if columns < 2:
        raise ValueError(f"a film strip needs at least 2 columns, got {columns}")
    last = len(film.times) - 1
    columns = min(columns, last + 1)
    shown = [round(i * last / (columns - 1)) for i in range(columns)]
    rows = torch.stack([film.noisy[shown], film.clean[shown]]).permute(2, 0, 1, 3, 4, 5)  # (n, 2, columns, c, h, w)
    captions = [f"{name} {film.times[i]:.2f}" for name in ("z", "x") for i in shown] * len(rows)
    return grid(rows.flatten(0, 2), columns, captions)


def gif(film: Film, columns: int = 10, seconds: float = 3.0) -> bytes:
    """Return an animation, played once: the predicted x of all images over the steps, the images last for a second."""
    frames = []
    for images in film.clean:
        sheet = grid(images, columns)
        frame = Image.new("RGB", sheet.size, (127, 127, 127))
        frame.paste(sheet, mask=sheet.getchannel("A"))
        frames.append(frame)
    # a GIF counts in hundredths of a second, and browsers play none below two as they are asked to
    each = max(20, round(100 * seconds / len(frames)) * 10)
    buffer = io.BytesIO()
    durations = [each] * (len(frames) - 1) + [1000]
    frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:], duration=durations)
    return buffer.getvalue()
