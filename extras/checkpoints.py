"""Checkpoint files: written so that a crash loses none, and weighed before they are used.

A crash, or a full disk, can come while a checkpoint is written; and a file that somebody sends you
can claim anything. So two checkpoints are kept, each written under another name first. The format
is safetensors: numbers and a text, never code, and nothing is allocated that the file does not
hold. Nothing here learns; genie_mini.py saves, resumes and loads by it.
"""

import dataclasses
import json
import zlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from extras import files
from extras.files import UserError
from genie_mini import STAGES, VERSION, Config, Genie, check_config

# What is said beside the numbers, as JSON, and its type.
ABOUT = {"version": int, "config": dict, "data": str, "data_checksum": int, "stage": int,
         "step": int, "rows": list, "checksum": int}


def previous(path):
    """Where the checkpoint that `path` replaced is kept: checkpoint.previous.safetensors."""
    return Path(path).with_suffix(".previous.safetensors")


def checksum(tensors):
    """Of every number in {name: tensor}: disks and downloads flip bits."""
    total = 0
    for _, t in sorted(tensors.items()):
        total = zlib.crc32(t.contiguous().view(-1).view(torch.uint8).numpy(), total)
    return total


def save_checkpoint(path, model, moments, about, saved=None):
    """Write weights {name: tensor}, an optimizer's moments {i: {name: tensor}}, and what is said of
    them (ABOUT), to a temporary name; then rename, and keep the one before: however a crash or a
    full disk cuts this short, one of the two is whole.

    Returns its checksum. Given as `saved` at the next call, that tells if the file has since been
    replaced: then a second run writes to the same folder, and this one ends with a UserError.
    """
    if saved is not None and stored_checksum(path) not in (None, saved):
        raise UserError(f"another run writes to {path.parent}: give each an --out of its own")
    tensors = {f"model.{name}": t for name, t in model.items()}
    for i, moment in moments.items():
        tensors.update({f"optimizer.{i}.{name}": t for name, t in moment.items()})
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    about = {**about, "checksum": checksum(tensors)}
    with files.written_whole(path, keep=previous(path)) as file:
        file.write(save(tensors, {"genie_mini": json.dumps(about)}))
    return about["checksum"]


def stored_checksum(path):
    """The checksum that a checkpoint file states; None if it is gone or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["genie_mini"])["checksum"]
    except Exception:                                    # safetensors has several
        return None


def outlines(tensors):
    """Of {name: tensor} the shapes and dtypes, which must agree for one set to be copied onto
    another. Weights may be shared in half precision: any floating-point type fits any other."""
    return {name: (t.shape, t.is_floating_point() or t.dtype) for name, t in tensors.items()}


def finite(tensors):
    """Is every number in them one?"""
    return all(torch.isfinite(t).all() for t in tensors)


def moments_fit(moments, optimizer):
    """Is this the state of such an optimizer, {index: {step, exp_avg, exp_avg_sq}}, the last not
    for Muon's matrices?"""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def wanted(p):
        square = {} if p in optimizer.matrices else {"exp_avg_sq": p}
        return outlines({"step": torch.tensor(0.0), "exp_avg": p, **square})
    return finite(t for m in moments.values() for t in m.values()) and all(
        i in range(len(parameters)) and outlines(m) == wanted(parameters[i])
        for i, m in moments.items())


def check_contents(about, weights):
    """Judge what a checkpoint file says and holds. Returns its Config. Raises UserError."""
    if not isinstance(about, dict) or about.get("version") != VERSION:
        raise UserError(f"it is not a version-{VERSION} checkpoint of genie_mini")
    wrong = [name for name in ABOUT if type(about.get(name)) is not ABOUT[name]]
    if wrong:
        raise UserError(f"it is incomplete: {', '.join(wrong)} missing or mistyped")
    values, types = about["config"], {f.name: f.type for f in dataclasses.fields(Config)}
    if set(values) != set(types) or any(type(values[name]) is not types[name] for name in types):
        raise UserError("its config has missing, unknown or mistyped fields, so another version"
                        " wrote it")
    config = Config(**values)
    check_config(config)
    with torch.device("meta"):                                          # shapes without memory
        wanted = Genie(config).state_dict()
    if outlines(wanted) != outlines(weights):
        raise UserError("its weights do not fit its own config")
    if not finite(weights.values()):
        raise UserError("its weights hold NaN or infinity")
    if not (0 <= about["stage"] <= len(STAGES) and 0 <= about["step"] < 2**31
            and about["data"].isprintable() and all(
                isinstance(row, dict) and row.get("stage") in STAGES and "step" in row
                and all(type(v) in (int, float) and abs(v) < 1e300
                        for n, v in row.items() if n != "stage") for row in about["rows"])):
        raise UserError("its position, its log or its data's name makes no sense")
    return config


def read_checkpoint(path):
    """Read and check a checkpoint: what it says (ABOUT), with "config" as a Config, the weights as
    "model" and the optimizer's moments as "optimizer". Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint {path}: make one with python genie_mini.py"
                        " train")
    try:
        with safe_open(path, "pt") as file:              # copies: the file itself may be replaced
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            about = json.loads(file.metadata()["genie_mini"])
        if about["checksum"] != checksum(tensors):
            raise ValueError("a wrong checksum")
        parts = {"model": {}, "optimizer": {}}
        for name, t in tensors.items():
            part, rest = name.split(".", 1)
            if part == "optimizer":
                i, rest = rest.split(".")
                parts[part].setdefault(int(i), {})[rest] = t
            else:
                parts[part][rest] = t
    except Exception as error:                           # safetensors, or JSON, or a missing name
        raise UserError(f"{path} is not a checkpoint of genie_mini, or is damaged"
                        f" ({type(error).__name__}); train again or use another file") from None
    try:
        return {**about, **parts, "config": check_contents(about, parts["model"])}
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}; train again or use another file"
                        ) from None


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
