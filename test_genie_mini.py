"""The tests of data_prep.py (first half) and genie_mini.py (second half).

How to run them, from the folder of this file; all are offline, on the CPU, and the same each time:

    python -m pytest -q test_genie_mini.py                 everything, a minute or two
    python -m pytest -q test_genie_mini.py -k leak         only the tests whose name has "leak"
    python -m pytest -q -m attention                       only those that grade one part: patchify,
        attention, quantizer, straight_through, mask, maskgit, delta_psnr
    python -m pytest -q -m notebooks                       run every notebook, some minutes; needs
        pip install nbclient ipykernel

How to read them: each docstring says what it means when the test fails. The tests of the model take
the module they test as an argument, `gm`; left alone it is genie_mini. The section "Planted bugs"
uses that: it breaks a copy of genie_mini.py in one place (the action off by one frame, the causal
mask dropped ...) and demands that the test which guards the place fails on it. So those tests are
known to be able to fail. If you change genie_mini.py and a planted bug's text is no longer there,
write the bug anew for the new text.
"""

import base64
import inspect
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import tracemalloc
import types
import wave
import zipfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from av.stream import Disposition
from PIL import Image
from torch import nn

import data_prep as dp
import genie_mini
from extras import bench, checkpoints, files, pictures, ranks, worlds
from extras import window as window_module

# --- helpers: videos whose every frame carries its own number --------------------------------


