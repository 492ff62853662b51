"""The tests of data_prep.py and extras/worlds.py: from a video to packed sequences."""

import io
import itertools
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
import wave
import zipfile
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

import data_prep as dp
from extras import files, films, testing, worlds
from extras.testing import (encode, fuzzed, must_fail, mutant, numbered, numbered_video,
                            read_number, steady)

MILLISECONDS = {"time_base": Fraction(1, 1000)}         # as Matroska counts


def lossless(folder, pictures):
    """Encode grey pictures as they are, 30 a second; return the video's path."""
    return encode(folder / "v.mkv", list(pictures), itertools.count(0, Fraction(1, 30)),
                  codec="ffv1", **MILLISECONDS)


def convert(video, *more):
    """Turn a video into a data file beside it, and return that. more: further videos and flags."""
    out = video.with_suffix(".npz")
    words = ["video", video, *more, "-o", out, "--force"]
    assert dp.main([str(word) for word in words]) == 0
    return out


def preview(data, out, *flags):
    """Draw a data file's preview, and return the picture."""
    words = ["preview", data, "-o", out, *flags]
    assert dp.main([str(word) for word in words]) == 0
    return Image.open(out)


def frames_of(path, split="train"):
    """The pixels of a split's sequences: (S, 16, 64, 64) of 0 and 1."""
    return files.unpack(files.load_split(path, split)["bits"])


def numbers_by_split(path):
    """Return {split: (start (S,), numbers (S, 16))} of a data file made from a numbered video."""
    result = {}
    for split in files.SPLITS:
        numbers = [[read_number(frame) for frame in clip] for clip in frames_of(path, split)]
        result[split] = files.load_split(path, split)["start"], np.array(numbers)
    return result


# --- the demo worlds -------------------------------------------------------------------------


def find(frame, drawing):
    """All places (y, x) where an 8x8 drawing stands in a frame, by comparing every place."""
    views = np.lib.stride_tricks.sliding_window_view(frame, (8, 8))
    return np.argwhere((views == drawing).all(axis=(2, 3)))


def test_demo_is_deterministic():
    """Failing means that a seed no longer fixes the data: nobody could repeat a result."""
    first, again, other = (worlds.render_demo(12, seed) for seed in (5, 5, 6))
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all()
    assert (first[0] != other[0]).any()


def test_demo_shows_a_hero_a_fish_and_walls_that_stand_still(demo_file):
    """Failing means that a sprite is hidden, doubled, or looks like another thing on screen, or
    that a level changes inside a sequence, which no model could foresee."""
    for window in frames_of(demo_file).reshape(-1, 48, 64, 64):
        for frame in window:
            heroes = find(frame, worlds.HERO)
            fish = [*find(frame, worlds.FISH_RIGHT), *find(frame, worlds.FISH_LEFT)]
            assert len(heroes) == len(fish) == 1
            for y, x in (*heroes, *fish):
                frame[y:y + 8, x:x + 8] = 0
        assert (window == window[0]).all()


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


@pytest.mark.parametrize("world, pixels", [("demo", 4), ("ball", 2)])
def test_demo_actions_are_what_the_hero_does(world, pixels, request):
    """Failing means the labels lie: accuracy measured against them would mean nothing. A step that
    the pixels show must be labelled with its direction, and no step with 'stay'."""
    split = files.load_split(request.getfixturevalue(f"{world}_file"), "train")
    moves = pixels * np.array([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)])
    for clip, actions in zip(files.unpack(split["bits"]), split["actions"]):
        places = np.array([find(frame, worlds.HERO)[0] for frame in clip])             # (16, 2)
        assert (np.diff(places, axis=0) == moves[actions]).all()
    assert set(np.unique(split["actions"])) == set(range(5))


def test_demo_bodies_keep_out_of_walls_and_of_each_other():
    """Failing means that hero or fish stands in a wall or in the other, or moves in leaps: then a
    press has no rule to learn. The fish must turn when it cannot go on, and do so alone."""
    world, rows = worlds.DemoWorld(5), []
    for tick in range(worlds.LEVEL - 3):
        if tick % 24 == 0:
            key = int(world.rng.integers(5))
        world.step(key)
        for y, x in (world.hero, world.fish):
            assert not world.background[4 * y:4 * y + 8, 4 * x:4 * x + 8].any()
        assert max(abs(np.subtract(world.hero, world.fish))) >= 2
        rows.append((*world.hero, *world.fish, world.fish_dx))
    change = abs(np.diff(rows, axis=0))                                 # (ticks - 1, 5)
    turned = change[:, 4] > 0
    assert (change[:, :2].sum(axis=1) <= 1).all(), "the hero leaps"
    assert (change[:, 2] == 0).all() and (change[:, 3] <= 1 - turned).all(), "the fish does"
    assert set(np.flatnonzero(change.any(axis=1)) % 3) == {0}, "not each third tick"
    assert turned.sum() > 5


def test_demo_player_seeks_fish_and_corners_and_seldom_rests():
    """Failing means that hero and fish seldom meet in the video, that he seldom runs against half
    of a wall, or that he often stands still without being blocked: then a dream breaks where they
    meet, or where a corner or a wall is in the way."""
    world, any_way = worlds.DemoWorld(0), 0.65 / 4
    hall = np.pad(np.zeros((14, 14), dtype=int), 1, constant_values=1)
    corner, wall = hall.copy(), hall.copy()
    corner[8:10, 10:12] = wall[7:9, 10:12] = 2
    for hero, fish, walls, free, shares in (
            ((7, 2), (9, 9), hall, True, {0: 0.05, 4: 0.3 + any_way, 1: any_way}),
            ((7, 2), (1, 3), hall, True, {0: 0.05, 1: 0.3 + any_way, 2: any_way}),
            ((7, 2), (1, 3), wall, True, {0: 0.05, 1: 0.3 + any_way, 2: any_way, 4: any_way}),
            ((7, 2), (1, 3), corner, True, {0: 0.05, 1: 0.3, 2: 0, 4: 0.65}),
            ((1, 1), (1, 3), corner, False, {0: 1, 1: 0, 2: 0, 3: 0, 4: 0})):
        world.hero, world.fish, world.walls = hero, fish, walls
        world.free = np.full((15, 15), free)
        keys = np.bincount([world.choose_key() for _ in range(4000)], minlength=5) / 4000
        for key, share in shares.items():
            assert abs(keys[key] - share) < 0.03, (hero, fish, key)


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


def test_demo_has_few_patches(demo_file):
    """Failing means that there are more or fewer kinds of 4x4 patch than the 29 that are spoken of
    (32 codes can tell them all apart), or that two parts of the drawings look the same."""
    patches = frames_of(demo_file).reshape(-1, 16, 4, 16, 4).swapaxes(2, 3).reshape(-1, 16)
    assert len(np.unique(np.packbits(patches, axis=1), axis=0)) == 29


