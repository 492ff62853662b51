"""How fast is this machine at it: the command `genie_mini.py bench`.

"Fast" means little across machines. So bench also measures what this machine can do at all (a large
matrix product), and gives each speed as a share of that, or as a ratio of two ways measured side by
side. Float operations are counted, not timed: that is exact, and free of noise.
"""

import contextlib
import dataclasses
import io
import json
import math
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import genie_mini as gm
from extras import files, ranks, worlds
from extras.command_line import make_config


def timed(*works, repeats=5):
    """Seconds (repeats, works) of each work(), after a round to warm up.

    They take turns, so that whatever else the machine does slows all of them alike.
    """
    rows = []
    for _ in range(repeats + 1):
        rows.append([])
        for work in works:
            began = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            elif torch.backends.mps.is_available():
                torch.mps.synchronize()
            rows[-1].append(time.perf_counter() - began)
    return np.array(rows[1:])


def written_out(work):
    """work(), with attention as matrix products and a softmax: as small codebases have it."""
    with sdpa_kernel(SDPBackend.MATH):
        return work()


def count_flops(work):
    """Float operations of work(). Written out, since the counter overlooks fused CPU attention."""
    with FlopCounterMode(display=False) as counter:
        written_out(work)
    return counter.get_total_flops()


def matrix_product(dtype, device):
    """What a machine does best, and the measure of all else: a work(), and its float operations.

    Four products in a row: one is over so soon that it tells the machine's mood of that moment.
    A GPU needs large ones to show what it can.
    """
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    return lambda: [a @ b for _ in range(4)], 4 * 2 * side ** 3


def rates(name, amount, flops, seconds, peak):
    """How fast: {name: amount a second, its range, float operations, their share of the peak}.

    The peak, float operations a second, is that of the same round: where cores are shared, it
    comes and goes.
    """
    share = np.median(flops / seconds / peak)
    return {name: amount / np.median(seconds),
            name + "_range": [amount / max(seconds), amount / min(seconds)],
            "gflop": flops / amount / 1e9, "mfu": float(share)}


def stage_trainer(config, stage):
    """A Trainer on a few sequences of the demo world, whose step is a single micro-batch."""
    c = dataclasses.replace(config, tok_unquantized=0, lam_unquantized=0)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        data = Path(folder) / "demo.npz"
        worlds.write_demo(data, minutes=0.08)
        trainer = gm.Trainer(c, data, folder)
        trainer.enter_stage(stage)
    c.batch = min(trainer.micro, c.batch)
    trainer.optimizer_step()                             # the codebook starts
    return trainer


def bench_training(config, device):
    """Speed of a training step of each stage, its share of the GEMM peak, and its lead over the
    baseline: the same step with attention written out in float32, as small codebases have it, and
    in four micro-batches, since that takes twice the memory."""
    result, dtype = {}, gm.compute_dtype(config.precision, device)
    for stage, name in enumerate(gm.STAGES):
        trainer = stage_trainer(config, stage)
        c, quarter = trainer.c, math.ceil(trainer.c.batch / 4)

        def step():
            trainer.optimizer_step(log=False)

        def baseline():
            c.precision, trainer.micro = "float32", quarter
            written_out(step)
            c.precision, trainer.micro = config.precision, c.batch

        product, its_flops = matrix_product(dtype, device)
        theirs, ours, its_seconds = timed(baseline, step, product).T
        trainer.micro = quarter                          # to count is to write out attention, too
        result[name] = {**rates("sequences_per_s", c.batch, count_flops(step), ours,
                                its_flops / its_seconds),
                        "speedup_over_baseline": float(np.median(theirs / ours)),
                        "micro_batch": c.batch}
    return result


