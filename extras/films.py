"""What few films need: a ground for what is transparent, and both of two frames that alternate. And
a picture, as a film of one frame."""

import contextlib
import functools
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from extras.files import Progress, warn


@functools.cache
def tell_once(path):
    """That what is clear stays unseen: once, though a film is opened more than once."""
    warn(f"{path}: what is transparent cannot be read here; save the film as .mov or .gif")


def decoder(stream):
    """What decodes a stream. What is clear in a WebM lies beside the picture, where libvpx alone
    looks for it, and not FFmpeg's own decoder."""
    if stream.metadata.get("alpha_mode") == "1":
        import av
        try:
            return av.CodecContext.create({"vp8": "libvpx", "vp9": "libvpx-vp9"}[stream.name], "r")
        except (KeyError, ValueError):                  # another codec, or a PyAV without libvpx
            tell_once(stream.container.name)
    return stream


def picture(path):
    """A picture file as a decoded frame, upright; None where Pillow reads none, as of a video."""
    import av
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGBA")
            return av.VideoFrame.from_ndarray(np.array(upright), format="rgba")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def has_alpha(frame):
    """Whether pixels of a frame can be transparent."""
    return frame.format.name == "pal8" or any(part.is_alpha for part in frame.format.components)


def sample(frame):
    """A frame as some of its pixels, red, green, blue and opacity: uint8 (128, 128, 4)."""
    return frame.to_ndarray(format="rgba", width=128, height=128, interpolation="POINT")


def clear_ground(samples):
    """What to draw behind what is transparent: "white" where the figures are dark, which would not
    show on "black"; None where nothing is transparent. samples: (..., 128, 128, 4)."""
    samples = np.array(samples)
    if samples[..., 3].min() > 250:
        return None
    *colours, alpha = np.moveaxis(samples, -1, 0) / np.float32(255)
    return "white" if alpha.any() and np.average(sum(colours) / 3, weights=alpha) < 0.5 else "black"


def alternation(runs):
    """How to see what is drawn on every other frame only, as old consoles do: np.maximum of two
    frames (or np.minimum, where it is dark); None where nothing is.

    runs: samples of four frames in a row, (n, 4, 128, 128, 4). A pixel alternates if it differs
    much from frame to frame, little over two, and shows what it mostly shows in each second one.
    """
    # The mean of colours and opacity, and that of 2x2 samples.
    grey = np.mean(runs, axis=-1, dtype=np.float32).reshape(-1, 4, 64, 2, 64, 2).mean((3, 5))
    once = abs(grey[:, 1:] - grey[:, :-1]).min(axis=1)                  # (n, 64, 64)
    twice = abs(grey[:, 2:] - grey[:, :-2]).max(axis=1)
    ground = np.median(grey, axis=(0, 1))
    brighter, darker = grey.max(axis=1) - ground, ground - grey.min(axis=1)
    alternates = once > np.maximum(16, 2 * twice)
    things = alternates & (abs(np.minimum(brighter, darker)) < once / 4)
    seen = (things.mean(axis=(1, 2)) > 0.001) & (alternates.mean(axis=(1, 2)) < 0.25)    # no strobe
    if seen.mean() < 1 / 8:
        return None
    return np.maximum if (brighter - darker)[things].mean() > 0 else np.minimum


PLACES = 12                         # of a film that are looked at


def look_over(path, container, stream, decoded_frames):
    """Look at four frames in a row in each of some places of a film that data_prep.opened_video
    opened. Returns clear_ground() and alternation() of them, each told if it is not None."""
    import av
    runs, begin, whole = [], container.start_time or 0, container.duration or 0
    progress = Progress(f"{Path(path).name}: a first look", PLACES)
    for i in range(PLACES):
        with contextlib.suppress(av.error.FFmpegError):     # what cannot seek is read on from here
            container.seek(begin + whole * i // PLACES)
        # It seeks to a key frame, which may be the first of all each time: so on, ever farther.
        frames = itertools.islice(decoded_frames(container, stream, Counter()), 20 * i, 20 * i + 4)
        run = [sample(frame) for frame in frames]
        runs += [run + run[-1:] * (4 - len(run))] * bool(run)
        progress.update(i + 1)
    progress.close()
    if not runs:
        return None, None
    ground, merge = clear_ground(runs), None
    if ground:
        print(f"{path}: what is transparent is drawn {ground}")
    if (stream.average_rate or 0) > 45:                 # else a tick has not two frames
        merge = alternation(runs)
    if merge:
        print(f"{path}: things are drawn on every other frame only: two frames are seen as one")
    return ground, merge


def with_next(frames):
    """Each frame, and the time stamp of the one after it; with the last, None."""
    one = next(frames, None)
    for after in frames:
        yield one, after.pts
        one = after
    if one is not None:
        yield one, None


def paired(timed, merge):
    """Turn the frame of each (time, duration, frame) into a list of it; with merge, of the one
    before, too."""
    before = []
    for now, duration, frame in timed:
        yield now, duration, [*before, frame]
        before = [frame] if merge else []
