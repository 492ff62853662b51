"""The tests of what stands in extras/: bench, checkpoints, the window."""

import inspect
import json
import math
import pickle
import struct
import sys
import tracemalloc

import numpy as np
import pytest
import torch

import genie_mini
import test_genie_mini
from extras import bench, checkpoints, command_line, dreams, files, muon, runlog, worlds
from extras import window as window_module
from extras.testing import (fuzzed, measurements, must_fail, mutant, random_frames, tiny,
                            tiny_genie, tiny_trainer, weights_of)

# --- bench and the window -----------------------------------------------------------------------


def test_float_operations_are_counted(gm=genie_mini):
    """Failing means that the counter overlooks a part of the model: what bench calls a share of the
    peak is then too small."""
    layer, x = gm.STBlock(16, 2, 9).space, torch.randn(6, 81, 16)
    assert bench.count_flops(lambda: layer(x)) == 6 * (81 * 16 * (48 + 16) + 2 * 81 * 81 * 16) * 2


def test_bench_counts_as_many_passes_on_both_sides(monkeypatch, gm=genie_mini):
    """Failing means that play with the cache is timed over fewer MaskGIT passes than play without:
    the cache then looks better than it is."""
    monkeypatch.setattr(bench, "timed", lambda *works, **_: np.ones((1, len(works))))
    smoke = {**gm.PRESETS["smoke"], "maskgit_steps": 10}
    cosine, other = (bench.bench_play(gm.Config(**smoke, mask_schedule=name), torch.device("cpu"))
                     for name in ("cosine", "adaptive"))
    assert cosine["gflop"] == other["gflop"]


def test_bench_plays_a_whole_turn_of_the_memory(monkeypatch, gm=genie_mini):
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


def test_bench_knows_the_baseline_from_the_step(monkeypatch, gm=genie_mini):
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


def test_share_of_the_peak_by_hand(gm=genie_mini):
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


def test_motion_of_a_button(gm=genie_mini):
    """Failing means that the arrow of a button points elsewhere than it moves things, or that the
    arrow keys press other buttons than those which move things their way."""
    genie = tiny_genie(gm)
    frames = torch.zeros(3, 64, 64, dtype=torch.uint8)
    frames[:, 20:28, 30:38] = torch.from_numpy(worlds.HERO.copy())
    frames[2] = 0                                                       # nothing there to move
    moves = [(0, 0), (4, 0), (-4, 0), (0, 3), (0, -3), (1, 2), (0, 0), (0, 0)]
    genie.start = lambda frames: None
    genie.step = lambda state, action, generator: (frames.roll(moves[action], (1, 2)), None)
    motion, changed, lively = window_module.button_motion(genie, frames)
    assert motion.round().sign().tolist() == [[np.sign(dy), np.sign(dx)] for dy, dx in moves]
    expected = [gm.errors(frames.roll(move, (1, 2)), frames).mean().item() for move in moves]
    assert changed.tolist() == pytest.approx(expected) and expected[0] == 0 < expected[5]
    assert lively < 2, "in the last there is nothing to move"
    keys = window_module.arrow_keys(motion, changed)
    assert [moves[keys[key]] for key in ("up", "down", "left", "right")] == [
        (-4, 0), (4, 0), (0, -3), (0, 3)] and moves[keys[" "]] == (0, 0)


