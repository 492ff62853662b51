"""Tests of data_prep.py. Each docstring says what it means when the test fails."""

import json
import struct
import subprocess
import sys
import tracemalloc
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import data_prep as dp

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
    for split in dp.SPLITS:
        loaded = dp.load_split(path, split)
        frames = dp.unpack(loaded["bits"]).reshape(-1, 64, 64)
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
    first, again, other = dp.render_demo(12, 5), dp.render_demo(12, 5), dp.render_demo(12, 6)
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all()
    assert (first[0] != other[0]).any()


def test_demo_shows_one_hero_and_one_fish(demo_file):
    """Failing means that a sprite is hidden, doubled, or looks like another thing on screen."""
    for frame in dp.unpack(dp.load_split(demo_file, "train")["bits"][::4]).reshape(-1, 64, 64):
        assert len(find(frame, dp.HERO)) == 1
        assert len(find(frame, dp.FISH_RIGHT)) + len(find(frame, dp.FISH_LEFT)) == 1


def test_demo_actions_are_what_the_hero_does(demo_file):
    """Failing means the labels lie: accuracy measured against them would mean nothing.

    The hero is found in the pixels. A step in one direction only must be labelled with it, and no
    step with 'stay'; a diagonal one (the key changed) with one of its two directions.
    """
    split = dp.load_split(demo_file, "train")
    moves = {0: (0, 0), 1: (-1, 0), 2: (1, 0), 3: (0, -1), 4: (0, 1)}
    clean = 0
    for bits, actions in zip(split["bits"][::3], split["actions"][::3]):
        places = np.array([find(frame, dp.HERO)[0] for frame in dp.unpack(bits)])   # (16, 2)
        for step, action in zip(np.diff(places, axis=0), actions):
            dy, dx = moves[int(action)]
            if (step == (4 * dy, 4 * dx)).all():
                clean += 1                          # three equal effects: one patch, or stillness
            elif action:                            # a mixture: at least part of it fits
                assert step @ (dy, dx) > 0 or abs(step).sum() <= 4, (step, action)
            else:
                assert abs(step).sum() <= 2, (step, action)
    assert clean > 0.7 * split["actions"][::3].size, "clean steps must be the rule"
    assert set(np.unique(split["actions"])) == set(range(5))


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
    bits = dp.load_split(demo_file, "train")["bits"]
    for w in range(0, len(bits), 3):
        seen = set()
        for frame in dp.unpack(bits[w:w + 3]).reshape(-1, 64, 64):
            for drawing in (dp.HERO, dp.FISH_RIGHT, dp.FISH_LEFT):
                for y, x in find(frame, drawing):
                    frame[y:y + 8, x:x + 8] = 0
            seen.add(frame.tobytes())
        assert len(seen) == 1


def test_demo_has_few_patches(demo_file):
    """Failing means that more kinds of 4x4 patch appear than 32 codes can hope to draw."""
    frames = dp.unpack(dp.load_split(demo_file, "train")["bits"])
    patches = frames.reshape(-1, 16, 4, 16, 4).swapaxes(2, 3).reshape(-1, 16)
    assert len(np.unique(np.packbits(patches, axis=1), axis=0)) <= 80


