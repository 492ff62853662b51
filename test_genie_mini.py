"""The tests of genie_mini.py, in its order. Those of data_prep.py and of extras/ stand in extras/.

How to run them, from the folder of this file; all are offline, on the CPU, and the same each time:

    python -m pytest -q                                    everything, some six minutes
    python -m pytest -q test_genie_mini.py                 the models and their training
    python -m pytest -q -k leak                            only the tests whose name has "leak"
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

import math
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import genie_mini
from extras import bench, checkpoints, command_line, files, ranks, runlog
from extras.testing import (ROOT, close, must_fail, mutant, random_frames, tiny, tiny_genie,
                            tiny_trainer, weights_of)

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
    assert gm.errors(logits > 0, frames[:, 1:]).max() < 5
    assert numbers["pixel_loss"] < 0.03
    assert (indices[:4] == indices[4:]).all() and len(indices[:4].unique()) == 4
    swapped = lam.decode(frames[:, :1], actions.roll(1, 0)) > 0          # another clip's action
    assert gm.errors(swapped, frames[:, 1:].roll(1, 0)).max() < 5


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


@pytest.mark.quantizer
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
    the true actions are not among them, and the codes are slow to find those, or never do. Or that
    of many vectors it sees the first alone, or that a short run ends before it starts."""
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
    assert quantizer.sample(torch.arange(9999), gm.seeded(0)).max() > 9000
    assert gm.Genie(tiny(gm, tok_steps=8, tok_unquantized=5)).tokenizer.quantizer.unquantized == 4


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

    Token n is the surer the larger n; without noise they must be decided from last to first. Where
    tokens are drawn, that of the drawn one counts: the first pass decides on likely ones alone.
    """
    genie = tiny_genie(gm, maskgit_steps=4, temperature=0.0, order_noise=0.0)
    logits = torch.zeros(16, 8)
    logits[:, 3] = torch.arange(1, 17) / 4
    passes = replace_logits(genie.dynamics, lambda i: logits)
    genie.dynamics.sample(None, torch.zeros(1, 4), genie.config, gm.seeded(0))
    for masked in passes:
        still = int(masked.sum())
        assert masked.flatten().tolist() == [n < still for n in range(16)]
    genie.config.temperature = 1.0
    passes = replace_logits(genie.dynamics, lambda i: F.one_hot(torch.tensor(3), 8) * 4.0)
    final = genie.dynamics.sample(None, torch.zeros(50, 4), genie.config, gm.seeded(0))
    assert (final[~passes[1][:, 0]] == 3).all(), "one token in nine is another, and should wait"


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
    """Failing means that order_noise does nothing: the commits are then always the same. Or that
    it does not fade: the last tokens are then decided by chance, not by confidence."""
    genie = tiny_genie(gm, maskgit_steps=4, temperature=0.0, order_noise=100.0,
                       mask_schedule=schedule)
    passes = replace_logits(genie.dynamics, lambda i: F.one_hot(torch.arange(16) % 8, 8) * 2.0)
    for seed in range(2):
        genie.dynamics.sample(None, torch.zeros(1, 4), genie.config, gm.seeded(seed))
    assert (passes[1] != passes[5]).any()
    genie.config.order_noise, sure = 1.0, -torch.arange(1.0, 17).expand(50, 1, 16)
    commit = genie.dynamics.to_commit(sure, sure < 0, 0.9, genie.config, gm.seeded(0))
    assert (commit == commit[0]).all(), "in the last of ten passes but one, it is next to nothing"


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


@pytest.mark.maskgit
@torch.no_grad()
def test_every_pass_sees_the_finished_past_alone(gm=genie_mini):
    """Failing means that half-finished frames are remembered as if they had been seen."""
    genie, seen = tiny_genie(gm), []
    past, forward = one_frame_past(gm, genie), genie.dynamics.forward
    before = [x.clone() for kv in past for x in kv]

    def recorded(tokens, masked, actions, past=None, layout=None):
        seen.append([x for kv in past for x in kv])
        return forward(tokens, masked, actions, past, layout)
    genie.dynamics.forward = recorded
    genie.dynamics.sample(past, torch.randn(2, 4), genie.config, gm.seeded(0))
    assert len(seen) > 1 and all(torch.equal(x, old) for kv in seen for x, old in zip(kv, before))


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


# --- the dynamics model's training: actions, masks, targets -----------------------------------


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
    a masked frame sees itself or a later one finished (the answer), or a past other than at play;
    or that an action is off by one frame: buttons would answer late.

    Worked out anew, a frame at a time as at play: -log p(true token) given all finished frames
    before it, over the masked tokens only, divided by how many are masked on average, 0.7.
    """
    model, tokens = tiny_genie(gm, mask_min=0.4).dynamics, torch.randint(8, (3, 5, 16))
    actions, masked, costs = torch.randn(3, 4, 4), model.random_mask(3, 4, gm.seeded(1)), []
    led = torch.cat([torch.zeros(3, 1, 4), actions], dim=1)
    for t in range(1, 5):
        hidden = torch.zeros(3, t + 1, 16, dtype=torch.bool)
        hidden[:, t] = masked[:, t - 1]
        likely = model(tokens[:, :t + 1], hidden, led[:, :t + 1])[0][:, t].log_softmax(-1)
        costs += [-likely[b, n, tokens[b, t, n]].item() for b, n in hidden[:, t].nonzero().tolist()]
    assert 100 < len(costs) < 192
    expected = sum(costs) / (0.7 * 192)
    assert model.loss(tokens, actions, masked).item() == pytest.approx(expected)


