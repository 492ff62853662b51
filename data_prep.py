"""data_prep.py: turn video into the data that genie_mini.py learns from.

The problem. A world model wants many short sequences of small frames, equally spaced in time.
Videos come long, large, in colour, and at any frame rate, and frames may be unevenly spaced.
This file bridges the gap. It makes 64x64 black-and-white frames at 10 FPS, cut into sequences of
16 frames, and it does so in five steps:

  1. Put the frames on a 30 FPS clock, by their time stamps (never by their index in the file).
  2. Shrink each to 64x64 grey pixels, then to 1 bit a pixel with a threshold.
  3. Cut the clock into windows of 48 ticks (1.6 s). Taking every third tick from offsets 0, 1
     and 2 gives three staggered 10 FPS sequences of 16 frames from each window.
  4. Give whole windows, in blocks of time, to train, val and test. One hour is 108,000 ticks =
     2,250 windows = 6,750 sequences: 6,000 to train, 450 to val, 300 to test.
  5. Write one .npz file, 1 bit a pixel: an hour takes 55 MB.

With no video at hand, `demo` renders a small game in which the true actions are known.

    python data_prep.py demo    -o data/demo.npz [--world demo|ball|crowd] [--minutes 60]
                                [--seed 0] [--force]
    python data_prep.py video   FILE [FILE ...] -o data/NAME.npz [--invert]
                                [--threshold auto|otsu|motion|adaptive|0-255]
                                [--crop auto|center|fit|stretch] [--actions KEYS.npy]
                                [--start S] [--end S] [--force]
    python data_prep.py preview data/NAME.npz -o sheet.png [--split train|val|test] [--count N]

Contents: 1 sequences and splits · 2 decoding video · 3 black and white · 4 from video to data ·
5 the command line. How files are written and read stands in extras/files.py, what few
films need in extras/films.py, the games in extras/worlds.py.
"""

import base64
import contextlib
import math
import sys
import tempfile
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from extras import films
from extras.files import (FRAMES, JOIN_PICTURES, SIZE, SOURCE_FPS, SPLITS, STRIDE, WINDOW, Parser,
                          Progress, UserError, check_input, check_output, evenly, nearest_folder,
                          run, save_dataset, unpack, warn)

try:                                # only videos and pictures need it: see need_av
    import av
    from av.error import FFmpegError
    from av.stream import Disposition
except ImportError:
    av, FFmpegError = None, OSError

# ---------------------------------------------------------------------------------------------
# 1. Sequences and splits. Three sequences from one window show the same 1.6 s of world, a
# thirtieth of a second apart. If one were in train and its neighbour in test, the test would
# measure memory. So a window is never divided between splits, and each split is one block of
# time. (Two blocks touch at a border; section 4 sees to it that no source frame is on both sides.)
# ---------------------------------------------------------------------------------------------


def cut_window(ticks):
    """Cut a window (48, ...) into its three staggered sequences (3, 16, ...).

    Sequence o holds the ticks o, o + 3, o + 6, ... o + 45.
    """
    # (48, ...) -> (16, 3, ...): tick = 3 * frame + offset -> swap -> (3, 16, ...)
    return ticks.reshape(FRAMES, STRIDE, *ticks.shape[1:]).swapaxes(0, 1)


