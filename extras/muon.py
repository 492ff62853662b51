"""Muon (Jordan et al. 2024): steps that turn a matrix in all directions alike.

One clip a step makes gradients noisy, and in those of a weight matrix a few directions drown the
rest. So Muon keeps the directions of the gradient's moving average, and makes each equally strong:
of U S V^T it takes U V^T. PyTorch's own (since 2.9) computes that in bfloat16, which takes a CPU
without such products twenty times as long as this.
"""

import torch


@torch.no_grad()
def orthogonal(x, rounds=5):
    """Matrices (M, rows, columns) with all their singular values pulled near 1 (0.7 to 1.2).

    A polynomial in x x^T, whose factors are those of Muon's authors: Newton and Schulz's way to do
    it without a decomposition.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT, rounds).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(rounds):
        a = x @ x.mT                                                    # (M, rows, rows)
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x


class Muon(torch.optim.AdamW):
    """AdamW, but of the last group's parameters these matrices take Muon's steps.

    The factor 0.2 sqrt(rows or columns) makes a step as large as AdamW's usually is (Liu et al.
    2025, "Muon is scalable"), so that one learning rate and one weight decay serve both.
    """

    def __init__(self, groups, matrices, momentum=0.95, **settings):
        super().__init__(groups, **settings)
        self.momentum, self.matrices = momentum, set(matrices)

    @torch.no_grad()
    def step(self):
        group, alike = self.param_groups[-1], {}
        for p in group["params"]:
            if p in self.matrices:
                alike.setdefault(p.shape, []).append(p)
        for shape, matrices in alike.items():           # those of a shape are one batch
            ahead = []
            for p in matrices:
                state = self.state[p]                   # named as AdamW's, which looks at "step"
                if not state:
                    state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p))
                state["exp_avg"].lerp_(p.grad, 1 - self.momentum)
                ahead.append(p.grad.lerp(state["exp_avg"], self.momentum))      # Nesterov's
                p.grad = None                                           # AdamW leaves it alone
            for p, step in zip(matrices, orthogonal(torch.stack(ahead))):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(step, alpha=0.2 * max(shape) ** 0.5 * group["lr"])
        super().step()
