"""Checkpoint files: written so that a crash loses none, and weighed before they are used.

A crash, or a full disk, can come while a checkpoint is written; and a file that somebody sends you
can claim anything. So two checkpoints are kept, each written under another name first, and what is
read is weighed before it is used. Nothing here learns; genie_mini.py saves, resumes and loads by
it.
"""

import copy
import dataclasses
import io
import zipfile
from pathlib import Path

import torch

from extras import files
from extras.files import UserError
from genie_mini import STAGES, VERSION, Config, Genie, check_config


def previous(path):
    """Where the checkpoint that `path` replaced is kept: checkpoint.previous.pt."""
    return Path(path).with_suffix(".previous.pt")


def save_checkpoint(path, contents):
    """Write to a temporary name, then rename, and keep the one before: however a crash or a full
    disk cuts this short, one of the two is whole."""
    buffer = io.BytesIO()                   # torch.save itself hides why a file cannot be written
    torch.save(contents, buffer)
    with files.written_whole(path, keep=previous(path)) as file:
        file.write(buffer.getbuffer())


def kind(tensor):
    """What two tensors must share for one to be copied onto the other. Weights may be shared in
    half precision, so that any floating-point type fits any other."""
    return type(tensor) is torch.Tensor and (
        tensor.shape, tensor.layout, tensor.is_floating_point() or tensor.dtype)


def finite(tensors):
    """Is every number in them one? (Those on "meta" have none: a hostile file may hold such.)"""
    return all(not t.is_meta and torch.isfinite(t).all() for t in tensors)


def moments_fit(moments, parameters):
    """Is this the state of an AdamW of these parameters, {index: {step, exp_avg, exp_avg_sq}}?"""
    return isinstance(moments, dict) and all(
        i in range(len(parameters)) and isinstance(m, dict)
        and set(m) == {"step", "exp_avg", "exp_avg_sq"}
        and kind(m["step"]) == kind(torch.tensor(0.0))
        and kind(m["exp_avg"]) == kind(m["exp_avg_sq"]) == kind(parameters[i].detach())
        and finite(m.values())
        for i, m in moments.items())


def check_contents(checkpoint, size):
    """Judge what a checkpoint file of `size` bytes holds. Returns its Config. Raises UserError.

    Nothing that the file declares is built or allocated before it is known to be in the file.
    """
    types = {"version": int, "config": dict, "data": str, "data_checksum": int, "stage": int,
             "step": int, "rows": list, "model": dict, "optimizer": (dict, type(None))}
    if not isinstance(checkpoint, dict) or type(checkpoint.get("version")) is not int or (
            checkpoint["version"] != VERSION):
        raise UserError(f"it is not a version-{VERSION} checkpoint of genie_mini")
    wrong = [name for name in types if not isinstance(checkpoint.get(name), types[name])]
    if wrong:
        raise UserError(f"it is incomplete: {', '.join(wrong)} missing or mistyped")
    values, types = checkpoint["config"], {f.name: f.type for f in dataclasses.fields(Config)}
    if set(values) != set(types) or any(type(values[name]) is not types[name] for name in types):
        raise UserError("its config has missing, unknown or mistyped fields, so another version"
                        " wrote it")
    config = Config(**values)
    check_config(config)
    with torch.device("meta"):                                          # shapes without memory
        wanted = Genie(config).state_dict()
    weights = checkpoint["model"]
    if {n: kind(t) for n, t in wanted.items()} != {n: kind(t) for n, t in weights.items()} or (
            sum(t.nbytes for t in weights.values()) > size):
        raise UserError("its weights do not fit its own config")
    if not finite(weights.values()):
        raise UserError("its weights hold NaN or infinity")
    if not (0 <= checkpoint["stage"] <= len(STAGES) and checkpoint["step"] >= 0 and all(
            isinstance(row, dict) and row.get("stage") in STAGES and "step" in row
            and {type(v) for n, v in row.items() if n != "stage"} <= {int, float}
            for row in checkpoint["rows"])):
        raise UserError("its position or its log makes no sense")
    return config


def read_checkpoint(path):
    """Read and check a checkpoint: {"config": Config, "model": weights, ...}. Raises UserError.

    A file from a stranger may hold numbers and text, never code (weights_only). Sizes and checksums
    come first, since torch.load looks at neither; mmap keeps it from reading beyond the file, and
    deepcopy then brings into memory what the file really holds.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint {path}: make one with python genie_mini.py"
                        " train")
    try:
        with zipfile.ZipFile(path) as archive:
            files.check_sizes(archive)
            if archive.testzip():
                raise zipfile.BadZipFile
        checkpoint = copy.deepcopy(torch.load(str(path), map_location="cpu", weights_only=True,
                                              mmap=True))
    except Exception as error:                       # torch raises many kinds on a damaged file
        raise UserError(f"{path} is not a checkpoint of genie_mini, or is damaged"
                        f" ({type(error).__name__}); train again or use another file") from None
    try:
        checkpoint["config"] = check_contents(checkpoint, Path(path).stat().st_size)
    except (UserError, ValueError, RuntimeError) as error:     # numbers too long, types too odd
        raise UserError(f"{path} cannot be used: {error}; train again or use another file"
                        ) from None
    return checkpoint


def newest_checkpoint(path):
    """A run's checkpoint, or the one before it where that is damaged or gone; and its path."""
    try:
        return read_checkpoint(path), path
    except UserError as error:
        try:
            checkpoint = read_checkpoint(previous(path))
        except UserError:                                # nothing to fall back on
            raise error from None
        files.warn(f"{error}. Taking the one before it, {previous(path)}: stage"
                       f" {checkpoint['stage'] + 1}, step {checkpoint['step']}")
        return checkpoint, previous(path)
