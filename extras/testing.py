"""What the tests share: videos that number their frames, tiny models, and planted bugs."""

import inspect
import types
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import genie_mini

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


X264 = {"preset": "ultrafast", "crf": "8", "bf": "2"}


def encode(path, pictures, times, rate=30, codec="libx264", time_base=Fraction(1, 90000)):
    """Encode grey pictures (H, W) at exact presentation times (s)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = pictures[0].shape
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = time_base
        if codec == "libx264":
            stream.options = X264
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


# ==================================================================================================
# The model: genie_mini.py
# ==================================================================================================

# --- helpers: small models, small batches -----------------------------------------------------


ROOT = Path(genie_mini.__file__).parent


def measurements():
    """What extras/MEASUREMENTS.md says."""
    return (ROOT / "extras" / "MEASUREMENTS.md").read_text("utf-8")


def tiny(gm, **changes):
    """A Config so small that a training step takes milliseconds: 4x4 patches of 16x16 pixels."""
    values = dict(
        device="cpu", precision="float32", heads=2, tok_patch=16, tok_dim=16, tok_layers=1,
        tok_codes=8, tok_unquantized=2, lam_patch=16, lam_dim=16, lam_layers=1,
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


def must_fail(test, request, **arguments):
    """Run a test by hand, its fixtures and these arguments given. It must fail, as something in it
    is broken."""
    for name, parameter in inspect.signature(test).parameters.items():
        if name not in arguments and parameter.default is parameter.empty:
            arguments[name] = request.getfixturevalue(name)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test(**arguments)
    assert test.__doc__.startswith("Failing means"), "pytest shows it: it must say what to look at"
