"""The tests of the commands, from a video to a GIF, and of README, notebooks and hand-outs."""

import base64
import contextlib
import inspect
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence

import data_prep as dp
import genie_mini
from extras import bench, checkpoints, command_line, files, pictures, runlog, worlds
from extras import window as window_module
from extras.testing import ROOT, close, encode, measurements, steady, tiny_trainer

matplotlib.use("Agg")                   # it draws as on a screen, unseen, and opens no window

# --- the commands, from a video to a GIF -----------------------------------------------------

SIX_STEPS = ("train --preset smoke --tok_steps 6 --dyn_steps 6 --tok_unquantized 2"
             " --val_sequences 3 --val_every 6 --data")


def main(line, *more):
    """Run a command, given as a line and more words (which may hold spaces). Returns its status."""
    return genie_mini.main([*line.split(), *map(str, more)])


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with the data file of a video, ten seconds of a white square that walks around (6
    windows); a run trained on it by the command line; and one whose data has moved since. The
    folder's name has a space and an accent."""
    folder = tmp_path_factory.mktemp("my réseau")
    film = np.zeros((300, 128, 128), dtype=np.uint8)
    for t, picture in enumerate(film):
        y, x = 8 * (t // 30) % 96, abs(2 * (t % 96) - 96)
        picture[y:y + 24, x:x + 24] = 255
    video, data = encode(folder / "walk.mp4", film, steady(30, 10)), folder / "walk.npz"
    assert dp.main(["video", str(video), "-o", str(data)]) == 0
    assert main(SIX_STEPS, data, "--out", folder / "run") == 0
    trainer = tiny_trainer(genie_mini, data, folder / "moved")
    trainer.data = "gone.npz"
    trainer.save()
    return folder


def test_train_leaves_a_whole_run(workspace):
    """Failing means that training from a video does not end with all that the README promises."""
    run = workspace / "run"
    drawn = {"losses.png", "reconstruction.png", "rollout.png", "buttons.png"}
    assert {path.name for path in run.iterdir()} == {
        "checkpoint.safetensors", "checkpoint.previous.safetensors", "metrics.csv", "eval.json",
        *drawn}
    for name in drawn:
        with Image.open(run / name) as image:
            image.verify()
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    assert rows[0][:3] == ["stage", "step", "lr"] and {len(row) for row in rows} == {len(rows[0])}
    assert [row[:2] for row in rows[1:]] == [["tokenizer", "5"], ["tokenizer", "6"],
                                             ["world", "5"], ["world", "6"]]


FIELDS = {
    "tokenizer": "wrong_pixels wrong_pixels_p99 iou codes_used perplexity flicker",
    "lam": "wrong_pixels copy_wrong_pixels actions_used perplexity nmi accuracy accuracy_chance",
    "dynamics": "psnr_inferred psnr_random delta_psnr delta_psnr_null wrong_pixels_inferred"
                " wrong_pixels_random wrong_pixels_copy rollout_wrong_pixels"
                " rollout_wrong_pixels_copy",
    "world": "one_hero one_fish walls_kept"}


def test_eval_command(workspace, tmp_path, capsys):
    """Failing means that eval, or training at its end, does not report what the README says: a
    field is missing, a number is none, or the split or a picture is another."""
    results = {}
    for split in ("test", "val"):
        out, figure, clips = (tmp_path / (split + end) for end in (".json", ".png", "_clips.png"))
        assert main("eval --count 3 --run", workspace / "run", "--split", split, "--json", out,
                    "--figure", figure, "--clips", clips) == 0
        for path, size in (     # eight rows of 16 frames and an arrow; nine rows of 16 frames
                (figure, (72 + 9 * 132, 8 * 132)), (clips, (72 + 16 * 66, 9 * 66))):
            with Image.open(path) as image:
                assert image.size == size
        result = results[split] = json.loads(out.read_text("utf-8"))
        assert set(result) == set(FIELDS)
        for part, names in FIELDS.items():
            assert set(names.split()) <= set(result[part]), part
        lam, dynamics = result["lam"], result["dynamics"]
        assert lam["nmi"] is None, "the video's true actions are not known"
        assert set(dynamics["rollout_wrong_pixels"]) == {"4", "8", "15"}
        assert dynamics["delta_psnr"] == pytest.approx(
            dynamics["psnr_inferred"] - dynamics["psnr_random"])
        assert 0 <= result["tokenizer"]["iou"] <= 1
        assert 0 <= result["tokenizer"]["wrong_pixels"] <= 4096
    assert "delta_psnr" in capsys.readouterr().out
    assert results["test"] != results["val"], "the splits must differ"
    for trained, ours in (("eval.json", "test.json"), ("buttons.png", "test.png")):
        assert (workspace / "run" / trained).read_bytes() == (tmp_path / ours).read_bytes()
    for best, null, told in ((66.1, 0.0, True), (30.0, -36.1, True), (30.0, 0.0, False)):
        genie_mini.print_table({"dynamics": {"psnr_inferred": best, "delta_psnr_null": null}})
        assert ("without a wrong pixel" in capsys.readouterr().err) == told


def read_gif(path, scale=4):
    """A GIF of play, enlarged `scale` times: frames (n, 64, 64) of 0 and 1, and how many ms it
    lasts: 100 a frame. (Equal frames are stored as one long one.)"""
    frames, lasts = [], 0
    with Image.open(path) as image:
        for frame in ImageSequence.Iterator(image):
            frames.append(np.array(frame.convert("L"))[::scale, ::scale] // 255)
            lasts += frame.info["duration"]
    return np.stack(frames), lasts


def play(workspace, out, *arguments, scale=4):
    """Play the workspace's run into a GIF, and read it."""
    assert main("play --run", workspace / "run", "--out", out, *arguments) == 0
    return read_gif(out, scale)


def first_frame(workspace, sequence):
    """The first frame (64, 64) of a sequence of the test split."""
    return files.unpack(files.load_split(workspace / "walk.npz", "test")["bits"])[sequence, 0]


def test_a_run_can_be_sampled_anew(workspace, tmp_path):
    """Failing means that eval and play ignore the settings that they are given."""
    settings = {"temperature": 0.25, "order_noise": 0, "maskgit_steps": 3,
                "mask_schedule": "adaptive", "precision": "bfloat16"}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    for command in ("eval", "play"):
        args = command_line.build_parser().parse([command, "--run", str(workspace / "run"), *flags])
        config = vars(command_line.load_run(args).config)
        assert {name: config[name] for name in settings} == settings
    cold, hot = (play(workspace, tmp_path / f"{t}.gif", "--actions", "0,1,2,3", "--temperature", t)
                 for t in (0, 50))
    assert (cold[0] != hot[0]).any()


@pytest.mark.parametrize("count", [1, 3, 20])
def test_play_from_the_data(workspace, tmp_path, count):
    """Failing means that play starts elsewhere, presses more or fewer buttons than asked, or dreams
    something else each time; or that --force does not replace the animation."""
    arguments = ("--start", 2, "--actions", ",".join(str(t % 8) for t in range(count)))
    frames, lasts = play(workspace, tmp_path / "a.gif", *arguments)
    assert lasts == 100 * (count + 1) and (frames[0] == first_frame(workspace, 2)).all()
    (tmp_path / "b.gif").write_bytes(b"old")
    play(workspace, tmp_path / "b.gif", *arguments, "--force")
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


def test_play_from_an_image(workspace, tmp_path):
    """Failing means that one cannot start from a picture of one's own."""
    frame = worlds.DemoWorld(3).frame()
    Image.fromarray(frame * 255).resize((320, 320), 0).save(tmp_path / "start.png")
    frames, lasts = play(workspace, tmp_path / "a.gif", "--image", tmp_path / "start.png",
                         "--actions", "0,1", "--seed", 3)
    assert (frames[0] == frame).all() and lasts == 300


def test_play_without_actions_shows_every_button(workspace, tmp_path):
    """Failing means that bare play does not show what each of the eight buttons does."""
    frames, lasts = play(workspace, tmp_path / "a.gif", scale=2)
    panels = np.split(frames[0], 8, axis=1)                             # 64 pixels and a gap each
    assert all((panel[-64:, :64] == first_frame(workspace, 0)).all() for panel in panels)
    assert (panels[0][:-64] != panels[1][:-64]).any(), "each has its number over it"
    assert lasts == 1600


def test_a_finished_run_is_resumed_on_its_video_alone(workspace, tmp_path, capsys):
    """Failing means that a finished run is trained again, that after training in a notebook Ctrl-C
    no longer works there, or that a run is resumed on another video than it began on, perhaps one
    that was prepared anew under the same name, or not on the same one in another place."""
    run = shutil.copytree(workspace / "run", tmp_path / "run")
    data = shutil.copy(workspace / "walk.npz", tmp_path / "moved.npz")
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    assert main("train --resume --out", run, "--data", data) == 0
    assert [signal.getsignal(number) for number in numbers] == before
    for name in ("metrics.csv", "eval.json"):
        assert (run / name).read_bytes() == (workspace / "run" / name).read_bytes()
    assert "tokenizer 1/6" not in capsys.readouterr().out
    arrays = dict(np.load(data, allow_pickle=False))
    arrays["train"][-1, -1, -1, -1] ^= 1                           # one pixel of the last frame
    np.savez(data, **arrays)
    saved = (run / "checkpoint.safetensors").read_bytes()
    assert main("train --resume --out", run, "--data", data) == 2
    assert "is not the video that this run began on" in capsys.readouterr().err
    assert (run / "checkpoint.safetensors").read_bytes() == saved


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_goes_on_exactly(workspace, tmp_path, monkeypatch, capsys, number, status):
    """Failing means that Ctrl-C or SIGTERM loses a step, or that a run whose newest checkpoint was
    then damaged cannot be taken up, from the one before, to end as if nothing had happened."""
    step, out = genie_mini.Trainer.optimizer_step, tmp_path / "a run"
    newest = out / "checkpoint.safetensors"

    def interrupted(trainer, log):
        if (trainer.stage, trainer.step) == (1, 2):
            signal.raise_signal(number)
        return step(trainer, log)

    monkeypatch.setattr(genie_mini.Trainer, "optimizer_step", interrupted)
    result = {"dynamics": {"psnr_inferred": 9.0, "delta_psnr_null": 0.0}}
    monkeypatch.setattr(genie_mini, "evaluate", lambda *_: result)      # slow, and tested elsewhere
    monkeypatch.setattr(window_module, "draw_buttons", lambda *_: None)
    assert main(SIX_STEPS, workspace / "walk.npz", "--out", out) == status
    assert f'--resume --out "{out}"' in capsys.readouterr().out
    stopped = checkpoints.read_checkpoint(newest)
    assert (stopped["stage"], stopped["step"]) == (1, 3), "the step was finished, and saved"
    newest.write_bytes(newest.read_bytes()[:5000])
    genie_mini.Genie.load(newest)
    monkeypatch.setattr(genie_mini.Trainer, "optimizer_step", step)
    statuses = []
    thread = threading.Thread(
        target=lambda: statuses.append(main("train --resume --out", out)))
    thread.start()                                       # no signals there, as in a web server
    thread.join()
    said = capsys.readouterr()
    assert statuses == [0] and f'play --run "{out}"' in said.out
    assert said.err.count("Taking the one before it") == 2
    assert newest.with_suffix(".damaged.safetensors").stat().st_size == 5000
    ours, whole = (checkpoints.read_checkpoint(run / "checkpoint.safetensors")["model"]
                   for run in (out, workspace / "run"))
    assert all((ours[name] == whole[name]).all() for name in whole)
    assert (out / "metrics.csv").read_bytes() == (workspace / "run/metrics.csv").read_bytes()


def test_resuming_takes_what_changes_no_result(demo_file, tmp_path):
    """Failing means that a run which ran out of memory, or has moved to another machine, cannot
    follow the advice to resume it in smaller micro-batches or on another device."""
    tiny_trainer(genie_mini, demo_file, tmp_path, 1).save()
    flags = "--micro_batch 2 --device cpu --precision bfloat16"
    args = command_line.build_parser().parse(
        ["train", "--resume", "--out", str(tmp_path), *flags.split()])
    c = command_line.prepare(args).c
    assert (c.micro_batch, c.device, c.precision) == (2, "cpu", "bfloat16")


@pytest.mark.parametrize("cuda, flags, preset", [
    (True, "", "full"), (True, "--device cuda", "full"), (True, "--device cpu", "laptop"),
    (False, "", "laptop"), (True, "--preset smoke", "smoke")])
def test_bare_train_suits_the_machine(cuda, flags, preset, monkeypatch):
    """Failing means that `train` alone takes a preset that its device would need months for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    args = command_line.build_parser().parse(["train", *flags.split()])
    assert command_line.make_config(args).preset == preset


def test_a_log_that_cannot_be_written_stops_no_run(demo_file, tmp_path, capsys, monkeypatch):
    """Failing means that metrics.csv open in a spreadsheet, or a picture held by a virus scanner,
    ends hours of training."""
    held = Mock(side_effect=PermissionError(13, "held by another program"))
    monkeypatch.setattr(runlog, "draw_curves", held)
    trainer = tiny_trainer(genie_mini, demo_file, tmp_path, 0)
    (tmp_path / "metrics.csv").mkdir()                                  # cannot be replaced
    for step in (1, 2):
        trainer.log.add({"stage": "tokenizer", "step": step}, 6, 8, 1.0)
    said = capsys.readouterr().err
    assert said.count("metrics.csv") == said.count("held by another") == 1, "told once"
    assert len(trainer.log.rows) == 2


def test_what_a_killed_run_left_is_swept(tmp_path):
    """Failing means that half-written files pile up in a run's folder, or a user's file is lost."""
    left = [".checkpoint.safetensors.123.tmp", ".metrics.csv.7.tmp", ".rollout.png.99.tmp"]
    kept = [".notes.2024.tmp", "checkpoint.safetensors", ".checkpoint.safetensors.tmp",
            "rollout.png.1.tmp"]
    for name in left + kept:
        (tmp_path / name).touch()
    files.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(kept)


def test_bench_command(tmp_path, capsys, monkeypatch):
    """Failing means that bench is broken, or that the cache it times is not exact. (One round, and
    small products: that it takes long is no part of what is tested.)"""
    timed, square = bench.timed, torch.randn(512, 512)
    monkeypatch.setattr(bench, "timed", lambda *works, **_: timed(*works, repeats=1))
    monkeypatch.setattr(bench, "matrix_product", lambda *_: (lambda: square @ square, 2 ** 28))
    assert main("bench --preset smoke --json", tmp_path / "bench.json") == 0
    result = json.loads((tmp_path / "bench.json").read_text("utf-8"))
    printed = capsys.readouterr().out
    assert set(result) == {"doctor", "train", "play", "memory", "machine"}
    assert f'doctor {json.dumps(result["doctor"])}' in printed
    assert result["doctor"]["ok"] and result["doctor"]["max_abs_diff_cpu"] < 0.01
    for stage in ("tokenizer", "world"):
        row = result["train"][stage]
        assert set(row) == {"sequences_per_s", "sequences_per_s_range", "mfu", "gflop",
                            "speedup_over_baseline", "micro_batch"}
        assert 0 < row["sequences_per_s_range"][0] <= row["sequences_per_s"]
        assert 0 < row["mfu"] < 2 and row["gflop"] > 0 and row["speedup_over_baseline"] > 0
    played = result["play"]
    assert {"fps", "fps_range", "fps_uncached", "mfu", "speedup", "max_abs_diff"} <= set(played)
    assert played["speedup"] == pytest.approx(played["fps"] / played["fps_uncached"])
    assert played["fps"] > 0 and played["max_abs_diff"] < 1e-4
    assert result["memory"]["peak_gib"] is None or result["memory"]["peak_gib"] > 0
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) == 5 and {line.count("|") for line in table} == {6}, "Markdown"


def test_bench_memory(capsys):
    """Failing means that the table of memory in MEASUREMENTS cannot be made again."""
    assert main("bench --memory --preset smoke --micro_batch 2") == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if " GiB |" in line]
    assert [row.split("|")[1:3] for row in rows] == [[" tokenizer ", " 2 "], [" world ", " 2 "]]


# --- the window --------------------------------------------------------------------------------


@pytest.fixture
def window(workspace, monkeypatch, tmp_path):
    """A window to play in."""
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
    press(window, "x")                              # another key goes up; this one is still down
    window.tick()
    press(window, "left")
    window.tick()
    assert list(window.pressed)[6:] == [7, 7, 7, 3, rest]


def test_a_button_leads_where_the_window_said(window):
    """Failing means that the small frames under the picture are not what the buttons will do,
    that the dream goes on from what another button would have led to, or that eight dreams side by
    side differ from having played each of them alone."""
    genie = window.genie
    genie.config.temperature, genie.config.maskgit_steps = 0.0, 1       # so a sketch is the frame
    genie.lam.quantizer.codebook.mul_(100)                              # and buttons differ
    window.look_ahead()
    assert (window.futures[0] != window.futures[5]).any()
    eight = genie.start(window.firsts[0].expand(8, 64, 64))
    for button in 0, 5:                             # a third press would begin a new memory
        promised = window.futures[button].copy()
        press(window, str(button))
        (frames, after), (_, eight) = (genie.step(eight, a) for a in (torch.arange(8), button))
        assert (window.frame == promised).all() and (frames[button].numpy() == promised).all()
        assert (window.state.tokens == after.tokens[button]).all()
        assert (window.state.actions == after.actions[button]).all()
        for pair, pairs in zip(window.state.dynamics, after.dynamics):
            for one, all_eight in zip(pair, pairs):                     # (N, ...) and (8 N, ...)
                assert close(one, all_eight.unflatten(0, (8, -1))[button])
        shown = window.picture()
        assert (shown[:512:8, 8:520:8] == promised * 255).all()         # enlarged 8 times
        for a in range(8):
            assert (shown[514:, 66 * a:66 * a + 64] == window.futures[a] * 255).all()
        drawn = np.asarray(window.image.get_array())[..., 0]
        assert (drawn == shown).all(), "the window shows another"


def test_the_frame_takes_all_passes_and_a_sketch_one(window, monkeypatch):
    """Failing means that the played frame is only sketched, or that the sketches cost as much."""
    counted = Mock(wraps=window.genie.dynamics.forward)
    monkeypatch.setattr(window.genie.dynamics, "forward", counted)
    window.tick()
    passes = window.genie.config.maskgit_steps
    frames = [call.args[0].shape[1] for call in counted.call_args_list]
    assert passes > 1 and frames == [1] * (passes + 1) + [8]            # one more to remember


def test_restart_save_and_quit(window, tmp_path, monkeypatch):
    """Failing means that R, S or Q do nothing, that S writes over an earlier film, or that an error
    in saving ends the session, or goes unsaid."""
    (tmp_path / "dream-1.gif").write_bytes(b"mine")
    press(window, "1", "2", "s")                         # the film: the first frame and two more
    frames, lasts = read_gif(tmp_path / "dream-2.gif")
    assert lasts == 300 and (frames[0] == window.firsts[0].numpy()).all()
    assert "dream-2.gif" in window.note and (tmp_path / "dream-1.gif").read_bytes() == b"mine"
    press(window, "r")
    assert len(window.film) == 2                         # anew, and one frame since
    assert (np.unpackbits(window.film[0], axis=-1) == window.firsts[1].numpy()).all()
    full = Mock(side_effect=OSError("No space left on device"))
    monkeypatch.setattr(window_module, "save_gif", full)
    press(window, "s", "1")
    assert "No space left" in window.note and window.pressed[-1] == 1
    number = window.figure.number
    press(window, "q")
    assert not matplotlib.pyplot.fignum_exists(number)


# --- the user's mistakes -----------------------------------------------------------------------

TRAIN, EVAL, PLAY = "train --preset smoke --data D", "eval --run RUN", "play --run RUN --actions"
MISTAKES = {    # what is answered, FLAG and VALUE being the last two words: to which command lines
    "required": [""],
    "invalid choice": ["tarin"],
    "did you mean --tok_dim?": ["train --tok_dims 64"],
    "did you mean --json?": ["EVAL --jsno x"],
    "FLAG": [
        "train --data D --learning_rate 1", "bench --preset smoke --run x", "TRAIN --tok_dim wide",
        "TRAIN --batch 1.5", "TRAIN --batch 1" + "0" * 400, "TRAIN --micro_batch some",
        "EVAL --split trial"],
    "FLAG is VALUE": [
        "TRAIN --lr nan", "TRAIN --lr inf", "TRAIN --lr -1", "TRAIN --seed -1",
        "TRAIN --mask_min 1.5", "TRAIN --temperature -1", "TRAIN --tok_steps -5",
        "TRAIN --dyn_frames 17", "TRAIN --dyn_frames 1", "TRAIN --micro_batch -1",
        "TRAIN --tok_dim 10000000", "TRAIN --dyn_layers 1000000", "TRAIN --device tpu",
        "EVAL --count 0", "PLAY 0 --seed -1", "bench --preset smoke --tok_dim 0"],
    "choose full, laptop, smoke, video": ["train --data D --preset huge", "bench --preset none"],
    "choose change, frames": ["TRAIN --lam_view all"],
    "multiple of": ["TRAIN --tok_dim 36 --heads 8", "TRAIN --dyn_dim 18"],
    "must divide 64": ["TRAIN --lam_patch 7"],
    "must divide 16": ["TRAIN --dyn_fold 3"],
    "must be a number from 0": ["EVAL --temperature -1"],
    "VALUE": [
        "TRAIN --data none.npz", "TRAIN --data text.npz", "TRAIN --out text.npz",
        "train --resume --out RUN --data none.npz", "EVAL --data none.npz",
        "EVAL --split test --data text.npz", "PLAY 0 --image none.png", "PLAY 0 --image text.npz"],
    "no data file VALUE": ["TRAIN --data ."],
    "data, gone.npz, is not there: name it by --data": [
        "train --resume --out MOVED", "eval --run MOVED", "play --actions 1 --run MOVED"],
    "already holds a run": ["TRAIN --out RUN", "TRAIN --out cut"],
    "text.npz": ["TRAIN --out text.npz/run"],
    "--resume needs --out": ["train --resume"],
    "no checkpoint": [
        "train --resume --out none", "train --resume --out half", "eval --run none",
        "play --actions 0 --run none", "play --actions 0 --run half"],
    "not a checkpoint": ["eval --run text.npz"],
    "is damaged": ["train --resume --out cut", "play --actions 0 --run cut"],
    "FLAG cannot be given": [
        "train --resume --out RUN --lr 0.5", "train --resume --out RUN --preset full"],
    "must end in .json": ["EVAL --json x.txt", "bench --preset smoke --json x.txt"],
    "must end in .png": ["EVAL --figure x.jpg", "EVAL --clips x.jpg"],
    "must end in .gif": ["PLAY 0 --out roll.mp4"],
    "cannot write in": ["EVAL --json text.npz/x.json", "PLAY 0 --out text.npz/a.gif"],
    "is a directory": ["EVAL --json .", "PLAY 0 --out ."],
    "--force": ["PLAY 0 --out there.gif"],
    "0 to 7": ["PLAY 8", "PLAY -1", "PLAY 0,-1", "PLAY 1_0", "PLAY 8 --out new/roll.gif"],
    "whole numbers": [
        "PLAY a", "PLAY 0,,1", "PLAY 1.5", "play --run RUN --actions=", "PLAY " + "9" * 5000],
    "3001 buttons": ["PLAY " + "0," * 3000 + "0"],
    "FLAG VALUE": ["PLAY 0 --start 99", "PLAY 0 --start -1"],
    "one of them": ["PLAY 0 --image a.png --start 1"],
    "no window can open here": ["play --run RUN"]}                      # no display, as over SSH


@pytest.mark.parametrize("line, expected", [
    (line, expected) for expected, lines in MISTAKES.items() for line in lines])
def test_mistakes_get_one_sentence(workspace, tmp_path, monkeypatch, capsys, line, expected):
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
    names = {"D": workspace / "walk.npz", "RUN": workspace / "run", "MOVED": workspace / "moved"}
    line = line.replace("TRAIN", TRAIN).replace("EVAL", EVAL).replace("PLAY", PLAY)
    words = [str(names.get(word, word)) for word in line.split()]
    status = genie_mini.main(words)
    err = capsys.readouterr().err
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    flag, value = ["", "", *words][-2:]
    assert expected.replace("FLAG", flag).replace("VALUE", value) in err
    assert sorted(tmp_path.rglob("*")) == before, "nothing may be created"
    assert (tmp_path / "there.gif").read_bytes() == b"precious" and run.read_bytes() == log


@pytest.mark.parametrize("message, told", [
    ("CUDA out of memory. Tried to allocate 2 GiB", True),
    ("can't allocate memory: you tried to allocate 9 bytes", True),
    ("an illegal memory access was encountered", False)])
def test_lack_of_memory_is_told_in_one_sentence(monkeypatch, capsys, message, told):
    """Failing means that too large a batch ends in a traceback, or that a bug of ours does not."""
    monkeypatch.setattr(bench, "bench", Mock(side_effect=RuntimeError(message)))
    if told:
        assert main("bench") == 2 and "micro_batch" in capsys.readouterr().err
    else:
        with pytest.raises(RuntimeError):
            main("bench")


@pytest.mark.parametrize("backend, told", [
    ("agg", "no window can open here"), ("webagg", "pip install tornado"), ("qtagg", "Qt"),
    ("module://matplotlib_inline.backend_inline", "extras.pictures.Animation")])
def test_play_where_no_window_can_open(workspace, monkeypatch, capsys, backend, told):
    """Failing means that `play` in a notebook's cell, over SSH, or with half of what a window needs
    ends as if all were well, with no window, or in a traceback."""
    def switch(name):
        raise {"qtagg": ImportError("no Qt"), "webagg": RuntimeError("no Tornado")}[name]

    monkeypatch.setattr(matplotlib.pyplot, "get_backend", lambda: backend)
    monkeypatch.setattr(matplotlib.pyplot, "switch_backend", switch)
    assert main("play", "--run", workspace / "run") == 2
    shown = capsys.readouterr()
    assert told in shown.err and shown.err.count("\n") == 1 and not shown.out


# --- as a program ------------------------------------------------------------------------------


@pytest.mark.parametrize("program, good, wrong", [
    ("data_prep.py", "demo --minutes 1 -o d.npz", "video none.mp4 -o out.npz"),
    ("genie_mini.py", "--help", "eval --run none")])
def test_as_a_program(program, good, wrong, tmp_path, monkeypatch):
    """Failing means that %run, whose output is no file, ends in a traceback, that `| head -1` ends
    the work behind it, or that scripts cannot tell from the exit status that something went
    wrong."""
    program = str(ROOT / program)
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as end:
        runpy.run_path(program, run_name="__main__")
    assert not end.value.code and "usage" in out.getvalue()
    read, write = os.pipe()
    os.close(read)                                                      # nobody will ever read
    ended = subprocess.run([sys.executable, program, *good.split()], cwd=tmp_path, stdout=write,
                           stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, "")
    ended = subprocess.run([sys.executable, program, *wrong.split()], cwd=tmp_path,
                           capture_output=True, text=True, encoding="utf-8")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1


# --- README and MEASUREMENTS -------------------------------------------------------------------

README = (ROOT / "README.md").read_text("utf-8")


def test_readme_is_short_and_its_links_lead_somewhere():
    """Failing means that a newcomer has too much to read, or follows a link to nothing."""
    assert len(README.splitlines()) <= 250 and len(README.encode()) <= 14 * 1024
    assert "@@" not in README
    assert README.index("genie_mini.py train") < README.index("\n## "), "it comes soon"
    for folder, text in ((ROOT, README), (ROOT / "extras", measurements())):
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link.startswith("https:") or (folder / link).is_file(), f"{folder}: {link}"


def test_readme_shows_an_agent_in_the_dream():
    """Failing means that the Python code in README does not run as it stands."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    code = code.replace('"assets/demo.safetensors"', repr(str(command_line.DEMO_CHECKPOINT)))
    seen, names = [], {"agent": lambda frame: seen.append(np.asarray(frame)) or 3}
    exec(code, names)
    assert len(seen) == 64 and (seen[0] == worlds.DemoWorld(7).frame()).all()
    shown = pictures.Animation(names["film"])._repr_html_()
    gif = base64.b64decode(re.search("base64,([^\"]*)", shown).group(1))
    assert (read_gif(io.BytesIO(gif))[0][0] == names["film"][0]).all()


def test_shipped_checkpoint_knows_its_buttons(demo_file):
    """Failing means that the pretrained checkpoint in assets/ does not load, or that its actions
    no longer say what the hero does: chance is below 0.6 here, and it was shipped with 0.99."""
    genie = genie_mini.Genie.load(command_line.DEMO_CHECKPOINT)
    data = genie_mini.Sequences(demo_file, "train")
    result = genie_mini.evaluate_lam(genie, data, genie_mini.spread(data, 12))
    assert result["accuracy_chance"] < 0.6 and result["accuracy"] > 0.9
    assert result["wrong_pixels"] < 0.2 * result["copy_wrong_pixels"]


def recorded(name):
    """The text of a file in assets/; what it holds, if it is JSON."""
    text = (ROOT / "assets" / name).read_text("utf-8")
    return json.loads(text) if name.endswith(".json") else text


@pytest.mark.parametrize("name, lines", [("demo", 26), ("card", 26), ("full", 24),
                                         ("space_invaders", 23)])
def test_measurements_show_the_recorded_numbers(capsys, name, lines):
    """Failing means that an evaluation in MEASUREMENTS is not the one recorded in assets/."""
    genie_mini.print_table(recorded(f"{name}.json"))
    table = capsys.readouterr().out
    known = [line for line in table.splitlines() if not line.endswith(" None")]
    assert len(known) == lines
    assert "\n".join("    " + line for line in known) in measurements()


def seeds_table():
    """MEASUREMENTS' table of the evaluations: the shipped world, then two other seeds."""
    runs = [recorded(name) for name in ("demo.json", "seed1.json", "seed2.json")]
    for part, name, goal, digits in (
            ("tokenizer", "wrong_pixels", "≤ 4", 3), ("tokenizer", "iou", "≥ 0.985", 3),
            ("tokenizer", "codes_used", "≥ 28", 0), ("lam", "wrong_pixels", "≤ 40", 1),
            ("lam", "accuracy", "≥ 0.95", 3), ("lam", "nmi", "≥ 0.75", 3),
            ("lam", "perplexity", "≥ 4", 2), ("dynamics", "delta_psnr", "≥ 5", 2),
            ("dynamics", "delta_psnr_marginal", "≥ 5", 2),
            ("dynamics", "delta_psnr_null", "within ± 0.3", 2),
            ("dynamics", "wrong_pixels_inferred", "≤ 40", 1),
            ("world", "one_hero", "≥ 0.95", 3), ("world", "walls_kept", "1", 3)):
        cells = [f"{run[part][name]:.{digits}f}" for run in runs]
        yield f"| {part}.{name} | {goal} | **{cells[0]}** | {' | '.join(cells[1:])} |"


def progress_table():
    """MEASUREMENTS' table of these runs' progress, lowest to highest: early, half way, last."""
    runs = []
    for name in ("demo_metrics.csv", "seed1.csv", "seed2.csv"):
        lines = recorded(name).splitlines()
        rows = [dict(zip(lines[0].split(","), line.split(","))) for line in lines[1:]]
        runs.append({(row["stage"], int(row["step"])): row for row in rows})
    for title, stage, column, digits in (
            ("pixel loss of the tokenizer (train)", "tokenizer", "pixel_loss", 4),
            ("wrong pixels of the LAM in the next frame (val)", "world", "val_wrong_pixels", 1),
            ("agreement with the true actions (val)", "world", "val_accuracy", 2),
            ("dynamics loss, nats a masked token (val)", "world", "val_dynamics_loss", 4),
            ("that loss by another clip's actions, over it", "world", "val_action_ratio", 1)):
        early, cells = {"tokenizer": 100, "world": 400}[stage], []
        lasts = [max(step for name, step in run if name == stage) for run in runs]
        for steps in ([early] * len(runs), [last // 2 for last in lasts], lasts):
            values = [float(run[stage, step][column]) for run, step in zip(runs, steps)]
            cells.append(" to ".join(f"{end(values):.{digits}f}" for end in (min, max)))
        yield f"| {title} | {' | '.join(cells)} |"


def ablation_table():
    """MEASUREMENTS' table of what each switch is worth: a short run a line."""
    for name, row in recorded("ablations.json").items():
        lam, dynamics = row["lam"], row["dynamics"]
        yield (f"| {name} | {'`' + row['flags'] + '`' if row['flags'] else ''} | "
               f"{lam['accuracy']:.3f} | {lam['nmi']:.2f} | {lam['perplexity']:.1f} | "
               f"{dynamics['delta_psnr']:.1f} | {dynamics['wrong_pixels_inferred']:.1f} | "
               f"{row['world']['one_hero']:.2f} |")


@pytest.mark.parametrize("table, lines", [(seeds_table, 13), (progress_table, 5),
                                          (ablation_table, 11)])
def test_measurements_show_the_recorded_seeds(table, lines):
    """Failing means that a number in a table of MEASUREMENTS is not the one in assets/."""
    shown, expected = measurements().splitlines(), list(table())
    start = shown.index(expected[0])
    assert shown[start:start + lines] == expected


# --- notebooks and hand-outs -------------------------------------------------------------------

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(path):
    """The cells of a notebook, as dicts; and those that are code."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return cells, [cell for cell in cells if cell["cell_type"] == "code"]


def kinds(cell):
    """What a cell shows, in kind: streams (joined, as their cuts are chance) and MIME types."""
    found = []
    for output in cell["outputs"]:
        kind = (output["output_type"], output.get("name"), *sorted(output.get("data", {})))
        if kind[0] != "stream" or kind not in found:
            found.append(kind)
    return found


def test_all_notebooks_are_there():
    """Failing means that a notebook of the walkthrough is missing, or one has no number."""
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{i:02}" for i in range(7)]


@each_notebook
def test_notebook_is_short_and_was_run(path):
    """Failing means a cell too long to read, or outputs that are not of one run, top to bottom."""
    whole, code = cells_of(path)
    assert 30 <= len(whole) <= 60
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        lines = "".join(cell["source"]).splitlines()
        assert len(lines) <= 15 and all(len(line) <= 79 for line in lines), lines[:1]
        assert "error" not in [output["output_type"] for output in cell["outputs"]]
        assert "stderr" not in [output.get("name") for output in cell["outputs"]]
    assert sum("image/png" in kind for cell in code for kind in kinds(cell)) >= 4, "few pictures"


@each_notebook
def test_exercises_are_checked(path, monkeypatch, capsys):
    """Failing means that a solution shown to students is refused, or an untouched stub accepted."""
    monkeypatch.syspath_prepend(str(path.parent))
    import checks
    text = "\n".join("".join(cell["source"]) for cell in cells_of(path)[0])
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


@pytest.mark.notebooks
@each_notebook
def test_notebook_runs(path):
    """Failing means that a notebook ends in an error, or shows something else than is committed:
    a picture where there was a number, or nothing at all. (Numbers may differ between machines.)"""
    import nbclient
    import nbformat
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300,
                            resources={"metadata": {"path": str(path.parent)}}).execute()
    fresh = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for old, new in zip(cells_of(path)[1], fresh):
        assert kinds(old) == kinds(new), "".join(old["source"])


def test_a_handout_lacks_the_chosen_functions_alone(tmp_path, monkeypatch, capsys):
    """Failing means that a hand-out for a class gives the answer away, misses more than was asked
    for, or overwrites what is in its folder."""
    monkeypatch.syspath_prepend(str(ROOT / "notebooks"))
    import strip
    folder = tmp_path / "handout"
    assert strip.main(["patchify", "-o", str(folder)]) == 0
    expected = Path(genie_mini.__file__).read_text("utf-8")
    for function in (genie_mini.patchify, genie_mini.unpatchify):
        source, todo = inspect.getsource(function), f'"your turn: {function.__name__}"'
        head = source.splitlines()[:2]                                  # def, and its docstring
        blanked = [*head, f"    raise NotImplementedError({todo})", ""]
        expected = expected.replace(source, "\n".join(blanked))
    assert (folder / "genie_mini.py").read_text("utf-8") == expected
    assert (folder / ".pytest.ini").exists(), "the marks are declared there"
    assert not (folder / "extras" / "test_class.py").exists(), "it does the projects"
    for link in re.findall(r"\]\(([^):#]+)\)", README):
        assert (folder / link).exists(), f"README of the hand-out: {link} is missing"
    (folder / "README.md").write_text("mine")
    assert strip.main(["patchify", "-o", str(folder)]) == 2
    assert (folder / "README.md").read_text() == "mine"
    assert strip.main(["nothing", "-o", str(tmp_path / "other")]) == 2
    assert "choose from patchify" in capsys.readouterr().err and not (tmp_path / "other").exists()
