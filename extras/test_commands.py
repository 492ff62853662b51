"""The tests of the commands, from a video to a GIF, and of README, notebooks and hand-outs."""

import base64
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data_prep as dp
import genie_mini
from extras import bench, checkpoints, command_line, files, pictures, runlog, worlds
from extras import window as window_module
from extras.testing import ROOT, close, encode, measurements, steady, tiny_trainer

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
    "world": {"one_hero", "one_fish", "walls_kept"}}


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
    expected = {"checkpoint.safetensors", "checkpoint.previous.safetensors",
                "metrics.csv", "losses.png",
                "reconstruction.png", "rollout.png", "buttons.png", "eval.json"}
    assert {path.name for path in run.iterdir()} == expected
    for name in expected:
        if name.endswith(".png"):
            with Image.open(run / name) as image:
                image.verify()
    with Image.open(run / "buttons.png") as image:
        assert image.size == (72 + 9 * 132, 8 * 132), "eight rows of 8 frames and an arrow"
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
        for path, size in ((figure, (72 + 9 * 132, 8 * 132)), (clips, (72 + 16 * 66, 9 * 66))):
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
    args = command_line.build_parser().parse(command)
    config = command_line.load_run(args).config
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
    genie = genie_mini.Genie.load(workspace / "run" / "checkpoint.safetensors")
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
        frames, many = genie.step(window_module.copies(state, 8), torch.arange(8))
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
    readme = (ROOT / "README.md").read_text("utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1)
    code = code.replace('"assets/demo.safetensors"', repr(str(command_line.DEMO_CHECKPOINT)))
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
    before = (run / "checkpoint.safetensors").read_bytes()
    assert genie_mini.main(command) == 2
    assert "is not the video that this run began on" in capsys.readouterr().err
    assert (run / "checkpoint.safetensors").read_bytes() == before


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
    stopped = checkpoints.read_checkpoint(out / "checkpoint.safetensors")
    assert (stopped["stage"], stopped["step"]) == (1, 3), "the step was finished, and saved"
    newest = out / "checkpoint.safetensors"
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
    assert newest.with_suffix(".damaged.safetensors").stat().st_size == 5000
    ends = [checkpoints.read_checkpoint(run / "checkpoint.safetensors")["model"]
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
    genie = genie_mini.Genie.load(command_line.DEMO_CHECKPOINT)
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


@pytest.mark.parametrize("arguments, expected", [
    ("", "required"),
    ("tarin", "invalid choice"),
    ("train --tok_dims 64", "did you mean --tok_dim?"),
    ("train --data D --learning_rate 1", "--learning_rate"),
    ("train --data D --preset smoke --tok_dim wide", "--tok_dim"),
    ("train --data D --preset smoke --batch 1.5", "--batch"),
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
    ("train --data D --preset smoke --dyn_frames 17", "--dyn_frames"),
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
    (tmp_path / "cut" / "checkpoint.safetensors").write_bytes(b"PK")
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
            args = command_line.build_parser().parse([*command.split(), str(tmp_path / "run")])
            args.function(args)


def test_what_a_killed_run_left_is_swept(tmp_path, gm=genie_mini):
    """Failing means that half-written files pile up in a run's folder, or a user's file is lost."""
    left = [".checkpoint.safetensors.123.tmp", ".metrics.csv.7.tmp", ".rollout.png.99.tmp"]
    kept = [".notes.2024.tmp", "checkpoint.safetensors", ".checkpoint.safetensors.tmp",
            "rollout.png.1.tmp"]
    for name in left + kept:
        (tmp_path / name).touch()
    files.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(kept)


def test_resuming_takes_what_changes_no_result(demo_file, tmp_path, gm=genie_mini):
    """Failing means that a run which ran out of memory, or has moved to another machine, cannot
    follow the advice to resume it in smaller micro-batches or on another device."""
    tiny_trainer(gm, demo_file, tmp_path / "run", 1).save()
    args = command_line.build_parser().parse(["train", "--resume", "--out", str(tmp_path / "run"),
                                    *"--micro_batch 2 --device cpu --precision bfloat16".split()])
    c = command_line.prepare(args).c
    assert (c.micro_batch, c.device, c.precision) == (2, "cpu", "bfloat16")


@pytest.mark.parametrize("cuda, flags, preset", [
    (True, "", "full"), (True, "--device cuda", "full"), (True, "--device cpu", "laptop"),
    (False, "", "laptop"), (True, "--preset smoke", "smoke")])
def test_bare_train_suits_the_machine(cuda, flags, preset, monkeypatch, gm=genie_mini):
    """Failing means that `train` alone takes a preset that its device would need months for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    args = command_line.build_parser().parse(["train", *flags.split()])
    assert command_line.make_config(args).preset == preset


def test_a_log_that_cannot_be_written_stops_no_run(demo_file, tmp_path, capsys, monkeypatch,
                                                   gm=genie_mini):
    """Failing means that metrics.csv open in a spreadsheet, or a picture held by a virus scanner,
    ends hours of training."""
    def held(*_):
        raise PermissionError(13, "held by another program")
    monkeypatch.setattr(runlog, "draw_curves", held)
    trainer = tiny_trainer(gm, demo_file, tmp_path, 0)
    (tmp_path / "metrics.csv").mkdir()                                  # cannot be replaced
    for step in (1, 2):
        trainer.log.add({"stage": "tokenizer", "step": step}, 6, 8, 1.0)
    said = capsys.readouterr().err
    assert said.count("metrics.csv") == said.count("held by another") == 1, "told once"
    assert len(trainer.log.rows) == 2


# --- the notebooks ----------------------------------------------------------------------------

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


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
    monkeypatch.syspath_prepend(str(ROOT / "notebooks"))
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