def test_a_sketch_is_what_one_pass_gives(gm=genie_mini):
    """Failing means that the small pictures under the game show another past or another button than
    is played, or that to look at them changes the game."""
    genie = tiny_genie(gm, temperature=0.0, order_noise=0.0, maskgit_steps=1, dyn_frames=16)
    state = genie.start(random_frames(1))
    for button in (3, 1):
        state = genie.step(state, button, gm.seeded(0))[1]
        kept = [k.shape for k, _ in state.decoder]
        sketches = window_module.sketch(genie, state)
        assert len(sketches) == genie.config.num_actions and (sketches != sketches[0]).any()
        for a, made in enumerate(sketches):
            assert (made == genie.step(state, a, gm.seeded(0))[0][0]).all()
        assert [k.shape for k, _ in state.decoder] == kept
    genie.config.maskgit_steps = 10
    forward, calls = genie.dynamics.forward, []
    genie.dynamics.forward = lambda *args, **kw: calls.append(1) or forward(*args, **kw)
    assert (window_module.sketch(genie, state) == sketches).all()
    assert len(calls) == 1


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
    assert dreams.evaluate_world(genie, data, np.arange(3)) == {
        "one_hero": 1, "one_fish": 1, "walls_kept": 1, "ball_on_course": None}
    plan = played[0]
    assert plan.shape == (3, 64) and (plan.view(3, 8, 8) == plan.view(3, 8, 8)[..., :1]).all()
    assert len(plan.unique()) > 5 and (plan[0] != plan[1]).any()
    genie.broken = True
    result = dreams.evaluate_world(genie, data, np.arange(3))
    top = data.frames(np.arange(3))[:, 0, :32].numpy()
    assert 0.6 < result["one_hero"] <= 0.75 and 0.6 < result["one_fish"] <= 0.75
    assert 0.9 < result["walls_kept"] < 1 and (worlds.demo_walls(top) <= top).all()
    data.world = "my film.mp4"
    assert set(dreams.evaluate_world(genie, data, np.arange(3)).values()) == {None}


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
        made.append(dreams.evaluate_world(genie, data, np.arange(30)))
    assert [result["ball_on_course"] for result in made] == [1, pytest.approx(0, abs=0.1)]
    assert made[0]["one_hero"] == 1 and made[0]["walls_kept"] is None


def test_every_setting_has_a_reason_and_a_range(gm=genie_mini):
    """Failing means that --help leaves a setting unexplained or does not show what each preset
    makes of it, or that a typing error in a word or a negative number is taken."""
    fields = gm.dataclasses.fields(gm.Config)
    for name in ("train", "bench"):
        flags = {a.dest: a.help for a in command_line.build_parser().commands[name]._actions}
        assert all(len(flags[field.name].split(" [")[0]) > 10 for field in fields)
        assert "laptop 64" in flags["tok_dim"] and flags["latent_dim"].endswith("[16]")
    for field in fields:
        assert field.type in (int, float, str), field.name
        bad = {str: "misspelt", int: -1, float: -0.1}[field.type]
        with pytest.raises(gm.UserError, match=f"--{field.name} is {bad}"):
            gm.check_config(gm.Config(**{field.name: bad}))


# --- checkpoints ----------------------------------------------------------------------------


def good_checkpoint(gm):
    """What save_checkpoint takes: weights, moments, and what is said of them."""
    c = tiny(gm)
    moments = {0: {name: torch.zeros(()) for name in ("step", "exp_avg", "exp_avg_sq")}}
    return gm.Genie(c).state_dict(), moments, {
        "version": gm.VERSION, "config": gm.dataclasses.asdict(c), "data": "demo.npz",
        "data_checksum": 0, "stage": 2, "step": 0, "rows": [{"stage": "world", "step": 1}]}