def test_demo_levels_are_open():
    """Failing means that a level has a place that the hero can never reach or leave, or that a wall
    leaves a gap of one or two patches, too narrow to play in."""
    for seed in range(10):
        free = worlds.DemoWorld(seed).free          # (15, 15), and never at the border
        reached = np.zeros_like(free)
        reached[tuple(np.argwhere(free)[0])] = True
        for _ in range(free.size):
            for by, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1)):
                reached |= free & np.roll(reached, by, axis)
        assert (reached == free).all()
    rng = np.random.default_rng(0)
    for _ in range(50):
        walls = worlds.random_walls(rng)
        for line in [*walls, *walls.T]:             # rows and columns, which begin with a wall
            floor = "".join("#" if wall else "." for wall in line).split("#")
            assert all(len(run) == 0 or len(run) >= 3 for run in floor)


def test_ball_needs_memory():
    """Failing means that a single frame tells where the ball flies, so that the world proves no
    memory; or that the ball leaves the hall, stops, or does not bounce."""
    left, right = worlds.BallWorld(0), worlds.BallWorld(0)
    left.at = right.at = np.array([[30, 30]])
    left.speed, right.speed = np.array([[2, -2]]), np.array([[2, 2]])
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
    frames = frames_of(ball_file)[:20].reshape(-1, 64, 64)
    places, seen = worlds.find_balls(frames)
    assert seen.mean() > 0.8
    both = seen.reshape(20, 16)[:, 1:] & seen.reshape(20, 16)[:, :-1]
    steps = np.diff(places.reshape(20, 16, 2), axis=1)[both]
    assert (np.abs(steps) == 2).all(), "it is the ball that is found"
    assert (worlds.count_heroes(frames) == 1).all()
    frames, places = frames[seen], places[seen]
    assert worlds.is_ball_near(frames, places).all()
    for by, near in (((2, -2), 1), ((3, 0), 0), ((0, -3), 0)):
        found = worlds.is_ball_near(frames, np.clip(places + by, 0, 60))
        assert found.mean() == pytest.approx(near, abs=0.02)
    for frame, (y, x) in zip(frames, places):
        frame[y:y + 4, x:x + 4] = 0
    assert not worlds.is_ball_near(frames, places).any()


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


def shown_at(times, tick):
    """What a 30 FPS clock must show: the latest frame at or before tick / 30 s. Written apart."""
    return max(i for i, now in enumerate(times) if float(now - times[0]) <= tick / 30 + 0.001001)


GAPS = np.random.default_rng(1).integers(3, 60, size=170).tolist()
IRREGULAR = [Fraction(n, 600) for n in itertools.accumulate(GAPS, initial=0)]
NTSC = Fraction(30000, 1001)


