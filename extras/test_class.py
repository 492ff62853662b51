"""The tests of what a class uses: the exercises' checks, the names in the texts, the projects."""

import json
import math
import re
import types

import numpy as np
import pytest

import extras
import genie_mini
import test_genie_mini
from extras import dreams, worlds
from extras.testing import ROOT, mutant, tiny_trainer

# --- the exercises' checks ----------------------------------------------------------------------

LATER = "torch.ones(4, 4).triu(1).bool()"
SQUARES = "((z[..., None, :] - c) ** 2).sum(-1)"
FLIPS = "b[1:] != b[:-1]"
CHANGE = "abs(np.diff(g.astype(int), axis=0))"
COUNT, SUM = "F.one_hot(i, 3).float().sum(0)", "F.one_hot(i, 3).T.float() @ z"
COSINE = "N * math.cos(math.pi / 2 * k / S)) for k in range(1, S + 1)]"

# An exercise, an answer to it (the body of a lambda), and what is to be said of it.
ANSWERS = [
    ("opposite", "m, b: (m @ m[b]).argmin()", "Right"),
    ("opposite", "m, b: (m - m[b]).norm(dim=1).argmax()", "farthest"),
    ("opposite", "m, b: (m @ m[b]).abs().argmin()", "absolute"),
    ("opposite", "m, b: (m[:, 1] * m[b, 1]).argmin()", "dx alone"),
    ("turn", "was, now, b, w: b if was != now else w[(w.index(b) + 1) % 4]", "ask for None first"),
    ("turn", "was, now, b, w: b if was != now or not now else w[w.index(b) - 1]", "turns left"),
    ("turn", "was, now, b, w: b if was != now else w[w.index(b) + 1]", "modulo"),
    ("motion_kept", f"g, b: ({CHANGE} > 8)[{FLIPS}].sum() / ({CHANGE} > 8).sum()", "Besides"),
    ("motion_kept", f"g, b: ({CHANGE} * data_prep.spread({FLIPS})).sum() / {CHANGE}.sum()",
     "noise"),
    ("staggered", "f, n: [f[o::n] for o in range(n)]", "Right"),
    ("staggered", "f, n: f.reshape(n, -1, *f.shape[1:])", "neighbouring"),
    ("split_by_time", "s, share: s // 48 >= (1 - share) * (s.max() // 48 + 1)", "count those"),
    ("split_by_time", "s, share: np.arange(len(s)) > (1 - share) * len(s)", "both sides"),
    ("cut_patches", "f, p: f.unfold(2, p, p).unfold(3, p, p).flatten(4).flatten(2, 3)", "Right"),
    ("cut_patches", "f, p: f.unfold(2, p, p).unfold(3, p, p).mT.flatten(4).flatten(2, 3)",
     "in each patch"),
    ("causal_weights", f"s: s.masked_fill({LATER}, 0).softmax(-1)", "minus infinity"),
    ("causal_weights", f"s: s.softmax(-1).masked_fill({LATER}, 0)", "before the softmax"),
    ("nearest_code", "z, c: torch.cdist(z, c).argmin(-1)", "Right"),
    ("nearest_code", "z, c: (z[..., None, :] - c).abs().sum(-1).argmin(-1)", "absolute"),
    ("nearest_code", "z, c: (z @ c.T).argmax(-1)", "dot product"),
    ("nearest_code", "z, c: ((z[:, None] - c) ** 2).sum(-1).argmin(-1)", "B, T, N, L"),
    ("ema_step", f"n, t, z, i, d: (d * n + (1 - d) * {COUNT}, d * t + (1 - d) * {SUM})", "Right"),
    ("ema_step", f"n, t, z, i, d: (d * n + {COUNT}, d * t + {SUM})", "1 - decay"),
    ("ema_step", f"n, t, z, i, d: (d * n + (1 - d) * {COUNT}, d * t)", "[2.1, 1.0, 0.45]"),
    ("d2_weights", f"z, c: {SQUARES}.amin(1) / {SQUARES}.sum()", "it should be [0.0, "),
    ("d2_weights", f"z, c: {SQUARES}.amin(1)", "sum to 1"),
    ("majority_accuracy", "a, b: (a == b).mean()", "map each"),
    ("pool_changed", "x, m: torch.einsum('btnd,btn->btd', x, m / m.sum(2, True).clamp_min(1))",
     "Right"),
    ("pool_changed", "x, m: (x * m[..., None]).sum(2) / m.sum(2, True)", "0 / 0"),
    ("masked_loss", "x, t, m: F.cross_entropy(x.flatten(0, 2), t.flatten())", "over all"),
    ("masked_loss", "x, t, m: F.cross_entropy(x[m], t.masked_fill_(m, 0)[m])", "it changed"),
    ("mask_schedule", f"N, S: [round({COSINE}", "DynamicsModel.to_commit"),
    ("mask_schedule", f"N, S: [math.ceil({COSINE}", "round down"),
    ("commit", "s, m, n: m.scatter(-1, s.topk(n).indices, False)", "committed already"),
    ("commit", "s, m, n: m.scatter_(-1, s.topk(n).indices, False)", "it changed"),
    ("psnr_from_wrong", "n: 10 * math.log10(4096 / n)", "right but"),
    ("delta_psnr", "a, b: 10 * (b.mean() / a.mean()).log10()", "Right"),
    ("delta_psnr", "a, b: 10 * (b.clamp_min(1) / a.clamp_min(1)).log10().mean()", "averaged"),
    ("copy_baseline", "f: (f[:, 1:] - f[:, :1]).sum((2, 3)).float().mean(0)", "255"),
    ("copy_baseline", "f: (f[:, 1:] != f[:, :1]).sum((2, 3)).float().mean(0) / 3", "32.0"),
]