def test_demo_hero_is_never_trapped():
    """Failing means that a level has a place that the hero can never reach or leave."""
    for seed in range(10):
        free = dp.DemoWorld(seed).free
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
        walls = dp.random_walls(rng)
        for line in [*walls, *walls.T]:             # rows and columns, which begin with a wall
            floor = "".join("#" if wall else "." for wall in line).split("#")
            assert all(len(run) == 0 or len(run) >= 3 for run in floor)


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
    assert dp.load_meta(out)["sources"][0]["ticks"] == 192


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
    meta = dp.load_meta(out)
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
    frame = dp.image_to_frame(video, threshold=128)
    assert (frame == np.rot90(picture[::2, ::2] // 255, quarter_turns)).all()


def test_portrait_crop_and_fit(tmp_path):
    """Failing means that the picture is squeezed, off centre, or cut where it should be whole."""
    picture = np.zeros((256, 128), dtype=np.uint8)
    picture[64:192] = numbered(77, 128, 128)        # the middle square bears a number
    picture[:64] = 255                              # white above, black below
    video = encode(tmp_path / "portrait.mp4", [picture] * 30, steady(30, 1))
    assert read_number(dp.image_to_frame(video, 128, "center")) == 77
    fitted = np.zeros((64, 64), dtype=np.uint8)
    fitted[:, 16:48] = picture[::4, ::4] // 255
    assert (dp.image_to_frame(video, 128, "fit") == fitted).all()


def test_white_is_white_and_black_is_black(tmp_path):
    """Failing means that the colour range is mixed up: black would be 16 and white 235."""
    picture = np.zeros((64, 64), dtype=np.uint8)
    picture[:, 32:] = 255
    video = encode(tmp_path / "v.mp4", [picture] * 30, steady(30, 1))
    for threshold in (5, 250):
        assert (dp.image_to_frame(video, threshold) == picture // 255).all()
    assert (dp.image_to_frame(video, 128, invert=True) == 1 - picture // 255).all()


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
    result = dp.binarise(grey[None].astype(np.uint8), None, False)[0]
    assert result[10:14].all() and not result[30:].any()


def test_other_formats(tmp_path):
    """Failing means that GIF or WebM, or a source below 64 pixels, is no longer read."""
    frames = np.stack([numbered(i) for i in range(60)])
    dp.save_gif(frames, tmp_path / "a.gif", scale=1, fps=10)           # 6 s
    assert dp.main(["video", str(tmp_path / "a.gif"), "-o", str(tmp_path / "gif.npz")]) == 0
    start, numbers = numbers_by_split(tmp_path / "gif.npz")["train"]
    assert numbers[0].tolist() == list(range(16)) and start[0] == 0
    webm = encode(tmp_path / "a.webm", [np.full((36, 50), 255 * (i % 2), np.uint8)
                                        for i in range(60)], steady(10, 6), 10, "libvpx-vp9",
                  Fraction(1, 1000))
    assert dp.main(["video", str(webm), "-o", str(tmp_path / "webm.npz")]) == 0
    frames = dp.unpack(dp.load_split(tmp_path / "webm.npz", "train")["bits"])
    assert (frames[0].mean(axis=(1, 2)).round() == np.arange(16) % 2).all()


def test_damage_in_the_middle_is_skipped(tmp_path, capsys):
    """Failing means that one broken spot makes a whole video unusable, or passes unmentioned."""
    video = numbered_video(tmp_path / "v.mkv", steady(30, 10), time_base=Fraction(1, 1000))
    data = bytearray(video.read_bytes())
    data[len(data) // 2:len(data) // 2 + 3000] = bytes(3000)
    video.write_bytes(data)
    assert dp.main(["video", str(video), "-o", str(tmp_path / "out.npz")]) == 0
    assert "warning" in capsys.readouterr().err


def test_blank_result_warns(tmp_path, capsys):
    """Failing means that someone may train for a day on an all-black video unwarned."""
    video = encode(tmp_path / "v.mp4", [np.zeros((64, 64), np.uint8)] * 180, steady(30, 6))
    assert dp.main(["video", str(video), "-o", str(tmp_path / "out.npz")]) == 0
    assert "--threshold" in capsys.readouterr().err


# --- the user's mistakes ---------------------------------------------------------------------


def make_inputs(folder):
    """Files that are wrong in various ways, and one good short video."""
    numbered_video(folder / "good.mp4", steady(30, 6))
    numbered_video(folder / "short.mp4", steady(30, 4))
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is no video\n" * 50, encoding="utf-8")
    (folder / "cut.mp4").write_bytes((folder / "good.mp4").read_bytes()[:2000])
    with wave.open(str(folder / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    (folder / "there.npz").write_bytes(b"precious")
    (folder / "folder.npz").mkdir()


@pytest.mark.parametrize("arguments, expected", [
    ("video missing.mp4 -o out.npz", "there is no file"),
    ("video empty.mp4 -o out.npz", "is empty"),
    ("video text.mp4 -o out.npz", "cannot read"),
    ("video cut.mp4 -o out.npz", "cannot read"),
    ("video sound.wav -o out.npz", "no picture"),
    ("video short.mp4 -o out.npz", "4.8 s"),
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
    ("video good.mp4 -o good.mp4/out.npz", "cannot make the folder"),
    ("demo -o there.npz", "--force"),
    ("demo -o out.npz --minutes nan", "--minutes"),
    ("demo -o out.npz --minutes 0.05", "--minutes"),
    ("demo -o out.npz --seed -1", "--seed"),
    ("preview missing.npz -o out.png", "there is no data file"),
    ("preview there.npz -o out.png", "not an .npz"),
    ("preview there.npz -o out.jpg", ".png or .gif"),
    ("render -o out.npz", "invalid choice"),
    ("", "required"),
])
def test_mistakes_get_one_sentence(tmp_path, monkeypatch, capsys, arguments, expected):
    """Failing means that a user's mistake ends in a traceback, a wrong status, or debris."""
    monkeypatch.chdir(tmp_path)
    make_inputs(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert dp.main(arguments.split()) == 2
    err = capsys.readouterr().err.strip()
    errors = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and expected in errors[0], err
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "there.npz").read_bytes() == b"precious"


def test_status_and_stderr_of_the_program(tmp_path):
    """Failing means that scripts cannot tell from the exit status that something went wrong."""
    program = Path(dp.__file__)
    run = subprocess.run([sys.executable, program, "video", "none.mp4", "-o", "out.npz"],
                         cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1


def test_force_replaces(tmp_path):
    """Failing means that --force does not replace a file, or leaves something beside it."""
    path = tmp_path / "new" / "demo.npz"            # the folder is made, too
    assert dp.main(["demo", "-o", str(path), "--minutes", "0.1"]) == 0
    path.write_bytes(b"old")
    assert dp.main(["demo", "-o", str(path), "--minutes", "0.1", "--force"]) == 0
    assert dp.load_meta(path)["counts"] == {"train": 3, "val": 3, "test": 3}
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
        for split in dp.SPLITS:
            count = meta["counts"][split]
            assert data[split].dtype == np.uint8 and data[split].shape == (count, 16, 64, 8)
            assert data[split + "_start"].dtype == np.int64
            assert data[split + "_actions"].shape == (count, 15)
    assert meta["version"] == 1 and meta["fps"] == 10 and meta["source_fps"] == 30
    assert meta["action_names"] == list(dp.DEMO_ACTIONS)


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
    elif kind == "no rows":
        arrays["train"] = arrays["train"][:0]


@pytest.mark.parametrize("kind", ["type", "shape", "pickled", "absent", "lengths", "action",
                                  "version", "meta", "no rows", "cut", "flipped", "huge"])
def test_malformed_data_file(tmp_path, kind):
    """Failing means that a wrong file is trained on, or that it ends in a traceback.

    'huge' claims thousands of sequences that are not there: memory must not be set aside for it.
    """
    path = tmp_path / "demo.npz"
    dp.write_demo(path, minutes=0.1)
    with np.load(path, allow_pickle=False) as data:
        arrays = dict(data)
    damaged(arrays, kind)
    np.savez(path, **arrays)
    content = bytearray(path.read_bytes())
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
    with pytest.raises(dp.UserError) as caught:
        for split in dp.SPLITS:
            dp.load_split(path, split)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6, "memory was set aside before the header was checked"
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


# --- looking ---------------------------------------------------------------------------------


def test_preview_png(demo_file, tmp_path):
    """Failing means that the contact sheet does not show the sequences' frames in order."""
    out = tmp_path / "sheet.png"
    assert dp.main(["preview", str(demo_file), "-o", str(out), "--split", "val",
                    "--count", "2"]) == 0
    sheet = np.array(Image.open(out))
    frames = dp.unpack(dp.load_split(demo_file, "val")["bits"][0]) * 255
    strip = sheet[:128:2, -16 * 132::2].reshape(64, 16, 66)[:, :, :64].swapaxes(0, 1)
    assert (strip == frames).all() and sheet.shape == (2 * 132, 72 + 16 * 132)


def test_preview_gif(demo_file, tmp_path):
    """Failing means that the animation has the wrong speed or does not play."""
    out = tmp_path / "sheet.gif"
    assert dp.main(["preview", str(demo_file), "-o", str(out), "--count", "3"]) == 0
    with Image.open(out) as image:
        assert image.size == (3 * 132, 128) and image.n_frames == 16
        assert image.info["duration"] == 100 and image.info["loop"] == 0


def test_image_to_frame(tmp_path):
    """Failing means that play --image shows the model something else than the picture."""
    frame = dp.DemoWorld(1).frame()
    path = tmp_path / "start.png"
    for mode in ("L", "RGBA", "P", "1"):
        Image.fromarray(frame * 255).resize((320, 320), 0).convert(mode).save(path)
        assert (dp.image_to_frame(path) == frame).all(), mode
    for bad in ("missing.png", "text.png"):
        (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
        with pytest.raises(dp.UserError):
            dp.image_to_frame(tmp_path / bad)