@torch.no_grad()
def bench_play(config, device):
    """Frames a second with and without the cache, over all the steps from one new beginning of the
    memory to the next (see Genie.observe), since the last of them costs more than the others.

    Without the cache each of the MaskGIT passes computes the whole clip again. All passes are
    taken, with any mask_schedule: this untrained model is sure of nothing.
    """
    genie, T = gm.Genie(config).to(device).eval(), config.dyn_frames
    tokens = torch.randint(config.tok_codes, (1, T, genie.dynamics.tokens_per_frame), device=device)
    masked = torch.zeros_like(tokens, dtype=torch.bool)
    masked[:, -1] = True
    actions = torch.randn(1, T, config.latent_dim, device=device)
    lengths = range(T // 2 + 1, T + 1)                                  # of the clip, new frame too
    _, begun = genie.remember(tokens[:, :T // 2], actions[:, :T // 2])

    def cached():
        state = begun
        for _ in lengths:
            _, state = genie.step(state, 0, gm.seeded(0))

    def uncached():
        with gm.autocast(config.precision, device):
            for n in lengths:
                for _ in range(config.maskgit_steps):
                    genie.dynamics(tokens[:, -n:], masked[:, -n:], actions[:, -n:])
                genie.tokenizer.decode(genie.tokenizer.quantizer.codebook[tokens[:, -n:]])

    dtype, frames = gm.compute_dtype(config.precision, device), len(lengths)
    product, its_flops = matrix_product(dtype, device)
    slow, fast, its_seconds = timed(uncached, cached, product, repeats=3).T
    peak = its_flops / its_seconds
    again = rates("fps_uncached", frames, count_flops(uncached), slow, peak)
    _, state = genie.remember(tokens[:, :-1], actions[:, :-1])          # in float32
    whole = genie.dynamics(tokens, masked, actions)[0][:, -1:]
    last, _ = genie.dynamics(tokens[:, -1:], masked[:, -1:], actions[:, -1:], state.dynamics)
    return {**rates("fps", frames, count_flops(cached), fast, peak),
            "fps_uncached": again["fps_uncached"], "mfu_uncached": again["mfu"],
            "speedup": float(np.median(slow) / np.median(fast)),
            "max_abs_diff": (last - whole).abs().max().item()}


def doctor(device):
    """Is this installation sound? On `device`, in float32, a small tokenizer must draw what it
    draws on the CPU, and 20 steps must halve its loss on one batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = gm.VideoTokenizer(gm.Config(**gm.PRESETS["smoke"])).eval()
    frames = torch.from_numpy(files.unpack(worlds.render_demo(1, 0)[0][:, :4]))
    expected = tokenizer(frames)[0]                                     # (3, 4, 64, 64)
    tokenizer, frames, losses = tokenizer.to(device), frames.to(device), []
    differs = (tokenizer(frames)[0].cpu() - expected).abs().max().item()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=1e-2)
    for _ in range(20):
        loss = F.binary_cross_entropy_with_logits(tokenizer(frames)[0], frames.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"ok": losses[-1] < losses[0] / 2 and differs < 0.01, "loss_first": losses[0],
            "loss_last": losses[-1], "max_abs_diff_cpu": differs}


def peak_memory(device):
    """Peak memory so far in GiB, the GPU's or the process's; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    try:
        import resource                                                 # not on Windows
    except ImportError:
        return None
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20             # it counts bytes, or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def saved_bytes(work):
    """Bytes that autograd keeps between work() and its backward pass: what a larger batch costs."""
    kept = {}                                            # by address: many tensors are views

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        work()
    return sum(storage.nbytes() for storage in kept.values())


MEMORY_BUDGET = 8 * 2 ** 30     # bytes for micro_batch auto without CUDA: half of a 16 GB laptop


def fitting_micro_batch(trainer):
    """As large a micro-batch as fits, in parts as even as can be; measured on one sequence.

    A quarter of what autograd keeps is added for what comes and goes: we counted 1.07 times in
    `full`, and measured 1.2 on an H200.
    """
    trainer.micro, free = 1, MEMORY_BUDGET / ranks.RANKS
    part = trainer.micro_batches(gm.seeded(0))[0]
    need = 1.25 * saved_bytes(lambda: trainer.forward(part))
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
        weights = sum(p.numel() for p in trainer.genie.parameters())
        free = torch.cuda.mem_get_info()[0] - 16 * weights              # see bench_memory
    share = trainer.c.batch // ranks.RANKS
    size = math.ceil(share / math.ceil(share * need / free))
    print(f"micro-batches of {size}: {need / 2 ** 30:.2f} GiB a sequence", flush=True)
    return size


def bench_memory(config):
    """Print the memory of a step of each stage: the peak so far, and what a GPU would need.

    The latter is predicted: what autograd keeps in bfloat16 with fused kernels, and 16 bytes a
    weight (itself, its gradient, AdamW's two averages; Muon keeps one).
    """
    print("| stage | micro-batch | peak | predicted for a GPU |\n| --- | --- | --- | --- |")
    for stage, name in enumerate(gm.STAGES):
        trainer = stage_trainer(config, stage)
        peak, trainer.c.precision = peak_memory(trainer.device) or math.nan, "bfloat16"
        part = trainer.micro_batches(gm.seeded(0))[0]
        need = saved_bytes(lambda: trainer.forward(part))
        need += 16 * sum(p.numel() for p in trainer.genie.parameters())
        print(f"| {name} | {len(part[0])} | {peak:.2f} GiB | {need / 2 ** 30:.2f} GiB |")


def print_bench(result):
    """The speeds as a Markdown table."""
    print("| | speed | range | share of GEMM peak | compared |\n" + "| --- " * 5 + "|")
    for name, row in result["train"].items():
        low, high = row["sequences_per_s_range"]
        print(f"| {name} | {row['sequences_per_s']:.3g} sequences/s | {low:.3g} to {high:.3g} |"
              f" {row['mfu']:.0%} | {row['speedup_over_baseline']:.2f} times the baseline |")
    play = result["play"]
    low, high = play["fps_range"]
    print(f"| play | {play['fps']:.3g} frames/s | {low:.3g} to {high:.3g} | {play['mfu']:.0%} |"
          f" {play['speedup']:.2f} times no cache (which had {play['mfu_uncached']:.0%}) |")


def bench(args):
    """`bench`: training and playing speed of a preset on this machine, or what memory it takes."""
    if args.json is not None:
        files.check_output(args.json, (".json",), args.force)
    config = make_config(args)
    device = gm.pick_device(config.device)
    if args.memory:
        return bench_memory(config)
    health = doctor(device)
    print("doctor", json.dumps(health), flush=True)
    training = bench_training(config, device)
    product, its_flops = matrix_product(torch.float32, device)
    result = {"doctor": health, "train": training, "play": bench_play(config, device),
              "memory": {"peak_gib": peak_memory(device)},
              "machine": {"device": str(device), "threads": torch.get_num_threads(),
                          "gemm_gflops": its_flops / 1e9 / float(timed(product, repeats=3).min()),
                          "torch": torch.__version__, "python": platform.python_version(),
                          "system": platform.system(), "preset": config.preset}}
    print_bench(result)
    print(json.dumps(result["machine"]), json.dumps(result["memory"]))
    if args.json is not None:
        gm.write_json(result, args.json)
