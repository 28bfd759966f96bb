"""A trained model in a form that runs without gradfast, checked against the model before it gets its name."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradfast.errors import UserError
from gradfast.extras import first_line, require
from gradfast.train.machine.place import MEAN, STANDARD_DEVIATION
from gradfast.train.trained.export_modules import OneImageDetector, PixelClassifier, PixelDetector
from gradfast.train.trained.load import Trained, build_bare
from gradfast.version import __version__

TOLERANCE = 1e-4  # of the largest value of each output
OPSET = 18  # of a detector's ONNX model
METADATA = "gradfast.json"  # the extra file of TorchScript and torch.export

Outputs = Sequence[Tensor]
Run = Callable[[Any], Outputs]  # from the input of one check to its outputs


class Exported(NamedTuple):
    """A file's content, and how to run what it holds."""

    content: bytes
    run: Run


@dataclass(frozen=True)
class Job:
    """What is to be exported.

    Attributes:
        module: takes pixels.
        bare: the model itself.
        checks: inputs that both are run on; the first is also the example that graphs are recorded with.
        images: how many they hold.
        dynamic: whether the number of images may vary.
        metadata: see `describe`.
    """

    trained: Trained
    module: nn.Module
    bare: nn.Module
    checks: list[Any]
    images: int
    dynamic: bool
    metadata: dict[str, Any]

    @property
    def detects(self) -> bool:
        return self.trained.config.task == "detect"


def describe(trained: Trained, size: int, kind: str) -> dict[str, Any]:
    """What a user of the file has to know: input, preprocessing, classes, output, and where it comes from."""
    transform = trained.transform
    inside = kind != "safetensors"
    common = {
        "task": trained.config.task,
        "model": trained.config.model,
        "classes": list(trained.classes),
        "mean": list(MEAN),
        "std": list(STANDARD_DEVIATION),
        "normalisation": "inside: give pixels from 0 to 255" if inside else "outside: (pixels / 255 - mean) / std",
        "gradfast": __version__,
        "epoch": trained.epoch,
        "averaged": trained.averaged,
    }
    if trained.config.task == "detect":
        return common | {
            "input": "RGB images [3, height, width] uint8, of any size: a list of them, in ONNX one",
            "output": "boxes (x1, y1, x2, y2 in pixels), labels (k is classes[k - 1]) and scores",
            "img_size": size,
        }
    return common | {
        "input": f"RGB images [n, 3, {size}, {size}] uint8",
        "preprocessing": "the largest centred square, less `margin` of its side on each side, resized (bilinear) to "
        "`img_size` pixels",
        "img_size": size,
        "margin": getattr(transform, "margin", 0.0),
        "output": "logits [n, K]: softmax makes them probabilities",
    }


# ---------------------------------------------------------------- the formats


def to_torchscript(job: Job) -> Exported:
    """A trace; of a detector, whose work depends on what it sees, the compiled source."""
    try:
        if isinstance(job.module, PixelDetector):
            scripted = torch.jit.script(job.module)
        else:
            scripted = torch.jit.trace(job.module, (job.checks[0],), check_trace=False)
    except Exception as error:
        raise cannot(job, "torchscript", error) from error
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer, _extra_files={METADATA: json.dumps(job.metadata)})
    loaded = torch.jit.load(io.BytesIO(buffer.getvalue()))
    return Exported(buffer.getvalue(), lambda images: flat(loaded(images)))


def to_torch_export(job: Job) -> Exported:
    """An ExportedProgram, as torch.export.load reads it."""
    if job.detects:
        raise UserError(
            "--format torch-export: how many boxes a detector handles depends on what it sees, which torch.export "
            "cannot record; take --format torchscript or onnx"
        )
    shapes = {"images": {0: torch.export.Dim("batch")}} if job.dynamic else None
    try:
        program = torch.export.export(job.module, (job.checks[0],), dynamic_shapes=shapes)
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={METADATA: json.dumps(job.metadata)})
    except Exception as error:
        raise cannot(job, "torch-export", error) from error
    loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    return Exported(buffer.getvalue(), lambda images: flat(loaded(images)))


def to_onnx(job: Job) -> Exported:
    """An ONNX model, run here by ONNX Runtime on the CPU."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, "export", "--format onnx")
    import onnxruntime

    try:
        proto = record_detector(job) if job.detects else record_classifier(job)
        for name, value in job.metadata.items():
            entry = proto.metadata_props.add()
            entry.key, entry.value = name, value if isinstance(value, str) else json.dumps(value)
        content: bytes = proto.SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise cannot(job, "onnx", error) from error
    name = session.get_inputs()[0].name
    return Exported(content, lambda images: [torch.from_numpy(a) for a in session.run(None, {name: images.numpy()})])


def record_classifier(job: Job) -> Any:
    """The ONNX model of a graph that torch.export recorded."""
    program: Any = torch.onnx.export(
        job.module,
        (job.checks[0],),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}} if job.dynamic else None,
        dynamo=True,
        verbose=False,
    )
    return program.model_proto


def record_detector(job: Job) -> Any:
    """The ONNX model of a trace: torch.export cannot follow a detector, and torchvision has mended its own for traces.

    Height, width and the number of boxes may vary.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "detector.onnx")
        torch.onnx.export(
            job.module,
            (job.checks[0],),
            path,
            input_names=["image"],
            output_names=["boxes", "labels", "scores"],
            dynamic_axes={
                "image": {1: "height", 2: "width"},
                **{name: {0: "n"} for name in ("boxes", "labels", "scores")},
            },
            opset_version=OPSET,
            dynamo=False,
        )
        return onnx.load(path)