@pytest.mark.mask
def test_random_mask(gm=genie_mini):
    """Failing means that the masking rate is not the card's: evenly drawn from mask_min to 1, here
    for each frame, and each token masked with that probability."""
    for least in (0.2, 0.5):
        model = gm.DynamicsModel(tiny(gm, tok_patch=4, mask_min=least))
        masked = model.random_mask(200, 4, gm.seeded(0))                # 256 tokens a frame
        assert masked.shape == (200, 4, 256)
        rates = masked.float().mean(2)                                  # (200, 4)
        assert least - 0.1 < rates.min() < least + 0.05 and rates.max() > 0.95
        assert abs(rates.mean() - (1 + least) / 2) < 0.03
        assert abs(rates.var() - (1 - least) ** 2 / 12) < 0.01 * (1 - least)
    for within in (rates.var(dim=0), rates.var(dim=1).mean()):          # a rate for each frame
        assert (within > 0.015).all()
    again, other = (model.random_mask(200, 4, gm.seeded(seed)) for seed in (0, 1))
    assert (masked == again).all(), "drawn from another generator"
    assert (rates - other.float().mean(2)).abs().max() > 0.3, "the same rates, whatever the seed"
    only_one, only_other = (masked & ~other)[0, 0], (other & ~masked)[0, 0]
    assert only_one.any() and only_other.any(), "the same coins, whatever the seed"


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


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_play_computes_in_its_precision(precision, gm=genie_mini):
    """Failing means that play ignores --precision: `full` is then half as fast as it could be."""
    genie, seen = tiny_genie(gm, precision=precision), []
    for linear in (genie.dynamics.to_logits, genie.tokenizer.to_pixels):
        linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    state = genie.start(random_frames(1, 1, 1)[0][0, 0])
    seen.clear()                                         # the first frame is always in float32
    genie.step(state, torch.tensor([1]), gm.seeded(0))
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
        monkeypatch.setattr(bench, "MEMORY_BUDGET", sequences * 1.25 * one)
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
    noise = gm.world_noise(genie, frames, 0, gm.seeded(0))
    for result, white in ((gm.tokenizer_losses(genie, frames), frames),
                          (gm.world_losses(genie, frames, *noise), frames[:, 1:])):
        loss, numbers, _ = result
        share = white.float().mean().item()
        expected = -share * math.log(3 / 4) - (1 - share) * math.log(1 / 4)
        assert numbers["pixel_loss"].item() == pytest.approx(expected, rel=1e-5)
        assert numbers["commitment"] > 0
        assert loss.item() == pytest.approx(sum(numbers.values()).item())
    tokens, actions = genie.tokenizer.encode(frames)[1], genie.lam.encode(frames, noise[0])[0]
    assert numbers["dynamics_loss"] == genie.dynamics.loss(tokens, actions, noise[-1])


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
    trainer.enter_stage(1)
    trainer.optimizer_step()
    by_muon = {name for name, p in trainer.genie.named_parameters()
               if trainer.optimizer.state[p].keys() == {"step", "exp_avg"}}
    assert len(by_muon) == 6 * trainer.c.dyn_layers, "qkv and out, twice, and two of the FFN"
    assert all(name.startswith("dynamics.transformer.") for name in by_muon)
    assert (trainer.optimizer.faster, trainer.optimizer.momentum) == (5, 0.95)


