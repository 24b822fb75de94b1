"""Draw the emoji of a colour font into a folder of class folders, the input of `jlt encode`.

    python examples/emoji.py emoji
    jlt encode emoji latents --image-size 64 --stride 8 --num-held-out 180 --mirrored
    jlt train emoji latents run
    jlt sample run samples --scale 2

Debian's packages fonts-noto-color-emoji (OFL-1.1) and unicode-data hold the font and the list. Classes are Unicode's
groups. Skin tones are left out: they are the same picture five times over.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
LIST = Path("/usr/share/unicode/emoji/emoji-test.txt")
SIZE = 109  # the one size of the font's pictures, which are 136 x 128


def emoji(text: str) -> dict[str, list[str]]:
    """Return each group's emoji as strings, from the text of emoji-test.txt."""
    groups: dict[str, list[str]] = {}
    group = ""
    for line in text.splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        points, _, status = line.partition(";")
        if group != "Component" and status.split("#")[0].strip() == "fully-qualified":
            codes = [int(point, 16) for point in points.split()]
            if not any(0x1F3FB <= code <= 0x1F3FF for code in codes):
                groups.setdefault(group, []).append("".join(map(chr, codes)))
    return groups


def draw(text: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """Return the picture on white, 128 x 128, or None for what the font has no single picture of."""
    if font.getlength(text) != font.getlength("\N{GRINNING FACE}"):
        return None  # several pictures side by side, or none
    image = Image.new("RGB", (136, 128), "white")
    ImageDraw.Draw(image).text((0, 0), text, font=font, embedded_color=True)
    if image.getextrema() == ((255, 255),) * 3:
        return None
    return image.crop((4, 0, 132, 128))


def main() -> None:
    """Write out/GROUP/CODEPOINTS.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    for path in (FONT, LIST):
        if not path.is_file():
            raise SystemExit(f"{path} is missing; apt install fonts-noto-color-emoji unicode-data")
    font = ImageFont.truetype(str(FONT), SIZE)
    for group, texts in emoji(LIST.read_text()).items():
        folder = out / group.lower().replace(" & ", "-").replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        pictures = {"-".join(f"{ord(c):x}" for c in text): draw(text, font) for text in texts}
        kept = {name: picture for name, picture in pictures.items() if picture is not None}
        for name, picture in kept.items():
            picture.save(folder / f"{name}.png")
        print(f"{folder}: {len(kept)} of {len(texts)}")


if __name__ == "__main__":
    main()
