"""What the parameter server holds: the network, its weights and the test set."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import zrpc as rpc

if TYPE_CHECKING:
    from torch import Tensor

TEST_SHARE = 0.2
SEED = 0


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits, 8 by 8 pixels: training images and labels, test images and labels."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(digits.target, dtype=torch.int64)
    train, test = train_test_split(range(len(labels)), test_size=TEST_SHARE, random_state=SEED, stratify=labels)
    return images[train], labels[train], images[test], labels[test]


class DigitNet(nn.Sequential):
    """A small convolutional network: 8 by 8 pixels to ten digits."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


@rpc.expose
class ParameterServer:
    """Holds the model; trainers call its methods from their own processes."""

    def __init__(self) -> None:
        torch.manual_seed(SEED)
        self.model = DigitNet()
        self._lock = threading.Lock()
        _, _, self._test_images, self._test_labels = load_data()

    def forward(self, images: Tensor) -> Tensor:
        """The logits of a batch, for the calling trainer to differentiate.

        Every pass works on its own copy of the weights, through which gradients reach the parameters: another
        trainer's optimizer may then change the parameters in place between this pass's forward and its backward.
        """
        with self._lock:  # functional_call lends the weights to the module itself, which all trainers share
            weights = {name: parameter.clone() for name, parameter in self.model.named_parameters()}
            logits: Tensor = torch.func.functional_call(self.model, weights, (images,))
        return logits

    def parameter_rrefs(self) -> list[rpc.RRef[nn.Parameter]]:
        """References to the parameters, for a distributed optimizer."""
        return [rpc.RRef(parameter) for parameter in self.model.parameters()]

    @torch.no_grad()
    def accuracy(self) -> float:
        """The share of the test images that the model gets right now."""
        with self._lock:
            guesses = self.model(self._test_images).argmax(dim=1)
        return float((guesses == self._test_labels).float().mean())