@pytest.mark.parametrize("name, answer, said", ANSWERS)
def test_checks_know_right_from_wrong(name, answer, said, monkeypatch, capsys):
    """Failing means that a wrong answer to an exercise passes, a right one that is not the printed
    solution does not, or that a student is told of another mistake than was made."""
    monkeypatch.syspath_prepend(str(ROOT / "notebooks"))
    import checks
    right = getattr(checks, name)(eval("lambda " + answer, vars(checks) | {"math": math}))
    verdict = capsys.readouterr().out
    assert said in verdict and right == (said == "Right") and not re.search(r"\.\d{5}", verdict)


# --- names in the texts -------------------------------------------------------------------------


def texts():
    """(name, what it says, its own code) of assignments.md, the notebooks and checks.py."""
    folder = ROOT / "notebooks"
    yield "assignments", (folder / "assignments.md").read_text("utf-8"), "class FSQ, FullAttention"
    source = (folder / "checks.py").read_text("utf-8")
    yield "checks", re.sub(r"\b([A-Z]\w+\.\w+)", r"`\1`", source), ""
    for path in sorted(folder.glob("*.ipynb")):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        kinds = {kind: "\n".join("".join(cell["source"]) for cell in cells
                                 if cell["cell_type"] == kind) for kind in ("markdown", "code")}
        yield path.stem, kinds["markdown"], kinds["code"]


@pytest.mark.parametrize("name, text, own", [*texts()], ids=[name for name, *_ in texts()])
def test_texts_name_what_exists(name, text, own):
    """Failing means that a text for a class names a function, a flag or a figure that is no longer
    there."""
    code = own + "".join(path.read_text("utf-8") for folder in (".", "extras", "notebooks")
                         for path in (ROOT / folder).glob("*.py"))
    figures = json.loads((ROOT / "assets" / "demo.json").read_text("utf-8"))
    for quoted in re.findall("`([^`]+)`", re.sub("```.*?```", "", text, flags=re.DOTALL)):
        for word in re.findall(r"(?<![\w./])[A-Za-z_][\w.]*\w", quoted):
            first, *rest = word.split(".")
            if isinstance(getattr(genie_mini, first, None), type) and rest:
                assert rest[0] in vars(getattr(genie_mini, first)) or f"self.{rest[0]} =" in code
            elif hasattr(extras, first) and rest:                       # a module: window.sketch
                assert hasattr(getattr(extras, first), rest[0]), word
            elif first in figures and name == "assignments" and rest:
                assert rest[0] in figures[first], word
            else:
                assert all(re.search(rf"\b{part}\b", code) for part in (first, *rest)), word


# --- the projects, done by the book -------------------------------------------------------------