def test_lam_is_done_after_its_steps(demo_file, tmp_path, gm=genie_mini):
    """Failing means that lam_steps does not end the LAM's training, ends the dynamics model's, too,
    or that the two do not follow a cosine of their own."""
    trainer = tiny_trainer(gm, demo_file, tmp_path, stage=1, lam_steps=3, dyn_steps=6, warmup=0,
                           lam_unquantized=1.0, lr=1e-2, min_lr=1e-3)
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
    in which much changes or of every long rest, or to others than the last real one, or a code
    where there is none."""
    genie, given = tiny_genie(gm, action_noise=noise), []
    loss = genie.dynamics.loss
    genie.dynamics.loss = lambda tokens, actions, *rest: given.append(actions) or loss(
        tokens, actions, *rest)
    frames = random_frames(400, 3)[:, [0, 0, 1, 1, 1, 1, 2]]            # steps 0, 2, 3, 4 are quiet
    shifts, source, luck, masked = gm.world_noise(genie, frames, 0, gm.seeded(0))
    assert source.shape == (400, 6) and (source[:, [1, 5]] == torch.tensor([1, 5])).all()
    for step, share in ((0, noise), (2, noise), (3, noise / 2), (4, noise / 2)):
        changed = (source[:, step] != step).float().mean().item()
        assert changed == pytest.approx(share, abs=0.08), step
        assert step == 0 or set(source[:, step].tolist()) <= {1, step}, "held on to"
    assert noise < 1 or ((source[:, 3] == 1) == (source[:, 4] == 1)).all(), "held for all of a rest"
    with torch.no_grad():
        inferred = genie.lam.encode(frames, shifts)[0]                  # (400, 6, L)
        for count in (torch.ones(8), torch.tensor([3.0, 1, 0, 0, 0, 0, 0, 0])):
            genie.lam.quantizer.ema_count[:] = count
            gm.world_losses(genie, frames, shifts, source, luck, masked)
    for clip in range(400):
        own = source[clip] < 6
        assert close(given[0][clip][own], inferred[clip][source[clip][own]])
    anything = source[:, 0] == 6
    even, usual = ((a[anything, 0][:, None] - genie.lam.quantizer.codebook).abs().amax(-1)
                   for a in given)                                      # (clips, 8)
    assert noise == 0 or even.min(1).values.max() < 1e-5, "a code"
    assert noise == 0 or set(even.argmin(1).tolist()) == set(range(8)), "any button"
    assert set(usual.argmin(1).tolist()) <= {0, 1}, "no code that is not in use"
    often = usual.argmin(1).bincount(minlength=2)
    assert noise == 0 or 1.8 < often[0] / often[1] < 5, "as often as in use"
    genie.lam.quantizer.started.fill_(False)
    source = gm.world_noise(genie, frames, 0, gm.seeded(0))[1]
    assert (source == torch.arange(6)).all(), "before the codebook starts there are no codes"


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
    assert {picks_of(one, 5, 1, step)[1] for step in range(200)} == set(range(13)), "anywhere"
    assert picks_of(two, 5, 1, 9, length=16)[1] == 0


def test_frames_are_those_of_the_file(demo_file, gm=genie_mini):
    """Failing means that the model is trained on other pictures than the file holds."""
    loaded, data = files.load_split(demo_file, "val"), gm.Sequences(demo_file, "val")
    frames = data.frames([2, 0], first=3, length=5)
    assert frames.shape == (2, 5, 64, 64) and frames.dtype == torch.uint8
    assert (frames.numpy() == files.unpack(loaded["bits"])[[2, 0], 3:8]).all()


def test_gradients_stay_where_they_belong(gm=genie_mini):
    """Failing means that the dynamics model bends the actions to its own needs (the paper stops
    that gradient), or that the LAM's encoder learns nothing."""
    genie = tiny_genie(gm).train()
    frames = random_frames(2, 4)
    noise = gm.world_noise(genie, frames, 0, gm.seeded(0))
    numbers = gm.world_losses(genie, frames, *noise)[1]
    grads = torch.autograd.grad(numbers["dynamics_loss"], list(genie.lam.parameters()),
                                allow_unused=True, retain_graph=True)
    assert all(grad is None for grad in grads), "stop-gradient"
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
        shifts = gm.world_noise(genie, random_frames(50, 4), 0, gm.seeded(0))[0]
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

    def interrupted_step(log):
        if (trainer.stage, trainer.step + 1) == interrupt:
            trainer.stop = True                                         # as Ctrl-C does
            if how == "crash":
                raise Killed
        return one_step(log)

    trainer.optimizer_step = interrupted_step
    try:
        finished = trainer.run()
    except Killed:
        finished = False
    assert finished == (interrupt is None)
    if not finished:
        checkpoint = checkpoints.read_checkpoint(out / "checkpoint.safetensors")
        trainer = tiny_trainer(gm, data, out, **TINY_RUN)
        trainer.resume(checkpoint)
        assert trainer.run()
    return (checkpoints.read_checkpoint(out / gm.CHECKPOINT),
            (out / "metrics.csv").read_text(encoding="utf-8"))


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
    monkeypatch.setattr(runlog, "draw_curves", lambda *_: None)   # slow, and not compared
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