SPOILT = {                                  # what is wrong: what does it to (weights, about)
    "version": lambda w, about: about.update(version=999),
    "version as text": lambda w, about: about.update(version=str(genie_mini.VERSION)),
    "unknown field": lambda w, about: about["config"].update(surprise=1),
    "missing field": lambda w, about: about["config"].pop("tok_dim"),
    "mistyped field": lambda w, about: about["config"].update(tok_dim="16"),
    "impossible field": lambda w, about: about["config"].update(tok_dim=17),
    "ten million wide": lambda w, about: about["config"].update(tok_dim=10_000_000),
    "a million layers": lambda w, about: about["config"].update(dyn_layers=1_000_000),
    "number too long": lambda w, about: about["config"].update(batch=10 ** 400),
    "not a number": lambda w, about: about["config"].update(lr=math.nan),
    "other sizes": lambda w, about: about["config"].update(tok_dim=32),
    "weight missing": lambda w, about: w.pop("tokenizer.embed.weight"),
    "weight too many": lambda w, about: w.update(surprise=torch.zeros(1)),
    "other type": lambda w, about: w.update(
        {"dynamics.to_logits.weight": w["dynamics.to_logits.weight"].long()}),
    "NaN": lambda w, about: w["dynamics.to_logits.weight"].fill_(math.nan),
    "no weights": lambda w, about: w.clear(),
    "no config": lambda w, about: about.pop("config"),
    "rows": lambda w, about: about["rows"][0].update(step="last"),
    "endless row": lambda w, about: about["rows"][0].update(step=10 ** 400),
    "position": lambda w, about: about.update(step=-1),
    "stage": lambda w, about: about.update(stage=3),
    "escape codes": lambda w, about: about.update(data="\x1b[2Jdemo.npz")}