FSQ = '''class FSQ(nn.Module):
    def __init__(self, codes, dim, **_):
        super().__init__()
        levels = torch.tensor({32: (4, 4, 2), 8: (2, 2, 2)}[codes])
        steps = torch.cartesian_prod(*(torch.arange(n) for n in levels.tolist()))
        self.register_buffer("levels", levels)
        self.register_buffer("places", levels.flip(0).cumprod(0).flip(0) // levels)
        self.register_buffer("codebook", (2 * steps + 1) / levels - 1)
        self.register_buffer("ema_count", torch.ones(codes))
        self.register_buffer("started", torch.tensor(True))
        self.seen = []

    def forward(self, z):
        with torch.autocast(z.device.type, enabled=False):
            z = z.float().tanh()
            step = ((z + 1) / 2 * self.levels).long().minimum(self.levels - 1)
            indices = (step * self.places).sum(-1)
            if self.training:
                self.seen.append((z.detach().flatten(0, -2), indices.flatten()))
            code = self.codebook[indices]
            return z + (code - z).detach(), indices, z.new_zeros(())

    def update(self, generator, more=None):
        self.seen = []


class VideoTokenizer(nn.Module)'''
FULL = '''class FullAttention(Attention):
    def __init__(self, dim, heads, side):
        N, pairs = side ** 2, dim // heads // 2
        row, col = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
        place = torch.cat([rotary(row, pairs // 3), rotary(col, pairs // 3)], dim=-1)
        when = rotary(torch.arange(CLIP), pairs - 2 * (pairs // 3)).repeat_interleave(N, 0)
        super().__init__(dim, heads, torch.cat([place.repeat(CLIP, 1), when], -1), False)

    def forward(self, x, past=None, layout=None):
        B, T, N, D = x.shape
        begin = 0 if past is None else past[0].shape[2] // N
        now = torch.arange(begin, begin + T)
        now, seen = layout or (now, now[:, None] >= torch.arange(begin + T))
        places = (now[:, None] * N + torch.arange(N)).flatten()
        seen = seen.repeat_interleave(N, 0).repeat_interleave(N, 1)
        y, kept = super().forward(x.flatten(1, 2), past, (places, seen))
        return y.view(B, T, N, D), kept


class STBlock(nn.Module)'''
SWITCH = [("def __init__(self, dim, heads, layers, side):",
           "def __init__(self, dim, heads, layers, side, new=0):"),
          ("STBlock(dim, heads, side)", "STBlock(dim, heads, side, new)"),
          ("def __init__(self, dim, heads, side):", "def __init__(self, dim, heads, side, new=0):"),
          ("c.dyn_layers, side // c.dyn_fold)", "c.dyn_layers, side // c.dyn_fold, 1)")]
TOKEN = [*SWITCH, ("rotary(col, pairs)], dim=-1)         # (N, e/2)",
                   "rotary(col, pairs)], dim=-1)\n        place = torch.cat([place, torch.ones(new,"
                   " 2 * pairs, dtype=place.dtype)])"),
         ("x = x + self.action(actions)[:, :, None]",
          "x = torch.cat([x, self.action(actions)[:, :, None]], dim=2)"),
         ("self.to_logits(x).view(B", "self.to_logits(x[:, :, :-1]).view(B")]
# A change, and the figure by which it is judged.
PROJECTS = {
    "FSQ": ([("class VideoTokenizer(nn.Module)", FSQ),
             ("= VectorQuantizer(c.tok_codes", "= FSQ(c.tok_codes"),
             ("= VectorQuantizer(c.num_actions", "= FSQ(c.num_actions")],
            ("tokenizer", "wrong_pixels")),
    "action token": (TOKEN, ("dynamics", "wrong_pixels_inferred")),
    "full attention": ([*SWITCH, ("class STBlock(nn.Module)", FULL),
                        ("        start_on_neighbours(self.space)\n", ""),
                        ("        self.norm_ffn =", "        if new:\n            del self.time\n"
                         "            self.space = FullAttention(dim, heads, side)\n"
                         "        self.new, self.norm_ffn = new,"),
                        ("        y, _ = self.space(", "        if self.new:\n            y, kept ="
                         " self.space(self.norm_space(x), past, layout)\n            x = x + y\n"
                         "            return x + self.ffn(self.norm_ffn(x)), kept\n"
                         "        y, _ = self.space(")],
                       ("dynamics", "wrong_pixels_inferred")),
    "schedule": ([("N * math.cos(math.pi / 2 * progress)", "N * (1 - progress)"),
                  (" < rate\n", " <= 1\n"), ("((1 + self.mask_min) / 2 * ", "(")],
                 ("dynamics", "wrong_pixels_inferred"))}


