"""kfac-jax's own optimiser with the settings of its own MNIST autoencoder, from FOLDER/start.npz.

    pip install kfac-jax==0.0.8 "jax[cpu]==0.7.2"      # in an environment of its own
    python benchmarks/peers/autoencoder_kfac_jax.py FOLDER

Adaptive learning rate, momentum and damping; damping starts at 150, inverses every 5 steps, 5 burn-in passes,
statistics with decay 0.95. Writes FOLDER/kfac_jax.jsonl by default, in the form of autoencoder_kronfac.py.
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


def main() -> None:
    """Train, and write a line for each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--inverse-every", type=int, default=5)
    parser.add_argument("--burn-in", type=int, default=5)
    parser.add_argument("--damping", type=float, default=150.0, help="initial damping")
    parser.add_argument("--out", default="kfac_jax.jsonl")
    options = parser.parse_args()
    start = np.load(options.folder / "start.npz")
    images = start["images"].astype(np.float32) / 255
    count = sum(name.startswith("weight") for name in start.files)
    params = [{"w": jnp.asarray(start[f"weight{i}"].T), "b": jnp.asarray(start[f"bias{i}"])} for i in range(count)]
    linear = {count // 2 - 1, count - 1}

    def logits(params, x):
        for i, layer in enumerate(params):
            x = x @ layer["w"] + layer["b"]
            x = x if i in linear else jax.nn.sigmoid(x)
        return x

    def loss(params, batch):
        z = logits(params, batch)
        kfac_jax.register_multi_bernoulli_predictive_distribution(z, batch)
        entropy = jnp.mean(jnp.sum(jnp.maximum(z, 0) - z * batch + jnp.log1p(jnp.exp(-jnp.abs(z))), axis=-1))
        return entropy + 0.5 * DECAY * sum(jnp.sum(p**2) for p in jax.tree_util.tree_leaves(params))

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
    def error(params, x):
        return jnp.sum((jax.nn.sigmoid(logits(params, x)) - x) ** 2)

    edges = [0, *np.cumsum(start["sizes"]).tolist()]
    batches = [images[start["order"][a:b]] for a, b in pairwise(edges)]
    key = jax.random.PRNGKey(0)
    state = optimizer.init(params, key, batches[0])
    with open(options.folder / options.out, "w") as file:
        for step, batch in enumerate(batches):
            batch = jnp.asarray(batch)
            key, sub = jax.random.split(key)
            begin = time.perf_counter()
            result = optimizer.step(params, state, sub, data_iterator=iter([batch] * 100), global_step_int=step)
            params, state, stats = result[0], result[1], result[-1]
            jax.block_until_ready(params)
            seconds = time.perf_counter() - begin
            record = {"step": step, "loss": float(stats["loss"]), "seconds": seconds, "batch": len(batch)}
            if step % 20 == 19 or step == 0:
                parts = [images[i : i + 5000] for i in range(0, len(images), 5000)]
                record["squared_error"] = float(sum(error(params, part) for part in parts)) / len(images)
            for name in ("damping", "learning_rate", "momentum"):
                if name in stats:
                    record[name] = float(stats[name])
            file.write(json.dumps(record) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
