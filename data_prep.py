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

    python data_prep.py demo    -o data/demo.npz [--minutes 60] [--seed 0] [--force]
    python data_prep.py video   FILE [FILE ...] -o data/NAME.npz [--threshold otsu|adaptive|0-255]
                                [--invert] [--crop center|fit] [--start S] [--end S] [--force]
    python data_prep.py preview data/NAME.npz -o sheet.png [--split train|val|test] [--count N]

Contents: 1 files and errors · 2 sequences and splits · 3 the demo world · 4 decoding video ·
5 black and white · 6 from video to data · 7 looking and playing · 8 the command line
"""

import argparse
import base64
import contextlib
import difflib
import io
import itertools
import json
import math
import os
import sys
import tempfile
import time
import zipfile
from collections import Counter, deque
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

SIZE = 64                           # a frame is SIZE x SIZE pixels
SOURCE_FPS = 30                     # the clock that every video is put on
STRIDE = 3                          # 30 FPS / 3 = the 10 FPS which the model sees
FRAMES = 16                         # frames in a sequence
WINDOW = STRIDE * FRAMES            # 48 ticks of the clock hold three staggered sequences
SPLITS = ("train", "val", "test")   # also their order in time
VERSION = 1                         # of the data file; raise it when the format changes

# ---------------------------------------------------------------------------------------------
# 1. Files and errors. A tool that fails halfway must not leave half a file behind, and must not
# destroy last week's data. So every file is written under a temporary name next to its final
# place, and moved there in one step (os.replace) only once it is complete. Reading is careful in
# the same spirit: the header of each array is checked before any memory is set aside for it.
# ---------------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake of the user's, told in one sentence: what is wrong and what to do about it."""


def warn(text):
    """Print a warning to stderr: something is odd, but the work goes on."""
    print(f"warning: {text}", file=sys.stderr)


def check_output(path, suffixes, force):
    """Return path as a Path once it is clear that a file may be written there.

    Called before the long work starts, so that an hour of decoding is not lost to a typing error.
    Raises UserError for a wrong ending, a directory, or an existing file without force.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a directory; give the name of a file inside it")
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{path} must end in {' or '.join(suffixes)}: give that file another name")
    if path.exists() and not force:
        raise UserError(f"{path} exists already; choose another name or pass --force to replace it")
    folder = nearest_folder(path)
    try:
        tempfile.TemporaryFile(dir=folder).close()      # the one sure way to know is to try
    except OSError as error:
        raise UserError(f"cannot write in {folder} ({error.strerror}); choose another place"
                        ) from None
    return path


def nearest_folder(path):
    """The folder of a file to be, or the nearest one above it that exists already."""
    return next(place for place in Path(path).absolute().parents if place.exists())


@contextlib.contextmanager
def written_whole(path, keep=None):
    """Yield an open binary file that becomes `path` if the block succeeds, or else vanishes.

    keep: the name to give to the file that was `path` until then; without it, that one is gone.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())     # whole on the disk before it takes the name
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; nothing was replaced"
                        ) from None
    finally:                        # also runs on Ctrl-C; after os.replace there is none to remove
        temporary.unlink(missing_ok=True)


def check_sizes(archive):
    """Refuse an open zip whose entries claim more bytes than the file has: a bomb, or damage."""
    archive.fp.seek(0, os.SEEK_END)
    if sum(entry.file_size for entry in archive.infolist()) > archive.fp.tell():
        raise UserError("its entries claim to be larger than the whole file")


def open_array(archive, name):
    """Open one array of an .npz. Returns the file, at the array's first byte, its shape and type.

    A damaged or hostile header could claim a petabyte, and np.load would try to reserve it. The
    header is a few bytes of text at the entry's beginning, so it is read and judged on its own.
    Raises UserError when the array is absent, or not as long in bytes as its header says.
    """
    try:
        entry = archive.getinfo(name + ".npy")
    except KeyError:
        raise UserError(f"it has no array named '{name}'") from None
    file = archive.open(entry)
    if np.lib.format.read_magic(file) != (1, 0):
        raise UserError(f"'{name}' is in another version of the .npy format")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or fortran:
        raise UserError(f"'{name}' holds {dtype}, or in another order than this program writes")
    if entry.file_size != file.tell() + math.prod(shape) * dtype.itemsize:
        raise UserError(f"'{name}' is not as long as its header says")
    return file, shape, dtype


def read_array(archive, name, dtype, tail):
    """Read one array of an open .npz, of shape (S, *tail). Raises UserError if it is another."""
    file, shape, found = open_array(archive, name)
    with file:
        if found != np.dtype(dtype):
            raise UserError(f"'{name}' holds {found} where {np.dtype(dtype)} is expected")
        if len(shape) != 1 + len(tail) or shape[1:] != tail or not 1 <= shape[0] <= 10_000_000:
            wanted = ", ".join(["S", *map(str, tail)])
            raise UserError(f"'{name}' has shape {shape} where ({wanted}) is expected")
        data = bytearray(math.prod(shape) * found.itemsize)
        if file.readinto(data) != len(data):    # in place: the array costs its own size, once
            raise UserError(f"'{name}' ends too early")
    return np.frombuffer(data, found).reshape(shape)