def by_the_book(changes):
    """genie_mini with some pieces of its source replaced, as a module of its own."""
    source, module = (ROOT / "genie_mini.py").read_text("utf-8"), types.ModuleType("changed")
    for old, new in changes:
        assert source.count(old) == 1, f"assignments.md leads to {old!r}"
        source = source.replace(old, new)
    module.__file__ = genie_mini.__file__
    exec(compile(source, "a student's genie_mini.py", "exec"), module.__dict__)
    return module


def figures_of(gm, data, out):
    """The evaluation of a tiny run, and its Genie."""
    trainer = tiny_trainer(gm, data, out, latent_dim=3, tok_codes=32, tok_steps=6, dyn_steps=6,
                           val_every=6, batch=2, micro_batch=2)
    trainer.log.unless_held = lambda *_: None                           # no pictures
    assert trainer.run()
    genie, test = trainer.genie.eval(), gm.Sequences(data, "test")
    return {"tokenizer": gm.evaluate_tokenizer(genie, test, [0]),
            "dynamics": gm.evaluate_dynamics(genie, test, [0])}, genie


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """Twelve seconds of the demo world, and the figures of an unchanged tiny run on them."""
    folder = tmp_path_factory.mktemp("base")
    worlds.write_demo(folder / "demo.npz", 0.2)
    return folder / "demo.npz", figures_of(genie_mini, folder / "demo.npz", folder)[0]


@pytest.mark.parametrize("name", PROJECTS)
def test_projects_can_be_done(name, baseline, tmp_path):
    """Failing means that a project of assignments.md, done as it says, does not train or play,
    breaks causality or the cache, or leaves the figure as it was by which it is to be judged."""
    (changes, (part, figure)), (data, before) = PROJECTS[name], baseline
    gm = by_the_book(changes)
    figures, genie = figures_of(gm, data, tmp_path)
    assert figures[part][figure] != before[part][figure]
    test_genie_mini.test_cached_dynamics_equals_uncached(gm)
    for inputs in ("dynamics, tokens", "dynamics, actions"):
        test_genie_mini.test_no_future_leak(inputs, gm)
    if name == "FSQ":
        quantizer = genie.tokenizer.quantizer
        z = quantizer.codebook.atanh().requires_grad_()
        quantized, indices, _ = quantizer(z)
        quantized.sum().backward()
        assert indices.tolist() == list(range(32)) and (z.grad > 0).all()


def test_a_world_of_ice_can_be_made(tmp_path):
    """Failing means that a new world, made in the places that assignments.md names, breaks its own
    laws or labels, or cannot be trained on. Here who lets go of the keys slides on."""
    ice = mutant("            self.effect = int(key) if", "            key = key or getattr(self,"
                 " 'effect', 0)\n            self.effect = int(key) if", worlds)
    slid = []
    for world in (worlds, ice):
        game = world.DemoWorld(0)
        game.hero, game.fish, game.free = (7, 7), (2, 2), np.full((15, 15), True)
        slid.append([game.step(key) for key in (4, 4, 4, 0)][-1])
        path = tmp_path / f"{len(slid)}.npz"
        world.write_demo(path, 0.2)
        data = genie_mini.Sequences(path, "train")
        frames = data.frames(range(len(data)))
        assert (world.count_heroes(frames.numpy()) == 1).all()
        still = (frames[:, 1:] == frames[:, :-1]).flatten(2).all(-1).numpy()
        assert (data.actions[still] == 0).all()
    assert slid == [0, 4]
    trainer = tiny_trainer(genie_mini, path, tmp_path / "run", tok_steps=2, dyn_steps=2)
    trainer.log.unless_held = lambda *_: None
    assert trainer.run()
    law = dreams.evaluate_world(trainer.genie.eval(), data, range(1), steps=2, hold=1)["one_hero"]
    assert 0 <= law <= 1