@pytest.mark.parametrize("name, times, rate, options, lost", [
    ("25.mp4", steady(25, 8), 25, {}, {0}),
    ("30.mp4", steady(30, 8), 30, {}, {0}),
    ("60.mp4", steady(60, 8), 60, {}, {0}),
    ("ntsc.mp4", steady(NTSC, 8), NTSC, {}, {0}),
    ("millisecond.mkv", steady(30, 8), 30, MILLISECONDS, {0}),
    ("raw.h264", steady(25, 8), 25, {}, {0}),       # without time stamps: FFmpeg takes it for 25
    ("irregular.mp4", IRREGULAR, 30, {}, {0, 3, 6}),
    ("7.mp4", steady(7, 20), 7, {}, {0, 3, 6}),
    ("4.mp4", steady(4, 20), 4, {}, {3, 6}),        # a frame stays for 7.5 ticks, across borders
])
def test_video_shows_the_right_frame_at_every_tick(tmp_path, name, times, rate, options, lost):
    """Failing means that time is wrong, so that motion is too fast, too slow or uneven; or that the
    test set contains pictures from training: scores would flatter.

    Each frame carries its number; which number must show at which tick is computed anew here.
    Where a frame lies across the border of two splits, the window before it is left out: `lost`.
    """
    out = convert(numbered_video(tmp_path / name, times, rate, **options))
    splits = numbers_by_split(out).values()
    for start, numbers in splits:
        for first, row in zip(start, numbers):
            assert row.tolist() == [shown_at(times, int(first) + 3 * t) for t in range(16)]
    for (start, numbers), (later, others) in itertools.combinations(splits, 2):
        assert not set(numbers.ravel()) & set(others.ravel()), "a frame is in two splits"
        assert start[-1] < later[0], "the splits are not in order of time"
    starts = [int(first) for start, _ in splits for first in start]
    ticks = math.ceil(float(times[-1] + 1 / Fraction(rate)) * 30 - 0.04)
    whole = {48 * w + o for w in range(ticks // 48) for o in range(3)}
    assert set(starts) <= whole and len(whole) - len(starts) in lost


def test_start_and_end(tmp_path):
    """Failing means that --start and --end take another part of the video than they say, or that a
    frame held across --end is cut short, and the last windows lost."""
    video = numbered_video(tmp_path / "v.mp4", steady(30, 9))
    splits = numbers_by_split(convert(video, "--start", 2, "--end", 6.8))
    assert [len(start) for start, _ in splits.values()] == [3, 3, 3]
    assert splits["train"][1][0].tolist() == list(range(60, 108, 3))
    assert splits["test"][1][2].tolist() == list(range(60 + 98, 60 + 144, 3))
    times = steady(30, 5) + [8 + now for now in steady(30, 1)]
    out = convert(numbered_video(tmp_path / "gap.mkv", times, **MILLISECONDS), "--end", 6.4)
    assert files.load_meta(out)["sources"][0]["ticks"] == 192


def test_sequences_do_not_cross_files(tmp_path):
    """Failing means that a sequence jumps from one video into another."""
    a = numbered_video(tmp_path / "a.mp4", steady(30, 4))              # 120 ticks: 2 windows
    b = numbered_video(tmp_path / "b.mp4", steady(30, 6))              # 180 ticks: 3 windows
    out = convert(a, b)
    start, numbers = (np.concatenate(both) for both in zip(*numbers_by_split(out).values()))
    assert start.tolist() == [at + o for at in (0, 48, 120, 168, 216) for o in range(3)]
    first = start - 120 * (start >= 120)
    assert (numbers == first[:, None] + 3 * np.arange(16)).all()
    meta = files.load_meta(out)
    assert [source["offset"] for source in meta["sources"]] == [0, 120]
    assert meta["counts"] == {"train": 9, "val": 3, "test": 3}


ORIENTATIONS = [                    # the number in EXIF; a, b, c, d; and what it does to a picture
    (1, (1, 0, 0, 1), lambda p: p), (2, (-1, 0, 0, 1), np.fliplr),
    (3, (-1, 0, 0, -1), lambda p: np.rot90(p, 2)), (4, (1, 0, 0, -1), np.flipud),
    (5, (0, 1, 1, 0), np.transpose), (6, (0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    (7, (0, -1, -1, 0), lambda p: np.rot90(p, 2).T), (8, (0, -1, 1, 0), np.rot90)]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_mirrored_and_turned(tmp_path, orientation):
    """Failing means that a selfie, a photograph, or a phone's video comes out mirrored, upside down
    or lying on its side."""
    number, matrix, expected = orientation
    whole = numbered(0b1011, 128, 128)
    video = encode(tmp_path / "v.mp4", [whole] * 30, steady(30, 1))
    data = bytearray(video.read_bytes())            # as a phone does it: 9 numbers of 4 bytes in
    at = data.index(b"tkhd") + 44                   # the header, past type, version, times, ids ...
    a, b, c, d = (value << 16 for value in matrix)
    data[at:at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    video.write_bytes(data)
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
    figure = sprite[..., 3] // 255
    for name in ("s.png", "s.gif"):
        Image.fromarray(sprite).save(tmp_path / name)
        frame = dp.image_to_frame(tmp_path / name, {"threshold": 128})
        assert (frame == (figure if colour else 1 - figure)).all(), name


@pytest.mark.parametrize("colour", [0, 255])
@pytest.mark.parametrize("name, codec, pix_fmt, options", [
    ("v.webm", "libvpx-vp9", "yuva420p", {"lossless": "1"}),
    ("v.webm", "libvpx", "yuva420p", {"auto-alt-ref": "0"}), ("v.mov", "qtrle", "argb", {}),
    ("v.mov", "prores_ks", "yuva444p10le", {"profile": "4444"}), ("v.apng", "apng", "rgba", {})])
def test_a_film_with_a_clear_ground_shows_its_figure(tmp_path, capsys, colour, name, codec, pix_fmt,
                                                     options):
    """Failing means that a sprite on a transparent ground comes out all black or all white, or that
    the ground is chosen by the first frame, in which there is no figure yet."""
    sprite = np.full((64, 64, 4), (colour, colour, colour, 0), np.uint8)
    with av.open(str(tmp_path / name), "w") as film:
        stream = film.add_stream(codec, rate=10, width=64, height=64, pix_fmt=pix_fmt)
        stream.options = options
        for k in range(60):
            sprite[20:40, 10:30, 3] = 255 * (k >= 6)
            frame = av.VideoFrame.from_ndarray(sprite, format="rgba").reformat(format=pix_fmt)
            frame.pts, frame.time_base = k, Fraction(1, 10)
            film.mux(stream.encode(frame))
        film.mux(stream.encode())
    first, *_, last = frames_of(convert(tmp_path / name, "--threshold", "128"))[0]
    assert (first == (colour == 0)).all()
    assert (last == (sprite[..., 3] > 0) ^ (colour == 0)).all()
    assert f"drawn {'black' if colour else 'white'}" in capsys.readouterr().out


def test_crop_and_colour_range(tmp_path):
    """Failing means that a picture is squeezed, off centre, cut where it should be whole, or
    inverted unasked; or that the colour range is mixed up: black would be 16 and white 235."""
    picture = np.zeros((256, 128), dtype=np.uint8)
    picture[64:192] = numbered(77, 128, 128)        # the middle square bears a number
    picture[:64] = 255                              # white above, black below
    video = encode(tmp_path / "portrait.mp4", [picture] * 30, steady(30, 1))
    fitted = np.zeros((64, 64), dtype=np.uint8)
    fitted[:, 16:48] = picture[::4, ::4] // 255
    for threshold in (5, 128, 250):
        meta = {"threshold": threshold, "crop": "fit"}
        assert (dp.image_to_frame(video, meta) == fitted).all()
        assert (dp.image_to_frame(video, {**meta, "invert": True}) == 1 - fitted).all()
    assert read_number(dp.image_to_frame(video, {"threshold": 128, "crop": "center"})) == 77


def test_gif(tmp_path):
    """Failing means that an animation is no longer read, or not at its speed; that pixels which are
    not square squeeze the picture; or that the last frame does not last as long as it says."""
    path, (first, *rest) = tmp_path / "a.gif", [Image.fromarray(numbered(i, 32)) for i in range(60)]
    first.save(path, save_all=True, append_images=rest, duration=[100] * 59 + [1500])
    data = path.read_bytes()                        # (113 + 15) / 64: twice as wide as high
    path.write_bytes(data[:12] + bytes([113]) + data[13:])
    start, numbers = numbers_by_split(out := convert(path, "--crop", "center"))["train"]
    assert numbers[0].tolist() == list(range(16)) and start[0] == 0
    assert files.load_meta(out)["sources"][0]["ticks"] == (5.9 + 1.5) * 30
    assert read_number(dp.image_to_frame(path)) == 0


def test_a_size_that_changes_midway(tmp_path):
    """Failing means that the second half of such a video is cropped as the first, or refused."""
    video, data = tmp_path / "v.h264", b""
    for first, side in ((0, 128), (75, 256)):
        film = [numbered(first + i, side, side) for i in range(75)]
        data += encode(video, film, steady(25, 3), 25).read_bytes()
    video.write_bytes(data)
    numbers = np.concatenate([numbers for _, numbers in numbers_by_split(convert(video)).values()])
    assert numbers[0, 0] == 0 and numbers[-1, -1] > 110


@pytest.mark.parametrize("name, size, codec", [("v.mkv", (1, 1), "ffv1"),
                                               ("v.mkv", (32, 7680), "libx264"),
                                               ("v.webm", (36, 50), "libvpx-vp9")])
def test_odd_sizes(tmp_path, name, size, codec):
    """Failing means that WebM, or a picture that is very small or wide, is refused or misread."""
    film = [np.full(size, 255 * (i % 2), np.uint8) for i in range(8)]   # a second each
    video = encode(tmp_path / name, film, range(8), 1, codec, **MILLISECONDS)
    first = frames_of(convert(video))[0]
    assert first.mean(axis=(1, 2)).tolist() == 10 * [0] + 6 * [1]


def test_what_is_missing_is_told(tmp_path, capsys):
    """Failing means that half a video is used, or a gap filled with a still picture, unsaid; that
    one broken spot makes a whole video unusable, or passes unmentioned; or that someone may train
    for a day on an all-black video unwarned."""
    video = numbered_video(tmp_path / "v.mkv", steady(30, 12), **MILLISECONDS)
    gap = [*steady(30, 6), *(16 + now for now in steady(30, 4))]
    whole, middle = video.read_bytes(), video.stat().st_size // 2
    hole = numbered_video(tmp_path / "gap.mkv", gap, **MILLISECONDS).read_bytes()
    black = lossless(tmp_path, np.zeros((180, 64, 64), np.uint8)).read_bytes()
    for data, told in ((whole, ""),
                       (whole[:len(whole) * 6 // 10], "says it lasts 12.0 s"),
                       (whole[:middle] + bytes(300) + whole[middle + 300:], "warning"),
                       (hole, "up to 10.0 s"),
                       (black, "--threshold")):
        video.write_bytes(data)
        convert(video)
        warnings = capsys.readouterr().err
        assert told in warnings and ("warning" in warnings) == (told != "")


def test_a_long_film_shows_its_progress(tmp_path, monkeypatch):
    """Failing means that for many seconds of a large film nobody can tell that anything happens."""
    video, shown = numbered_video(tmp_path / "v.mp4", steady(30, 6)), {}
    monkeypatch.setattr(files.Progress, "update", lambda progress, done: shown.setdefault(
        progress.label, []).append(done / progress.total))
    convert(video)
    assert list(shown) == ["v.mp4: a first look", "v.mp4"]
    for shares in shown.values():
        assert len(shares) > 10 and shares == sorted(shares) and shares[-1] == pytest.approx(1)


def test_the_moving_stream_is_taken(tmp_path, monkeypatch, capsys):
    """Failing means that of a film with a cover picture the cover is used, or a song's cover."""
    def write(name, *streams):                      # (side in pixels, frames, disposition)
        with av.open(str(tmp_path / name), "w") as container:
            made = [container.add_stream("mjpeg", rate=30, width=side, height=side,
                                         pix_fmt="yuvj420p", disposition=Disposition(kind).value)
                    for side, _, kind in streams]
            sound = container.add_stream("aac", rate=8000)
            for stream, (side, count, _) in zip(made, streams):
                for i in range(count):
                    frame = av.VideoFrame.from_ndarray(numbered(i, side, side), format="gray")
                    frame.pts, frame.time_base = i, Fraction(1, 30)
                    container.mux(stream.encode(frame))
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            silence.rate = 8000
            container.mux(sound.encode(silence))
            for stream in (*made, sound):
                container.mux(stream.encode())
        return tmp_path / name

    cover = 256, 1, Disposition.attached_pic
    film = write("film.mp4", (64, 180, 0), cover)
    film.write_bytes(film.read_bytes().replace(b"tkhd\0\0\0\3", b"tkhd\0\0\0\2"))    # no default
    for film, told in ((write("film.mkv", (256, 1, 0), (64, 180, 0)), dp.length),
                       (film, dp.length), (film, lambda stream: 0.0)):
        monkeypatch.setattr(dp, "length", told)
        numbers = numbers_by_split(convert(film))["train"][1]
        assert capsys.readouterr().err.count("2 video streams") == 1
        assert numbers[0].tolist() == list(range(0, 48, 3))
    song = write("song.mp4", cover)
    assert dp.main(["video", str(song), "-o", str(tmp_path / "song.npz")]) == 2
    assert "only sound" in capsys.readouterr().err


def test_a_title_in_an_old_alphabet(tmp_path):
    """Failing means that a title, or another text in a video, which is not UTF-8 stops all."""
    video = numbered_video(tmp_path / "v.avi", steady(30, 6), codec="mpeg4",
                           time_base=Fraction(1, 30))
    data = video.read_bytes()
    assert b"ISFT" in data and b"Lavf" in data      # the name of the program that wrote it
    video.write_bytes(data.replace(b"Lavf", b"Caf\xe9"))
    convert(video)


@pytest.mark.parametrize("options", [{"bf": "2"}, {"bf": "3", "preset": "medium"}])
def test_avi_with_frames_decoded_out_of_order(tmp_path, monkeypatch, capsys, options):
    """Failing means that of an AVI, which has no times but those of decoding, half of the frames
    are left out, or shown at wrong times, or that this is not told."""
    monkeypatch.setattr(testing, "X264", {**testing.X264, **options})
    video = numbered_video(tmp_path / "v.avi", steady(30, 10), time_base=Fraction(1, 30))
    splits = numbers_by_split(convert(video)).values()
    numbers = np.concatenate([numbers for _, numbers in splits])[3:]    # after the first frames
    assert (np.diff(numbers) == 3).all()
    assert re.search(r"\d\d frame\(s\) whose time runs backwards", capsys.readouterr().err)


@pytest.mark.parametrize("rate, colour, parity", [
    (60, 255, 0), (60, 255, 1), (60, 0, 1), (30, 255, 1)])
def test_what_is_drawn_on_every_other_frame_is_seen(tmp_path, capsys, rate, colour, parity):
    """Failing means that things which an old console draws on every other frame are never there, or
    always, as the clock of 30 FPS happens to fall; or that other films are blurred."""
    film = np.full((6 * rate, 64, 64), 90, np.uint8)
    for k, picture in enumerate(film):
        x = bounce(k // 2, 4, 50)
        picture[8:16, x:x + 8] = colour                                 # always drawn
        picture[40:48, x:x + 8] = colour if k % 2 == parity else 90
    video = encode(tmp_path / "v.mkv", film, steady(rate, 6), rate, "ffv1", **MILLISECONDS)
    frames = frames_of(convert(video, "--threshold", "170" if colour else "45"))[1:]
    thing = (frames[..., 32:, :] == (colour > 0)).sum(axis=(2, 3))      # its pixels: (S, 16)
    if rate == 60:
        assert thing.min() >= 64 and thing.max() <= 72
    else:
        assert set(np.unique(thing)) == {0, 64}
    assert ("every other frame" in capsys.readouterr().out) == (rate == 60)


def test_times_may_begin_anywhere():
    """Failing means that a file which begins before 0, as after a cut, is put on a wrong clock."""
    for begin in (-2, 0, 7):
        timed = [(begin + Fraction(k, 30), Fraction(1, 30), k) for k in range(5)]
        shown = list(dp.frames_on_clock(timed, 0, None))
        assert shown == [(k, k + 1, k) for k in range(5)]
        assert list(dp.frames_on_clock(rest := iter(timed), 0, Fraction(3, 30))) == shown[:3]
        assert [frame[2] for frame in rest] == [4], "what comes after --end is decoded"


def test_absurd_times():
    """Failing means that a broken time stamp fills hours with a still picture, or shifts all that
    follows; that frames whose times run backwards are left out, or not placed by the frame rate."""
    still = "frame(s) whose time stands still skipped"
    backwards = "frame(s) whose time runs backwards: placed by the frame rate"
    ahead = "frame(s) whose time jumps ahead: placed by the frame rate"
    for rate, given, taken, skipped in (                    # given and taken: (time, duration) in s
            (4, [(0, 1), (1, 1), (1, 1), (0, 1), (601, 2)],
             [(0, 1), (1, 1), (1.25, 1), (601, 2)], {still: 1, backwards: 1}),
            (1, [(1, 1), (4, 1), (3, 1), (5, 1), (2, 1), (8, 1)],
             [(1, 1), (2, 1), (3, 1), (5, 1), (6, 1), (8, 1)], {ahead: 1, backwards: 1}),
            (1, [(0, 1), (900, 1), (2, 1), (3, 1)], [(0, 1), (1, 1), (2, 1), (3, 1)], {ahead: 1}),
            (4, [(None, 1), (None, 1)], [(0, 1), (0.25, 1)], {}),
            (4, [(0, 1), (1, 10_000_000)], [(0, 1), (1, 0.25)],
             {"duration(s) of over 600 s left out": 1}),
            (Fraction(1, 10_000_000), [(0, 0)], [(0, 600)], {}),
            (4, [(0, 1), (600.1, 1)], "a gap of over 600 s", {})):
        frames = [SimpleNamespace(pts=now, duration=long, time_base=1) for now, long in given]
        video, faults = SimpleNamespace(demux=lambda _: iter([frames])), Counter()
        stream = SimpleNamespace(average_rate=rate, metadata={}, decode=lambda packet: packet)
        try:
            timed = [frame[:2] for frame in dp.timed_frames("v.mp4", video, stream, faults)]
            assert timed == taken and +faults == Counter(skipped)
        except files.UserError as error:
            assert str(taken) in str(error)


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
    grey = files.load_split(path, "train")["grey"].astype(int)
    bits = frames_of(path)
    flips = np.diff(bits[files.evenly(len(bits), len(grey))].astype(int), axis=1) != 0
    change = abs(np.diff(grey, axis=1))
    weight = change * (change > 8)
    return ((weight * near(flips)).sum() / weight.sum(),
            (flips & (near(change) > 4)).sum() / max(1, flips.sum()))


@pytest.mark.parametrize("threshold", ["auto", "motion"])
@pytest.mark.parametrize("kind", ["plain", "faint", "both", "textured", "letterbox", "portrait",
                                  "flicker", "light", "cut"])
def test_black_and_white_keeps_what_moves(tmp_path, kind, threshold):
    """Failing means that what moves in a video is lost, or that still things flicker: there is
    nothing that a model could learn from it."""
    out = convert(lossless(tmp_path, moving(kind)), "--threshold", threshold)
    kept, true = motion_kept(out)
    assert kept > (0.9 if threshold == "motion" else 0.8) and true > 0.9
    assert files.load_meta(out)["crop"] == ("stretch" if kind == "portrait" else "center")


def test_each_scene_has_its_background(tmp_path):
    """Failing means that after a cut the scenery of before shines through."""
    out = convert(lossless(tmp_path, moving("cut")), "--threshold", "motion")
    still = frames_of(out)[0].mean(axis=0).round()
    expected = np.zeros((64, 64))
    expected[:8] = expected[-8:] = 1                # the film's bright bars; the rest is dark
    assert (still == expected).mean() > 0.98


def test_otsu_is_left_where_it_loses_the_motion(tmp_path, capsys):
    """Failing means that the choice is not by what is kept, or that its loss is not told."""
    for kind, threshold, expected, low in (("faint", "auto", "motion", 0.9),
                                           ("plain", "auto", "otsu", 0.9),
                                           ("faint", "otsu", "otsu", 0)):
        out = convert(lossless(tmp_path, moving(kind)), "--threshold", threshold)
        shown = capsys.readouterr()
        assert files.load_meta(out)["threshold"] == expected
        kept = float(re.search(r"motion kept (\d\.\d\d)", shown.out).group(1))
        assert low <= kept <= low + 0.1 and f"preview {out}" in shown.out
        assert ("% of the motion" in shown.err) == (threshold == "otsu")


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("along", ["y", "x"])
def test_thin_things_are_steady(tmp_path, width, along):
    """Failing means that a thing thinner than a pixel is now there, now twice as wide, now gone."""
    film = np.zeros((180, 210, 160), np.uint8)
    film[:, -20:-10] = 120
    for k, picture in enumerate(film):
        y, x = (bounce(k, 20, 170), 40) if along == "y" else (60, bounce(k, 10, 140))
        picture[y:y + 16, x:x + width] = 200
    out = convert(lossless(tmp_path, film), "--crop", "stretch", "--threshold", "motion")
    sizes = frames_of(out)[..., :52, :].sum(axis=(2, 3))
    assert sizes.min() >= 4 and sizes.max() <= 6 and np.ptp(sizes) <= 1


def test_otsu_finds_the_gap(tmp_path):
    """Failing means that the automatic threshold splits a clear picture in the wrong place, or is
    that of a short burst of frames, and not of the whole video."""
    histogram = np.zeros(256, dtype=np.int64)
    histogram[[20, 30, 180, 200]] = 50, 60, 5, 9
    assert dp.otsu(histogram) == 104, "the middle between 30 and 179"
    assert dp.otsu(np.arange(256) == 255) < 255     # an all-white picture is white
    film = np.full((84, 64, 64), 100, np.uint8)
    film[:24, :32], film[24:, :32] = 20, 200        # 12 s at 2 FPS, and 2 s at 30 FPS
    times = steady(2, 12) + [12 + now for now in steady(30, 2)]
    video = encode(tmp_path / "v.mkv", film, times, codec="ffv1", **MILLISECONDS)
    assert files.load_meta(convert(video, "--threshold", "otsu"))["looks"][0]["level"] < 100


def test_an_edge_runs_where_a_pixel_is_half_covered():
    """Failing means that a bright thing is drawn larger than it is, as soon as a pixel of its edge
    passes the level; or that what is thinner than a pixel is drawn beside its place."""
    far = np.zeros((1, 64, 64), np.int16)
    far[0, 10:20, 10:20] = 80
    far[0, 11:19, 11:19] = 200                      # 8 pixels wide, with edges that are 0.4 covered
    on = dp.moved(far, 20, 200)[0]
    assert on.sum() == 64 and on[11:19, 11:19].all()
    for pair, drawn in (((60, 100), (0, 1)), ((100, 60), (1, 0)), ((100, 115), (0, 1)),
                        ((100, 125), (1, 1))):      # together over 1.1 pixels
        far = np.zeros((1, 64, 64), np.int16)
        far[0, 10, 20:22] = far[0, 30:32, 40] = pair
        on = dp.moved(far, 20, 200)[0]
        assert tuple(on[10, 20:22]) == tuple(on[30:32, 40]) == drawn


def test_adaptive_sees_through_a_shadow_and_makes_no_halos(tmp_path):
    """Failing means that 'adaptive' is no better than one threshold where the light varies, or
    draws a bright line along each bar of a letterbox, where what moves is no more than a bump."""
    grey = np.linspace(30, 180, 64)[None].repeat(64, 0)
    grey[10:14] += 40                               # a bright line across the shadow's edge
    result = dp.binarise(grey[None].astype(np.uint8), "adaptive")[0]
    assert result[10:14].all() and not result[30:].any()
    frames = frames_of(convert(lossless(tmp_path, moving("letterbox")), "--threshold", "adaptive"))
    assert frames.any() and frames.mean(axis=(0, 1)).max() < 0.5      # no pixel is always bright


def test_an_image_takes_the_way_of_the_data(tmp_path):
    """Failing means that play --image shows the model what looks unlike all it was trained on."""
    first, *rest = moving("faint")
    out, image = convert(lossless(tmp_path, [first, *rest])), tmp_path / "first.png"
    Image.fromarray(first).save(image)
    meta, expected = files.load_meta(out), frames_of(out)[0, 0]
    assert (dp.image_to_frame(image, meta) == expected).all()
    assert (dp.image_to_frame(image) != expected).any()
    meta["looks"][0]["background"] = "no picture"
    with pytest.raises(files.UserError):
        dp.image_to_frame(image, meta)


def test_keys_are_stored_as_actions(tmp_path, capsys):
    """Failing means that recorded keys are a frame off, or that keys of another video are taken."""
    video, file = numbered_video(tmp_path / "v.mp4", steady(30, 6)), tmp_path / "keys.npy"
    keys = np.random.default_rng(0).integers(0, 5, 180)
    np.save(file, keys)
    out = convert(video, "--actions", file)
    for split in files.SPLITS:
        loaded = files.load_split(out, split)
        for start, row in zip(loaded["start"], loaded["actions"]):
            for t, action in enumerate(row):
                three = keys[start + 3 * t:start + 3 * t + 3].tolist()
                assert action == max(three, key=lambda key: (three.count(key), key == three[2]))
    for wrong in (keys[1:], keys / 2, keys - 1, np.array([{}], dtype=object)):
        np.save(file, wrong)
        command = ["video", str(video), "-o", str(out), "--force", "--actions", str(file)]
        assert dp.main(command) == 2
        assert "keys.npy" in capsys.readouterr().err


# --- the user's mistakes ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrong_inputs(tmp_path_factory):
    """Files that are wrong in various ways, and one good short video."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, times in (("good.mp4", steady(30, 6)), ("short.mp4", steady(30, 4)),
                        ("one.mp4", [0]), ("still.mp4", [0, 7, 7.1])):
        numbered_video(folder / name, times)
    with av.open(str(folder / "none.avi"), "w") as container:          # a header, and no frame
        container.add_stream("mpeg4", rate=30, width=64, height=64)
        container.start_encoding()
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is no video\n" * 50, encoding="utf-8")
    (folder / "cut.mp4").write_bytes((folder / "good.mp4").read_bytes()[:2000])
    with wave.open(str(folder / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    Image.new("L", (64, 64)).save(folder / "0001.png")
    (folder / "there.npz").write_bytes(b"precious")
    (folder / "folder.npz").mkdir()
    return folder


MISTAKES = {                        # a command: {what stands in its place "*": what is answered}
    "video * -o out.npz": {
        "missing.mp4": "there is no file", "empty.mp4": "is empty", "text.mp4": "cannot read",
        "cut.mp4": "cannot read", "sound.wav": "no picture", "short.mp4": "4.8 s",
        "one.mp4": "4.8 s", "none.avi": "no frame", "still.mp4": "too still",
        ".": "is a folder; ", "/dev/null": "is a pipe or a device", "-": "input is not read",
        "http://a/b.mp4": "is an address", "no*.mp4": "no file matches no*.mp4",
        "good.mp4 0001.png": "0001.png is a picture, no video; make one of numbered pictures: ff",
        "good.mp4 missing.mp4": "there is no file", "": "required"},
    "video good.mp4 *": {
        "": "required", "-o out": "must end in .npz", "-o out.txt": "must end in .npz",
        "-o /proc/out.npz": "cannot write in /proc", "-o good.mp4/out.npz": "cannot write in",
        "-o there.npz": "--force", "-o folder.npz": "is a directory"},
    "video good.mp4 -o out.npz *": {
        "--start late": "--start", "--start nan": "--start", "--start -1": "negative",
        "--start 60": "after --start 60", "--start 3 --end 3": "--end must be later",
        "--end inf": "--end", "--threshold -1": "--threshold", "--threshold 256": "--threshold",
        "--crop middle": "--crop", "--colour": "--colour"},
    "demo -o *": {
        "there.npz": "--force", "good.mp4/x/y/out.npz": "cannot write in",
        "out.npz --minutes nan": "--minutes", "out.npz --minutes 0.05": "--minutes",
        "out.npz --minutes 1e9": "--minutes", "out.npz --seed -1": "--seed",
        "out.npz --seed 1.5": "--seed"},
    "preview *": {
        "missing.npz -o out.png": "there is no data file", "there.npz -o out.png": "not an .npz",
        "folder.npz -o out.png": "there is no data file", "good.mp4 -o out.png": "not an .npz",
        "there.npz -o out.jpg": ".png or .gif", "there.npz -o out.png --count 0": "--count",
        "there.npz -o out.png --split all": "--split"},
    "*": {"render -o out.npz": "invalid choice", "": "required"},
}


@pytest.mark.parametrize("arguments, expected", [
    (command.replace("*", words), expected)
    for command, mistakes in MISTAKES.items() for words, expected in mistakes.items()])
def test_mistakes_get_one_sentence(wrong_inputs, tmp_path, monkeypatch, capsys, arguments,
                                   expected):
    """Failing means that a user's mistake ends in a traceback, a wrong status, or debris."""
    if ("/proc" in arguments or "/dev" in arguments) and not Path("/proc").is_dir():
        pytest.skip("no folder here that nobody may write in, or no device")
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


def program(*words, **options):
    """Run Python with these words after its name, as a process of its own."""
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True,
                          encoding="utf-8", **options)


def test_all_but_decoding_works_without_pyav(tmp_path):
    """Failing means that a machine without PyAV, such as a borrowed GPU, can neither render the
    demo world nor train; or that a video ends in a traceback there."""
    source, out = Path(dp.__file__).parent, tmp_path / "a.npz"
    start = "import sys\nsys.modules['av'] = None\nimport data_prep\nsys.exit(data_prep.main())"
    assert program("-c", start, "demo", "--minutes", 0.1, "-o", out, cwd=source).returncode == 0
    run = program("-c", start, "video", out, "-o", tmp_path / "b.npz", cwd=source)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1 and "pip install av" in run.stderr


def test_status_and_paths_of_the_program(tmp_path):
    """Failing means that scripts cannot tell from the exit status that something went wrong; or
    that a folder's name, or a terminal that cannot show it, stops the program."""
    run = program(dp.__file__, "video", "none.mp4", "-o", "out.npz", cwd=tmp_path)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    out = tmp_path / "my réseau" / "日本.npz"
    run = program(dp.__file__, "demo", "--minutes", 0.1, "-o", out,
                  env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert run.returncode == 0 and run.stderr == "" and "wrote" in run.stdout
    preview(out, out.with_suffix(".png"))
    assert len(list(out.parent.iterdir())) == 2


@pytest.mark.parametrize("failure, status", [(None, 0), (KeyboardInterrupt, 130), (OSError, 2)])
def test_force_replaces_all_or_nothing(tmp_path, monkeypatch, failure, status):
    """Failing means that --force does not replace a file, that Ctrl-C or a full disk spoils the old
    one, or that something is left beside it."""
    path = tmp_path / "demo.npz"
    path.write_bytes(b"old")

    def fail(file, **arrays):
        file.write(b"half")
        raise failure("no space left")

    if failure:
        monkeypatch.setattr(np, "savez", fail)
    assert dp.main(["demo", "-o", str(path), "--minutes", "0.1", "--force"]) == status
    assert list(tmp_path.iterdir()) == [path]
    if failure:
        assert path.read_bytes() == b"old"
    else:
        assert files.load_meta(path)["counts"] == {"train": 3, "val": 3, "test": 3}


# --- reading the data file -------------------------------------------------------------------


def test_data_file_is_as_designed(demo_file):
    """Failing means that the file's format changed: old files and genie_mini.py would not fit."""
    meta = files.load_meta(demo_file)
    with np.load(demo_file, allow_pickle=False) as data:
        for split in files.SPLITS:
            count = meta["counts"][split]
            assert data[split].dtype == np.uint8 and data[split].shape == (count, 16, 64, 8)
            assert data[split + "_start"].dtype == np.int64
            assert data[split + "_actions"].shape == (count, 15)
        starts = np.concatenate([data[split + "_start"] for split in files.SPLITS])
    assert starts.tolist() == [48 * w + o for w in range(37) for o in range(3)]
    assert meta["version"] == 1 and meta["fps"] == 10 and meta["source_fps"] == 30
    assert meta["action_names"] == list(worlds.DEMO_ACTIONS)


MALFORMED = {                       # which arrays are others, and how
    "type": {"train": np.zeros((3, 16, 64, 8), np.float32)},
    "shape": {"train": np.zeros((3, 8, 64, 8), np.uint8)},
    "no rows": {"train": np.zeros((0, 16, 64, 8), np.uint8),
                "train_start": np.zeros(0, np.int64), "meta": '{"version": 1}'},
    "bomb": {"train": np.broadcast_to(np.uint8(0), (5000, 16, 64, 8))},
    "squeezed": {"more": np.random.default_rng(0).integers(32, size=1 << 20, dtype=np.uint8)},
    "pickled": {"train": np.array([{"a": 1}], dtype=object)},
    "absent": {"train_start": None},
    "lengths": {"train_start": np.zeros(2, np.int64)},
    "action": {"train_actions": np.full((3, 15), 9, np.uint8)},
    "version": {"meta": '{"version": 0}'},
    "names": {"meta": '{"version": 1, "action_names": "stays"}'},
    "numbers": {"meta": '{"version": 1, "action_names": [1, 2, 3, 4, 5]}'},
    "meta": {"meta": "not json"},
    "meta number": {"meta": 1},
    "nested": {"meta": "[" * 100_000},
}


def resized(data, by):
    """A data file in which `train` has some bytes more or fewer than its header says, with a right
    checksum; if fewer, the zip's directory claims them all."""
    with zipfile.ZipFile(file := io.BytesIO(data), "a") as archive:
        array = archive.read(archive.NameToInfo.pop("train.npy"))     # a later one counts
        archive.writestr("train.npy", (array + bytes(9))[:len(array) + by])
        archive.getinfo("train.npy").file_size = len(array) + max(by, 0)
    return file.getvalue()


DAMAGED = {                         # what happens to the bytes of the file
    "cut": lambda data: data[:len(data) // 2],
    "flipped": lambda data: data[:9999] + bytes([data[9999] ^ 255]) + data[10_000:],
    "huge": lambda data: data.replace(b"(3, 16, 64, 8), }    ", b"(20000, 16, 64, 8), }"),
    "longer": lambda data: resized(data, 9),
    "shorter": lambda data: resized(data, -9),
}


@pytest.mark.parametrize("kind", [*MALFORMED, *DAMAGED])
def test_malformed_data_file(tmp_path, kind):
    """Failing means that a wrong file is trained on, or ends in a traceback; or that memory is set
    aside for what a file claims ('huge'), or for zeros compressed a thousandfold ('bomb')."""
    path = tmp_path / "demo.npz"
    worlds.write_demo(path, minutes=0.1)
    if kind in DAMAGED:
        path.write_bytes(DAMAGED[kind](path.read_bytes()))
    else:
        with np.load(path, allow_pickle=False) as good:
            arrays = {**good, **MALFORMED[kind]}
        save = np.savez_compressed if kind in ("bomb", "squeezed") else np.savez
        save(path, **{name: array for name, array in arrays.items() if array is not None})
    tracemalloc.start()
    with pytest.raises(files.UserError) as caught:
        for split in files.SPLITS:
            files.load_split(path, split)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6, "memory was set aside before the header was checked"
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


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


def test_preview(demo_file, tmp_path):
    """Failing means that the contact sheet does not show the sequences' frames in order, or that
    the animation has the wrong speed or does not play."""
    sheet = np.array(preview(demo_file, tmp_path / "a.png", "--split", "val", "--count", 2))
    strip = sheet[:128:2, -16 * 132::2].reshape(64, 16, 66)[:, :, :64].swapaxes(0, 1)
    assert (strip == frames_of(demo_file, "val")[0] * 255).all()
    assert sheet.shape == (2 * 132, 72 + 16 * 132)
    with preview(demo_file, tmp_path / "a.gif", "--count", 3) as image:
        assert image.size == (3 * 132, 128) and image.n_frames == 16
        assert image.info["duration"] == 100 and image.info["loop"] == 0


@pytest.mark.parametrize("count", [2, 8])
def test_preview_shows_what_was_lost(tmp_path, count):
    """Failing means that the grey picture is not over the binary one made from it."""
    out = convert(numbered_video(tmp_path / "v.mp4", steady(30, 20)))
    sheet = np.array(preview(out, tmp_path / "v.png", "--count", count))
    rows = sheet[::2, 72::2][:, :64]                                    # the first frames
    assert len(rows) == 2 * count * 66, "each has a grey row and a binary one"
    bits = frames_of(out)[:, 0]
    for n, i in enumerate(files.evenly(len(bits), count)):
        grey, binary = rows[132 * n:132 * n + 64], rows[132 * n + 66:132 * n + 130]
        assert (binary == 255 * bits[i]).all() and abs(grey - 255. * bits[i]).mean() < 20


def test_image_to_frame(tmp_path):
    """Failing means that play --image shows the model something else than the picture."""
    frame, path = worlds.DemoWorld(1).frame(), tmp_path / "start.png"
    for mode in ("L", "RGBA", "P", "1"):
        Image.fromarray(frame * 255).resize((320, 320), 0).convert(mode).save(path)
        assert (dp.image_to_frame(path) == frame).all(), mode
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    for bad in ("missing.png", "text.png"):
        with pytest.raises(files.UserError):
            dp.image_to_frame(tmp_path / bad)


# --- planted bugs ----------------------------------------------------------------------------


DATA_BUGS = [
    ("sequences with stride 1", "ticks.reshape(FRAMES, STRIDE, *ticks.shape[1:]).swapaxes(0, 1)",
     "ticks.reshape(STRIDE, FRAMES, *ticks.shape[1:])",
     test_cut_window_is_three_staggered_sequences, {}),
    ("splits that share a frame",
     "if clip is not first or window_frames(clip, number)[-1] < begin]", "]",
     test_video_shows_the_right_frame_at_every_tick,
     {"name": "4.mp4", "times": steady(4, 20), "rate": 4, "options": {}, "lost": {0, 3, 6}}),
    ("the first effect as the label",
     "np.where((first == second) | (first == third), first, third)", "first",
     test_demo_label_is_the_majority_and_the_last_on_a_tie, {}),
    ("frames by index, not by time", "max(0, math.ceil((now - origin - TOLERANCE) * SOURCE_FPS))",
     "0 if waiting is None else waiting[0] + 1", test_video_shows_the_right_frame_at_every_tick,
     {"name": "25.mp4", "times": steady(25, 8), "rate": 25, "options": {}, "lost": {0}}),
    ("black is white", "bright = grey > look.level", "bright = grey < look.level",
     test_crop_and_colour_range, {}),
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
     {"orientation": ORIENTATIONS[1]}),
    ("what EXIF says is not looked at", "ImageOps.exif_transpose(image)", "image",
     test_mirrored_and_turned, {"orientation": ORIENTATIONS[4]}),
    ("a clear ground is black", 'return "white" if', 'return "black" if',
     test_a_figure_on_a_clear_ground_shows, {"colour": 0}),
    ("a WebM is read without what is clear", '.get("alpha_mode") == "1"', ".get(0)",
     test_a_film_with_a_clear_ground_shows_its_figure,
     {"name": "v.webm", "codec": "libvpx-vp9", "pix_fmt": "yuva420p", "options": {}, "colour": 0}),
    ("every other frame is not looked at", "[*before, frame]", "[frame]",
     test_what_is_drawn_on_every_other_frame_is_seen, {"rate": 60, "colour": 255, "parity": 1}),
    ("the brighter hides what is dark", "mean() > 0 else", "mean() < 999 else",
     test_what_is_drawn_on_every_other_frame_is_seen, {"rate": 60, "colour": 0, "parity": 1}),
    ("two frames in one of any film", "> 45:", "> 4:",
     test_what_is_drawn_on_every_other_frame_is_seen, {"rate": 30, "colour": 255, "parity": 1}),
    ("half a file passes for a whole one", "found < 0.98 * promised", "False",
     test_what_is_missing_is_told, {}),
    ("a first look without a word", "progress.update(i + 1)", "pass",
     test_a_long_film_shows_its_progress, {}),
    ("a gap is filled unsaid", "(lengths > WINDOW).any()", "False",
     test_what_is_missing_is_told, {}),
    ("the largest stream, even if still", "length(one) >= long, ", "",
     test_the_moving_stream_is_taken, {}),
    ("a song's cover is a video", "if not moving and (", "if not streams and (",
     test_the_moving_stream_is_taken, {}),
    ("halos beside bars", "box=inside(sample)", "box=(slice(0, SIZE),) * 2",
     test_adaptive_sees_through_a_shadow_and_makes_no_halos, {}),
    ("an image by a level of its own", 'if meta.get("looks"):', "if False:",
     test_an_image_takes_the_way_of_the_data, {}),
    ("keys a frame late", "keys[at:at + WINDOW]", "np.roll(keys, 1)[at:at + WINDOW]",
     test_keys_are_stored_as_actions, {}),
    ("keys of another length", "keys.shape != (ticks,)", "False",
     test_keys_are_stored_as_actions, {}),
    *((f"{old} -> {new}", old, new, test, arguments) for test, arguments, old, new in (
        (test_gif, {}, "frame.width * aspect, ", "frame.width, "),
        (test_gif, {}, "duration if 0 < duration <= LONGEST else period", "period"),
        (test_a_size_that_changes_midway, {}, "if layout != self.layout", "if not self.layout"),
        (test_the_moving_stream_is_taken, {}, "max(moving or streams, ", "max(streams, "),
        (test_times_may_begin_anywhere, {}, "if tick >= limit", "if tick > limit"),
        (test_absurd_times, {}, "now <= last", "now < last"),
        (test_absurd_times, {}, "before < following < stamp", "False"),
        (test_absurd_times, {}, "now - last > LONGEST", "now - last > 3600"),
        (test_absurd_times, {}, "SOURCE_FPS), LONGEST)", "SOURCE_FPS), 1e9)"),
        (test_absurd_times, {}, "0 < duration <= LONGEST", "0 < duration"),
        (test_absurd_times, {}, "+= duration > LONGEST", "+= 0"),
        (test_otsu_finds_the_gap, {},
         "np.unique(np.linspace(begin, max(begin, last - STRIDE), count).astype(int))",
         "np.array(self.first)[np.linspace(low, high - 1, count).astype(int)]"),
        (test_otsu_finds_the_gap, {}, "int(best.mean())", "int(best[0])"),
        (test_an_edge_runs_where_a_pixel_is_half_covered, {}, "<= 1.1 * full", "<= 1.2 * full"),
        (test_an_edge_runs_where_a_pixel_is_half_covered, {}, "right > far ", "right < far "),
        *((test_malformed_data_file, {"kind": kind}, old, new) for kind, old, new in (
            ("names", "not isinstance(names, list) or ", ""),
            ("numbers", " or not all(isinstance(name, str) for name in names)", ""),
            ("longer", "entry.file_size == file", "entry.file_size >= file"),
            ("shorter", "file.readinto(data) != len(data)", "not file.readinto(data)"),
            ("squeezed", "> archive.fp.tell()", "> 2 * archive.fp.tell()"))))),
]


@pytest.mark.parametrize("old, new, test, arguments", [bug[1:] for bug in DATA_BUGS],
                         ids=[bug[0] for bug in DATA_BUGS])
def test_planted_bug_in_the_data_is_caught(old, new, test, arguments, request, monkeypatch):
    """Failing means that the data could be wrong in this way, and no test would say so."""
    module = next(m for m in (dp, films, files) if old in Path(m.__file__).read_text("utf-8"))
    if module is films:
        monkeypatch.setattr(dp, "films", mutant(old, new, films))
    else:
        name = "dp" if module is dp else "files"
        monkeypatch.setitem(globals(), name, mutant(old, new, module))
    must_fail(test, request, **arguments)
