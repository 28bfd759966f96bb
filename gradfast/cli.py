"""The ``gradfast`` command: finds the sub-command, and turns a user's error into one line and exit code 2."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from gradfast.errors import ReportedError, UserError

# Name -> (module, what it does). The module is imported only when its command is asked for, so that `gradfast info`
# works where torchvision does not.
COMMANDS = {
    "train": ("gradfast.train.cli", "train an image classifier or a detector, clipping in the optimiser's own pass"),
    "data": ("gradfast.data.cli", "make a detection data set of photographs, or check one before training"),
    "bench": ("gradfast.bench.cli", "time clip and step against torch's, after checking that both do the same"),
    "doctor": ("gradfast.monitor.doctor.cli", "say why gradients of a model explode or vanish, and what mends it"),
    "eval": (
        "gradfast.train.trained.evaluate_cli",
        "measure a trained model: accuracy and F1 of each class, or COCO's metrics",
    ),
    "predict": ("gradfast.train.trained.predict_cli", "let a trained model look at images: classes, or boxes"),
    "export": (
        "gradfast.train.trained.export_cli",
        "write a trained model as ONNX, TorchScript, torch.export, safetensors",
    ),
    "runs": ("gradfast.runs.cli", "list the runs of a folder in a table, or put some side by side"),
    "plot": (
        "gradfast.runs.plot",
        "draw the gradient norms of a run by time and layer, or several runs in one picture",
    ),
    "info": ("gradfast.info", "show versions, the instruction set in use, threads, the CUDA build and the GPU"),
}

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_NOT_READ = 141  # 128 + SIGPIPE, as other commands end


def usage() -> str:
    lines = ["usage: gradfast COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<8}{purpose}" for name, (_, purpose) in COMMANDS.items()]
    lines += ["", "gradfast COMMAND --help explains a command; gradfast --version prints the version."]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command.

    Args:
        arguments: what follows ``gradfast`` on the command line; None reads ``sys.argv``.

    Returns:
        The exit code: 0; 2 for a ``UserError``, or a file that may not be used; 130 after an interruption that the
        sub-command did not handle; 141 where nobody reads standard output any more, as behind ``| head``.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from gradfast.version import __version__

        print(f"gradfast {__version__}")
        return 0
    try:
        code = find_command(arguments[0])(arguments[1:]) or 0
        sys.stdout.flush()
        return code
    except ReportedError:
        return EXIT_USER_ERROR
    except UserError as error:
        print("gradfast: error:", " ".join(str(error).split()), file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("gradfast: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except PermissionError as error:
        print(f"gradfast: error: cannot use {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes as it ends
        return EXIT_NOT_READ


def find_command(name: str) -> Callable[[Sequence[str]], int | None]:
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise UserError(f"there is no command {name!r}; {hint}")
    return importlib.import_module(COMMANDS[name][0]).main


if __name__ == "__main__":
    sys.exit(main())
