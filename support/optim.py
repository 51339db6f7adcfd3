"""The Muon optimizer, and how the average of the weights warms up. Read it if you want to know what
--muon does; the papers train with Adam.
"""
import torch

ENDS = ('embed', 'label', 'conv_in', 'conv_out')  # the layers of a UNet that Adam moves


def orthogonal(G):
    """Bring all singular values of the matrices G (k, m, n) to between 0.7 and 1.2, by five steps
    of the quintic Newton-Schulz iteration of arXiv 2502.16982.

    A step multiplies G by a polynomial p of S = G G^T, and so S by p^2. Since all of these commute,
    the five polynomials are multiplied among themselves first: they are m x m, the smaller of the
    two squares, and G meets their product only once."""
    if G.shape[1] > G.shape[2]:
        return orthogonal(G.mT).mT
    G = G / G.flatten(1).norm(dim=1)[:, None, None].clamp_min(1e-30)
    one = torch.eye(G.shape[1], dtype=G.dtype, device=G.device)
    S = G @ G.mT
    p = 3.4445 * one - 4.775 * S + 2.0315 * S @ S
    product = p
    for _ in range(4):
        S = p @ p @ S
        p = 3.4445 * one - 4.775 * S + 2.0315 * S @ S
        product = p @ product
    return product @ G


class Muon(torch.optim.Adam):
    """Adam for the vectors of a network and for the layers at its ends. Every other weight moves
    along its averaged gradient, made orthogonal as a matrix, and as far as Adam would move it.
    Muon, arXiv 2502.16982 Eq. 4.

    ends: the names of those layers, which a network need not have."""

    def __init__(self, net, lr, fused=None, ends=ENDS):
        by_adam = []
        by_muon = []
        for name, p in net.named_parameters():
            if p.dim() < 2 or name.split('.')[0] in ends:
                by_adam.append(p)
            else:
                by_muon.append(p)
        groups = [dict(params=by_adam), dict(params=by_muon, betas=(0.95, 0.99))]
        super().__init__(groups, lr=lr, betas=(0.9, 0.99), fused=fused)

    @torch.no_grad()
    def step(self):
        by_muon = self.param_groups[1]
        lr = by_muon['lr']
        by_muon['lr'] = 0.0  # so that Adam averages their gradients, but does not move them
        super().step()
        by_muon['lr'] = lr

        moves = {}  # {shape of a matrix: {weight: its move}}, to make those of one shape at once
        for p in by_muon['params']:
            nesterov = torch.lerp(p.grad, self.state[p]['exp_avg'], 0.95)
            matrix = nesterov.reshape(len(p), -1)
            moves.setdefault(matrix.shape, {})[p] = matrix
        for shape, of_shape in moves.items():
            turned = orthogonal(torch.stack(list(of_shape.values())))
            for p, move in zip(of_shape, turned):
                p.sub_(move.view(p.shape), alpha=0.2 * max(shape) ** 0.5 * lr)


def warm_decay(step):
    """What the decay of the averaged weights is at most in this step, counted from 1, so that they
    soon forget the first weights. As the authors of PFGM and score_sde have it."""
    return (1 + step) / (10 + step)
