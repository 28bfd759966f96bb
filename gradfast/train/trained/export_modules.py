"""What is exported: the model with the normalisation inside, so that it takes pixels as they are."""

from __future__ import annotations

from typing import Dict, List  # noqa: UP035  TorchScript reads annotations, and knows these names

import torch
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from gradfast.train.machine.place import MEAN, STANDARD_DEVIATION


class PixelClassifier(nn.Module):
    """Images [n, 3, size, size], RGB, uint8 (or floats from 0 to 255) -> logits [n, K] float32."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        shape = (1, 3, 1, 1)
        self.register_buffer("mean", torch.tensor(MEAN).mul(255).view(shape))
        self.register_buffer("deviation", torch.tensor(STANDARD_DEVIATION).mul(255).view(shape))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model((images.float() - self.mean) / self.deviation)
        return logits


class PixelDetector(nn.Module):
    """A list of images [3, height, width], RGB, uint8 (or floats from 0 to 255) -> boxes, labels, scores of each.

    Boxes are (x1, y1, x2, y2) in pixels of the image given; label k is the class k - 1.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: List[Tensor]) -> List[Dict[str, Tensor]]:  # noqa: UP006
        scaled: List[Tensor] = []  # noqa: UP006
        for image in images:
            scaled.append(image.float() / 255.0)
        if is_scripting():  # where torchvision's detectors return (losses, detections)
            return self.model(scaled)[1]
        return self.model(scaled)


class OneImageDetector(nn.Module):
    """One image [3, height, width] uint8 -> (boxes [n, 4], labels [n], scores [n]): for graphs, which know no lists."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.model([image.float() / 255.0])[0]
        return found["boxes"], found["labels"], found["scores"]
