"""genie_mini: how a playable world is learned from video with no action labels, in one file.

Genie (Bruce et al. 2024, arXiv 2402.15391) watches videos and learns a world that you can play.
Nobody tells it which button was pressed: it has to invent the buttons. Three models do it:

    video tokenizer      turns each 64x64 frame into 16x16 symbols from a codebook of 32  (stage 1)
    latent action model  looks at two frames and says, in 3 bits, what happened between   (stage 2)
    dynamics model       given the symbols so far and an action, samples the next frame   (stage 2)

Once trained, you supply the 3 bits. This file holds everything: the models, both training
stages, evaluation and play. Read it from top to bottom; the order is the order of explanation.

    python genie_mini.py train                          train on the demo world, no flags needed
    python genie_mini.py eval  --run runs/laptop        measure it against honest baselines
    python genie_mini.py play  --run runs/laptop --actions 1,1,4,4 --out roll.gif
    python genie_mini.py bench --preset laptop          how fast is this machine at it

Shape key, everywhere the same:
    B batch   T frames   H W pixels (64, 64)   N patches a frame   P pixels a patch
    D model width   L latent width (16)   K codes in a codebook   h heads   e = D / h

Contents:
     1  Config and presets               7  Latent action model
     2  Where to compute                 8  Dynamics model (MaskGIT)
     3  Data                             9  Genie: joined, and played
     4  ST-attention, ST-transformer    10  Training, stages 1 and 2
     5  Vector quantizer                11  Evaluation
     6  Video tokenizer                 12  Commands
What a reader does not need stands in extras/: flags, logs, files, checkpoints, pictures, the play
window, bench, many processes, the step of an optimizer.

Where the paper is silent, this takes what was measured to learn; README's "How this differs from
Genie" lists it. The `full` preset is the card of this project: Genie at small sizes.
"""

import copy
import dataclasses
import json
import math
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from extras import files, ranks
from extras.files import UserError
from extras.muon import Muon
from extras.runlog import COLUMNS, RunLog, troubles

CHECKPOINT = "checkpoint.safetensors"
VERSION = 5                     # of its format
SIZE = files.SIZE               # frames are 64 x 64 pixels
CLIP = files.FRAMES             # frames in a stored sequence: 16

# --------------------------------------------------------------------------------------------------
# 1  Config and presets
#
# Problem: a world model has dozens of numbers to choose, and a reader wants to know the reason for
# each. They all live here, one a line, with the reason beside it; `--help` prints the same reasons,
# and every field is a flag of the same name. The defaults are the `full` preset: the card of this
# project, that is Genie scaled down to 64x64 black-and-white video. Where the card is silent, they
# are what was measured to learn. The other presets differ in sizes, steps and cost-savers only.


@dataclass
class Config:
    """Every choice in this file. Defaults are the `full` preset."""

    preset: str = "full"            # where the others start; bare train: full on a GPU, or laptop
    seed: int = 0                   # every random draw of a run follows from this number
    device: str = "auto"            # where to compute; auto takes the fastest there is
    precision: str = "auto"         # auto takes bfloat16 on GPUs since Ampere, else float32
    # All three models
    heads: int = 4                  # attention heads of every transformer
    latent_dim: int = 16            # width of a code vector, in both codebooks
    # Video tokenizer (stage 1)
    tok_patch: int = 4              # 4x4 pixels a patch: 16x16 tokens a frame
    tok_dim: int = 256              # model width
    tok_layers: int = 4             # layers in the encoder, and as many in the decoder
    tok_codes: int = 32             # codes in the codebook; few, since the video is binary
    tok_unquantized: int = 100      # steps before the codebook starts: k-means needs a spread
    tok_steps: int = 50_000         # optimizer steps of stage 1
    # Latent action model (stage 2)
    lam_patch: int = 8              # coarser than the tokenizer's: motion needs less detail
    lam_dim: int = 256              # model width
    lam_layers: int = 4             # layers in the encoder, and as many in the decoder
    lam_view: str = "change"        # what the encoder sees; frames: the paper's (section 7)
    num_actions: int = 8            # latent actions: eight buttons, so 3 bits a step
    lam_steps: int = 0              # first steps of stage 2 in which the LAM trains; 0: all
    lam_unquantized: float = 0.75   # share of these before its codebook starts (section 7)
    # Dynamics model (stage 2)
    dyn_dim: int = 256              # model width
    dyn_layers: int = 6             # the card names 6 and 4 layers; the 4 is read as heads
    dyn_fold: int = 1               # fold x fold tokens share one position; 2 costs a quarter
    dyn_frames: int = 16            # frames a sequence: the memory of play, plus one
    dyn_steps: int = 50_000         # optimizer steps of stage 2
    mask_min: float = 0.5           # a frame draws its masking rate in [mask_min, 1]
    action_noise: float = 0.8       # how often a rest begins with another action (section 10)
    # Training
    batch: int = 128                # sequences the optimizer sees a step
    micro_batch: int = 0            # sequences in memory at once; 0 (auto): as many as fit
    lr: float = 3e-4                # peak learning rate
    min_lr: float = 3e-4            # learning rate at the cosine's end; the card keeps it flat
    warmup: int = 2000              # steps of linear warm-up
    beta2: float = 0.9              # of AdamW; lower than usual, as in Genie
    val_every: int = 1000           # steps between validations, pictures and checkpoints
    val_sequences: int = 64         # sequences in a validation during training
    # Sampling
    maskgit_steps: int = 10         # passes in which a frame's tokens are decided
    temperature: float = 1.0        # of the token distribution; 0 takes the likeliest
    order_noise: float = 4.5        # Gumbel noise on the confidence that orders the commits
    mask_schedule: str = "cosine"   # what a pass commits; adaptive: all that is confident

    @property
    def lam_end(self):
        """The step of stage 2 from which on the dynamics model trains alone."""
        return min(self.lam_steps or self.dyn_steps, self.dyn_steps)


PRESETS = {
    "full": {},
    # The card made small, for two CPU cores: as deep in time, but narrow and shallow. A clip holds
    # 15 steps, so one clip a step is enough, and many short steps learn faster than few.
    "laptop": dict(
        tok_dim=64, tok_layers=2, tok_unquantized=250, tok_steps=800, lam_dim=128, lam_layers=2,
        lam_steps=1600, dyn_dim=128, dyn_layers=4, dyn_fold=2, dyn_steps=3200, temperature=0.1,
        order_noise=0.0, mask_schedule="adaptive", batch=1, micro_batch=1, lr=1e-3, min_lr=1e-4,
        warmup=100, beta2=0.99, val_every=400, val_sequences=32),
    # Everything in a minute or two, for tests; it learns next to nothing.
    "smoke": dict(
        heads=2, tok_dim=32, tok_layers=1, tok_steps=60, tok_unquantized=20, lam_dim=32,
        lam_layers=1, dyn_dim=32, dyn_layers=1, dyn_fold=2, dyn_frames=4, dyn_steps=60,
        batch=4, micro_batch=2, lr=2e-3, min_lr=1e-3, warmup=10, val_every=30, val_sequences=8,
        maskgit_steps=4),
}
# `laptop` for video that nobody rendered for this: more kinds of patches, so more symbols.
PRESETS["video"] = {**PRESETS["laptop"], "tok_codes": 64, "tok_steps": 2400}

CHOICES = {"preset": tuple(PRESETS), "device": ("auto", "cpu", "cuda", "mps"),
           "precision": ("auto", "float32", "bfloat16"), "lam_view": ("change", "frames"),
           "mask_schedule": ("cosine", "adaptive")}
# Of the numbers: (lowest, highest). Any other number is from 0 to 2^31 - 1, a share from 0 to 1.
RANGES = {**dict.fromkeys(("tok_dim", "lam_dim", "dyn_dim", "latent_dim"), (1, 8192)),
          **dict.fromkeys(("tok_layers", "lam_layers", "dyn_layers"), (1, 100)),
          **dict.fromkeys(("tok_codes", "num_actions"), (2, 256)),
          **dict.fromkeys(("heads", "tok_patch", "lam_patch", "dyn_fold", "batch", "val_every",
                           "val_sequences"), (1, 2**31 - 1)),
          **dict.fromkeys(("mask_min", "action_noise", "lam_unquantized"), (0, 1)),
          "dyn_frames": (2, CLIP), "maskgit_steps": (1, 4096),
          "beta2": (0, 0.9999)}


def check_config(c):
    """Raise UserError, with one sentence, for a Config that cannot work."""
    for f in dataclasses.fields(c):
        value, (low, high) = getattr(c, f.name), RANGES.get(f.name, (0, 2**31 - 1))
        if f.name in CHOICES and value not in CHOICES[f.name]:
            raise UserError(f"--{f.name} is {value}: choose {', '.join(CHOICES[f.name])}")
        if f.type in (int, float) and not low <= value <= high:         # or NaN
            raise UserError(f"--{f.name} is {value}: it must be a number from {low} to {high}")
    for name in ("tok_dim", "lam_dim", "dyn_dim"):
        if getattr(c, name) % (4 * c.heads):
            raise UserError(f"--{name} {getattr(c, name)} must be a multiple of 4 x --heads"
                            f" {c.heads}: rotary positions rotate pairs of channels along two axes")
    row = SIZE // c.tok_patch                                           # tokens in a row
    for name, whole in (("tok_patch", SIZE), ("lam_patch", SIZE), ("dyn_fold", row)):
        if whole % getattr(c, name):
            raise UserError(f"--{name} is {getattr(c, name)}: it must divide {whole}")


# --------------------------------------------------------------------------------------------------
# 2  Where to compute
#
# Problem: the same program should run on a laptop and on a GPU. What depends on the machine is
# chosen here, once; nothing in it changes what is learned.


