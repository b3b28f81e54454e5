"""kfac-jax's own optimiser with the settings of its own MNIST autoencoder, from FOLDER/start.npz.

    pip install kfac-jax==0.0.8 "jax[cpu]==0.7.2"      # in an environment of its own
    python benchmarks/peers/kfac_jax_side.py FOLDER

Adaptive learning rate, momentum and damping; damping starts at 150, inverses every 5 steps, 5 burn-in passes,
statistics with decay 0.95. Writes FOLDER/kfac_jax.jsonl by default, in the form of ours.py.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np

DECAY = 1e-5
EVERY = 20


def main() -> None:
    """Train, and write a line for each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--inverse-every", type=int, default=5)
    parser.add_argument("--burn-in", type=int, default=5)
    parser.add_argument("--damping", type=float, default=150.0, help="initial damping")
    parser.add_argument("--steps", type=int, default=10**9, help="stop after so many steps")
    parser.add_argument("--out", default="kfac_jax.jsonl")
    options = parser.parse_args()
    start = np.load(options.folder / "start.npz")
    layers = json.loads(str(start["layers"]))
    inputs = channels_last(start["inputs"])
    targets = start["targets"] if "targets" in start.files else inputs
    kind = str(start["likelihood"])
    params = {
        layer["name"]: {"w": kernel(start[f"{layer['name']}.weight"]), "b": jnp.asarray(start[f"{layer['name']}.bias"])}
        for layer in layers
        if layer["kind"] in ("Linear", "Conv2d")
    }

    def loss(params, batch):
        x, y = batch
        z = outputs(layers, params, x)
        if kind == "Bernoulli":
            kfac_jax.register_multi_bernoulli_predictive_distribution(z, y)
        else:
            kfac_jax.register_softmax_cross_entropy_loss(z, y)
        return mean_loss(kind, z, y) + 0.5 * DECAY * sum(jnp.sum(p**2) for p in jax.tree_util.tree_leaves(params))

    if kind not in ("Bernoulli", "Categorical"):
        raise SystemExit(f"{kind} is not written for this side")
    optimizer = kfac_jax.Optimizer(
        value_and_grad_func=jax.value_and_grad(loss),
        l2_reg=DECAY,
        value_func_has_aux=False,
        value_func_has_state=False,
        value_func_has_rng=False,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=options.damping,
        damping_adaptation_interval=5,
        damping_adaptation_decay=0.95,
        min_damping=1e-5,
        max_damping=1000.0,
        inverse_update_period=options.inverse_every,
        num_burnin_steps=options.burn_in,
        curvature_ema=0.95,
        multi_device=False,
    )

    @jax.jit
    def figures(params, x, y):
        z = outputs(layers, params, x)
        if kind == "Categorical":
            return jnp.stack([mean_loss(kind, z, y) * len(x), 100.0 * jnp.sum(jnp.argmax(z, -1) != y)])
        return jnp.stack([mean_loss(kind, z, y) * len(x), jnp.sum((jax.nn.sigmoid(z) - y) ** 2)])

    measure = "train_error" if kind == "Categorical" else "train_squared_error"
    count = int(start["evaluated"])
    edges = [0, *np.cumsum(start["sizes"]).tolist()]
    order = start["order"]
    key, state = jax.random.PRNGKey(0), None
    with open(options.folder / options.out, "w") as file:
        for step, (a, b) in enumerate(list(pairwise(edges))[: options.steps]):
            batch = jnp.asarray(inputs[order[a:b]]), jnp.asarray(targets[order[a:b]])
            key, sub = jax.random.split(key)
            if state is None:
                state = optimizer.init(params, key, batch)
            begin = time.perf_counter()
            result = optimizer.step(params, state, sub, data_iterator=iter([batch] * 100), global_step_int=step)
            params, state, stats = result[0], result[1], result[-1]
            jax.block_until_ready(params)
            seconds = time.perf_counter() - begin
            record = {"step": step + 1, "loss": float(stats["loss"]), "seconds": seconds, "batch": b - a}
            if step % EVERY == EVERY - 1 or step == 0:
                parts = [slice(i, min(i + 1000, count)) for i in range(0, count, 1000)]
                found = sum(figures(params, jnp.asarray(inputs[p]), jnp.asarray(targets[p])) for p in parts) / count
                record |= {"train_loss": float(found[0]), measure: float(found[1])}
            for name in ("damping", "learning_rate", "momentum"):
                if name in stats:
                    record[name] = float(stats[name])
            file.write(json.dumps(record) + "\n")
            file.flush()


def channels_last(images):
    """Bring ``[N, C, H, W]`` to jax's layout; flat inputs stay as they are."""
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1)) if images.ndim == 4 else images


def kernel(weight):
    """Bring torch's weights to jax's layout."""
    return jnp.asarray(weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T)


def outputs(layers, params, x):
    """Run the network."""
    for layer in layers:
        kind = layer["kind"]
        if kind == "Linear":
            x = x @ params[layer["name"]]["w"] + params[layer["name"]]["b"]
        elif kind == "Conv2d":
            padding = [(layer["padding"],) * 2] * 2
            weight, bias = params[layer["name"]]["w"], params[layer["name"]]["b"]
            x = jax.lax.conv_general_dilated(x, weight, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = x + bias[None, None, None]
        elif kind == "Sigmoid":
            x = jax.nn.sigmoid(x)
        elif kind == "ReLU":
            x = jax.nn.relu(x)
        elif kind == "Flatten":  # in torch's order of channels
            x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        else:
            x = pool(layer, x)
    return x


def pool(layer, x):
    """Pool with windows that may overhang at the far end, counting real pixels alone."""
    size, stride, width = layer["size"], layer["stride"], x.shape[1]
    wanted = -(-(width - size) // stride) + 1 if layer["overhang"] else (width - size) // stride + 1
    over = max(0, (wanted - 1) * stride + size - width)
    window, strides, padding = (1, size, size, 1), (1, stride, stride, 1), ((0, 0), (0, over), (0, over), (0, 0))
    if layer["kind"] == "MaxPool2d":
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, padding)
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, strides, padding)
    begin = stride * np.arange(wanted)
    pixels = np.minimum(begin + size, width) - begin
    return total / (pixels[:, None, None] * pixels[:, None]).astype(np.float32)


def mean_loss(kind, z, y):
    """The negative log-likelihood, averaged over examples."""
    if kind == "Categorical":
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1))
    return jnp.mean(jnp.sum(jnp.maximum(z, 0) - z * y + jnp.log1p(jnp.exp(-jnp.abs(z))), axis=-1))


if __name__ == "__main__":
    main()
