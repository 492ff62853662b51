"""The tests of data_prep.py and extras/worlds.py: from a video to packed sequences."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
import types
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

import data_prep as dp
from extras import files, pictures, worlds
from extras.testing import (encode, fuzzed, must_fail, mutant, numbered, numbered_video,
                            read_number, steady)


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


@pytest.mark.parametrize("old, new, test, arguments", [bug[1:] for bug in DATA_BUGS],
                         ids=[bug[0] for bug in DATA_BUGS])
def test_planted_bug_in_the_data_is_caught(old, new, test, arguments, request, monkeypatch):
    """Failing means that data_prep.py could be wrong in this way, and no test would say so."""
    monkeypatch.setitem(globals(), "dp", mutant(old, new, dp))
    must_fail(test, request, **arguments)