def split_sizes(windows):
    """Return how many windows go to train, val and test: 2,000 : 150 : 100, each at least one.

    Raises UserError when there are fewer than three windows.
    """
    if windows < 3:
        raise UserError(f"{windows} windows of {WINDOW / SOURCE_FPS} s cannot fill train, val and "
                        f"test; at least {3 * WINDOW / SOURCE_FPS} s of video are needed")
    val = max(1, (windows * 150 + 1125) // 2250)      # the + 1125 rounds to the nearest integer
    test = max(1, (windows * 100 + 1125) // 2250)
    return {"train": windows - val - test, "val": val, "test": test}


def true_actions(effects):
    """Name the action of each 10 FPS transition in a window. (48,) effects -> (3, 15) uint8.

    A transition spans three source frames. Its action is the most common of their three effects,
    or the last if all differ. Effects, not keys: where the hero is blocked, a key does nothing.
    """
    # Effect k leads from tick k to k + 1, so tick 3j + o to 3(j + 1) + o takes effects 3j + o,
    # 3j + o + 1 and 3j + o + 2. Three views of the effects, one tick apart, line them up.
    first, second, third = (np.array(effects)[i:i + WINDOW - 3] for i in range(3))   # (45,) each
    common = np.where((first == second) | (first == third), first, third)
    # (45,) -> (15, 3): tick = 3 * transition + offset -> (3, 15)
    return common.reshape(FRAMES - 1, STRIDE).T.astype(np.uint8)


# ---------------------------------------------------------------------------------------------
# 2. Decoding video. "Frame number 300" means 10 s in one file and 5 s in the next, and phones
# record at uneven rates. So frames are placed by presentation time on a clock of 30 ticks a
# second: tick k shows the latest frame whose time is at most k/30 s. Times are exact fractions,
# since 1/30 summed up in floating point drifts. An hour of 1080p would be 600 GB as pixels, so
# frames are decoded one by one and shrunk at once by FFmpeg's own scaler.
# ---------------------------------------------------------------------------------------------

CUT, SCENE = 30, 5 * SOURCE_FPS      # mean grey levels by which a cut changes a picture; ticks
TOLERANCE = Fraction(1, 1000)       # s: files that count in milliseconds round 33.3 to 33 or 34
LONGEST = 600                       # s: a frame that shows for longer has a broken time stamp


class Shrinker:
    """Turns decoded frames into grey squares, uint8 (64, 64), through an FFmpeg filter graph."""

    def __init__(self, crop, ground=None):
        """crop: 'center' keeps the middle square; 'stretch' and 'fit' keep everything: the one
        scales both axes apart, the other adds black bars. What is transparent becomes black, or
        white where ground is "white"."""
        self.crop, self.layout, self.graph = crop, None, None
        self.ground = ground

    def build(self, frame, aspect):
        """Set up crop -> scale -> grey. aspect: width / height of one pixel (1 almost always)."""
        wide, high = frame.width * aspect, Fraction(frame.height)     # in square pixels
        graph = av.filter.Graph()
        nodes = [graph.add_buffer(width=frame.width, height=frame.height,
                                  format=frame.format.name, time_base=Fraction(1, SOURCE_FPS))]
        size = (SIZE, SIZE)
        if self.crop == "center":
            side = min(wide, high)
            width, height = max(1, round(side / aspect)), max(1, round(side))
            nodes.append(graph.add("crop", f"{width}:{height}:exact=1"))
        elif self.crop == "fit":
            scale = SIZE / max(wide, high)
            size = (max(1, round(wide * scale)), max(1, round(high * scale)))
        turn = []
        if films.has_alpha(frame):
            turn = ["negate"] if self.ground == "white" else []       # white: the negative of black
            nodes += [graph.add("format", "pix_fmts=gbrap"), *map(graph.add, turn),
                      graph.add("premultiply", "inplace=1")]          # colours on black
        # area: each pixel is the mean of what it covers.
        nodes += [graph.add("scale", f"{size[0]}:{size[1]}:flags=area"),
                  graph.add("format", "pix_fmts=gray"), *map(graph.add, turn),
                  graph.add("buffersink")]
        graph.link_nodes(*nodes).configure()
        return graph

    def __call__(self, frame, aspect):
        """Shrink one frame; aspect as in build()."""
        layout = (frame.width, frame.height, frame.format.name, frame.color_range, aspect)
        if layout != self.layout:   # the first frame, or a file that changes size on the way
            self.graph, self.layout = self.build(frame, aspect), layout
        self.graph.push(frame)
        grey = self.graph.pull().to_ndarray()                         # (height, width), <= 64
        y, x = (SIZE - grey.shape[0]) // 2, (SIZE - grey.shape[1]) // 2
        square = np.zeros((SIZE, SIZE), dtype=np.uint8)
        square[y:y + grey.shape[0], x:x + grey.shape[1]] = grey
        # The square is centred, so turning it last gives the same picture.
        upright, turned = upright_square(square, frame)
        self.ratio = frame.width * aspect / frame.height              # width / height, upright
        self.ratio = 1 / self.ratio if turned else self.ratio
        return upright


def upright_square(square, frame):
    """Turn a square as the file asks: a phone held upright records sideways, and one that faces its
    owner a mirror image; both note it in a matrix. Returns (square, whether it lay on its side).
    """
    try:
        matrix = np.frombuffer(bytes(frame.side_data.get("DISPLAYMATRIX") or b""), np.int32)
    except ValueError:              # a picture's notes that PyAV has no name for: no matrix
        matrix = np.zeros(0)
    if len(matrix) != 9:
        return square, False
    # A pixel (x, y) goes to (ax + cy, bx + dy), seen from the middle.
    a, b, c, d = matrix[[0, 1, 3, 4]]
    turned = abs(int(b)) > abs(int(a))
    if turned:
        square, a, d = square.T, c, b
    return square[::-1 if d < 0 else 1, ::-1 if a < 0 else 1], turned


def length(stream):
    """How long a stream says it is, in seconds; 0 where it does not."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    try:                                                # Matroska writes 00:01:02.345 into a tag
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except (KeyError, ValueError):
        return 0.0


def need_av():
    """Raise UserError where PyAV is not installed. The demo world and training do without."""
    if av is None:
        raise UserError("PyAV, which decodes videos and pictures, is missing: pip install av")


@contextlib.contextmanager
def opened_video(path):
    """Yield (container, video stream) of a file. Raises UserError if it holds no video."""
    need_av()
    with open(check_input(path), "rb") as file:     # not its name: FFmpeg might see a URL in it
        try:
            container = av.open(file, metadata_errors="replace")      # a title may be Latin-1
        except FFmpegError as error:
            raise UserError(f"cannot read {path} as video ({error.strerror}); "
                            "choose a file that FFmpeg can play") from None
        with container:
            streams = container.streams.video
            moving = [one for one in streams if not one.disposition & Disposition.attached_pic]
            if not moving and (container.streams.audio or not streams):
                raise UserError(f"{path} has no picture, only sound or data; choose a video file")
            # A cover may be a stream like another, but of one frame. The file's choice, the larger.
            long = max(map(length, streams)) / 2
            stream = max(moving or streams, key=lambda one: (
                length(one) >= long, one.disposition & Disposition.default, one.width * one.height))
            stream.thread_type = "AUTO"     # decode on several cores
            yield container, stream


def decoded_frames(container, stream, faults):
    """Yield every frame that can be decoded. Broken packets are skipped and counted in faults."""
    packets, decoder = container.demux(stream), films.decoder(stream)
    while True:
        try:
            packet = next(packets, None)
        except (FFmpegError, IndexError):  # the container itself breaks off here
            faults["broken packet(s) skipped"] += 1
            packet = None
        if packet is None:
            return
        try:
            yield from decoder.decode(packet)
        except FFmpegError:
            faults["broken packet(s) skipped"] += 1


def timed_frames(path, container, stream, faults):
    """Yield (time, duration, frame), exact Fractions of a second, times strictly increasing.

    A frame without a time stamp is taken to follow its predecessor by 1 / average rate; so is one
    whose time runs backwards, or jumps ahead of the next: frames come in order, even of an AVI,
    whose times are those of decoding. One whose time stands still is skipped. All but the first go
    into faults, as does a duration of over LONGEST. Raises UserError for a gap of over LONGEST.
    """
    period = min(1 / Fraction(stream.average_rate or SOURCE_FPS), LONGEST)
    last = stamp = None
    for frame, following in films.with_next(decoded_frames(container, stream, faults)):
        before, stamp = stamp, frame.pts
        if None not in (before, stamp, following) and before < following < stamp:
            faults["frame(s) whose time jumps ahead: placed by the frame rate"] += 1
            stamp = None
        if stamp is not None and stamp == before:
            faults["frame(s) whose time stands still skipped"] += 1
            continue
        now = last if stamp is None else stamp * Fraction(frame.time_base)
        if last is not None and now <= last:
            now = last + period
            if stamp is not None:
                faults["frame(s) whose time runs backwards: placed by the frame rate"] += 1
        if last is not None and now - last > LONGEST:
            raise UserError(f"{path} has a gap of over {LONGEST} s after {float(last):.1f} s: cut "
                            "it there or, if nothing moves, fill it: ffmpeg -i OLD -r 30 NEW.mp4")
        last = now or Fraction(0)
        duration = (frame.duration or 0) * Fraction(frame.time_base or 0)
        faults[f"duration(s) of over {LONGEST} s left out"] += duration > LONGEST
        yield last, duration if 0 < duration <= LONGEST else period, frame


class Clip:
    """One file on the 30 FPS clock. Its frames are in the spool, a binary file: see read_clip."""

    def __init__(self, path, spool, crops):
        self.path, self.spool, self.crops = path, spool, crops
        self.crop = crops[0]        # which of the squares in the spool grey() reads
        self.record = len(crops) * SIZE * SIZE              # bytes of a frame in the spool
        self.base = spool.tell()    # where the file's first frame is
        self.first = []             # first[i]: the tick on which frame i appears
        self.cuts = [0]             # frames which begin another scene
        self.ticks = 0              # length: the last frame stays until here
        self.looks = []             # for each scene, how grey becomes black and white: section 3

    def add(self, tick, until, squares):
        """Append a frame, uint8 (crops, 64, 64), that shows from tick to until - 1."""
        grey = squares[0].astype(np.int16)
        if self.first and tick - self.first[self.cuts[-1]] >= SCENE \
                and abs(grey - self.newest).mean() > CUT:
            self.cuts.append(len(self.first))
        self.newest = grey
        self.spool.write(squares.tobytes())
        self.first.append(tick)
        self.ticks = until

    def source_frames(self, ticks):
        """The numbers of the frames which these ticks show."""
        return np.searchsorted(self.first, ticks, side="right") - 1

    def grey(self, low, high):
        """Read frames low to high - 1: uint8 (n, 64, 64)."""
        self.spool.seek(self.base + int(low) * self.record)
        data = self.spool.read(int(high - low) * self.record)
        frames = np.frombuffer(data, np.uint8).reshape(-1, len(self.crops), SIZE, SIZE)
        return frames[:, self.crops.index(self.crop)]

    def sample(self, low, high, count=150):
        """Pairs of frames 1/10 s apart, spread over the frames low to high - 1: (n, 2, 64, 64)."""
        begin, last = self.first[low], self.first[high - 1]
        ticks = np.unique(np.linspace(begin, max(begin, last - STRIDE), count).astype(int))
        numbers = self.source_frames(ticks[:, None] + (0, STRIDE)).clip(low, high - 1)
        return np.stack([self.grey(i, i + 1)[0] for i in numbers.ravel()]
                        ).reshape(-1, 2, SIZE, SIZE)

    def scenes(self):
        """Yield (low, high) of each scene: its frames are low to high - 1."""
        return zip(self.cuts, [*self.cuts[1:], len(self.first)])

    def binary(self, low, high, invert):
        """Frames low to high - 1 in black and white, each scene in its own way: (n, 64, 64)."""
        return np.concatenate([
            binarise(self.grey(max(low, begin), min(high, end)), look, invert)
            for (begin, end), look in zip(self.scenes(), self.looks) if begin < high and low < end])


def frames_on_clock(timed, start, end):
    """Yield (tick, until, frame) for each frame that shows: on the ticks from tick to until - 1.

    timed: what timed_frames yields. start, end: s since the first frame; end may be None. Only the
    next frame tells until when one shows, so each waits for its successor.
    """
    limit = math.inf if end is None else math.ceil((end - start - TOLERANCE) * SOURCE_FPS)
    origin = waiting = None
    for now, duration, frame in timed:
        if origin is None:
            origin = now + start
        # The first tick k with k / 30 >= now - tolerance; what precedes the start is on tick 0.
        tick = max(0, math.ceil((now - origin - TOLERANCE) * SOURCE_FPS))
        if waiting and min(tick, limit) > waiting[0]:
            yield waiting[0], min(tick, limit), waiting[1]
        if tick >= limit:
            return
        waiting = tick, frame
        stop = math.ceil((now + duration - origin - TOLERANCE) * SOURCE_FPS)
    if waiting and min(stop, limit) > waiting[0]:   # the last frame has only its duration
        yield waiting[0], min(stop, limit), waiting[1]


def warn_of_missing(clip, promised, start):
    """Warn of a file that is shorter than it says (s), or in which no frame comes for long."""
    found = start + clip.ticks / SOURCE_FPS
    if found < 0.98 * promised:
        warn(f"{clip.path} says it lasts {promised:.1f} s, but only {found:.1f} s can be decoded: "
             "it was cut off, or is damaged")
    lengths = np.diff([*clip.first, clip.ticks])
    if (lengths > WINDOW).any():
        warn(f"{clip.path} shows one frame for up to {lengths.max() / SOURCE_FPS:.1f} s, "
             f"{lengths[lengths > WINDOW].sum() / SOURCE_FPS:.1f} s in all: nothing moves there")


def read_clip(path, spool, crops, start, end):
    """Decode one file onto the clock, from start (s) to end (s, or None). Returns a Clip.

    Each source frame that shows on some tick is appended to the binary file `spool` once, as 64x64
    bytes for each way to crop. (How to crop, and the threshold, are known only at the end, and
    hours of grey frames do not belong in memory.) Raises UserError if nothing can be decoded.
    """
    clip, faults = Clip(Path(path), spool, crops), Counter()
    with opened_video(path) as opened:
        ground, merge = films.look_over(path, *opened, decoded_frames)
    shrinkers = [Shrinker(crop, ground) for crop in crops]
    with opened_video(path) as (container, stream):
        if len(container.streams.video) > 1:
            warn(f"{path} has {len(container.streams.video)} video streams: taking number "
                 f"{stream.index}, {stream.width}x{stream.height} pixels")
        promised = length(stream) or (container.duration or 0) / 1e6              # in seconds
        progress = Progress(clip.path.name, promised)
        timed = films.paired(timed_frames(path, container, stream, faults), merge)
        for tick, until, frames in frames_on_clock(timed, start, end):
            aspect = Fraction(stream.sample_aspect_ratio or 1)
            squares = [[shrink(frame, aspect) for shrink in shrinkers] for frame in frames]
            clip.add(tick, until, (merge or np.maximum).reduce(squares))
            progress.update(until / SOURCE_FPS + float(start))
        progress.close()
    if clip.ticks == 0:
        where = f" after --start {float(start)} s" if start else ""
        raise UserError(f"{path} has no frame{where} that can be decoded; try another file or time")
    clip.ratio = shrinkers[0].ratio
    warn_of_missing(clip, promised if end is None else 0, float(start))
    for fault, count in (+faults).items():              # + leaves out what never happened
        warn(f"{path}: {count} {fault}")
    return clip


# ---------------------------------------------------------------------------------------------
# 3. Black and white. One bit a pixel needs a border between dark and bright. Chosen anew for each
# frame it would wander, and still things would flicker; so Otsu's method chooses one for a whole
# video. Where the light differs across the picture, 'adaptive' compares each pixel with its
# neighbourhood instead: what is brighter than its surroundings becomes 1, and flat areas 0.
#
# Both may lose just what matters: a dark car on a dark road is on one side of every border. So
# 'motion' asks what moves. Its background is each pixel's median over a scene, black and white by
# Otsu; where a frame differs from the background, the background's pixel is flipped. Whatever moves
# then shows, in black on white or in white on black.
# ---------------------------------------------------------------------------------------------

METHODS = ("otsu", "motion", "adaptive")            # the most natural to the eye comes first
NEIGHBOURHOOD = 15                  # adaptive: the side of the square of neighbours, in pixels
CONTRAST = 6                        # adaptive: grey levels above their mean that count as bright


def otsu(histogram):
    """The grey level that parts a histogram (256,) best: 1 is what is brighter than it.

    Otsu (1979): maximise the variance between the two classes, w0 w1 (m0 - m1)^2.
    """
    levels = np.arange(256)
    count = np.cumsum(histogram).astype(float)                # (256,): pixels at or below a level
    total = np.cumsum(histogram * levels).astype(float)       # and the sum of their levels
    w0, w1 = count, count[-1] - count
    with np.errstate(divide="ignore", invalid="ignore"):
        between = np.nan_to_num(w0 * w1 * (total / w0 - (total[-1] - total) / w1) ** 2)
    # Black on white leaves a plateau of equally good levels: its middle is the safest. A video of
    # one flat grey is a plateau from end to end, and is told apart at the middle of the range.
    best = np.flatnonzero(between >= between.max() * (1 - 1e-9))
    return int(best.mean())


def grey_otsu(grey):
    """Otsu's level of grey pictures, uint8 of any shape."""
    return otsu(np.bincount(grey.ravel(), minlength=256))


class Look(NamedTuple):
    """How the grey pictures of one scene become black and white."""
    method: str                     # "level", "motion" or "adaptive"
    level: int = 0                  # level: 1 is brighter than this; motion: how far is moved
    full: int = 0                   # motion: how far a pixel is that a moving thing fills
    background: np.ndarray = None   # motion: (64, 64)
    box: tuple = (slice(0, SIZE),) * 2      # adaptive: the picture (y, x) without its flat bars


def apart(grey, background):
    """How far pixels (n, 64, 64) are from others or a background. A change of the light as a whole,
    which is what most pixels do, does not count."""
    apart = grey.astype(np.int16) - background
    return abs(apart - np.median(apart, axis=(1, 2), keepdims=True).astype(np.int16))


def spread(pictures):
    """The largest of each pixel and its eight neighbours: (n, 64, 64) -> (n, 64, 64)."""
    padded = np.pad(pictures, ((0, 0), (1, 1), (1, 1)))
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2)).max((-2, -1))


