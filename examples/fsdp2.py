"""Train a small transformer under FSDP2 with clipping inside the step, interrupt it, and go on.

    torchrun --nproc_per_node=2 examples/fsdp2.py                     # two processes on CPUs, or a GPU each
    torchrun --nproc_per_node=2 examples/fsdp2.py --resume            # goes on from the checkpoint
    torchrun --nproc_per_node=4 examples/fsdp2.py --resume            # also on another number of processes

What is to be seen: the optimiser is made as for one process. Its norm is that of the whole model, the same on all
ranks, and a step in which one rank meets a NaN (`--bad-step 30`) is skipped by all, with the parameter's name logged.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gradfast

WIDTH, LETTERS, LENGTH = 64, 32, 24


class Reverser(nn.Module):
    """Learns to write a sequence of letters backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(LETTERS, WIDTH)
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, LETTERS)

    def forward(self, letters: Tensor) -> Tensor:
        """Return the logits of every place of every sequence, one after the other."""
        hidden = self.letters(letters) + self.places
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden.flatten(0, 1))


def main() -> None:
    options = parse()
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = init_device_mesh(device.type, (world,))

    torch.manual_seed(0)
    model = Reverser().to(device)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = gradfast.AdamW(model.named_parameters(), lr=2e-3, weight_decay=0.01, max_norm=0.3)
    first = load(options.checkpoint, model, optimizer) if options.resume else 0

    for step in range(first, first + options.steps):
        generator = torch.Generator().manual_seed(1000 * step + rank)  # every rank has batches of its own
        letters = torch.randint(LETTERS, (16, LENGTH), generator=generator).to(device)
        loss = nn.functional.cross_entropy(model(letters), letters.flip(1).flatten())
        if step == options.bad_step and rank == world - 1:
            loss = loss * float("nan")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == first + options.steps - 1:
            mean = loss.detach() / world
            torch.distributed.all_reduce(mean)
            if rank == 0:
                norm, factor = optimizer.grad_norm.item(), optimizer.clip_coef.item()
                print(f"step {step:4d}  loss {mean.item():.3f}  norm {norm:.3f}  clip coefficient {factor:.3f}")

    skipped = optimizer.skipped_steps
    save(options.checkpoint, model, optimizer, first + options.steps)
    if rank == 0:
        print(f"skipped steps: {skipped}; checkpoint in {options.checkpoint}")
    torch.distributed.barrier()  # nobody leaves while another still writes
    torch.distributed.destroy_process_group()
    time.sleep(0.1)  # gloo's threads let go of the last tensors: one that still did when Python ends would abort


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    weights, states = get_state_dict(model, optimizer)
    writer = dcp.FileSystemWriter(folder, overwrite=True)
    dcp.save({"model": weights, "optimizer": states, "step": step}, storage_writer=writer)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    weights, states = get_state_dict(model, optimizer)
    checkpoint = {"model": weights, "optimizer": states, "step": 0}
    dcp.load(checkpoint, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    return checkpoint["step"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/fsdp2"), help="folder, written at the end")
    parser.add_argument("--resume", action="store_true", help="start from the checkpoint")
    parser.add_argument("--bad-step", type=int, default=-1, help="in this step one rank's loss is NaN")
    return parser.parse_args()


if __name__ == "__main__":
    main()
