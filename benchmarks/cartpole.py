"""An actor-critic on CartPole, trained by Adam and by KFAC with one likelihood for both heads.

    python benchmarks/cartpole.py [--seeds 5] [--updates 240] [--threads 1]

Sixteen carts, sixteen steps for each update, generalised advantages (discount 0.99, decay 0.95), the same network and
loss for both; rates fall to zero linearly. Adam's rate was the best of 0.003, 0.01 and 0.03 and KFAC's clip the better
of 0.001 and 0.01 on the seeds 100 and 101. Prints the mean length of the last fifty episodes against environment steps.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import kronfac as kf

CARTS, HORIZON, DISCOUNT, DECAY, CRITIC = 16, 16, 0.99, 0.95, 0.5
POINTS = 12


class CartPole:
    """Many carts with poles at once, by the equations of motion of Barto, Sutton and Anderson (1983)."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.generator = count, torch.Generator().manual_seed(seed)
        self.state, self.steps = self.start(), torch.zeros(count)

    def start(self) -> Tensor:
        """States near the middle, poles upright."""
        return 0.1 * torch.rand(self.count, 4, generator=self.generator) - 0.05

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, list[float]]:
        """Push each cart left or right: states, which have fallen, which begin anew, lengths of the ended episodes."""
        _, dx, angle, turn = self.state.unbind(1)
        push = (20.0 * action - 10.0 + 0.05 * turn**2 * angle.sin()) / 1.1
        ddangle = (9.8 * angle.sin() - angle.cos() * push) / (0.5 * (4 / 3 - 0.1 * angle.cos() ** 2 / 1.1))
        ddx = push - 0.05 * ddangle * angle.cos() / 1.1
        last = self.state + 0.02 * torch.stack([dx, ddx, turn, ddangle], 1)
        self.steps += 1
        fallen = (last[:, 0].abs() > 2.4) | (last[:, 2].abs() > math.pi / 15)
        done = fallen | (self.steps >= 500)
        lengths = self.steps[done].tolist()
        self.state = torch.where(done[:, None], self.start(), last)
        self.steps = torch.where(done, 0.0, self.steps)
        return last, fallen, done, lengths


class ActorCritic(nn.Module):
    """Logits of two actions, then a value, on one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.actor, self.critic = nn.Linear(64, 2), nn.Linear(64, 1)

    def forward(self, state: Tensor) -> Tensor:
        """Outputs ``[N, 3]`` of states ``[N, 4]``."""
        hidden = self.trunk(state)
        return torch.cat([self.actor(hidden), self.critic(hidden)], 1)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Adam, tuned."""
    return torch.optim.Adam(model.parameters(), lr=0.01)


def kfac(model: nn.Module) -> torch.optim.Optimizer:
    """KFAC with the Fisher information of both heads, and the clip as trust region."""
    likelihood = kf.likelihoods.Joint((kf.Categorical(), 2), (kf.Gaussian(), 1), weights=(1.0, CRITIC))
    return kf.optim.KFAC(model, likelihood, lr=0.3, damping=1e-2, kl_clip=1e-2, stats_every=1, invert_every=10)


def rollout(model: nn.Module, env: CartPole, lengths: list[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Play, and return states, actions, normalised advantages and returns."""
    states, actions, values, lasts, falls, ends = [], [], [], [], [], []
    with torch.no_grad():  # gathers nothing
        for _ in range(HORIZON):
            out = model(env.state)
            states.append(env.state)
            actions.append(torch.multinomial(out[:, :2].softmax(1), 1))
            values.append(out[:, 2])
            last, fallen, done, ended = env.step(actions[-1][:, 0])
            lasts.append(last)
            falls.append(fallen)
            ends.append(done)
            lengths += ended
        after = model(torch.cat(lasts))[:, 2].reshape(HORIZON, -1) * ~torch.stack(falls)
        gain, reversed_advantages = torch.zeros(env.count), []
        for t in reversed(range(HORIZON)):
            gain = 1 + DISCOUNT * after[t] - values[t] + DISCOUNT * DECAY * gain * ~ends[t]
            reversed_advantages.append(gain)
        advantages = torch.cat(reversed_advantages[::-1])
        returns = advantages + torch.cat(values)
    return torch.cat(states), torch.cat(actions), (advantages - advantages.mean()) / (advantages.std() + 1e-8), returns


def train(make: Callable[[nn.Module], torch.optim.Optimizer], seed: int, updates: int) -> tuple[list[float], float]:
    """Mean lengths at `POINTS` times of a training, and its seconds."""
    torch.manual_seed(seed)
    env, model, lengths, curve = CartPole(CARTS, seed), ActorCritic(), [], []
    optimizer = make(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 - update / updates)
    start = time.perf_counter()
    for update in range(updates):
        states, actions, advantages, returns = rollout(model, env, lengths)
        optimizer.zero_grad()
        out = model(states)
        policy = -(out[:, :2].log_softmax(1).gather(1, actions)[:, 0] * advantages).mean()
        critic = 0.5 * (out[:, 2] - returns).square().mean()
        (policy + CRITIC * critic).backward()
        if isinstance(optimizer, torch.optim.Adam):
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        if (update + 1) % (updates // POINTS) == 0:
            curve.append(statistics.mean(lengths[-50:]) if lengths else float(HORIZON))
    return curve, time.perf_counter() - start


def main() -> None:
    """Train both in turn, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=240)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs: dict[str, list[tuple[list[float], float]]] = {"Adam": [], "KFAC": []}
    for seed in range(options.seeds):
        for name, make in (("Adam", adam), ("KFAC", kfac)):
            runs[name].append(train(make, seed, options.updates))
    steps = [CARTS * HORIZON * (options.updates // POINTS) * (point + 1) for point in range(POINTS)]
    print(f"{'environment steps':18}", *(f"{step:>12,}" for step in steps), f"{'seconds':>9}")
    for name, found in runs.items():
        points = list(zip(*(curve for curve, _ in found), strict=True))
        cells = (f"{statistics.mean(p):.0f} ± {statistics.pstdev(p):.0f}" for p in points)
        print(f"{name:18}", *(f"{cell:>12}" for cell in cells), f"{statistics.mean(s for _, s in found):>9.1f}")


if __name__ == "__main__":
    main()