def moved(far, level, full):
    """Which pixels show something that moves: far (n, 64, 64), see apart(), to bool.

    A pixel that a thing half covers is half as far as its neighbour: there runs the edge. What is
    thinner than a pixel and falls between two would now have two, now one; so a pair of pixels that
    stands alone is drawn as one, the stronger, unless both together are more than one full pixel.
    """
    on = (far > level) & (2 * far >= spread(far))
    for axis in (1, 2):
        on, far = on.swapaxes(axis, 2), far.swapaxes(axis, 2)
        beside = np.pad(on, ((0, 0), (0, 0), (1, 2)))
        pair = beside[..., 1:-2] & beside[..., 2:-1] & ~beside[..., :-3] & ~beside[..., 3:]
        right = np.pad(far, ((0, 0), (0, 0), (0, 1)))[..., 1:]
        pair, second = pair & (far + right <= 1.1 * full), right > far    # the right one is it
        on = on & ~(pair & second)
        on[..., 1:] &= ~(pair & ~second)[..., :-1]
        on, far = on.swapaxes(axis, 2), far.swapaxes(axis, 2)
    return on


def inside(pictures):
    """The box (y, x) of pictures (n, 64, 64) within flat bars that never change: a letterbox."""
    box = []
    for axis in (2, 1):                                               # rows, then columns
        spans = np.ptp(pictures, axis=(0, axis))                      # (64,)
        alive = np.flatnonzero(spans > 8)
        box.append(slice(alive[0], alive[-1] + 1) if len(alive) else slice(0, SIZE))
    return tuple(box)