def pick_device(name):
    """The torch.device that Config.device asks for. Raises UserError if this machine has none."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if name == "auto":
        name = next(n for n, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device {name}: PyTorch finds no such device here; use --device cpu")
    if name == "cuda":                                   # what stays float32 may use TF32 there
        torch.set_float32_matmul_precision("high")
    return torch.device(name)


def compute_dtype(precision, device):
    """bfloat16 if asked for, and by itself on GPUs since Ampere; else float32. (A CPU with AMX is
    2.5 times as fast in bfloat16, others far slower than in float32: there, say which.)"""
    ampere = device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    wanted = precision == "bfloat16" or (precision == "auto" and ampere)
    return torch.bfloat16 if wanted else torch.float32


def autocast(precision, device):
    """A context in which matrix products run in compute_dtype. The quantizers leave it."""
    dtype = compute_dtype(precision, device)
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


# --------------------------------------------------------------------------------------------------
# 3  Data
#
# Problem: an hour of video is 6,750 sequences of 16 frames. As float32 they fill 1.8 GB; as the
# bits they are, 55 MB. So the data stays packed in memory, one bit a pixel, and only a batch is
# unpacked. And a run must be repeatable: which sequences step i sees follows from (seed, stage, i)
# alone, so a resumed run sees just what an uninterrupted one would have.


def seeded(*numbers):
    """A torch.Generator that depends on these whole numbers alone (never on global state)."""
    state = np.random.SeedSequence(numbers).generate_state(1)[0]
    return torch.Generator().manual_seed(int(state))


class Sequences:
    """One split of a data file: S sequences of 16 binary frames, packed.

    bits (S, 16, 64, 8) uint8; start (S,) the 30 FPS index of the first frame; actions (S, 15) the
    true actions, or None. Training never reads the actions. Raises UserError on a bad file.
    """

    def __init__(self, path, split):
        loaded = files.load_split(path, split)
        self.bits, self.start, self.actions = loaded["bits"], loaded["start"], loaded["actions"]
        self.world = files.first_source(path)                           # such as "demo world"

    def __len__(self):
        return len(self.bits)

    def checksum(self):
        """Of every pixel: a run can be resumed on the video that it began on, wherever that is."""
        return zlib.crc32(self.bits)

    def frames(self, indices, first=0, length=CLIP):
        """Sequences `indices` from frame `first`: (B, length, 64, 64) uint8 of 0 and 1."""
        packed = self.bits[indices, first:first + length]
        return torch.from_numpy(np.unpackbits(packed, axis=-1))

    def draw(self, seed, stage, step, size, length):
        """What a training step sees: `size` indices, and the first frame of `length` in each.

        Drawn from (seed, stage, step). Each epoch visits every sequence once in a fresh order;
        shorter clips start anywhere.
        """
        picks, at = [], step * size
        while len(picks) < size:                          # a batch may straddle two epochs
            epoch, offset = divmod(at + len(picks), len(self))
            order = torch.randperm(len(self), generator=seeded(seed, stage, epoch))
            picks += order[offset:offset + size - len(picks)].tolist()
        late = CLIP - length
        return picks, int(torch.randint(late + 1, (1,), generator=seeded(seed, stage, step, 1)))


def spread(data, count):
    """At most `count` indices of sequences, evenly spread over a split."""
    return np.unique(np.linspace(0, len(data) - 1, min(count, len(data))).round().astype(int))


# --------------------------------------------------------------------------------------------------
# 4  ST-attention and the ST-transformer
#
# Problem: a clip has T x N = 16 x 256 = 4,096 patches, and full attention compares all pairs: 16.8
# million. But most of what decides a patch is either elsewhere in the same frame or earlier at the
# same place. So each block attends twice: over space (within a frame, N x N, T times) and over time
# (at one place, T x T, N times), then mixes channels. While T is far below N, the cost grows with
# T and not with T^2 (Genie, section 2: the ST-transformer).
#
# Time attention is causal: frame t sees frames <= t only. That does two things. It lets one pass
# train a prediction for every frame. And it makes play cheap: a past frame never changes while a
# new one is being refined, so its keys and values are kept (the cache below), not recomputed.


def rotary(positions, pairs):
    """What turns each channel pair at each position: (..., S) -> complex numbers (..., S, pairs).

    Rotary positions (Su et al. 2021): rotate each pair of channels of q and k by position times
    frequency: taken as a complex number, multiply it by e^(i angle). Then q . k depends on the
    *difference* of positions: what is learned at one place holds at every place. Frequencies run
    from pi (tells neighbours apart) to pi/16 (spans our 16 x 16 grid).
    """
    frequencies = math.pi * (1 / 16) ** (torch.arange(pairs) / max(1, pairs - 1))
    angles = positions[..., None].float() * frequencies.to(positions.device)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x, table):
    """Rotate the channel pairs (0, 1), (2, 3) ... of x (..., S, e) by a table (S, e/2)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))     # (..., S, e/2)
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Every position takes a mixture of the values of all that it may see. (M, S, D) -> the same.

    softmax(q k^T / sqrt(e)) v for each of h heads: the one piece that serves space (S = the patches
    of a frame, all visible) and time (S = the frames of a patch, the later ones hidden). `table`
    (S, e/2) holds the rotary positions.
    """

    def __init__(self, dim, heads, table, causal):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        nn.init.zeros_(self.qkv.bias)
        self.register_buffer("table", table, persistent=False)
        S = len(table)
        visible = torch.ones(S, S, dtype=torch.bool).tril() if causal else None
        self.register_buffer("visible", visible, persistent=False)      # (S, S): query sees key

    def forward(self, x, past=None, layout=None):
        """x (M, S, D); past: None, or the (k, v) of the positions before, each (M, h, S_past, e).

        Given those it takes x as the positions that follow them, and so computes just what it would
        have computed for the whole. A layout says something else than "one after the other": the
        positions (S,) of x, and which of them sees which (S, S). Returns y (M, S, D), and the
        (k, v) of all positions so far.
        """
        M, S, D = x.shape
        qkv = self.qkv(x).view(M, S, 3, self.heads, D // self.heads)
        qk, (v,) = qkv.permute(2, 0, 3, 1, 4).split([2, 1])             # v (M, h, S, e)
        begin = 0 if past is None else past[0].shape[2]                 # position of x's first
        table = self.table[begin:begin + S]
        visible = None if self.visible is None else self.visible[begin:begin + S, :begin + S]
        if layout is not None:
            table, visible = self.table[layout[0]], layout[1]
        q, k = rotate(qk, table)                                        # each (M, h, S, e)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        # One call, in which PyTorch never writes the S x S table to memory. On a CPU, forward and
        # backward, we measured it 1.2 to 1.8 times as fast for 256 x 256, 1.5 to 1.8 for 16 x 16.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)  # (M, h, S, e)
        return self.out(y.transpose(1, 2).reshape(M, S, D)), (k, v)


@torch.no_grad()
def start_on_neighbours(attention, strength=1.8):
    """Set the biases of q and k so that head 0 looks up, 1 down, 2 left, 3 right, 4 up ...

    Motion is local, so most of what a patch needs is next to it (departure; without it the LAM
    takes several times as long). With constant k = b and q = b rotated by one step, q . k peaks
    where the rotations cancel, one patch away; 1.8 puts that neighbour about 3 above the next in
    the logits. It is only a start: the biases are trained like any weight.
    """
    heads, pairs = attention.heads, attention.table.shape[1] // 2       # pairs of an axis
    bias = attention.qkv.bias.view(3, heads, 2 * pairs, 2)
    bias[1, :, :, 0] = strength                                         # k: (cos, sin) = (1, 0)
    for head in range(heads):
        step = [(-1, 0), (1, 0), (0, -1), (0, 1)][head % 4]
        back = torch.cat([rotary(torch.tensor(s), pairs) for s in step])        # (e/2,)
        bias[0, head] = strength * torch.view_as_real(back)


class STBlock(nn.Module):
    """Space, then time, then a feed-forward network; each on a normalised copy (pre-norm)."""

    def __init__(self, dim, heads, side):
        super().__init__()
        # Space: half of the channel pairs rotate with the row, the other half with the column.
        pairs = dim // heads // 4
        row, col = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
        place = torch.cat([rotary(row, pairs), rotary(col, pairs)], dim=-1)         # (N, e/2)
        self.space, self.norm_space = Attention(dim, heads, place, False), nn.LayerNorm(dim)
        start_on_neighbours(self.space)
        when = rotary(torch.arange(CLIP), dim // heads // 2)            # no clip is longer
        self.time, self.norm_time = Attention(dim, heads, when, True), nn.LayerNorm(dim)
        self.norm_ffn = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, past=None, layout=None):
        """x (B, T, N, D) -> the same, and the time attention's (k, v) for frames to come."""
        B, T, N, D = x.shape
        y, _ = self.space(self.norm_space(x).flatten(0, 1))             # (BT, N, D)
        x = x + y.view(B, T, N, D)
        y = self.norm_time(x).transpose(1, 2).flatten(0, 1)             # (BN, T, D)
        y, kept = self.time(y, past, layout)
        x = x + y.view(B, N, T, D).transpose(1, 2)
        return x + self.ffn(self.norm_ffn(x)), kept


class STTransformer(nn.Module):
    """A stack of ST-blocks. x (B, T, N, D) -> (B, T, N, D).

    It also returns what to remember of the frames so far: each block's (k, v). Given that as `past`
    with the frames that follow, it computes only those. This is exact, not an approximation: time
    attention is causal, so nothing about a past frame depends on the frame being made. A layout
    of frames goes to time attention (see there).
    """

    def __init__(self, dim, heads, layers, side):
        super().__init__()
        self.blocks = nn.ModuleList(STBlock(dim, heads, side) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x, past=None, layout=None):
        kept = []
        for i, block in enumerate(self.blocks):
            x, kv = block(x, past[i] if past else None, layout)
            kept.append(kv)
        return self.norm(x), kept