def read_meta(archive):
    """Read the JSON text `meta` of an open .npz into a dict. Raises UserError when it is wrong."""
    file, shape, dtype = open_array(archive, "meta")
    with file:
        if shape != () or dtype.kind != "U" or dtype.itemsize > 1 << 20:
            raise UserError("its 'meta' is not a text, or too long")
        meta = json.loads(str(np.frombuffer(file.read(), dtype)[0]))
    if not isinstance(meta, dict) or meta.get("version") != VERSION:
        raise UserError(f"its version is not {VERSION}, the only one this program reads")
    names = meta.get("action_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError("its 'action_names' are not a list of names")
    return meta


@contextlib.contextmanager
def opened_dataset(path):
    """Yield (zip archive, meta) of a data file. All that may be wrong becomes one UserError."""
    advice = "make it again with data_prep.py"
    if not Path(path).is_file():
        raise UserError(f"there is no data file {path}; {advice}")
    try:
        with zipfile.ZipFile(path) as archive:
            check_sizes(archive)
            yield archive, read_meta(archive)
    except UserError as error:
        raise UserError(f"{path} is not a data file of this program: {error}; {advice}") from None
    except Exception as error:              # zipfile and NumPy raise many kinds on a damaged file
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(f"{path} is damaged or not an .npz file ({reason}); {advice}") from None


def load_meta(path):
    """Return a data file's description as a dict. Raises UserError if it is not such a file."""
    with opened_dataset(path) as (_, meta):
        return meta


def load_split(path, split):
    """Load one split ('train', 'val' or 'test') of a data file.

    Returns a dict: bits uint8 (S, 16, 64, 8), 8 pixels a byte, see unpack(); start int64 (S,), the
    30 FPS tick of each sequence's first frame; actions uint8 (S, 15), or None where not known.
    Raises UserError for a file that is missing, truncated, of another type, shape or version.
    """
    if split not in SPLITS:
        raise UserError(f"there is no split '{split}'; choose from {', '.join(SPLITS)}")
    with opened_dataset(path) as (archive, meta):
        bits = read_array(archive, split, np.uint8, (FRAMES, SIZE, SIZE // 8))
        start = read_array(archive, split + "_start", np.int64, ())
        actions = None
        if "action_names" in meta:
            actions = read_array(archive, split + "_actions", np.uint8, (FRAMES - 1,))
            if len(actions) != len(bits) or actions.max() >= len(meta["action_names"]):
                raise UserError(f"'{split}_actions' does not fit '{split}'")
        if len(start) != len(bits):
            raise UserError(f"'{split}_start' does not fit '{split}'")
    return {"bits": bits, "start": start, "actions": actions}


def unpack(bits):
    """Turn packed bits (..., 64, 8) into pixels (..., 64, 64), uint8 0 or 1."""
    return np.unpackbits(bits, axis=-1)


def save_dataset(path, splits, meta):
    """Write the data file. splits: name -> dict of bits, start and perhaps actions (not None)."""
    arrays = {}
    for name, split in splits.items():
        arrays[name] = split["bits"]
        arrays[name + "_start"] = split["start"]
        if split["actions"] is not None:
            arrays[name + "_actions"] = split["actions"]
    counts = {name: len(split["bits"]) for name, split in splits.items()}
    meta = {"version": VERSION, "fps": SOURCE_FPS // STRIDE, "source_fps": SOURCE_FPS,
            "counts": counts, **meta}
    with written_whole(path) as file:
        np.savez(file, meta=np.array(json.dumps(meta)), **arrays)
    print(f"wrote {path}: " + ", ".join(f"{counts[name]:,} {name}" for name in SPLITS)
          + f" sequences of {FRAMES} frames")


class Progress:
    """A progress line with the time still needed, on stderr.

    On a terminal one line is rewritten in place; in a log file a line appears about every 10 %.
    """

    def __init__(self, label, total):
        """total: in the unit that update() is called with; 0 when unknown, and nothing shows."""
        self.label, self.total, self.began = label, total, time.monotonic()
        self.tty = sys.stderr.isatty()
        self.next_time, self.next_share = self.began + 0.5, 0.1

    def update(self, done):
        """Show that `done` units of the total are finished, unless it was shown just before."""
        now, share = time.monotonic(), min(done / self.total, 1.0) if self.total else 0
        if share <= 0 or now < self.next_time or (not self.tty and share < self.next_share):
            return
        left = (now - self.began) * (1 - share) / share
        line = f"{self.label}: {100 * share:3.0f} %, {left:,.0f} s left"
        print(f"\r{line}   " if self.tty else line + "\n", end="", file=sys.stderr, flush=True)
        self.next_time, self.next_share = now + 0.2, share + 0.1

    def close(self):
        """Wipe the line from a terminal."""
        if self.tty:
            print("\r" + " " * 79 + "\r", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------
# 2. Sequences and splits. Three sequences from one window show the same 1.6 s of world, a
# thirtieth of a second apart. If one were in train and its neighbour in test, the test would
# measure memory. So a window is never divided between splits, and each split is one block of
# time. (Two blocks touch at a border; section 6 sees to it that no source frame is on both sides.)
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


# ---------------------------------------------------------------------------------------------
# 3. The demo world. To see whether a model has found the actions of a world, one must know them.
# Hardly any public video comes with its key presses, so here is a game: a hero walks among brick
# walls where the player sends it, and a fish swims to and fro by its own rule, ignoring the player.
#
# It is built to be learnt on a CPU in minutes. The tokenizer cuts the screen into 16x16 patches
# of 4x4 pixels, and the game is played on that grid, as old tile games were: ten times a second
# hero and fish move by one patch, or stay. So each of the model's frames (10 FPS) shows one move
# more than the last, whole; a move shifts tokens by one place and leaves them unchanged; and a
# press does its all or, where the way is blocked, nothing. 29 different 4x4 patches appear. (The
# price: of a window's three staggered sequences two show the same pictures.)
# ---------------------------------------------------------------------------------------------

DEMO_ACTIONS = ("stay", "up", "down", "left", "right")
MOVES = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))     # (dy, dx) in patches, same order
PATCHES = 16                        # patches along a side of the screen
BODY = 2                            # hero and fish are 2 patches = 8 pixels square
LEVEL = 10 * WINDOW                 # source frames until the next level: see DemoWorld
REST, FOLLOW = 0.05, 0.3            # how often the player rests; how often it goes for the fish


def sprite(*rows):
    """Read a drawing of '#' (1) and '.' (0) into a uint8 array."""
    return np.array([[pixel == "#" for pixel in row] for row in rows], dtype=np.uint8)


HERO = sprite(".######.",           # mirror-symmetric: its picture never tells where it goes
              "########",
              "#..##..#",
              "#..##..#",
              "########",
              "########",
              "##....##",
              "##....##")
FISH_RIGHT = sprite("........",     # the fish's picture does tell: the tail is behind
                    "#..####.",
                    "#.###.##",
                    "########",
                    "########",
                    "#.######",
                    "#..####.",
                    "........")
FISH_LEFT = FISH_RIGHT[:, ::-1]
# What walls are built of, 2x2 patches each: brick, stone, crates and hedge.
WALLS = (sprite("#######.",
                "#######.",
                "#######.",
                "........",
                "##.#####",
                "##.#.###",
                "##.#####",
                "........"),
         sprite(".##..###",
                "####.###",
                "####..##",
                ".##.....",
                "....###.",
                "##.#####",
                "##.#####",
                "#...###."),
         sprite("########",
                "##....##",
                "#.#..#.#",
                "#..##..#",
                "#..##..#",
                "#.#..#.#",
                "##....##",
                "########"),
         sprite("#.#..#.#",
                ".##.#.##",
                "#.###.#.",
                "##.#.###",
                ".#.##.#.",
                "###.#.##",
                "#.##.#.#",
                ".#.#.##."))
# Sizes of the inner blocks, (height, width) in patches.
BLOCKS = ((2, 2), (2, 3), (3, 2), (2, 4), (4, 2), (3, 3))


def random_walls(rng):
    """A random map of walls, int (16, 16) in patches: a border of 1 and 3 to 5 inner blocks.

    0 is floor, another number what the wall is built of: WALLS[number - 1]. The gap between a
    block and the border is none or at least 3 patches, and that between two blocks at least 3.
    The hero is 2 patches wide, so it fits through every gap: no traps.
    """
    walls = np.ones((PATCHES, PATCHES), dtype=int)
    walls[1:-1, 1:-1] = 0
    near = np.zeros_like(walls, dtype=bool)     # where the next block may not stand
    placed, wanted = 0, rng.integers(3, 6)
    for _ in range(60):             # some maps have no room for all: after 60 tries, so be it
        height, width = BLOCKS[rng.integers(len(BLOCKS))]
        y, x = rng.integers(1, PATCHES - height), rng.integers(1, PATCHES - width)
        gaps = (y - 1, PATCHES - 1 - y - height, x - 1, PATCHES - 1 - x - width)
        if any(0 < gap < 3 for gap in gaps) or near[y:y + height, x:x + width].any():
            continue
        walls[y:y + height, x:x + width] = rng.integers(1, len(WALLS) + 1)
        near[max(0, y - 3):y + height + 3, max(0, x - 3):x + width + 3] = True
        placed += 1
        if placed == wanted:
            break
    return walls


def overlap(a, b):
    """Whether two bodies at patches (y, x) share a patch."""
    return all(abs(p - q) < BODY for p, q in zip(a, b))


class DemoWorld:
    """The game, stepped by hand: frame() shows it, step(key) moves it on by 1/30 s.

    Every 480 steps a new random level begins. 480 steps are 10 windows: a cut between levels
    always falls on the border of two windows, so no training sequence has a cut inside.
    """

    def __init__(self, seed):
        """seed: a non-negative integer; the same seed and keys give the same game."""
        self.rng = np.random.default_rng(seed)
        self.ticks = 0
        self.new_level()

    def new_level(self):
        """Draw new walls, and places for hero and fish, from the random generator."""
        walls = random_walls(self.rng)
        # A tile covers 2x2 patches: 8 tiles a side; a wall's patches are cut out of them.
        tiles = np.stack([np.zeros_like(HERO), *WALLS])                         # (5, 8, 8)
        tiled = np.tile(tiles, (PATCHES // 2, PATCHES // 2))                    # (5, 64, 64)
        built = walls.repeat(4, 0).repeat(4, 1)                                 # (64, 64)
        self.background = np.take_along_axis(tiled, built[None], axis=0)[0]
        # free[y, x]: does a body at patch (y, x) miss every wall? (16, 16) -> (15, 15)
        boxes = np.lib.stride_tricks.sliding_window_view(walls, (BODY, BODY))
        self.free = ~boxes.any(axis=(2, 3))
        # The fish wants 6 patches of water in a row: 5 places, all free.
        spots = [(int(y), int(x)) for y, x in np.argwhere(self.free)]
        lanes = [(y, x) for y, x in spots if x >= 2 and self.free[y, x - 2:x + 3].sum() == 5]
        self.fish = lanes[self.rng.integers(len(lanes))]
        spots = [spot for spot in spots if not overlap(spot, self.fish)]
        self.hero = spots[self.rng.integers(len(spots))]
        self.fish_dx = int(self.rng.choice((-1, 1)))

    def moved(self, body, move, other):
        """Where body (y, x) is after a move (dy, dx): where it was, if a wall or other is there."""
        target = (body[0] + move[0], body[1] + move[1])
        blocked = not self.free[target] or overlap(target, other)
        return body if blocked else target

    def step(self, key):
        """Hold a key (0 to 4, see DEMO_ACTIONS) for 1/30 s. Returns what the hero really does.

        A move takes three steps: the first reads the key, the second shows the result. A hero that
        is blocked stays, so its effect is 0 whatever the key.
        """
        if self.ticks % STRIDE == 0:
            target = self.moved(self.hero, MOVES[key], self.fish)
            self.effect = int(key) if target != self.hero else 0
        elif self.ticks % STRIDE == 1:
            self.hero = self.moved(self.hero, MOVES[self.effect], self.fish)    # he moves first
            fish = self.moved(self.fish, (0, self.fish_dx), self.hero)
            if fish == self.fish:
                self.fish_dx = -self.fish_dx                    # to turn takes the whole move
            self.fish = fish
        effect = self.effect
        self.ticks += 1
        if self.ticks % LEVEL == 0:
            self.new_level()
        return effect

    def choose_key(self):
        """What the player in our video presses next: a key whose way is free, at random.

        Seldom 'stay' and often the one that leads to the fish: a still hero teaches little, and
        where bodies meet there is most to learn.
        """
        keys = [key for key in range(1, len(MOVES))
                if self.moved(self.hero, MOVES[key], self.fish) != self.hero]
        dy, dx = self.fish[0] - self.hero[0], self.fish[1] - self.hero[1]
        along = (0, np.sign(dx)) if abs(dx) > abs(dy) else (np.sign(dy), 0)     # the longer gap
        luck = self.rng.random()
        if not keys or luck < REST:
            return 0
        if luck < REST + FOLLOW and MOVES.index(along) in keys:
            return MOVES.index(along)
        return keys[self.rng.integers(len(keys))]

    def frame(self):
        """Draw the world: uint8 (64, 64) of 0 and 1."""
        picture = self.background.copy()
        bodies = ((self.hero, HERO), (self.fish, FISH_RIGHT if self.fish_dx > 0 else FISH_LEFT))
        for (y, x), drawing in bodies:
            y, x = 4 * y, 4 * x
            picture[y:y + 8, x:x + 8] = drawing     # a body's box is never over a wall
        return picture


def count_heroes(frames, tolerance=4):
    """In how many places of each frame the hero stands: frames (..., 64, 64) of 0/1 -> (...) int.

    A place counts if at most `tolerance` of its 8x8 pixels differ from the hero's picture.
    """
    boxes = np.lib.stride_tricks.sliding_window_view(frames, HERO.shape, axis=(-2, -1))
    return ((boxes != HERO).sum((-2, -1)) <= tolerance).sum((-2, -1))


def demo_walls(frames):
    """Real frames of the demo world (..., 64, 64) with hero and fish blanked: the walls alone."""
    walls = frames.copy()
    for drawing in (HERO, FISH_LEFT, FISH_RIGHT):
        boxes = np.lib.stride_tricks.sliding_window_view(walls, HERO.shape, (-2, -1),
                                                         writeable=True)
        boxes[(boxes == drawing).all((-2, -1))] = 0                     # no body overlaps a wall
    return walls


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


def render_demo(windows, seed):
    """Play the demo world with random keys for a number of 1.6 s windows.

    Returns bits uint8 (3 * windows, 16, 64, 8) and actions uint8 (3 * windows, 15); the sequences
    of window w are 3w, 3w + 1 and 3w + 2. A key is held for 9 to 24 source frames: a transition
    that straddles a change of key has no single action, so changes should be rare.
    """
    world = DemoWorld(seed)
    bits = np.empty((windows, STRIDE, FRAMES, SIZE, SIZE // 8), dtype=np.uint8)
    actions = np.empty((windows, STRIDE, FRAMES - 1), dtype=np.uint8)
    frames = np.empty((WINDOW, SIZE, SIZE), dtype=np.uint8)
    progress = Progress("rendering", windows)
    key, hold = 0, 0
    for w in range(windows):        # packed window by window: memory stays that of the result
        effects = []
        for k in range(WINDOW):
            if hold == 0:
                key, hold = world.choose_key(), STRIDE * int(world.rng.integers(3, 9))
            frames[k] = world.frame()
            effects.append(world.step(key))
            hold -= 1
        bits[w] = cut_window(np.packbits(frames, axis=-1))
        actions[w] = true_actions(effects)
        progress.update(w + 1)
    progress.close()
    return bits.reshape(-1, *bits.shape[2:]), actions.reshape(-1, FRAMES - 1)


def write_demo(path, minutes=60, seed=0, force=False):
    """Render the demo world and write it as a data file: the `demo` command.

    60 minutes make exactly 6,000, 450 and 300 sequences. Raises UserError for bad arguments.
    """
    path = check_output(path, (".npz",), force)
    if not 0.08 <= minutes <= 6000:                 # also false for NaN
        raise UserError("--minutes must be a number from 0.08 (three windows) to 6000")
    if seed < 0:
        raise UserError("--seed must not be negative")
    windows = round(minutes * 60 * SOURCE_FPS) // WINDOW
    bits, actions = render_demo(windows, seed)
    start = np.arange(windows)[:, None] * WINDOW + np.arange(STRIDE)      # (windows, 3)
    start = start.reshape(-1).astype(np.int64)
    splits, low = {}, 0
    for name, size in split_sizes(windows).items():
        part = slice(low, low + STRIDE * size)
        splits[name] = {"bits": bits[part], "start": start[part], "actions": actions[part]}
        low = part.stop
    save_dataset(path, splits, {
        "sources": [{"name": "demo world", "seed": seed, "offset": 0, "ticks": windows * WINDOW}],
        "threshold": None, "crop": None, "invert": False, "action_names": DEMO_ACTIONS})


# ---------------------------------------------------------------------------------------------
# 4. Decoding video. "Frame number 300" means 10 s in one file and 5 s in the next, and phones
# record at uneven rates. So frames are placed by presentation time on a clock of 30 ticks a
# second: tick k shows the latest frame whose time is at most k/30 s. Times are exact fractions,
# since 1/30 summed up in floating point drifts. An hour of 1080p would be 600 GB as pixels, so
# frames are decoded one by one and shrunk at once by FFmpeg's own scaler.
# ---------------------------------------------------------------------------------------------

TOLERANCE = Fraction(1, 1000)       # s: files that count in milliseconds round 33.3 to 33 or 34


class Shrinker:
    """Turns decoded frames into grey squares, uint8 (64, 64), through an FFmpeg filter graph."""

    def __init__(self, crop):
        """crop: 'center' keeps the middle square; 'fit' keeps everything and adds black bars."""
        self.crop, self.layout, self.graph = crop, None, None

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
        else:
            scale = SIZE / max(wide, high)
            size = (max(1, round(wide * scale)), max(1, round(high * scale)))
        # area: each pixel is the mean of what it covers. out_range=pc: white is 255, black is 0.
        nodes += [graph.add("scale", f"{size[0]}:{size[1]}:flags=area:out_range=pc"),
                  graph.add("format", "pix_fmts=gray"), graph.add("buffersink")]
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
        # A phone held upright records sideways and notes the angle, here in degrees
        # counterclockwise. The square is centred, so turning it last gives the same picture.
        return np.rot90(square, round(frame.rotation / 90))


@contextlib.contextmanager
def opened_video(path):
    """Yield (container, video stream) of a file. Raises UserError if it holds no video."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}; check the name")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; choose a video file")
    with open(path, "rb") as file:  # a file object: a name is never taken for a URL or a pattern
        try:
            container = av.open(file)
        except av.error.FFmpegError as error:
            raise UserError(f"cannot read {path} as video ({error.strerror}); "
                            "choose a file that FFmpeg can play") from None
        with container:
            if not container.streams.video:
                raise UserError(f"{path} has no picture, only sound or data; choose a video file")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"     # decode on several cores
            yield container, stream


def decoded_frames(container, stream, faults):
    """Yield every frame that can be decoded. Broken packets are skipped and counted in faults."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError:                # the container itself breaks off here
            faults["broken packet(s)"] += 1
            packet = None
        if packet is None:
            return
        try:
            yield from packet.decode()
        except av.error.FFmpegError:
            faults["broken packet(s)"] += 1


def timed_frames(path, container, stream, faults):
    """Yield (time, duration, frame), exact Fractions of a second, times strictly increasing.

    A frame without a time stamp is taken to follow its predecessor by 1 / average rate. A frame
    whose time does not come after its predecessor's is skipped and counted in faults.
    Raises UserError for a gap of over an hour: such time stamps are broken.
    """
    period = 1 / Fraction(stream.average_rate or SOURCE_FPS)
    last = None
    for frame in decoded_frames(container, stream, faults):
        if frame.pts is not None:
            now = frame.pts * Fraction(frame.time_base)
        else:
            now = last + period if last is not None else Fraction(0)
        if last is not None and now <= last:
            faults["frame(s) whose time runs backwards"] += 1
            continue
        if last is not None and now - last > 3600:
            raise UserError(f"{path} has a gap of over an hour after {float(last):.1f} s; "
                            "its time stamps are broken: convert it with FFmpeg first")
        last = now
        duration = (frame.duration or 0) * Fraction(frame.time_base or 0)
        yield now, duration if duration > 0 else period, frame


class Clip:
    """One file on the 30 FPS clock."""

    def __init__(self, path, base):
        """base: the index in the spool (see read_clip) of the file's first frame."""
        self.path, self.base = path, base
        self.first = []             # first[i]: the tick on which frame i appears
        self.ticks = 0              # length: the last frame stays until here
        self.histogram = np.zeros(256, dtype=np.int64)      # of grey levels, over all ticks
        self.level = None           # the threshold, where it is one number

    def source_frames(self, window):
        """The spool indices of the frames which the 48 ticks of a window show: (48,) int."""
        ticks = np.arange(window * WINDOW, (window + 1) * WINDOW)
        return self.base + np.searchsorted(self.first, ticks, side="right") - 1


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


def read_clip(path, base, spool, crop, start, end):
    """Decode one file onto the clock, from start (s) to end (s, or None). Returns a Clip.

    Each source frame that shows on some tick is appended to the binary file `spool` as 64x64
    bytes, once. (The threshold is known only at the end of the file, and hours of grey frames do
    not belong in memory.) Raises UserError if nothing can be decoded.
    """
    clip, faults, shrink = Clip(Path(path), base), Counter(), Shrinker(crop)
    with opened_video(path) as (container, stream):
        progress = Progress(clip.path.name, (container.duration or 0) / 1e6)      # in seconds
        timed = timed_frames(path, container, stream, faults)
        for tick, until, frame in frames_on_clock(timed, start, end):
            grey = shrink(frame, Fraction(stream.sample_aspect_ratio or 1))
            spool.write(grey.tobytes())
            clip.first.append(tick)
            clip.ticks = until
            clip.histogram += (until - tick) * np.bincount(grey.ravel(), minlength=256)
            progress.update(until / SOURCE_FPS + float(start))
        progress.close()
    if clip.ticks == 0:
        where = f" after --start {float(start)} s" if start else ""
        raise UserError(f"{path} has no frame{where} that can be decoded; try another file or time")
    for fault, count in faults.items():
        warn(f"{path}: skipped {count} {fault}")
    return clip


# ---------------------------------------------------------------------------------------------
# 5. Black and white. One bit a pixel needs a border between dark and bright. Chosen anew for each
# frame it would wander, and still things would flicker; so Otsu's method chooses one for a whole
# video. Where the light differs across the picture, 'adaptive' compares each pixel with its
# neighbourhood instead: what is brighter than its surroundings becomes 1, and flat areas 0.
# ---------------------------------------------------------------------------------------------

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


def binarise(grey, level, invert):
    """Turn grey uint8 (n, 64, 64) into 0 and 1; level is a number, or None for adaptive."""
    if level is not None:
        bright = grey > level
    else:
        side = NEIGHBOURHOOD
        padded = np.pad(grey, ((0, 0), (side // 2, side // 2), (side // 2, side // 2)), "edge")
        # Sums over side x side squares as differences of running sums, down and then across.
        sums = np.pad(padded.astype(np.int32), ((0, 0), (1, 0), (1, 0))).cumsum(1).cumsum(2)
        sums = sums[:, side:] - sums[:, :-side]
        sums = sums[:, :, side:] - sums[:, :, :-side]                 # (n, 64, 64)
        bright = grey.astype(np.int32) * side ** 2 > sums + CONTRAST * side ** 2
    return (bright != invert).astype(np.uint8)


def threshold_level(threshold, histogram):
    """The number that 'otsu', 'adaptive' or an int stand for; None for adaptive."""
    if threshold == "adaptive":
        return None
    return otsu(histogram) if threshold == "otsu" else int(threshold)


def image_to_frame(path, threshold="otsu", crop="center", invert=False):
    """Read an image (or a video's first frame) as a model's frame: uint8 (64, 64) of 0 and 1.

    It takes the same way as a video does. Raises UserError if it is missing or no image.
    """
    with opened_video(path) as (container, stream):
        frame = next(decoded_frames(container, stream, Counter()), None)
        if frame is None:
            raise UserError(f"{path} holds no picture that can be decoded; choose another image")
        grey = Shrinker(crop)(frame, Fraction(stream.sample_aspect_ratio or 1))
    level = threshold_level(threshold, np.bincount(grey.ravel(), minlength=256))
    return binarise(grey[None], level, invert)[0]


# ---------------------------------------------------------------------------------------------
# 6. From video to data. All that is left is to join the pieces: read every file into the spool,
# cut windows, deal them out, and look up each window's frames.
# ---------------------------------------------------------------------------------------------


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
            raise UserError("the video is too short or too still to share no frame between train, "
                            "val and test; use a longer one")
        clip, number = dealt[name][0]
        begin = clip.source_frames(number)[0]
        left = [(clip, number) for clip, number in left[:-size]
                if clip.source_frames(number)[-1] < begin]
    return {name: dealt[name] for name in SPLITS}


def read_windows(windows, offsets, spool, invert):
    """Read the windows of one split from the spool. Returns the dict that save_dataset takes."""
    bits = np.empty((len(windows), STRIDE, FRAMES, SIZE, SIZE // 8), dtype=np.uint8)
    start = np.empty((len(windows), STRIDE), dtype=np.int64)
    for w, (clip, number) in enumerate(windows):
        wanted = clip.source_frames(number)                           # (48,), never decreasing
        spool.seek(int(wanted[0]) * SIZE * SIZE)
        grey = spool.read(int(wanted[-1] - wanted[0] + 1) * SIZE * SIZE)
        grey = np.frombuffer(grey, np.uint8).reshape(-1, SIZE, SIZE)  # each source frame once
        frames = binarise(grey, clip.level, invert)[wanted - wanted[0]]         # (48, 64, 64)
        bits[w] = cut_window(np.packbits(frames, axis=-1))
        start[w] = offsets[clip.base] + number * WINDOW + np.arange(STRIDE)
    return {"bits": bits.reshape(-1, *bits.shape[2:]), "start": start.reshape(-1),
            "actions": None}


def warn_if_blank(splits):
    """Warn when nearly every pixel has one colour: such data teaches nothing."""
    share = unpack(splits["train"]["bits"][::10]).mean()              # every tenth sequence will do
    if not 0.02 <= share <= 0.98:
        warn(f"{100 * share:.1f} % of the pixels are white: look at it with the preview command, "
             "and try --threshold adaptive, or a number from 0 to 255, or --crop")


def write_video(paths, out, threshold="otsu", crop="center", invert=False, start=0, end=None,
                force=False):
    """Turn video files into a data file: the `video` command.

    start and end, in seconds from a file's first frame, apply to each file. Sequences never cross
    from one file to the next; the clocks of the files are laid end to end, and each one's offset
    stands in `meta`. Raises UserError for what the user can mend.
    """
    out = check_output(out, (".npz",), force)
    start = Fraction(start)
    end = None if end is None else Fraction(end)
    if start < 0:
        raise UserError("--start must not be negative")
    if end is not None and end <= start:
        raise UserError("--end must be later than --start")
    for path in paths:                      # all of them, before an hour goes into the first
        with opened_video(path):
            pass
    windows, sources, offsets, ticks = [], [], {}, 0
    with tempfile.TemporaryFile(dir=nearest_folder(out)) as spool:    # vanishes when closed
        for path in paths:
            clip = read_clip(path, spool.tell() // SIZE ** 2, spool, crop, start, end)
            clip.level = threshold_level(threshold, clip.histogram)
            sources.append({"name": clip.path.name, "offset": ticks, "ticks": clip.ticks,
                            "level": clip.level})
            if clip.ticks < WINDOW:
                warn(f"{path} is shorter than one window of {WINDOW / SOURCE_FPS} s: not used")
            windows += [(clip, number) for number in range(clip.ticks // WINDOW)]
            offsets[clip.base] = ticks
            ticks += clip.ticks
        splits = {name: read_windows(part, offsets, spool, invert)
                  for name, part in deal_windows(windows).items()}
    warn_if_blank(splits)
    save_dataset(out, splits, {"sources": sources, "threshold": threshold, "crop": crop,
                               "invert": invert, "start": float(start),
                               "end": None if end is None else float(end)})


# ---------------------------------------------------------------------------------------------
# 7. Looking and playing. The first thing to do with any data is to look at it: a bad threshold,
# a sideways video or a still one shows at once, and would otherwise cost a day of training. The
# same tools draw what a model makes of it: sheets, curves, animations, and a window to play in.
# ---------------------------------------------------------------------------------------------


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


def screen():
    """matplotlib's pyplot, where it can open a window. Raises UserError where it can open none."""
    try:
        import matplotlib.pyplot as plt                  # slow to import: only here
        backend = plt.get_backend().lower()
    except (ImportError, ValueError) as error:           # a backend that is not there
        raise UserError(f"matplotlib cannot open a window ({error}); unset MPLBACKEND, or"
                        " pip install tornado and set it to WebAgg") from None
    if backend in ("agg", "cairo", "pdf", "pgf", "ps", "svg", "template"):
        raise UserError("there is no display to play on; MPLBACKEND=WebAgg python genie_mini.py"
                        " play plays in a browser (pip install tornado), --actions 0,1 --out"
                        " roll.gif saves a GIF")
    return plt


class Window:
    """A dream in a matplotlib window: a timer moves it on, and keys choose which way.

    In a row under the picture stand the frames that the buttons would lead to: one batch, which
    shares the past, and only a sketch (a single MaskGIT pass): it must not slow the game.
    """

    KEEP = 1200                                 # frames kept for S: two minutes at 10 FPS
    HELP = "arrows, space, digits: press a button   R: restart elsewhere   S: save a GIF   Q: quit"

    def __init__(self, genie, firsts, arrows, generator):
        """Begin at the first of firsts (n, 64, 64); R goes on to the next.

        arrows: which button "up", "down", "left", "right" and " " press. generator: what is random.
        """
        import matplotlib.pyplot as plt
        self.genie, self.firsts, self.arrows, self.generator = genie, firsts, arrows, generator
        self.buttons = list(range(genie.config.num_actions))
        self.keys = {**{str(a): a for a in self.buttons}, **arrows}
        self.turn, self.close = -1, lambda: plt.close(self.figure)
        self.figure = plt.figure("genie_mini", figsize=(7, 8))
        canvas = self.figure.canvas
        canvas.mpl_disconnect(canvas.manager.key_press_handler_id)      # S, Q and R are ours
        canvas.mpl_connect("key_press_event", self.on_key)
        canvas.mpl_connect("key_release_event", self.on_release)
        canvas.mpl_connect("close_event", lambda _: self.timer.stop())
        self.timer = canvas.new_timer(interval=100)      # ms: 10 FPS, as in the video
        self.timer.add_callback(self.tick)
        self.restart()
        self.lay_out()
        self.timer.start()

    def restart(self):
        """Begin anew, at the next first frame."""
        self.turn = (self.turn + 1) % len(self.firsts)
        self.frame = self.firsts[self.turn].cpu().numpy()               # (64, 64)
        self.film = deque([np.packbits(self.frame, axis=-1)], maxlen=self.KEEP)
        self.state = self.genie.start(self.firsts[self.turn])
        self.pressed, self.held, self.released = deque(maxlen=30), None, False
        self.last, self.speed, self.note = time.monotonic(), 0.0, ""
        self.look_ahead()

    def look_ahead(self):
        """Sketch the frames (num_actions, 64, 64) that the buttons would lead to."""
        many = self.state.copies(len(self.buttons))
        self.futures = self.genie.sketch(many, self.buttons, self.generator).cpu().numpy()

    def tick(self):
        """One frame on: by the button that is held, or by the one that moves things least."""
        action = self.arrows[" "] if self.held is None else self.held
        if self.released:                                # a short tap counts for one frame
            self.held, self.released = None, False
        frame, self.state = self.genie.step(self.state, action, self.generator)
        self.frame = frame[0].cpu().numpy()
        self.film.append(np.packbits(self.frame, axis=-1))
        self.pressed.append(action)
        self.look_ahead()
        now = time.monotonic()
        rate = 1 / max(1e-6, now - self.last)
        self.last, self.speed = now, 0.9 * self.speed + 0.1 * rate if self.speed else rate
        self.draw()

    def picture(self):
        """The frame, enlarged to the width of all the futures in a row; and these under it."""
        n = len(self.buttons)
        large = np.pad(self.frame.repeat(n, 0).repeat(n, 1) * 255, ((0, 2), (n, n)))
        return np.concatenate([large, beside(list(self.futures * 255))])

    def lay_out(self):
        """Make the artists; draw() then only changes what they show."""
        axes, n = self.figure.add_axes((0.02, 0.13, 0.96, 0.82)), len(self.buttons)
        axes.set_axis_off()
        self.image = axes.imshow(in_colour(self.picture()), interpolation="nearest")
        signs = {"up": "↑", "down": "↓", "left": "←", "right": "→", " ": "space"}
        for a in range(n):
            names = [str(a)] + [signs[key] for key, action in self.arrows.items() if action == a]
            axes.text(66 * a + 32, 64 * n + 72, "\n".join(names), ha="center", va="top")
        self.title = self.figure.text(0.02, 0.96, "")
        self.history = self.figure.text(0.02, 0.04, "")
        self.figure.text(0.02, 0.01, self.HELP)
        self.draw()

    def draw(self):
        self.image.set_data(in_colour(self.picture()))
        self.title.set_text(f"{self.speed:.1f} frames a second   {self.note}")
        self.history.set_text("pressed: " + " ".join(map(str, self.pressed)))
        self.figure.canvas.draw_idle()

    def on_key(self, event):
        key = (event.key or "").lower()
        if key in self.keys:
            self.held, self.released = self.keys[key], False
        elif key in ("r", "s", "q"):
            {"r": self.restart, "s": self.save, "q": self.close}[key]()

    def on_release(self, event):
        if self.keys.get((event.key or "").lower()) == self.held:
            self.released = True                         # the next tick still sees it

    def save(self):
        """Write what was played as dream-1.gif, or the next number that is free."""
        path = next(p for n in itertools.count(1) if not (p := Path(f"dream-{n}.gif")).exists())
        try:
            save_gif(np.unpackbits(np.stack(self.film), axis=-1), path)
            self.note = f"saved {path}"
        except (UserError, OSError) as error:            # the dream goes on
            self.note = f"not saved: {error}"


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
              "actions: perplexity": ("world", "perplexity", "linear")}
    for axes, (title, (stage, name, scale)) in zip(figure.subplots(1, 4), panels.items()):
        points = [(row["step"], row[name]) for row in rows if row["stage"] == stage and name in row]
        axes.set(title=title, xlabel="step", yscale=scale if points else "linear")
        axes.plot([step for step, _ in points], [value for _, value in points])
    with written_whole(path) as file:
        figure.savefig(file, dpi=100, format="png")


def write_preview(data, out, split="train", count=8, force=False):
    """Draw sequences spread evenly over a split: the `preview` command. .png or .gif."""
    out = check_output(out, (".png", ".gif"), force)
    if not 1 <= count <= 200:
        raise UserError("--count must be from 1 to 200")
    loaded = load_split(data, split)
    # Evenly spread, and without repeats where there are fewer than count.
    chosen = np.unique(np.linspace(0, len(loaded["bits"]) - 1, count).round().astype(int))
    pixels = unpack(loaded["bits"][chosen])                           # (n, 16, 64, 64)
    if out.suffix.lower() == ".gif":
        save_gif(beside(list(pixels * 255)), out, scale=2)
    else:
        save_sheet(pixels, loaded["start"][chosen], out)
    print(f"wrote {out}: {len(chosen)} sequences of {split}")


# ---------------------------------------------------------------------------------------------
# 8. The command line.
# ---------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line is one sentence that names the nearest right word.

    Set `commands` to the dict of its subparsers. genie_mini.py uses it too.
    """

    def error(self, message):
        raise UserError(f"{message}; see `{self.prog} --help`")

    def parse(self, argv):
        """Like parse_args; an unknown flag is answered with the most similar one."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            known = [flag for action in self.commands[args.command]._actions
                     for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            raise UserError(f"unknown argument {unknown[0]}: {hint}")
        return args


def finite_number(text):
    """Read a finite number for argparse, which makes a readable message of a ValueError."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def threshold(text):
    """Read --threshold for argparse: 'otsu', 'adaptive' or an int from 0 to 255."""
    if text in ("otsu", "adaptive"):
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
    video = commands.add_parser("video", help="convert video files", allow_abbrev=False)
    video.add_argument("files", nargs="+", metavar="FILE")
    video.add_argument("--threshold", type=threshold, default="otsu", help="otsu (default), "
                       "adaptive, or 0-255: pixels brighter than this become 1")
    video.add_argument("--invert", action="store_true", help="swap black and white")
    video.add_argument("--crop", choices=("center", "fit"), default="center",
                       help="keep the middle square (default), or all, with black bars")
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
            write_demo(args.out, args.minutes, args.seed, args.force)
        elif args.command == "video":
            write_video(args.files, args.out, args.threshold, args.crop, args.invert,
                        args.start, args.end, args.force)
        else:
            write_preview(args.data, args.out, args.split, args.count, args.force)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, av.error.FFmpegError) as error:        # a full disk, a file without permission
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")    # a path may hold letters that the terminal lacks
    sys.exit(main())
