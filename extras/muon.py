"""Muon (Jordan et al. 2024): steps that turn a matrix in all directions alike.

One clip a step makes gradients noisy, and in those of a weight matrix a few directions drown the
rest. So Muon keeps the directions of the gradient's moving average, and makes each equally strong:
of U S V^T it takes U V^T. PyTorch's own (since 2.9) computes that in bfloat16, which takes a CPU
without such products thirteen times as long as this.
"""

import torch


@torch.no_grad()
def orthogonal(x, rounds=5):
    """Matrices (M, rows, columns) with their singular values pulled near 1: to 0.68 to 1.2, but for
    those below 0.0015 of a matrix's norm, which stay smaller.

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

    Their learning rate is `faster` times AdamW's, and a tall one's sqrt(rows / columns) times that.
    (5: of rates 0.002, 0.005 and 0.02 the second learned fastest, beside an AdamW at 0.001.)
    """

    def __init__(self, groups, matrices, momentum=0.95, faster=5, **settings):
        super().__init__(groups, **settings)
        self.momentum, self.faster, self.matrices = momentum, faster, set(matrices)

    @torch.no_grad()
    def step(self):
        group, alike = self.param_groups[-1], {}
        for p in group["params"]:
            if p in self.matrices and p.grad is not None:
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
            rate = self.faster * group["lr"]
            for p, step in zip(matrices, orthogonal(torch.stack(ahead))):
                p.mul_(1 - rate * group["weight_decay"])
                p.sub_(step, alpha=rate * max(1, shape[0] / shape[1]) ** 0.5)
        super().step()