def numbered(number, wide=64, high=64):
    """A grey picture of a number: 8x8 blocks, 32 bits of it and then the 32 bits inverted."""
    bits = np.array([number >> i & 1 for i in range(32)], dtype=np.uint8)
    blocks = np.concatenate([bits, 1 - bits]).reshape(8, 8)
    return blocks.repeat(high // 8, 0).repeat(wide // 8, 1) * 255


def read_number(frame):
    """Read the number from a 64x64 frame of 0 and 1; every pixel must be right."""
    bits = frame[4::8, 4::8].reshape(-1)[:32].astype(int)
    number = int((bits << np.arange(32)).sum())
    assert (frame * 255 == numbered(number)).all(), "the frame is not a clean picture of a number"
    return number


def encode(path, pictures, times, rate=30, codec="libx264", time_base=Fraction(1, 90000)):
    """Encode grey pictures (H, W) at exact presentation times (s)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = pictures[0].shape
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = time_base
        if codec == "libx264":
            stream.options = {"preset": "ultrafast", "crf": "8", "bf": "2"}
            stream.codec_context.thread_count = 1       # the same bytes whatever the machine
        for picture, now in zip(pictures, times):
            frame = av.VideoFrame.from_ndarray(picture.repeat(3).reshape(*picture.shape, 3))
            frame.pts, frame.time_base = round(now / time_base), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbered_video(path, times, rate=30, **options):
    """Encode a video whose frame i, shown from times[i] (s) on, is a picture of i."""
    return encode(path, [numbered(i, 128, 128) for i in range(len(times))], times, rate, **options)


def steady(rate, length):
    """The times of the frames of a video of `length` s at a steady rate."""
    return [i / Fraction(rate) for i in range(int(length * rate))]


def numbers_by_split(path):
    """Return {split: (start (S,), numbers (S, 16))} of a data file made from a numbered video."""
    result = {}
    for split in files.SPLITS:
        loaded = files.load_split(path, split)
        frames = files.unpack(loaded["bits"]).reshape(-1, 64, 64)
        numbers = np.array([read_number(frame) for frame in frames]).reshape(-1, 16)
        result[split] = loaded["start"], numbers
    return result


def shown_at(times, tick):
    """What a 30 FPS clock must show: the latest frame at or before tick / 30 s. Written apart."""
    return max(i for i, now in enumerate(times) if float(now - times[0]) <= tick / 30 + 0.001001)


@pytest.fixture(scope="module")
def demo_file(tmp_path_factory):
    """One minute of the demo world: 37 windows, 111 sequences."""
    path = tmp_path_factory.mktemp("demo") / "demo.npz"
    assert dp.main(["demo", "-o", str(path), "--minutes", "1"]) == 0
    return path


# --- the demo world --------------------------------------------------------------------------


def find(frame, drawing):
    """All places (y, x) where an 8x8 drawing stands in a frame, by comparing every place."""
    views = np.lib.stride_tricks.sliding_window_view(frame, (8, 8))
    return np.argwhere((views == drawing).all(axis=(2, 3)))


def test_demo_is_deterministic():
    """Failing means that a seed no longer fixes the data: nobody could repeat a result."""
    first, again, other = (worlds.render_demo(12, seed) for seed in (5, 5, 6))
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all()
    assert (first[0] != other[0]).any()


def test_demo_shows_one_hero_and_one_fish(demo_file):
    """Failing means that a sprite is hidden, doubled, or looks like another thing on screen."""
    bits = files.load_split(demo_file, "train")["bits"][::4]
    for frame in files.unpack(bits).reshape(-1, 64, 64):
        assert len(find(frame, worlds.HERO)) == 1
        assert len(find(frame, worlds.FISH_RIGHT)) + len(find(frame, worlds.FISH_LEFT)) == 1


def test_demo_detectors():
    """Failing means that the share of frames with exactly one hero is counted wrongly, or that a
    dream is blamed for walls which were never there."""
    world = worlds.DemoWorld(3)
    for _ in range(60):
        frame = world.frame()
        assert worlds.count_heroes(frame) == 1
        assert (worlds.demo_walls(frame) == world.background).all()
        world.step(int(world.rng.integers(5)))
    blank = np.zeros((2, 64, 64), dtype=np.uint8)
    blank[1, 5:13, 7:15] = blank[1, 30:38, 40:48] = worlds.HERO
    assert worlds.count_heroes(blank).tolist() == [0, 2]
    blank[1, 5, 8:12] ^= 1                                              # 4 pixels, and then 5
    assert worlds.count_heroes(blank).tolist() == [0, 2]
    blank[1, 6, 8] ^= 1
    assert worlds.count_heroes(blank).tolist() == [0, 1]


def test_demo_actions_are_what_the_hero_does(demo_file):
    """Failing means the labels lie: accuracy measured against them would mean nothing.

    The hero is found in the pixels of all three offsets: a step of one patch must be labelled with
    its direction, and no step with 'stay'. There is nothing else.
    """
    split = files.load_split(demo_file, "train")
    moves = 4 * np.array([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)])
    for bits, actions in zip(split["bits"], split["actions"]):
        places = np.array([find(frame, worlds.HERO)[0] for frame in files.unpack(bits)])   # (16, 2)
        assert (np.diff(places, axis=0) == moves[actions]).all()
    assert set(np.unique(split["actions"])) == set(range(5))


def test_demo_bodies_keep_out_of_walls_and_of_each_other():
    """Failing means that hero or fish stands in a wall or in the other, or moves in leaps: then a
    press has no rule to learn. The fish must turn when it cannot go on, and do so alone."""
    world = worlds.DemoWorld(5)
    places, turns = [], 0
    for tick in range(worlds.LEVEL - 3):
        if tick % 24 == 0:
            key = int(world.rng.integers(5))
        world.step(key)
        for y, x in (world.hero, world.fish):
            assert not world.background[4 * y:4 * y + 8, 4 * x:4 * x + 8].any()
        assert max(abs(world.hero[i] - world.fish[i]) for i in (0, 1)) >= 2
        places.append((*world.hero, *world.fish, world.fish_dx))
    for before, after in zip(places, places[1:]):
        hero, fish = (abs(np.subtract(after, before)[part]).sum() for part in
                      (slice(0, 2), slice(2, 4)))
        turned = before[4] != after[4]
        assert hero <= 1 and fish <= 1 - turned and before[2] == after[2]
        turns += turned
    moved = [before != after for before, after in zip(places, places[1:])]
    assert [i % 3 for i, there in enumerate(moved) if there] == [0] * sum(moved), "each third tick"
    assert turns > 5


def test_demo_player_seeks_the_fish_and_seldom_rests():
    """Failing means that hero and fish seldom meet in the video, or that he often stands still
    without being blocked: then a dream breaks where they meet, or where a wall is in the way."""
    world = worlds.DemoWorld(0)
    blocked = dict(hero=(1, 1), fish=(1, 3), free=np.zeros((15, 15), bool))
    any_way = 0.65 / 4
    for places, share in (
            (dict(hero=(7, 2), fish=(9, 9)), {0: 0.05, 4: 0.3 + any_way, 1: any_way}),
            (dict(hero=(7, 2), fish=(1, 3)), {0: 0.05, 1: 0.3 + any_way, 2: any_way}),
            (blocked, {0: 1, 1: 0, 2: 0, 3: 0, 4: 0})):
        world.free = np.ones((15, 15), bool)
        vars(world).update(places)
        keys = np.bincount([world.choose_key() for _ in range(4000)], minlength=5) / 4000
        for key, wanted in share.items():
            assert abs(keys[key] - wanted) < 0.03, (places, key)


def test_demo_label_is_the_majority_and_the_last_on_a_tie():
    """Failing means that transitions are labelled by another rule, or one frame too late."""
    effects = [0] * 48
    effects[3:6] = [1, 1, 2]                        # offset 0, transition 1: 1 in the majority
    effects[6:9] = [3, 4, 2]                        # offset 0, transition 2: a tie, so 2
    labels = dp.true_actions(effects)
    assert labels.shape == (3, 15) and labels.dtype == np.uint8
    assert labels[0, :4].tolist() == [0, 1, 2, 0]
    assert labels[1, :4].tolist() == [0, 3, 0, 0]   # effects 4, 5, 6 = 1, 2, 3 and 7, 8, 9
    assert labels[2, :4].tolist() == [1, 4, 0, 0]   # effects 2, 3, 4 = 0, 1, 1 and 5, 6, 7


def test_demo_walls_stand_still_within_a_window(demo_file):
    """Failing means that a level changes inside a sequence, which no model could foresee.

    Without hero and fish (blanked), all frames of a window must be the same picture.
    """
    bits = files.load_split(demo_file, "train")["bits"]
    for w in range(0, len(bits), 3):
        seen = set()
        for frame in files.unpack(bits[w:w + 3]).reshape(-1, 64, 64):
            for drawing in (worlds.HERO, worlds.FISH_RIGHT, worlds.FISH_LEFT):
                for y, x in find(frame, drawing):
                    frame[y:y + 8, x:x + 8] = 0
            seen.add(frame.tobytes())
        assert len(seen) == 1


def test_demo_has_few_patches(demo_file):
    """Failing means that there are more or fewer kinds of 4x4 patch than the 29 that are spoken of
    (32 codes can tell them all apart), or that two parts of the drawings look the same."""
    frames = files.unpack(files.load_split(demo_file, "train")["bits"])
    patches = frames.reshape(-1, 16, 4, 16, 4).swapaxes(2, 3).reshape(-1, 16)
    assert len(np.unique(np.packbits(patches, axis=1), axis=0)) == 29


def test_demo_hero_is_never_trapped():
    """Failing means that a level has a place that the hero can never reach or leave."""
    for seed in range(10):
        free = worlds.DemoWorld(seed).free
        spots = {tuple(spot) for spot in np.argwhere(free).tolist()}
        reached, todo = set(), [next(iter(spots))]
        while todo:
            y, x = todo.pop()
            if (y, x) in spots and (y, x) not in reached:
                reached.add((y, x))
                todo += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        assert reached == spots


def test_demo_gaps_are_wide():
    """Failing means that a wall leaves a gap of one or two patches, too narrow to play in."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        walls = worlds.random_walls(rng)
        for line in [*walls, *walls.T]:             # rows and columns, which begin with a wall
            floor = "".join("#" if wall else "." for wall in line).split("#")
            assert all(len(run) == 0 or len(run) >= 3 for run in floor)


@pytest.fixture(scope="module")
def ball_file(tmp_path_factory):
    """One minute of the ball world."""
    path = tmp_path_factory.mktemp("ball") / "ball.npz"
    assert dp.main(["demo", "--world", "ball", "-o", str(path), "--minutes", "1"]) == 0
    return path


def test_ball_needs_memory():
    """Failing means that a single frame tells where the ball flies, so that the world proves no
    memory; or that the ball leaves the hall, stops, or does not bounce."""
    left, right = worlds.BallWorld(0), worlds.BallWorld(0)
    left.at, left.speed = np.array([[30, 30]]), np.array([[2, -2]])
    right.at, right.speed = np.array([[30, 30]]), np.array([[2, 2]])
    assert (left.frame() == right.frame()).all()
    seen = []
    for _ in range(3 * 60):
        left.step(0)
        seen.append(left.at[0])
    moves = np.diff(np.array(seen)[2::3], axis=0)
    assert set(np.unique(moves)) == {-2, 2}, "two pixels a move, along both axes"
    assert np.min(seen) == 4 and np.max(seen) == 56, "from wall to wall"


def test_ball_detectors(ball_file):
    """Failing means that ball_on_course counts a ball that is not there, or misses one."""
    frames = files.unpack(files.load_split(ball_file, "train")["bits"][:20]).reshape(-1, 64, 64)
    places, seen = worlds.find_balls(frames)
    assert seen.mean() > 0.8 and worlds.is_ball_near(frames[seen], places[seen]).all()
    steps = np.diff(places.reshape(20, 16, 2), axis=1)[(seen.reshape(20, 16)[:, 1:]
                                                        & seen.reshape(20, 16)[:, :-1])]
    assert (np.abs(steps) == 2).all(), "it is the ball that is found"
    for (dy, dx), near in (((2, -2), True), ((3, 0), False), ((0, -3), False)):
        moved = np.clip(places[seen] + (dy, dx), 0, 60)
        found = worlds.is_ball_near(frames[seen], moved).mean()
        assert found == pytest.approx(float(near), abs=0.02)
    gone = frames[seen].copy()
    for frame, (y, x) in zip(gone, places[seen]):
        frame[y:y + 4, x:x + 4] = 0
    assert not worlds.is_ball_near(gone, places[seen]).any()
    assert (worlds.count_heroes(frames) == 1).all()


def test_ball_actions_are_what_the_hero_does(ball_file):
    """Failing means that the labels, by which a model's actions are judged, are wrong."""
    split = files.load_split(ball_file, "test")
    for clip, actions in zip(files.unpack(split["bits"]), split["actions"]):
        (places,) = zip(*[find(frame, worlds.HERO)[:1] for frame in clip])
        moves = np.diff(np.array(places), axis=0)
        assert (moves == 2 * np.array(worlds.MOVES)[actions]).all()


# --- windows and splits ----------------------------------------------------------------------


@pytest.mark.parametrize("windows, sizes", [(2250, (2000, 150, 100)), (4500, (4000, 300, 200)),
                                            (3, (1, 1, 1)), (100, (89, 7, 4))])
def test_split_sizes(windows, sizes):
    """Failing means that an hour no longer gives the card's 6,000 / 450 / 300 sequences."""
    assert tuple(dp.split_sizes(windows).values()) == sizes


def test_cut_window_is_three_staggered_sequences():
    """Failing means that sequences do not run at 10 FPS, or that offsets are mixed up."""
    cut = dp.cut_window(np.arange(48))
    assert cut.tolist() == [list(range(o, 48, 3)) for o in range(3)]


# --- video to sequences ----------------------------------------------------------------------


IRREGULAR = np.cumsum([0] + [Fraction(int(n), 600) for n in
                             np.random.default_rng(1).integers(3, 60, size=170)]).tolist()


@pytest.mark.parametrize("name, times, rate, options", [
    ("25.mp4", steady(25, 8), 25, {}),
    ("30.mp4", steady(30, 8), 30, {}),
    ("60.mp4", steady(60, 8), 60, {}),
    ("ntsc.mp4", steady(Fraction(30000, 1001), 8), Fraction(30000, 1001), {}),
    ("millisecond.mkv", steady(30, 8), 30, {"time_base": Fraction(1, 1000)}),
    ("irregular.mp4", IRREGULAR, 30, {}),
])
def test_video_shows_the_right_frame_at_every_tick(tmp_path, name, times, rate, options):
    """Failing means that time is wrong: motion would be too fast, too slow or uneven.

    Each frame carries its number; which number must show at which tick is computed anew here.
    """
    video = numbered_video(tmp_path / name, times, rate, **options)
    out = tmp_path / "out.npz"
    assert dp.main(["video", str(video), "-o", str(out)]) == 0
    starts = []
    for start, numbers in numbers_by_split(out).values():
        starts += start.tolist()
        for first, row in zip(start, numbers):
            assert row.tolist() == [shown_at(times, int(first) + 3 * t) for t in range(16)]
    ticks = np.ceil(float(times[-1] + 1 / Fraction(rate)) * 30 - 0.04)
    whole = [48 * w + o for w in range(int(ticks) // 48) for o in range(3)]
    # Where a frame lies across the border of two splits, the window before it is left out.
    lost = len(whole) - len(starts)
    assert set(starts) <= set(whole) and lost in ((0, 3, 6) if times is IRREGULAR else (0,))


@pytest.mark.parametrize("rate", [4, 7, 25])
def test_no_source_frame_is_in_two_splits(tmp_path, rate):
    """Failing means that the test set contains pictures from training: scores would flatter.

    At 4 FPS a frame stays for 7.5 ticks and lies across the border between two windows.
    """
    video = numbered_video(tmp_path / "slow.mp4", steady(rate, 20), rate)
    out = tmp_path / "out.npz"
    assert dp.main(["video", str(video), "-o", str(out)]) == 0
    splits = numbers_by_split(out)
    seen = [set(numbers.ravel()) for _, numbers in splits.values()]
    assert not (seen[0] & seen[1] or seen[1] & seen[2] or seen[0] & seen[2])
    last = [starts[-1] for starts, _ in splits.values()]
    first = [starts[0] for starts, _ in splits.values()]
    assert last[0] < first[1] and last[1] < first[2], "the splits are not in order of time"
    if rate == 4:
        assert sum(len(starts) for starts, _ in splits.values()) < 3 * 12, "nothing was left out"


def test_a_still_picture_cannot_fill_two_splits(tmp_path, capsys):
    """Failing means that one frame, held for long, is both learnt from and tested on."""
    video = numbered_video(tmp_path / "still.mp4", [0, 7, 7.1], 30)
    assert dp.main(["video", str(video), "-o", str(tmp_path / "out.npz")]) == 2
    assert "too still" in capsys.readouterr().err


def test_start_and_end(tmp_path):
    """Failing means that --start and --end take another part of the video than they say."""
    times = steady(30, 9)
    video = numbered_video(tmp_path / "v.mp4", times)
    out = tmp_path / "out.npz"
    arguments = ["video", str(video), "-o", str(out), "--start", "2", "--end", "6.8"]
    assert dp.main(arguments) == 0
    splits = numbers_by_split(out)
    assert [len(start) for start, _ in splits.values()] == [3, 3, 3]
    assert splits["train"][1][0].tolist() == list(range(60, 108, 3))
    assert splits["test"][1][2].tolist() == list(range(60 + 98, 60 + 144, 3))


def test_a_frame_may_last_beyond_the_end(tmp_path):
    """Failing means that a frame held across --end is cut short, and the last windows lost."""
    times = steady(30, 5) + [8 + now for now in steady(30, 1)]
    video = numbered_video(tmp_path / "v.mkv", times, time_base=Fraction(1, 1000))
    out = tmp_path / "out.npz"
    assert dp.main(["video", str(video), "-o", str(out), "--end", "6.4"]) == 0
    assert files.load_meta(out)["sources"][0]["ticks"] == 192


def test_sequences_do_not_cross_files(tmp_path):
    """Failing means that a sequence jumps from one video into another."""
    a = numbered_video(tmp_path / "a.mp4", steady(30, 4))              # 120 ticks: 2 windows
    b = numbered_video(tmp_path / "b.mp4", steady(30, 6))              # 180 ticks: 3 windows
    out = tmp_path / "out.npz"
    assert dp.main(["video", str(a), str(b), "-o", str(out)]) == 0
    rows = [(int(start), row.tolist()) for starts, numbers in numbers_by_split(out).values()
            for start, row in zip(starts, numbers)]
    offsets = [48 * w for w in range(2)] + [120 + 48 * w for w in range(3)]
    assert [start for start, _ in rows] == [base + o for base in offsets for o in range(3)]
    for start, row in rows:
        assert row == list(range(start - 120 * (start >= 120), 9999, 3))[:16]
    meta = files.load_meta(out)
    assert [source["offset"] for source in meta["sources"]] == [0, 120]
    assert meta["counts"] == {"train": 9, "val": 3, "test": 3}


def turned(path, matrix):
    """Write a rotation into an MP4's track header, as a phone does: 9 numbers of 4 bytes."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44                   # past the type, version, times, id, layer ...
    data[at:at + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(data)


@pytest.mark.parametrize("quarter_turns, matrix", [
    (-1, (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)),
    (2, (-1 << 16, 0, 0, 0, -1 << 16, 0, 0, 0, 1 << 30)),
    (1, (0, -1 << 16, 0, 1 << 16, 0, 0, 0, 0, 1 << 30)),
])
def test_rotation_in_the_metadata_is_applied(tmp_path, quarter_turns, matrix):
    """Failing means that videos from phones come out lying on their side."""
    picture = numbered(0b1011, 128, 128)
    video = encode(tmp_path / "phone.mp4", [picture] * 30, steady(30, 1))
    turned(video, matrix)
    frame = dp.image_to_frame(video, {"threshold": 128})
    assert (frame == np.rot90(picture[::2, ::2] // 255, quarter_turns)).all()


ONE = 1 << 16
ORIENTATIONS = [                    # the number in EXIF; a, b, c, d; and what it does to a picture
    (1, (1, 0, 0, 1), lambda p: p), (2, (-1, 0, 0, 1), np.fliplr),
    (3, (-1, 0, 0, -1), lambda p: np.rot90(p, 2)), (4, (1, 0, 0, -1), np.flipud),
    (5, (0, 1, 1, 0), np.transpose), (6, (0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    (7, (0, -1, -1, 0), lambda p: np.rot90(p, 2).T), (8, (0, -1, 1, 0), np.rot90)]


@pytest.mark.parametrize("number, matrix, expected", ORIENTATIONS)
def test_mirrored_and_turned(tmp_path, number, matrix, expected):
    """Failing means that a selfie, or a photograph, comes out mirrored or upside down."""
    whole = numbered(0b1011, 128, 128)
    video = encode(tmp_path / "v.mp4", [whole] * 30, steady(30, 1))
    a, b, c, d = (ONE * value for value in matrix)
    turned(video, (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    photo, exif = Image.fromarray(whole), Image.Exif()
    exif[0x112] = number
    photo.save(tmp_path / "p.png", exif=exif)
    photo.save(tmp_path / "p.jpg", exif=exif, quality=98)
    for path in (video, tmp_path / "p.png", tmp_path / "p.jpg"):
        frame = dp.image_to_frame(path, {"threshold": 128})
        assert (frame == expected(whole[::2, ::2] // 255)).all(), path.suffix


@pytest.mark.parametrize("colour", [0, 255])
def test_a_figure_on_a_clear_ground_shows(tmp_path, colour):
    """Failing means that a sprite on a transparent ground comes out all black or all white."""
    sprite = np.full((64, 64, 4), 255 - colour, np.uint8)               # what hides under clear
    sprite[..., :3], sprite[..., 3] = colour, 0
    sprite[20:40, 10:30, 3] = 255
    for name in ("s.png", "s.gif"):
        Image.fromarray(sprite).save(tmp_path / name)
        frame = dp.image_to_frame(tmp_path / name, {"threshold": 128})
        figure = np.zeros((64, 64))
        figure[20:40, 10:30] = 1
        assert (frame == (figure if colour else 1 - figure)).all(), name


def test_portrait_crop_and_fit(tmp_path):
    """Failing means that the picture is squeezed, off centre, or cut where it should be whole."""
    picture = np.zeros((256, 128), dtype=np.uint8)
    picture[64:192] = numbered(77, 128, 128)        # the middle square bears a number
    picture[:64] = 255                              # white above, black below
    video = encode(tmp_path / "portrait.mp4", [picture] * 30, steady(30, 1))
    assert read_number(dp.image_to_frame(video, {"threshold": 128, "crop": "center"})) == 77
    fitted = np.zeros((64, 64), dtype=np.uint8)
    fitted[:, 16:48] = picture[::4, ::4] // 255
    assert (dp.image_to_frame(video, {"threshold": 128, "crop": "fit"}) == fitted).all()


def test_white_is_white_and_black_is_black(tmp_path):
    """Failing means that the colour range is mixed up: black would be 16 and white 235."""
    picture = np.zeros((64, 64), dtype=np.uint8)
    picture[:, 32:] = 255
    video = encode(tmp_path / "v.mp4", [picture] * 30, steady(30, 1))
    for threshold in (5, 250):
        assert (dp.image_to_frame(video, {"threshold": threshold}) == picture // 255).all()
    inverted = dp.image_to_frame(video, {"threshold": 128, "invert": True})
    assert (inverted == 1 - picture // 255).all()


def test_otsu_finds_the_gap():
    """Failing means that the automatic threshold splits a clear picture in the wrong place."""
    histogram = np.zeros(256, dtype=np.int64)
    histogram[[20, 30, 180, 200]] = 50, 60, 5, 9
    assert 30 <= dp.otsu(histogram) < 180
    flat = np.zeros(256, dtype=np.int64)
    flat[255] = 1
    assert dp.otsu(flat) < 255                      # an all-white picture is white


def test_adaptive_sees_through_a_shadow():
    """Failing means that 'adaptive' is no better than one threshold where the light varies."""
    light = np.linspace(30, 180, 64)[None, :].repeat(64, 0)
    grey = light.copy()
    grey[10:14] += 40                               # a bright line across the shadow's edge
    result = dp.binarise(grey[None].astype(np.uint8), "adaptive")[0]
    assert result[10:14].all() and not result[30:].any()


def test_other_formats(tmp_path):
    """Failing means that GIF or WebM, or a source below 64 pixels, is no longer read."""
    frames = np.stack([numbered(i) for i in range(60)])
    pictures.save_gif(frames, tmp_path / "a.gif", scale=1, fps=10)           # 6 s
    assert dp.main(["video", str(tmp_path / "a.gif"), "-o", str(tmp_path / "gif.npz")]) == 0
    start, numbers = numbers_by_split(tmp_path / "gif.npz")["train"]
    assert numbers[0].tolist() == list(range(16)) and start[0] == 0
    webm = encode(tmp_path / "a.webm", [np.full((36, 50), 255 * (i % 2), np.uint8)
                                        for i in range(60)], steady(10, 6), 10, "libvpx-vp9",
                  Fraction(1, 1000))
    assert dp.main(["video", str(webm), "-o", str(tmp_path / "webm.npz")]) == 0
    frames = files.unpack(files.load_split(tmp_path / "webm.npz", "train")["bits"])
    assert (frames[0].mean(axis=(1, 2)).round() == np.arange(16) % 2).all()


def test_damage_in_the_middle_is_skipped(tmp_path, capsys):
    """Failing means that one broken spot makes a whole video unusable, or passes unmentioned."""
    video = numbered_video(tmp_path / "v.mkv", steady(30, 10), time_base=Fraction(1, 1000))
    data = bytearray(video.read_bytes())
    data[len(data) // 2:len(data) // 2 + 300] = bytes(300)
    video.write_bytes(data)
    assert dp.main(["video", str(video), "-o", str(tmp_path / "out.npz")]) == 0
    assert "warning" in capsys.readouterr().err


@pytest.mark.parametrize("size, codec", [((1, 1), "ffv1"), ((32, 7680), "libx264")])
def test_odd_sizes(tmp_path, size, codec):
    """Failing means that a very small or a very wide picture is refused, or comes out wrong."""
    pictures = [np.full(size, 255 * (i % 2), np.uint8) for i in range(8)]
    video = encode(tmp_path / "v.mkv", pictures, range(8), 1, codec, Fraction(1, 1000))
    assert dp.main(["video", str(video), "-o", str(tmp_path / "v.npz")]) == 0
    frames = files.unpack(files.load_split(tmp_path / "v.npz", "train")["bits"])
    assert frames[0, 0].max() == 0 and frames[0, 11].min() == 1         # at 0 s and at 1.1 s


def test_a_raw_stream_without_times(tmp_path):
    """Failing means that a raw stream, which holds no time stamps, is refused, or does not run at
    the 25 FPS that FFmpeg takes it to have."""
    numbered_video(tmp_path / "raw.h264", steady(25, 7), 25)
    assert dp.main(["video", str(tmp_path / "raw.h264"), "-o", str(tmp_path / "raw.npz")]) == 0
    for start, numbers in numbers_by_split(tmp_path / "raw.npz").values():
        assert (numbers == (start[:, None] + 3 * np.arange(16)) * 25 // 30).all()


def test_what_is_missing_is_told(tmp_path, capsys):
    """Failing means that half a video is used, or a gap filled with a still picture, unsaid."""
    video = numbered_video(tmp_path / "v.mkv", steady(30, 12), time_base=Fraction(1, 1000))
    whole = video.read_bytes()
    assert dp.main(["video", str(video), "-o", str(tmp_path / "a.npz")]) == 0
    assert "says it lasts" not in capsys.readouterr().err
    video.write_bytes(whole[:len(whole) * 6 // 10])
    assert dp.main(["video", str(video), "-o", str(tmp_path / "b.npz")]) == 0
    assert "says it lasts 12.0 s" in capsys.readouterr().err
    times = [*steady(30, 6), *(16 + now for now in steady(30, 4))]
    numbered_video(video, times, time_base=Fraction(1, 1000))
    assert dp.main(["video", str(video), "-o", str(tmp_path / "c.npz")]) == 0
    assert "up to 10.0 s" in capsys.readouterr().err


def test_the_moving_stream_is_taken(tmp_path, capsys):
    """Failing means that of a film with a cover picture the cover is used, or a song's cover."""
    def write(path, *streams):                      # (side in pixels, frames, disposition, codec)
        with av.open(str(path), "w") as container:
            made = []
            for side, _, disposition, codec in streams:
                made.append(container.add_stream(codec, rate=30))
                made[-1].width = made[-1].height = side
                made[-1].pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
                made[-1].disposition = disposition
            sound = container.add_stream("aac", rate=8000) if len(streams) == 1 else None
            for i in range(180):
                for stream, (side, count, _, _) in zip(made, streams):
                    if i < count:
                        frame = av.VideoFrame.from_ndarray(numbered(i, side, side), format="gray")
                        frame.pts, frame.time_base = i, Fraction(1, 30)
                        container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
            if sound:
                silence = np.zeros((1, 1024), np.float32)
                silence = av.AudioFrame.from_ndarray(silence, "fltp", "mono")
                silence.rate = 8000
                container.mux(sound.encode(silence))
            for stream in [*made, *([sound] if sound else [])]:
                container.mux(stream.encode())

    cover = Disposition.attached_pic
    write(tmp_path / "film.mkv", (256, 1, 0, "ffv1"), (64, 180, 0, "ffv1"))
    write(tmp_path / "film.mp4", (64, 180, 0, "mpeg4"), (256, 1, cover, "mjpeg"))
    write(tmp_path / "song.mp4", (256, 1, cover, "mjpeg"))
    for name in ("film.mkv", "film.mp4"):
        out = tmp_path / f"{name}.npz"
        assert dp.main(["video", str(tmp_path / name), "-o", str(out)]) == 0
        assert "2 video streams" in capsys.readouterr().err
        frames = files.unpack(files.load_split(out, "train")["bits"][0])
        assert [read_number(frame) for frame in frames] == list(range(0, 48, 3))
    assert dp.main(["video", str(tmp_path / "song.mp4"), "-o", str(tmp_path / "s.npz")]) == 2
    assert "only sound" in capsys.readouterr().err


def test_a_title_in_an_old_alphabet(tmp_path):
    """Failing means that a title which is not UTF-8 ends in a traceback."""
    video = tmp_path / "v.avi"
    with av.open(str(video), "w") as container:
        container.metadata["title"] = "CafXX"
        stream = container.add_stream("mpeg4", rate=30)
        stream.width = stream.height = 64
        for i in range(180):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(
                np.full((64, 64), i, np.uint8), format="gray").reformat(format="yuv420p")))
        container.mux(stream.encode())
    video.write_bytes(video.read_bytes().replace(b"CafXX", b"Caf\xe9 "))
    assert dp.main(["video", str(video), "-o", str(tmp_path / "v.npz")]) == 0


def test_times_may_begin_anywhere():
    """Failing means that a file which begins before 0, as after a cut, is put on a wrong clock."""
    for begin in (-2, 0, 7):
        timed = [(begin + Fraction(k, 30), Fraction(1, 30), k) for k in range(5)]
        shown = list(dp.frames_on_clock(timed, 0, None))
        assert shown == [(k, k + 1, k) for k in range(5)]


def test_blank_result_warns(tmp_path, capsys):
    """Failing means that someone may train for a day on an all-black video unwarned."""
    video = encode(tmp_path / "v.mp4", [np.zeros((64, 64), np.uint8)] * 180, steady(30, 6))
    assert dp.main(["video", str(video), "-o", str(tmp_path / "out.npz")]) == 0
    assert "--threshold" in capsys.readouterr().err


# --- black and white that keeps what moves ----------------------------------------------------


def bounce(k, low, high):
    """A place that goes to and fro between low and high, a pixel a step."""
    return low + abs((k + high - low) % (2 * (high - low)) - (high - low))


def moving(kind):
    """The grey frames of a little film of a kind, 30 a second: 6 s, or 12 with a cut."""
    ground = np.full((240, 120) if kind == "portrait" else (160, 160), 100, np.uint8)
    texture = np.random.default_rng(0).integers(0, 256, (20, 20)).astype(np.uint8)
    texture = texture.repeat(8, 0).repeat(8, 1)
    if kind == "textured":
        ground = texture.copy()
    ground[:20] = ground[-20:] = 0 if kind == "letterbox" else 220
    for k in range(360 if kind == "cut" else 180):
        frame = (ground if kind != "cut" or k < 160 else texture).copy()
        if kind == "light":
            frame = frame // 2 + np.uint8(k // 3)
        y, x = bounce(2 * k, 30, 110), bounce(3 * k, 10, frame.shape[1] - 30)
        if kind == "portrait":
            y = bounce(4 * k, 22, 200)
        if kind != "flicker" or k % 2:
            frame[y:y + 18, x:x + 18] = {"faint": 112, "light": 240}.get(kind, 170)
        if kind == "both":
            frame[110 - y + 30:128 - y + 30, x:x + 18] = 30
        yield frame


def near(pictures):
    """The largest of each pixel and its neighbours, written apart: (..., H, W) -> (..., H, W)."""
    padded = np.pad(pictures, [(0, 0)] * (pictures.ndim - 2) + [(1, 1), (1, 1)])
    return np.max([padded[..., y:y + 64, x:x + 64] for y in range(3) for x in range(3)], axis=0)


def motion_kept(path):
    """(kept, true) of a data file, from the grey pictures in it: see data_prep.motion_kept."""
    loaded = files.load_split(path, "train")
    grey = loaded["grey"].astype(int)
    bits = files.unpack(loaded["bits"][files.evenly(len(loaded["bits"]), len(grey))]).astype(int)
    change, flips = abs(np.diff(grey, axis=1)), np.diff(bits, axis=1) != 0
    weight = change * (change > 8)
    return ((weight * near(flips)).sum() / weight.sum(),
            (flips & (near(change) > 4)).sum() / flips.sum())


@pytest.mark.parametrize("threshold", ["auto", "motion"])
@pytest.mark.parametrize("kind", ["plain", "faint", "both", "textured", "letterbox", "portrait",
                                  "flicker", "light", "cut"])
def test_black_and_white_keeps_what_moves(tmp_path, kind, threshold):
    """Failing means that what moves in a video is lost, or that still things flicker: there is
    nothing that a model could learn from it."""
    video = encode(tmp_path / "v.mkv", list(moving(kind)), steady(30, 12), codec="ffv1",
                   time_base=Fraction(1, 1000))
    out = tmp_path / "v.npz"
    assert dp.main(["video", str(video), "-o", str(out), "--threshold", threshold]) == 0
    kept, true = motion_kept(out)
    assert kept > (0.9 if threshold == "motion" else 0.8) and true > 0.9
    assert files.load_meta(out)["crop"] == ("stretch" if kind == "portrait" else "center")


def test_each_scene_has_its_background(tmp_path):
    """Failing means that after a cut the scenery of before shines through."""
    video = encode(tmp_path / "v.mkv", list(moving("cut")), steady(30, 12), codec="ffv1",
                   time_base=Fraction(1, 1000))
    out = tmp_path / "v.npz"
    assert dp.main(["video", str(video), "-o", str(out), "--threshold", "motion"]) == 0
    still = files.unpack(files.load_split(out, "train")["bits"][0]).mean(axis=0).round()
    expected = np.zeros((64, 64))
    expected[:8] = expected[-8:] = 1                # the film's bright bars; the rest is dark
    assert (still == expected).mean() > 0.98


def test_otsu_is_left_where_it_loses_the_motion(tmp_path, capsys):
    """Failing means that the choice is not by what is kept, or that its loss is not told."""
    out = tmp_path / "v.npz"
    for kind, threshold, expected, low in (("faint", "auto", "motion", 0.9),
                                           ("plain", "auto", "otsu", 0.9),
                                           ("faint", "otsu", "otsu", 0)):
        video = encode(tmp_path / "v.mkv", list(moving(kind)), steady(30, 12), codec="ffv1",
                       time_base=Fraction(1, 1000))
        assert dp.main(["video", str(video), "-o", str(out), "--force", "--threshold",
                        threshold]) == 0
        shown = capsys.readouterr()
        assert files.load_meta(out)["threshold"] == expected
        kept = float(re.search(r"motion kept (\d\.\d\d)", shown.out).group(1))
        assert low <= kept <= low + 0.1 and f"preview {out}" in shown.out
        assert ("% of the motion" in shown.err) == (threshold == "otsu")


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("along", ["y", "x"])
def test_thin_things_are_steady(tmp_path, width, along):
    """Failing means that a thing thinner than a pixel is now there, now twice as wide, now gone."""
    pictures = []
    for k in range(180):
        picture = np.zeros((210, 160), np.uint8)
        y, x = (bounce(k, 20, 170), 40) if along == "y" else (60, bounce(k, 10, 140))
        picture[y:y + 16, x:x + width] = 200
        picture[-20:-10] = 120
        pictures.append(picture)
    video = encode(tmp_path / "v.mkv", pictures, steady(30, 6), codec="ffv1",
                   time_base=Fraction(1, 1000))
    out = tmp_path / "v.npz"
    assert dp.main(["video", str(video), "-o", str(out), "--crop", "stretch",
                    "--threshold", "motion"]) == 0
    sizes = files.unpack(files.load_split(out, "train")["bits"])[..., :52, :].sum(axis=(2, 3))
    assert sizes.min() >= 4 and sizes.max() <= 6 and np.ptp(sizes) <= 1


def test_an_edge_runs_where_a_pixel_is_half_covered():
    """Failing means that a bright thing is drawn larger than it is, as soon as a pixel of its edge
    passes the level."""
    far = np.zeros((1, 64, 64), np.int16)
    far[0, 10:20, 10:20] = 80
    far[0, 11:19, 11:19] = 200                      # 8 pixels wide, with edges that are 0.4 covered
    on = dp.moved(far, 20, 200)[0]
    assert on.sum() == 64 and on[11:19, 11:19].all()


def test_bars_make_no_halos(tmp_path):
    """Failing means that 'adaptive' draws a bright line along each bar of a letterbox, in which
    whatever moves is no more than a bump."""
    video = encode(tmp_path / "v.mkv", list(moving("letterbox")), steady(30, 6), codec="ffv1",
                   time_base=Fraction(1, 1000))
    out = tmp_path / "v.npz"
    assert dp.main(["video", str(video), "-o", str(out), "--threshold", "adaptive"]) == 0
    frames = files.unpack(files.load_split(out, "train")["bits"])
    assert frames.any() and frames.mean(axis=(0, 1)).max() < 0.5      # no pixel is always bright


def test_an_image_takes_the_way_of_the_data(tmp_path):
    """Failing means that play --image shows the model what looks unlike all it was trained on."""
    pictures = list(moving("faint"))
    video = encode(tmp_path / "v.mkv", pictures, steady(30, 6), codec="ffv1",
                   time_base=Fraction(1, 1000))
    out = tmp_path / "v.npz"
    assert dp.main(["video", str(video), "-o", str(out)]) == 0
    Image.fromarray(pictures[0]).save(tmp_path / "first.png")
    meta, first = files.load_meta(out), files.unpack(files.load_split(out, "train")["bits"][0, 0])
    assert (dp.image_to_frame(tmp_path / "first.png", meta) == first).all()
    assert (dp.image_to_frame(tmp_path / "first.png") != first).any()
    meta["looks"][0]["background"] = "no picture"
    with pytest.raises(files.UserError):
        dp.image_to_frame(tmp_path / "first.png", meta)


def test_keys_are_stored_as_actions(tmp_path, capsys):
    """Failing means that recorded keys are a frame off, or that keys of another video are taken."""
    video = numbered_video(tmp_path / "v.mp4", steady(30, 6))
    keys, out = np.random.default_rng(0).integers(0, 5, 180), tmp_path / "v.npz"
    np.save(tmp_path / "keys.npy", keys)
    arguments = ["video", str(video), "-o", str(out), "--actions", str(tmp_path / "keys.npy")]
    assert dp.main(arguments) == 0
    for split in files.SPLITS:
        loaded = files.load_split(out, split)
        for start, row in zip(loaded["start"], loaded["actions"]):
            for t, action in enumerate(row):
                three = keys[start + 3 * t:start + 3 * t + 3].tolist()
                assert action == max(three, key=lambda key: (three.count(key), key == three[2]))
    for wrong in (keys[1:], keys / 2, keys - 1, np.array([{}], dtype=object)):
        np.save(tmp_path / "keys.npy", wrong)
        assert dp.main([*arguments, "--force"]) == 2
        assert "keys.npy" in capsys.readouterr().err


# --- the user's mistakes ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrong_inputs(tmp_path_factory):
    """Files that are wrong in various ways, and one good short video."""
    folder = tmp_path_factory.mktemp("inputs")
    numbered_video(folder / "good.mp4", steady(30, 6))
    numbered_video(folder / "short.mp4", steady(30, 4))
    numbered_video(folder / "one.mp4", steady(30, 1 / 30))
    with av.open(str(folder / "none.avi"), "w") as container:          # a header, and no frame
        stream = container.add_stream("mpeg4", rate=30)
        stream.width = stream.height = 64
        container.start_encoding()
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is no video\n" * 50, encoding="utf-8")
    (folder / "cut.mp4").write_bytes((folder / "good.mp4").read_bytes()[:2000])
    with wave.open(str(folder / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    (folder / "there.npz").write_bytes(b"precious")
    (folder / "folder.npz").mkdir()
    return folder


@pytest.mark.parametrize("arguments, expected", [
    ("video missing.mp4 -o out.npz", "there is no file"),
    ("video empty.mp4 -o out.npz", "is empty"),
    ("video text.mp4 -o out.npz", "cannot read"),
    ("video cut.mp4 -o out.npz", "cannot read"),
    ("video sound.wav -o out.npz", "no picture"),
    ("video short.mp4 -o out.npz", "4.8 s"),
    ("video one.mp4 -o out.npz", "4.8 s"),
    ("video none.avi -o out.npz", "no frame"),
    ("video . -o out.npz", "there is no file"),
    ("video good.mp4 missing.mp4 -o out.npz", "there is no file"),
    ("video -o out.npz", "required"),
    ("video good.mp4", "required"),
    ("video good.mp4 -o out.npz --start late", "--start"),
    ("video good.mp4 -o out.npz --threshold -1", "--threshold"),
    ("video good.mp4 -o out", "must end in .npz"),
    ("video good.mp4 -o /proc/out.npz", "cannot write in /proc"),
    ("video good.mp4 -o out.npz --start 3 --end 3", "--end must be later"),
    ("video good.mp4 -o out.npz --start -1", "negative"),
    ("video good.mp4 -o out.npz --start 60", "after --start 60"),
    ("video good.mp4 -o out.npz --start nan", "--start"),
    ("video good.mp4 -o out.npz --end inf", "--end"),
    ("video good.mp4 -o out.npz --threshold 256", "--threshold"),
    ("video good.mp4 -o out.npz --crop middle", "--crop"),
    ("video good.mp4 -o out.npz --colour", "--colour"),
    ("video good.mp4 -o there.npz", "--force"),
    ("video good.mp4 -o folder.npz", "is a directory"),
    ("video good.mp4 -o out.txt", "must end in .npz"),
    ("video good.mp4 -o good.mp4/out.npz", "cannot write in"),
    ("demo -o there.npz", "--force"),
    ("demo -o out.npz --minutes nan", "--minutes"),
    ("demo -o out.npz --minutes 0.05", "--minutes"),
    ("demo -o out.npz --seed -1", "--seed"),
    ("demo -o out.npz --seed 1.5", "--seed"),
    ("demo -o out.npz --minutes 1e9", "--minutes"),
    ("demo -o good.mp4/x/y/out.npz", "cannot write in"),
    ("preview missing.npz -o out.png", "there is no data file"),
    ("preview there.npz -o out.png", "not an .npz"),
    ("preview there.npz -o out.jpg", ".png or .gif"),
    ("preview folder.npz -o out.png", "there is no data file"),
    ("preview good.mp4 -o out.png", "not an .npz"),
    ("preview there.npz -o out.png --count 0", "--count"),
    ("preview there.npz -o out.png --split all", "--split"),
    ("render -o out.npz", "invalid choice"),
    ("", "required"),
])
def test_mistakes_get_one_sentence(wrong_inputs, tmp_path, monkeypatch, capsys, arguments,
                                   expected):
    """Failing means that a user's mistake ends in a traceback, a wrong status, or debris."""
    if "/proc" in arguments and not Path("/proc").is_dir():
        pytest.skip("no folder here that nobody may write in")
    shutil.copytree(wrong_inputs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert dp.main(arguments.split()) == 2
    err = capsys.readouterr().err.strip()
    errors = [line for line in err.splitlines()         # slow machines see a progress line, too
              if not line.startswith("warning: ") and not line.endswith(" s left")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and expected in errors[0], err
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "there.npz").read_bytes() == b"precious"


def test_all_but_decoding_works_without_pyav(tmp_path, monkeypatch, capsys):
    """Failing means that a machine without PyAV, such as a borrowed GPU, can neither render the
    demo world nor train; or that a video ends in a traceback there."""
    for name in ("av", "av.error", "av.stream"):
        monkeypatch.setitem(sys.modules, name, None)                    # import fails
    without = types.ModuleType("without_av")
    without.__file__ = dp.__file__
    monkeypatch.setitem(sys.modules, "without_av", without)
    exec(compile(Path(dp.__file__).read_text("utf-8"), "without_av", "exec"), without.__dict__)
    out = str(tmp_path / "a.npz")
    assert without.main(["demo", "--minutes", "0.1", "-o", out]) == 0
    capsys.readouterr()
    assert without.main(["video", out, "-o", str(tmp_path / "b.npz")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install av" in error


def test_status_and_stderr_of_the_program(tmp_path):
    """Failing means that scripts cannot tell from the exit status that something went wrong."""
    program = Path(dp.__file__)
    run = subprocess.run([sys.executable, program, "video", "none.mp4", "-o", "out.npz"],
                         cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1


def test_paths_may_hold_spaces_and_accents(tmp_path):
    """Failing means that a folder's name, or a terminal that cannot show it, stops the program."""
    out = tmp_path / "my réseau" / "日本.npz"
    run = subprocess.run(
        [sys.executable, dp.__file__, "demo", "--minutes", "0.1", "-o", str(out)],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == "" and "wrote" in run.stdout
    assert dp.main(["preview", str(out), "-o", str(out.with_suffix(".png"))]) == 0
    assert len(list(out.parent.iterdir())) == 2


def test_force_replaces(tmp_path):
    """Failing means that --force does not replace a file, or leaves something beside it."""
    path = tmp_path / "new" / "demo.npz"            # the folder is made, too
    assert dp.main(["demo", "-o", str(path), "--minutes", "0.1"]) == 0
    path.write_bytes(b"old")
    assert dp.main(["demo", "-o", str(path), "--minutes", "0.1", "--force"]) == 0
    assert files.load_meta(path)["counts"] == {"train": 3, "val": 3, "test": 3}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("failure, status", [(KeyboardInterrupt, 130), (OSError, 2)])
def test_nothing_is_left_behind(tmp_path, monkeypatch, failure, status):
    """Failing means that Ctrl-C or a full disk leaves half a file, or spoils the old one."""
    path = tmp_path / "demo.npz"
    path.write_bytes(b"old")

    def fail(file, **arrays):
        file.write(b"half")
        raise failure("no space left")

    monkeypatch.setattr(np, "savez", fail)
    assert dp.main(["demo", "-o", str(path), "--minutes", "0.1", "--force"]) == status
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"old"


# --- reading the data file -------------------------------------------------------------------


def test_data_file_is_as_designed(demo_file):
    """Failing means that the file's format changed: old files and genie_mini.py would not fit."""
    with np.load(demo_file, allow_pickle=False) as data:
        meta = json.loads(str(data["meta"]))
        for split in files.SPLITS:
            count = meta["counts"][split]
            assert data[split].dtype == np.uint8 and data[split].shape == (count, 16, 64, 8)
            assert data[split + "_start"].dtype == np.int64
            assert data[split + "_actions"].shape == (count, 15)
    assert meta["version"] == 1 and meta["fps"] == 10 and meta["source_fps"] == 30
    assert meta["action_names"] == list(worlds.DEMO_ACTIONS)


def damaged(arrays, kind):
    """Change a good file's arrays so that they are wrong in one way."""
    if kind == "type":
        arrays["train"] = arrays["train"].astype(np.float32)
    elif kind == "shape":
        arrays["train"] = arrays["train"][:, :8]
    elif kind == "pickled":
        arrays["train"] = np.array([{"a": 1}], dtype=object)
    elif kind == "absent":
        del arrays["train_start"]
    elif kind == "lengths":
        arrays["train_start"] = arrays["train_start"][:-1]
    elif kind == "action":
        arrays["train_actions"] = np.full_like(arrays["train_actions"], 9)
    elif kind == "version":
        arrays["meta"] = np.array(json.dumps({"version": 0}))
    elif kind == "meta":
        arrays["meta"] = np.array("not json")
    elif kind == "meta number":
        arrays["meta"] = np.array(1)
    elif kind == "nested":
        arrays["meta"] = np.array("[" * 100_000)
    elif kind == "names":
        arrays["meta"] = np.array(json.dumps({"version": 1, "action_names": 5}))
    elif kind == "no rows":
        arrays["train"] = arrays["train"][:0]


@pytest.mark.parametrize("kind", ["type", "shape", "pickled", "absent", "lengths", "action",
                                  "version", "meta", "meta number", "nested", "names", "no rows",
                                  "cut", "flipped", "huge", "bomb"])
def test_malformed_data_file(tmp_path, kind):
    """Failing means that a wrong file is trained on, or that it ends in a traceback.

    'huge' claims thousands of sequences that are not there, and 'bomb' has them, as zeros that were
    compressed a thousandfold: memory must not be set aside for either.
    """
    path = tmp_path / "demo.npz"
    worlds.write_demo(path, minutes=0.1)
    with np.load(path, allow_pickle=False) as data:
        arrays = dict(data)
    damaged(arrays, kind)
    if kind == "bomb":
        arrays["train"] = np.zeros((5000, 16, 64, 8), np.uint8)         # 40 MB
    (np.savez_compressed if kind == "bomb" else np.savez)(path, **arrays)
    content = bytearray(path.read_bytes())
    arrays.clear()
    if kind == "cut":
        content = content[:len(content) // 2]
    elif kind == "flipped":
        middle = len(content) // 3
        content[middle] ^= 255
    elif kind == "huge":
        short, long = b"(3, 16, 64, 8), }", b"(20000, 16, 64, 8), }"
        content = content.replace(short + b" " * 4, long)              # the same length: 160 MB
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(files.UserError) as caught:
        for split in files.SPLITS:
            files.load_split(path, split)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6, "memory was set aside before the header was checked"
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def fuzzed(data, rng):
    """Bytes with bits flipped, cut off, or a piece of them copied elsewhere."""
    data, how = bytearray(data), rng.integers(3)
    at, other = rng.integers(len(data), size=2)
    if how == 0:
        for i in rng.integers(len(data), size=rng.integers(1, 5)):
            data[i] ^= 1 << rng.integers(8)
    elif how == 1:
        del data[at:]
    else:
        piece = data[other:other + rng.integers(1, 100)]
        data[at:at + rng.integers(2) * len(piece)] = piece
    return bytes(data)


def test_fuzzed_data_files(tmp_path, cases=150):
    """Failing means that a damaged data file ends in a traceback, or is read as another one."""
    path, rng = tmp_path / "demo.npz", np.random.default_rng(0)
    worlds.write_demo(path, minutes=0.1)
    data, whole, refused = path.read_bytes(), files.load_split(path, "val"), 0
    for _ in range(cases):
        path.write_bytes(fuzzed(data, rng))
        try:
            loaded = files.load_split(path, "val")
        except files.UserError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert all((loaded[name] == whole[name]).all() for name in whole)
    assert refused > cases / 4


# --- looking ---------------------------------------------------------------------------------


def test_preview_png(demo_file, tmp_path):
    """Failing means that the contact sheet does not show the sequences' frames in order."""
    out = tmp_path / "sheet.png"
    assert dp.main(["preview", str(demo_file), "-o", str(out), "--split", "val",
                    "--count", "2"]) == 0
    sheet = np.array(Image.open(out))
    frames = files.unpack(files.load_split(demo_file, "val")["bits"][0]) * 255
    strip = sheet[:128:2, -16 * 132::2].reshape(64, 16, 66)[:, :, :64].swapaxes(0, 1)
    assert (strip == frames).all() and sheet.shape == (2 * 132, 72 + 16 * 132)


@pytest.mark.parametrize("count", [2, 8])
def test_preview_shows_what_was_lost(tmp_path, count):
    """Failing means that the grey picture is not over the binary one made from it."""
    video = numbered_video(tmp_path / "v.mp4", steady(30, 20))
    out, sheet = tmp_path / "v.npz", tmp_path / "v.png"
    assert dp.main(["video", str(video), "-o", str(out)]) == 0
    assert dp.main(["preview", str(out), "-o", str(sheet), "--count", str(count)]) == 0
    rows = np.array(Image.open(sheet))[::2, 72::2][:, :64 * 1]                # the first frames
    bits = files.unpack(files.load_split(out, "train")["bits"])
    assert len(rows) == 2 * count * 66, "each has a grey row and a binary one"
    for n, i in enumerate(files.evenly(len(bits), count)):
        grey, binary = rows[132 * n:132 * n + 64], rows[132 * n + 66:132 * n + 130]
        assert (binary == 255 * bits[i, 0]).all() and abs(grey - 255. * bits[i, 0]).mean() < 20


def test_preview_gif(demo_file, tmp_path):
    """Failing means that the animation has the wrong speed or does not play."""
    out = tmp_path / "sheet.gif"
    assert dp.main(["preview", str(demo_file), "-o", str(out), "--count", "3"]) == 0
    with Image.open(out) as image:
        assert image.size == (3 * 132, 128) and image.n_frames == 16
        assert image.info["duration"] == 100 and image.info["loop"] == 0


def test_image_to_frame(tmp_path):
    """Failing means that play --image shows the model something else than the picture."""
    frame = worlds.DemoWorld(1).frame()
    path = tmp_path / "start.png"
    for mode in ("L", "RGBA", "P", "1"):
        Image.fromarray(frame * 255).resize((320, 320), 0).convert(mode).save(path)
        assert (dp.image_to_frame(path) == frame).all(), mode
    for bad in ("missing.png", "text.png"):
        (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
        with pytest.raises(files.UserError):
            dp.image_to_frame(tmp_path / bad)


# ==================================================================================================
# The model: genie_mini.py
# ==================================================================================================

# --- helpers: small models, small batches -----------------------------------------------------


ROOT = Path(genie_mini.__file__).parent


def measurements():
    """What extras/MEASUREMENTS.md says."""
    return (ROOT / "extras" / "MEASUREMENTS.md").read_text("utf-8")


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Every test draws the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)


def tiny(gm, **changes):
    """A Config so small that a training step takes milliseconds: 4x4 patches of 16x16 pixels."""
    values = dict(
        device="cpu", precision="float32", heads=2, tok_patch=16, tok_dim=16, tok_layers=1,
        tok_codes=8, tok_unquantized=2, tok_frames=4, lam_patch=16, lam_dim=16, lam_layers=1,
        lam_unquantized=0.0, dyn_dim=16, dyn_layers=2, dyn_frames=4, action_noise=0.0,
        latent_dim=4, batch=8, micro_batch=8, warmup=10, lr=3e-3, min_lr=3e-3,
        maskgit_steps=3, val_sequences=2)
    return gm.Config(**{**values, **changes})


def tiny_genie(gm, seed=0, **changes):
    """A Genie with random weights, and random codebooks in use."""
    torch.manual_seed(seed)
    genie = gm.Genie(tiny(gm, **changes)).eval()
    for quantizer in (genie.tokenizer.quantizer, genie.lam.quantizer):
        quantizer.codebook.normal_()
        quantizer.started.fill_(True)
    return genie


def tiny_trainer(gm, data, out, stage=0, **changes):
    """A Trainer of a tiny model at the beginning of a stage."""
    out.mkdir(exist_ok=True)
    trainer = gm.Trainer(tiny(gm, **changes), data, out)
    trainer.enter_stage(stage)
    return trainer


def weights_of(module):
    """A copy of all weights and buffers: {name: tensor}."""
    return {name: t.clone() for name, t in module.state_dict().items()}


def random_frames(*shape):
    """Frames of noise: (*shape, 64, 64) uint8 of 0 and 1."""
    return torch.randint(2, (*shape, 64, 64), dtype=torch.uint8)


def close(a, b, tolerance=1e-5):
    """Are two tensors equal to within a tolerance?"""
    return (a - b).abs().max().item() <= tolerance


# --- no model sees the future -----------------------------------------------------------------

CAUSAL = ("tokenizer encoder", "tokenizer decoder", "LAM encoder", "LAM encoder of frames",
          "LAM decoder, frames", "LAM decoder, actions", "dynamics, tokens", "dynamics, actions")


def causal_function(gm, name, T, **changes):
    """A part of the model as a function of one input, and two inputs to try: (2, B, T, ...).

    The quantizers let everything through, so that no change is lost in rounding to a code.
    """
    if name == "LAM encoder of frames":
        changes["lam_view"] = "frames"
    genie = tiny_genie(gm, **changes)
    genie.tokenizer.quantizer.started.fill_(False)
    genie.lam.quantizer.started.fill_(False)
    frames, actions = random_frames(2, 2, T), torch.randn(2, 2, T, 4)
    tokens = torch.randint(8, (2, 2, T, 16))
    visible = torch.zeros(tokens[0].shape, dtype=torch.bool)
    tokenizer, lam, dynamics = genie.tokenizer, genie.lam, genie.dynamics
    return {
        "tokenizer encoder": (lambda x: tokenizer.encode(x)[0], frames),
        "tokenizer decoder": (lambda z: tokenizer.decode(z)[0], torch.randn(2, 2, T, 16, 4)),
        "LAM encoder": (lambda x: lam.encode(x)[0], frames),
        "LAM encoder of frames": (lambda x: lam.encode(x)[0], frames),
        "LAM decoder, frames": (lambda x: lam.decode(x, actions[0]), frames),
        "LAM decoder, actions": (lambda a: lam.decode(frames[0], a), actions),
        "dynamics, tokens": (lambda x: dynamics(x, visible, actions[0])[0], tokens),
        "dynamics, actions": (lambda a: dynamics(tokens[0], visible, a)[0], actions),
    }[name]


@torch.no_grad()
def changed(function, x, other, where):
    """Which output frames change when the frames `where` (a slice) of x are replaced."""
    mixed = x.clone()
    mixed[:, where] = other[:, where]
    difference = (function(mixed) - function(x)).abs()                  # (B, T, ...)
    return (difference.flatten(2).amax((0, 2)) > 1e-6).tolist()


@pytest.mark.attention
@pytest.mark.parametrize("name", CAUSAL)
def test_no_future_leak(name, gm=genie_mini):
    """Failing means that a frame is predicted with the answer in view: training would look superb
    and play would be worthless. Or that a model does not see what it should.

    Frames t.. are replaced by noise: outputs before t must stay, all from t on must change. The
    LAM's action t (from frame t to t+1) may and must see frame t+1: it changes one step earlier.
    """
    function, (x, other) = causal_function(gm, name, T=7)
    early = 1 if name.startswith("LAM encoder") else 0
    for t in range(7):
        seen = changed(function, x, other, slice(t, None))
        assert len(seen) == 7 - early and seen == [i >= t - early for i in range(len(seen))], t


def test_patches_alone(gm=genie_mini):
    """Failing means that a token depends on where its patch is or what is around it, although
    tok_attention is off: the dynamics would have to learn each patch many times over."""
    tokenizer = tiny_genie(gm, tok_attention=False).tokenizer
    frames, other = random_frames(2, 2, 1)
    patch = tokenizer.patch
    frames[:, :, :patch, :patch] = other[:, :, -patch:, -patch:]        # one patch is in both
    tokens, others = tokenizer(frames)[1], tokenizer(other)[1]
    assert (tokens[..., 0] == others[..., -1]).all() and (tokens != others).any()
    logits = [tokenizer.decode(tokenizer.encode(x)[0])[0] for x in (frames, other)]
    assert torch.equal(logits[0][..., :patch, :patch], logits[1][..., -patch:, -patch:])


def test_lam_decoder_does_not_see_its_target(gm=genie_mini):
    """Failing means that the LAM can redraw frame t+1 by looking at it: no need for actions.

    With the actions held fixed, prediction t must not depend on frame t+1.
    """
    lam, (x, other) = tiny_genie(gm).lam, random_frames(2, 2, 5)
    actions = torch.randn(2, 4, 4)
    lam.encode = lambda frames, *_: (actions, None, None)
    for t in range(4):
        seen = changed(lambda frames: lam(frames)[0], x, other, slice(t + 1, None))
        assert seen == [i > t for i in range(4)]


class Copy(nn.Module):
    """Stands in for a transformer: hands its input on."""

    def forward(self, x, past=None, layout=None):
        return x, None


def test_lam_pools_over_the_changed_patches(gm=genie_mini):
    """Failing means that the many patches where nothing happens drown the few that changed.

    Only patch 6 changes, by its first pixel; with no transformer in between, its embedding alone
    must be what is pooled.
    """
    frames = torch.zeros(1, 2, 64, 64, dtype=torch.uint8)
    frames[0, 1, 16, 32] = 1                                            # row 1, column 2 of 4 x 4
    change = torch.zeros(16, 256)
    change[6, 0] = 1
    lam = tiny_genie(gm).lam
    lam.encoder = Copy()
    lam.quantizer.started.fill_(False)
    assert close(lam.encode(frames)[0][0, 0], lam.to_latent(lam.embed(change)[6]))
    assert torch.isfinite(lam.encode(frames[:, [0, 0]])[0]).all(), "nothing changed"


# --- each model can learn one batch by heart ---------------------------------------------------


class OneBatch:
    """Stands in for the training set: every step sees the same frames."""

    def __init__(self, clips):
        self.clips = clips

    def __len__(self):
        return len(self.clips)

    def draw(self, *_):
        return list(range(len(self.clips))), 0

    def frames(self, picks, *_):
        return self.clips[list(picks)]


def overfit(trainer, frames, steps):
    """Train on one batch. Returns the numbers of the last step."""
    trainer.train_set = OneBatch(frames)
    if trainer.stage == 1:
        trainer.tokens = trainer.genie.tokenizer.encode(frames)[1].byte()
        trainer.encoded = torch.ones(len(frames), dtype=torch.bool)
    for trainer.step in range(steps):
        numbers = trainer.optimizer_step()
    trainer.genie.eval()
    return numbers


def test_tokenizer_overfits(demo_file, tmp_path, gm=genie_mini):
    """Failing means that the tokenizer cannot even learn one batch: something in it, in its loss,
    in the quantizer or in the training step is broken.

    Frames of random arrangements of 6 patterns: only the tokens can tell which pattern is where.
    """
    torch.manual_seed(0)
    patterns = torch.randint(2, (6, 256), dtype=torch.uint8)
    frames = gm.unpatchify(patterns[torch.randint(6, (8, 2, 16))], 16)  # (8, 2, 64, 64)
    trainer = tiny_trainer(gm, demo_file, tmp_path, tok_dim=32, tok_unquantized=40)
    numbers = overfit(trainer, frames, 250)
    logits, tokens, _ = trainer.genie.tokenizer(frames)
    assert ((logits > 0) != frames).sum() == 0
    assert numbers["pixel_loss"] < 0.03 and numbers["codes_used"] >= 6
    assert len(tokens.unique()) >= 6


def lam_batch(gm):
    """One first frame with 4 possible successors, each twice: (8, 2, 64, 64)."""
    patterns = torch.randint(2, (5, 1, 1, 256), dtype=torch.uint8, generator=gm.seeded(0))
    frames = gm.unpatchify(patterns.expand(5, 1, 16, 256), 16)          # each pattern 16 times
    return torch.stack([torch.cat([frames[0], frames[1 + i % 4]]) for i in range(8)])


@pytest.mark.parametrize("view", ["change", "frames"])
def test_lam_overfits(view, demo_file, tmp_path, monkeypatch, gm=genie_mini):
    """Failing means that the LAM does not learn to put what happens into its codes.

    The same first frame has four successors of random pixels, so without the action hundreds of
    pixels are wrong; and the code, not the clip, must decide: with another clip's code, the LAM
    must draw that clip's successor. (By heart, so not rolled.)
    """
    noise = gm.world_noise
    monkeypatch.setattr(gm, "world_noise", lambda *given: (
        torch.zeros(8, 2, dtype=torch.long), *noise(*given)[1:]))
    trainer = tiny_trainer(gm, demo_file, tmp_path, stage=1, lam_view=view, lam_dim=32,
                           lam_unquantized=0.3, dyn_layers=1, dyn_frames=2, dyn_steps=150)
    frames = lam_batch(gm)
    numbers = overfit(trainer, frames, 150)
    lam = trainer.genie.lam
    logits, actions, indices, _ = lam(frames)
    assert gm.wrong(logits > 0, frames[:, 1:]).max() < 5
    assert numbers["pixel_loss"] < 0.03
    assert (indices[:4] == indices[4:]).all() and len(indices[:4].unique()) == 4
    swapped = lam.decode(frames[:, :1], actions.roll(1, 0)) > 0          # another clip's action
    assert gm.wrong(swapped, frames[:, 1:].roll(1, 0)).max() < 5


def test_dynamics_overfits(gm=genie_mini):
    """Failing means that the dynamics model does not learn which action leads to which frame.

    All is masked, and the same first frame has four successors of random tokens: only the action
    tells which. Then sampling must give them back, token for token.
    """
    c = tiny(gm, mask_min=1.0, temperature=0.0, maskgit_steps=1, dyn_dim=32)
    torch.manual_seed(0)
    model = gm.DynamicsModel(c)
    tokens = torch.randint(8, (4, 2, 16))
    tokens[:, 0] = tokens[0, 0]
    actions = torch.eye(4)[:, None]                                     # (B, 1, L)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for step in range(200):
        loss = model.loss(tokens, actions, model.random_mask(4, 1, gm.seeded(step)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.02, "a guess without the action costs about 1"
    past = model(tokens[:, :1], torch.zeros(4, 1, 16, dtype=torch.bool), torch.zeros(4, 1, 4))[1]
    assert (model.sample(past, actions[:, 0], c, gm.seeded(0)) == tokens[:, 1]).all()


# --- vector quantizer, against numbers worked out by hand --------------------------------------

CODES = [[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]
VECTORS = [[0.6, 0.1], [-0.1, 0.9], [0.1, 1.2]]    # squared distances 0.37 0.17 3.97 | 0.82 2.02
NEAREST = [1, 0, 2]                                # 1.22 | 1.45 2.25 0.65


def make_quantizer(gm, codes=CODES, started=True, decay=0.9, dead_after=100, unquantized=0):
    """A quantizer in training mode with these codes, as if each had been chosen once."""
    codes = torch.tensor(codes)
    quantizer = gm.VectorQuantizer(*codes.shape, decay, dead_after, 0.25, unquantized)
    quantizer.codebook.copy_(codes)
    quantizer.ema_sum.copy_(codes)
    quantizer.started.fill_(started)
    return quantizer


@pytest.mark.quantizer
def test_quantizer_picks_the_nearest_code(gm=genie_mini):
    """Failing means that vectors are replaced by a wrong code, or the loss has a wrong weight."""
    quantized, indices, loss = make_quantizer(gm)(torch.tensor([VECTORS]))
    assert indices.tolist() == [NEAREST]
    assert close(quantized[0], torch.tensor(CODES)[NEAREST])
    assert loss.item() == pytest.approx(0.25 * (0.17 + 0.82 + 0.65) / 6)


@pytest.mark.straight_through
def test_straight_through_gradient(gm=genie_mini):
    """Failing means that the encoder gets no gradient, or a wrong one, through the codebook."""
    z = torch.tensor(VECTORS, requires_grad=True)
    quantized, _, loss = make_quantizer(gm)(z)
    upstream = torch.tensor([[1.0, -2.0], [0.5, 3.0], [-1.0, 0.25]])
    if quantized.requires_grad:
        quantized.backward(upstream, retain_graph=True)
    assert z.grad is not None and (z.grad == upstream).all(), "identity: as if z were the code"
    assert loss.requires_grad, "the encoder must be pulled towards its codes"
    z.grad = None
    loss.backward()
    assert close(z.grad, 2 * 0.25 * (z.detach() - torch.tensor(CODES)[NEAREST]) / 6, 1e-7)


@pytest.mark.quantizer
def test_codes_follow_a_moving_average(gm=genie_mini):
    """Failing means that the codes do not learn, learn at a wrong rate, or move when unused.

    Two vectors choose code 1: count 0.9 + 0.1 * 2 = 1.1, sum 0.9 * (1, 0) + 0.1 * (2.2, 0.4).
    """
    quantizer = make_quantizer(gm)
    quantizer(torch.tensor([[1.0, 0.1]]))                               # in two micro-batches
    quantizer(torch.tensor([[1.2, 0.3]]))
    quantizer.update(gm.seeded(0))
    expected = torch.tensor([[0.0, 0.0], [(0.9 + 0.22) / 1.1, 0.04 / 1.1], [0.0, 2.0]])
    assert close(quantizer.codebook, expected, 1e-6)
    quantizer.eval()(torch.tensor([[5.0, 5.0]]))
    assert quantizer.seen == [], "what is seen in evaluation must not be learned from"


@pytest.mark.quantizer
def test_quantizer_lets_everything_through_until_it_starts(gm=genie_mini):
    """Failing means that the codebook starts at a wrong time, or on vectors of no encoder."""
    quantizer = make_quantizer(gm, started=False, unquantized=3)
    z = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        assert not quantizer.started
        quantized, _, loss = quantizer(z)
        assert (quantized == z).all() and loss == 0
        quantizer.update(gm.seeded(0))
    assert quantizer.started
    nearest = quantizer.squared_distances(z).argmin(dim=1)
    for code in nearest.unique():
        assert close(quantizer.codebook[code], z[nearest == code].mean(dim=0)), "in their middle"


def test_start_picks_distinct_vectors(gm=genie_mini):
    """Failing means that codes start as copies of each other; ties never win, so they stay dead.

    Among 1,000 copies of one vector, the 7 others must all be found.
    """
    quantizer = make_quantizer(gm, codes=[[0.0, 0.0]] * 8, started=False)
    others = [[float(i), 5.0] for i in range(7)]
    quantizer(torch.tensor([[3.0, 3.0]] * 1000 + others))
    quantizer.update(gm.seeded(0))
    start = quantizer.codebook.clone()
    assert sorted(start.tolist()) == sorted([[3.0, 3.0]] + others)
    quantizer(torch.tensor([[3.0, 3.0]] * 1000 + others))
    quantizer.update(gm.seeded(1))
    assert close(quantizer.codebook, start), "the moving average starts there, too"


def test_no_two_clusters_share_a_code_at_the_start(gm=genie_mini):
    """Failing means that the codebook starts as k-means++ leaves it: when the draw is unlucky, two
    actions get one code and a third gets two, and training hardly ever mends that."""
    bad = 0
    for seed in range(20):
        generator = gm.seeded(seed)
        centres = 4 * torch.randn(6, 3, generator=generator)
        z = (centres + 0.3 * torch.randn(200, 6, 3, generator=generator)).flatten(0, 1)
        quantizer = gm.VectorQuantizer(8, 3)
        quantizer.start(z, generator)
        nearest = quantizer.squared_distances(z).argmin(dim=1)
        means = torch.stack([z[nearest == code].mean(dim=0) for code in nearest.unique()])
        assert close(quantizer.codebook[nearest.unique()], means, 0.1), "codes lie in the middle"
        assert (quantizer.ema_sum == quantizer.codebook).all() and (quantizer.ema_count == 1).all()
        bad += len(torch.cdist(centres, quantizer.codebook).argmin(dim=1).unique()) < 6
    assert bad == 0


def test_codebook_starts_on_the_whole_training_set(demo_file, tmp_path, gm=genie_mini):
    """Failing means that the action codebook starts on the few actions of one batch: then some of
    the true actions are not among them, and the codes are slow to find those, or never do."""
    trainer = tiny_trainer(gm, demo_file, tmp_path, stage=1, lam_unquantized=0.5,
                           dyn_steps=4)
    quantizer, given = trainer.genie.lam.quantizer, []
    start = quantizer.start
    quantizer.start = lambda z, generator: (given.append(z.clone()), start(z, generator))
    for trainer.step in range(2):
        assert not given
        trainer.optimizer_step()
    quantizer.started.fill_(False)                       # so that encode gives what it had given
    latents = trainer.latents()
    assert latents.shape == (15 * len(trainer.train_set), 4) == given[0].shape
    for mean in (lambda z: z.mean(0), lambda z: z.pow(2).mean(0)):      # shuffled, but the same
        assert close(mean(latents), mean(given[0]))


@pytest.mark.quantizer
def test_dead_code_is_moved_onto_a_lonely_vector(gm=genie_mini):
    """Failing means that a code nobody uses stays dead, is moved too early, or becomes a copy of
    a live code, which would never be chosen.

    Code 2 is never chosen; among 99 copies of live codes there is one vector far from all.
    """
    quantizer = make_quantizer(gm, dead_after=3)
    z = torch.tensor([CODES[0]] * 50 + [CODES[1]] * 49 + [[0.3, 0.4]])
    for step in range(3):
        assert quantizer.codebook[2].tolist() == CODES[2], f"moved at step {step}"
        quantizer(z)
        quantizer.update(gm.seeded(step))
    assert close(quantizer.codebook[2], torch.tensor([0.3, 0.4]), 1e-6)
    assert quantizer.idle[2] == 0, "it gets as long again to be chosen"
    assert quantizer(z)[1][-1] == 2, "the lonely vector chooses it now"
    quantizer.update(gm.seeded(3))
    assert close(quantizer.codebook[2], torch.tensor([0.3, 0.4]), 1e-6), "and holds it there"


def test_dead_code_never_copies_a_live_one(gm=genie_mini):
    """Failing means that a dead code is moved onto a live one although no vector is without a code:
    nothing gained, and what the code had learned is lost."""
    quantizer = make_quantizer(gm, dead_after=2)
    for step in range(5):
        quantizer(torch.tensor([CODES[0], CODES[1]] * 10))
        quantizer.update(gm.seeded(step))
    assert quantizer.codebook.tolist() == CODES


@pytest.mark.parametrize("length", [1, 3, 20, 400])
def test_a_copy_of_a_code_is_known_at_any_length(length, gm=genie_mini):
    """Failing means that rounding decides: among long vectors the distance of a copy from its code
    is not 0 but some rounding error, so that a dead code is moved onto a live one."""
    for seed in range(5):
        quantizer = gm.VectorQuantizer(8, 16)
        codes = torch.randn(7, 16, generator=gm.seeded(seed))
        codes *= length / codes.norm(dim=1, keepdim=True)
        quantizer.codebook[:7], quantizer.codebook[7] = codes, 2 * length
        z = codes[torch.arange(700) % 7] * (1 + 1e-7)                   # as moving averages round
        quantizer.reseed(z, torch.tensor([7]), gm.seeded(seed))
        assert (quantizer.codebook[7] == 2 * length).all(), "moved, though nothing lacked a code"
        z[5] *= 1.1
        quantizer.reseed(z, torch.tensor([7]), gm.seeded(seed))
        assert (quantizer.codebook[7] == z[5]).all(), "the only vector without a code"


@pytest.mark.quantizer
def test_spare_codes_give_nothing_a_second_name(gm=genie_mini):
    """Failing means that one kind of patch has now this symbol, now that, which the dynamics model
    cannot foresee: in the first `full` world such names had 14 nats a frame.

    Codes 1 and 2 share a cluster: all of it is code 1, and code 2, which nobody chooses, waits
    until something has no code near it.
    """
    quantizer = gm.VectorQuantizer(3, 1, decay=1.0, dead_after=3, alike=0.05).train()
    quantizer.codebook[:] = quantizer.ema_sum[:] = torch.tensor([[0.0], [10.0], [10.5]])
    quantizer.started.fill_(True)               # a variance of 35, so 1.75 is next to nothing
    for step in range(6):
        assert quantizer(torch.tensor([[0.1], [10.0], [10.4], [11.0]]))[1].tolist() == [0, 1, 1, 1]
        quantizer.update(gm.seeded(step))
    assert quantizer.idle[2] == 6 and quantizer.codebook[2] == 10.5, "nothing needs it"
    quantizer(torch.tensor([[0.1], [10.0], [-9.0]]))
    quantizer.update(gm.seeded(0))
    assert quantizer.codebook[2] == -9, "far from any code"


@torch.no_grad()
def test_the_tokenizer_has_one_name_for_a_patch(gm=genie_mini):
    """Failing means that a tokenizer with codes to spare calls the same patch by two names."""
    tokenizer, frames = tiny_genie(gm).tokenizer, random_frames(2, 4)
    quantizer = tokenizer.quantizer
    z = tokenizer.to_latent(tokenizer.encoder(tokenizer.embed(
        gm.patchify(gm.pixels(frames), tokenizer.patch)))[0]).flatten(0, 2)     # (M, L)
    quantizer.codebook[:] = z[:1] + 100 * torch.randn(quantizer.codebook.shape)
    quantizer.codebook[[0, 3]] = z.mean(0) + 1e-3 * torch.randn(2, z.shape[1])  # all z are near
    assert tokenizer.encode(frames)[1].unique().tolist() == [0]


# --- MaskGIT sampling -----------------------------------------------------------------------


def watch(model):
    """Record (tokens, masked) of every pass through a dynamics model."""
    passes, forward = [], model.forward

    def watched(tokens, masked, *rest, **options):
        passes.append((tokens.clone(), masked.clone()))
        return forward(tokens, masked, *rest, **options)

    model.forward = watched
    return passes


def replace_logits(model, logits):
    """Make a dynamics model answer every pass i with logits(i), a (K,) or (N, K) tensor."""
    passes = []

    def forward(tokens, masked, *rest, **options):
        passes.append(masked.clone())
        return logits(len(passes) - 1).expand(*tokens.shape, -1), None

    model.forward = forward
    return passes


def one_frame_past(gm, genie, B=2):
    """What the dynamics model remembers of one frame."""
    tokens = torch.randint(8, (B, 1, 16), generator=gm.seeded(7))
    return genie.dynamics(tokens, tokens < 0, torch.zeros(B, 1, 4))[1]


@pytest.mark.maskgit
@pytest.mark.parametrize("schedule", ["cosine", "adaptive"])
@pytest.mark.parametrize("steps", [1, 4, 10])
def test_maskgit_commits_each_token_once(steps, schedule, gm=genie_mini):
    """Failing means that decided tokens are changed or forgotten, or decided in the wrong number:
    frames would be made of parts that do not fit each other.

    After pass i of S, floor(16 cos(pi/2 i/S)) of the 16 tokens are still masked. The adaptive
    schedule of this untrained model, which is sure of nothing, decides one in each pass but the
    last, which decides the rest.
    """
    genie = tiny_genie(gm, maskgit_steps=steps, mask_schedule=schedule)
    past = one_frame_past(gm, genie)
    passes = watch(genie.dynamics)
    with torch.no_grad():
        final = genie.dynamics.sample(past, torch.randn(2, 4), genie.config, gm.seeded(0))
    cosine = [math.floor(16 * math.cos(math.pi / 2 * i / steps)) for i in range(steps)]
    expected = cosine if schedule == "cosine" else [16 - i for i in range(steps)]
    assert len(passes) == len(expected) and passes[0][1].all()
    for i, ((tokens, masked), still) in enumerate(zip(passes, expected)):
        assert (masked.sum(-1) == still).all(), f"pass {i}"
        assert (tokens[~masked] == final[:, None][~masked]).all(), "a decided token changed"
        if i > 0:
            assert (masked <= passes[i - 1][1]).all(), "a decided token was masked again"
    assert final.min() >= 0 and final.max() < 8


@pytest.mark.maskgit
@pytest.mark.parametrize("schedule", ["cosine", "adaptive"])
def test_maskgit_takes_a_token_from_the_pass_that_decides_it(schedule, gm=genie_mini):
    """Failing means that tokens are decided by another pass than the one that commits them, or
    that some are never decided at all.

    Pass i wants code i + 1 everywhere, so the result tells which pass decided each token.
    """
    genie = tiny_genie(gm, maskgit_steps=4, temperature=0.0, mask_schedule=schedule)
    passes = replace_logits(genie.dynamics, lambda i: F.one_hot(torch.tensor(i + 1), 8) * 6.0)
    final = genie.dynamics.sample(None, torch.zeros(3, 4), genie.config, gm.seeded(0))
    decided = sum(masked[:, 0].long() for masked in passes)             # passes it stayed masked
    assert (final == decided).all() and sorted(final.unique().tolist()) == [1, 2, 3, 4]


@pytest.mark.maskgit
def test_maskgit_commits_the_surest_first(gm=genie_mini):
    """Failing means that the order of decisions does not follow the model's confidence.

    Token n is the surer the larger n; without noise they must be decided from last to first.
    """
    genie = tiny_genie(gm, maskgit_steps=4, temperature=0.0, order_noise=0.0)
    logits = torch.zeros(16, 8)
    logits[:, 3] = torch.arange(1, 17) / 4
    passes = replace_logits(genie.dynamics, lambda i: logits)
    genie.dynamics.sample(None, torch.zeros(1, 4), genie.config, gm.seeded(0))
    for masked in passes:
        still = int(masked.sum())
        assert masked.flatten().tolist() == [n < still for n in range(16)]


@pytest.mark.maskgit
def test_adaptive_commits_what_is_sure(gm=genie_mini):
    """Failing means that the adaptive schedule lets sure tokens wait, commits doubtful ones
    together, or makes passes when nothing is left to decide.

    Of the first frame's tokens 13 are sure, of the second's 15; the model stays in doubt about the
    others. So they take 3 passes and 1; the frame that is done waits for the other.
    """
    genie = tiny_genie(gm, temperature=0.0, mask_schedule="adaptive", maskgit_steps=10)
    logits = torch.zeros(2, 1, 16, 8)
    logits[..., 3] = 6.7                        # 0.9914 = 1 / (1 + 7 exp(-6.7)): over 0.99
    logits[0, 0, [2, 7, 11], 3] = 6.4           # 0.9885: under it
    logits[1, 0, 5, 3] = 6.4
    passes = replace_logits(genie.dynamics, lambda i: logits)
    final = genie.dynamics.sample(None, torch.zeros(2, 4), genie.config, gm.seeded(0))
    assert [masked.sum((1, 2)).tolist() for masked in passes] == [[16, 16], [2, 0], [1, 0]]
    assert set(passes[1][0, 0].nonzero().flatten().tolist()) < {2, 7, 11}
    assert (final == 3).all()


@pytest.mark.maskgit
@pytest.mark.parametrize("schedule", ["cosine", "adaptive"])
def test_order_noise_shuffles_the_order(schedule, gm=genie_mini):
    """Failing means that order_noise does nothing: the commits are then always the same."""
    genie = tiny_genie(gm, maskgit_steps=4, temperature=0.0, order_noise=100.0,
                       mask_schedule=schedule)
    passes = replace_logits(genie.dynamics, lambda i: F.one_hot(torch.arange(16) % 8, 8) * 2.0)
    for seed in range(2):
        genie.dynamics.sample(None, torch.zeros(1, 4), genie.config, gm.seeded(seed))
    assert (passes[1] != passes[5]).any()


@pytest.mark.maskgit
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_is_that_of_a_softmax(temperature, gm=genie_mini):
    """Failing means that the temperature changes nothing, or something else: 32,000 draws do not
    follow softmax(logits / T)."""
    genie = tiny_genie(gm, maskgit_steps=1, temperature=temperature)
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 1.5, -2.0, 0.0])
    replace_logits(genie.dynamics, lambda i: logits)
    tokens = genie.dynamics.sample(None, torch.zeros(2000, 4), genie.config, gm.seeded(0))
    share = torch.bincount(tokens.flatten(), minlength=8) / tokens.numel()
    assert close(share, (logits / temperature).softmax(0), 0.012)      # 4 standard deviations


@pytest.mark.maskgit
def test_sampling_follows_the_seed(gm=genie_mini):
    """Failing means that play cannot be repeated, or that at temperature 0 chance still rules."""
    for temperature, alike in ((0.0, True), (1.0, False)):
        genie = tiny_genie(gm, temperature=temperature, order_noise=0.0)
        past, action = one_frame_past(gm, genie), torch.randn(2, 4, generator=gm.seeded(1))
        first, again, other = (genie.dynamics.sample(past, action, genie.config, gm.seeded(seed))
                               for seed in (1, 1, 2))
        assert (first == again).all(), "the same seed must give the same frame"
        assert bool((first == other).all()) == alike, f"temperature {temperature}"


# --- the cache is exact, and play is pure ---------------------------------------------------


@pytest.mark.attention
@torch.no_grad()
def test_cached_dynamics_equals_uncached(gm=genie_mini):
    """Failing means that play computes something else than what was trained.

    The first 3 of 16 frames go in at once; each other is refined with a mask (not kept) and added.
    """
    model = tiny_genie(gm, dyn_fold=2).dynamics
    tokens, actions = torch.randint(8, (2, 16, 16)), torch.randn(2, 16, 4)
    visible = torch.zeros_like(tokens, dtype=torch.bool)
    whole, _ = model(tokens, visible, actions)
    logits, past = model(tokens[:, :3], visible[:, :3], actions[:, :3])
    assert close(logits, whole[:, :3])
    for t in range(3, 16):
        now = slice(t, t + 1)
        masked = visible[:, :t + 1].clone()
        masked[:, t] = True
        expected = model(tokens[:, :t + 1], masked, actions[:, :t + 1])[0][:, now]
        refined, _ = model(tokens[:, now], masked[:, now], actions[:, now], past)
        assert close(refined, expected), t
        logits, past = model(tokens[:, now], visible[:, now], actions[:, now], past)
        assert close(logits, whole[:, now]), t


@pytest.mark.parametrize("attention", [False, True])
@torch.no_grad()
def test_cached_decoder_equals_uncached(attention, gm=genie_mini):
    """Failing means that frames look different in play than when decoded all at once."""
    tokenizer = tiny_genie(gm, tok_attention=attention, tok_layers=2).tokenizer
    quantized, past = torch.randn(1, 16, 16, 4), None
    whole, _ = tokenizer.decode(quantized)
    for t in range(16):
        drawn, past = tokenizer.decode(quantized[:, t:t + 1], past)
        assert close(drawn, whole[:, t:t + 1]), t


@torch.no_grad()
def test_refining_leaves_the_cache_alone(gm=genie_mini):
    """Failing means that half-finished frames are remembered as if they had been seen."""
    genie = tiny_genie(gm)
    past = one_frame_past(gm, genie)
    before = [(k.clone(), v.clone()) for k, v in past]
    genie.dynamics.sample(past, torch.randn(2, 4), genie.config, gm.seeded(0))
    for (k, v), (old_k, old_v) in zip(past, before):
        assert k.shape == old_k.shape and (k == old_k).all() and (v == old_v).all()


def test_step_leaves_the_old_state_alone(gm=genie_mini):
    """Failing means that trying one button changes what the next one does from the same moment."""
    genie = tiny_genie(gm)
    state = genie.start(random_frames(2))
    first, later = genie.step(state, 3, gm.seeded(0))
    genie.step(state, 5, gm.seeded(1))
    again, _ = genie.step(state, 3, gm.seeded(0))
    assert (first == again).all()
    for memory in ("dynamics", "decoder"):
        lengths = [getattr(s, memory)[0][0].shape[2] for s in (state, later)]
        assert lengths == [1, 2], memory


@pytest.mark.parametrize("T", [2, 3, 4, 16])
@torch.no_grad()
def test_long_play_stays_within_what_was_trained(T, gm=genie_mini):
    """Failing means that play breaks down or slows down in time, sees times which no training clip
    had, or draws something else than the uncached passes over what it remembers.

    What is remembered is a clip like those of training: at most dyn_frames with the new frame, and
    no action led to its first one.
    """
    genie = tiny_genie(gm, dyn_frames=T, temperature=0.0, order_noise=0.0, maskgit_steps=1)
    state, lengths = genie.start(random_frames(2)), []
    for t in range(40):
        assert state.tokens.shape[1] < T, "it remembers more than it was trained on"
        before, button = state, t % 8
        latent = genie.lam.quantizer.codebook[button].expand(2, 1, 4)
        frame, state = genie.step(before, button, gm.seeded(t))
        lengths.append(state.tokens.shape[1])
        assert all(k.shape[2] == lengths[-1] for k, _ in state.dynamics)
        assert (state.actions[:, 0] == 0).all()
        assert lengths[-1] == 1 or (state.actions[:, -1:] == latent).all()
        tokens = torch.cat([before.tokens, before.tokens[:, :1]], dim=1)
        masked = torch.zeros_like(tokens, dtype=torch.bool)
        masked[:, -1] = True
        logits, _ = genie.dynamics(tokens, masked, torch.cat([before.actions, latent], dim=1))
        clip = torch.cat([before.tokens, logits[:, -1:].argmax(-1)], dim=1)
        assert (state.tokens == clip[:, -lengths[-1]:]).all(), t
        logits, _ = genie.tokenizer.decode(genie.tokenizer.quantizer.codebook[state.tokens])
        assert frame.shape == (2, 64, 64) and frame.dtype == torch.uint8
        assert (frame == (logits[:, -1] > 0)).all(), t
    assert max(lengths) == T - 1 and min(lengths[T:]) == T // 2, "the newer half is kept"


def test_batched_play_equals_playing_alone(gm=genie_mini):
    """Failing means that worlds played side by side leak into each other."""
    genie = tiny_genie(gm, temperature=0.0, maskgit_steps=1)    # no order to tip by rounding
    first, actions = random_frames(3), torch.randint(8, (3, 5))
    together = genie.rollout(first, actions, gm.seeded(0))
    for i in range(3):
        alone = genie.rollout(first[i:i + 1], actions[i:i + 1], gm.seeded(0))[0]
        assert (together[i] == alone).all()
    genie, calls = tiny_genie(gm, maskgit_steps=3), []                  # and with an order, each
    forward = genie.dynamics.forward                                    # pass from the same tokens

    def recorded(*given):
        calls.append((given, forward(*given)))
        return calls[-1][1]
    genie.dynamics.forward = recorded
    genie.rollout(first, actions, gm.seeded(0))
    assert len(calls) == 1 + 5 * 4                                      # 3 passes, and to remember
    for (tokens, masked, led, past), (logits, _) in calls:
        for i in range(3):
            own = past and [[x.unflatten(0, (3, -1))[i] for x in kv] for kv in past]
            alone, _ = forward(tokens[i:i + 1], masked[i:i + 1], led[i:i + 1], own)
            assert close(alone[0], logits[i], 1e-5)


@pytest.mark.parametrize("T, known", [(2, 1), (4, 3), (16, 5)])
@torch.no_grad()
def test_play_may_start_after_a_clip(T, known, gm=genie_mini):
    """Failing means that what came before the first frame of a dream is not remembered as training
    saw it: as many frames as fit, with the actions that led from one to the next."""
    genie, clip = tiny_genie(gm, dyn_frames=T), random_frames(2, 5)
    state = genie.start(clip)
    tokens, latents = genie.tokenizer.encode(clip[:, -known:])[1], genie.lam.encode(clip)[0]
    assert (state.tokens == tokens).all() and (state.actions[:, 0] == 0).all()
    assert known == 1 or close(state.actions[:, 1], genie.lam.encode(clip[:, -known:])[0][:, 0])
    assert known < 5 or close(state.actions[:, 1:], latents)
    _, expected = genie.remember(tokens, state.actions)
    assert all(close(a, b) for x, y in zip(state.dynamics, expected.dynamics) for a, b in zip(x, y))


@torch.no_grad()
def test_play_starts_as_training_does(gm=genie_mini):
    """Failing means that the first frame is remembered with an action; nothing led to it."""
    genie, frames = tiny_genie(gm), random_frames(2)
    tokens = genie.tokenizer.encode(frames[:, None])[1]
    past = genie.dynamics(tokens, tokens < 0, torch.zeros(2, 1, 4))[1]
    state = genie.start(frames)
    for (k, v), (other_k, other_v) in zip(state.dynamics, past):
        assert close(k, other_k) and close(v, other_v)


def test_play_follows_the_inference_pipeline(gm=genie_mini):
    """Failing means that play puts the parts together in another way than training does.

    What step draws must be what the whole-clip forward passes give for the same tokens: button a is
    row a of the LAM's codebook, added at the new frame; the tokens are decoded in the same context.
    """
    genie = tiny_genie(gm, temperature=0.0, order_noise=0.0, maskgit_steps=1, dyn_frames=16)
    first, buttons = random_frames(1), [3, 0, 5]
    tokens = genie.tokenizer.encode(first[:, None])[1]                  # (1, 1, N)
    latents = torch.zeros(1, 1, 4)
    played = genie.rollout(first, torch.tensor([buttons]), gm.seeded(0))
    for t, button in enumerate(buttons):
        latents = torch.cat([latents, genie.lam.quantizer.codebook[button].view(1, 1, 4)], dim=1)
        tokens = torch.cat([tokens, torch.zeros_like(tokens[:, :1])], dim=1)
        masked = torch.zeros_like(tokens, dtype=torch.bool)
        masked[:, -1] = True
        tokens[:, -1] = genie.dynamics(tokens, masked, latents)[0][:, -1].argmax(-1)
        decoded = genie.tokenizer.decode(genie.tokenizer.quantizer.codebook[tokens])[0] > 0
        assert (played[:, t] == decoded[:, -1]).all(), t


def test_a_sketch_is_what_one_pass_gives(gm=genie_mini):
    """Failing means that the small pictures under the game show another past or another button than
    is played, or that to look at them changes the game."""
    genie = tiny_genie(gm, temperature=0.0, order_noise=0.0, maskgit_steps=1, dyn_frames=16)
    state = genie.start(random_frames(1))
    for button in (3, 1):
        state = genie.step(state, button, gm.seeded(0))[1]
        kept = [k.shape for k, _ in state.decoder]
        sketches = genie.sketch(state.copies(3), [0, 1, 2], gm.seeded(0))
        for a in range(3):
            assert (sketches[a] == genie.step(state, a, gm.seeded(0))[0][0]).all()
        assert (genie.sketch(state, [1], gm.seeded(0))[0] == sketches[1]).all()
        assert [k.shape for k, _ in state.decoder] == kept
    genie.config.maskgit_steps = 10
    forward, calls = genie.dynamics.forward, []
    genie.dynamics.forward = lambda *args, **kw: calls.append(1) or forward(*args, **kw)
    assert (genie.sketch(state.copies(3), [0, 1, 2], gm.seeded(0)) == sketches).all()
    assert len(calls) == 1


# --- the dynamics model's training: actions, masks, targets -----------------------------------


def test_action_t_leads_to_frame_t_plus_1(gm=genie_mini):
    """Failing means that in training the action is off by one frame: buttons would answer late.

    Frames 1..4 come finished, then 2..5 masked; nothing led to frame 1."""
    model, tokens = tiny_genie(gm).dynamics, torch.randint(8, (2, 5, 16))
    given, seen = torch.randn(2, 4, 4), []
    forward = model.forward
    model.forward = lambda x, hidden, led, **kw: seen.append(led) or forward(x, hidden, led, **kw)
    model.loss(tokens, given, model.random_mask(2, 4, gm.seeded(0)))
    assert (seen[0] == torch.cat([torch.zeros(2, 1, 4), given[:, :3], given], dim=1)).all()


def test_masked_tokens_are_not_looked_at(gm=genie_mini):
    """Failing means that the answer is in view in training: the loss would fall to 0 at once."""
    model = tiny_genie(gm, dyn_fold=2).dynamics
    tokens, other = torch.randint(8, (2, 2, 5, 16))
    masked, actions = torch.rand(2, 5, 16) < 0.5, torch.randn(2, 5, 4)
    logits, _ = model(tokens, masked, actions)
    assert (model(torch.where(masked, other, tokens), masked, actions)[0] == logits).all()
    assert not close(model(torch.where(masked, tokens, other), masked, actions)[0], logits)


def test_loss_is_that_of_the_masked_tokens(gm=genie_mini):
    """Failing means that the model is paid for copying visible tokens, or for naming the mask; that
    a masked frame sees itself or a later one finished (the answer), or a past other than at play.

    Worked out anew, a frame at a time as at play: -log p(true token) given all finished frames
    before it, over the masked tokens only, divided by how many are masked on average, 3/4.
    """
    model, tokens = tiny_genie(gm).dynamics, torch.randint(8, (3, 5, 16))
    actions, masked, costs = torch.randn(3, 4, 4), model.random_mask(3, 4, gm.seeded(1)), []
    led = torch.cat([torch.zeros(3, 1, 4), actions], dim=1)
    for t in range(1, 5):
        hidden = torch.zeros(3, t + 1, 16, dtype=torch.bool)
        hidden[:, t] = masked[:, t - 1]
        likely = model(tokens[:, :t + 1], hidden, led[:, :t + 1])[0][:, t].log_softmax(-1)
        costs += [-likely[b, n, tokens[b, t, n]].item() for b, n in hidden[:, t].nonzero().tolist()]
    assert 100 < len(costs) < 192
    expected = sum(costs) / (0.75 * 192)
    assert model.loss(tokens, actions, masked).item() == pytest.approx(expected)


@pytest.mark.mask
def test_random_mask(gm=genie_mini):
    """Failing means that the masking rate is not the card's: evenly drawn from 0.5 to 1, here for
    each frame, and each token masked with that probability."""
    model = gm.DynamicsModel(tiny(gm, tok_patch=4))
    masked = model.random_mask(200, 4, gm.seeded(0))                    # 256 tokens a frame
    assert masked.shape == (200, 4, 256)
    rates = masked.float().mean(2)                                      # (200, 4)
    assert rates.min() > 0.4 and rates.min() < 0.55 and rates.max() > 0.95
    assert abs(rates.mean() - 0.75) < 0.03 and abs(rates.var() - 0.5 ** 2 / 12) < 0.005
    for within in (rates.var(dim=0), rates.var(dim=1).mean()):          # a rate for each frame
        assert (within > 0.015).all()
    a, b = (model.random_mask(1, 1, gm.seeded(seed)) for seed in (1, 2))
    assert (a & ~b).any() and (b & ~a).any(), "the same coins, whatever the generator"


# --- patches, folding, positions ------------------------------------------------------------


@pytest.mark.patchify
def test_patchify_by_hand(gm=genie_mini):
    """Failing means that patches are cut or numbered in another order: row by row."""
    frame = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])
    patches = gm.patchify(frame[None, None], 2)
    assert patches[0, 0].tolist() == [[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]


@pytest.mark.patchify
@pytest.mark.parametrize("patch", [1, 4, 8, 64])
def test_unpatchify_is_the_inverse(patch, gm=genie_mini):
    """Failing means that pictures come out scrambled."""
    frames = torch.arange(2 * 3 * 64 * 64).view(2, 3, 64, 64)
    assert (gm.unpatchify(gm.patchify(frames, patch), patch) == frames).all()


@pytest.mark.parametrize("fold", [1, 2, 4])
def test_folding_keeps_tokens_in_their_places(fold, gm=genie_mini):
    """Failing means that with dyn_fold the logits of one token come out at another's place.

    Weights that copy each token to its own logits: the likeliest token must be the token itself.
    """
    places = fold ** 2
    model = gm.DynamicsModel(tiny(gm, dyn_fold=fold, dyn_dim=8 * places))
    model.transformer = Copy()
    with torch.no_grad():
        model.embed.weight.zero_()
        for place in range(places):
            for code in range(8):
                model.embed.weight[place * 9 + code, place * 8 + code] = 1
        model.to_logits.weight.copy_(torch.eye(8 * places))
        model.to_logits.bias.zero_()
    tokens = torch.randint(8, (2, 3, 16), generator=gm.seeded(0))
    visible = torch.zeros_like(tokens, dtype=torch.bool)
    assert (model(tokens, visible, torch.zeros(2, 3, 4))[0].argmax(-1) == tokens).all()


def test_folded_tokens_are_neighbours(gm=genie_mini):
    """Failing means that a transformer position holds tokens from far apart in the picture."""
    model = gm.DynamicsModel(tiny(gm, dyn_fold=2))
    model.transformer = Copy()
    tokens = torch.zeros(1, 1, 16, dtype=torch.long)
    other, visible = tokens.clone(), torch.zeros_like(tokens, dtype=torch.bool)
    other[0, 0, 6] = 5                                                  # row 1, column 2 of 4 x 4
    changes = (model(tokens, visible, torch.zeros(1, 1, 4))[0]
               - model(other, visible, torch.zeros(1, 1, 4))[0]).abs().amax(-1).flatten()
    assert changes.gt(1e-6).nonzero().flatten().tolist() == [2, 3, 6, 7]


@pytest.mark.attention
def test_rotary_scores_depend_on_the_difference(gm=genie_mini):
    """Failing means that what is learned at one place or time does not hold at another, and that
    play past 16 frames would be at times never seen in training."""
    q, k = torch.randn(2, 8, generator=gm.seeded(0))
    table = gm.rotary(torch.arange(40), 4)                              # (40, 4)
    scores = gm.rotate(q.expand(40, 8), table) @ gm.rotate(k.expand(40, 8), table).T
    for step in range(-12, 13):
        along = scores.diagonal(step)
        assert close(along, along[0].expand_as(along), 1e-4), step
    assert scores[20].std() > 0.1, "and they must depend on the difference"
    lengths = gm.rotate(q.expand(40, 8), table).norm(dim=1)
    assert close(lengths, q.norm().expand(40)), "a rotation keeps the length"


@pytest.mark.attention
def test_rotation_by_hand(gm=genie_mini):
    """Failing means that a pair of channels is not rotated by position times frequency.

    Two pairs, of frequencies pi and pi / 16, at position 3: by 3 pi and 3 pi / 16.
    """
    x, (c, s) = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), (math.cos(3 * math.pi / 16),
                                                       math.sin(3 * math.pi / 16))
    table, expected = gm.rotary(torch.tensor([3]), 2), [-1, -2, 3 * c - 4 * s, 3 * s + 4 * c]
    assert close(gm.rotate(x, table), torch.tensor([expected]))
    assert gm.rotate(x.bfloat16(), table).dtype == torch.bfloat16


@pytest.mark.attention
@torch.no_grad()
def test_time_attention_by_hand(gm=genie_mini):
    """Failing means that time attention is no longer softmax(q k / sqrt(e)) v over the past.

    One patch, one head of 8 channels, 5 frames: frame t sees the frames up to t.
    """
    table = gm.rotary(torch.arange(5), 4)
    layer, x = gm.Attention(8, 1, table, causal=True), torch.randn(1, 5, 8)
    q, k, v = layer.qkv(x[0]).chunk(3, dim=-1)                          # each (T, e)
    q, k = gm.rotate(q, table), gm.rotate(k, table)
    y, kept = layer(x)
    assert close(kept[0][0, 0], k) and close(kept[1][0, 0], v), "what a cache remembers"
    for t in range(5):
        seen = slice(t + 1)
        share = (k[seen] @ q[t] / math.sqrt(8)).softmax(0)
        assert close(y[0, t], layer.out(share @ v[seen])), t


@pytest.mark.attention
@torch.no_grad()
def test_space_attention_by_hand(gm=genie_mini):
    """Failing means that space attention is no longer softmax(q k / sqrt(e)) v over one frame.

    A frame of 2x2 patches, two heads of 4 channels; the first half of a head's channel pairs
    rotates with the row, the other with the column.
    """
    layer, x = gm.STBlock(8, 2, 2).space, torch.randn(1, 4, 8)
    heads, rows, cols = [], torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    table = torch.cat([gm.rotary(rows, 1), gm.rotary(cols, 1)], dim=-1)
    for q, k, v in zip(*(part.chunk(2, dim=1) for part in layer.qkv(x[0]).chunk(3, dim=1))):
        scores = gm.rotate(q, table) @ gm.rotate(k, table).T / math.sqrt(4)    # (N, N)
        heads.append(scores.softmax(1) @ v)
    assert close(layer(x)[0][0], layer.out(torch.cat(heads, dim=1)))


@pytest.mark.attention
@torch.no_grad()
def test_block_adds_space_then_time_then_channels(gm=genie_mini):
    """Failing means that a block loses a residual connection or mixes up space and time: with one
    left out the shipped world had 1,762 wrong pixels."""
    block, x = gm.STBlock(8, 2, 2), torch.randn(2, 3, 4, 8)             # (B, T, N, D)
    y = x + torch.stack([block.space(block.norm_space(x[:, t]))[0] for t in range(3)], dim=1)
    y = y + torch.stack([block.time(block.norm_time(y[:, :, n]))[0] for n in range(4)], dim=2)
    y = y + block.ffn(block.norm_ffn(y))
    assert close(block(x)[0], y)


def spatial_scores(gm, dim, heads, side):
    """The attention scores (h, N, N) of a new layer for blank content."""
    layer = gm.STBlock(dim, heads, side).space
    qkv = layer.qkv(torch.zeros(side * side, dim)).view(-1, 3, heads, dim // heads)
    q, k, _ = qkv.permute(1, 2, 0, 3)                                   # each (h, N, e)
    scores = gm.rotate(q, layer.table) @ gm.rotate(k, layer.table).transpose(1, 2)
    return scores.detach() / math.sqrt(dim // heads)


@pytest.mark.attention
@pytest.mark.parametrize("dim, heads, side", [(64, 4, 16), (128, 4, 8), (32, 2, 16)])
def test_heads_start_on_their_neighbours(dim, heads, side, gm=genie_mini):
    """Failing means that heads start on nothing, or at the wrong neighbour."""
    scores = spatial_scores(gm, dim, heads, side)
    steps = [(-1, 0), (1, 0), (0, -1), (0, 1)]                          # up, down, left, right
    for head in range(heads):
        for row, column in ((1, 1), (3, 5), (side - 2, side - 2)):
            best = divmod(int(scores[head, row * side + column].argmax()), side)
            assert best == (row + steps[head][0], column + steps[head][1]), (head, row, column)


# --- precision and kernels ------------------------------------------------------------------


@pytest.mark.parametrize("device, precision, capability, expected", [
    ("cuda", "auto", (8, 0), torch.bfloat16), ("cuda", "auto", (7, 5), torch.float32),
    ("cuda", "float32", (8, 0), torch.float32), ("cpu", "auto", (8, 0), torch.float32),
    ("mps", "auto", (9, 0), torch.float32), ("cpu", "bfloat16", (7, 5), torch.bfloat16)])
def test_precision_is_what_the_device_is_good_at(device, precision, capability, expected,
                                                 monkeypatch, gm=genie_mini):
    """Failing means that training takes bfloat16 where it is slow, or float32 where it need not."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert gm.compute_dtype(precision, torch.device(device)) == expected


@pytest.mark.parametrize("draw", ["step", "sketch"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_play_computes_in_its_precision(draw, precision, gm=genie_mini):
    """Failing means that play ignores --precision: `full` is then half as fast as it could be."""
    genie, seen = tiny_genie(gm, precision=precision), []
    for linear in (genie.dynamics.to_logits, genie.tokenizer.to_pixels):
        linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    state = genie.start(random_frames(1, 1, 1)[0][0, 0])
    seen.clear()                                         # the first frame is always in float32
    getattr(genie, draw)(state, torch.tensor([1]), gm.seeded(0))
    assert len(seen) > 1 and set(seen) == {getattr(torch, precision)}


def test_codebook_is_float32_under_autocast(demo_file, tmp_path, gm=genie_mini):
    """Failing means that bfloat16, with its 8 bits, decides which code is nearest, or is what a
    codebook's slow moving averages are kept in: they would stop moving."""
    trainer = tiny_trainer(gm, demo_file, tmp_path, stage=1, precision="bfloat16", batch=8)
    quantizer, seen = trainer.genie.lam.quantizer, []
    update = quantizer.update
    quantizer.update = lambda *rest: seen.extend(quantizer.seen) or update(*rest)
    assert trainer.forward(trainer.micro_batches(gm.seeded(0))[0])[0].dtype == torch.float32
    quantizer.seen = []
    trainer.optimizer_step()                             # the codebook starts
    for trainer.step in range(1, 9):                     # enough vectors for some to lie between
        before = weights_of(quantizer)
        seen.clear()
        trainer.optimizer_step()
        (z, indices), = seen
        assert before["started"] and z.dtype == torch.float32
        distances = (z.double()[:, None] - before["codebook"].double()).pow(2).sum(-1)
        chosen = distances.gather(1, indices[:, None])[:, 0]
        assert (chosen - distances.min(1).values).max() < 1e-6
        total = torch.zeros(8, 4).index_add(0, indices, z)
        used = indices.unique()
        expected = 0.99 * before["ema_sum"] + 0.01 * total
        assert close(quantizer.ema_sum[used], expected[used], 1e-6)


def test_float_operations_are_counted(bench=bench, gm=genie_mini):
    """Failing means that the counter overlooks a part of the model: what bench calls a share of the
    peak is then too small."""
    layer, x = gm.STBlock(16, 2, 9).space, torch.randn(6, 81, 16)
    assert bench.count_flops(lambda: layer(x)) == 6 * (81 * 16 * (48 + 16) + 2 * 81 * 81 * 16) * 2


def test_bench_counts_as_many_passes_on_both_sides(gm=genie_mini):
    """Failing means that play with the cache is timed over fewer MaskGIT passes than play without:
    the cache then looks better than it is."""
    smoke = {**gm.PRESETS["smoke"], "maskgit_steps": 10}
    cosine, other = (bench.bench_play(gm.Config(**smoke, mask_schedule=name), torch.device("cpu"))
                     for name in ("cosine", "adaptive"))
    assert cosine["gflop"] == other["gflop"]


def test_bench_plays_a_whole_turn_of_the_memory(monkeypatch, bench=bench, gm=genie_mini):
    """Failing means that bench leaves out the step that begins the memory anew, or times it alone:
    play is then slower, or faster, than it says."""
    remembered, observe = [], gm.Genie.observe
    monkeypatch.setattr(gm.Genie, "observe", lambda genie, state, *rest: remembered.append(
        state.tokens.shape[1]) or observe(genie, state, *rest))
    monkeypatch.setattr(bench, "timed", lambda _, cached, *__, repeats: cached()
                        or np.array([[6.0, 1.0, 1.0]]))
    config = gm.Config(**{**gm.PRESETS["smoke"], "dyn_frames": 6})
    result = bench.bench_play(config, torch.device("cpu"))              # 3 frames in 1 s, or in 6
    assert (result["fps"], result["fps_uncached"], result["speedup"]) == (3, 0.5, 6)
    assert remembered == [3, 4, 5] * 2, "once to time it, once to count its float operations"


def test_bench_knows_the_baseline_from_the_step(monkeypatch, bench=bench, gm=genie_mini):
    """Failing means that bench takes the baseline of training for the step, or the other way."""
    kinds, written_out = [], bench.written_out
    monkeypatch.setattr(bench, "written_out",
                        lambda work: kinds.append("written out") or written_out(work))

    def timed(*works):
        for work in works[:2]:
            work()
            kinds.append("done")
        return np.array([[2.0, 1.0, 1.0]])

    monkeypatch.setattr(bench, "timed", timed)
    result = bench.bench_training(gm.Config(**gm.PRESETS["smoke"]), torch.device("cpu"))
    assert kinds[:3] == ["written out", "done", "done"], "the first is the baseline"
    assert {row["speedup_over_baseline"] for row in result.values()} == {2}


def test_share_of_the_peak_by_hand(bench=bench, gm=genie_mini):
    """Failing means that bench compares a speed with the peak of another round, or counts other
    float operations than its matrix product has."""
    product, its_flops = bench.matrix_product(torch.float32, torch.device("cpu"))
    assert bench.count_flops(product) == its_flops
    seconds, peak = np.array([1.0, 2.0, 4.0]), np.array([2.0, 1.0, 1.0])
    row = bench.rates("speed", 8, 1, seconds, peak)                     # shares 1/2, 1/2 and 1/4
    assert (row["mfu"], row["speed"], row["speed_range"]) == (0.5, 4, [2, 8])


def test_saved_bytes(gm=genie_mini):
    """Failing means that micro_batch auto miscounts what a step keeps in memory."""
    x = torch.zeros(1000, requires_grad=True)
    assert bench.saved_bytes(lambda: x.exp()) == 4000                   # its result
    assert bench.saved_bytes(lambda: x.exp().exp()) == 8000
    y = x.exp()
    assert bench.saved_bytes(lambda: y[:500] * y[500:]) == 4000         # two views of one storage


# --- training -------------------------------------------------------------------------------


def gradients(gm, data, out, stage, **changes):
    """All gradients of a first step, just before the optimizer uses them, and the Trainer."""
    trainer, kept = tiny_trainer(gm, data, out, stage, **changes), []
    trainer.optimizer.step = lambda: kept.extend(
        p.grad.clone() for model in trainer.models for p in model.parameters())
    trainer.optimizer_step()
    return kept, trainer


@pytest.mark.parametrize("stage", [0, 1])
def test_micro_batch_auto(demo_file, tmp_path, monkeypatch, stage, bench=bench, gm=genie_mini):
    """Failing means that micro_batch auto does not fit the memory it is given, cuts the batch where
    there is room for all of it, or changes the gradient."""
    monkeypatch.setattr("extras.bench.fitting_micro_batch", bench.fitting_micro_batch)
    whole, trainer = gradients(gm, demo_file, tmp_path, stage, micro_batch=0)
    assert trainer.micro == 8
    one = bench.saved_bytes(lambda: trainer.forward([t[:1] for t in trainer.micro_batches(
        gm.seeded(0))[0]]))
    for sequences, expected in ((3.9, 3), (2.5, 2), (0.5, 1)):          # 8 = 3 + 3 + 2
        monkeypatch.setattr(bench, "MEMORY_BUDGET", sequences * 1.5 * one)
        parts, trainer = gradients(gm, demo_file, tmp_path, stage, micro_batch=0)
        assert trainer.micro == expected
        assert all(close(a, b, 1e-6) for a, b in zip(whole, parts))


def weights_after_training(gm, data, out, stage, micro_batch):
    """Weights and codebooks after 4 steps in micro-batches of this size, and the last numbers."""
    trainer = tiny_trainer(gm, data, out, stage, micro_batch=micro_batch, lr=1e-4, min_lr=1e-4,
                           action_noise=0.3, dyn_layers=1)
    for trainer.step in range(4):
        numbers = trainer.optimizer_step()
    return weights_of(trainer.genie), numbers


@pytest.mark.parametrize("stage", [0, 1])
def test_micro_batches_equal_one_big_batch(demo_file, tmp_path, stage, gm=genie_mini):
    """Failing means that micro_batch, which should only save memory, changes what is learned."""
    whole, numbers = weights_after_training(gm, demo_file, tmp_path, stage, micro_batch=8)
    parts, others = weights_after_training(gm, demo_file, tmp_path, stage, micro_batch=2)
    part = ("tokenizer.", "lam.")[stage] + "quantizer.started"
    assert whole[part], "the codebook must be in use, or the test says little"
    for name in whole:
        assert close(whole[name].float(), parts[name].float(), 1e-5), name
    assert numbers == pytest.approx(others, rel=1e-3), "what is logged"


def test_losses_by_hand(gm=genie_mini):
    """Failing means that a part of a loss is missing, has another weight, or that the pixels are
    compared with those of another frame.

    The decoder's answer is set to the logit log 3 (probability 3/4 of white) everywhere.
    """
    genie, frames = tiny_genie(gm), random_frames(2, 4)
    for part in (genie.tokenizer, genie.lam):
        nn.init.zeros_(part.to_pixels.weight)
        nn.init.constant_(part.to_pixels.bias, math.log(3))
    tokens = genie.tokenizer.encode(frames)[1]
    noise = gm.world_noise(genie, frames, tokens, 0, gm.seeded(0))
    for result, white in ((gm.tokenizer_losses(genie, frames), frames),
                          (gm.world_losses(genie, frames, tokens, *noise), frames[:, 1:])):
        loss, numbers, _ = result
        share = white.float().mean().item()
        expected = -share * math.log(3 / 4) - (1 - share) * math.log(1 / 4)
        assert numbers["pixel_loss"].item() == pytest.approx(expected, rel=1e-5)
        assert numbers["commitment"] > 0
        assert loss.item() == pytest.approx(sum(numbers.values()).item())


def test_optimizer_is_the_one_asked_for(demo_file, tmp_path, gm=genie_mini):
    """Failing means that a setting of the optimizer is read and then forgotten."""
    trainer = tiny_trainer(gm, demo_file, tmp_path, beta2=0.7, lr=2e-3)
    trainer.step = 4
    row = trainer.optimizer_step()
    group, = trainer.optimizer.param_groups
    assert group["betas"] == (0.9, 0.7) and group["weight_decay"] == 1e-4
    rate = gm.learning_rate(4, trainer.c.tok_steps, trainer.c)
    assert group["lr"] == row["lr"] == rate
    assert isinstance(trainer.optimizer, torch.optim.AdamW)


def test_lam_is_done_after_its_steps(demo_file, tmp_path, gm=genie_mini):
    """Failing means that lam_steps does not end the LAM's training, ends the dynamics model's, too,
    or that the two do not follow a cosine of their own."""
    trainer = tiny_trainer(gm, demo_file, tmp_path, stage=1, lam_steps=3, dyn_steps=6, warmup=0,
                           lam_unquantized=0.4, lr=1e-2, min_lr=1e-3)
    for trainer.step in range(6):
        lam, dynamics = weights_of(trainer.genie.lam), weights_of(trainer.genie.dynamics)
        row = trainer.optimizer_step()
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        assert rates == [gm.learning_rate(trainer.step, total, trainer.c) for total in (3, 6)]
        assert row["lr"] == rates[1] and row["pixel_loss"] > 0
        for before, module in ((lam, trainer.genie.lam), (dynamics, trainer.genie.dynamics)):
            after = weights_of(module)
            moved = [name for name in after if not torch.equal(before[name], after[name])]
            assert bool(moved) == (module is trainer.genie.dynamics or trainer.step < 3), moved
    assert trainer.genie.lam.quantizer.started
    assert gm.Config(lam_steps=9, dyn_steps=6).lam_end == gm.Config(dyn_steps=6).lam_end == 6


def test_gradients_are_clipped(demo_file, tmp_path, gm=genie_mini):
    """Failing means that one odd batch can throw the weights far away."""
    trainer, norms = tiny_trainer(gm, demo_file, tmp_path), []
    trainer.losses = lambda *batch: tuple(
        x * 100 if i == 0 else x for i, x in enumerate(gm.tokenizer_losses(*batch)))
    trainer.optimizer.step = lambda: norms.append(torch.stack(
        [p.grad.norm() for p in trainer.genie.tokenizer.parameters()]).norm().item())
    row = trainer.optimizer_step()
    assert norms == [pytest.approx(1, rel=1e-3)] and row["grad_norm"] > 1


def test_quiet_steps_are_those_in_which_the_hero_stays(demo_file, gm=genie_mini):
    """Failing means that another button is put in the place of one that did something: the dynamics
    then learns that any button may do anything."""
    data = gm.Sequences(demo_file, "train")
    frames = data.frames(range(len(data)))
    changed = (frames[:, 1:] != frames[:, :-1]).sum((-2, -1)).numpy()
    quiet = changed <= gm.quiet_level(data)
    assert 0.1 <= quiet.mean() < 0.5 and (data.actions[quiet] == 0).all()


@pytest.mark.parametrize("noise", [0.0, 0.25, 1.0])
def test_action_noise(noise, gm=genie_mini):
    """Failing means that action_noise changes more or fewer actions than it says, or those of steps
    in which much changes, or to others than the last real one, or a code where there is none."""
    genie, given = tiny_genie(gm, action_noise=noise), []
    loss = genie.dynamics.loss
    genie.dynamics.loss = lambda tokens, actions, *rest: given.append(actions) or loss(
        tokens, actions, *rest)
    frames = random_frames(200, 3)[:, [0, 0, 1, 1, 1, 2]]               # steps 0, 2 and 3 are quiet
    tokens = genie.tokenizer.encode(frames)[1]
    shifts, source, masked = gm.world_noise(genie, frames, tokens, 0, gm.seeded(0))
    assert source.shape == (200, 5) and (source[:, [1, 4]] == torch.tensor([1, 4])).all()
    for step in (0, 2, 3):
        changed = (source[:, step] != step).float().mean().item()
        assert changed == pytest.approx(noise, abs=0.08), step
        assert step == 0 or set(source[:, step].tolist()) <= {1, step}, "held on to"
    codes = source[:, 0][source[:, 0] != 0] - 5
    assert noise == 0 or set(codes.tolist()) == set(range(8)), "any button"
    genie.lam.quantizer.ema_count[:] = torch.tensor([3.0, 1, 0, 0, 0, 0, 0, 0])
    usual = gm.world_noise(genie, frames, tokens, 0, gm.seeded(1))[1][:, 0]
    assert set(usual.unique().tolist()) <= {0, 5, 6}, "no code that is not in use"
    assert noise == 0 or 1.8 < (usual == 5).sum() / (usual == 6).sum() < 5, "as often as in use"
    with torch.no_grad():
        gm.world_losses(genie, frames, tokens, shifts, source, masked)
        inferred = genie.lam.encode(frames, shifts)[0]                  # (200, 5, L)
    for clip in range(200):
        choices = torch.cat([inferred[clip], genie.lam.quantizer.codebook])
        assert close(given[0][clip], choices[source[clip]])
    genie.lam.quantizer.started.fill_(False)
    source = gm.world_noise(genie, frames, tokens, 0, gm.seeded(0))[1]
    assert (source == torch.arange(5)).all(), "before the codebook starts there are no codes"


@pytest.mark.parametrize("at_once", [1, 4])
def test_tokens_are_computed_once(at_once, demo_file, tmp_path, gm=genie_mini):
    """Failing means that stage 2 learns from tokens that are not those of its frames, or encodes
    sequences again, or ones that it never draws: `full` then does nothing else for an hour."""
    trainer, given, encoded = tiny_trainer(gm, demo_file, tmp_path, stage=1, dyn_frames=3), [], []
    trainer.genie.tokenizer.quantizer.codebook.normal_(generator=gm.seeded(1))
    loss, encode = trainer.genie.dynamics.loss, trainer.genie.tokenizer.encode
    trainer.genie.dynamics.loss = lambda tokens, *rest: given.append(tokens) or loss(tokens, *rest)
    trainer.genie.tokenizer.encode = lambda x: encoded.append(len(x)) or encode(x)
    trainer.step, trainer.encoded_at_once = 5, at_once
    trainer.optimizer_step()
    trainer.optimizer_step()
    picks, first = trainer.train_set.draw(0, 1, 5, 8, 3)
    blocks = {pick // at_once for pick in picks}
    wanted = [i for i in range(len(trainer.train_set)) if i // at_once in blocks]
    assert len(encoded) == len(blocks) and sum(encoded) == len(wanted)
    assert at_once > 1 or len(wanted) == len(set(picks)) < len(trainer.train_set)
    whole = trainer.genie.tokenizer.encode(trainer.train_set.frames(picks))[1]
    assert first > 0 and (given[0] == whole[:, first:first + 3]).all()
    assert len(given[0].unique()) > 1


def test_learning_rate(gm=genie_mini):
    """Failing means that the learning rate does not warm up, or does not follow the cosine."""
    c = tiny(gm, warmup=10, lr=1.0, min_lr=0.2)
    rate = [gm.learning_rate(step, 110, c) for step in range(110)]
    assert rate[0] == pytest.approx(0.1) and rate[4] == pytest.approx(0.5)
    assert rate[9] == rate[10] == pytest.approx(1.0)
    assert rate[35] == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert rate[60] == pytest.approx(0.6) and rate[109] == pytest.approx(0.2, abs=1e-3)
    assert rate[10:] == sorted(rate[10:], reverse=True)
    c.min_lr = c.lr                                                     # as on the card: flat
    assert {gm.learning_rate(step, 110, c) for step in range(9, 110)} == {1.0}
    c.warmup = 0
    assert gm.learning_rate(0, 1, c) == 1.0


def picks_of(data, seed, stage, step, size=7, length=4):
    """The (sequence numbers, first frame) that a training step would use."""
    return data.draw(seed, stage, step, size, length)


def test_each_epoch_visits_each_sequence_once(demo_file, gm=genie_mini):
    """Failing means that some sequences are trained on more than others."""
    data = gm.Sequences(demo_file, "train")
    S = len(data)                                                       # no multiple of 7 needed
    order = sum((picks_of(data, 0, 0, step)[0] for step in range(2 * S)), [])
    assert len(order) == 7 * 2 * S
    epochs = [order[i:i + S] for i in range(0, len(order), S)]
    assert all(sorted(epoch) == list(range(S)) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != list(range(S))


def test_a_batch_depends_on_seed_stage_and_step_alone(demo_file, gm=genie_mini):
    """Failing means that a resumed run would see other data than an uninterrupted one."""
    one, two = gm.Sequences(demo_file, "train"), gm.Sequences(demo_file, "train")
    steps = [picks_of(one, 5, 1, step) for step in range(12)]
    torch.manual_seed(99)
    assert [picks_of(two, 5, 1, step) for step in reversed(range(12))] == steps[::-1]
    assert picks_of(two, 6, 1, 9) != steps[9] != picks_of(two, 5, 0, 9)
    assert {first for _, first in steps} <= set(range(13)) and len({f for _, f in steps}) > 3
    assert picks_of(two, 5, 1, 9, length=16)[1] == 0


def test_frames_are_those_of_the_file(demo_file, gm=genie_mini):
    """Failing means that the model is trained on other pictures than the file holds."""
    loaded, data = files.load_split(demo_file, "val"), gm.Sequences(demo_file, "val")
    frames = data.frames([2, 0], first=3, length=5)
    assert frames.shape == (2, 5, 64, 64) and frames.dtype == torch.uint8
    assert (frames.numpy() == files.unpack(loaded["bits"])[[2, 0], 3:8]).all()


def test_gradients_stay_where_they_belong(gm=genie_mini):
    """Failing means that the dynamics model bends the actions to its own needs (the paper stops
    that gradient), that the tokenizer still moves in stage 2, or that the LAM's encoder learns
    nothing."""
    genie = tiny_genie(gm).train()
    genie.tokenizer.eval()
    frames = random_frames(2, 4)
    with torch.no_grad():
        tokens = genie.tokenizer.encode(frames)[1]
    noise = gm.world_noise(genie, frames, tokens, 0, gm.seeded(0))
    loss, numbers, _ = gm.world_losses(genie, frames, tokens, *noise)
    lam, tokenizer = list(genie.lam.parameters()), list(genie.tokenizer.parameters())
    grads = torch.autograd.grad(numbers["dynamics_loss"], lam, allow_unused=True, retain_graph=True)
    assert all(grad is None for grad in grads), "stop-gradient"
    grads = torch.autograd.grad(loss, tokenizer, allow_unused=True, retain_graph=True)
    assert all(grad is None for grad in grads), "frozen"
    numbers["pixel_loss"].backward()
    assert genie.lam.embed.weight.grad.abs().max() > 0, "the pixel loss must reach the encoder"


def test_stage_2_leaves_the_tokenizer_alone(demo_file, tmp_path, gm=genie_mini):
    """Failing means that the tokens change their meaning while the dynamics model learns them."""
    trainer = tiny_trainer(gm, demo_file, tmp_path)
    for trainer.step in range(4):
        trainer.optimizer_step()
    before = weights_of(trainer.genie)
    assert before["tokenizer.quantizer.started"]
    trainer.enter_stage(1)
    for trainer.step in range(3):
        trainer.optimizer_step()
    after = weights_of(trainer.genie)
    moved = {name.split(".")[0] for name in after if (after[name] != before[name]).any()}
    assert moved == {"lam", "dynamics"}
    assert trainer.genie.tokenizer.quantizer.seen == [], "memory would grow with every step"


def test_lam_sees_rolled_clips(gm=genie_mini):
    """Failing means that the rolled view does nothing, tears the frames of a clip apart or patches
    of the tokenizer, or is on in the paper's reading, too.

    Given shifts, the encoder must see just what it would see in clips rolled beforehand.
    """
    lam, frames = tiny_genie(gm).lam, random_frames(2, 4)
    lam.quantizer.started.fill_(False)
    rolled = torch.stack([frames[0].roll((5, 60), (1, 2)), frames[1].roll((16, 0), (1, 2))])
    seen = lam.encode(frames, torch.tensor([[5, 60], [16, 0]]))[0]
    assert close(seen, lam.encode(rolled)[0]) and not close(seen, lam.encode(frames)[0])
    assert (lam.encode(frames, torch.zeros(2, 2, dtype=int))[0] == lam.encode(frames)[0]).all()
    for view in ("change", "frames"):
        genie = tiny_genie(gm, lam_view=view)
        shifts = gm.world_noise(genie, random_frames(50, 4),
                                torch.zeros(50, 4, 16, dtype=torch.long), 0, gm.seeded(0))[0]
        expected = range(0, 64, genie.config.tok_patch) if view == "change" else [0]
        assert shifts.shape == (50, 2) and set(shifts.unique().tolist()) == set(expected)


class Killed(Exception):
    """Stands in for a power cut."""


TINY_RUN = dict(tok_steps=6, dyn_steps=6, val_every=4, dyn_layers=1, maskgit_steps=2,
                lam_steps=4, min_lr=1e-4)


def run_of(gm, data, out, interrupt=None, how="stop"):
    """Train a tiny run, interrupted at (stage, step) and then resumed. Returns its results."""
    trainer = tiny_trainer(gm, data, out, **TINY_RUN)
    one_step = trainer.optimizer_step

    def interrupted_step():
        if (trainer.stage, trainer.step + 1) == interrupt:
            trainer.stop = True                                         # as Ctrl-C does
            if how == "crash":
                raise Killed
        return one_step()

    trainer.optimizer_step = interrupted_step
    try:
        finished = trainer.run()
    except Killed:
        finished = False
    assert finished == (interrupt is None)
    if not finished:
        checkpoint = checkpoints.read_checkpoint(out / "checkpoint.pt")
        trainer = tiny_trainer(gm, data, out, **TINY_RUN)
        trainer.resume(checkpoint)
        assert trainer.run()
    return torch.load(out / "checkpoint.pt"), (out / "metrics.csv").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole_run(demo_file, tmp_path_factory):
    """The results of a tiny run that was never interrupted."""
    return run_of(genie_mini, demo_file, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("stage, step, how", [
    (0, 3, "stop"), (0, 6, "stop"), (1, 1, "crash"), (1, 1, "stop"), (1, 6, "crash")])
def test_resume_is_exact(demo_file, tmp_path, whole_run, monkeypatch, stage, step, how,
                         gm=genie_mini):
    """Failing means that a run which was interrupted ends elsewhere than one which was not.

    Ctrl-C finishes the step and saves; a crash goes back to the last checkpoint. Both must end with
    the same weights and the same log, to the last bit.
    """
    monkeypatch.setattr(genie_mini, "draw_curves", lambda *_: None)   # slow, and not compared
    again, other_log = run_of(gm, demo_file, tmp_path, (stage, step), how)
    whole, log = whole_run
    assert whole["stage"] == again["stage"] == 2
    for name in whole["model"]:
        assert (whole["model"][name] == again["model"][name]).all(), name
    assert log == other_log and log.count("\n") == 1 + 2 * 3            # steps 4, 5 and 6


KILLED = """
import os, sys
import genie_mini, test_genie_mini
from pathlib import Path
left, rename = int(sys.argv[2]), os.replace

def deadly(source, target):
    global left
    left -= Path(target).name == sys.argv[1]
    if left == 0:
        if Path(source).suffix == ".tmp":
            os.truncate(source, 1000)                   # it had got that far
        os._exit(9)                                     # as SIGKILL does: nothing is tidied up
    rename(source, target)

os.replace, test_genie_mini.genie_mini.draw_curves = deadly, lambda *_: None
test_genie_mini.run_of(genie_mini, sys.argv[3], Path(sys.argv[4]))
"""


@pytest.mark.parametrize("name, call", [("checkpoint.previous.pt", 1), ("checkpoint.pt", 3),
                                        ("checkpoint.previous.pt", 4)])
def test_a_killed_run_goes_on_exactly(demo_file, tmp_path, whole_run, monkeypatch, name, call,
                                      gm=genie_mini):
    """Failing means that a run which is killed while it writes a checkpoint is lost, or ends
    elsewhere. Killed while it writes its second; between the two stages, when the old one has been
    moved and the new one has not yet its name; and at the end of the second stage."""
    monkeypatch.setattr(genie_mini, "draw_curves", lambda *_: None)
    out = tmp_path / "run"
    killed = subprocess.run([sys.executable, "-c", KILLED, name, str(call), demo_file, out],
                            cwd=Path(__file__).parent, capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    checkpoint, used = checkpoints.newest_checkpoint(out / "checkpoint.pt")
    assert (used == out / "checkpoint.pt") == (name != "checkpoint.pt")
    trainer = tiny_trainer(gm, demo_file, out, **TINY_RUN)
    trainer.resume(checkpoint)
    assert trainer.run()
    whole, log = whole_run
    again = checkpoints.read_checkpoint(out / "checkpoint.pt")
    assert all((whole["model"][n] == again["model"][n]).all() for n in whole["model"])
    assert (out / "metrics.csv").read_text(encoding="utf-8") == log


def test_the_same_seed_gives_the_same_weights(demo_file, tmp_path, gm=genie_mini):
    """Failing means that a run cannot be repeated, or that its seed changes nothing."""
    made = []
    for seed in (1, 1, 2):
        trainer = tiny_trainer(gm, demo_file, tmp_path, stage=1, seed=seed)
        for trainer.step in range(3):
            trainer.optimizer_step()
        made.append(torch.cat([t.float().flatten() for t in weights_of(trainer.genie).values()]))
    assert (made[0] == made[1]).all() and (made[0] != made[2]).any()


RANK = """
import os
import sys
sys.path.insert(0, {folder!r})
import genie_mini
genie_mini.VectorQuantizer.__init__.__defaults__ = (0.99, 1, 0.25, 0, 0.0)   # dead after a step
step = genie_mini.Trainer.optimizer_step
def interrupted(trainer):
    if os.environ["RANK"] == "1" and (trainer.stage, trainer.step) == (1, 1):
        trainer.stop = True                                             # as Ctrl-C does
    return step(trainer)
genie_mini.Trainer.optimizer_step = interrupted
sys.exit(genie_mini.main(sys.argv[1:]))
"""


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")
def test_two_processes_train_as_one(demo_file, tmp_path, monkeypatch):
    """Failing means that torchrun's processes do not share one batch, one gradient and one
    codebook, that a run cannot change their number, or that Ctrl-C in one of them hangs the others.

    One process begins, two go on from there until the second of them alone is interrupted, and one
    ends the run. Codes are re-seeded in every step.
    """
    monkeypatch.setattr(genie_mini, "draw_curves", lambda *_: None)   # slow, and not compared
    monkeypatch.setattr(genie_mini.VectorQuantizer.__init__, "__defaults__",
                        (0.99, 1, 0.25, 0, 0.0))
    changes = dict(tok_steps=5, dyn_steps=5, val_every=1, dyn_layers=1, batch=8,
                   micro_batch=3, lam_steps=4, lam_unquantized=0.5, action_noise=0.3,
                   lr=1e-4, min_lr=1e-4, tok_codes=32)
    whole = tiny_trainer(genie_mini, demo_file, tmp_path / "one", **changes)
    assert whole.run()
    trainer = tiny_trainer(genie_mini, demo_file, tmp_path / "two", **changes)
    step = trainer.optimizer_step
    trainer.optimizer_step = lambda: setattr(trainer, "stop", trainer.step == 2) or step()
    assert not trainer.run()

    script = tmp_path / "rank.py"
    script.write_text(RANK.format(folder=str(Path(genie_mini.__file__).parent)))
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc_per_node", "2", str(script), "train", "--resume", "--out",
                          str(tmp_path / "two")], capture_output=True, text=True, timeout=300)
    for text in ("parameters: ", "stopped and saved"):
        assert run.stdout.count(text) == 1, f"rank 0 alone speaks\n{run.stderr}"
    checkpoint = checkpoints.read_checkpoint(tmp_path / "two" / "checkpoint.pt")
    assert (checkpoint["stage"], checkpoint["step"]) == (1, 2)

    trainer = tiny_trainer(genie_mini, demo_file, tmp_path / "two", **changes)
    trainer.resume(checkpoint)
    assert trainer.run()
    again, expected = trainer.genie.state_dict(), whole.genie.state_dict()
    assert expected["tokenizer.quantizer.started"] and expected["lam.quantizer.started"]
    for name in expected:
        assert close(again[name].float(), expected[name].float(), 1e-5), name
    assert len(trainer.rows) == len(whole.rows) == 10
    for row, other in zip(trainer.rows, whole.rows):
        assert row.pop("stage") == other.pop("stage") and row == pytest.approx(other, rel=1e-3)


def test_batch_is_cut_into_equal_slices(demo_file, tmp_path, monkeypatch, gm=genie_mini):
    """Failing means that some sequences of a batch are trained on by no process, or by two."""
    monkeypatch.setattr(ranks, "RANKS", 3)
    with pytest.raises(gm.UserError, match="--batch 8 cannot be cut into 3"):
        tiny_trainer(gm, demo_file, tmp_path)
    monkeypatch.setattr(ranks, "RANKS", 1)
    trainer = tiny_trainer(gm, demo_file, tmp_path, stage=1, action_noise=0.3, micro_batch=3)
    whole = [torch.cat(t) for t in zip(*trainer.micro_batches(gm.seeded(0)))]
    monkeypatch.setattr(ranks, "RANKS", 4)
    slices = []
    for rank in range(4):
        monkeypatch.setattr(ranks, "RANK", rank)
        slices += trainer.micro_batches(gm.seeded(0))
    assert all((torch.cat(parts) == t).all() for parts, t in zip(zip(*slices), whole))


def test_training_leaves_the_global_generator_alone(demo_file, tmp_path, gm=genie_mini):
    """Failing means that a run depends on, or disturbs, random numbers drawn elsewhere."""
    torch.manual_seed(1)
    first = weights_of(tiny_trainer(gm, demo_file, tmp_path).genie)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert (torch.rand(3) == drawn).all()
    torch.manual_seed(2)
    again = weights_of(tiny_trainer(gm, demo_file, tmp_path).genie)
    assert all((first[name] == again[name]).all() for name in first)


def test_diverging_training_says_so(demo_file, tmp_path, gm=genie_mini):
    """Failing means that a run goes on for hours after its loss or its gradient has run away, or
    that weights which are no numbers take the place of good ones."""
    trainer = tiny_trainer(gm, demo_file, tmp_path)
    trainer.save()
    good = (tmp_path / "checkpoint.pt").read_bytes()
    for loss, norm in ((math.nan, 1.0), (2000.0, 1.0), (1.0, math.inf), (1.0, math.nan)):
        with pytest.raises(gm.UserError, match="broke down at step 1 of stage tokenizer"):
            trainer.picks = [3, 4]
            trainer.check_health(loss, norm)
    before = weights_of(trainer.genie)
    with torch.no_grad():
        trainer.genie.tokenizer.embed.weight.fill_(math.nan)
    with pytest.raises(gm.UserError, match=r"loss nan, .* sequences (\d+, ){7}\d+;"):
        trainer.optimizer_step()
    after = weights_of(trainer.genie)
    assert all((before[n] == after[n]).all() for n in before if n != "tokenizer.embed.weight")
    with pytest.raises(gm.UserError, match="not saved"):
        trainer.save()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert (tmp_path / "checkpoint.pt").read_bytes() == good


# --- presets --------------------------------------------------------------------------------

CARD = dict(
    heads=4, tok_patch=4, tok_layers=4, tok_dim=256, tok_codes=32, latent_dim=16,
    lam_patch=8, lam_layers=4, lam_dim=256, num_actions=8,
    dyn_layers=6, dyn_dim=256, temperature=1.0, maskgit_steps=10, mask_min=0.5,
    lr=3e-4, min_lr=3e-4, beta2=0.9, warmup=2000, tok_steps=50_000, dyn_steps=50_000, batch=128,
    tok_frames=16, dyn_frames=16)
COST_SAVERS_OFF = dict(tok_attention=True, dyn_fold=1, lam_steps=0, mask_schedule="cosine")


def test_full_is_the_card(gm=genie_mini):
    """Failing means that the `full` preset is no longer the model of the specification."""
    c = gm.Config(**gm.PRESETS["full"])
    for name, value in {**CARD, **COST_SAVERS_OFF}.items():
        assert getattr(c, name) == value, name
    assert (gm.SIZE, gm.CLIP) == (64, 16)
    with torch.device("meta"):                                          # shapes without memory
        genie = gm.Genie(c)
    assert genie.tokenizer.quantizer.codebook.shape == (32, 16)
    assert genie.lam.quantizer.codebook.shape == (8, 16)
    assert genie.dynamics.tokens_per_frame == 256
    assert len(genie.tokenizer.encoder.blocks) == len(genie.tokenizer.decoder.blocks) == 4
    assert len(genie.lam.encoder.blocks) == len(genie.lam.decoder.blocks) == 4
    assert len(genie.dynamics.transformer.blocks) == 6


@pytest.mark.parametrize("preset", list(genie_mini.PRESETS))
def test_presets_work(preset, gm=genie_mini):
    """Failing means that a preset cannot be built, or holds a misspelt or needless field."""
    c = gm.Config(**{"preset": preset, **gm.PRESETS[preset]})
    gm.check_config(c)
    with torch.device("meta"):
        genie = gm.Genie(c)
    for part in (genie.tokenizer, genie.lam, genie.dynamics):
        assert sum(p.numel() for p in part.parameters()) > 1000


def test_every_setting_has_a_reason_and_a_range(gm=genie_mini):
    """Failing means that --help leaves a setting unexplained or does not show what each preset
    makes of it, or that a typing error in a word or a negative number is taken."""
    fields = gm.dataclasses.fields(gm.Config)
    for name in ("train", "bench"):
        flags = {a.dest: a.help for a in gm.build_parser().commands[name]._actions}
        assert all(len(flags[field.name].split(" [")[0]) > 10 for field in fields)
        assert "laptop 64" in flags["tok_dim"] and flags["latent_dim"].endswith("[16]")
    for field in fields:
        assert field.type in (int, float, bool, str), field.name
        bad = {str: "misspelt", int: -1, float: -0.1}.get(field.type)
        if bad is not None:
            with pytest.raises(gm.UserError, match=f"--{field.name} is {bad}"):
                gm.check_config(gm.Config(**{field.name: bad}))


# --- evaluation -----------------------------------------------------------------------------


def test_compare_actions(gm=genie_mini):
    """Failing means that the agreement with the true actions is measured wrongly."""
    true = np.array([0, 1, 2, 3] * 6)
    renamed = np.array([5, 0, 7, 2])[true]                              # the same partition
    assert gm.compare_actions(renamed, true) == pytest.approx(
        {"nmi": 1.0, "accuracy": 1.0, "accuracy_chance": 0.25})
    latent, true = np.repeat([0, 1, 2], 8), np.array([0, 0, 0, 0, 0, 1, 1, 2] * 3)
    assert gm.compare_actions(latent, true) == pytest.approx(           # unrelated
        {"nmi": 0.0, "accuracy": 0.625, "accuracy_chance": 0.625}, abs=1e-9)
    latent, true = np.array([0, 0, 0, 0, 1, 1, 2, 2]), np.array([0, 0, 1, 1, 2, 2, 2, 2])
    information = math.log(2)               # H(true | latent) = 1/2 log 2, H(true) = 3/2 log 2
    entropy = 1.5 * math.log(2)             # of both: shares 1/2, 1/4, 1/4
    assert gm.compare_actions(latent, true) == pytest.approx(
        {"nmi": information / entropy, "accuracy": 0.75, "accuracy_chance": 0.5})
    assert gm.compare_actions(np.zeros(5, int), np.zeros(5, int))["nmi"] == 0.0
    assert gm.compare_actions(np.zeros(11, int), np.arange(11) % 5 % 4)["nmi"] == 0.0   # not -3e-16


def test_code_use(gm=genie_mini):
    """Failing means that a collapse of the codebook would not show in the log."""
    assert gm.code_use(torch.tensor([[0, 0], [3, 3]]), 8) == (2, pytest.approx(2.0))
    assert gm.code_use(torch.arange(8), 8) == (8, pytest.approx(8.0))
    used, perplexity = gm.code_use(torch.tensor([1, 1, 1, 2]), 8)
    assert used == 2 and perplexity == pytest.approx(4 / 27 ** 0.25)


@pytest.mark.delta_psnr
def test_psnr_and_wrong_pixels(gm=genie_mini):
    """Failing means that pictures are scored wrongly."""
    assert gm.psnr(4096) == pytest.approx(0) and gm.psnr(40.96) == pytest.approx(20)
    assert gm.psnr(4.096) == pytest.approx(30) and 60 < gm.psnr(0) < 80, "finite for perfection"
    a = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    b = a.clone()
    b[0, 0, :2, :3] = 1                                                 # 6 pixels in 1 of 6 frames
    assert gm.wrong(a, b).tolist() == [[6, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("T", [2, 3, 16])
@torch.no_grad()
def test_lam_is_judged_as_it_was_trained(T, gm=genie_mini):
    """Failing means that the LAM is shown longer clips than those that it was trained on: its time
    attention then meets frames at distances that it never saw."""
    genie, frames = tiny_genie(gm, dyn_frames=T), random_frames(2, 16)
    logits, latents, codes = genie.watch(frames)
    assert logits.shape == (2, 15, 64, 64) and codes.shape == (2, 15)
    for t in range(15):
        expected = genie.lam(frames[:, max(0, t + 2 - T):t + 2])
        for seen, alone in zip((logits, latents, codes), expected):
            assert close(seen[:, t].float(), alone[:, -1].float()), t


def test_lam_is_compared_with_copying(demo_file, gm=genie_mini):
    """Failing means that the LAM is scored on the wrong frames: a model that copies frame t must
    score just what copying scores."""
    genie, data = tiny_genie(gm), gm.Sequences(demo_file, "val")
    genie.lam.decode = lambda frames, actions: frames.float() - 0.5
    result = gm.evaluate_lam(genie, data, np.arange(len(data)))
    frames = files.unpack(data.bits).astype(int)
    copied = np.abs(np.diff(frames, axis=1)).sum((2, 3)).mean()
    assert result["wrong_pixels"] == pytest.approx(copied)
    assert result["copy_wrong_pixels"] == pytest.approx(copied)
    data.actions = None
    assert gm.evaluate_lam(genie, data, np.arange(3))["nmi"] is None


def test_tokenizer_is_scored_by_hand(demo_file, gm=genie_mini):
    """Failing means that reconstructions are scored wrongly: one that is white all over, and one
    that is right but for every fortieth frame, which must show in the 99th percentile; or that
    flicker is counted where pixels change. Here every symbol changes in every frame."""
    genie, data = tiny_genie(gm), gm.Sequences(demo_file, "val")
    side = 64 // genie.tokenizer.patch

    def flickering(x):
        return torch.arange(16).remainder(2)[None, :, None].expand(len(x), 16, side * side)
    genie.tokenizer.forward = lambda x: (torch.ones(x.shape), flickering(x), 0)
    result = gm.evaluate_tokenizer(genie, data, np.arange(len(data)))
    frames = files.unpack(data.bits)
    black = (1 - frames.astype(int)).sum((2, 3))
    moved = np.diff(frames.astype(int), axis=1) != 0
    moved = moved.reshape(*moved.shape[:2], side, 64 // side, side, 64 // side).any((3, 5))
    assert result == pytest.approx({
        "wrong_pixels": black.mean(), "wrong_pixels_p99": np.percentile(black, 99),
        "iou": frames.mean(), "codes_used": 2, "perplexity": 2.0,
        "flicker": side ** 2 - moved.sum((2, 3)).mean()})

    def rarely(x):
        drawn = x.float() - 0.5
        drawn.view(-1, 64, 64)[::40] *= -1
        return drawn, flickering(x), 0
    genie.tokenizer.forward = rarely
    result = gm.evaluate_tokenizer(genie, data, np.arange(len(data)))
    assert result["wrong_pixels_p99"] == 4096 and 0 < result["wrong_pixels"] < 4096 / 20


@torch.no_grad()
def test_one_step_starts_from_the_real_past(demo_file, gm=genie_mini):
    """Failing means that the one-step error also counts the errors of earlier generated frames.

    What it draws must be what the whole-clip passes give when all earlier frames are the real ones.
    """
    genie = tiny_genie(gm, temperature=0.0, order_noise=0.0, maskgit_steps=1, dyn_frames=16)
    frames, buttons = random_frames(2, 5), torch.randint(8, (2, 4))
    made = gm.one_step(genie, frames, buttons, gm.seeded(0))
    tokens, real = genie.tokenizer.encode(frames)[1], genie.watch(frames)[1]
    codes = genie.tokenizer.quantizer.codebook
    for t in range(4):
        past = torch.cat([torch.zeros(2, 1, 4), real[:, :t]], dim=1)
        latents = torch.cat([past, genie.lam.quantizer.codebook[buttons[:, t:t + 1]]], dim=1)
        mixed, masked = tokens[:, :t + 2].clone(), torch.zeros(2, t + 2, 16, dtype=torch.bool)
        masked[:, -1] = True
        mixed[:, -1] = genie.dynamics(mixed, masked, latents)[0][:, -1].argmax(-1)
        assert (made[:, t] == (genie.tokenizer.decode(codes[mixed])[0][:, -1] > 0)).all(), t


@pytest.mark.delta_psnr
def test_random_actions_are_among_those_in_use(demo_file, gm=genie_mini):
    """Failing means that dead codes make the random baseline look bad, and our actions good.

    The LAM infers only 1 and 6; no other button may be pressed in the whole evaluation.
    """
    genie, data, pressed = tiny_genie(gm, dyn_layers=1), gm.Sequences(demo_file, "val"), set()
    codes = torch.tensor([1, 6])[torch.arange(15) % 2]

    def watch(frames):
        indices = codes.expand(len(frames), 15)
        return None, genie.lam.quantizer.codebook[indices], indices

    step = genie.step
    genie.watch = watch
    genie.step = lambda state, action, *rest: pressed.update(
        action.flatten().tolist()) or step(state, action, *rest)
    gm.evaluate_dynamics(genie, data, np.arange(2))
    assert pressed == {1, 6}


@pytest.mark.delta_psnr
def test_evaluation_of_a_perfect_world(demo_file, gm=genie_mini):
    """Failing means that generated frame t is compared with another frame of the video than t.

    The generator here returns what really happened, if the inferred actions are played; pressing
    anything else makes it stand still at the first frame. So the inferred rollouts must be perfect.
    """
    genie, data = tiny_genie(gm), gm.Sequences(demo_file, "val")
    genie.lam.quantizer.codebook.copy_(torch.randn(8, 4, generator=gm.seeded(3)))
    indices = np.arange(len(data))
    video = data.frames(indices)
    genie.watch = lambda frames: (
        None, torch.zeros(len(frames), 15, 4), torch.arange(15).expand(len(frames), 15) % 8)

    def rollout(first, actions, generator):
        T = actions.shape[1]
        right = (actions == torch.arange(T) % 8).all(1)[:, None, None, None]
        return torch.where(right, video[:, 1:1 + T], first[:, None].expand(-1, T, -1, -1))

    genie.rollout = rollout
    result = gm.evaluate_dynamics(genie, data, indices)
    still = (video[:, :1] != video[:, 4:5]).sum((-2, -1)).float().mean().item()
    assert result["rollout_wrong_pixels"] == {"4": 0.0, "8": 0.0, "15": 0.0}
    assert result["rollout_wrong_pixels_copy"]["4"] == pytest.approx(still)
    assert result["psnr_inferred"] == gm.psnr(0) and result["delta_psnr_null"] == 0
    assert result["psnr_random"] == pytest.approx(gm.psnr(still), abs=0.5)


def test_a_long_dream_is_judged_frame_by_frame(demo_file, gm=genie_mini):
    """Failing means that one_hero or walls_kept is not the share that it says.

    The "dream" repeats the first frame for ever; then it loses the hero in a quarter of the frames,
    half of the walls in one eighth.
    """
    genie, data, played = tiny_genie(gm), gm.Sequences(demo_file, "val"), []

    def rollout(first, actions, generator):
        played.append(actions)
        made = first[:, None].repeat(1, actions.shape[1], 1, 1)
        if genie.broken:
            made[:, :16] = torch.from_numpy(worlds.demo_walls(made[:, :16].numpy()))
            made[:, 16:24, 32:] = 0
        return made

    genie.rollout, genie.broken = rollout, False
    assert gm.evaluate_world(genie, data, np.arange(3)) == {
        "one_hero": 1, "walls_kept": 1, "ball_on_course": None}
    plan = played[0]
    assert plan.shape == (3, 64) and (plan.view(3, 8, 8) == plan.view(3, 8, 8)[..., :1]).all()
    assert len(plan.unique()) > 5 and (plan[0] != plan[1]).any()
    genie.broken = True
    result = gm.evaluate_world(genie, data, np.arange(3))
    top = data.frames(np.arange(3))[:, 0, :32].numpy()
    assert 0.6 < result["one_hero"] <= 0.75
    assert 0.9 < result["walls_kept"] < 1 and (worlds.demo_walls(top) <= top).all()
    data.world = "my film.mp4"
    assert set(gm.evaluate_world(genie, data, np.arange(3)).values()) == {None}


def test_ball_is_judged_where_the_game_has_it(ball_file, gm=genie_mini):
    """Failing means that ball_on_course is not the share that it says, or that the dream does not
    begin after 4 real frames and take the clip's own actions from there.

    A "dream" that knows the film has every ball on course; one that stands still has none: in 8
    moves of 2 pixels the ball is elsewhere.
    """
    genie, data = tiny_genie(gm, dyn_frames=16), gm.Sequences(ball_file, "train")
    film, made = data.frames(range(30)), []
    codes = genie.watch(film)[2]

    def rollout(first, actions, generator):
        if first.dim() == 4:
            assert (first == film[:, :4]).all() and (actions == codes[:, 3:11]).all()
            return film[:, 4:12] if genie.knows else first[:, -1:].repeat(1, 8, 1, 1)
        return first[:, None].repeat(1, actions.shape[1], 1, 1)

    genie.rollout = rollout
    for genie.knows in (True, False):
        made.append(gm.evaluate_world(genie, data, np.arange(30)))
    assert [result["ball_on_course"] for result in made] == [1, pytest.approx(0, abs=0.1)]
    assert made[0]["one_hero"] == 1 and made[0]["walls_kept"] is None


def test_motion_of_a_button(window_module=window_module, gm=genie_mini):
    """Failing means that the arrow of a button points elsewhere than it moves things, or that the
    arrow keys press other buttons than those which move things their way."""
    genie = tiny_genie(gm)
    frames = torch.zeros(3, 64, 64, dtype=torch.uint8)
    frames[:, 20:28, 30:38] = torch.from_numpy(worlds.HERO.copy())
    frames[2] = 0                                                       # nothing there to move
    moves = [(0, 0), (4, 0), (-4, 0), (0, 3), (0, -3), (1, 2), (0, 0), (0, 0)]
    genie.start = lambda frames: None
    genie.step = lambda state, action, generator: (frames.roll(moves[action], (1, 2)), None)
    motion, changed = window_module.button_motion(genie, frames)
    assert motion.round().sign().tolist() == [[np.sign(dy), np.sign(dx)] for dy, dx in moves]
    expected = [gm.wrong(frames.roll(move, (1, 2)), frames).mean().item() for move in moves]
    assert changed.tolist() == pytest.approx(expected) and expected[0] == 0 < expected[5]
    keys = window_module.arrow_keys(motion, changed)
    assert [moves[keys[key]] for key in ("up", "down", "left", "right")] == [
        (-4, 0), (4, 0), (0, -3), (0, 3)] and moves[keys[" "]] == (0, 0)


# --- checkpoints ----------------------------------------------------------------------------


class Payload:
    """Pickles as a command that is run when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def good_checkpoint(gm):
    """The contents of a checkpoint, as Trainer.save writes them."""
    c = tiny(gm)
    return {"version": gm.VERSION, "config": gm.dataclasses.asdict(c), "data": "demo.npz",
            "data_checksum": 0, "stage": 2, "step": 0, "rows": [],
            "model": gm.Genie(c).state_dict(), "optimizer": None}


def spoil(contents, kind, folder):
    """Make a checkpoint's contents wrong in one way."""
    config, weights = contents["config"], contents["model"]
    if kind == "version":
        contents["version"] = 999
    elif kind == "unknown field":
        config["surprise"] = 1
    elif kind == "missing field":
        del config["tok_dim"]
    elif kind == "mistyped field":
        config["tok_dim"] = "16"
    elif kind == "impossible field":
        config["tok_dim"] = 17
    elif kind == "other sizes":
        config["tok_dim"] = 32
    elif kind == "weight missing":
        del weights["tokenizer.embed.weight"]
    elif kind == "NaN":
        weights["dynamics.to_logits.weight"][0, 0] = math.nan
    elif kind == "no weights":
        del contents["model"]
    elif kind == "ten million wide":
        config["tok_dim"] = 10_000_000
    elif kind == "a million layers":
        config["dyn_layers"] = 1_000_000
    elif kind == "number too long":
        config["lr"], config["batch"] = 1e-3, 10 ** 400
    elif kind == "spread thin":               # hundreds of MB in shape, one number each in the file
        config["tok_dim"] = config["lam_dim"] = config["dyn_dim"] = 1024
        with torch.device("meta"):
            wanted = genie_mini.Genie(genie_mini.Config(**config)).state_dict()
        contents["model"] = {name: torch.zeros((), dtype=t.dtype).expand(t.shape)
                             for name, t in wanted.items()}
    elif kind == "on meta":
        weights["dynamics.to_logits.weight"] = weights["dynamics.to_logits.weight"].to("meta")
    elif kind == "other type":
        weights["dynamics.to_logits.weight"] = weights["dynamics.to_logits.weight"].long()
    elif kind == "names for weights":
        contents["model"] = dict.fromkeys(weights, "a name")
    elif kind == "rows":
        contents["rows"] = [{"stage": "world", "step": "last"}]
    elif kind == "beyond the file":
        contents["more"] = torch.ones(200)
    elif kind == "position":
        contents["step"] = -1
    elif kind == "version tensor":
        contents["version"] = torch.ones(2)
    elif kind == "payload":
        contents["rows"] = Payload(folder / "it was run")


def rewrite(path, kind):
    """Pack a checkpoint anew: compressed a thousandfold, or with a tensor said to be longer."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    pickled, = [name for name in entries if name.endswith("data.pkl")]
    if kind == "bomb":
        entries[pickled] += bytes(20_000_000)
    else:
        short, long = b"K\xc8", b"J" + (10 ** 9).to_bytes(4, "little")   # pickle's 200, and 1e9
        assert short in entries[pickled]
        entries[pickled] = entries[pickled].replace(short, long)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data, zipfile.ZIP_DEFLATED if name == pickled else None)


@pytest.mark.parametrize("kind", [
    "version", "unknown field", "missing field", "mistyped field", "impossible field",
    "other sizes", "weight missing", "NaN", "no weights", "payload", "cut", "flipped", "text",
    "empty", "pickle", "list", "absent", "folder", "ten million wide", "a million layers",
    "number too long", "spread thin", "on meta", "other type", "names for weights", "rows",
    "position", "version tensor", "bit", "bomb", "beyond the file"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bad_checkpoint(tmp_path, kind, gm=genie_mini):
    """Failing means that a damaged or hostile file is used, runs code, or ends in a traceback."""
    path, contents = tmp_path / "checkpoint.pt", good_checkpoint(gm)
    checkpoints.save_checkpoint(path, contents)
    assert gm.Genie.load(path).config == tiny(gm), "the good one must load"
    spoil(contents, kind, tmp_path)
    torch.save([1] if kind == "list" else contents, path)
    data = path.read_bytes()
    if kind == "bit":                                                   # in the middle of a weight
        with zipfile.ZipFile(path) as archive:
            entry = max((e for e in archive.infolist() if "/data/" in e.filename),
                        key=lambda entry: entry.file_size)
        at = data.index(entry.filename.encode()) + len(entry.filename) + 100
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])
    elif kind in ("bomb", "beyond the file"):
        rewrite(path, kind)
    if kind == "cut":
        path.write_bytes(data[:len(data) // 2])
    elif kind == "text":
        path.write_text("no checkpoint", encoding="utf-8")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "flipped":
        path.write_bytes(data[:64] + bytes(64) + data[128:])
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Payload(tmp_path / "it was run")))
    elif kind in ("absent", "folder"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
    with pytest.raises(gm.UserError) as caught:
        gm.Genie.load(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "it was run").exists()


def test_checkpoint_gives_back_what_was_saved(tmp_path, gm=genie_mini):
    """Failing means that a trained model changes by being saved and loaded."""
    genie = tiny_genie(gm)
    contents = {**good_checkpoint(gm), "model": genie.state_dict()}
    checkpoints.save_checkpoint(tmp_path / "c.pt", contents)
    loaded, first = gm.Genie.load(tmp_path / "c.pt"), random_frames(1)
    actions = torch.tensor([[1, 2, 3]])
    assert not loaded.training
    assert (loaded.rollout(first, actions, gm.seeded(0))
            == genie.rollout(first, actions, gm.seeded(0))).all()
    half = {name: t.half() if t.is_floating_point() else t              # as in assets/demo.pt
            for name, t in genie.state_dict().items()}
    checkpoints.save_checkpoint(tmp_path / "c.pt", {**contents, "model": half})
    loaded = weights_of(gm.Genie.load(tmp_path / "c.pt"))
    assert all(loaded[name].dtype != torch.half and (loaded[name] == half[name]).all()
               for name in half)


def test_saving_is_all_or_nothing(tmp_path, gm=genie_mini):
    """Failing means that a crash while saving destroys the checkpoint of a day's training."""
    path = tmp_path / "checkpoint.pt"
    checkpoints.save_checkpoint(path, {"a": torch.ones(3)})
    before = path.read_bytes()
    with pytest.raises(Exception):
        checkpoints.save_checkpoint(path, {"a": torch.zeros(9), "b": lambda: "cannot be pickled"})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, gm=genie_mini):
    """Failing means that a save which finds no room spoils what was saved before, or ends in a
    traceback. The room is taken away by a limit on the size of files."""
    resource = pytest.importorskip("resource")                          # not on Windows
    path = tmp_path / "checkpoint.pt"
    for i in range(2):
        checkpoints.save_checkpoint(path, {"a": torch.full((3,), i)})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(Exception) as caught:
            checkpoints.save_checkpoint(path, {"a": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [checkpoints.previous(path), path]
    assert caught.type is gm.UserError and "File too large" in str(caught.value)


@pytest.mark.parametrize("change", [
    lambda state: state.update({0: {"step": 1}}), lambda state: state.update({99: state[0]}),
    lambda state: state[0].update(exp_avg=torch.zeros(3)),
    lambda state: state[0]["exp_avg"].fill_(math.nan), lambda state: state.update({"a": state[0]})])
def test_a_wrong_optimizer_state_is_refused(demo_file, tmp_path, change, gm=genie_mini):
    """Failing means that a checkpoint's optimizer state, which may be anyone's, is used unseen."""
    trainer = tiny_trainer(gm, demo_file, tmp_path)
    trainer.optimizer_step()
    trainer.save()
    checkpoint = checkpoints.read_checkpoint(tmp_path / "checkpoint.pt")
    trainer.resume(checkpoint)
    change(checkpoint["optimizer"]["state"])
    with pytest.raises(gm.UserError, match="does not fit"):
        trainer.resume(checkpoint)


@pytest.mark.filterwarnings("ignore")
def test_fuzzed_checkpoints(tmp_path, cases=60, gm=genie_mini):
    """Failing means that a damaged checkpoint ends in a traceback, or is read as another one; or
    that a Config of random values does."""
    path, rng, contents = tmp_path / "checkpoint.pt", np.random.default_rng(0), good_checkpoint(gm)
    checkpoints.save_checkpoint(path, contents)
    data, refused = path.read_bytes(), 0
    for _ in range(cases):
        path.write_bytes(fuzzed(data, rng))
        try:
            weights = checkpoints.read_checkpoint(path)["model"]
        except gm.UserError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert all((weights[name] == t).all() for name, t in contents["model"].items())
    assert refused > cases / 2
    names, refused = list(contents["config"]), 0
    strange = [0, -1, 3, 2 ** 40, 10 ** 400, 0.5, -0.0, 1e308, math.inf, math.nan, True, None, "",
               "cpu", "diff", [], {}, b"a", torch.ones(2)]
    for _ in range(4 * cases):
        config = dict(contents["config"])
        for name in rng.choice(names, rng.integers(1, 4)):
            config[str(name)] = strange[rng.integers(len(strange))]
        try:
            checkpoints.check_contents({**contents, "config": config}, len(data))
        except gm.UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 3 * cases


# --- planted bugs ---------------------------------------------------------------------------


def mutant(old, new, original=genie_mini):
    """A module of ours as a module of its own, with one piece of its source replaced."""
    source = Path(original.__file__).read_text(encoding="utf-8")
    name = Path(original.__file__).name
    assert source.count(old) == 1, f"{old!r} must be in {name} exactly once"
    module = types.ModuleType("mutant")
    module.__file__ = original.__file__
    exec(compile(source.replace(old, new), f"mutant of {name}", "exec"), module.__dict__)
    return module


STRAIGHT = "return z + (code - z).detach(), indices, loss"
TARGETS = "F.cross_entropy(logits[:, T - 1:][masked], tokens[:, 1:][masked], "
PICK = "torch.multinomial(weight, 1, generator=generator)"

# What is broken, the piece of source, what replaces it, the test that must fail, its arguments.
BUGS = [
    *(("causal mask dropped", ".tril() if causal", " if causal", test_no_future_leak,
       {"name": name}) for name in CAUSAL),
    ("causal mask one frame late", ".tril() if causal", ".tril(1) if causal",
     test_no_future_leak, {"name": "dynamics, tokens"}),
    ("the present frame hidden", ".tril() if causal", ".tril(-1) if causal",
     test_time_attention_by_hand, {}),
    ("LAM action seen one step late", "x[:, 1:].mean(dim=2)", "x[:, :-1].mean(dim=2)",
     test_no_future_leak, {"name": "LAM encoder of frames"}),
    ("no residual around space", "x = x + y.view(B, T, N, D)", "x = y.view(B, T, N, D)",
     test_block_adds_space_then_time_then_channels, {}),
    ("no residual around time", "x = x + y.view(B, N, T, D)", "x = y.view(B, N, T, D)",
     test_block_adds_space_then_time_then_channels, {}),
    ("LAM decoder sees its target", "self.decode(frames[:, :-1], actions)",
     "self.decode(frames[:, 1:], actions)", test_lam_decoder_does_not_see_its_target, {}),
    ("LAM ignores its actions", "self.from_latent(actions)[:, :, None])",
     "0 * self.from_latent(actions)[:, :, None])", test_lam_overfits, {"view": "change"}),
    ("LAM learns to copy", "frames[:, 1:].float())", "frames[:, :-1].float())",
     test_lam_overfits, {"view": "change"}),
    ("straight-through detached", STRAIGHT, STRAIGHT.replace("z + (code - z).detach()", "code"),
     test_straight_through_gradient, {}),
    ("straight-through into the code, doubled", STRAIGHT, STRAIGHT.replace("z + ", "2 * z + "),
     test_quantizer_picks_the_nearest_code, {}),
    ("quantizer leaves z as it is", STRAIGHT, "return z, indices, loss",
     test_quantizer_picks_the_nearest_code, {}),
    ("farthest code", "return (d <= d.min(", "return (d >= d.max(",
     test_quantizer_picks_the_nearest_code, {}),
    ("the nearest code, however near the next", " + self.negligible()).int()", ").int()",
     test_spare_codes_give_nothing_a_second_name, {}),
    ("a spare code put into a cluster", "z.pow(2).sum(1) + self.negligible()", "z.pow(2).sum(1)",
     test_spare_codes_give_nothing_a_second_name, {}),
    ("the tokenizer has spare codes in use", ", alike=0.05,", ",",
     test_the_tokenizer_has_one_name_for_a_patch, {}),
    ("commitment pulls on nothing", "F.mse_loss(z, code)", "F.mse_loss(z.detach(), code)",
     test_straight_through_gradient, {}),
    ("codes never updated", "self.ema_sum[moved] / self.ema_count[moved, None]",
     "self.codebook[moved]", test_codes_follow_a_moving_average, {}),
    ("decay the wrong way round", "self.ema_count.mul_(self.decay).add_(count, alpha=1 -",
     "self.ema_count.mul_(1 - self.decay).add_(count, alpha=2 * self.decay - 1 + 1 -",
     test_codes_follow_a_moving_average, {}),
    ("only the last micro-batch learned", "self.seen.append((flat, indices))",
     "self.seen = [(flat, indices)]", test_codes_follow_a_moving_average, {}),
    ("copies re-seeded", "distance[distance < 1e-6 * z.pow(2).sum(1) + self.negligible()] = 0", "",
     test_a_copy_of_a_code_is_known_at_any_length, {"length": 20}),
    ("dead codes never re-seeded", "(self.idle >= self.dead_after)", "(self.idle < 0)",
     test_dead_code_is_moved_onto_a_lonely_vector, {}),
    ("codes re-seeded too early", "(self.idle >= self.dead_after)",
     "(self.idle >= self.dead_after - 1)", test_dead_code_is_moved_onto_a_lonely_vector, {}),
    ("re-seeded on any vector", PICK, PICK.replace("weight", "torch.ones_like(weight)"),
     test_dead_code_is_moved_onto_a_lonely_vector, {}),
    ("re-seeded on any vector, at the start", PICK,
     PICK.replace("weight", "torch.ones_like(weight)"), test_start_picks_distinct_vectors, {}),
    ("live code copied", "if weight.sum() == 0:\n                return",
     "weight += 1e-9", test_dead_code_never_copies_a_live_one, {}),
    ("codebook starts on one batch", "z if more is None else more()", "z",
     test_codebook_starts_on_the_whole_training_set, {}),
    ("k-means without its rounds", "for _ in range(10):", "for _ in range(0):",
     test_no_two_clusters_share_a_code_at_the_start, {}),
    ("codebook starts at once", "if self.steps >= self.unquantized:", "if True:",
     test_quantizer_lets_everything_through_until_it_starts, {}),
    ("a re-seeded code is dragged back", "self.ema_sum[code] = self.codebook[code]", "pass",
     test_dead_code_is_moved_onto_a_lonely_vector, {}),
    ("a re-seeded code still counts as idle", "            self.idle[code] = 0\n", "",
     test_dead_code_is_moved_onto_a_lonely_vector, {}),
    ("the average starts at zero", "self.ema_sum.copy_(self.codebook)",
     "pass", test_start_picks_distinct_vectors, {}),
    ("scores not scaled", "attn_mask=visible)", "attn_mask=visible, scale=1.0)",
     test_time_attention_by_hand, {}),
    ("no noise in the order", "order = confidence + c.order_noise", "order = confidence + 0",
     test_order_noise_shuffles_the_order, {"schedule": "cosine"}),
    ("the doubtful in a fixed order", "one = order.masked_fill", "one = confidence.masked_fill",
     test_order_noise_shuffles_the_order, {"schedule": "adaptive"}),
    ("temperature ignored", "c.temperature * noise", "noise", test_temperature_is_that_of_a_softmax,
     {"temperature": 0.5}),
    ("temperature ignored, at 0", "c.temperature * noise", "noise", test_sampling_follows_the_seed,
     {}),
    ("temperature squared", "c.temperature * noise", "c.temperature ** 2 * noise",
     test_temperature_is_that_of_a_softmax, {"temperature": 2.0}),
    ("always the likeliest token", "c.temperature * noise", "0 * noise",
     test_temperature_is_that_of_a_softmax, {"temperature": 1.0}),
    ("sampling ignores the seed", "rand(shape, generator=generator)", "rand(shape)",
     test_sampling_follows_the_seed, {}),
    ("tokens decided twice", "scatter(-1, first, True) & masked", "scatter(-1, first, True)",
     test_maskgit_takes_a_token_from_the_pass_that_decides_it,
     {"schedule": "cosine"}),
    ("committed tokens do not count", "order.masked_fill(~masked, torch.inf)", "order",
     test_maskgit_commits_each_token_once, {"steps": 4, "schedule": "cosine"}),
    ("decided tokens not written", "torch.where(commit, guess, tokens)",
     "tokens", test_maskgit_takes_a_token_from_the_pass_that_decides_it,
     {"schedule": "cosine"}),
    ("all tokens written in each pass", "torch.where(commit, guess, tokens)",
     "guess", test_maskgit_takes_a_token_from_the_pass_that_decides_it,
     {"schedule": "cosine"}),
    ("a line, not a cosine", "N * math.cos(math.pi / 2 * progress)", "N * (1 - progress)",
     test_maskgit_commits_each_token_once, {"steps": 4, "schedule": "cosine"}),
    ("always the cosine", 'c.mask_schedule == "adaptive" and progress < 1', "False",
     test_maskgit_commits_each_token_once, {"steps": 4, "schedule": "adaptive"}),
    ("the last pass leaves tokens undecided", '"adaptive" and progress < 1', '"adaptive"',
     test_maskgit_takes_a_token_from_the_pass_that_decides_it, {"schedule": "adaptive"}),
    ("passes with nothing left to commit", "if not masked.any():", "if False:",
     test_adaptive_commits_what_is_sure, {}),
    ("confident of too little", "CONFIDENT = 0.99 ", "CONFIDENT = 0.98 ",
     test_adaptive_commits_what_is_sure, {}),
    ("confident tokens wait", "return confident.scatter(-1, one, True)",
     "return torch.zeros_like(confident).scatter(-1, one, True)",
     test_adaptive_commits_what_is_sure, {}),
    ("the one is among the confident", "order.masked_fill(confident | ~masked, -torch.inf)",
     "order.masked_fill(~masked, -torch.inf)", test_adaptive_commits_what_is_sure, {}),
    ("least sure first", "confidence = logits.log_softmax(-1)",
     "confidence = -logits.log_softmax(-1)", test_maskgit_commits_the_surest_first, {}),
    ("only the newest frame is remembered", "            kept.append(kv)",
     "            kept.append(kv and [x[:, :, -1:] for x in kv])",
     test_cached_dynamics_equals_uncached, {}),
    ("clock of the cache stands still", "self.table[begin:begin + S]",
     "self.table[:S]", test_cached_dynamics_equals_uncached, {}),
    *(("play remembers for ever", "if state.tokens.shape[1] + 1 < self.config.dyn_frames:",
       "if True:", test_long_play_stays_within_what_was_trained, {"T": T}) for T in (2, 16)),
    ("play remembers one frame too many", "if state.tokens.shape[1] + 1 < self",
     "if state.tokens.shape[1] < self", test_long_play_stays_within_what_was_trained, {"T": 4}),
    ("the older half is kept", "torch.cat([state.tokens, tokens], dim=1)[:, -keep:]",
     "torch.cat([state.tokens, tokens], dim=1)[:, :keep]",
     test_long_play_stays_within_what_was_trained, {"T": 4}),
    ("an action leads to the first frame kept",
     "F.pad(actions[:, 1:], (0, 0, 1, 0)))   # zeros", "actions)   # zeros",
     test_long_play_stays_within_what_was_trained, {"T": 4}),
    ("an action leads to the first frame", "actions = torch.zeros(len", "actions = torch.ones(len",
     test_play_starts_as_training_does, {}),
    ("all players press the first one's button", "masked, action[:, None], past)",
     "masked, action[:1, None].expand(B, 1, -1), past)",
     test_batched_play_equals_playing_alone, {}),
    ("each frame decoded alone", "decode(quantized, state and state.decoder)", "decode(quantized)",
     test_play_follows_the_inference_pipeline, {}),
    ("button number off by one", "self.lam.quantizer.codebook[action] ",
     "self.lam.quantizer.codebook[action - 1] ", test_play_follows_the_inference_pipeline, {}),
    ("frames drawn without the action", "sample(state.dynamics, latent, self.config,",
     "sample(state.dynamics, 0 * latent, self.config,", test_play_follows_the_inference_pipeline,
     {}),
    ("frames remembered without the action", "return self.observe(state, tokens, latent)",
     "return self.observe(state, tokens, 0 * latent)",
     test_play_follows_the_inference_pipeline, {}),
    ("action off by one frame in training", "(0, 0, 1, 0)), actions]",
     "(0, 0, 1, 0)), F.pad(actions[:, :-1], (0, 0, 1, 0))]",
     test_action_t_leads_to_frame_t_plus_1, {}),
    ("dynamics ignores its actions", "+ self.action(actions)[:, :, None]", "",
     test_dynamics_overfits, {}),
    ("masked tokens in view", "tokens.masked_fill(masked, self.codes)", "tokens",
     test_masked_tokens_are_not_looked_at, {}),
    ("loss on all tokens", TARGETS,
     "F.cross_entropy(logits[:, T - 1:].flatten(0, 2), tokens[:, 1:].flatten(), ",
     test_loss_is_that_of_the_masked_tokens, {}),
    ("loss on visible tokens", TARGETS, TARGETS.replace("masked", "~masked"),
     test_loss_is_that_of_the_masked_tokens, {}),
    ("targets taken after masking", TARGETS,
     "F.cross_entropy(logits[:, T - 1:][masked], tokens[:, 1:].masked_fill(masked, 0)[masked], ",
     test_loss_is_that_of_the_masked_tokens, {}),
    ("one masking rate for a batch", "torch.rand(B, T, 1, generator=generator)",
     "torch.rand(1, 1, 1, generator=generator)", test_random_mask, {}),
    ("one masking rate for a clip", "torch.rand(B, T, 1, generator=generator)",
     "torch.rand(B, 1, 1, generator=generator)", test_random_mask, {}),
    ("one coin for a frame", "torch.rand(B, T, self.tokens_per_frame, generator",
     "torch.rand(B, T, 1, generator", test_random_mask, {}),
    ("a mask that ignores its generator", "torch.rand(B, T, self.tokens_per_frame, generator="
     "generator)", "torch.rand(B, T, self.tokens_per_frame, generator=seeded(0))",
     test_random_mask, {}),
    ("a masked frame sees itself finished", "[past, t[:, None] == t]",
     "[past.roll(-1, 0), t[:, None] == t]", test_loss_is_that_of_the_masked_tokens, {}),
    ("a masked frame sees the masked past", "[past, t[:, None] == t]", "[past, past]",
     test_loss_is_that_of_the_masked_tokens, {}),
    ("a masked frame does not see itself", "[past, t[:, None] == t]", "[past, none]",
     test_loss_is_that_of_the_masked_tokens, {}),
    ("finished frames see later ones", "t[:, None] >= t, torch", "t[:, None] >= 0 * t, torch",
     test_loss_is_that_of_the_masked_tokens, {}),
    ("masked frames at the place of their past", "torch.cat([t, t + 1])", "torch.cat([t, t])",
     test_loss_is_that_of_the_masked_tokens, {}),
    ("folded logits not put back", "[:, :, self.unorder]", "",
     test_folding_keeps_tokens_in_their_places, {"fold": 2}),
    ("fold along the rows only", "patchify(grid, c.dyn_fold).flatten()", "grid.flatten()",
     test_folded_tokens_are_neighbours, {}),
    ("patches scrambled", "side, side, patch, patch).permute(0, 1, 2, 4, 3, 5)",
     "side, side, patch, patch).permute(0, 1, 4, 2, 3, 5)", test_unpatchify_is_the_inverse,
     {"patch": 4}),
    ("scaled instead of rotated", "pairs * table)", "pairs * table.real)",
     test_rotary_scores_depend_on_the_difference, {}),
    ("rotated the other way", "pairs * table)", "pairs * table.conj())", test_rotation_by_hand, {}),
    ("flicker where pixels change, too", "flicker = still & (", "flicker = (",
     test_tokenizer_is_scored_by_hand, {}),
    ("neighbours the wrong way round", "rotary(torch.tensor(s)", "rotary(torch.tensor(-s)",
     test_heads_start_on_their_neighbours, {"dim": 64, "heads": 4, "side": 16}),
    ("pooled over all patches", "x = (x * moved).sum(dim=2) / moved.sum(dim=2).clamp_min(1)",
     "x = x.mean(dim=2)", test_lam_pools_over_the_changed_patches, {}),
    ("no commitment loss in stage 1", "return pixel + commitment, {", "return pixel, {",
     test_losses_by_hand, {}),
    ("no commitment loss in stage 2", "return pixel + commitment + dynamics,",
     "return pixel + dynamics,", test_losses_by_hand, {}),
    ("LAM compared with the frame it saw", "frames[:, 1:].float())", "frames[:, :-1].float())",
     test_losses_by_hand, {}),
    ("weight decay forgotten", ", weight_decay=1e-4)", ")",
     test_optimizer_is_the_one_asked_for, {}),
    ("twice the learning rate", '["lr"] = lr = learning_rate(', '["lr"] = lr = 2 * learning_rate(',
     test_optimizer_is_the_one_asked_for, {}),
    ("a LAM that is never done", "if self.step < steps]", "]",
     test_lam_is_done_after_its_steps, {}),
    ("one cosine for both", "learning_rate(self.step, total, c)",
     "learning_rate(self.step, self.total, c)", test_lam_is_done_after_its_steps, {}),
    ("gradients not clipped", "nn.utils.clip_grad_norm_(m.parameters(), 1.0)",
     "nn.utils.clip_grad_norm_(m.parameters(), 1e9)", test_gradients_are_clipped, {}),
    ("action noise ignored", "choices.gather(1, source[..., None]",
     "choices.gather(1, source.sort()[0][..., None]", test_action_noise, {"noise": 1.0}),
    ("action noise from an empty codebook", "take &= bool(genie.lam.quantizer.started)", "pass",
     test_action_noise, {"noise": 1.0}),
    ("the last action, be it none", "own.masked_fill(still, -1).cummax(dim=1).values", "own - 1",
     test_action_noise, {"noise": 1.0}),
    ("action noise the wrong way round", "< c.action_noise", ">= c.action_noise",
     test_action_noise, {"noise": 0.25}),
    ("action noise where much changes", "take = still & (", "take = ~still & (",
     test_action_noise, {"noise": 0.25}),
    ("a dream without a hero passes", "(heroes == 1).float()", "(heroes <= 1).float()",
     test_a_long_dream_is_judged_frame_by_frame, {}),
    ("walls of the dream itself", "(made & walls).sum", "made.sum",
     test_a_long_dream_is_judged_frame_by_frame, {}),
    ("tokens of the beginning of the sequence", "tokens_of(self.picks)[:, first:first + length]",
     "tokens_of(self.picks)[:, :length]", test_tokens_are_computed_once, {"at_once": 1}),
    ("tokens of other sequences", "return self.tokens[picks]", "return self.tokens[:len(picks)]",
     test_tokens_are_computed_once, {"at_once": 1}),
    ("tokens encoded again in each step", "self.encoded[i:i + size] = True", "pass",
     test_tokens_are_computed_once, {"at_once": 1}),
    ("tokens of a neighbour", "self.tokens[i:i + size] =", "self.tokens[i:i + size] = 0 *",
     test_tokens_are_computed_once, {"at_once": 4}),
    ("gradients of micro-batches added up", "(loss * share).backward()", "loss.backward()",
     test_micro_batches_equal_one_big_batch, {"stage": 0}),
    ("codebook learns from one micro-batch", "self.seen.append((flat, indices))",
     "self.seen = [(flat, indices)]", test_micro_batches_equal_one_big_batch, {"stage": 1}),
    ("micro-batches weigh the same whatever their size", "share = len(chosen) / c.batch",
     "share = self.micro / c.batch", test_micro_batch_auto, {"stage": 0}),
    ("nearest code by bfloat16", "torch.autocast(z.device.type, enabled=False)",
     "torch.autocast(z.device.type, torch.bfloat16)", test_codebook_is_float32_under_autocast, {}),
    ("a sketch without the action", "sample(state.dynamics, latent, once,",
     "sample(state.dynamics, 0 * latent, once,", test_a_sketch_is_what_one_pass_gives, {}),
    ("a sketch without its past", "decode(quantized, state.decoder)", "decode(quantized)",
     test_a_sketch_is_what_one_pass_gives, {}),
    ("no warm-up", "warm = min(1.0, (step + 1) / max(1, c.warmup))", "warm = 1.0",
     test_learning_rate, {}),
    ("cosine over the warm-up too", "max(0, step - c.warmup)", "step", test_learning_rate, {}),
    ("clips all from the beginning", "[indices, first:first + length]", "[indices, :length]",
     test_frames_are_those_of_the_file, {}),
    ("each epoch in the same order", "generator=seeded(seed, stage, epoch)",
     "generator=seeded(seed, stage)", test_each_epoch_visits_each_sequence_once, {}),
    ("sequences drawn with repeats", "torch.randperm(len(self), generator=seeded",
     "torch.randint(len(self), (len(self),), generator=seeded",
     test_each_epoch_visits_each_sequence_once, {}),
    ("batch from the global generator", "torch.randint(late + 1, (1,), generator=seeded(seed,"
     " stage, step, 1))", "torch.randint(late + 1, (1,))",
     test_a_batch_depends_on_seed_stage_and_step_alone, {}),
    ("no stop-gradient", "[actions.detach(), codes]", "[actions, codes]",
     test_gradients_stay_where_they_belong, {}),
    ("tokenizer still training in stage 2", "genie = self.genie.eval()", "genie = self.genie",
     test_stage_2_leaves_the_tokenizer_alone, {}),
    ("frames of a clip rolled apart", "clip.roll(by, (1, 2))",
     "torch.stack([f.roll((t + 1) * by[0], 0) for t, f in enumerate(clip)])",
     test_lam_sees_rolled_clips, {}),
    ("all clips rolled alike", "shifts.tolist())", "shifts[:1].tolist() * len(x))",
     test_lam_sees_rolled_clips, {}),
    ("rolled in the paper's reading", ' * (c.lam_view == "change")', "",
     test_lam_sees_rolled_clips, {}),
    ("rolled by pixels", "c.tok_patch * patches", "patches", test_lam_sees_rolled_clips, {}),
    ("loss over the masked tokens of a micro-batch",
     "loss / ((1 + self.mask_min) / 2 * masked.numel())", "loss / masked.sum()",
     test_micro_batches_equal_one_big_batch, {"stage": 1}),
    ("optimizer forgotten on resuming", '{**self.optimizer.state_dict(), "state": moments}',
     "self.optimizer.state_dict()", test_resume_is_exact, {"stage": 0, "step": 3, "how": "stop"}),
    ("batches start anew on resuming", 'self.step, self.rows = checkpoint["step"],',
     "self.step, self.rows = 0,", test_resume_is_exact, {"stage": 1, "step": 1, "how": "stop"}),
    ("log forgotten on resuming", 'checkpoint["step"], checkpoint["rows"]',
     'checkpoint["step"], []', test_resume_is_exact, {"stage": 1, "step": 6, "how": "crash"}),
    ("accuracy without a majority", "joint.max(1).sum()", "joint.max(0).sum()",
     test_compare_actions, {}),
    ("perplexity in bits", "share[share > 0].log()).sum()", "share[share > 0].log2()).sum()",
     test_code_use, {}),
    ("PSNR of the amplitude", "-10 * math.log10", "-20 * math.log10", test_psnr_and_wrong_pixels,
     {}),
    ("overlap of the black pixels", "(x & drawn).sum()", "(1 - (x | drawn)).sum()",
     test_tokenizer_is_scored_by_hand, {}),
    ("one step from the generated past", "genie.observe(state, tokens[:, t + 1], real[:, t])",
     "genie.observe(state, tokens[:, t], real[:, t])", test_one_step_starts_from_the_real_past, {}),
    ("LAM shown longer clips than in training", "if T <= n:",
     "seen = self.lam(frames)[:3]\n        if True:", test_lam_is_judged_as_it_was_trained,
     {"T": 3}),
    ("LAM compared with the wrong frames", "wrong(logits > 0, x[:, 1:])",
     "wrong(logits > 0, x[:, :-1])", test_lam_is_compared_with_copying, {}),
    ("dead codes among the random actions", "((marginal > 0).float(), marginal)",
     "(torch.ones_like(marginal), marginal)", test_random_actions_are_among_those_in_use, {}),
    ("rollout compared one frame off", "x[:, 1:actions.shape[1] + 1]) for k",
     "x[:, :actions.shape[1]]) for k",
     test_evaluation_of_a_perfect_world, {}),
    ("a run-away loss goes on", "loss < self.EXPLODED and norm < math.inf", "norm < math.inf",
     test_diverging_training_says_so, {}),
    ("NaN saved over good weights", "if not finite(self.genie.state_dict().values()):",
     "if False:", test_diverging_training_says_so, {}),
]


CHECKPOINT_BUGS = [
    ("checkpoints may run code", "weights_only=True", "weights_only=False", test_bad_checkpoint,
     {"kind": "payload"}),
    ("NaN weights accepted", "torch.isfinite(t).all() for t in", "True for t in",
     test_bad_checkpoint, {"kind": "NaN"}),
    ("a checkpoint's weights not compared", "{n: kind(t) for n, t in wanted.items()} !=",
     "None ==", test_bad_checkpoint, {"kind": "other type"}),
    ("a checkpoint may claim a model larger than itself",
     "sum(t.nbytes for t in weights.values()) > size", "False", test_bad_checkpoint,
     {"kind": "spread thin"}),
    ("checksums not looked at", "if archive.testzip():", "if False:", test_bad_checkpoint,
     {"kind": "bit"}),
    ("zip bombs let in", "files.check_sizes(archive)", "pass", test_bad_checkpoint,
     {"kind": "bomb"}),
    ("checkpoint written in place",
     "with files.written_whole(path, keep=previous(path)) as file:",
     'with open(path, "wb") as file:', test_a_full_disk_leaves_the_last_checkpoint, {}),
]


EXTRAS_BUGS = [
    ("arrows the wrong way round", "(new - old)[", "(old - new)[", test_motion_of_a_button, {}),
    ("the baseline taken for the step", "theirs, ours, its_seconds", "ours, theirs, its_seconds",
     test_bench_knows_the_baseline_from_the_step, {}),
    ("no cache taken for the cache", "slow, fast, its_seconds", "fast, slow, its_seconds",
     test_bench_plays_a_whole_turn_of_the_memory, {}),
    ("the peak of another round", "flops / seconds / peak", "flops / seconds / max(peak)",
     test_share_of_the_peak_by_hand, {}),
    ("micro_batch auto takes all", "share * need / free", "need / free", test_micro_batch_auto,
     {"stage": 1}),
    ("fused attention costs nothing", "        written_out(work)\n    return",
     "        work()\n    return", test_float_operations_are_counted, {}),
]


DATA_BUGS = [
    ("sequences with stride 1", "ticks.reshape(FRAMES, STRIDE, *ticks.shape[1:]).swapaxes(0, 1)",
     "ticks.reshape(STRIDE, FRAMES, *ticks.shape[1:])",
     test_cut_window_is_three_staggered_sequences, {}),
    ("splits that share a frame",
     "if clip is not first or window_frames(clip, number)[-1] < begin]", "]",
     test_no_source_frame_is_in_two_splits, {"rate": 4}),
    ("the first effect as the label",
     "np.where((first == second) | (first == third), first, third)", "first",
     test_demo_label_is_the_majority_and_the_last_on_a_tie, {}),
    ("frames by index, not by time", "max(0, math.ceil((now - origin - TOLERANCE) * SOURCE_FPS))",
     "0 if waiting is None else waiting[0] + 1", test_video_shows_the_right_frame_at_every_tick,
     {"name": "25.mp4", "times": steady(25, 8), "rate": 25, "options": {}}),
    ("black is white", "bright = grey > look.level", "bright = grey < look.level",
     test_white_is_white_and_black_is_black, {}),
    ("what is darker does not move", "return abs(apart - np.median",
     "return abs(apart.clip(0) - np.median",
     test_black_and_white_keeps_what_moves, {"kind": "both", "threshold": "motion"}),
    ("light taken for motion", "np.median(apart, axis=(1, 2), keepdims=True)", "np.zeros(1)",
     test_black_and_white_keeps_what_moves, {"kind": "light", "threshold": "motion"}),
    ("a level that hides what is faint", "level = max(6, ", "level = max(20, ",
     test_black_and_white_keeps_what_moves, {"kind": "faint", "threshold": "motion"}),
    ("one background for two scenes", "self.cuts.append(len(self.first))", "pass",
     test_each_scene_has_its_background, {}),
    ("what moves outside the square is cut off", "outside > 0.05 * total", "False",
     test_black_and_white_keeps_what_moves, {"kind": "portrait", "threshold": "motion"}),
    ("the first method, whatever it keeps", ">= best - 0.15", ">= 0",
     test_otsu_is_left_where_it_loses_the_motion, {}),
    ("a change of the picture without one of the grey is kept", "weight * spread(flips)", "weight",
     test_otsu_is_left_where_it_loses_the_motion, {}),
    ("two pixels for one between two columns", "for axis in (1, 2):", "for axis in ():",
     test_thin_things_are_steady, {"width": 2, "along": "x"}),
    ("half a pixel is a whole one", "& (2 * far >= spread(far))", "",
     test_an_edge_runs_where_a_pixel_is_half_covered, {}),
    ("mirror images stay", "::-1 if a < 0 else 1]", "::1]", test_mirrored_and_turned,
     dict(zip(("number", "matrix", "expected"), ORIENTATIONS[1]))),
    ("what EXIF says is not looked at", "ImageOps.exif_transpose(image)", "image",
     test_mirrored_and_turned, dict(zip(("number", "matrix", "expected"), ORIENTATIONS[4]))),
    ("a clear ground is black", 'else "white"', 'else "black"',
     test_a_figure_on_a_clear_ground_shows, {"colour": 0}),
    ("half a file passes for a whole one", "found < 0.98 * promised", "False",
     test_what_is_missing_is_told, {}),
    ("a gap is filled unsaid", "(lengths > WINDOW).any()", "False",
     test_what_is_missing_is_told, {}),
    ("the largest stream, even if still", "length(one) >= long, ", "",
     test_the_moving_stream_is_taken, {}),
    ("a song's cover is a video", "if not moving and (", "if not streams and (",
     test_the_moving_stream_is_taken, {}),
    ("halos beside bars", "box=inside(sample)", "box=(slice(0, SIZE),) * 2",
     test_bars_make_no_halos, {}),
    ("an image by a level of its own", 'if meta.get("looks"):', "if False:",
     test_an_image_takes_the_way_of_the_data, {}),
    ("keys a frame late", "keys[at:at + WINDOW]", "np.roll(keys, 1)[at:at + WINDOW]",
     test_keys_are_stored_as_actions, {}),
    ("keys of another length", "keys.shape != (ticks,)", "False",
     test_keys_are_stored_as_actions, {}),
]


@pytest.mark.parametrize("old, new, test, arguments", [bug[1:] for bug in BUGS],
                         ids=[bug[0] for bug in BUGS])
def test_planted_bug_is_caught(old, new, test, arguments, demo_file, tmp_path, request,
                               monkeypatch):
    """Failing with DID NOT RAISE means that a guard is asleep: the bug is planted, its test passes.

    Failing in `mutant` means that the text to break is no longer in genie_mini.py: write it anew.
    """
    broken = mutant(old, new)
    fixtures = {"demo_file": demo_file, "tmp_path": tmp_path, "monkeypatch": monkeypatch}
    needs = inspect.signature(test).parameters
    given = {name: value for name, value in fixtures.items() if name in needs}
    if "whole_run" in needs:
        given["whole_run"] = request.getfixturevalue("whole_run")
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test(**given, **arguments, gm=broken)
    assert test.__doc__.startswith("Failing means"), "pytest shows it: it must say what to look at"


@pytest.mark.parametrize("old, new, test, arguments", [bug[1:] for bug in EXTRAS_BUGS],
                         ids=[bug[0] for bug in EXTRAS_BUGS])
def test_planted_bug_in_the_extras_is_caught(old, new, test, arguments, demo_file, tmp_path,
                                             monkeypatch):
    """Failing means the same as test_planted_bug_is_caught, for extras/."""
    needs = inspect.signature(test).parameters
    fixtures = {"demo_file": demo_file, "tmp_path": tmp_path, "monkeypatch": monkeypatch}
    given = {name: value for name, value in fixtures.items() if name in needs}
    name, module = ("bench", bench) if "bench" in needs else ("window_module", window_module)
    with pytest.raises(AssertionError):
        test(**given, **arguments, **{name: mutant(old, new, module)})


@pytest.mark.parametrize("old, new, test, arguments", [bug[1:] for bug in CHECKPOINT_BUGS],
                         ids=[bug[0] for bug in CHECKPOINT_BUGS])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_planted_bug_in_the_checkpoints_is_caught(old, new, test, arguments, tmp_path,
                                                  monkeypatch):
    """Failing means the same as test_planted_bug_is_caught, for extras/checkpoints.py."""
    broken = mutant(old, new, checkpoints)
    monkeypatch.setitem(globals(), "checkpoints", broken)
    monkeypatch.setitem(sys.modules, "extras.checkpoints", broken)
    fixtures = {"tmp_path": tmp_path, "monkeypatch": monkeypatch}
    needs = inspect.signature(test).parameters
    given = {name: value for name, value in fixtures.items() if name in needs}
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test(**given, **arguments)


@pytest.mark.parametrize("old, new, test, arguments", [bug[1:] for bug in DATA_BUGS],
                         ids=[bug[0] for bug in DATA_BUGS])
def test_planted_bug_in_the_data_is_caught(old, new, test, arguments, tmp_path, monkeypatch,
                                           capsys):
    """Failing means that data_prep.py could be wrong in this way, and no test would say so."""
    monkeypatch.setitem(globals(), "dp", mutant(old, new, dp))
    fixtures = {"tmp_path": tmp_path, "monkeypatch": monkeypatch, "capsys": capsys}
    needs = inspect.signature(test).parameters
    given = {name: value for name, value in fixtures.items() if name in needs}
    with pytest.raises(AssertionError):
        test(**given, **arguments)
    assert test.__doc__.startswith("Failing means"), "pytest shows it: it must say what to look at"


# --- the commands, from a video to a GIF -----------------------------------------------------

TRAIN_STEPS = ["--tok_steps", "6", "--dyn_steps", "6", "--tok_unquantized", "2",
               "--val_sequences", "3", "--val_every", "6"]


def moving_video(path):
    """Ten seconds of a white square that walks around, as a real H.264 file: 6 windows."""
    pictures = []
    for t in range(300):
        picture = np.zeros((128, 128), dtype=np.uint8)
        y, x = 8 * (t // 30) % 96, abs(2 * (t % 96) - 96)
        picture[y:y + 24, x:x + 24] = 255
        pictures.append(picture)
    return encode(path, pictures, steady(30, 10))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with a video's data file and a run trained on it by the command line."""
    folder = tmp_path_factory.mktemp("workspace")
    video, data = moving_video(folder / "walk.mp4"), folder / "walk.npz"
    assert dp.main(["video", str(video), "-o", str(data)]) == 0
    before = signal.getsignal(signal.SIGINT)
    try:
        assert genie_mini.main(["train", "--preset", "smoke", "--data", str(data), *TRAIN_STEPS,
                                "--out", str(folder / "run")]) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    return folder


FIELDS = {
    "tokenizer": {"wrong_pixels", "wrong_pixels_p99", "iou", "codes_used", "perplexity",
                  "flicker"},
    "lam": {"wrong_pixels", "copy_wrong_pixels", "actions_used", "perplexity", "nmi", "accuracy",
            "accuracy_chance"},
    "dynamics": {"psnr_inferred", "psnr_random", "delta_psnr", "delta_psnr_null",
                 "wrong_pixels_inferred", "wrong_pixels_random", "wrong_pixels_copy",
                 "rollout_wrong_pixels", "rollout_wrong_pixels_copy"},
    "world": {"one_hero", "walls_kept"}}


def check_evaluation(path):
    """Every field that the README names is there, and every number is a number."""
    result = json.loads(path.read_text(encoding="utf-8"))
    assert set(result) == set(FIELDS)
    for part, names in FIELDS.items():
        assert names <= set(result[part]), part
    assert set(result["dynamics"]["rollout_wrong_pixels"]) == {"4", "8", "15"}
    assert result["lam"]["nmi"] is None, "the video's true actions are not known"
    dynamics = result["dynamics"]
    assert dynamics["delta_psnr"] == pytest.approx(
        dynamics["psnr_inferred"] - dynamics["psnr_random"])
    assert 0 <= result["tokenizer"]["iou"] <= 1
    assert 0 <= result["tokenizer"]["wrong_pixels"] <= 4096


def test_train_leaves_a_whole_run(workspace):
    """Failing means that training from a video does not end with all that the README promises."""
    run = workspace / "run"
    expected = {"checkpoint.pt", "checkpoint.previous.pt", "metrics.csv", "losses.png",
                "reconstruction.png", "rollout.png", "buttons.png", "eval.json"}
    assert {path.name for path in run.iterdir()} == expected
    for name in expected:
        if name.endswith(".png"):
            with Image.open(run / name) as image:
                image.verify()
    with Image.open(run / "buttons.png") as image:
        assert image.size == (72 + 17 * 66, 8 * 66), "eight rows of 16 frames and an arrow"
    check_evaluation(run / "eval.json")
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    assert rows[0][:3] == ["stage", "step", "lr"] and {len(row) for row in rows} == {len(rows[0])}
    assert [row[:2] for row in rows[1:]] == [["tokenizer", "5"], ["tokenizer", "6"],
                                             ["world", "5"], ["world", "6"]]


def test_eval_command(workspace, tmp_path, capsys):
    """Failing means that eval does not report what the README says."""
    for split in ("test", "val"):
        out, figure = tmp_path / f"{split}.json", tmp_path / f"{split}.png"
        clips = tmp_path / f"{split}_clips.png"
        assert genie_mini.main(["eval", "--run", str(workspace / "run"), "--split", split, "--json",
                                str(out), "--figure", str(figure), "--clips", str(clips),
                                "--count", "3"]) == 0
        check_evaluation(out)
        for path, size in ((figure, (72 + 17 * 66, 8 * 66)), (clips, (72 + 16 * 66, 9 * 66))):
            with Image.open(path) as image:
                assert image.size == size
    assert "delta_psnr" in capsys.readouterr().out
    first, second = (json.loads((tmp_path / f"{s}.json").read_text()) for s in ("test", "val"))
    assert first != second, "the splits must differ"
    trained = json.loads((workspace / "run" / "eval.json").read_text())
    assert first == trained, "training ends with the evaluation of the test split"


def test_a_run_can_be_sampled_anew(workspace, tmp_path):
    """Failing means that eval and play ignore the settings that they are given."""
    flags = ("--temperature 0.25 --order_noise 0 --maskgit_steps 3 --mask_schedule adaptive"
             " --precision bfloat16")
    command = ["eval", "--run", str(workspace / "run"), *flags.split()]
    args = genie_mini.build_parser().parse(command)
    config = genie_mini.load_run(args).config
    assert (config.temperature, config.order_noise, config.maskgit_steps, config.mask_schedule,
            config.precision) == (0.25, 0, 3, "adaptive", "bfloat16")
    made = [gif_frames(play_command(workspace, tmp_path / f"{t}.gif", "--actions", "0,1,2,3",
                                    "--temperature", str(t))) for t in (0, 50)]
    assert (made[0] != made[1]).any()


def gif_frames(path, scale=4):
    """The frames of a GIF of play, enlarged `scale` times: (n, 64, 64) of 0 and 1."""
    with Image.open(path) as image:
        frames = []
        for i in range(image.n_frames):
            image.seek(i)
            frames.append(np.array(image.convert("L"))[::scale, ::scale] // 255)
    return np.stack(frames)


def play_command(workspace, out, *arguments):
    """Run play on the workspace's run; returns the path of the GIF."""
    assert genie_mini.main(["play", "--run", str(workspace / "run"), "--out", str(out),
                            *arguments]) == 0
    return out


def duration(path):
    """Milliseconds that a GIF lasts: 100 a frame. (Equal frames are stored as one long one.)"""
    with Image.open(path) as image:
        total = 0
        for i in range(image.n_frames):
            image.seek(i)
            total += image.info["duration"]
    return total


@pytest.mark.parametrize("count", [1, 3, 20])
def test_play_from_the_data(workspace, tmp_path, count):
    """Failing means that play starts elsewhere, or presses more or fewer buttons than asked."""
    buttons = ",".join(str(t % 8) for t in range(count))
    out = play_command(workspace, tmp_path / "a.gif", "--start", "2", "--actions", buttons)
    assert duration(out) == 100 * (count + 1)
    first = files.unpack(files.load_split(workspace / "walk.npz", "test")["bits"])[2, 0]
    assert (gif_frames(out)[0] == first).all()
    again = play_command(workspace, tmp_path / "b.gif", "--start", "2", "--actions", buttons)
    assert out.read_bytes() == again.read_bytes(), "the same seed, the same dream"


def test_play_from_an_image(workspace, tmp_path):
    """Failing means that one cannot start from a picture of one's own."""
    frame = worlds.DemoWorld(3).frame()
    Image.fromarray(frame * 255).resize((320, 320), 0).save(tmp_path / "start.png")
    out = play_command(workspace, tmp_path / "a.gif", "--image", str(tmp_path / "start.png"),
                       "--actions", "0,1", "--seed", "3")
    assert (gif_frames(out)[0] == frame).all() and duration(out) == 300


def test_play_without_actions_shows_every_button(workspace, tmp_path):
    """Failing means that bare play does not show what each of the eight buttons does."""
    out = play_command(workspace, tmp_path / "a.gif")
    assert duration(out) == 1600
    panels = np.split(gif_frames(out, 2)[0], 8, axis=1)                 # 64 pixels and a gap each
    first = files.unpack(files.load_split(workspace / "walk.npz", "test")["bits"])[0, 0]
    assert all((panel[:, :64] == first).all() for panel in panels)


@pytest.fixture
def window(workspace, monkeypatch, tmp_path):
    """A window to play in, on matplotlib's Agg canvas: it draws as on a screen, unseen."""
    import matplotlib
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    genie = genie_mini.Genie.load(workspace / "run" / "checkpoint.pt")
    firsts = genie_mini.Sequences(workspace / "walk.npz", "test").frames([0, 2])[:, 0]
    arrows = {"up": 1, "down": 2, "left": 3, "right": 4, " ": 0}
    window = window_module.Window(genie, firsts, arrows, genie_mini.seeded(0))
    yield window
    window.close()


def press(window, *keys, release=True):
    """Press each key on the window's canvas, as a keyboard would, and let a frame go by."""
    from matplotlib.backend_bases import KeyEvent
    for key in keys:
        KeyEvent("key_press_event", window.figure.canvas, key)._process()
        if release:
            KeyEvent("key_release_event", window.figure.canvas, key)._process()
        window.tick()


def test_keys_press_buttons(window):
    """Failing means that a key presses another button than it says, that a tap is lost or counts
    twice, that a key held down is let go, or that nothing happens when no key is pressed."""
    rest = window.arrows[" "]
    press(window, "3", "up", "right", " ", "x")
    window.tick()
    assert list(window.pressed) == [3, 1, 4, rest, rest, rest]
    press(window, "7", release=False)
    window.tick()
    press(window, "left")
    window.tick()
    assert list(window.pressed)[6:] == [7, 7, 3, rest]


def test_a_button_leads_where_the_window_said(window):
    """Failing means that the small frames under the picture are not what the buttons will do, or
    that the dream goes on from what another button would have led to."""
    genie = window.genie
    genie.config.temperature, genie.config.maskgit_steps = 0.0, 1       # so a sketch is the frame
    window.look_ahead()
    for key in "0", "5":                            # a third press would begin a new memory
        promised, before = window.futures[int(key)].copy(), window.state
        press(window, key)
        expected = genie.step(before, int(key))[1]
        assert (window.frame == promised).all() and (window.state.tokens == expected.tokens).all()
        assert (expected.actions != genie.step(before, 7)[1].actions).any()
        shown = window.picture()
        assert (shown[:512:8, 8:520:8] == promised * 255).all()         # enlarged 8 times
        for a in range(8):
            assert (shown[514:, 66 * a:66 * a + 64] == window.futures[a] * 255).all()
        drawn = np.asarray(window.image.get_array())[..., 0]
        assert (drawn == shown).all(), "the window shows another"


def test_the_frame_takes_all_passes_and_a_sketch_one(window, monkeypatch):
    """Failing means that the played frame is sketched too, or that the sketches cost as much."""
    calls, forward = [], genie_mini.DynamicsModel.forward

    def counted(self, tokens, *args, **kwargs):
        calls.append(len(tokens))
        return forward(self, tokens, *args, **kwargs)
    monkeypatch.setattr(genie_mini.DynamicsModel, "forward", counted)
    window.tick()
    passes = window.genie.config.maskgit_steps
    assert passes > 1 and calls == [1] * (passes + 1) + [8]         # one more to remember


def test_the_futures_are_those_of_one_past(window):
    """Failing means that the eight dreams that share a past influence each other, or that one of
    them differs from having played it alone."""
    genie, state = window.genie, window.genie.start(window.firsts[0])
    genie.config.temperature, genie.config.maskgit_steps = 0.0, 1   # no order to tip by rounding
    for action in (4, 1, 1, 6):
        frames, many = genie.step(state.copies(8), torch.arange(8))
        frame, state = genie.step(state, action)
        assert (frames[action] == frame[0]).all() and (many.tokens[action] == state.tokens).all()
        for pair, other in zip(many.dynamics, state.dynamics):
            for all_eight, alone in zip(pair, other):                   # (8 N, ...) and (N, ...)
                assert close(all_eight.unflatten(0, (8, -1))[action], alone)


def test_restart_save_and_quit(window, tmp_path):
    """Failing means that R, S or Q do nothing, or that S writes over an earlier film."""
    import matplotlib.pyplot as plt
    (tmp_path / "dream-1.gif").write_bytes(b"mine")
    press(window, "1", "2", "s")                         # the film: the first frame and two more
    assert duration(tmp_path / "dream-2.gif") == 300 and "dream-2.gif" in window.note
    assert (tmp_path / "dream-1.gif").read_bytes() == b"mine"
    assert (gif_frames(tmp_path / "dream-2.gif")[0] == window.firsts[0].numpy()).all()
    press(window, "r")
    assert len(window.film) == 2                         # anew, and one frame since
    assert (np.unpackbits(window.film[0], axis=-1) == window.firsts[1].numpy()).all()
    number = window.figure.number
    press(window, "q")
    assert not plt.fignum_exists(number)


def test_a_full_disk_does_not_end_the_dream(window, monkeypatch):
    """Failing means that an error in saving ends the session, or goes unsaid."""
    def full(*_, **__):
        raise OSError("No space left on device")
    monkeypatch.setattr(window_module, "save_gif", full)
    press(window, "s", "1")
    assert "No space left" in window.note and window.pressed[-1] == 1


def test_readme_is_short_and_its_links_lead_somewhere():
    """Failing means that a newcomer has too much to read, or follows a link to nothing."""
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 250 and len(text.encode()) <= 14 * 1024 and "@@" not in text
    assert text.index("genie_mini.py train") < text.index("\n## "), "the second command comes soon"
    for page in (ROOT / "README.md", ROOT / "extras" / "MEASUREMENTS.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
            assert link.startswith("https:") or (page.parent / link).is_file(), f"{page}: {link}"


def test_readme_shows_an_agent_in_the_dream():
    """Failing means that the Python code in README does not run as it stands."""
    readme = (Path(__file__).parent / "README.md").read_text("utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1)
    code = code.replace('"assets/demo.pt"', repr(str(genie_mini.DEMO_CHECKPOINT)))
    seen, names = [], {"agent": lambda frame: seen.append(np.asarray(frame)) or 3}
    exec(code, names)
    assert len(seen) == 64 and (seen[0] == worlds.DemoWorld(7).frame()).all()
    shown = pictures.Animation(names["film"])._repr_html_()
    gif = base64.b64decode(re.search("base64,([^\"]*)", shown).group(1))
    assert (np.array(Image.open(io.BytesIO(gif)))[::4, ::4] > 0).tolist() == (
        names["film"][0] > 0).tolist()


def test_play_without_a_display_says_what_to_do(workspace, monkeypatch, capsys):
    """Failing means that over SSH play ends in a traceback, or in nothing at all."""
    import matplotlib
    matplotlib.use("Agg")
    assert genie_mini.main(["play", "--run", str(workspace / "run")]) == 2
    assert "MPLBACKEND=WebAgg" in capsys.readouterr().err


def test_play_force_replaces(workspace, tmp_path):
    """Failing means that --force does not replace the animation."""
    (tmp_path / "a.gif").write_bytes(b"old")
    out = play_command(workspace, tmp_path / "a.gif", "--actions", "0", "--force")
    assert duration(out) == 200


def test_resume_command(workspace, tmp_path, capsys):
    """Failing means that an interrupted run cannot be taken up from the command line, or that a
    finished one is trained again."""
    run = tmp_path / "run"
    shutil.copytree(workspace / "run", run)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert genie_mini.main(["train", "--resume", "--out", str(run)]) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    for name in ("metrics.csv", "eval.json"):
        assert (run / name).read_bytes() == (workspace / "run" / name).read_bytes()
    assert "tokenizer 1/6" not in capsys.readouterr().out


def test_resume_wants_the_same_video(workspace, tmp_path, capsys):
    """Failing means that a run is resumed on another video than it began on, perhaps one that was
    prepared anew under the same name, or not on the same one in another place."""
    run, data = tmp_path / "run", tmp_path / "moved.npz"
    shutil.copytree(workspace / "run", run)
    command = ["train", "--resume", "--out", str(run), "--data", str(data)]
    shutil.copy(workspace / "walk.npz", data)
    assert genie_mini.main(command) == 0
    arrays = dict(np.load(data, allow_pickle=False))
    arrays["train"][-1, -1, -1, -1] ^= 1                           # one pixel of the last frame
    np.savez(data, **arrays)
    before = (run / "checkpoint.pt").read_bytes()
    assert genie_mini.main(command) == 2
    assert "is not the video that this run began on" in capsys.readouterr().err
    assert (run / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_goes_on_exactly(workspace, tmp_path, monkeypatch, capsys, number, status):
    """Failing means that Ctrl-C or SIGTERM loses a step, or that a run whose newest checkpoint was
    then damaged cannot be taken up, from the one before, to end as if nothing had happened. The
    folder's name has a space and an accent."""
    folder, step = tmp_path / "my réseau", genie_mini.Trainer.optimizer_step
    out, data = folder / "a run", folder / "walk.npz"
    folder.mkdir()
    shutil.copy(workspace / "walk.npz", data)

    def interrupted(trainer):
        if (trainer.stage, trainer.step) == (1, 2):
            signal.raise_signal(number)
        return step(trainer)

    monkeypatch.setattr(genie_mini.Trainer, "optimizer_step", interrupted)
    monkeypatch.setattr(genie_mini, "evaluate", lambda *_: {})          # slow, and tested elsewhere
    monkeypatch.setattr(window_module, "draw_buttons", lambda *_: None)
    assert genie_mini.main(["train", "--preset", "smoke", "--data", str(data), *TRAIN_STEPS,
                            "--out", str(out)]) == status
    assert f'--resume --out "{out}"' in capsys.readouterr().out
    stopped = checkpoints.read_checkpoint(out / "checkpoint.pt")
    assert (stopped["stage"], stopped["step"]) == (1, 3), "the step was finished, and saved"
    newest = out / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:5000])
    genie_mini.Genie.load(newest)
    monkeypatch.setattr(genie_mini.Trainer, "optimizer_step", step)
    command, statuses = ["train", "--resume", "--out", str(out)], []
    thread = threading.Thread(target=lambda: statuses.append(genie_mini.main(command)))
    thread.start()                                       # no signals there, as in a web server
    thread.join()
    said = capsys.readouterr()
    assert statuses == [0] and f'play --run "{out}"' in said.out
    assert said.err.count("Taking the one before it") == 2
    assert newest.with_suffix(".damaged.pt").stat().st_size == 5000
    ends = [checkpoints.read_checkpoint(run / "checkpoint.pt")["model"]
            for run in (out, workspace / "run")]
    assert all((ends[0][name] == ends[1][name]).all() for name in ends[0])
    assert (out / "metrics.csv").read_bytes() == (workspace / "run/metrics.csv").read_bytes()


def test_lack_of_memory_is_told_in_one_sentence(monkeypatch, capsys):
    """Failing means that too large a batch ends in a traceback, or that a bug of ours does not."""
    for message, told in (("CUDA out of memory. Tried to allocate 2 GiB", True),
                          ("can't allocate memory: you tried to allocate 9 bytes", True),
                          ("an illegal memory access was encountered", False)):
        def fail(args):
            raise RuntimeError(message)
        monkeypatch.setattr(bench, "bench", fail)
        if told:
            assert genie_mini.main(["bench"]) == 2 and "micro_batch" in capsys.readouterr().err
        else:
            with pytest.raises(RuntimeError):
                genie_mini.main(["bench"])


def test_training_gives_ctrl_c_back(workspace, tmp_path):
    """Failing means that after training in a notebook, Ctrl-C no longer works there."""
    before = signal.getsignal(signal.SIGINT)
    shutil.copytree(workspace / "run", tmp_path / "run")
    try:
        genie_mini.main(["train", "--resume", "--out", str(tmp_path / "run")])
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name, lines", [("demo", 23), ("memory", 25), ("memory_card", 25),
                                         ("full", 24),
                                         ("laptop", 23), ("boxing", 18)])
def test_readme_shows_the_recorded_numbers(capsys, name, lines):
    """Failing means that an evaluation in MEASUREMENTS is not the one recorded in assets/. Of a
    real video nobody knows the true actions, nor where a hero must be."""
    genie_mini.print_table(json.loads((ROOT / "assets" / f"{name}.json").read_text("utf-8")))
    table = capsys.readouterr().out
    known = [line for line in table.splitlines() if not line.endswith(" None")]
    assert len(known) == lines
    assert "\n".join("    " + line for line in known) in measurements()


ASSETS = ROOT / "assets"
SEEDS = (("demo.json", "demo_metrics.csv"), ("seed1.json", "seed1.csv"),
         ("seed2.json", "seed2.csv"))


def seeds_table():
    """MEASUREMENTS' table of the three seeds' evaluations, a line at a time."""
    runs = [json.loads((ASSETS / name).read_text("utf-8")) for name, _ in SEEDS]
    for part, name, goal, digits in (
            ("tokenizer", "wrong_pixels", "≤ 4", 3), ("tokenizer", "iou", "≥ 0.985", 3),
            ("tokenizer", "codes_used", "≥ 28", 0), ("lam", "wrong_pixels", "≤ 40", 1),
            ("lam", "accuracy", "≥ 0.90", 3), ("lam", "nmi", "≥ 0.75", 3),
            ("lam", "perplexity", "≥ 4", 2), ("dynamics", "delta_psnr", "≥ 3", 2),
            ("dynamics", "delta_psnr_marginal", "≥ 3", 2),
            ("dynamics", "delta_psnr_null", "within ± 0.3", 2),
            ("dynamics", "wrong_pixels_inferred", "≤ 40", 1),
            ("world", "one_hero", "≥ 0.95", 3), ("world", "walls_kept", "1", 3)):
        values = [run[part][name] for run in runs]
        spread = np.std(values, ddof=1)
        cells = [f"{value:.{digits}f}" for value in (*values, np.mean(values), spread)]
        yield f"| {part}.{name} | {goal} | {' | '.join(cells[:3])} | {cells[3]} ± {cells[4]} |"


def progress_table():
    """MEASUREMENTS' table of the three seeds' progress: lowest to highest at 10, 50 and 100 %."""
    runs = []
    for _, name in SEEDS:
        lines = (ASSETS / name).read_text("utf-8").splitlines()
        rows = [dict(zip(lines[0].split(","), line.split(","))) for line in lines[1:]]
        runs.append({(row["stage"], int(row["step"])): row for row in rows})
    for title, stage, column, digits in (
            ("pixel loss of the tokenizer (train)", "tokenizer", "pixel_loss", 4),
            ("wrong pixels of the LAM in the next frame (val)", "world", "val_wrong_pixels", 1),
            ("perplexity of the actions (val)", "world", "val_perplexity", 1),
            ("dynamics loss, nats a masked token (val)", "world", "val_dynamics_loss", 4)):
        last, cells = max(step for name, step in runs[0] if name == stage), []
        for step in (last // 10, last // 2, last):
            values = [run[stage, step][column] for run in runs]
            cells.append("not quantized yet" if not all(values) else " to ".join(
                f"{end(map(float, values)):.{digits}f}" for end in (min, max)))
        yield f"| {title} | {' | '.join(cells)} |"


def ablation_table():
    """MEASUREMENTS' table of what each switch is worth: a short run a line."""
    for name, row in json.loads((ASSETS / "ablations.json").read_text("utf-8")).items():
        lam, dynamics = row["lam"], row["dynamics"]
        yield (f"| {name} | {'`' + row['flags'] + '`' if row['flags'] else ''} | "
               f"{lam['accuracy']:.3f} | {lam['nmi']:.2f} | {lam['perplexity']:.1f} | "
               f"{dynamics['delta_psnr']:.1f} | {dynamics['wrong_pixels_inferred']:.1f} | "
               f"{row['world']['one_hero']:.2f} |")


def bfloat16_table():
    """MEASUREMENTS' table of a run in bfloat16 beside the three seeds, a line at a time."""
    rounded = json.loads((ASSETS / "bfloat16.json").read_text("utf-8"))
    runs = [json.loads((ASSETS / name).read_text("utf-8")) for name, _ in SEEDS]
    for part, name, digits in (
            ("tokenizer", "wrong_pixels", 3), ("lam", "wrong_pixels", 2), ("lam", "accuracy", 3),
            ("lam", "nmi", 3), ("dynamics", "delta_psnr", 2),
            ("dynamics", "wrong_pixels_inferred", 1), ("world", "one_hero", 3)):
        least, most = (f"{end(run[part][name] for run in runs):.{digits}f}" for end in (min, max))
        yield f"| {part}.{name} | {rounded[part][name]:.{digits}f} | {least} to {most} |"


@pytest.mark.parametrize("table, lines", [(seeds_table, 13), (progress_table, 4),
                                          (ablation_table, 11), (bfloat16_table, 7)])
def test_readme_shows_the_recorded_seeds(table, lines):
    """Failing means that a number in a table of MEASUREMENTS is not the one in assets/."""
    shown = measurements().splitlines()
    first, *rest = table()
    start = shown.index(first)
    assert shown[start:start + lines] == [first, *rest]


def test_shipped_checkpoint_knows_its_buttons(demo_file):
    """Failing means that the pretrained checkpoint in assets/ does not load, or that its actions
    no longer say what the hero does: chance is below 0.6 here, and it was shipped with 0.99."""
    genie = genie_mini.Genie.load(genie_mini.DEMO_CHECKPOINT)
    data = genie_mini.Sequences(demo_file, "train")
    result = genie_mini.evaluate_lam(genie, data, genie_mini.spread(data, 12))
    assert result["accuracy_chance"] < 0.6 and result["accuracy"] > 0.9
    assert result["wrong_pixels"] < 0.2 * result["copy_wrong_pixels"]


def test_bench_command(tmp_path, capsys):
    """Failing means that bench is broken, or that the cache it times is not exact."""
    out = tmp_path / "bench.json"
    assert genie_mini.main(["bench", "--preset", "smoke", "--json", str(out)]) == 0
    result, printed = json.loads(out.read_text(encoding="utf-8")), capsys.readouterr().out
    assert set(result) == {"doctor", "train", "play", "memory", "machine"}
    assert f'doctor {json.dumps(result["doctor"])}' in printed
    assert result["doctor"]["ok"] and result["doctor"]["max_abs_diff_cpu"] < 0.01
    for stage in ("tokenizer", "world"):
        row = result["train"][stage]
        assert set(row) == {"sequences_per_s", "sequences_per_s_range", "mfu", "gflop",
                            "speedup_over_baseline", "micro_batch"}
        assert 0 < row["sequences_per_s_range"][0] <= row["sequences_per_s"]
        assert 0 < row["mfu"] < 2 and row["gflop"] > 0 and row["speedup_over_baseline"] > 0
    play = result["play"]
    assert {"fps", "fps_range", "fps_uncached", "mfu", "speedup", "max_abs_diff"} <= set(play)
    assert play["fps"] > 0 and play["speedup"] == pytest.approx(play["fps"] / play["fps_uncached"])
    assert play["max_abs_diff"] < 1e-4
    assert result["memory"]["peak_gib"] is None or result["memory"]["peak_gib"] > 0
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) == 5 and {line.count("|") for line in table} == {6}, "Markdown"


def test_bench_memory(capsys):
    """Failing means that the table of memory in MEASUREMENTS cannot be made again."""
    assert genie_mini.main("bench --memory --preset smoke --micro_batch 2".split()) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if " GiB |" in line]
    assert [row.split("|")[1:3] for row in rows] == [[" tokenizer ", " 2 "], [" world ", " 2 "]]


def block_flops(T, side, D, full):
    """Float operations of training one block on one clip of T frames of side x side patches. Full
    attention is space attention in which all patches of the clip stand in one large frame."""
    side, T = (math.isqrt(T) * side, 1) if full else (side, T)
    with torch.device("meta"):                           # shapes without numbers: to count is free
        block = genie_mini.STBlock(D, 4, side)
        x = torch.empty(1, T, side ** 2, D)
    block.time = None if full else block.time
    return bench.count_flops(lambda: block(x)[0].sum().backward())


def test_cost_grows_with_frames():
    """Failing means that the cost of ST-attention does not grow in proportion to the frames, that
    the comparison with full attention is not of the same patches, or MEASUREMENTS shows another."""
    # A product of (a, b) and (b, c) is 2abc; backward twice that. Space's projections and the
    # feed-forward network are 12 D x D products a patch, time's projections 4, a pair of patches 2.
    D, N = 16, 16
    for T in (1, 4, 16):
        assert block_flops(T, 4, D, True) == 6 * (12 * T * N * D * D + 2 * (T * N) ** 2 * D)
        assert block_flops(T, 4, D, False) == 6 * (
            16 * T * N * D * D + 2 * T * N * N * D + 2 * N * T * T * D), "not (T * N)^2"
    for name, full in (("ST-attention", False), ("full attention", True)):
        cells = [f"{block_flops(T, 16, 128, full) / 1e9:.3g}" for T in (1, 4, 16)]
        assert f"| {name}, GFLOP | {' | '.join(cells)} |" in measurements()


@pytest.mark.parametrize("arguments, expected", [
    ("", "required"),
    ("tarin", "invalid choice"),
    ("train --tok_dims 64", "did you mean --tok_dim?"),
    ("train --data D --learning_rate 1", "--learning_rate"),
    ("train --data D --preset smoke --tok_dim wide", "--tok_dim"),
    ("train --data D --preset smoke --batch 1.5", "--batch"),
    ("train --data D --preset smoke --tok_attention maybe", "--tok_attention"),
    ("train --data D --preset huge", "choose full, laptop, memory, smoke"),
    ("train --data D --preset smoke --device tpu", "--device"),
    ("train --data D --preset smoke --tok_dim 36 --heads 8", "multiple of"),
    ("train --data D --preset smoke --dyn_dim 18", "multiple of"),
    ("train --data D --preset smoke --lr nan", "--lr is nan"),
    ("train --data D --preset smoke --lr inf", "--lr is inf"),
    ("train --data D --preset smoke --lr -1", "--lr is -1"),
    ("train --data D --preset smoke --seed -1", "--seed"),
    ("train --data D --preset smoke --mask_min 1.5", "--mask_min"),
    ("train --data D --preset smoke --temperature -1", "--temperature"),
    ("train --data D --preset smoke --tok_steps -5", "--tok_steps"),
    ("train --data D --preset smoke --tok_frames 17", "--tok_frames"),
    ("train --data D --preset smoke --dyn_frames 1", "--dyn_frames"),
    ("train --data D --preset smoke --lam_patch 7", "must divide 64"),
    ("train --data D --preset smoke --dyn_fold 3", "must divide 16"),
    ("train --data D --preset smoke --lam_view all", "choose change, frames"),
    ("train --data none.npz --preset smoke", "none.npz"),
    ("train --data text.npz --preset smoke", "text.npz"),
    ("train --data . --preset smoke", "."),
    ("train --data D --preset smoke --out RUN", "already holds a run"),
    ("train --data D --preset smoke --out text.npz", "text.npz"),
    ("train --resume", "--out"),
    ("train --resume --out none", "no checkpoint"),
    ("train --resume --out RUN --lr 0.5", "--lr cannot be given"),
    ("train --resume --out RUN --preset full", "--preset cannot be given"),
    ("train --resume --out RUN --data none.npz", "none.npz"),
    ("eval --run none", "no checkpoint"),
    ("eval --run text.npz", "not a checkpoint"),
    ("eval --run RUN --split trial", "--split"),
    ("eval --run RUN --count 0", "--count"),
    ("eval --run RUN --data none.npz", "none.npz"),
    ("eval --run RUN --jsno x", "did you mean --json?"),
    ("eval --run RUN --json x.txt", "must end in .json"),
    ("eval --run RUN --figure x.jpg", "must end in .png"),
    ("eval --run RUN --temperature -1", "must be a number from 0"),
    ("eval --run RUN --json text.npz/x.json", "cannot write in"),
    ("bench --preset smoke --json x.txt", "must end in .json"),
    ("train --data D --preset smoke --micro_batch some", "--micro_batch"),
    ("train --data D --preset smoke --micro_batch -1", "--micro_batch is -1"),
    ("play --run RUN --actions 8", "0 to 7"),
    ("play --run RUN --actions -1", "0 to 7"),
    ("play --run RUN --actions 0,-1", "0 to 7"),
    ("play --run RUN --actions a", "whole numbers"),
    ("play --run RUN --actions 0,,1", "whole numbers"),
    ("play --run RUN --actions 1.5", "whole numbers"),
    ("play --run RUN --actions=", "whole numbers"),
    ("play --run RUN --actions 8 --out new/roll.gif", "0 to 7"),
    ("play --run RUN --actions 1_0", "0 to 7"),
    ("play --run RUN --actions " + "0," * 3000 + "0", "3001 buttons"),
    ("play --run RUN --actions " + "9" * 5000, "whole numbers"),
    ("play --run RUN --actions 0 --out .", "is a directory"),
    ("play --run RUN --actions 0 --out text.npz/a.gif", "cannot write in"),
    ("play --run half --actions 0", "no checkpoint"),
    ("play --run cut --actions 0", "is damaged"),
    ("train --resume --out half", "no checkpoint"),
    ("train --resume --out cut", "is damaged"),
    ("train --data D --preset smoke --out cut", "already holds a run"),
    ("train --data D --preset smoke --out text.npz/run", "text.npz"),
    ("train --data D --preset smoke --tok_dim 10000000", "--tok_dim"),
    ("train --data D --preset smoke --dyn_layers 1000000", "--dyn_layers"),
    ("train --data D --preset smoke --batch 1" + "0" * 400, "--batch"),
    ("eval --run RUN --split test --data text.npz", "text.npz"),
    ("eval --run RUN --json .", "is a directory"),
    ("play --run RUN --actions 0 --out roll.mp4", ".gif"),
    ("play --run RUN --actions 0 --out there.gif", "--force"),
    ("play --run RUN --actions 0 --start 99", "--start 99"),
    ("play --run RUN --actions 0 --start -1", "--start -1"),
    ("play --run RUN --actions 0 --seed -1", "--seed"),
    ("play --run RUN --actions 0 --image none.png", "none.png"),
    ("play --run RUN --actions 0 --image text.npz", "text.npz"),
    ("play --run RUN --actions 0 --image a.png --start 1", "one of them"),
    ("play --run none --actions 0", "no checkpoint"),
    ("bench --preset smoke --tok_dim 0", "--tok_dim"),
    ("bench --preset none", "choose full"),
    ("bench --preset smoke --run x", "--run"),
])
def test_model_mistakes_get_one_sentence(workspace, tmp_path, monkeypatch, capsys, arguments,
                                         expected):
    """Failing means that a user's mistake ends in a traceback, a wrong status, or debris."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.npz").write_text("no data", encoding="utf-8")
    (tmp_path / "there.gif").write_bytes(b"precious")
    for name in ("half", "cut"):                                        # runs that were cut short
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text("stage,step\n", encoding="utf-8")
    (tmp_path / "cut" / "checkpoint.pt").write_bytes(b"PK")
    before, run = sorted(tmp_path.rglob("*")), workspace / "run" / "metrics.csv"
    log = run.read_bytes()
    names = {"D": str(workspace / "walk.npz"), "RUN": str(workspace / "run")}
    handler = signal.getsignal(signal.SIGINT)
    try:
        status = genie_mini.main([names.get(word, word) for word in arguments.split()])
    finally:
        signal.signal(signal.SIGINT, handler)
    err = capsys.readouterr().err
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert expected in err
    assert sorted(tmp_path.rglob("*")) == before, "nothing may be created"
    assert (tmp_path / "there.gif").read_bytes() == b"precious" and run.read_bytes() == log


def test_status_and_stderr_of_genie_mini(tmp_path):
    """Failing means that scripts cannot tell from the exit status that something went wrong."""
    run = subprocess.run([sys.executable, genie_mini.__file__, "eval", "--run", "none"],
                         cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1


# --- as a program ---------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["data_prep.py", "genie_mini.py"])
def test_programs_run_in_a_notebook_and_outlive_their_reader(program, tmp_path):
    """Failing means that %run, whose output is no file, ends in a traceback, or that `| head -1`
    ends the work behind it."""
    in_a_notebook = ("import contextlib, io, runpy, sys; sys.argv[1:] = ['--help']\n"
                     "out = io.StringIO()\nwith contextlib.redirect_stdout(out):\n"
                     f"    try: runpy.run_path({str(ROOT / program)!r}, run_name='__main__')\n"
                     "    except SystemExit as end: assert not end.code, end.code\n"
                     "assert 'usage' in out.getvalue()")
    subprocess.run([sys.executable, "-c", in_a_notebook], check=True, cwd=ROOT)
    read, write = os.pipe()
    os.close(read)                                                      # nobody will ever read
    order = {"data_prep.py": f"demo --minutes 1 -o {tmp_path / 'd.npz'}",
             "genie_mini.py": "--help"}[program]
    ended = subprocess.run([sys.executable, ROOT / program, *order.split()], stdout=write,
                           stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_run_whose_data_moved_says_what_to_name(demo_file, tmp_path, gm=genie_mini):
    """Failing means that resuming or evaluating a run whose data file has moved, or from another
    folder, advises to make the data anew, not to say where it is."""
    trainer = tiny_trainer(gm, demo_file, tmp_path / "run", 1)
    trainer.data = "gone/moved.npz"
    trainer.save()
    for command in ("train --resume --out", "eval --run", "play --actions 1 --out a.gif --run"):
        with pytest.raises(gm.UserError, match="gone.moved.npz, is not there: name it by --data"):
            args = gm.build_parser().parse([*command.split(), str(tmp_path / "run")])
            args.function(args)


def test_what_a_killed_run_left_is_swept(tmp_path, gm=genie_mini):
    """Failing means that half-written files pile up in a run's folder, or a user's file is lost."""
    left = [".checkpoint.pt.123.tmp", ".metrics.csv.7.tmp", ".rollout.png.99.tmp"]
    kept = [".notes.2024.tmp", "checkpoint.pt", ".checkpoint.pt.tmp", "rollout.png.1.tmp"]
    for name in left + kept:
        (tmp_path / name).touch()
    files.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(kept)


def test_resuming_takes_what_changes_no_result(demo_file, tmp_path, gm=genie_mini):
    """Failing means that a run which ran out of memory, or has moved to another machine, cannot
    follow the advice to resume it in smaller micro-batches or on another device."""
    tiny_trainer(gm, demo_file, tmp_path / "run", 1).save()
    args = gm.build_parser().parse(["train", "--resume", "--out", str(tmp_path / "run"),
                                    *"--micro_batch 2 --device cpu --precision bfloat16".split()])
    c = gm.prepare(args).c
    assert (c.micro_batch, c.device, c.precision) == (2, "cpu", "bfloat16")


@pytest.mark.parametrize("cuda, flags, preset", [
    (True, "", "full"), (True, "--device cuda", "full"), (True, "--device cpu", "laptop"),
    (False, "", "laptop"), (True, "--preset smoke", "smoke")])
def test_bare_train_suits_the_machine(cuda, flags, preset, monkeypatch, gm=genie_mini):
    """Failing means that `train` alone takes a preset that its device would need months for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    args = gm.build_parser().parse(["train", *flags.split()])
    assert gm.make_config(args).preset == preset


def test_a_log_that_cannot_be_written_stops_no_run(demo_file, tmp_path, capsys, monkeypatch,
                                                   gm=genie_mini):
    """Failing means that metrics.csv open in a spreadsheet, or a picture held by a virus scanner,
    ends hours of training."""
    def held(*_):
        raise PermissionError(13, "held by another program")
    monkeypatch.setattr(gm, "draw_curves", held)
    trainer = tiny_trainer(gm, demo_file, tmp_path, 0)
    (tmp_path / "metrics.csv").mkdir()                                  # cannot be replaced
    for step in (1, 2):
        trainer.log({"stage": "tokenizer", "step": step}, 1.0)
    said = capsys.readouterr().err
    assert said.count("metrics.csv") == said.count("held by another") == 1, "told once"
    assert len(trainer.rows) == 2


# --- the notebooks ----------------------------------------------------------------------------

NOTEBOOKS = sorted((Path(__file__).parent / "notebooks").glob("*.ipynb"))


def code_cells(path):
    """The code cells of a notebook, as dicts."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def kinds(cell):
    """What a cell shows, in kind: streams (joined, as their cuts are chance) and MIME types."""
    found = []
    for output in cell["outputs"]:
        kind = (output["output_type"], output.get("name"), *sorted(output.get("data", {})))
        if kind[0] != "stream" or kind not in found:
            found.append(kind)
    return found


def test_instructions_name_what_exists():
    """Failing means that assignments.md sends students to a function that is no longer there."""
    text = (ROOT / "notebooks" / "assignments.md").read_text("utf-8")
    code = "".join(path.read_text("utf-8") for folder in (".", "extras", "notebooks")
                   for path in (ROOT / folder).glob("*.py"))
    theirs = {"FSQ", "FullAttention"}                                   # for students to write
    for name in re.findall(r"`([A-Za-z_][\w.]*)", re.sub("```.*?```", "", text, flags=re.DOTALL)):
        for part in set(name.split(".")) - theirs:
            assert re.search(rf"\b{part}\b", code), f"`{name}`"


def test_all_notebooks_are_there():
    """Failing means that a notebook of the walkthrough is missing, or one has no number."""
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{i:02}" for i in range(7)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_short_and_was_run(path):
    """Failing means a cell too long to read, or outputs that are not of one run, top to bottom."""
    whole = json.loads(path.read_text("utf-8"))["cells"]
    assert 30 <= len(whole) <= 60
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        lines = "".join(cell["source"]).splitlines()
        assert len(lines) <= 15 and all(len(line) <= 79 for line in lines), lines[:1]
        assert "error" not in [output["output_type"] for output in cell["outputs"]]
        assert "stderr" not in [output.get("name") for output in cell["outputs"]]
    assert sum("image/png" in kind for cell in cells for kind in kinds(cell)) >= 4, "few pictures"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exercises_are_checked(path, monkeypatch, capsys):
    """Failing means that a solution shown to students is refused, or an untouched stub accepted."""
    monkeypatch.syspath_prepend(str(path.parent))
    import checks
    text = "\n".join("".join(cell["source"])
                     for cell in json.loads(path.read_text("utf-8"))["cells"])
    asked = re.findall(r"^checks\.(\w+)\(", text, re.MULTILINE)
    assert len(asked) >= 2
    solutions = {}
    for code in re.findall(r"<summary>Solution.*?```python\n(.*?)```", text, re.DOTALL):
        exec(code, {"np": np, "torch": torch, "F": F, "math": math, "genie_mini": genie_mini,
                    "data_prep": dp, "files": files, "worlds": worlds}, solutions)
    for name in asked:
        assert getattr(checks, name)(solutions[name]) is True, name
        assert getattr(checks, name)(lambda *_, **__: None) is False, name
        assert "Not yet" in capsys.readouterr().out


def test_a_handout_lacks_the_chosen_functions_alone(tmp_path, monkeypatch, capsys):
    """Failing means that a hand-out for a class gives the answer away, misses more than was asked
    for, or overwrites what is in its folder."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "notebooks"))
    import strip
    assert strip.main(["patchify", "-o", str(tmp_path / "handout")]) == 0
    source = (tmp_path / "handout" / "genie_mini.py").read_text("utf-8")
    handout = types.ModuleType("handout")
    handout.__file__ = str(tmp_path / "handout" / "genie_mini.py")
    sys.modules["handout"] = handout                     # dataclasses look their module up
    exec(compile(source, "handout", "exec"), handout.__dict__)
    for name in ("patchify", "unpatchify"):
        with pytest.raises(NotImplementedError, match=name):
            getattr(handout, name)(torch.zeros(1, 1, 64, 64), 4)
        assert getattr(handout, name).__doc__ == getattr(genie_mini, name).__doc__
    whole = Path(genie_mini.__file__).read_text("utf-8").splitlines()
    assert set(source.splitlines()) - set(whole) == {
        f'    raise NotImplementedError("your turn: {part}patchify")' for part in ("", "un")}
    lost = len(whole) - len(source.splitlines())
    assert lost == sum(len(inspect.getsource(f).splitlines()) - 3          # def, docstring, raise
                       for f in (genie_mini.patchify, genie_mini.unpatchify))
    assert (tmp_path / "handout" / ".pytest.ini").exists(), "the marks are declared there"
    for link in re.findall(r"\]\(([^):#]+)\)", (ROOT / "README.md").read_text("utf-8")):
        assert (tmp_path / "handout" / link).exists(), f"README of the hand-out: {link} is missing"
    assert strip.main(["patchify", "-o", str(tmp_path / "handout")]) == 2
    assert strip.main(["nothing", "-o", str(tmp_path / "other")]) == 2
    assert "choose from patchify" in capsys.readouterr().err and not (tmp_path / "other").exists()


@pytest.mark.notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
    """Failing means that a notebook ends in an error, or shows something else than is committed:
    a picture where there was a number, or nothing at all. (Numbers may differ between machines.)"""
    import nbclient
    import nbformat
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300,
                            resources={"metadata": {"path": str(path.parent)}}).execute()
    fresh = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for old, new in zip(code_cells(path), fresh):
        assert kinds(old) == kinds(new), "".join(old["source"])