def patchify(frames, patch):
    """(B, T, H, W) -> (B, T, N, P): cut each frame into patch x patch squares, row by row."""
    B, T, H, W = frames.shape
    x = frames.view(B, T, H // patch, patch, W // patch, patch)
    return x.permute(0, 1, 2, 4, 3, 5).reshape(B, T, -1, patch * patch)


def unpatchify(x, patch):
    """(B, T, N, P) -> (B, T, H, W): the inverse of patchify, for square frames."""
    B, T, N, P = x.shape
    side = math.isqrt(N)
    x = x.view(B, T, side, side, patch, patch).permute(0, 1, 2, 4, 3, 5)
    return x.reshape(B, T, side * patch, side * patch)


# --------------------------------------------------------------------------------------------------
# 5  Vector quantizer
#
# Problem: both the tokenizer and the action model must pass through a bottleneck of a few discrete
# symbols, and "pick the nearest of K vectors" has no gradient. VQ-VAE (van den Oord et al. 2017)
# answers twice. Straight-through: going forward use the code, going backward pretend it was the
# encoder's output. Commitment: pull the encoder's outputs towards their codes, ||z - sg(code)||^2.
# The codes themselves follow the mean of the vectors that chose them, as a moving average.
#
# The classic failure is collapse: a few codes win everything and the others never move again. Two
# measures against it, both by the D^2 rule of k-means++ (pick a vector with probability in
# proportion to its squared distance from the nearest code, so a copy of a live code never wins):
# the codebook starts by k-means on encoder outputs, and a code that nobody chose for long is
# re-seeded.
#
# A codebook with codes to spare has the opposite failure: two codes share a cluster, and which one
# a patch of wall gets depends on a hair. To the tokenizer that is all one. But the dynamics model
# must predict symbols, and cannot foresee which of two names the same thing will have. So of codes
# about equally near the first is taken, always the same one, and the spare ones rest.


class VectorQuantizer(nn.Module):
    """Nearest of K codes of width L, with a moving-average codebook. Float32 throughout.

    For its first `unquantized` training steps (at least one) it lets z through unchanged; then the
    codebook starts on the encoder outputs of that moment.
    """

    def __init__(self, codes, dim, decay=0.99, dead_after=100, commitment=0.25, unquantized=0,
                 alike=0.0):
        """commitment: weight of its loss (VQ-VAE, section 3.2); decay: of the moving averages;
        dead_after: re-seed a code that no vector chose for so many steps; alike: a difference of
        squared distances that counts for nothing, as a share of the codebook's variance."""
        super().__init__()
        self.decay, self.dead_after, self.commitment = decay, dead_after, commitment
        self.unquantized, self.alike = unquantized, alike
        self.register_buffer("codebook", torch.zeros(codes, dim))       # (K, L)
        self.register_buffer("ema_count", torch.ones(codes))            # vectors that chose a code
        self.register_buffer("ema_sum", torch.zeros(codes, dim))        # and their sum
        self.register_buffer("idle", torch.zeros(codes))                # steps since last chosen
        self.register_buffer("steps", torch.tensor(0))                  # updates so far
        self.register_buffer("started", torch.tensor(False))            # codebook in use?
        self.seen = []                                  # (z, indices) of this step's micro-batches
        self.due = 0                                    # the step at which a code may next be dead

    def _apply(self, fn, recurse=True):
        """To a device: all but the two numbers that each step asks for, or it would wait there."""
        stay = {"steps": self.steps, "started": self.started}
        super()._apply(fn, recurse)._buffers.update(stay)
        return self

    def squared_distances(self, z):
        """||z - code||^2 of every pair: z (M, L) -> (M, K), never below 0."""
        d = z.pow(2).sum(1, keepdim=True) - 2 * z @ self.codebook.T + self.codebook.pow(2).sum(1)
        return d.clamp_min(0)

    def negligible(self):
        """The squared distance that is next to nothing in this codebook, a scalar."""
        return self.alike * self.codebook.var(0).sum()

    def nearest(self, z):
        """The code of each vector: z (M, L) -> (M,). Of those about as near as any, the first."""
        d = self.squared_distances(z)
        return (d <= d.min(dim=1, keepdim=True).values + self.negligible()).int().argmax(dim=1)

    def forward(self, z):
        """z (..., L) -> quantized (..., L), indices (...), commitment loss (a scalar)."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            flat = z.detach().reshape(-1, z.shape[-1])                  # (M, L)
            indices = self.nearest(flat)                                # (M,)
            if self.training:
                self.seen.append((flat, indices))
            indices = indices.view(z.shape[:-1])
            if not self.started:
                return z, indices, z.new_zeros(())
            code = self.codebook[indices]                               # (..., L)
            loss = self.commitment * F.mse_loss(z, code)
            # Straight-through: the value is the code's, the gradient goes to z as if z = code.
            return z + (code - z).detach(), indices, loss

    @torch.no_grad()
    def update(self, generator, more=None):
        """After an optimizer step: learn the codebook from all vectors seen since the last call.

        Once a step, not once a micro-batch: the codes stay put within a step, so micro-batches
        give the same result as one big batch. The codebook starts on the vectors of more(), if
        given: a batch may hold only a few dozen.
        """
        z, indices = (torch.cat(parts) for parts in zip(*self.seen))    # (M, L), (M,)
        self.seen = []
        self.steps += 1
        if not self.started:
            if self.steps >= self.unquantized:
                z = z if more is None else more()
                self.start(self.sample(z, generator), generator)
            return
        count, total = self.totals(z, indices)                          # (K,), (K, L)
        self.ema_count.mul_(self.decay).add_(count, alpha=1 - self.decay)
        self.ema_sum.mul_(self.decay).add_(total, alpha=1 - self.decay)
        moved, mean = count > 0, self.ema_sum / self.ema_count[:, None]     # (K,), (K, L)
        self.codebook.copy_(torch.where(moved[:, None], mean, self.codebook))
        self.idle.add_(1)[moved] = 0
        if self.steps >= self.due:                                      # look only when it can be
            dead = (self.idle >= self.dead_after).nonzero()[:, 0]
            if len(dead):
                self.reseed(self.sample(z, generator), dead, generator)
            self.due = self.steps.item() + self.dead_after - self.idle.max().item()

    def totals(self, z, indices):
        """How many of the vectors z (M, L) chose each code, (K,), and their sum, (K, L)."""
        chosen = F.one_hot(indices, len(self.codebook)).float()         # (M, K)
        return chosen.sum(0), chosen.T @ z

    @staticmethod
    def sample(z, generator, most=4096):
        """At most `most` of the vectors z (M, L), drawn at random."""
        return z[torch.randperm(len(z), generator=generator)[:most].to(z.device)]

    @torch.no_grad()
    def start(self, z, generator):
        """k-means: the first code is a random vector of z (M, L), the rest come by the D^2 rule
        (k-means++); then, ten times, each code moves to the mean of the vectors nearest to it.

        Without these rounds three starts in ten left two clusters to a single code (the LAM's codes
        then agreed with 84 % of the true actions, not 97), and training did not mend it.
        """
        first = torch.randint(len(z), (1,), generator=generator)
        self.codebook[:] = z[first.to(z.device)]
        self.reseed(z, torch.arange(1, len(self.codebook)), generator)
        for _ in range(10):
            count, total = self.totals(z, self.squared_distances(z).argmin(1))  # (K,), (K, L)
            moved = count > 0                                           # (K,)
            self.codebook[moved] = total[moved] / count[moved, None]
        self.ema_sum.copy_(self.codebook)                               # as if each had been chosen
        self.ema_count.fill_(1)                                         # once
        self.started.fill_(True)

    @torch.no_grad()
    def reseed(self, z, codes, generator):
        """Move each of `codes` onto a vector of z drawn by the D^2 rule (none if all are codes)."""
        for code in codes:
            # Of differences, which no GPU rounds to TF32: a copy of a live code must be known.
            distance = (z[:, None] - self.codebook).pow(2).sum(2).min(dim=1).values     # (M,)
            distance[distance < 1e-6 * z.pow(2).sum(1) + self.negligible()] = 0
            weight = distance.cpu().double()
            if not 0 < weight.sum() < math.inf:                         # none, or NaN
                return
            pick = torch.multinomial(weight, 1, generator=generator).to(z.device)
            self.codebook[code] = z[pick[0]]
            self.ema_count[code] = 1                                    # light: the mean soon leads
            self.ema_sum[code] = self.codebook[code]
            self.idle[code] = 0


# --------------------------------------------------------------------------------------------------
# 6  Video tokenizer
#
# Problem: predicting 4,096 pixels a frame is slow, and most of them say nothing new. A VQ-VAE
# compresses each 4x4 patch to one of 32 symbols: 256 symbols a frame, which the dynamics model will
# handle like words. Encoder and decoder are ST-transformers, so a token can also say what it saw in
# earlier frames (Genie, section 2.1: ST-ViViT), and never in later ones.


def pixels(frames):
    """Binary frames 0/1 of any dtype -> float -1/+1: a blank patch then still has a norm."""
    return frames.float() * 2 - 1


class VideoTokenizer(nn.Module):
    """64x64 binary frames <-> 16x16 tokens (Genie, section 2.1; the card, section 1)."""

    def __init__(self, c):
        super().__init__()
        self.patch = c.tok_patch
        side = SIZE // c.tok_patch
        shape = (c.tok_dim, c.heads, c.tok_layers, side)
        self.embed = nn.Linear(c.tok_patch ** 2, c.tok_dim)
        self.encoder = STTransformer(*shape)
        self.to_latent = nn.Linear(c.tok_dim, c.latent_dim)
        self.quantizer = VectorQuantizer(c.tok_codes, c.latent_dim, alike=0.05,
                                         unquantized=min(c.tok_unquantized, c.tok_steps // 2))
        self.from_latent = nn.Linear(c.latent_dim, c.tok_dim)
        self.decoder = STTransformer(*shape)
        self.to_pixels = nn.Linear(c.tok_dim, c.tok_patch ** 2)

    def encode(self, frames):
        """frames (B, T, H, W) -> quantized (B, T, N, L), tokens (B, T, N), commitment loss."""
        x, _ = self.encoder(self.embed(patchify(pixels(frames), self.patch)))   # (B, T, N, D)
        return self.quantizer(self.to_latent(x))

    def decode(self, quantized, past=None, layout=None):
        """quantized (B, T, N, L) -> logits (B, T, H, W) that each pixel is white, and the decoder's
        memory for frames to come (see STTransformer)."""
        x, kept = self.decoder(self.from_latent(quantized), past, layout)       # (B, T, N, D)
        return unpatchify(self.to_pixels(x), self.patch).float(), kept

    def forward(self, frames):
        """frames (B, T, H, W) -> logits (B, T, H, W), tokens (B, T, N), commitment loss."""
        quantized, tokens, commitment = self.encode(frames)
        return self.decode(quantized)[0], tokens, commitment


# --------------------------------------------------------------------------------------------------
# 7  Latent action model (LAM)
#
# Problem: the video shows what happened and not which button was pressed. So let an encoder see
# frame t and frame t+1 and pass a single code out of 8 to a decoder that sees frames up to t only
# and must draw t+1. The one thing the decoder lacks is what changed, so that is what the 3 bits
# come to hold (Genie, section 2.1). At play the LAM is not needed, but for its codebook: a person
# picks the code.
#
# But nothing makes a code mean the same everywhere: "code 3" may be a step left in one room and up
# in another, and reconstruct just as well. Genie does not say how it got consistent codes. Here,
# taken as the text has it (lam_view "frames"), all steps end in one or two codes. What does it is
# to hide from the encoder whatever is not motion, so that a consistent code is the cheapest:
#   - it sees the change between two frames, not the frames: no scenery;
#   - only changed patches count in the mean over patches: 60 of 64 that stand still drown the rest;
#   - in training it sees each clip rolled by random patches, and the decoder does not: no place;
#   - its codebook starts late, when the latents already name actions: k-means then finds them.


class LatentActionModel(nn.Module):
    """Names what happened between two frames with one of 8 codes (Genie, section 2.1)."""

    def __init__(self, c):
        super().__init__()
        self.patch, self.view = c.lam_patch, c.lam_view
        shape = (c.lam_dim, c.heads, c.lam_layers, SIZE // c.lam_patch)
        self.embed = nn.Linear(c.lam_patch ** 2, c.lam_dim)
        self.encoder = STTransformer(*shape)
        self.to_latent = nn.Linear(c.lam_dim, c.latent_dim)
        self.quantizer = VectorQuantizer(c.num_actions, c.latent_dim,
                                         unquantized=round(c.lam_unquantized * c.lam_end))
        self.embed_past = nn.Linear(c.lam_patch ** 2, c.lam_dim)
        self.from_latent = nn.Linear(c.latent_dim, c.lam_dim)
        self.decoder = STTransformer(*shape)
        self.to_pixels = nn.Linear(c.lam_dim, c.lam_patch ** 2)

    def encode(self, frames, shifts=None):
        """frames (B, T, H, W) -> quantized actions (B, T-1, L), indices (B, T-1), commitment.

        Action t says what led from frame t to t+1, and has seen no frame later than t+1. Given
        shifts (B, 2), the encoder sees each clip rolled by its own (dy, dx), in pixels.
        """
        x = pixels(frames)
        if shifts is not None:
            take = (torch.arange(SIZE, device=x.device) - shifts[..., None]) % SIZE     # (B, 2, H)
            x = x.gather(2, take[:, :1, :, None].expand_as(x))          # rows, then columns
            x = x.gather(3, take[:, 1:, None].expand_as(x))
        if self.view == "frames":                                       # as in the paper
            x, _ = self.encoder(self.embed(patchify(x, self.patch)))    # (B, T, N, D)
            return self.quantizer(self.to_latent(x[:, 1:].mean(dim=2)))     # at t+1 it has seen t+1
        change = patchify((x[:, 1:] - x[:, :-1]) / 2, self.patch)       # (B, T-1, N, P): -1, 0, 1
        moved = change.ne(0).any(dim=-1, keepdim=True)                  # (B, T-1, N, 1)
        x, _ = self.encoder(self.embed(change))                         # (B, T-1, N, D)
        x = (x * moved).sum(dim=2) / moved.sum(dim=2).clamp_min(1)      # (B, T-1, D)
        return self.quantizer(self.to_latent(x))

    def decode(self, frames, actions):
        """frames x_1..x_t (B, T-1, H, W), actions (B, T-1, L) -> logits of x_2..x_{t+1}."""
        x = self.embed_past(patchify(pixels(frames), self.patch))       # (B, T-1, N, D)
        x, _ = self.decoder(x + self.from_latent(actions)[:, :, None])  # the action, to every patch
        return unpatchify(self.to_pixels(x), self.patch).float()

    def forward(self, frames, shifts=None):
        """frames (B, T, H, W) -> logits of frames 2..T, then what encode returns."""
        actions, indices, commitment = self.encode(frames, shifts)
        return self.decode(frames[:, :-1], actions), actions, indices, commitment


# --------------------------------------------------------------------------------------------------
# 8  Dynamics model (MaskGIT)
#
# Problem: given the past and an action, draw the next frame's 256 tokens. One at a time is 256
# passes; all at once ignores that tokens depend on each other (half of the hero here, half of it
# there). MaskGIT (Chang et al. 2022) is the middle: begin with all tokens masked, predict them all,
# keep the most confident few, and repeat; ten passes, each seeing what the earlier ones decided.
# Training is a fill-in-the-blanks exercise: mask tokens at random, predict the masked ones.


CONFIDENT = 0.99                # mask_schedule adaptive: a guess of this probability need not wait;
                                # at 0.9 the hero was lost in 7 % of the frames, not 0.5 %


def gumbel(shape, generator):
    """Gumbel(0, 1) noise: argmax(logits + noise) is a sample from softmax(logits)."""
    uniform = torch.rand(shape, generator=generator, device=generator.device)
    return -(-uniform.clamp_min(1e-9).log()).log()


class DynamicsModel(nn.Module):
    """Masked-token transformer over past tokens and actions (Genie, section 2.1; the card, 3)."""

    def __init__(self, c):
        super().__init__()
        self.codes, self.mask_min = c.tok_codes, c.mask_min
        side = SIZE // c.tok_patch
        self.tokens_per_frame, self.fold = side ** 2, c.dyn_fold ** 2
        # fold x fold neighbouring tokens share a position; `order` lists the tokens by position.
        grid = torch.arange(side ** 2).view(1, 1, side, side)
        order = patchify(grid, c.dyn_fold).flatten()                    # (N,)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("unorder", order.argsort(), persistent=False)
        # One row for each code and one for "masked", for each place within a position.
        self.embed = nn.Embedding(self.fold * (c.tok_codes + 1), c.dyn_dim)
        nn.init.normal_(self.embed.weight, std=0.5)
        offsets = torch.arange(self.fold) * (c.tok_codes + 1)
        self.register_buffer("offsets", offsets, persistent=False)
        self.action = nn.Linear(c.latent_dim, c.dyn_dim, bias=False)    # no action (zeros) adds 0
        self.transformer = STTransformer(c.dyn_dim, c.heads, c.dyn_layers, side // c.dyn_fold)
        self.to_logits = nn.Linear(c.dyn_dim, self.fold * c.tok_codes)

    def forward(self, tokens, masked, actions, past=None, layout=None):
        """tokens, masked (B, T, N), actions (B, T, L) -> logits (B, T, N, K), and the transformer's
        memory for frames to come. past and layout are STTransformer's.

        actions[:, t] is the action that led *to* frame t (zeros where there was none), added to
        every position of frame t. Tokens under `masked` are not looked at.
        """
        B, T, N = tokens.shape
        x = tokens.masked_fill(masked, self.codes)[:, :, self.order]    # (B, T, N)
        x = self.embed(x.view(B, T, -1, self.fold) + self.offsets).sum(-2)      # (B, T, N/fold, D)
        x = x + self.action(actions)[:, :, None]
        x, kept = self.transformer(x, past, layout)
        x = self.to_logits(x).view(B, T, N, self.codes)                 # in the order of `order`
        return x[:, :, self.unorder].float(), kept

    def random_mask(self, B, T, generator):
        """A training mask (B, T, N): a rate in [mask_min, 1] a frame, a coin flip a token."""
        rate = self.mask_min + (1 - self.mask_min) * torch.rand(B, T, 1, generator=generator)
        return torch.rand(B, T, self.tokens_per_frame, generator=generator) < rate

    def loss(self, tokens, actions, masked):
        """Mean cross-entropy of the masked tokens of frames 2..T, in nats.

        tokens (B, T, N), actions (B, T-1, L), masked (B, T-1, N): action t led to frame t+1. At
        play, a frame is filled in after a past that is finished, so it is trained in the same way:
        each frame is there twice, finished for later frames to look back on, and masked to be
        filled in. (The paper masks the past as well: a departure.)
        """
        T = tokens.shape[1]
        logits, _ = self(torch.cat([tokens[:, :-1], tokens[:, 1:]], dim=1),     # (B, 2(T-1), N)
                         torch.cat([torch.zeros_like(masked), masked], dim=1),
                         torch.cat([F.pad(actions[:, :-1], (0, 0, 1, 0)), actions], dim=1),
                         layout=self.twice(T, tokens.device))
        target = tokens[:, 1:].masked_fill(~masked, -100)               # -100: passed over
        loss = F.cross_entropy(logits[:, T - 1:].flatten(0, 2), target.flatten(), reduction="sum")
        # By the expected number of masked tokens, not by the number drawn: so the losses of
        # micro-batches average to that of the whole batch.
        return loss / ((1 + self.mask_min) / 2 * masked.numel())

    @staticmethod
    def twice(T, device):
        """The layout of frames 1..T-1 finished, then 2..T masked: positions, and who sees whom."""
        t = torch.arange(T - 1, device=device)
        past, none = t[:, None] >= t, torch.zeros(T - 1, T - 1, dtype=torch.bool, device=device)
        seen_by_finished = torch.cat([past, none], dim=1)
        seen_by_masked = torch.cat([past, t[:, None] == t], dim=1)      # its past, and itself
        return torch.cat([t, t + 1]), torch.cat([seen_by_finished, seen_by_masked])

    @torch.no_grad()
    def sample(self, past, action, c, generator):
        """Draw the frame that follows a past (see forward). action (B, L) -> tokens (B, N).

        Each pass samples every masked token and commits some for good, as `to_commit` says.
        """
        B, N = len(action), self.tokens_per_frame
        tokens = torch.zeros(B, 1, N, dtype=torch.long, device=action.device)
        masked = torch.ones_like(tokens, dtype=torch.bool)
        if action.device.type != "cpu":                                 # it draws for itself
            seed = torch.randint(2 ** 31, (1,), generator=generator).item()
            generator = torch.Generator(action.device).manual_seed(seed)
        for step in range(c.maskgit_steps):
            logits, _ = self(tokens, masked, action[:, None], past)     # (B, 1, N, K)
            noise = gumbel(logits.shape, generator)
            guess = (logits + c.temperature * noise).argmax(dim=-1)     # (B, 1, N)
            confidence = logits.log_softmax(-1).gather(-1, guess[..., None])[..., 0]
            commit = self.to_commit(confidence, masked, (step + 1) / c.maskgit_steps, c, generator)
            tokens = torch.where(commit, guess, tokens)
            masked = masked & ~commit
            if not masked.any():                                        # all are committed
                break
        return tokens[:, 0]

    def to_commit(self, confidence, masked, progress, c, generator):
        """Which tokens a pass commits, (B, 1, N). confidence (B, 1, N): its log-probability.

        cosine: the surest; how many stay masked falls along a cosine, slowly at first (MaskGIT,
        section 3.2). adaptive: all that are surer than CONFIDENT, and of the doubtful ones a single
        one, for the others to go by. Either way the last pass commits what is left.
        """
        noise = gumbel(confidence.shape, generator)
        order = confidence + c.order_noise * (1 - progress) * noise
        if c.mask_schedule == "adaptive" and progress < 1:
            confident = confidence > math.log(CONFIDENT)
            one = order.masked_fill(confident | ~masked, -torch.inf).argmax(-1, keepdim=True)
            return confident.scatter(-1, one, True) & masked
        N = confidence.shape[-1]
        stay = math.floor(N * math.cos(math.pi / 2 * progress))
        first = order.masked_fill(~masked, torch.inf).topk(N - stay).indices  # with those of before
        return torch.zeros_like(masked).scatter(-1, first, True) & masked


# --------------------------------------------------------------------------------------------------
# 9  Genie: the three joined, and played
#
# Problem: to play, the parts must meet in the right order: tokenize the first frame once; then, for
# each press of a button, look the action up in the LAM's codebook, sample the next frame's tokens,
# remember them, and decode them to pixels. That is the card's inference pipeline, in `step`.


@dataclass
class PlayState:
    """What play remembers of the last frames: tokens, actions, and what was computed from them."""
    tokens: torch.Tensor        # (B, T, N)
    actions: torch.Tensor       # (B, T, L); the first is 0: what led there is forgotten
    dynamics: list              # the memory of the dynamics model: (k, v) of each block
    decoder: list               # and of the tokenizer's decoder


class Genie(nn.Module):
    """Video tokenizer, latent action model and dynamics model, built from one Config."""

    def __init__(self, config):
        super().__init__()
        check_config(config)
        self.config = config
        self.tokenizer = VideoTokenizer(config)
        self.lam = LatentActionModel(config)
        self.dynamics = DynamicsModel(config)
        self.generator = seeded(config.seed)           # for a player who brings none

    @property
    def device(self):
        return self.tokenizer.quantizer.codebook.device

    def watch(self, frames):
        """What the LAM makes of real clips (B, T, H, W): logits of frames 2..T, latents (B, T-1, L)
        and codes (B, T-1) of the steps between.

        It was trained on clips of dyn_frames. So of longer ones it sees the first so many frames,
        and then every step with only so many frames before it.
        """
        n, (B, T) = self.config.dyn_frames, frames.shape[:2]
        seen = self.lam(frames[:, :n])[:3]
        if T <= n:
            return seen
        clips = frames.unfold(1, n, 1)[:, 1:].permute(0, 1, 4, 2, 3)    # (B, T-n, n, H, W)
        newest = [x[:, -1].unflatten(0, (B, T - n)) for x in self.lam(clips.flatten(0, 1))[:3]]
        return [torch.cat(pair, dim=1) for pair in zip(seen, newest)]

    @torch.no_grad()
    def start(self, frames):
        """Begin at real frames (B, 64, 64) of 0/1, at one (64, 64), or after clips (B, T, 64, 64),
        whose actions the LAM infers. Returns a PlayState."""
        frames = torch.as_tensor(frames, device=self.device)
        frames = frames if frames.dim() == 4 else frames.view(-1, 1, SIZE, SIZE)
        frames = frames[:, 1 - self.config.dyn_frames:]                 # what it may remember
        actions = torch.zeros(len(frames), 1, self.config.latent_dim, device=self.device)
        if frames.shape[1] > 1:                                         # none led to frame 1
            actions = torch.cat([actions, self.lam.encode(frames)[0]], dim=1)   # (B, T, L)
        return self.remember(self.tokenizer.encode(frames)[1], actions)[1]

    @torch.no_grad()
    def remember(self, tokens, actions, state=None):
        """Take finished frames into memory, after those of `state`. tokens (B, T, N), actions
        (B, T, L). Returns the last one's pixels (B, H, W), and the state to go on from.
        """
        visible = torch.zeros_like(tokens, dtype=torch.bool)
        _, dynamics = self.dynamics(tokens, visible, actions, state and state.dynamics)
        quantized = self.tokenizer.quantizer.codebook[tokens]           # (B, T, N, L)
        logits, decoder = self.tokenizer.decode(quantized, state and state.decoder)
        if state is not None:
            tokens = torch.cat([state.tokens, tokens], dim=1)
            actions = torch.cat([state.actions, actions], dim=1)
        return (logits[:, -1] > 0).byte(), PlayState(tokens, actions, dynamics, decoder)

    def observe(self, state, tokens, action):
        """The state after one more finished frame. tokens (B, N), action (B, L) that led to it.

        Returns pixels (B, H, W) and the new state; the old one stays as it was, so the same moment
        can be played again with another action. The models were trained on clips of dyn_frames, so
        when that many are remembered the state begins anew from the newer half, the first of
        which, as in training, no action led to.
        """
        tokens, actions = tokens[:, None], action[:, None]              # (B, 1, N), (B, 1, L)
        if state.tokens.shape[1] + 1 < self.config.dyn_frames:
            return self.remember(tokens, actions, state)
        keep = self.config.dyn_frames // 2
        tokens = torch.cat([state.tokens, tokens], dim=1)[:, -keep:]
        actions = torch.cat([state.actions, actions], dim=1)[:, -keep:]
        return self.remember(tokens, F.pad(actions[:, 1:], (0, 0, 1, 0)))   # zeros for the first

    @torch.no_grad()
    def step(self, state, action, generator=None):
        """Press a button: action, one whole number below num_actions, or (B,) of them.

        Returns frames (B, 64, 64) uint8 of 0/1 (B = 1 after a start from one frame) and the next
        state. The same generator state gives the same frames; without one Genie draws from its own.
        """
        action = torch.as_tensor(action, device=self.device).expand(len(state.tokens))
        latent = self.lam.quantizer.codebook[action]                    # (B, L)
        generator = generator or self.generator
        with autocast(self.config.precision, self.device):
            tokens = self.dynamics.sample(state.dynamics, latent, self.config, generator)
            return self.observe(state, tokens, latent)

    def rollout(self, first, actions, generator):
        """Play actions (B, T) from a start (see there): the T generated frames (B, T, 64, 64)."""
        state, frames = self.start(first), []
        for t in range(actions.shape[1]):
            frame, state = self.step(state, actions[:, t], generator)
            frames.append(frame)
        return torch.stack(frames, dim=1)

    @staticmethod
    def load(path):
        """A trained Genie, ready to play, from a checkpoint file. Raises UserError."""
        from extras.checkpoints import newest_checkpoint
        checkpoint, _ = newest_checkpoint(path)
        genie = Genie(checkpoint["config"])
        genie.load_state_dict(checkpoint["model"])
        genie.trained_on = checkpoint["data"]
        return genie.eval()


# --------------------------------------------------------------------------------------------------
# 10  Training, stages 1 and 2
#
# Problem: three models, two of which need the third to be finished. So stage 1 trains the tokenizer
# alone. Stage 2 freezes it, and trains LAM and dynamics side by side: the LAM on pixels by its own
# reconstruction, the dynamics on tokens, taking its actions from the LAM with a stop-gradient. The
# LAM may be done sooner (lam_steps); the dynamics then goes on alone, with the actions as they are.
#
# The optimizer is AdamW. But one clip a step makes noisy gradients, so the dynamics' matrices take
# steps by Muon (extras/muon.py), which listens to all directions of a gradient alike.
#
# Everything random in step i follows from (seed, stage, i), and a checkpoint holds weights,
# optimizer and position, so that a resumed run goes on exactly as if it had never stopped.
#
# `ranks` (extras/ranks.py) is for many processes, which share each batch and take the same step.
# With a single one RANK is 0, RANKS is 1, and its functions do nothing.

STAGES = ("tokenizer", "world")


def learning_rate(step, total, c):
    """Linear warm-up, then a cosine from lr to min_lr over the rest of the stage."""
    warm = min(1.0, (step + 1) / max(1, c.warmup))
    progress = max(0, step - c.warmup) / max(1, total - c.warmup)
    return warm * (c.min_lr + (c.lr - c.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1, progress))))


def tokenizer_losses(genie, frames):
    """Stage 1: draw each pixel again. frames (B, T, H, W) -> loss, numbers to log, codes chosen."""
    logits, tokens, commitment = genie.tokenizer(frames)
    pixel = F.binary_cross_entropy_with_logits(logits, frames.float())
    return pixel + commitment, {"pixel_loss": pixel, "commitment": commitment}, tokens


def quiet_level(data):
    """The number of changed pixels that 9 in 10 steps of a split exceed: where little happens."""
    frames = data.frames(spread(data, 256))
    changed = (frames[:, 1:] != frames[:, :-1]).sum((-2, -1)).float()   # (S, T-1)
    return changed.quantile(0.1).item()


def world_noise(genie, frames, quiet, generator):
    """What is random in a stage-2 step: shifts (B, 2), source (B, T-1), luck (B, num_actions),
    masked (B, T-1, N).

    Drawn at once for the whole batch, so that cutting it into micro-batches changes none of them.
    Shifts go by whole patches of the tokenizer: rolled by any number of pixels, the LAM's patches
    look 64 ways instead of 4, and when its codebook starts it cannot name the actions yet.
    Source says where the dynamics takes each step's action from: t is step t of the clip, T-1 the
    code that luck picks. Most take their own. But a hero that is blocked stays, so the LAM calls a
    press against a wall "nothing", and a press that is blocked is never seen. So where quiet steps
    begin, in which at most `quiet` pixels change, the first often takes the last real action, as if
    the button had been held on to; or any code, as often as it occurs, if none is known. In half
    of the clips so do the steps that follow it, since a button may be held for long; not in all, or
    who rests would be taken to go on resting, whatever is pressed.
    """
    c, (B, T) = genie.config, frames.shape[:2]
    patches = torch.randint(SIZE // c.tok_patch, (B, 2), generator=generator)
    shifts = c.tok_patch * patches * (c.lam_view == "change")           # in pixels
    still = (frames[:, 1:] != frames[:, :-1]).sum((-2, -1)) <= quiet    # (B, T-1)
    begins = still.int().diff(dim=1, prepend=torch.zeros(B, 1, dtype=torch.int)) > 0
    own = torch.arange(T - 1).expand(B, T - 1)
    other = own.masked_fill(still, -1).cummax(1).values % T             # the last real one; or luck
    held = torch.rand(B, 1, generator=generator) < 0.5                  # (B, 1): for all of a rest
    luck = torch.empty(B, c.num_actions).exponential_(generator=generator)
    take = (begins | still & held) & (torch.rand(B, T - 1, generator=generator) < c.action_noise)
    take &= bool(genie.lam.quantizer.started)                           # before that, no codes
    masked = genie.dynamics.random_mask(B, T - 1, generator)
    return shifts, torch.where(take, other, own), luck, masked


def world_losses(genie, frames, shifts, source, luck, masked):
    """Stage 2: the LAM redraws the next frame, the dynamics model fills in masked tokens."""
    with torch.no_grad():                                               # the tokenizer is frozen
        tokens = genie.tokenizer.encode(frames)[1]                      # (B, T, N)
    logits, actions, chosen, commitment = genie.lam(frames, shifts)
    pixel = F.binary_cross_entropy_with_logits(logits, frames[:, 1:].float())
    # Stop-gradient: the dynamics takes the actions as they are, each from its source. Of waiting
    # times at rates p, the shortest is code k's with a probability in proportion to p[k].
    usual = (genie.lam.quantizer.ema_count / luck).argmax(1, keepdim=True)      # (B, 1)
    choices = torch.cat([actions.detach(), genie.lam.quantizer.codebook[usual]], dim=1)
    actions = choices.gather(1, source[..., None].expand_as(actions))   # (B, T-1, L)
    dynamics = genie.dynamics.loss(tokens, actions, masked)
    numbers = {"pixel_loss": pixel, "commitment": commitment, "dynamics_loss": dynamics}
    return pixel + commitment + dynamics, numbers, chosen


def code_use(indices, codes):
    """(how many codes occur, perplexity): exp of the entropy, the number of codes in even use."""
    share = torch.bincount(indices.flatten().cpu(), minlength=codes).double() / indices.numel()
    entropy = -(share[share > 0] * share[share > 0].log()).sum()
    return int((share > 0).sum()), float(entropy.exp())


class Trainer:
    """One run: both stages, with log, validation, pictures, checkpoints and resume."""

    LOG_EVERY = 50                                       # steps between log lines
    EXPLODED = 1000.0                                    # no loss is that large and still learning

    def __init__(self, config, data, out):
        if config.batch % ranks.RANKS:
            raise UserError(f"--batch {config.batch} cannot be cut into {ranks.RANKS} equal slices:"
                            " choose a multiple of the number of processes")
        self.c, self.data, self.out = config, str(data), Path(out)
        self.device = pick_device(config.device)
        self.train_set, self.val_set = Sequences(data, "train"), Sequences(data, "val")
        self.quiet = quiet_level(self.train_set)
        with torch.random.fork_rng(devices=[]):          # torch.nn draws from the global generator:
            torch.manual_seed(config.seed)               # lend it our seed, then put it back
            self.genie = Genie(config).to(self.device)
        self.log, self.saved = RunLog(self.out), None    # saved: see save_checkpoint
        self.stop = 0                                    # the signal to stop, or 0
        self.enter_stage(0)

    def enter_stage(self, stage):
        """Begin a stage: which models train, and an optimizer of their own."""
        genie = self.genie.eval()
        self.stage, self.step = stage, 0
        self.models = ([genie.tokenizer], [genie.lam, genie.dynamics], [])[stage]
        self.totals = ([self.c.tok_steps], [self.c.lam_end, self.c.dyn_steps], [0])[stage]
        self.total = self.totals[-1]                     # steps; the LAM may take fewer
        groups = [{"params": list(model.parameters())} for model in self.models]
        matrices = [p for p in genie.dynamics.transformer.parameters() if p.dim() == 2]
        self.optimizer = groups and Muon(                # AdamW, but Muon for these matrices
            groups, matrices, fused=True, betas=(0.9, self.c.beta2), weight_decay=1e-4)
        self.losses = (tokenizer_losses, world_losses, None)[stage]
        if self.models:
            self.micro = self.c.micro_batch
            if self.micro == 0:                          # auto
                from extras.bench import fitting_micro_batch
                self.micro = fitting_micro_batch(self)

    def run(self):
        """Train from wherever the run stands to its end. Returns False if asked to stop."""
        while self.stage < len(STAGES):
            stopped = self.train_stage()
            if stopped:
                self.stop = stopped                      # perhaps another rank was asked
                if ranks.RANK == 0:
                    self.save()
                return False
            self.enter_stage(self.stage + 1)
            if ranks.RANK == 0:
                self.save()
        return True

    def train_stage(self):
        """The loop of one stage: step, log, now and then validate and save. True if stopped."""
        began, first, stop = time.monotonic(), self.step, ranks.largest(self.stop, self.device)
        while self.step < self.total and not stop:
            step = self.step + 1
            validating = step % self.c.val_every == 0 or step == self.total
            logging = validating or step % self.LOG_EVERY == 0 or step == 5
            row = {"stage": STAGES[self.stage], "step": step, **self.optimizer_step(logging)}
            self.step = step
            stop = ranks.largest(self.stop, self.device)
            if ranks.RANK > 0:
                continue                                 # rank 0 validates, logs and saves
            if validating:
                row.update(self.validate())
            if logging:
                self.log.add(row, self.total, self.c.batch,
                             (time.monotonic() - began) / (self.step - first))
            if validating:
                self.save()
        return stop

    def micro_batches(self, generator):
        """What this step learns from: a list of micro-batches, each a tuple of tensors.

        With many ranks this one's slice of the batch. All of them draw what is random for the whole
        batch, so that neither ranks nor micro-batches change any of it.
        """
        c, share = self.c, self.c.batch // ranks.RANKS
        length = (CLIP, c.dyn_frames)[self.stage]
        picks, first = self.train_set.draw(c.seed, self.stage, self.step, c.batch, length)
        frames = self.train_set.frames(picks, first, length)            # (batch, T, H, W)
        mine = slice(ranks.RANK * share, (ranks.RANK + 1) * share)
        inputs = [frames[mine]]
        if self.stage == 1:
            noise = world_noise(self.genie, frames, self.quiet, generator)
            inputs += [whole[mine] for whole in noise]
        return list(zip(*(t.split(self.micro) for t in inputs)))

    def forward(self, part):
        """The losses of one micro-batch, in the precision that suits the device."""
        cuda = self.device.type == "cuda"                # which copies pinned memory by itself
        part = [t.pin_memory() for t in part] if cuda else part
        with autocast(self.c.precision, self.device):
            return self.losses(self.genie, *(t.to(self.device, non_blocking=cuda) for t in part))

    def optimizer_step(self, log=True):
        """One optimizer step on c.batch sequences, in micro-batches. Returns numbers to log, if
        asked for: to look at a number is to wait until a GPU has done all before it."""
        c, quantizer = self.c, self.models[0].quantizer  # the tokenizer's, or the LAM's
        learning = [m for m, steps in zip(self.models, self.totals) if self.step < steps]
        for model in self.models:
            model.train(model in learning).requires_grad_(model in learning)
        generator, numbers, codes = seeded(c.seed, self.stage, self.step, 2), {}, []
        for part in self.micro_batches(generator):
            loss, logged, chosen = self.forward(part)
            share = len(chosen) / c.batch
            (loss * share).backward()
            codes.append(chosen)
            for name, value in logged.items():
                numbers[name] = numbers.get(name, 0.0) + value.detach() * share
        ranks.sum_over([p.grad for m in learning for p in m.parameters()]
                       + list(numbers.values()))
        norms = [nn.utils.clip_grad_norm_(m.parameters(), 1.0) for m in learning]
        for group, total in zip(self.optimizer.param_groups, self.totals):
            group["lr"] = lr = learning_rate(self.step, total, c)
        if log:
            numbers, norms = {n: v.item() for n, v in numbers.items()}, [n.item() for n in norms]
            self.check_health(sum(numbers.values()), sum(norms))
            numbers = {"lr": lr, "grad_norm": max(norms), **numbers}
        self.optimizer.step()
        self.optimizer.zero_grad()
        if log and quantizer.started:
            codes = ranks.gather(torch.cat(codes))
            numbers["codes_used"], numbers["perplexity"] = code_use(codes, len(quantizer.codebook))
        if quantizer.training:
            quantizer.seen = [[ranks.gather(torch.cat(x)) for x in zip(*quantizer.seen)]]
            quantizer.update(generator, lambda: ranks.of_rank_0(self.latents()))
        return numbers if log else {}

    def check_health(self, loss, norm):
        """Raise UserError if a step's numbers have run away. A healthy loss is a few nats; NaN
        fails both comparisons."""
        if not (loss < self.EXPLODED and norm < math.inf):
            raise UserError(
                f"training broke down by step {self.step + 1} of stage {STAGES[self.stage]}: loss"
                f" {loss:.4g}, gradient norm {norm:.4g}; try a lower --lr, a longer --warmup or"
                f" --precision float32 with another --out ({self.out} keeps its last good"
                " checkpoint)")

    @torch.no_grad()
    def latents(self):
        """Encoder outputs (M, L) of sequences from all over the training set: a sample for the
        codebook to start on. 256 of them hold 3,840 actions, a batch of pairs only 32."""
        genie, some = self.genie.eval(), spread(self.train_set, 256)
        work = (lambda x, _: (genie.tokenizer.encode(x)[0],), lambda x, _: (genie.watch(x)[1],))
        z, = over_batches(genie, self.train_set, some, work[self.stage])
        return z.flatten(0, -2).to(self.device)

    @torch.no_grad()
    def validate(self):
        """Measure on the val split, draw a picture, and complain loudly about a collapse.

        A codebook that has not started yet is judged as if it did now, so that trouble shows early.
        """
        from extras.window import draw_reconstruction, draw_rollout
        genie, some = self.genie.eval(), spread(self.val_set, self.c.val_sequences)
        quantizer, generator = self.models[0].quantizer, seeded(self.c.seed)
        before = copy.deepcopy(quantizer.state_dict())
        if not quantizer.started:
            quantizer.start(quantizer.sample(self.latents(), generator), generator)
        if self.stage == 0:
            result = evaluate_tokenizer(genie, self.val_set, some)
            self.log.unless_held(draw_reconstruction, genie, self.val_set, some,
                                 self.out / "reconstruction.png")
        else:
            result = evaluate_lam(genie, self.val_set, some)
            result["dynamics_loss"], shuffled = self.validation_loss(some)
            result["action_ratio"] = shuffled / result["dynamics_loss"]
            self.log.unless_held(draw_rollout, genie, self.val_set, some, self.out / "rollout.png")
        quantizer.load_state_dict(before)
        for trouble in troubles(result, self.stage, self.step / self.total):
            print(f"!! {trouble}", flush=True)
        result = {"val_" + name: value for name, value in result.items() if value is not None}
        return {name: result[name] for name in COLUMNS if name in result}

    def validation_loss(self, some):
        """The dynamics model's loss on the val split, with the same masks every time: with each
        clip's own actions, and with those of another clip. If it costs the same, the dynamics
        ignores its buttons."""
        def work(x, i):
            x = x[:, :self.c.dyn_frames]
            masked = self.genie.dynamics.random_mask(*x[:, 1:].shape[:2], seeded(i)).to(x.device)
            tokens, actions = self.genie.tokenizer.encode(x)[1], self.genie.lam.encode(x)[0]
            return [self.genie.dynamics.loss(tokens, a, masked)[None]
                    for a in (actions, actions.roll(1, 0))]
        return [loss.mean().item() for loss in over_batches(self.genie, self.val_set, some, work)]

    def save(self):
        """Write a checkpoint: all that a resumed run or play needs. Raises UserError on NaN."""
        from extras.checkpoints import finite, save_checkpoint
        if not finite(self.genie.state_dict().values()):
            raise UserError(f"the weights hold NaN or infinity at step {self.step}: not saved;"
                            f" {self.out} keeps its last good checkpoint; try a lower --lr")
        moments = self.optimizer.state_dict()["state"] if self.models else {}
        self.saved = save_checkpoint(self.out / CHECKPOINT, self.genie.state_dict(), moments, {
            "version": VERSION, "config": dataclasses.asdict(self.c), "data": self.data,
            "data_checksum": self.train_set.checksum(), "stage": self.stage, "step": self.step,
            "rows": self.log.rows}, self.saved)

    def resume(self, checkpoint):
        """Take up a run where its checkpoint stands. Raises UserError.

        Of the optimizer it takes the moments; the settings are those of the config.
        """
        from extras.checkpoints import moments_fit
        if checkpoint["data_checksum"] != self.train_set.checksum():
            raise UserError(f"{self.data} is not the video that this run began on: name that one"
                            " with --data, or start another run with another --out")
        self.genie.load_state_dict(checkpoint["model"])
        self.enter_stage(checkpoint["stage"])
        self.step, self.log.rows = checkpoint["step"], checkpoint["rows"]
        if self.models:
            moments = checkpoint["optimizer"]
            if not moments_fit(moments, self.optimizer):
                raise UserError("the optimizer's state in the checkpoint does not fit its models:"
                                " train again")
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})


# --------------------------------------------------------------------------------------------------
# 11  Evaluation
#
# Problem: a falling loss proves little. A tokenizer may ignore most codes; a LAM may copy the last
# frame; a dynamics model may ignore its actions. So each is measured against what it must beat:
# the LAM against copying, the actions against the true ones (where known), and the dynamics against
# itself with other actions. delta_psnr (Genie, section 3: "Delta_t PSNR") is how much closer to the
# video it gets with the inferred actions than with random ones; the null, which repeats the
# inferred actions with another seed, tells how much of that could be luck.


def over_batches(genie, data, indices, work, size=32):
    """work(x, i) on each batch x (B, 16, 64, 64) of the sequences; its tensors joined over all."""
    parts = []
    with autocast(genie.config.precision, genie.device):
        for i in range(0, len(indices), size):
            parts.append(work(data.frames(indices[i:i + size]).to(genie.device), i))
    return [torch.cat(tensors).cpu() for tensors in zip(*parts)]


def errors(a, b):
    """Count of differing pixels of each frame: (..., H, W) of 0/1 twice -> (...) float."""
    return (a != b).sum((-2, -1)).float()


@torch.no_grad()
def evaluate_tokenizer(genie, data, indices):
    """Reconstruction and code use: wrong_pixels, iou (of the white pixels), codes, perplexity.

    wrong_pixels_p99 is what one frame in a hundred exceeds. A good mean can hide that the
    tokenizer has no symbols for a rare position of the hero, who then vanishes there in play.
    flicker: symbols a frame that change where no pixel does, which nobody can foresee.
    """
    def work(x, _):
        logits, tokens, _ = genie.tokenizer(x)
        return x, (logits > 0).byte(), tokens

    x, drawn, tokens = over_batches(genie, data, indices, work)
    used, perplexity = code_use(tokens, genie.config.tok_codes)
    missed = errors(x, drawn)                                           # (S, T)
    patches = patchify(x, genie.tokenizer.patch)                        # (S, T, N, P)
    still = (patches[:, 1:] == patches[:, :-1]).all(-1)                 # (S, T-1, N)
    flicker = still & (tokens[:, 1:] != tokens[:, :-1])
    return {"wrong_pixels": missed.mean().item(),
            "wrong_pixels_p99": np.percentile(missed, 99).item(),
            "iou": ((x & drawn).sum() / (x | drawn).sum().clamp_min(1)).item(),
            "codes_used": used, "perplexity": perplexity,
            "flicker": flicker.sum(-1).float().mean().item()}


def compare_actions(latent, true):
    """How well latent actions (M,) name true ones (M,): nmi, accuracy, accuracy of a guess.

    accuracy maps each latent action to the true one it most often goes with. nmi is the mutual
    information over the mean of the two entropies: 1 = the same partition, 0 = unrelated.
    """
    joint = np.zeros((int(latent.max()) + 1, int(true.max()) + 1))
    np.add.at(joint, (latent, true), 1 / len(latent))
    rows, columns = joint.sum(1), joint.sum(0)

    def entropy(p):
        return -(p[p > 0] * np.log(p[p > 0])).sum()

    information = entropy(rows) + entropy(columns) - entropy(joint.ravel())
    information = max(0.0, information)                 # which rounding may take just below 0
    mean = (entropy(rows) + entropy(columns)) / 2
    return {"nmi": float(information / mean) if mean > 0 else 0.0,
            "accuracy": float(joint.max(1).sum()), "accuracy_chance": float(columns.max())}


@torch.no_grad()
def evaluate_lam(genie, data, indices):
    """The LAM against copying the last frame, and its codes against the true actions if known."""
    def work(x, _):
        logits, _, latent = genie.watch(x)
        return errors(logits > 0, x[:, 1:]), errors(x[:, :-1], x[:, 1:]), latent

    missed, copied, latent = over_batches(genie, data, indices, work)   # each (S, 15)
    used, perplexity = code_use(latent, genie.config.num_actions)
    result = {"wrong_pixels": missed.mean().item(), "copy_wrong_pixels": copied.mean().item(),
              "actions_used": used, "perplexity": perplexity,
              "nmi": None, "accuracy": None, "accuracy_chance": None}
    if data.actions is not None:
        result.update(compare_actions(latent.numpy().ravel(), data.actions[indices].ravel()))
    return result


def psnr(wrong_pixels):
    """Peak signal-to-noise ratio in dB of binary frames; their MSE is the share of wrong pixels.
    None wrong counts as a thousandth of one: 66 dB."""
    return -10 * math.log10(max(wrong_pixels, 1e-3) / SIZE ** 2)


@torch.no_grad()
def one_step(genie, frames, actions, generator):
    """Predict each next frame from the real past. (B, T, H, W), (B, T-1) -> (B, T-1, H, W)."""
    tokens, real = genie.tokenizer.encode(frames)[1], genie.watch(frames)[1]
    state, made = genie.start(frames[:, 0]), []
    for t in range(actions.shape[1]):
        made.append(genie.step(state, actions[:, t], generator)[0])     # the new state is dropped:
        _, state = genie.observe(state, tokens[:, t + 1], real[:, t])   # what really came goes in
    return torch.stack(made, dim=1)


@torch.no_grad()
def evaluate_dynamics(genie, data, indices, seed=0, t=4):
    """Of the t-th generated frame psnr_inferred, psnr_random, delta_psnr, delta_psnr_null and
    delta_psnr_marginal; one step ahead wrong_pixels_inferred, _random and _copy; and
    rollout_wrong_pixels and rollout_wrong_pixels_copy, {"4", "8", "15"}, after so many steps.

    Random actions are drawn in two ways: evenly from the codes in use (psnr_random; what dead codes
    do was never trained, and says nothing), and as often as they occur (delta_psnr_marginal).
    """
    (chosen,) = over_batches(genie, data, indices, lambda x, _: (genie.watch(x)[2],))
    marginal = torch.bincount(chosen.flatten(), minlength=genie.config.num_actions).float()

    def work(x, i):
        """Wrong pixels of a batch: 4 rollouts (B, 15 or t), 2 one-step runs, and copying the frame
        before or the first (B, 15)."""
        inferred = genie.watch(x)[2]                                    # (B, 15)
        draw = [torch.multinomial(weights, inferred.numel(), True, generator=seeded(seed, i))
                for weights in ((marginal > 0).float(), marginal)]
        uniform, usual = (picks.view_as(inferred).to(inferred.device) for picks in draw)
        plans = (inferred, inferred[:, :t], uniform[:, :t], usual[:, :t])
        rolled = [errors(genie.rollout(x[:, 0], actions, seeded(seed, i, k)),
                        x[:, 1:actions.shape[1] + 1]) for k, actions in enumerate(plans)]
        single = [errors(one_step(genie, x, actions, seeded(seed, i, 9)), x[:, 1:])
                  for actions in (inferred, uniform)]
        return *rolled, *single, errors(x[:, :-1], x[:, 1:]), errors(x[:, :1], x[:, 1:])

    rolled, null, uniform, usual, *single, still = over_batches(genie, data, indices, work)
    best, null, uniform, usual = (psnr(w[:, t - 1].mean().item())
                                  for w in (rolled, null, uniform, usual))
    names = ("wrong_pixels_inferred", "wrong_pixels_random", "wrong_pixels_copy")
    return {"psnr_inferred": best, "psnr_random": uniform, "delta_psnr": best - uniform,
            "delta_psnr_null": best - null, "delta_psnr_marginal": best - usual,
            **{name: w.mean().item() for name, w in zip(names, single)},
            "rollout_wrong_pixels": {str(n): rolled[:, n - 1].mean().item() for n in (4, 8, 15)},
            "rollout_wrong_pixels_copy": {str(n): still[:, n - 1].mean().item()
                                          for n in (4, 8, 15)}}


def evaluate(genie, data, count):
    """Everything that `eval --json` reports, as nested dicts (extras/MEASUREMENTS.md has a key)."""
    from extras.dreams import evaluate_world
    genie.eval()
    indices = spread(data, count)
    return {"tokenizer": evaluate_tokenizer(genie, data, indices),
            "lam": evaluate_lam(genie, data, indices),
            "dynamics": evaluate_dynamics(genie, data, indices),
            "world": evaluate_world(genie, data, indices)}


def print_table(result):
    """The evaluation for a person to read; extras/MEASUREMENTS.md says what each one must beat."""
    for part, numbers in result.items():
        for name, value in numbers.items():
            text = f"{value:.3f}" if isinstance(value, float) else str(value)
            print(f"  {part:10} {name:22} {text:>8}")
    best, null = (result["dynamics"][name] for name in ("psnr_inferred", "delta_psnr_null"))
    if max(best, best - null) > psnr(0) - 1:
        files.warn("without a wrong pixel psnr is set to 66 dB: its deltas say little")


# --------------------------------------------------------------------------------------------------
# 12  Commands
#
# Problem: training is to be one command, which needs no flags, and no mistake of the user's is to
# end in a traceback. extras/command_line.py makes the flags, one for each field of Config; play and
# bench stand in extras/window.py and extras/bench.py.


def write_json(result, path):
    with files.written_whole(path) as file:
        file.write((json.dumps(result, indent=2) + "\n").encode())


def train(args):
    """`train`: both stages, from nothing or from a checkpoint, then an evaluation."""
    from extras.command_line import prepare
    from extras.window import draw_buttons
    ranks.join()
    trainer = prepare(args)
    c, out, genie = trainer.c, trainer.out, trainer.genie
    out.mkdir(parents=True, exist_ok=True)
    if ranks.RANK == 0:
        files.sweep(out)
        if not args.resume:
            trainer.save()                               # so that it can be resumed from step 0 on
    print(f"preset {c.preset} on {trainer.device}, data {trainer.data}, run in {out}\nparameters: "
          + ", ".join(f"{name} {sum(p.numel() for p in part.parameters()):,}"
                      for name, part in genie.named_children())
          + f"\nsteps: {c.tok_steps:,} for the tokenizer, then {c.dyn_steps:,} for the world (LAM"
          " and dynamics); the time each stage needs is measured as it runs (ETA)", flush=True)
    if c.preset == "smoke":
        print("smoke is a rehearsal: it learns next to nothing, whatever it warns of", flush=True)
    with files.stopped_by_signals(trainer):
        finished = trainer.run()
        ranks.wait()                                     # torchrun ends all when the first one ends
    if not finished:
        print(f'stopped and saved; go on with: python genie_mini.py train --resume --out "{out}"')
        return 128 + trainer.stop                        # 130 after Ctrl-C, 143 after SIGTERM
    if ranks.RANK > 0:
        return 0
    test = Sequences(trainer.data, "test")
    result = evaluate(genie, test, c.val_sequences)
    write_json(result, out / "eval.json")
    draw_buttons(genie, test.frames(spread(test, c.val_sequences))[:, 0], out / "buttons.png")
    print(f"\non at most {c.val_sequences} sequences of the test split ({out / 'eval.json'}):")
    print_table(result)
    print(f"\nLook at rollout.png, buttons.png and losses.png in {out}; then play it:\n"
          f'    python genie_mini.py play --run "{out}"')
    return 0


def eval_command(args):
    """`eval`: measure a run on one split, as a table, JSON and pictures."""
    from extras.command_line import find_data, load_run
    from extras.window import draw_buttons, draw_rollout
    if args.count < 1:
        raise UserError(f"--count is {args.count}: evaluate at least 1 sequence")
    for path, suffix in ((args.json, ".json"), (args.figure, ".png"), (args.clips, ".png")):
        if path is not None:
            files.check_output(path, (suffix,), args.force)
    genie = load_run(args)
    data = Sequences(find_data(args.data, genie.trained_on), args.split)
    if args.count < 32:
        files.warn(f"{args.count} sequences are few: delta_psnr may be off by several dB")
    result = evaluate(genie, data, args.count)
    print_table(result)
    if args.json is not None:
        write_json(result, args.json)
    if args.figure is not None:
        draw_buttons(genie, data.frames(spread(data, args.count))[:, 0], args.figure)
    if args.clips is not None:
        draw_rollout(genie, data, spread(data, args.count), args.clips)


def main(argv=None):
    """Run one command. Returns the exit status: 0, 2 for a mistake of the user's or a lack of disk
    or memory, 130 when interrupted (143 by SIGTERM)."""
    from extras.command_line import build_parser
    try:
        args = build_parser().parse(argv)
        return args.function(args) or 0
    except (UserError, OSError) as error:                # OSError: a full disk, no permission
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:         # torch's own kind is a RuntimeError
        if isinstance(error, RuntimeError) and "ried to allocate" not in str(error):
            raise
        print("error: out of memory; try a smaller --micro_batch or --preset", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    import genie_mini                           # the module that extras/ import, not a second copy
    files.run(genie_mini.main)
