"""Pictures: animations, contact sheets and curves. No model in here, only matplotlib and Pillow."""

import base64
import io

import numpy as np
from PIL import Image, ImageDraw

from extras.files import (SIZE, UserError, check_output, evenly, load_split, unpack,
                          written_whole)


def gif_bytes(frames, scale=4, fps=10):
    """An endless animation of frames (T, H, W), uint8 of 0/1 or of grey 0..255, as a GIF file."""
    frames = np.asarray(frames, dtype=np.uint8)
    if frames.max() <= 1:
        frames = frames * 255
    frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    images, file = [Image.fromarray(frame) for frame in frames], io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:],
                   duration=round(1000 / fps), loop=0)
    return file.getvalue()


def save_gif(frames, path, scale=4, fps=10):
    """Write what gif_bytes makes to a file."""
    with written_whole(path) as file:
        file.write(gif_bytes(frames, scale, fps))


class Animation:
    """Frames (T, H, W) that play in a notebook: make it the last line of a cell."""

    def __init__(self, frames, scale=4, fps=10):
        self.gif, self.count = gif_bytes(frames, scale, fps), len(frames)

    def __repr__(self):
        return f"Animation of {self.count} frames"

    def _repr_html_(self):                              # what Jupyter asks an object for
        return f'<img src="data:image/gif;base64,{base64.b64encode(self.gif).decode()}">'


def beside(pictures, gap=2):
    """Join grey pictures (..., H, W) side by side, with thin grey gaps."""
    border = [(0, 0)] * (pictures[0].ndim - 1) + [(0, gap)]
    return np.concatenate([np.pad(p, border, constant_values=128) for p in pictures], axis=-1)


def titled(clip, text, height=12):
    """A grey clip (T, H, W) with a line of text over it: (T, height + H, W)."""
    image = Image.new("1", (clip.shape[2], height))                     # no grey: it stays sharp
    ImageDraw.Draw(image).text((2, 0), text, fill=1)
    title = np.broadcast_to(np.array(image, np.uint8) * 255, (len(clip), height, clip.shape[2]))
    return np.concatenate([title, clip], axis=1)


def arrow(dy, dx, scale=8):
    """A picture (64, 64) of 0/1: an arrow from the middle, `scale` times as long as (dy, dx)."""
    image = Image.new("L", (SIZE, SIZE))
    tip = (SIZE / 2 + scale * dx, SIZE / 2 + scale * dy)
    draw = ImageDraw.Draw(image)
    draw.line([(SIZE / 2, SIZE / 2), tip], fill=1)
    draw.ellipse([tip[0] - 3, tip[1] - 3, tip[0] + 3, tip[1] + 3], fill=1)       # its head
    return np.array(image)


def in_colour(grey):
    """(H, W) -> (H, W, 4), red, green, blue and opacity: matplotlib draws that twice as fast."""
    return np.stack([grey, grey, grey, np.full_like(grey, 255)], axis=-1)


def save_sheet(rows, labels, path, scale=2):
    """Write a contact sheet (PNG): clips of equal length (n, T, 64, 64) of 0/1, one a row."""
    strips = [beside(list(np.asarray(frames) * 255)) for frames in rows]      # (64, T * 66) each
    sheet = np.concatenate([np.pad(s, ((0, 2), (0, 0)), constant_values=128) for s in strips])
    sheet = np.pad(sheet.repeat(scale, 0).repeat(scale, 1), ((0, 0), (72, 0)))
    image = Image.fromarray(sheet.astype(np.uint8))
    for row, label in enumerate(labels):
        ImageDraw.Draw(image).text((6, (66 * row + 28) * scale), f"{label}", fill=255)
    with written_whole(path) as file:
        image.save(file, "PNG")


def draw_curves(rows, path):
    """Draw the curves of a training run (PNG) from its logged rows, the dicts of metrics.csv."""
    from matplotlib.figure import Figure                                # slow to import: only here
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    panels = {"tokenizer: pixel loss": ("tokenizer", "pixel_loss", "log"),
              "LAM: pixel loss": ("world", "pixel_loss", "log"),
              "dynamics: loss": ("world", "dynamics_loss", "log"),
              "dynamics: val_action_ratio": ("world", "val_action_ratio", "log")}
    for axes, (title, (stage, name, scale)) in zip(figure.subplots(1, 4), panels.items()):
        points = [(row["step"], row[name]) for row in rows if row["stage"] == stage and name in row]
        axes.set(title=title, xlabel="step", yscale=scale if points else "linear")
        axes.plot([step for step, _ in points], [value for _, value in points])
        begun = [row["step"] for row in rows if row["stage"] == stage and "codes_used" in row]
        if begun:
            axes.axvline(begun[0], color="grey", linestyle=":", label="codebook in use")
            axes.legend()
    with written_whole(path) as file:
        figure.savefig(file, dpi=100, format="png")


def write_preview(data, out, split="train", count=8, force=False):
    """Draw sequences spread evenly over a split: the `preview` command. .png or .gif.

    The first thing to do with any data is to look at it: a bad threshold, a sideways video or a
    still one shows at once, and would otherwise cost a day of training.
    """
    out = check_output(out, (".png", ".gif"), force)
    if not 1 <= count <= 200:
        raise UserError("--count must be from 1 to 200")
    loaded = load_split(data, split)
    bits, grey = loaded["bits"], loaded["grey"]
    chosen = evenly(len(bits), count)
    shown = dict(zip(evenly(len(bits), len(grey)).tolist(), grey / 255))
    rows, labels = [], []               # the grey picture, where it is known, over the binary one
    for i in chosen.tolist():
        pair = [shown[i]] if i in shown else []
        rows += [*pair, unpack(bits[i])]                              # (16, 64, 64) each
        labels += ["grey"] * len(pair) + [loaded["start"][i]]
    if out.suffix.lower() == ".gif":
        save_gif(np.concatenate([beside([row * 255 for row in rows[k::2]]) for k in (0, 1)], axis=1)
                 if len(rows) == 2 * len(chosen) else beside([row * 255 for row in rows]), out, 2)
    else:
        save_sheet(rows, labels, out)
    print(f"wrote {out}: {len(chosen)} sequences of {split}")
