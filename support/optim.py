"""The Muon optimizer. Read it if you want to know what --muon does.
"""

import torch


def orthogonal(G):
    """The matrices G (k, m, n) with all singular values brought to 0.7 ... 1.2, by five steps of a
    quintic Newton-Schulz iteration, taken in G G^T, the smaller of the two squares."""
    if G.shape[1] > G.shape[2]:
        return orthogonal(G.mT).mT
    G = G / G.flatten(1).norm(dim=1)[:, None, None].clamp_min(1e-30)
    S, one = G @ G.mT, torch.eye(G.shape[1], dtype=G.dtype, device=G.device)
    turn = p = 3.4445 * one - 4.775 * S + 2.0315 * S @ S
    for _ in range(4):  # every step multiplies G by a polynomial p(S), hence S by p(S)^2
        S = p @ p @ S
        p = 3.4445 * one - 4.775 * S + 2.0315 * S @ S
        turn = p @ turn
    return turn @ G


class Muon(torch.optim.Adam):
    """Adam, but a weight of two or more dimensions inside the network moves along its averaged
    gradient made orthogonal, by as much as Adam would: Muon, arXiv 2502.16982 Eq. 4."""

    def __init__(self, net, lr, **how):
        ends = (getattr(net, name, None) for name in ('embed', 'label', 'conv_in', 'conv_out'))
        outer = {p for part in ends if part for p in part.parameters()}
        inside = [p for p in net.parameters() if p.dim() > 1 and p not in outer]
        rest = [p for p in net.parameters() if p.dim() == 1 or p in outer]
        super().__init__([dict(params=rest), dict(params=inside, betas=(0.95, 0.99))], lr=lr,
                         betas=(0.9, 0.99), **how)

    @torch.no_grad()
    def step(self):
        inside, shapes = self.param_groups[1], {}
        lr, inside['lr'] = inside['lr'], 0.0  # Adam averages the gradients, and moves nothing
        super().step()
        inside['lr'] = lr
        for p in inside['params']:
            ahead = torch.lerp(p.grad, self.state[p]['exp_avg'], 0.95).reshape(len(p), -1)
            shapes.setdefault(ahead.shape, {})[p] = ahead
        for shape, moves in shapes.items():
            for p, move in zip(moves, orthogonal(torch.stack([*moves.values()]))):
                p.sub_(move.view(p.shape), alpha=0.2 * max(shape) ** 0.5 * lr)


def update(net, ema, opt, clip, decay):
    """One step of `opt` on the clipped gradients, and of the EMA -> their norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
    opt.step()
    opt.zero_grad(set_to_none=True)
    with torch.no_grad():  # else every step would hang one more graph on the average
        torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
    return norm