os.replace, test_genie_mini.runlog.draw_curves = deadly, lambda *_: None
test_genie_mini.run_of(genie_mini, sys.argv[3], Path(sys.argv[4]))
"""


@pytest.mark.parametrize("name, call", [
    ("checkpoint.previous.safetensors", 1), ("checkpoint.safetensors", 3),
    ("checkpoint.previous.safetensors", 4)])
def test_a_killed_run_goes_on_exactly(demo_file, tmp_path, whole_run, monkeypatch, name, call,
                                      gm=genie_mini):
    """Failing means that a run which is killed while it writes a checkpoint is lost, or ends
    elsewhere. Killed while it writes its second; between the two stages, when the old one has been
    moved and the new one has not yet its name; and at the end of the second stage."""
    monkeypatch.setattr(runlog, "draw_curves", lambda *_: None)
    out = tmp_path / "run"
    killed = subprocess.run([sys.executable, "-c", KILLED, name, str(call), demo_file, out],
                            cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    checkpoint, used = checkpoints.newest_checkpoint(out / "checkpoint.safetensors")
    assert (used == out / "checkpoint.safetensors") == (name != "checkpoint.safetensors")
    trainer = tiny_trainer(gm, demo_file, out, **TINY_RUN)
    trainer.resume(checkpoint)
    assert trainer.run()
    whole, log = whole_run
    again = checkpoints.read_checkpoint(out / "checkpoint.safetensors")
    assert all((whole["model"][n] == again["model"][n]).all() for n in whole["model"])
    assert (out / "metrics.csv").read_text(encoding="utf-8") == log


def test_the_same_seed_gives_the_same_weights(demo_file, tmp_path, gm=genie_mini):
    """Failing means that a run cannot be repeated, that its seed changes nothing, or that all its
    steps mask the same tokens."""
    made = []
    for seed in (1, 1, 2):
        trainer = tiny_trainer(gm, demo_file, tmp_path, stage=1, seed=seed)
        masks, loss = [], trainer.genie.dynamics.loss
        trainer.genie.dynamics.loss = lambda *given: masks.append(given[2]) or loss(*given)
        for trainer.step in range(3):
            trainer.optimizer_step()
        made.append(torch.cat([t.float().flatten() for t in weights_of(trainer.genie).values()]))
        assert (masks[0] != masks[1]).any()
    assert (made[0] == made[1]).all() and (made[0] != made[2]).any()


RANK = """
import os
import sys
sys.path.insert(0, {folder!r})
import genie_mini
genie_mini.VectorQuantizer.__init__.__defaults__ = (0.99, 1, 0.25, 0, 0.0)   # dead after a step
step = genie_mini.Trainer.optimizer_step
def interrupted(trainer, log):
    if os.environ["RANK"] == "1" and (trainer.stage, trainer.step) == (1, 1):
        trainer.stop = True                                             # as Ctrl-C does
    return step(trainer, log)
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
    monkeypatch.setattr(runlog, "draw_curves", lambda *_: None)   # slow, and not compared
    monkeypatch.setattr(genie_mini.VectorQuantizer.__init__, "__defaults__",
                        (0.99, 1, 0.25, 0, 0.0))
    changes = dict(tok_steps=5, dyn_steps=5, val_every=1, dyn_layers=1, batch=8,
                   micro_batch=3, lam_steps=4, lam_unquantized=0.5, action_noise=0.3,
                   lr=1e-4, min_lr=1e-4, tok_codes=32)
    whole = tiny_trainer(genie_mini, demo_file, tmp_path / "one", **changes)
    assert whole.run()
    trainer = tiny_trainer(genie_mini, demo_file, tmp_path / "two", **changes)
    step = trainer.optimizer_step
    trainer.optimizer_step = lambda log: setattr(trainer, "stop", trainer.step == 2) or step(log)
    assert not trainer.run()

    script = tmp_path / "rank.py"
    script.write_text(RANK.format(folder=str(ROOT)))
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc_per_node", "2", str(script), "train", "--resume", "--out",
                          str(tmp_path / "two")], capture_output=True, text=True, timeout=300)
    for text in ("parameters: ", "stopped and saved"):
        assert run.stdout.count(text) == 1, f"rank 0 alone speaks\n{run.stderr}"
    checkpoint = checkpoints.read_checkpoint(tmp_path / "two" / "checkpoint.safetensors")
    assert (checkpoint["stage"], checkpoint["step"]) == (1, 2)

    trainer = tiny_trainer(genie_mini, demo_file, tmp_path / "two", **changes)
    trainer.resume(checkpoint)
    assert trainer.run()
    again, expected = trainer.genie.state_dict(), whole.genie.state_dict()
    assert expected["tokenizer.quantizer.started"] and expected["lam.quantizer.started"]
    for name in expected:
        assert close(again[name].float(), expected[name].float(), 1e-5), name
    assert len(trainer.log.rows) == len(whole.log.rows) == 10
    for row, other in zip(trainer.log.rows, whole.log.rows):
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
    good = (tmp_path / "checkpoint.safetensors").read_bytes()
    for loss, norm in ((math.nan, 1.0), (2000.0, 1.0), (1.0, math.inf), (1.0, math.nan)):
        with pytest.raises(gm.UserError, match="broke down by step 1 of stage tokenizer"):
            trainer.check_health(loss, norm)
    losses, weight = trainer.losses, trainer.genie.tokenizer.embed.weight
    trainer.losses = lambda *batch: tuple(                              # a slope without end
        x + (weight - weight.detach()).sqrt().sum() if i == 0 else x
        for i, x in enumerate(losses(*batch)))
    with pytest.raises(gm.UserError, match="gradient norm (inf|nan)"):
        trainer.optimizer_step()
    before = weights_of(trainer.genie)
    with torch.no_grad():
        trainer.genie.tokenizer.embed.weight.fill_(math.nan)
    with pytest.raises(gm.UserError, match="loss nan"):
        trainer.optimizer_step()
    after = weights_of(trainer.genie)
    assert all((before[n] == after[n]).all() for n in before if n != "tokenizer.embed.weight")
    with pytest.raises(gm.UserError, match="not saved"):
        trainer.save()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == good


@pytest.mark.parametrize("stage", [0, 1])
def test_validation_is_on_the_val_split(stage, demo_file, tmp_path, capsys, gm=genie_mini):
    """Failing means that validation measures what was trained on, which says nothing about new
    video, or draws other masks each time, so that its curve jumps about by itself; or that it does
    not say, a tenth of the stage later, that the buttons do nothing."""
    trainer = tiny_trainer(gm, demo_file, tmp_path)
    trainer.genie, trainer.log.unless_held = tiny_genie(gm), lambda *_: None    # no pictures
    trainer.enter_stage(stage)
    measured = trainer.validate()
    trainer.step, trainer.train_set.bits = 9, ~trainer.train_set.bits
    assert trainer.validate() == measured
    assert "DO NOTHING" not in capsys.readouterr().out
    trainer.step = trainer.total // 10
    trainer.validate()
    assert ("DO NOTHING" in capsys.readouterr().out) == (stage == 1)


