"""The likelihood of a data set under a flow."""
import math

import pytest
import torch

import pfgm
from support.cli import BadInput
from support.likelihood import bits_per_dim, labels_for
from support.seeds import step_seed
from support.tests.common import F64, close, known_flow, network, seeded

CPU = torch.device('cpu')


def test_bits_per_dim__of_a_known_flow():
    pixels = torch.randint(0, 256, (6, 1, 4, 4), generator=seeded()).to(torch.uint8)
    got = bits_per_dim(known_flow(), pixels, 6, repeats=2, tol=1e-6, batch_size=64, device=CPU)
    noise = [torch.rand(1, 4, 4, generator=seeded(step_seed(0, i + repeat * 2 ** 32)), dtype=F64)
             for repeat in range(2) for i in range(6)]
    x = (pixels.repeat(2, 1, 1, 1) + torch.stack(noise)) / 128 - 1
    up = x * (50 + 2) / (1e-3 + 2)
    logp = pfgm.prior_logp(x, 2 + 1e-3) + pfgm.prior_logp(up, 50.0) - pfgm.prior_logp(up, 52.0)
    each = (7 - logp / math.log(2) / 16).view(2, 6).mean(0)
    close(got['bpd'], each.mean(), atol=1e-4)
    close(got['bpd_se'], each.std() / 6 ** 0.5, atol=1e-4)
    assert (got['n'], got['repeats']) == (6, 2)
    assert got['round_trip_mean'] <= got['round_trip_max'] < 1e-4
    one = bits_per_dim(known_flow(), pixels, 1, repeats=1, tol=1e-6, batch_size=64, device=CPU)
    assert one['bpd_se'] is None


def test_bits_per_dim__of_a_network_that_diverged():
    flow = known_flow()
    flow.net = network(lambda x, z: (x * math.nan, z))
    pixels = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(BadInput, match='--bpd: .*NaN; it has diverged'):
        bits_per_dim(flow, pixels, 2, repeats=1, tol=1e-5, batch_size=2, device=CPU)


def test_labels_for__are_those_that_the_network_knows():
    class Labelled:
        given = '--dataset a'
        name = 'a'
        labels = torch.tensor([0, 3])
        classes = ['cat', 'dog', 'fox', 'owl']

    flow = known_flow()
    assert labels_for(flow, Labelled) is None  # trained without
    flow.classes = (0, 1, 2, 3)
    flow.class_count = 4
    flow.class_names = Labelled.classes
    assert torch.equal(labels_for(flow, Labelled), Labelled.labels)
    flow.class_count = 3
    with pytest.raises(BadInput, match='labels from 0 to 3; the network knows 0 to 2; .*none'):
        labels_for(flow, Labelled)
    flow.class_names = ['cat', 'dog', 'fox', 'elk']
    with pytest.raises(BadInput, match='--dataset a: its classes are cat, .* fox, elk; .*none'):
        labels_for(flow, Labelled)