HEADER = {"weight": {"dtype": "F32", "shape": [10 ** 9], "data_offsets": [0, 4 * 10 ** 9]}}
RAW = {                                     # what is wrong: what it makes of the file's bytes
    "cut": lambda data: data[:len(data) // 2],
    "text": lambda data: b"no checkpoint",
    "empty": lambda data: b"",
    "flipped header": lambda data: data[:64] + bytes(64) + data[128:],
    "bit of a weight": lambda data: data[:-99] + bytes([data[-99] ^ 1]) + data[-98:],
    "more than it holds": lambda data: struct.pack("<Q", len(json.dumps(HEADER)))
    + json.dumps(HEADER).encode() + bytes(8),
    "a pickle": lambda data: pickle.dumps({"version": genie_mini.VERSION})}


@pytest.mark.parametrize("kind", [*SPOILT, *RAW, "absent", "folder"])
def test_bad_checkpoint(tmp_path, kind, gm=genie_mini):
    """Failing means that a damaged or hostile file is used, or ends in a traceback."""
    path, (weights, moments, about) = tmp_path / "checkpoint.safetensors", good_checkpoint(gm)
    checkpoints.save_checkpoint(path, weights, moments, about)
    assert gm.Genie.load(path).config == tiny(gm), "the good one must load"
    if kind in SPOILT:
        SPOILT[kind](weights, about)
        path.unlink()                                    # so that there is none to fall back on
        checkpoints.save_checkpoint(path, weights, moments, about)
    elif kind in RAW:
        path.write_bytes(RAW[kind](path.read_bytes()))
    else:
        path.unlink()
        if kind == "folder":
            path.mkdir()
    tracemalloc.start()
    with pytest.raises(gm.UserError) as caught:
        gm.Genie.load(path)
    assert tracemalloc.get_traced_memory()[1] < 1e8
    tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_checkpoint_gives_back_what_was_saved(tmp_path, gm=genie_mini):
    """Failing means that a trained model changes by being saved and loaded."""
    genie, (_, moments, about) = tiny_genie(gm), good_checkpoint(gm)
    path = tmp_path / "c.safetensors"
    checkpoints.save_checkpoint(path, genie.state_dict(), moments, about)
    loaded, first = gm.Genie.load(path), random_frames(1)
    assert checkpoints.read_checkpoint(path)["optimizer"] == moments
    actions = torch.tensor([[1, 2, 3]])
    assert not loaded.training
    assert (loaded.rollout(first, actions, gm.seeded(0))
            == genie.rollout(first, actions, gm.seeded(0))).all()
    half = {name: t.half() if t.is_floating_point() else t          # as in assets/demo.safetensors
            for name, t in genie.state_dict().items()}
    checkpoints.save_checkpoint(path, half, {}, about)
    loaded = weights_of(gm.Genie.load(path))
    assert all(loaded[name].dtype != torch.half and (loaded[name] == half[name]).all()
               for name in half)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, gm=genie_mini):
    """Failing means that a save which finds no room, or crashes, spoils what was saved before, or
    ends in a traceback. The room is taken away by a limit on the size of files."""
    resource = pytest.importorskip("resource")                          # not on Windows
    path = tmp_path / "checkpoint.safetensors"
    for i in range(2):
        checkpoints.save_checkpoint(path, {"a": torch.full((3,), i)}, {}, {})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(Exception) as caught:
            checkpoints.save_checkpoint(path, {"a": torch.zeros(100_000)}, {}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [checkpoints.previous(path), path]
    assert caught.type is gm.UserError and "File too large" in str(caught.value)


def test_a_link_stays_a_link(tmp_path):
    """Failing means that writing to a symbolic link replaces the link, not the file it leads to."""
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "data.npz", tmp_path / "data.npz"
    try:
        link.symlink_to(target)
    except OSError:
        pytest.skip("no symbolic links here")
    for content in (b"old", b"new"):
        with files.written_whole(link) as file:
            file.write(content)
        assert link.is_symlink() and target.read_bytes() == content
    assert list((tmp_path / "disk").iterdir()) == [target]


def test_two_runs_do_not_share_a_folder(demo_file, tmp_path, gm=genie_mini):
    """Failing means that two runs given one --out overwrite each other, and both end well."""
    first, second = (tiny_trainer(gm, demo_file, tmp_path, seed=seed) for seed in (1, 2))
    first.save()
    first.save()
    second.save()                                        # begun before the first had saved
    with pytest.raises(gm.UserError, match="another run writes to"):
        first.save()
    (tmp_path / gm.CHECKPOINT).unlink()                  # somebody tidied up: no reason to stop
    second.save()


@pytest.mark.parametrize("stage, change", [
    (0, lambda state: state[0].pop("step")), (0, lambda state: state[0].pop("exp_avg_sq")),
    (0, lambda state: state.update({99: state[0]})),
    (0, lambda state: state[0].update(exp_avg=torch.zeros(3))),
    (0, lambda state: state[0]["exp_avg"].fill_(math.nan)),
    (1, lambda state: [moment.setdefault("exp_avg_sq", moment["exp_avg"])      # Muon's, too
                       for moment in state.values()])])
def test_a_wrong_optimizer_state_is_refused(demo_file, tmp_path, stage, change, gm=genie_mini):
    """Failing means that a checkpoint's optimizer state, which may be anyone's, is used unseen."""
    trainer = tiny_trainer(gm, demo_file, tmp_path, stage=stage)
    trainer.optimizer_step()
    trainer.save()
    checkpoint = checkpoints.read_checkpoint(tmp_path / "checkpoint.safetensors")
    trainer.resume(checkpoint)
    change(checkpoint["optimizer"])
    with pytest.raises(gm.UserError, match="does not fit"):
        trainer.resume(checkpoint)


def test_muon_by_hand():
    """Failing means that a matrix is not turned in all directions alike, that it is moved too far
    or without its momentum, or that what is no matrix is moved so, too."""
    turn = torch.linalg.qr(torch.randn(6, 6, generator=genie_mini.seeded(0)))[0]
    strong = torch.tensor([9.0, 3.0, 1.0, 0.5, 0.3, 0.2])
    for gradient in (turn * strong, (turn * strong)[:, :4], (turn * strong)[:4]):
        u, s, v = torch.linalg.svd(gradient, full_matrices=False)
        made = muon.orthogonal(gradient[None])[0]
        assert torch.linalg.svdvals(made).aminmax() == (pytest.approx(0.95, abs=0.3),) * 2
        assert (made - u @ v).abs().max() < 0.35 < (gradient - u @ v).abs().max()
    matrix, vector = (torch.nn.Parameter(torch.ones(shape)) for shape in ((6, 4), (6,)))
    optimizer = muon.Muon([{"params": [vector, matrix]}], [matrix], momentum=0.5, faster=3, lr=0.1,
                          weight_decay=0.2)
    first, second = turn[:, :4], torch.eye(6)[:, :4]
    for gradient, seen in ((first, first), (second, 0.125 * first + 0.75 * second)):
        before, (matrix.grad, vector.grad) = matrix.detach().clone(), (gradient, torch.ones(6))
        optimizer.step()                                # Nesterov: half mean, half gradient
        step = math.sqrt(6 / 4) * muon.orthogonal(seen[None])[0]
        assert torch.allclose(matrix, before * (1 - 0.3 * 0.2) - 0.3 * step, atol=1e-6)
    assert torch.allclose(vector, torch.tensor(0.98 * (0.98 - 0.1) - 0.1), atol=1e-5)


def test_fuzzed_checkpoints(tmp_path, cases=60, gm=genie_mini):
    """Failing means that a damaged checkpoint ends in a traceback, or is read as another one; or
    that a Config of random values does."""
    path, rng = tmp_path / "checkpoint.safetensors", np.random.default_rng(0)
    weights, moments, about = good_checkpoint(gm)
    checkpoints.save_checkpoint(path, weights, moments, about)
    data, refused = path.read_bytes(), 0
    for _ in range(cases):
        path.write_bytes(fuzzed(data, rng))
        try:
            found = checkpoints.read_checkpoint(path)["model"]
        except gm.UserError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert all((found[name] == t).all() for name, t in weights.items())
    assert refused > cases / 2
    names, refused = list(about["config"]), 0
    strange = [0, -1, 3, 2 ** 40, 10 ** 400, 0.5, -0.0, 1e308, math.inf, math.nan, True, None, "",
               "cpu", "diff", [], {}]
    for _ in range(4 * cases):
        config = dict(about["config"])
        for name in rng.choice(names, rng.integers(1, 4)):
            config[str(name)] = strange[rng.integers(len(strange))]
        try:
            checkpoints.check_contents({**about, "checksum": 0, "config": config}, weights)
        except gm.UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 3 * cases


EXTRAS_BUGS = [
    ("a dream without a hero passes", "(n == 1).float()", "(n <= 1).float()",
     test_a_long_dream_is_judged_frame_by_frame, {}),
    ("walls of the dream itself", "(made & walls).sum", "made.sum",
     test_a_long_dream_is_judged_frame_by_frame, {}),
    ("a sketch without the action", "tokens == 0, latents,", "tokens == 0, 0 * latents,",
     test_a_sketch_is_what_one_pass_gives, {}),
    ("a sketch that forgets when it is", "torch.full((n,), past,", "torch.full((n,), 0,",
     test_a_sketch_is_what_one_pass_gives, {}),
    ("a sketch without its past", "decode(quantized, state.decoder, layout)",
     "decode(quantized, None, (layout[0], sees[:, past:]))",
     test_a_sketch_is_what_one_pass_gives, {}),
    ("a sketch that sees the others", "torch.eye(n)", "torch.ones(n, n)",
     test_a_sketch_is_what_one_pass_gives, {}),
    ("arrows the wrong way round", "(new - old)[", "(old - new)[", test_motion_of_a_button, {}),
    ("the baseline taken for the step", "theirs, ours, its_seconds", "ours, theirs, its_seconds",
     test_bench_knows_the_baseline_from_the_step, {}),
    ("no cache taken for the cache", "slow, fast, its_seconds", "fast, slow, its_seconds",
     test_bench_plays_a_whole_turn_of_the_memory, {}),
    ("the peak of another round", "flops / seconds / peak", "flops / seconds / max(peak)",
     test_share_of_the_peak_by_hand, {}),
    ("micro_batch auto takes all", "share * need / free", "need / free",
     test_genie_mini.test_micro_batch_auto, {"stage": 1}),
    ("nobody hears that the buttons do nothing", 'result["action_ratio"] < 1.1', "False",
     test_genie_mini.test_troubles_are_told,
     {"stage": 1, "progress": 0.1, "bad": {"action_ratio": 1.05}, "told": ["BUTTONS"]}),
    ("the checkpoint before protects no run", " or previous(path).exists()", "",
     test_genie_mini.test_a_killed_run_is_kept_and_swept, {}),
    ("fused attention costs nothing", "        written_out(work)\n    return",
     "        work()\n    return", test_float_operations_are_counted, {}),
    ("NaN weights accepted", "torch.isfinite(t).all() for t in", "True for t in",
     test_bad_checkpoint, {"kind": "NaN"}),
    ("a checkpoint's weights not compared", "outlines(wanted) !=", "None ==",
     test_bad_checkpoint, {"kind": "other type"}),
    ("checksums not looked at", 'about["checksum"] != checksum(tensors)', "False",
     test_bad_checkpoint, {"kind": "bit of a weight"}),
    ("two runs in one folder", "not in (None, saved)", "is None",
     test_two_runs_do_not_share_a_folder, {}),
    ("a log row without end", "abs(v) < 1e300", "True", test_bad_checkpoint,
     {"kind": "endless row"}),
    ("a stage that there is not", '<= about["stage"] <= len(STAGES)', '<= about["stage"]',
     test_bad_checkpoint, {"kind": "stage"}),
    ("the optimizer's state not compared", "for i, m in moments.items())\n\n\ndef check",
     "for i, m in ())\n\n\ndef check", test_a_wrong_optimizer_state_is_refused,
     {"stage": 0, "change": lambda state: state.update({99: state[0]})}),
    ("all directions as strong as they were", "rounds=5", "rounds=0", test_muon_by_hand, {}),
    ("no momentum", "ahead.append(p.grad.lerp(state[\"exp_avg\"], self.momentum))",
     "ahead.append(p.grad)", test_muon_by_hand, {}),
    ("matrices do not decay", "p.mul_(1 - rate * group[\"weight_decay\"])", "pass",
     test_muon_by_hand, {}),
    ("checkpoint written in place",
     "with files.written_whole(path, keep=previous(path)) as file:",
     'with open(path, "wb") as file:', test_a_full_disk_leaves_the_last_checkpoint, {}),
]


def block_flops(T, side, D, full):
    """Float operations of training one block on one clip of T frames of side x side patches. Full
    attention is space attention in which all patches of the clip stand in one large frame."""
    side, T = (math.isqrt(T) * side, 1) if full else (side, T)
    with torch.device("meta"):                           # shapes without numbers: to count is free
        block = genie_mini.STBlock(D, 4, side)
        x = torch.empty(1, T, side ** 2, D, requires_grad=True)
    work = (lambda: block.ffn(block.space(x[0])[0])) if full else (lambda: block(x)[0])
    return bench.count_flops(lambda: work().sum().backward())


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


@pytest.mark.parametrize("old, new, test, arguments", [bug[1:] for bug in EXTRAS_BUGS],
                         ids=[bug[0] for bug in EXTRAS_BUGS])
def test_planted_bug_in_the_extras_is_caught(old, new, test, arguments, request, monkeypatch):
    """Failing means that a bug like this one in extras/ would pass all tests."""
    modules = {"bench": bench, "window_module": window_module, "dreams": dreams,
               "command_line": command_line, "checkpoints": checkpoints, "runlog": runlog,
               "muon": muon}
    name = next(name for name, module in modules.items() if old in inspect.getsource(module))
    broken = mutant(old, new, modules[name])
    monkeypatch.setitem(globals(), name, broken)
    monkeypatch.setitem(sys.modules, modules[name].__name__, broken)
    if name in inspect.signature(test).parameters:
        arguments = {**arguments, name: broken}
    must_fail(test, request, **arguments)