def to_safetensors(job: Job) -> Exported:
    """The weights alone, under the names of torchvision's model."""
    require("safetensors", "export", "--format safetensors")
    from safetensors.torch import load, save

    weights = {name: tensor.contiguous().clone() for name, tensor in job.bare.state_dict().items()}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in job.metadata.items()}
    content = save(weights, texts)
    again = build_bare(job.trained.task, job.trained.config, job.trained.classes)
    again.load_state_dict(load(content))
    wrapped = type(job.module)(again).eval()
    return Exported(content, lambda images: flat(wrapped(images)))


FORMATS: dict[str, tuple[str, Callable[[Job], Exported]]] = {
    "torchscript": (".ts", to_torchscript),
    "onnx": (".onnx", to_onnx),
    "torch-export": (".pt2", to_torch_export),
    "safetensors": (".safetensors", to_safetensors),
}
GRAPHS = ("onnx", "torch-export")  # whose inputs have the type and, unless told otherwise, the shape of the example


def cannot(job: Job, kind: str, error: Exception) -> UserError:
    return UserError(f"--format {kind}: torch cannot export {job.trained.config.model} ({first_line(error)})")


# ---------------------------------------------------------------- the check


class Difference(NamedTuple):
    """How far the exported model is from the model.

    Attributes:
        largest: the largest absolute difference of two outputs.
        relative: the largest difference of an output (logits; boxes, labels, scores), as a share of its largest value.
        images: how many were compared.
        boxes: of a detector, how many were compared; None of a classifier.
    """

    largest: float
    relative: float
    images: int
    boxes: int | None


def export(trained: Trained, kind: str, images: Sequence[Tensor], size: int, dynamic: bool) -> tuple[bytes, Difference]:
    """Export a model and compare it with the model on some images.

    Args:
        kind: one of `FORMATS`.
        images: [3, height, width] uint8; of a classifier all of size x size.
        dynamic: whether the number of images of an ONNX or torch.export graph may vary; else it is one.

    Returns:
        (the file's content, how far it is from the model)

    Raises:
        UserError: torch cannot export this model, or what came out answers otherwise than the model.
    """
    bare = trained.model.float().to(memory_format=torch.contiguous_format).eval()
    if trained.config.task == "detect":
        module: nn.Module = OneImageDetector(bare) if kind == "onnx" else PixelDetector(bare)
        checks: list[Any] = list(images) if kind == "onnx" else [list(images), list(images[:1])]
    else:
        module = PixelClassifier(bare)
        batch = torch.stack(list(images))
        several = dynamic or kind not in GRAPHS
        checks = [batch, batch[:1]] if several else list(batch.split(1))
    job = Job(trained, module.eval(), bare, checks, len(images), dynamic, describe(trained, size, kind))
    with quiet(), torch.no_grad():
        exported = FORMATS[kind][1](job)
        return exported.content, compare(job, exported.run)


def compare(job: Job, run: Run) -> Difference:
    """Run both on all checks.

    Raises:
        UserError: the outputs differ in shape, or one by more than the tolerance.
    """
    largest, relative, boxes = 0.0, 0.0, 0
    for check in job.checks:
        expected = flat(job.module(check))
        try:
            found = run(check)
        except Exception as error:
            raise UserError(
                f"the exported model does not run here ({first_line(error)}); nothing was written"
            ) from error
        shapes = [[tuple(tensor.shape) for tensor in outputs] for outputs in (found, expected)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"the exported model returns shapes {shapes[0]}, the model {shapes[1]}; nothing was written"
            )
        for one, other in zip(found, expected, strict=True):
            gap, scale = gap_of(one, other)
            if not gap <= TOLERANCE * scale:  # also where it is NaN
                raise UserError(
                    f"the exported model differs from the model by {gap:.3g}, and {TOLERANCE * scale:.3g} is allowed "
                    f"({TOLERANCE:g} of the largest output); nothing was written"
                )
            largest, relative = max(largest, gap), max(relative, gap / scale if scale else 0.0)
        boxes += sum(len(tensor) for tensor in expected if job.detects and tensor.ndim == 2)
    return Difference(largest, relative, job.images, boxes if job.detects else None)


def gap_of(one: Tensor, other: Tensor) -> tuple[float, float]:
    """(largest absolute difference, largest absolute value of `other`)"""
    if other.numel() == 0:
        return 0.0, 0.0
    return float((one.double() - other.double()).abs().max()), float(other.double().abs().max())


def flat(outputs: Any) -> list[Tensor]:
    """The tensors of an output, in a fixed order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        return [outputs[name] for name in ("boxes", "labels", "scores")]
    return [tensor for part in outputs for tensor in flat(part)]


def random_images(size: int, count: int = 4) -> list[Tensor]:
    """[3, size, size] uint8 each, the same every time: noise on coarse patterns with a picture's contrast."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    noisy = smooth + 0.1 * torch.randn(smooth.shape, generator=generator)
    return list((noisy.clamp(0, 1) * 255).to(torch.uint8))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters warn of their own deprecation and print their progress; what matters is checked afterwards."""
    silence = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        warnings.simplefilter("ignore")
        yield