def find_look(method, sample):
    """The Look of a scene for a method, one of METHODS or a level; sample (n, 64, 64) is of it."""
    if method == "motion":
        background = np.median(sample, axis=0).astype(np.uint8)
        counts = np.bincount(apart(sample, background).ravel(), minlength=256)[:256]
        counts[:5] = 0                                                # noise
        level = max(6, otsu(counts) // 3) if counts.any() else 6
        full = np.searchsorted(counts.cumsum(), 0.95 * counts.sum())
        return Look("motion", level, int(full), background)
    if method == "adaptive":
        return Look("adaptive", box=inside(sample))
    return Look("level", grey_otsu(sample) if method == "otsu" else int(method))


def binarise(grey, look, invert=False):
    """Turn grey uint8 (n, 64, 64) into 0 and 1. look: a Look, a method of METHODS, or a level."""
    look = look if isinstance(look, Look) else find_look(look, grey)
    if look.method == "level":
        bright = grey > look.level
    elif look.method == "motion":
        bright = look.background > grey_otsu(look.background)
        bright = bright ^ moved(apart(grey, look.background), look.level, look.full)
    else:
        side, (rows, columns) = NEIGHBOURHOOD, look.box
        inner = grey[:, rows, columns]                  # bars would make bright halos beside them
        padded = np.pad(inner, ((0, 0), (side // 2, side // 2), (side // 2, side // 2)), "edge")
        # Sums over side x side squares as differences of running sums, down and then across.
        sums = np.pad(padded.astype(np.int32), ((0, 0), (1, 0), (1, 0))).cumsum(1).cumsum(2)
        sums = sums[:, side:] - sums[:, :-side]
        sums = sums[:, :, side:] - sums[:, :, :-side]                 # (n, height, width)
        bright = np.zeros(grey.shape, dtype=bool)
        bright[:, rows, columns] = inner.astype(np.int32) * side ** 2 > sums + CONTRAST * side ** 2
    return (bright != invert).astype(np.uint8)


def motion_kept(grey, binary):
    """What black and white keeps of the motion in pairs of frames 1/10 s apart (n, 2, 64, 64).

    Returns four sums: the grey change (what exceeds 8 levels); how much of it has a change of the
    binary picture at most a pixel away, and so is kept; the binary changes; and how many of these
    have a grey one beside them, and so are true: the others are flicker.
    """
    change = apart(grey[:, 1], grey[:, 0])                            # (n, 64, 64)
    weight = np.where(change > 8, change, 0)
    change = abs(np.diff(grey.astype(np.int16), axis=1))[:, 0]        # the light's, too
    flips = binary[:, 0] != binary[:, 1]
    return np.array([weight.sum(), (weight * spread(flips)).sum(),
                     flips.sum(), (flips & spread(change > 4)).sum()])


def try_method(clip, method):
    """Black and white by a method: the looks of the clip's scenes, and motion_kept() of them."""
    whole, looks, sums = clip.sample(0, len(clip.first))[:, 0], [], 0
    for low, high in clip.scenes():
        pairs = clip.sample(low, high)
        looks.append(find_look(method, pairs[:, 0] if method == "motion" else whole))
        binary = binarise(pairs.reshape(-1, SIZE, SIZE), looks[-1]).reshape(pairs.shape)
        sums = sums + motion_kept(pairs, binary) * (high - low) / len(pairs)
    return looks, sums


def choose_looks(clips, threshold):
    """Find the looks of all clips, by threshold, or where it is 'auto' by what keeps the motion:
    the first of METHODS, unless another keeps 0.15 more of it. Returns the method; says why."""
    tried, figures = {}, {}
    for method in METHODS if threshold == "auto" else (threshold,):
        tried[method] = [try_method(clip, method) for clip in clips]
        grey, kept, flips, true = sum(sums for _, sums in tried[method])
        figures[method] = kept / grey if grey else 1.0, true / flips if flips else 1.0
    best = max(kept * true for kept, true in figures.values())
    method = next(name for name, (kept, true) in figures.items() if kept * true >= best - 0.15)
    for clip, (looks, _) in zip(clips, tried[method]):
        clip.looks = looks
    others = ", ".join(f"{name} would keep {figures[name][0]:.2f} ({figures[name][1]:.2f} true)"
                       for name in figures if name != method)
    kept, true = figures[method]
    print(f"threshold {method}: motion kept {kept:.2f}, {true:.2f} of the changes true"
          + (f"; {others}" if others else ""))
    if kept < 0.6:
        warn(f"black and white loses {100 * (1 - kept):.0f} % of the motion: look at it with the "
             "preview command, and try --threshold motion, adaptive or a number, or --crop")
    return method


def choose_crop(clips):
    """Take the middle square, unless over 5 % of the motion is outside it: then the whole picture,
    stretched. Sets each clip's crop, returns it and says why."""
    total = outside = 0
    for clip in clips:
        pairs = clip.sample(0, len(clip.first))                       # of "stretch"
        change = apart(pairs[:, 1], pairs[:, 0])
        change = np.where(change > 8, change, 0).sum(axis=0)          # (64, 64)
        change = change.sum(axis=0 if clip.ratio > 1 else 1)          # along the longer side
        margin = round((SIZE - SIZE * float(min(clip.ratio, 1 / clip.ratio))) / 2)
        total += change.sum()
        outside += change.sum() - change[margin:SIZE - margin].sum()
    crop = "stretch" if outside > 0.05 * total else "center"
    for clip in clips:
        clip.crop = crop
    print(f"crop {crop}: {100 * outside / max(1, total):.0f} % of the motion is outside the middle "
          "square")
    return crop


def image_to_frame(path, meta=None):
    """Read an image (or a video's first frame) as a model's frame: uint8 (64, 64) of 0 and 1.

    It takes the way that a data file's `meta` describes; without one, the middle square and Otsu's
    level of its own. Raises UserError if it is missing or no image.
    """
    meta = meta or {}
    with opened_video(path) as (container, stream):
        frame = films.picture(path) or next(decoded_frames(container, stream, Counter()), None)
        if frame is None:
            raise UserError(f"{path} holds no picture that can be decoded; choose another image")
        ground = films.clear_ground([films.sample(frame)])
        shrink = Shrinker(meta.get("crop") or "center", ground)
        grey = shrink(frame, Fraction(stream.sample_aspect_ratio or 1))[None]
    looks = [find_look("otsu" if meta.get("threshold") is None else meta["threshold"], grey)]
    if meta.get("looks"):                               # several: that of the most similar scene
        looks = [unpack_look(look) for look in meta["looks"]]
        looks.sort(key=lambda look: 0 if look.background is None
                   else apart(grey, look.background).mean())
    return binarise(grey, looks[0], meta.get("invert", False))[0]


def pack_look(look):
    """A Look as JSON can hold it."""
    background = b"" if look.background is None else look.background.tobytes()
    return {"method": look.method, "level": look.level, "full": look.full,
            "background": base64.b64encode(background).decode()}


def unpack_look(packed):
    """The Look that pack_look wrote; whatever else stands there becomes one UserError."""
    try:
        background = np.frombuffer(base64.b64decode(packed["background"]), np.uint8)
        background = background.reshape(SIZE, SIZE) if packed["method"] == "motion" else None
        return Look(packed["method"], int(packed["level"]), int(packed["full"]),
                    background)
    except (KeyError, TypeError, ValueError):
        raise UserError("the data file's 'looks' are damaged; make it again") from None


# ---------------------------------------------------------------------------------------------
# 4. From video to data. All that is left is to join the pieces: read every file into the spool,
# cut windows, deal them out, and look up each window's frames.
# ---------------------------------------------------------------------------------------------


def window_frames(clip, number):
    """The numbers of the frames that the 48 ticks of a clip's window show: (48,) int."""
    return clip.source_frames(np.arange(number * WINDOW, (number + 1) * WINDOW))


def deal_windows(windows):
    """Deal windows, a list of (clip, number), to the splits: {name: list}, in order of time.

    At 7 FPS one source frame fills four or five ticks, and may end one split and begin the next.
    So the splits are dealt from the end of time backwards, and before each one the windows which
    show its first frame, too, are left out. The loss is borne by train, the largest.
    Raises UserError when nothing is left for train.
    """
    dealt, left = {}, windows
    for name, size in reversed(split_sizes(len(windows)).items()):
        dealt[name] = left if name == "train" else left[-size:]
        if not dealt[name]:
            raise UserError("too short or too still for train, val and test; use a longer video")
        first, number = dealt[name][0]
        begin = window_frames(first, number)[0]
        left = [(clip, number) for clip, number in left[:-size]
                if clip is not first or window_frames(clip, number)[-1] < begin]
    return {name: dealt[name] for name in SPLITS}


def read_windows(windows, invert, keys):
    """Make the sequences of one split's windows. Returns the dict that save_dataset takes.

    keys: the key held in each tick of all clips, or None; each transition gets the commonest.
    """
    bits = np.empty((len(windows), STRIDE, FRAMES, SIZE, SIZE // 8), dtype=np.uint8)
    start = np.empty((len(windows), STRIDE), dtype=np.int64)
    for w, (clip, number) in enumerate(windows):
        wanted = window_frames(clip, number)                          # (48,), never decreasing
        frames = clip.binary(wanted[0], wanted[-1] + 1, invert)[wanted - wanted[0]]
        bits[w] = cut_window(np.packbits(frames, axis=-1))            # frames: (48, 64, 64)
        start[w] = clip.offset + number * WINDOW + np.arange(STRIDE)
    actions = None
    if keys is not None:
        actions = np.empty((len(windows), STRIDE, FRAMES - 1), dtype=np.uint8)
        for row, at in zip(actions, start[:, 0]):
            row[:] = true_actions(keys[at:at + WINDOW])
        actions = actions.reshape(-1, FRAMES - 1)
    grey = np.empty((min(8, len(windows) * STRIDE), FRAMES, SIZE, SIZE), np.uint8)   # for preview
    for row, i in zip(grey, evenly(len(windows) * STRIDE, len(grey))):
        clip, number = windows[i // STRIDE]
        numbers = window_frames(clip, number)
        shown = clip.grey(numbers[0], numbers[-1] + 1)[numbers - numbers[0]]
        row[:] = cut_window(shown)[i % STRIDE]
    return {"bits": bits.reshape(-1, *bits.shape[2:]), "start": start.reshape(-1),
            "actions": actions, "grey": grey}


def read_keys(path, ticks):
    """Read the key held in each 30 FPS frame: a .npy of `ticks` small whole numbers."""
    try:
        keys = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as a .npy file of keys ({error})") from None
    if not isinstance(keys, np.ndarray) or keys.dtype.kind not in "iu" or keys.shape != (ticks,):
        raise UserError(f"{path} holds {getattr(keys, 'dtype', 'no array')} of shape "
                        f"{getattr(keys, 'shape', '')} where one whole number for each of the "
                        f"video's {ticks} frames at 30 FPS is needed")
    if keys.min() < 0 or keys.max() > 255:
        raise UserError(f"{path}: keys are numbers from 0 to 255")
    return keys


def warn_if_blank(splits):
    """Warn when nearly every pixel has one colour: such data teaches nothing."""
    share = unpack(splits["train"]["bits"][::10]).mean()              # every tenth sequence will do
    if not 0.02 <= share <= 0.98:
        warn(f"{100 * share:.1f} % of the pixels are white: look at it with the preview command, "
             "and try --threshold motion, adaptive, or a number from 0 to 255, or --crop")


def read_clips(paths, spool, crop, start, end):
    """Read every file, one after the other on one clock. Returns the clips."""
    clips, ticks = [], 0
    for path in paths:
        crops = ("stretch", "center") if crop == "auto" else (crop,)
        clips.append(read_clip(path, spool, crops, start, end))
        clips[-1].offset = ticks
        ticks += clips[-1].ticks
        if clips[-1].ticks < WINDOW:
            warn(f"{path} is shorter than one window of {WINDOW / SOURCE_FPS} s: not used")
    return clips


def longest_looks(clips, count=8):
    """The looks of the longest scenes, for `meta`: an image takes that of the most similar one."""
    scenes = [(high - low, look) for clip in clips
              for (low, high), look in zip(clip.scenes(), clip.looks)]
    scenes.sort(key=lambda scene: -scene[0])
    return [pack_look(look) for _, look in scenes[:count]]


def write_video(paths, out, threshold="auto", crop="auto", invert=False, start=0, end=None,
                force=False, actions=None):
    """Turn video files into a data file: the `video` command.

    start and end, in seconds from a file's first frame, apply to each file. Sequences never cross
    from one file to the next; the clocks of the files are laid end to end, and each one's offset
    stands in `meta`. actions: a .npy of a key for each tick. Raises UserError.
    """
    out = check_output(out, (".npz",), force)
    start = Fraction(start)
    end = None if end is None else Fraction(end)
    if start < 0:
        raise UserError("--start must not be negative")
    if end is not None and end <= start:
        raise UserError("--end must be later than --start")
    for path in paths:                      # all of them, before an hour goes into the first
        with opened_video(path) as (container, _):
            if container.format.name.endswith("_pipe"):
                raise UserError(f"{path} is a picture, no video; {JOIN_PICTURES}")
    with tempfile.TemporaryFile(dir=nearest_folder(out)) as spool:    # vanishes when closed
        clips = read_clips(paths, spool, crop, start, end)
        keys = read_keys(actions, sum(clip.ticks for clip in clips)) if actions else None
        windows = [(clip, number) for clip in clips for number in range(clip.ticks // WINDOW)]
        dealt = deal_windows(windows)
        crop = choose_crop(clips) if crop == "auto" else crop
        threshold = choose_looks(clips, threshold)
        splits = {name: read_windows(part, invert, keys) for name, part in dealt.items()}
    warn_if_blank(splits)
    meta = {"sources": [{"name": clip.path.name, "offset": clip.offset, "ticks": clip.ticks}
                        for clip in clips],
            "threshold": threshold, "crop": crop, "invert": invert, "start": float(start),
            "end": None if end is None else float(end), "looks": longest_looks(clips)}
    if keys is not None:
        meta["action_names"] = [f"key {key}" for key in range(keys.max() + 1)]
    save_dataset(out, splits, meta)
    print(f"look at it: python data_prep.py preview {out} -o {out.with_suffix('.png').name}")


# ---------------------------------------------------------------------------------------------
# 5. The command line.
# ---------------------------------------------------------------------------------------------


def finite_number(text):
    """Read a finite number for argparse, which makes a readable message of a ValueError."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def threshold(text):
    """Read --threshold for argparse: a word, or an int from 0 to 255."""
    if text in ("auto", *METHODS):
        return text
    if not 0 <= int(text) <= 255:
        raise ValueError
    return int(text)


def parse_arguments(argv):
    """Turn the command line into a namespace. Raises UserError for a wrong one."""
    parser = Parser(prog="data_prep.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo|video|preview")
    demo = commands.add_parser("demo", help="render the demo world", allow_abbrev=False)
    demo.add_argument("--minutes", type=finite_number, default=60.0)
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--world", choices=("demo", "ball", "crowd"), default="demo",
                      help="demo (default), ball: one that needs memory, or crowd: eight balls")
    video = commands.add_parser("video", help="convert video files", allow_abbrev=False)
    video.add_argument("files", nargs="+", metavar="FILE")
    video.add_argument("--threshold", type=threshold, default="auto", help="auto (default: what "
                       "keeps the motion), otsu, motion, adaptive, or 0-255: brighter becomes 1")
    video.add_argument("--invert", action="store_true", help="swap black and white")
    video.add_argument("--crop", choices=("auto", "center", "fit", "stretch"), default="auto",
                       help="keep the middle square, or all, with black bars or stretched; auto "
                       "(default): the square, unless things move outside it")
    video.add_argument("--actions", metavar="KEYS.npy", help="the key held in each 30 FPS frame")
    video.add_argument("--start", type=finite_number, default=0.0, metavar="S",
                       help="seconds to leave out")
    video.add_argument("--end", type=finite_number, metavar="S", help="seconds at which to stop")
    preview = commands.add_parser("preview", help="draw some sequences", allow_abbrev=False)
    preview.add_argument("data", metavar="NAME.npz")
    preview.add_argument("--split", choices=SPLITS, default="train")
    preview.add_argument("--count", type=int, default=8)
    for command in (demo, video, preview):
        command.add_argument("-o", dest="out", required=True, metavar="FILE")
        command.add_argument("--force", action="store_true", help="replace an existing file")
    parser.commands = commands.choices
    return parser.parse(argv)


def main(argv=None):
    """Run a command; return the exit status: 0, or 2 for a user's mistake, or 130 for Ctrl-C."""
    try:
        args = parse_arguments(argv)
        if args.command == "demo":
            from extras.worlds import write_demo
            write_demo(args.out, args.minutes, args.seed, args.force, args.world)
        elif args.command == "video":
            write_video(args.files, args.out, args.threshold, args.crop, args.invert,
                        args.start, args.end, args.force, args.actions)
        else:
            from extras.pictures import write_preview
            write_preview(args.data, args.out, args.split, args.count, args.force)
    except (UserError, OSError, FFmpegError) as error:     # a full disk, a forbidden file
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    import data_prep                # the module that extras/ import, not a second copy
    run(data_prep.main)
