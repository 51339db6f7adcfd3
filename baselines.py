"""Other flows on the same network and the same solvers: each is a Denoiser with coefficients of
its own, since any Gaussian path x_t = alpha x + std eps, in the variables x_t / alpha and
z = std / alpha, has the flow dx/dlog z = x - xhat of D = inf."""
import pfgm

METHODS = dict(pfgm=None, pfgmpp=pfgm.Denoiser)


def as_flow(net, args):
    """The network as net(x, z[, labels]) -> (v_x, v_z) of the method that args say."""
    method = METHODS[args['method']]
    return net if method is None else method(net, args['D'], args['sigma_data'])