def test_a_killed_run_is_kept_and_swept(demo_file, tmp_path, monkeypatch, command_line=command_line,
                                        gm=genie_mini):
    """Failing means that a run which was killed while it saved, so that it only has the checkpoint
    before, is overwritten by a new one, or that its half-written files pile up."""
    half, newest = tmp_path / ".checkpoint.safetensors.9.tmp", tmp_path / gm.CHECKPOINT
    args = command_line.build_parser().parse(
        ["train", "--preset", "smoke", "--data", str(demo_file), "--out", str(tmp_path)])
    half.touch()
    monkeypatch.setattr(genie_mini.Trainer, "run", lambda _: False)     # stopped at once
    assert gm.train(args) == 128 and newest.exists() and not half.exists()
    newest.rename(checkpoints.previous(newest))
    with pytest.raises(gm.UserError, match="already holds a run"):
        command_line.prepare(args)


GOOD = dict(codes_used=30, perplexity=6, wrong_pixels=1, copy_wrong_pixels=80, action_ratio=5)


@pytest.mark.parametrize("stage, progress, bad, told", [
    (0, 0.5, {}, []), (0, 0.5, {"codes_used": 4}, ["CODEBOOK"]), (1, 0.5, {}, []),
    (1, 0.5, {"perplexity": 1.4}, ["ACTIONS"]), (1, 0.5, {"wrong_pixels": 79}, ["LAM"]),
    (1, 0.1, {"action_ratio": 1.05}, ["BUTTONS"]), (1, 0.09, {"action_ratio": 1.05}, [])])
def test_troubles_are_told(stage, progress, bad, told, runlog=runlog):
    """Failing means that hours of training go by before somebody hears that the codes collapsed or
    that the buttons do nothing, or that a healthy run is called sick."""
    found = list(runlog.troubles({**GOOD, **bad}, stage, progress))
    assert [text.split()[1] for text in found] == told
    assert all("\n" not in text for text in found)


# --- presets --------------------------------------------------------------------------------

CARD = dict(
    heads=4, tok_patch=4, tok_layers=4, tok_dim=256, tok_codes=32, latent_dim=16,
    lam_patch=8, lam_layers=4, lam_dim=256, num_actions=8,
    dyn_layers=6, dyn_dim=256, temperature=1.0, maskgit_steps=10, mask_min=0.5,
    lr=3e-4, min_lr=3e-4, beta2=0.9, warmup=2000, tok_steps=50_000, dyn_steps=50_000, batch=128,
    dyn_frames=16)
