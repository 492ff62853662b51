"""The tests of what only a GPU shows, on a pretend one (extras/pretend.py)."""

import numpy as np
import pytest
import torch

import genie_mini
from extras import bench, checkpoints, dreams, window
from extras.pretend import pretend
from extras.testing import must_fail, mutant, random_frames, tiny, tiny_genie, tiny_trainer


@pytest.fixture
def gpu(monkeypatch):
    """A pretend GPU, in use."""
    with pretend(monkeypatch) as gpu:
        yield gpu


@pytest.mark.parametrize("stage", [0, 1])
def test_a_training_step_never_waits_for_the_gpu(stage, demo_file, tmp_path, gpu, gm=genie_mini):
    """Failing means that a training step mixes tensors of two devices, or that Python looks at a
    number which the GPU has yet to compute: the GPU is then idle while the next step is prepared.

    A step that is logged may wait, and one in which a codebook starts or a code may be dead.
    """
    trainer = tiny_trainer(gm, demo_file, tmp_path, stage, device="cuda", precision="bfloat16",
                           action_noise=0.8, batch=4, micro_batch=2)
    for trainer.step in range(3):                        # the codebook starts
        numbers = trainer.optimizer_step()
    assert numbers["codes_used"] > 0 and gpu.waits
    gpu.waits.clear()
    for trainer.step in range(3, 6):
        assert trainer.optimizer_step(log=False) == {}
    assert not gpu.waits
    trainer.genie.eval()
    assert stage == 0 or trainer.validation_loss([0, 1])
    trainer.save()
    trainer.resume(checkpoints.read_checkpoint(tmp_path / gm.CHECKPOINT))
    trainer.optimizer_step()


def test_play_and_evaluation_on_a_gpu(demo_file, gpu, gm=genie_mini):
    """Failing means that play or evaluation mixes tensors of two devices, or draws on the host what
    the GPU could draw: 32 x 256 x 32 numbers in each pass."""
    genie = tiny_genie(gm, precision="bfloat16", dyn_frames=4).to("cuda")
    assert genie.tokenizer.embed.weight.device.type == "cuda"
    state = genie.start(random_frames(2))
    gpu.waits.clear()
    for button in range(5):                              # past a new beginning of the memory
        frames, state = genie.step(state, button, gm.seeded(0))
    assert frames.device.type == "cuda"
    assert {what for _, what in gpu.waits} <= {"__bool__", "tensor", "to", "__getitem__"}
    frames, state = genie.observe(state, state.tokens[:, -1], state.actions[:, -1])
    data, some = gm.Sequences(demo_file, "val"), np.arange(2)
    for result in (gm.evaluate_tokenizer(genie, data, some), gm.evaluate_lam(genie, data, some),
                   gm.evaluate_dynamics(genie, data, some)):
        assert all(value is not None for value in result.values())
    dreams.evaluate_world(genie, data, some, steps=8)
    window.button_motion(genie, data.frames(some)[:, 0])
    assert window.sketch(genie, genie.start(data.frames([0, 1])[0, :2][None])).device.type == "cuda"


def test_bench_on_a_gpu(gpu, monkeypatch, gm=genie_mini, bench=bench):
    """Failing means that bench stops with an error on a GPU, or that the baseline, which takes
    twice the memory of our step, is given micro-batches of the same size."""
    monkeypatch.setattr(bench, "matrix_product", lambda *_: (lambda: None, 1))
    sizes, forward = [], gm.Trainer.forward
    monkeypatch.setattr(gm.Trainer, "forward", lambda trainer, part: sizes.append(
        (trainer.c.precision, len(part[0]))) or forward(trainer, part))
    config = tiny(gm, device="cuda", precision="bfloat16", batch=8, micro_batch=8)
    bench.bench_training(config, torch.device("cuda"))
    assert {size for precision, size in sizes if precision == "float32"} == {2}
    bench.bench_play(config, torch.device("cuda"))


GPU_BUGS = [
    ("a tensor made on the host", "t = torch.arange(T - 1, device=device)",
     "t = torch.arange(T - 1)", test_a_training_step_never_waits_for_the_gpu, {"stage": 1}),
    ("a step looks at its loss", "(loss * share).backward()",
     "(loss * share).backward(), loss.item()", test_a_training_step_never_waits_for_the_gpu,
     {"stage": 0}),
    ("a mask chooses elements", "target = tokens[:, 1:].masked_fill(~masked, -100)",
     "target = tokens[:, 1:].clone(); target[~masked] = target[~masked] * 0 - 100",
     test_a_training_step_never_waits_for_the_gpu, {"stage": 1}),
    ("the codebook's state on the GPU", "._buffers.update(stay)", "",
     test_a_training_step_never_waits_for_the_gpu, {"stage": 0}),
    ("copies that wait", ".to(self.device, non_blocking=cuda)", ".to(self.device)",
     test_a_training_step_never_waits_for_the_gpu, {"stage": 0}),
    ("a mask drawn on the host", "masked = torch.ones_like(tokens, dtype=torch.bool)\n        if",
     "masked = torch.ones(tokens.shape, dtype=torch.bool)\n        if",
     test_play_and_evaluation_on_a_gpu, {}),
    ("noise drawn on the host", "generator = torch.Generator(action.device).manual_seed(seed)",
     "pass", test_play_and_evaluation_on_a_gpu, {}),
    ("a mask of validation on the host", "seeded(i)).to(x.device)", "seeded(i))",
     test_a_training_step_never_waits_for_the_gpu, {"stage": 1}),
]


@pytest.mark.parametrize("old, new, test, arguments", [bug[1:] for bug in GPU_BUGS],
                         ids=[bug[0] for bug in GPU_BUGS])
def test_planted_bug_on_the_gpu_is_caught(old, new, test, arguments, request):
    """Failing means that a bug like this one, which no CPU minds, would pass all tests."""
    must_fail(test, request, **arguments, gm=mutant(old, new))
