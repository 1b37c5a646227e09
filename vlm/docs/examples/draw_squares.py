"""A data set from outside: pictures of a coloured square, a table of captions, and unpaired texts.

`python draw_squares.py FOLDER` stands for whatever your pictures and texts come from.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from PIL import Image

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220)}


def draw(folder: Path, number: int = 60) -> None:
    (folder / "pictures").mkdir(parents=True)
    with (folder / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["picture", "caption"])
        for index in range(number):
            colour, side = list(COLOURS)[index % 3], ("left", "right")[index % 2]
            picture = Image.new("RGB", (48, 48), (230, 230, 230))
            corner = (4 if side == "left" else 28, (7 * index) % 32)
            picture.paste(COLOURS[colour], (*corner, corner[0] + 16, corner[1] + 16))
            picture.save(folder / "pictures" / f"{index}.png")
            table.writerow([f"pictures/{index}.png", f"a {colour} square on the {side}"])
    # The tiny language encoder takes its words from texts that belong to no picture; model=base needs none.
    texts = [f"is the {colour} square on the {side} ?\na square" for colour in COLOURS for side in ("left", "right")]
    (folder / "texts.txt").write_text("\n".join(texts) + "\n")


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
