"""Densify a policy while it learns to balance a pole: 70 % sparse at first, dense at the end.

    pip install resu-compile[rl]
    python examples/cartpole.py

The loop is plain REINFORCE with a learned baseline; one update is one optimizer step. After every
cycle the training pauses and the policy is judged by what it would do without chance. Takes about
half a minute.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import gymnasium
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.distributions import Categorical

import resu_compile as resu
from resu_compile.training import Cycle, Densification, Pause, TrainingConfig

LEVELS = (0.7, 0.5, 0.3, 0.1, 0.0)
DISCOUNT = 0.99
RETURN_SCALE = 1.0 / (1.0 - DISCOUNT)  # the most that discounted rewards of 1 add up to
ENTROPY = 0.01
EVALUATION_SEED = 1_000_000


class Policy(nn.Module):
    """What to do, and how much reward is to come, from position, speed, angle and its speed."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
        )
        self.action = nn.Linear(width, 2)
        self.value = nn.Linear(width, 1)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """(..., 4) -> logits of the two actions (..., 2), expected return (...)."""
        hidden = self.body(observation)
        return self.action(hidden), self.value(hidden).squeeze(-1)


@dataclass(frozen=True)
class Episodes:
    """Episodes played side by side; rows are time, columns episodes; the reward is 1 a step."""

    observations: Tensor  # (steps, episodes, 4)
    actions: Tensor  # (steps, episodes)
    running: Tensor  # (steps, episodes), False once the episode is over

    @property
    def mean_return(self) -> float:
        """Steps that the pole stood, on average; 500 is the most."""
        return self.running.sum().item() / self.running.shape[1]

    def returns(self) -> Tensor:
        """Discounted reward from each step on, in [0, 1]."""
        total = torch.zeros(self.running.shape[1])
        found = torch.empty(self.running.shape)
        for step in reversed(range(len(found))):
            total = torch.where(self.running[step], 1.0 + DISCOUNT * total, 0.0)
            found[step] = total
        return found / RETURN_SCALE


@torch.no_grad()
def play(policy: nn.Module, *, episodes: int, seed: int, greedy: bool = False) -> Episodes:
    envs = gymnasium.make_vec(
        "CartPole-v1", num_envs=episodes, vectorization_mode="vector_entry_point"
    )
    observation, _ = envs.reset(seed=seed)
    running = torch.ones(episodes, dtype=torch.bool)
    record = []
    while running.any():
        seen = torch.from_numpy(observation)
        logits, _ = policy(seen)
        action = logits.argmax(-1) if greedy else Categorical(logits=logits).sample()
        observation, _, failed, timed_out, _ = envs.step(action.numpy())
        record.append((seen, action, running))
        running = running & ~torch.from_numpy(failed | timed_out)
    envs.close()
    return Episodes(*(torch.stack(column) for column in zip(*record, strict=True)))


def policy_loss(policy: nn.Module, played: Episodes) -> Tensor:
    """REINFORCE with the value as baseline, plus the value's own error, less some entropy."""
    logits, value = policy(played.observations)
    choice = Categorical(logits=logits)
    returns = played.returns()
    advantage = (returns - value.detach())[played.running]
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-6)
    gain = (choice.log_prob(played.actions)[played.running] * advantage).mean()
    error = (value - returns)[played.running].square().mean()
    return 0.5 * error - gain - ENTROPY * choice.entropy()[played.running].mean()


def train(updates: int, episodes: int, seed: int) -> Policy:
    """Train a policy that ends dense, and print what each cycle left.

    Args:
        updates: optimizer steps.
        episodes: episodes played for each of them.
        seed: of the weights, the actions and the poles.
    """
    torch.manual_seed(seed)
    policy = Policy()
    rows: list[tuple[object, str, float]] = []

    def judge(name: object, sparsity: float) -> None:
        judged = play(policy, episodes=32, seed=EVALUATION_SEED, greedy=True)
        rows.append((name, f"{sparsity:.0%}", judged.mean_return))

    def on_pause(policy: nn.Module, cycle: int) -> None:
        judge(cycle, resu.controller(policy).sparsity)

    config = TrainingConfig(
        steps=updates,
        warmup=0.2,
        recovery=0.2,
        cycles=len(LEVELS),
        sparsity=LEVELS[-1],
        densify=Densification(
            mode="stepped",
            levels=LEVELS,
            pauses=tuple(Pause(cycle, reason="evaluate") for cycle in range(len(LEVELS))),
        ),
        compile=False,  # the policy is too small to gain by it
        seed=seed,
    )
    judge("untrained", 0.0)
    cycle = Cycle(policy, config, on_pause=on_pause).start()
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    while not cycle.done:
        played = play(policy, episodes=episodes, seed=seed * updates + cycle.step_index)
        optimizer.zero_grad()
        policy_loss(policy, played).backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        cycle.step()
    cycle.finish()  # nothing is pruned any more: the policy is a plain module again
    judge("end", 0.0)
    print(tabulate(rows, headers=("cycle", "sparsity", "mean return"), floatfmt=".1f"))
    return policy


def main(arguments: list[str] | None = None) -> Policy:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--updates", type=int, default=150, help="optimizer steps")
    parser.add_argument("--episodes", type=int, default=16, help="episodes for each of them")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    return train(options.updates, options.episodes, options.seed)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the layers are too small for more
    main()
