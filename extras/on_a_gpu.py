"""The first hour of a GPU, in minutes: is it sound, how fast is it, and does `full` learn there?

    python extras/on_a_gpu.py look                     doctor, speeds, memory, 20 steps of each stage
    python extras/on_a_gpu.py learn --minutes 8        as many steps of `full` as the time holds

Nothing of this has run on a GPU yet. Both take flags of `train` for a rehearsal on a CPU, such as
--device cpu --preset smoke. Results are in runs/gpu: look.json, eval.json, metrics.csv, pictures.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import genie_mini                                       # noqa: E402 (after the path is known)

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


def learn(minutes, batch, flags):
    """Train for about that long: a fifth of it the tokenizer. Small batches, since many steps teach
    more than few large ones; warm-up and learning rate scaled to the steps there are."""
    speed = json.loads((OUT / "look.json").read_text())["train"]
    steps = [max(20, int(60 * minutes * share * speed[stage]["sequences_per_s"] / batch))
             for stage, share in (("tokenizer", 0.2), ("world", 0.8))]
    run("train", "--out", OUT / "learn", "--tok_steps", steps[0], "--dyn_steps", steps[1],
        "--tok_unquantized", steps[0] // 5, "--lam_steps", steps[1] * 3 // 5, "--batch", batch,
        "--micro_batch", batch, "--lr", 3e-4, "--min_lr", 3e-5, "--warmup", min(steps) // 20,
        "--beta2", 0.99, "--val_every", max(steps) // 8, *flags)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("look", "learn"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--batch", type=int, default=8)
    args, rest = parser.parse_known_args()
    rest = rest if "--preset" in rest else ["--preset", "full", *rest]
    if args.part == "look":
        look(rest)
    else:
        learn(args.minutes, args.batch, rest)
