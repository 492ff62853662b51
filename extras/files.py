"""Files, written whole or not at all and read with care; and what both programs need as programs:
errors, progress, signals and the command line.

A tool that fails halfway must not leave half a file behind, and must not destroy last week's data.
So every file is written under a temporary name next to its final place, and moved there in one step
(os.replace) only once it is complete. Reading is careful in the same spirit: the header of each
array is checked before any memory is set aside for it.
"""

import argparse
import contextlib
import difflib
import json
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np

SIZE = 64                           # a frame is SIZE x SIZE pixels
SOURCE_FPS = 30                     # the clock that every video is put on
STRIDE = 3                          # 30 FPS / 3 = the 10 FPS which the model sees
FRAMES = 16                         # frames in a sequence
WINDOW = STRIDE * FRAMES            # 48 ticks of the clock hold three staggered sequences
SPLITS = ("train", "val", "test")   # also their order in time
VERSION = 1                         # of the data file; raise it when the format changes


class UserError(Exception):
    """A mistake of the user's, told in one sentence: what is wrong and what to do about it."""


def warn(text):
    """Print a warning to stderr: something is odd, but the work goes on."""
    print(f"warning: {text}", file=sys.stderr)


def run(main):
    """Run main as a program, and exit with the status that it returns."""
    out = sys.stdout
    if hasattr(out, "reconfigure"):             # not so in a notebook, by %run
        out.reconfigure(errors="replace")       # a path may hold letters that the terminal lacks

    def outliving(method):
        """When the reader of our output has gone (`| head -1`), its rest is lost, and no work."""
        def call(*args):
            try:
                return method(*args)
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        return call
    out.write, out.flush = outliving(out.write), outliving(out.flush)
    status = main()
    out.flush()
    sys.exit(status)


JOIN_PICTURES = "make one of numbered pictures: ffmpeg -framerate N -i 'name%04d.png' clip.mp4"


def check_input(path):
    """Return path as a Path if it is a file with something in it, or else raise a UserError that
    says what it is."""
    path, name = Path(path), str(path)
    if path.is_file() and path.stat().st_size:
        return path
    raise UserError(next(answer for case, answer in (
        (path.is_file(), f"{name} is empty; choose a video file"),
        (path.is_dir(), f"{name} is a folder; name the videos in it, or {JOIN_PICTURES}"),
        (path.exists(), f"{name} is a pipe or a device; save what comes from it in a file first"),
        (name == "-", "standard input is not read; save the video in a file first"),
        ("://" in name, f"{name} is an address; download the video first"),
        (set("*?[") & set(name), f"no file matches {name}; check the pattern"),
        (True, f"there is no file {name}; check the name")) if case))


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
    path = Path(os.path.realpath(path))     # of a link, the file that it leads to
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


def read_array(archive, name, dtype=None, tail=()):
    """Read one array of an open .npz: of dtype and of shape (S, *tail), or, without dtype, a text.

    A damaged or hostile header could claim a petabyte, and np.load would try to reserve it. The
    header is a few bytes of text at the entry's beginning, so it is read and judged on its own.
    Raises UserError when the array is absent, another one, or not as long as its header says.
    """
    try:
        entry = archive.getinfo(name + ".npy")
    except KeyError:
        raise UserError(f"it has no array named '{name}'") from None
    with archive.open(entry) as file:
        np.lib.format.read_magic(file)
        shape, fortran, found = np.lib.format.read_array_header_1_0(file)
        if dtype is None:
            right = shape == () and found.kind == "U" and found.itemsize <= 1 << 20
        else:
            right = found == dtype and shape[:1] > (0,) and shape[1:] == tail and not fortran
        if not right:
            raise UserError(f"'{name}' holds {found} of shape {shape}, which is not expected there")
        data = bytearray(math.prod(shape) * found.itemsize) if (
            entry.file_size == file.tell() + math.prod(shape) * found.itemsize) else b""
        if not data or file.readinto(data) != len(data):    # in place: it costs its own size, once
            raise UserError(f"'{name}' is not as long as its header says")
    return np.frombuffer(data, found).reshape(shape)


def read_meta(archive):
    """Read the JSON text `meta` of an open .npz into a dict. Raises UserError when it is wrong."""
    meta = json.loads(str(read_array(archive, "meta")))
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


def first_source(path):
    """The name of a data file's first source, such as "demo world"; None where it names none."""
    try:
        return load_meta(path)["sources"][0]["name"]
    except (KeyError, IndexError, TypeError):
        return None


def load_split(path, split):
    """Load one split ('train', 'val' or 'test') of a data file.

    Returns a dict: bits uint8 (S, 16, 64, 8), 8 pixels a byte, see unpack(); start int64 (S,), the
    30 FPS tick of each sequence's first frame; actions uint8 (S, 15), or None where not known; grey
    uint8 (n, 16, 64, 64), how n sequences evenly spread looked before they were black and white.
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
        grey = np.empty((0, FRAMES, SIZE, SIZE), np.uint8)
        if split + "_grey.npy" in archive.namelist():
            grey = read_array(archive, split + "_grey", np.uint8, (FRAMES, SIZE, SIZE))
    return {"bits": bits, "start": start, "actions": actions, "grey": grey}


def evenly(total, count):
    """Which of `total` things to look at: at most `count`, evenly spread, each once."""
    return np.unique(np.linspace(0, total - 1, count).round().astype(int))


def unpack(bits):
    """Turn packed bits (..., 64, 8) into pixels (..., 64, 64), uint8 0 or 1."""
    return np.unpackbits(bits, axis=-1)


def save_dataset(path, splits, meta):
    """Write the data file. splits: name -> dict of bits, start, actions or None, perhaps grey."""
    arrays = {}
    for name, split in splits.items():
        arrays[name] = split["bits"]
        arrays[name + "_start"] = split["start"]
        if split["actions"] is not None:
            arrays[name + "_actions"] = split["actions"]
        if "grey" in split:
            arrays[name + "_grey"] = split["grey"]
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


def sweep(out):
    """Remove what a killed run was writing, and nothing that another program made."""
    ours = r"\.(checkpoint\.safetensors|metrics\.csv|eval\.json|\w+\.png)\.\d+\.tmp"
    for half in out.iterdir():
        if re.fullmatch(ours, half.name):
            half.unlink()


@contextlib.contextmanager
def stopped_by_signals(trainer):
    """Within, Ctrl-C and SIGTERM let the trainer finish its step and save; after, they just end the
    program. A thread of somebody's program gets no signals, and may set none."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda n, _: setattr(trainer, "stop", n))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line is one sentence that names the nearest right word.

    Set `commands` to the dict of its subparsers.
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
