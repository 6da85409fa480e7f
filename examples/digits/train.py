"""Trains a digit classifier with a parameter server and trainers: rank 0 is the server, every other rank a trainer.

The model lives on the server. A trainer sends a batch there, gets logits back, computes the loss at home, and
distributed autograd carries the gradients through the call to the weights, where a distributed optimizer applies them.

Run it with `make demo`, or with a launcher of your own that sets RANK and WORLD_SIZE (and ZRPC_INIT_METHOD, or
MASTER_ADDR and MASTER_PORT).

Its workers run in the strictest mode, `allow="registered"`: they call what is marked with `rpc.expose` alone, and
unpickle nothing. So what travels is made of numbers, lists, dicts, tensors and RRefs.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from model import SEED, ParameterServer, load_data
from torch import nn
from tqdm import tqdm

import zrpc as rpc
import zrpc.autograd as dist_autograd
from zrpc.optim import DistributedOptimizer

WANTED_ACCURACY = 0.95


@dataclass
class History:
    """What one trainer saw: the mean loss of each epoch and, from one of the trainers, the test accuracy after it."""

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """How to train."""

    epochs: int
    batch_size: int
    learning_rate: float


@rpc.expose
def train(
    server: rpc.RRef[ParameterServer], trainer: int, trainers: int, plan_fields: dict[str, Any]
) -> dict[str, Any]:
    """One trainer's work, on its own share of the training set; the first trainer also shows progress.

    Args:
        server: the parameter server.
        trainer: which trainer this is.
        trainers: how many there are.
        plan_fields: the fields of a `Plan`.

    Returns:
        The fields of a `History`.
    """
    plan = Plan(**plan_fields)
    images, labels, _, _ = load_data()
    images, labels = images[trainer::trainers], labels[trainer::trainers]
    optimizer = DistributedOptimizer(torch.optim.Adam, server.rpc_sync().parameter_rrefs(), lr=plan.learning_rate)
    shuffle = torch.Generator().manual_seed(SEED + trainer)
    history = History()
    steps = -(-len(labels) // plan.batch_size)
    with tqdm(total=plan.epochs * steps, desc="training", unit="step", disable=trainer != 0) as progress:
        for _ in range(plan.epochs):
            losses = []
            for batch in torch.randperm(len(labels), generator=shuffle).split(plan.batch_size):  # type: ignore[no-untyped-call]
                with dist_autograd.context() as context_id:
                    logits = server.rpc_sync().forward(images[batch])
                    loss = nn.functional.cross_entropy(logits, labels[batch])
                    dist_autograd.backward(context_id, [loss])
                    optimizer.step(context_id)
                losses.append(loss.item())
                progress.update()
            history.loss.append(sum(losses) / len(losses))
            if trainer == 0:
                history.accuracy.append(server.rpc_sync().accuracy())
                progress.set_postfix(loss=f"{history.loss[-1]:.3f}", accuracy=f"{history.accuracy[-1]:.1%}")
    return asdict(history)


def serve(trainers: int, plan: Plan, picture: Path) -> float:
    """The parameter server's work: hold the model, set the trainers to work, draw what came of it.

    Returns:
        The final test accuracy.
    """
    server = ParameterServer()
    server_rref = rpc.RRef(server)
    futures = [
        rpc.rpc_async(f"trainer{trainer}", train, args=(server_rref, trainer, trainers, asdict(plan)), timeout=0)
        for trainer in range(trainers)
    ]
    draw([History(**future.wait()) for future in futures], picture)
    return server.accuracy()


def draw(histories: list[History], picture: Path) -> None:
    """Save the curves of loss and accuracy as `picture`."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for trainer, history in enumerate(histories):
        left.plot(range(1, len(history.loss) + 1), history.loss, label=f"trainer {trainer}")
    left.set(title="Training loss", xlabel="epoch", ylabel="cross entropy", yscale="log")
    left.legend()
    accuracy = histories[0].accuracy
    right.plot(range(1, len(accuracy) + 1), accuracy, color="tab:green")
    right.axhline(WANTED_ACCURACY, color="grey", linestyle="--", label=f"wanted: {WANTED_ACCURACY:.0%}")
    right.set(title="Test accuracy", xlabel="epoch", ylim=(min(0.8, *accuracy), 1.0))
    right.legend(loc="lower right")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def main() -> int:
    """Join the cluster as what RANK says; the server's exit status says whether the model became good enough."""
    parser = argparse.ArgumentParser(description="Train a digit classifier with a parameter server.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--picture", type=Path, default=Path("out/digits.png"), help="where the curves are saved")
    parser.add_argument("--allow", choices=("registered", "any"), default="registered", help="what may be called")
    args = parser.parse_args()
    rank, world_size = int(os.environ.get("RANK", -1)), int(os.environ.get("WORLD_SIZE", -1))
    if rank < 0:
        parser.error("RANK and WORLD_SIZE are not set: start this with a launcher (make demo)")
    if world_size < 2:
        parser.error("there must be a server and a trainer or more: start at least 2 workers")
    torch.set_num_threads(1)  # the workers share this machine's cores

    init_method = os.environ.get("ZRPC_INIT_METHOD", "env://")
    options = rpc.RpcBackendOptions(init_method=init_method, allow=args.allow)
    name = "server" if rank == 0 else f"trainer{rank - 1}"
    rpc.init_rpc(name, rank=rank, world_size=world_size, rpc_backend_options=options)
    accuracy = None
    if rank == 0:
        accuracy = serve(world_size - 1, Plan(args.epochs, args.batch_size, args.learning_rate), args.picture)
        print(f"final test accuracy: {accuracy:.2%}")
        print(f"loss and accuracy: {args.picture.resolve()}")
    rpc.shutdown()
    if accuracy is not None and accuracy < WANTED_ACCURACY:
        print(f"the model should reach {WANTED_ACCURACY:.0%}: train longer (--epochs)", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
