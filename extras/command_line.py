"""The flags of genie_mini.py's commands, and what they name: presets, runs, data files, devices."""

import dataclasses
import inspect
import re
from pathlib import Path

import torch

import genie_mini as gm
from extras import files, ranks, worlds
from extras.checkpoints import newest_checkpoint, previous
from extras.files import UserError

DEMO_DATA = Path("data/demo.npz")
DEMO_CHECKPOINT = Path(__file__).parent.parent / "assets" / "demo.safetensors"
PLAYING = ("maskgit_steps", "temperature", "order_noise",       # a trained run may be sampled, and
           "mask_schedule", "precision", "device")              # computed, in another way


def checkpoint_path(run):
    """The checkpoint in a run folder; without a run, the pretrained demo checkpoint."""
    if run is None:
        return DEMO_CHECKPOINT
    return Path(run) / gm.CHECKPOINT if Path(run).is_dir() else Path(run)


def load_run(args):
    """The Genie that eval or play works on, with the settings given (PLAYING). Raises UserError."""
    genie = gm.Genie.load(checkpoint_path(args.run))
    for name in PLAYING:
        if getattr(args, name) is not None:
            setattr(genie.config, name, getattr(args, name))
    gm.check_config(genie.config)
    return genie.to(gm.pick_device(genie.config.device))


def find_data(data, trained_on=None):
    """The data file named, or that of the run, or the demo world, which is rendered if need be."""
    path = Path(data or trained_on or DEMO_DATA)
    if not (data or path.exists() or path == DEMO_DATA):
        raise UserError(f"the run's data, {path}, is not there: name it by --data")
    if ranks.RANK == 0 and path == DEMO_DATA and not path.exists():
        print(f"no data named: rendering the demo world to {path}", flush=True)
        worlds.write_demo(path)
    ranks.wait()                                         # until rank 0 has rendered it
    return path


def given_fields(args):
    """The Config fields that the command line names, as a dict."""
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(gm.Config)
            if getattr(args, f.name) is not None}


def make_config(args):
    """Config from the preset and the flags given. Raises UserError."""
    cuda = torch.cuda.is_available() and args.device in (None, "auto", "cuda")
    given = {"preset": "full" if cuda else "laptop", **given_fields(args)}
    config = gm.Config(**{**gm.PRESETS.get(given["preset"], {}), **given})
    gm.check_config(config)
    return config


def prepare(args):
    """The Trainer of a new run, or of the run to resume. Raises UserError."""
    if not args.resume:
        config = make_config(args)
        out = Path(args.out or f"runs/{config.preset}")
        path = out / gm.CHECKPOINT
        if path.exists() or previous(path).exists():
            raise UserError(f"{out} already holds a run: go on with --resume --out {out}, or name"
                            " another --out")
        return gm.Trainer(config, find_data(args.data), out)
    if args.out is None:
        raise UserError("--resume needs --out runs/NAME: which run should go on?")
    path = checkpoint_path(args.out)
    checkpoint, used = newest_checkpoint(path)
    given = given_fields(args)
    for name in given:
        if name not in ("device", "precision", "micro_batch"):          # where, not what, it learns
            raise UserError(f"--{name} cannot be given with --resume: a run keeps its config; leave"
                            " the flag out, or start another run")
    config = dataclasses.replace(checkpoint["config"], **given)
    gm.check_config(config)
    trainer = gm.Trainer(config, find_data(args.data, checkpoint["data"]), args.out)
    trainer.resume(checkpoint)
    if ranks.RANK == 0 and used != path and path.exists():
        path.replace(path.with_suffix(".damaged.safetensors"))      # or it would be kept as good
    return trainer


def number_or_auto(text):
    """An argparse type: `--micro_batch auto` is 0."""
    return 0 if text == "auto" else int(text)


def add_fields(add, names):
    """A flag for each of these Config fields, with the reason for it and each preset's value."""
    source = inspect.getsource(gm.Config)
    reasons = dict(re.findall(r"^    (\w+): .*?# (.*)$", source, re.MULTILINE))
    for f in dataclasses.fields(gm.Config):
        if f.name in names:
            values = {preset: changes.get(f.name, f.default)
                      for preset, changes in gm.PRESETS.items()}
            shown = ", ".join(f"{preset} {value}" for preset, value in values.items())
            shown = shown if len(set(values.values())) > 1 else f.default
            convert = number_or_auto if f.name == "micro_batch" else f.type
            choices = gm.CHOICES.get(f.name, [f.type.__name__])
            add("--" + f.name, type=convert, metavar="|".join(choices),
                help=f"{reasons[f.name]} [{shown}]".replace("%", "%%"))


def build_parser():
    """The commands and their flags: every Config field, for eval and play those in PLAYING."""
    from extras import bench, window
    parser = files.Parser(prog="genie_mini.py", description=gm.__doc__.split("\n")[0])
    subcommands = parser.add_subparsers(dest="command", required=True)
    commands = {
        "train": (gm.train, "train both stages (bare: demo world, preset by device)"),
        "eval": (gm.eval_command, "measure a run against its baselines"),
        "play": (window.play, "press buttons, in a window or into a GIF"),
        "bench": (bench.bench, "speed and memory on this machine")}
    for name, (function, text) in commands.items():
        command = subcommands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(function=function)
    add = {name: subcommands.choices[name].add_argument for name in commands}
    for name in commands:
        add_fields(add[name], PLAYING if name in ("eval", "play") else vars(gm.Config()))
    for name in ("train", "eval", "play"):
        add[name]("--data", help=f"a data file of data_prep.py [{DEMO_DATA}, rendered if missing]")
    add["train"]("--out", help="folder of the run [runs/PRESET]")
    add["train"]("--resume", action="store_true", help="go on with the run in --out")
    for name in ("eval", "play"):
        add[name]("--run", help="folder of a run, or a checkpoint file [the pretrained demo]")
        add[name]("--split", default="test", choices=files.SPLITS, help="[test]")
    for name in ("eval", "bench"):
        add[name]("--json", help="also write the numbers to this file")
    add["bench"]("--memory", action="store_true", help="print only the memory of training steps")
    add["eval"]("--count", type=int, default=300, help="sequences to evaluate [300]")
    add["eval"]("--figure", help="also draw what each button does to this PNG")
    add["eval"]("--clips", help="also draw real and generated clips to this PNG")
    add["play"]("--image", help="start from this picture, binarised as data_prep does")
    add["play"]("--start", type=int, help="start from the first frame of this sequence [0]")
    add["play"]("--actions", help="the buttons to press, such as 0,1,1,7 [with --out: hold each]")
    add["play"]("--out", help="save a GIF instead of opening a window [with --actions: roll.gif]")
    add["play"]("--seed", type=int, default=0, help="of the sampling [0]")
    for name in ("eval", "play", "bench"):
        add[name]("--force", action="store_true", help="replace output files that exist")
    parser.commands = subcommands.choices
    return parser