COST_SAVERS_OFF = dict(dyn_fold=1, lam_steps=0, mask_schedule="cosine")


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
    """Failing means that a preset cannot be built, or holds a misspelt or needless field; or that a
    width which the heads do not divide is taken, and ends in a traceback."""
    c = gm.Config(**{"preset": preset, **gm.PRESETS[preset]})
    gm.check_config(c)
    with torch.device("meta"):
        genie = gm.Genie(c)
    for part in (genie.tokenizer, genie.lam, genie.dynamics):
        assert sum(p.numel() for p in part.parameters()) > 1000
    for name in ("tok_dim", "lam_dim", "dyn_dim"):
        with pytest.raises(gm.UserError, match=f"--{name} .* must be a multiple of 4 x --heads"):
            gm.check_config(gm.dataclasses.replace(c, **{name: 4 * c.heads + 4}))


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
    halves = gm.compare_actions(np.arange(4), np.arange(4) // 2)        # log 4 and log 2
    assert halves["nmi"] == pytest.approx(2 / 3), "the mean of the two entropies"
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
    assert gm.errors(a, b).tolist() == [[6, 0, 0], [0, 0, 0]]


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
def test_dynamics_is_scored_by_hand(monkeypatch, gm=genie_mini):
    """Failing means that how much the actions matter, or how far a dream strays, is measured
    wrongly: a frame is compared with another one than it stands for, PSNRs are averaged in place of
    errors, the null is no second try, or a random action is drawn in another way.

    In frame t of the film, from 0 on, the top 4t rows are white. Played with its actions, 2 2 2 2 5
    three times, frame t has t wrong pixels, in every other clip 100 more; predicted by one_step
    each has 7. Any other action makes 120 more wrong.
    """
    white = torch.arange(64)[:, None] < 4 * torch.arange(16)[:, None, None]     # (16, 64, 1)
    film, codes = white.expand(16, 64, 64).byte(), torch.tensor([2, 2, 2, 2, 5] * 3)
    genie, pressed, luck = tiny_genie(gm), set(), []

    def made(actions, wrong):
        T = actions.shape[1]
        pressed.update(actions.flatten().tolist())
        wrong = wrong + 120 * (actions != codes[:T])                    # (B, T), at most 235
        last = torch.arange(4096) >= 4096 - wrong[..., None]            # in the last rows, black
        return film[1:T + 1] | last.view(-1, T, 64, 64)

    def rollout(first, actions, generator):
        assert (first == film[0]).all()
        if (actions == codes[:actions.shape[1]]).all():
            luck.append(torch.rand(1, generator=generator).item())
        odd = torch.arange(len(actions))[:, None] % 2
        return made(actions, 100 * odd + torch.arange(1, actions.shape[1] + 1))

    genie.rollout, genie.watch = rollout, lambda x: (None, None, codes.expand(len(x), 15))
    monkeypatch.setattr(gm, "one_step", lambda genie, x, actions, generator: made(actions, 7))
    data = types.SimpleNamespace(frames=lambda picks: film.expand(len(picks), 16, 64, 64))
    result = gm.evaluate_dynamics(genie, data, np.arange(320))
    best, uniform = result["psnr_inferred"], result["psnr_random"]
    assert (best, best - result["delta_psnr"]) == pytest.approx((gm.psnr(54), uniform))
    assert uniform == pytest.approx(gm.psnr(54 + 120 / 2), abs=0.5)     # 4 standard deviations
    usual = best - result["delta_psnr_marginal"]
    assert usual == pytest.approx(gm.psnr(54 + 120 / 5), abs=0.5), "as often as they occur"
    assert abs(result["delta_psnr_null"]) < 1e-4 and len(set(luck)) == len(luck) > 1, "a new seed"
    assert pressed == {2, 5}, "no action that is not in use: what it does was never trained"
    assert (result["wrong_pixels_inferred"], result["wrong_pixels_copy"]) == (7, 256)
    assert result["wrong_pixels_random"] == pytest.approx(7 + 120 / 2, abs=4)
    assert result["rollout_wrong_pixels"] == {"4": 54, "8": 58, "15": 65}
    assert result["rollout_wrong_pixels_copy"] == {"4": 1024, "8": 2048, "15": 3840}


STRAIGHT = "return z + (code - z).detach(), indices, loss"
TARGETS = "tokens[:, 1:].masked_fill(~masked, -100)"
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
    ("codes never updated", "moved[:, None], mean, self.codebook",
     "moved[:, None], self.codebook, self.codebook", test_codes_follow_a_moving_average, {}),
    ("decay the wrong way round", "self.ema_count.mul_(self.decay).add_(count, alpha=1 -",
     "self.ema_count.mul_(1 - self.decay).add_(count, alpha=2 * self.decay - 1 + 1 -",
     test_codes_follow_a_moving_average, {}),
    ("only the last micro-batch learned", "self.seen.append((flat, indices))",
     "self.seen = [(flat, indices)]", test_codes_follow_a_moving_average, {}),
    ("copies re-seeded", "distance[distance < 1e-6 * z.pow(2).sum(1) + self.negligible()] = 0", "",
     test_a_copy_of_a_code_is_known_at_any_length, {"length": 20}),
    ("dead codes never re-seeded", "(self.idle >= self.dead_after)", "(self.idle < 0)",
     test_dead_code_is_moved_onto_a_lonely_vector, {}),
    ("codes re-seeded too early", "self.idle.add_(1)", "self.idle.add_(2)",
     test_dead_code_is_moved_onto_a_lonely_vector, {}),
    ("codes re-seeded too late", "self.due = self.steps", "self.due = 1 + self.steps",
     test_dead_code_is_moved_onto_a_lonely_vector, {}),
    ("re-seeded on any vector", PICK, PICK.replace("weight", "torch.ones_like(weight)"),
     test_dead_code_is_moved_onto_a_lonely_vector, {}),
    ("live code copied", "if not 0 < weight.sum() < math.inf:",
     "weight += 1e-9\n            if False:",
     test_a_copy_of_a_code_is_known_at_any_length, {"length": 1}),
    ("codebook starts on one batch", "z if more is None else more()", "z",
     test_codebook_starts_on_the_whole_training_set, {}),
    ("codebook starts on the first vectors", "torch.randperm(len(z), generator=generator)",
     "torch.arange(len(z))", test_codebook_starts_on_the_whole_training_set, {}),
    ("a short run has no codebook", "min(c.tok_unquantized, c.tok_steps // 2)", "c.tok_unquantized",
     test_codebook_starts_on_the_whole_training_set, {}),
    ("the LAM's codebook waits for the dynamics", "lam_unquantized * c.lam_end",
     "lam_unquantized * c.dyn_steps", test_lam_is_done_after_its_steps, {}),
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
    ("temperature squared", "c.temperature * noise", "c.temperature ** 2 * noise",
     test_temperature_is_that_of_a_softmax, {"temperature": 2.0}),
    ("always the likeliest token", "c.temperature * noise", "0 * noise",
     test_temperature_is_that_of_a_softmax, {"temperature": 1.0}),
    ("sampling ignores the seed", "generator=generator, device", "device",
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
    ("confidence of the likeliest token", ".gather(-1, guess[..., None])[..., 0]", ".amax(-1)",
     test_maskgit_commits_the_surest_first, {}),
    ("drafts are remembered", "logits, _ = self(tokens, masked, action[:, None], past)",
     "logits, past = self(tokens, masked, action[:, None], past)",
     test_every_pass_sees_the_finished_past_alone, {}),
    *(("order noise that grows", "(1 - progress) * noise", "progress * noise",
       test_order_noise_shuffles_the_order, {"schedule": name}) for name in ("cosine", "adaptive")),
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
     test_play_may_start_after_a_clip, {"T": 4, "known": 3}),
    ("all players press the first one's button", "masked, action[:, None], past)",
     "masked, action[:1, None].expand(B, 1, -1), past)",
     test_batched_play_equals_playing_alone, {}),
    ("each frame decoded alone", "decode(quantized, state and state.decoder)", "decode(quantized)",
     test_long_play_stays_within_what_was_trained, {"T": 4}),
    ("button number off by one", "self.lam.quantizer.codebook[action] ",
     "self.lam.quantizer.codebook[action - 1] ",
     test_long_play_stays_within_what_was_trained, {"T": 4}),
    ("frames drawn without the action", "sample(state.dynamics, latent, self.config,",
     "sample(state.dynamics, 0 * latent, self.config,",
     test_long_play_stays_within_what_was_trained, {"T": 4}),
    ("frames remembered without the action", "return self.observe(state, tokens, latent)",
     "return self.observe(state, tokens, 0 * latent)",
     test_long_play_stays_within_what_was_trained, {"T": 4}),
    ("action off by one frame in training", "(0, 0, 1, 0)), actions]",
     "(0, 0, 1, 0)), F.pad(actions[:, :-1], (0, 0, 1, 0))]",
     test_loss_is_that_of_the_masked_tokens, {}),
    ("dynamics ignores its actions", "+ self.action(actions)[:, :, None]", "",
     test_dynamics_overfits, {}),
    ("masked tokens in view", "tokens.masked_fill(masked, self.codes)", "tokens",
     test_masked_tokens_are_not_looked_at, {}),
    ("loss on all tokens", TARGETS, "tokens[:, 1:]",
     test_loss_is_that_of_the_masked_tokens, {}),
    ("loss on visible tokens", TARGETS, TARGETS.replace("~", ""),
     test_loss_is_that_of_the_masked_tokens, {}),
    ("targets taken after masking", TARGETS,
     "tokens[:, 1:].masked_fill(masked, 0).masked_fill(~masked, -100)",
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
    ("a mask from the global generator", "torch.rand(B, T, self.tokens_per_frame, generator="
     "generator)", "torch.rand(B, T, self.tokens_per_frame)", test_random_mask, {}),
    ("rates that ignore their generator", "torch.rand(B, T, 1, generator=generator)",
     "torch.rand(B, T, 1, generator=seeded(0))", test_random_mask, {}),
    ("a loss right for mask_min 0.5 alone", "((1 + self.mask_min) / 2 *", "(0.75 *",
     test_loss_is_that_of_the_masked_tokens, {}),
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
     test_rotation_by_hand, {}),
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
    ("Muon nowhere", "groups, matrices, fused", "groups, [], fused",
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
    ("who rests goes on resting", "begins | still & held", "still", test_action_noise,
     {"noise": 1.0}),
    ("a button is held for a step at most", "begins | still & held", "begins", test_action_noise,
     {"noise": 1.0}),
    ("held or not, step by step", "held = torch.rand(B, 1,", "held = torch.rand(B, T - 1,",
     test_action_noise, {"noise": 1.0}),
    ("a held button is the step before", "own.masked_fill(still, -1).cummax(1).values", "(own - 1)",
     test_action_noise, {"noise": 1.0}),
    ("action noise the wrong way round", "< c.action_noise", ">= c.action_noise",
     test_action_noise, {"noise": 0.25}),
    ("action noise where much changes", "begins | still & held", "~still | begins",
     test_action_noise, {"noise": 0.25}),
    ("tokens of other frames", "genie.tokenizer.encode(frames)[1] ",
     "genie.tokenizer.encode(frames.roll(1, 1))[1] ", test_losses_by_hand, {}),
    ("gradients of micro-batches added up", "(loss * share).backward()", "loss.backward()",
     test_micro_batches_equal_one_big_batch, {"stage": 0}),
    ("micro-batches weigh the same whatever their size", "share = len(chosen) / c.batch",
     "share = self.micro / c.batch", test_micro_batch_auto, {"stage": 0}),
    ("nearest code by bfloat16", "torch.autocast(z.device.type, enabled=False)",
     "torch.autocast(z.device.type, torch.bfloat16)", test_codebook_is_float32_under_autocast, {}),
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
    ("clips never start last", "torch.randint(late + 1,", "torch.randint(max(1, late),",
     test_a_batch_depends_on_seed_stage_and_step_alone, {}),
    ("all steps draw alike", "seeded(c.seed, self.stage, self.step, 2)",
     "seeded(c.seed, self.stage, 2)", test_the_same_seed_gives_the_same_weights, {}),
    *(("validation on the training set", name + "self.val_set, some", name + "self.train_set, some",
       test_validation_is_on_the_val_split, {"stage": stage})
      for stage, name in ((0, "evaluate_tokenizer(genie, "), (1, "evaluate_lam(genie, "),
                          (1, "over_batches(self.genie, "))),
    ("validation masks that change", ":2], seeded(i))", ":2], seeded(i, self.step))",
     test_validation_is_on_the_val_split, {"stage": 1}),
    ("no stop-gradient", "[actions.detach(), genie.lam", "[actions, genie.lam",
     test_gradients_stay_where_they_belong, {}),
    ("tokenizer still training in stage 2", "genie = self.genie.eval()", "genie = self.genie",
     test_stage_2_leaves_the_tokenizer_alone, {}),
    ("frames of a clip rolled apart", "take[:, :1, :, None].expand_as(x)",
     "((take[:, :1] - torch.arange(x.shape[1])[:, None]) % SIZE)[..., None].expand_as(x)",
     test_lam_sees_rolled_clips, {}),
    ("all clips rolled alike", "- shifts[..., None]", "- shifts[:1, :, None]",
     test_lam_sees_rolled_clips, {}),
    ("rolled in the paper's reading", ' * (c.lam_view == "change")', "",
     test_lam_sees_rolled_clips, {}),
    ("rolled by pixels", "c.tok_patch * patches", "patches", test_lam_sees_rolled_clips, {}),
    ("loss over the masked tokens of a micro-batch",
     "loss / ((1 + self.mask_min) / 2 * masked.numel())", "loss / masked.sum()",
     test_micro_batches_equal_one_big_batch, {"stage": 1}),
    ("optimizer forgotten on resuming", '{**self.optimizer.state_dict(), "state": moments}',
     "self.optimizer.state_dict()", test_resume_is_exact, {"stage": 0, "step": 3, "how": "stop"}),
    ("batches start anew on resuming", 'self.step, self.log.rows = checkpoint["step"],',
     "self.step, self.log.rows = 0,", test_resume_is_exact, {"stage": 1, "step": 1, "how": "stop"}),
    ("log forgotten on resuming", 'checkpoint["step"], checkpoint["rows"]',
     'checkpoint["step"], []', test_resume_is_exact, {"stage": 1, "step": 6, "how": "crash"}),
    ("heads that do not divide", "% (4 * c.heads)", "% c.heads", test_presets_work,
     {"preset": "laptop"}),
    ("heads that do not divide the LAM", '"lam_dim", "dyn_dim"):', '"dyn_dim"):',
     test_presets_work, {"preset": "laptop"}),
    ("accuracy without a majority", "joint.max(1).sum()", "joint.max(0).sum()",
     test_compare_actions, {}),
    ("nmi over the smaller entropy", "(entropy(rows) + entropy(columns)) / 2",
     "min(entropy(rows), entropy(columns))", test_compare_actions, {}),
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
    ("LAM compared with the wrong frames", "errors(logits > 0, x[:, 1:])",
     "errors(logits > 0, x[:, :-1])", test_lam_is_compared_with_copying, {}),
    ("dead codes among the random actions", "((marginal > 0).float(), marginal)",
     "(torch.ones_like(marginal), marginal)", test_dynamics_is_scored_by_hand, {}),
    ("the marginal drawn evenly", ").float(), marginal)", ").float(),) * 2",
     test_dynamics_is_scored_by_hand, {}),
    ("delta_psnr at frame t - 1", "psnr(w[:, t - 1].", "psnr(w[:, t - 2].",
     test_dynamics_is_scored_by_hand, {}),
    ("a mean of PSNRs", "psnr(w[:, t - 1].mean().item())",
     "np.mean([psnr(x) for x in w[:, t - 1].tolist()])", test_dynamics_is_scored_by_hand, {}),
    ("the null with the first run's seed", "seeded(seed, i, k)", "seeded(seed, i, max(k, 1))",
     test_dynamics_is_scored_by_hand, {}),
    ("one step in place of rollouts", "genie.rollout(x[:, 0], actions,",
     "one_step(genie, x, actions,", test_dynamics_is_scored_by_hand, {}),
    ("rollout compared one frame off", "x[:, 1:actions.shape[1] + 1]) for k",
     "x[:, :actions.shape[1]]) for k",
     test_dynamics_is_scored_by_hand, {}),
    ("a run-away loss goes on", "loss < self.EXPLODED and norm < math.inf", "norm < math.inf",
     test_diverging_training_says_so, {}),
    ("the gradient's norm not checked", " and norm < math.inf", "", test_diverging_training_says_so,
     {}),
    ("the gradient's norm not told", "numbers.values()), sum(norms))", "numbers.values()), 0)",
     test_diverging_training_says_so, {}),
    ("half-written files kept", "        files.sweep(out)\n", "",
     test_a_killed_run_is_kept_and_swept, {}),
    ("trouble is told late", "self.stage, self.step / self.total)", "self.stage, 0)",
     test_validation_is_on_the_val_split, {"stage": 1}),
    ("NaN saved over good weights", "if not finite(self.genie.state_dict().values()):",
     "if False:", test_diverging_training_says_so, {}),
]


@pytest.mark.parametrize("old, new, test, arguments", [bug[1:] for bug in BUGS],
                         ids=[bug[0] for bug in BUGS])
def test_planted_bug_is_caught(old, new, test, arguments, request):
    """Failing with DID NOT RAISE means that a guard is asleep: the bug is planted, its test passes.

    Failing in `mutant` means that the text to break is no longer in genie_mini.py: write it anew.
    """
    must_fail(test, request, **arguments, gm=mutant(old, new))
