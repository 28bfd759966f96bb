"""The tensors that are stepped: shapes of real models, and two extremes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

Shape = tuple[int, ...]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True)
class Workload:
    """Parameters by their shapes alone: a step does not care what they were for."""

    name: str
    about: str
    shapes: tuple[Shape, ...]
    cuda_only: bool = False  # minutes on a CPU

    @property
    def elements(self) -> int:
        return sum(prod(shape) for shape in self.shapes)


def resnet50() -> list[Shape]:
    """The 161 parameters of ResNet50 (He et al. 2016)."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions: list[Shape] = [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convolutions.append((4 * width, channels, 1, 1))
            for convolution in convolutions:
                shapes += [convolution, convolution[:1], convolution[:1]]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2() -> list[Shape]:
    """The 148 parameters of GPT-2 small (Radford et al. 2019), its output layer tied to the embedding."""
    block: list[Shape] = [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,)]
    block += [(768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)]
    return [(50257, 768), (1024, 768), *(12 * block), (768,), (768,)]


def llama_1b() -> list[Shape]:
    """The 146 parameters of a Llama of 1.2 billion (hidden size 2048, 16 layers, 8 key-value heads of 64)."""
    block: list[Shape] = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048)]
    block += [(8192, 2048), (8192, 2048), (2048, 8192), (2048,), (2048,)]
    return [(128256, 2048), *(16 * block), (2048,)]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("resnet50", "ResNet50: 161 tensors", tuple(resnet50())),
        Workload("gpt2-124m", "GPT-2 small: 148 tensors", tuple(gpt2())),
        Workload("llama-1b", "a Llama of 1.2 billion: 146 tensors", tuple(llama_1b()), cuda_only=True),
        Workload("2000x512", "2000 tensors of 512", ((512,),) * 2000),
        Workload("small", "1000 tensors of 64", ((64,),) * 1000),
        Workload("flat", "as many elements as ResNet50, in one tensor", ((25_557_032,),)),
    )
}
