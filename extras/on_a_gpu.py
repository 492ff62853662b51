"""A GPU's first minutes: is it sound, how fast is it, and does `full` learn there?

    python extras/on_a_gpu.py look                     bench, then 20 steps of each stage
    python extras/on_a_gpu.py learn --minutes 5        as many steps of `full` as the time holds

Both take flags of `train`, for a rehearsal on a CPU: --device cpu --preset smoke. Results are in
runs/gpu. MEASUREMENTS.md has what came of it on one H200.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import genie_mini                                       # noqa: E402 (after the path is known)
from extras import bench, command_line                  # noqa: E402

OUT = Path("runs/gpu")


def run(*words):
    """One command of genie_mini.py; ends the script where that fails."""
    print("$ genie_mini.py", *words, flush=True)
    status = genie_mini.main([str(word) for word in words])
    if status:
        sys.exit(status)


def look(flags):
    """Bench, then both stages for 20 steps, validations and evaluation included."""
    OUT.mkdir(parents=True, exist_ok=True)
    run("bench", "--json", OUT / "look.json", "--force", *flags)
    run("train", "--out", OUT / "look", "--tok_steps", 20, "--dyn_steps", 20, "--val_every", 20,
        "--val_sequences", 8, *flags)


def learn(minutes, flags):
    """Train for about that long, evaluation aside. A GPU takes 8 clips in hardly more time than
    one, and many steps teach more than a few large ones; a high learning rate, as in `laptop`."""
    words = ["--batch", "8", "--micro_batch", "8", "--lr", "1e-3", "--min_lr", "1e-4",
             "--warmup", "100", "--beta2", "0.99", "--tok_steps", "400", "--lam_steps", "800"]
    args = command_line.build_parser().parse_args(["train", *words, *flags])
    trainer = bench.stage_trainer(command_line.make_config(args), 1)
    trainer.totals[0] = 0                               # the LAM is done: most steps are such
    seconds = float(bench.timed(lambda: trainer.optimizer_step(False), repeats=10).mean())
    left = 60 * minutes - 400 * seconds - 800 * 1.5 * seconds
    steps = 800 + max(20, int(left / seconds))
    print(f"{seconds:.4f} s a step without the LAM: {steps} steps of stage 2", flush=True)
    began = time.monotonic()
    run("train", "--out", OUT / "learn", "--dyn_steps", steps, "--val_every", steps // 5, *words,
        *flags)
    print(f"trained and evaluated in {(time.monotonic() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("look", "learn"))
    parser.add_argument("--minutes", type=float, default=5.0)
    args, rest = parser.parse_known_args()
    rest = rest if "--preset" in rest else ["--preset", "full", *rest]
    if args.part == "look":
        look(rest)
    else:
        learn(args.minutes, rest)
