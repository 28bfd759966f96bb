"""Build `gradfast._C` from csrc. The package's metadata is in pyproject.toml. What a build may be told:

GRADFAST_CUDA          auto (default: with CUDA if a toolkit matches the installed torch), 0 (without), 1 (must have)
TORCH_CUDA_ARCH_LIST   such as "8.0;9.0+PTX", or native; by default all from 8.0 on that the toolkit knows
CUDA_HOME              the toolkit, where it is not found otherwise
MAX_JOBS               how many compilers at a time
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "build_backend"))

import check_machine
import cuda_toolkit
import user_torch

check_machine.require_setuptools()  # before setup() reads pyproject.toml, and fails on it

COMMON_FLAGS = ["-O3", "-std=c++20"]
# With -fopenmp for compiling but not for linking: the GOMP_* symbols are to come from the one OpenMP runtime that
# libtorch_cpu loads. A second runtime would be a second pool of threads beside torch's.
HOST_FLAGS = ["-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall", "-Wextra", "-g0"]
# torch's own nvcc flags take the half-precision operators away; the kernels use them.
NVCC_FLAGS = [f"-U__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS")]
NVCC_FLAGS += ["-U__CUDA_NO_BFLOAT16_CONVERSIONS__", "-DGRADFAST_WITH_CUDA=1", "-Xcompiler=-fvisibility=hidden"]


def native_extension() -> tuple[Extension, type]:
    """Return `gradfast._C`, and the command that compiles it and leaves a record of the build beside it."""
    check_machine.require_compiler()
    user_torch.make_importable()
    import torch

    toolkit, reason = cuda_toolkit.choose(torch.version.cuda, torch.version.hip)
    architectures = cuda_toolkit.architectures(toolkit) if toolkit else ""
    if toolkit:  # cpp_extension reads CUDA_HOME when it is imported
        os.environ.update(CUDA_HOME=str(toolkit.root), TORCH_CUDA_ARCH_LIST=architectures)
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

    built = f"CPU and CUDA ({reason}, architectures {architectures})" if toolkit else f"CPU only, no CUDA: {reason}"
    summary = f"gradfast: building for torch {torch.__version__}: {built}"
    print(summary, flush=True)

    headers = include_paths("cuda" if toolkit else "cpu")
    # The macro with torch's version makes another torch at the same path recompile everything.
    macros = [f'-DGRADFAST_TORCH_VERSION="{torch.__version__}"', f'-DGRADFAST_CUDA_ARCHS="{architectures}"']
    extension = CppExtension(
        "gradfast._C",
        sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
        include_dirs=[str(Path("csrc").resolve())],
        extra_compile_args={
            # -isystem: torch's headers are not ours to warn about.
            "cxx": [*COMMON_FLAGS, *HOST_FLAGS, *macros, *(f"-isystem{path}" for path in headers)],
            "nvcc": [*COMMON_FLAGS, *NVCC_FLAGS],
        },
    )
    if toolkit:
        kernels = sorted(str(path) for path in Path("csrc", "cuda").rglob("*.cu"))
        extension.sources += kernels
        extension.include_dirs += [path for path in headers if path not in extension.include_dirs]
        extension.extra_compile_args["cxx"].append("-DGRADFAST_WITH_CUDA=1")
        extension.extra_compile_args["nvcc"].append(f"--threads={max(1, (os.cpu_count() or 1) // len(kernels))}")
        extension.libraries.append("c10_cuda")
        extension.extra_link_args += toolkit.link_arguments

    record = {
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "cuda_toolkit": toolkit.version if toolkit else None,
        "cuda_architectures": architectures,
        "summary": summary.replace("building", "built"),
    }

    class BuildNative(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            self.force = True  # let ninja decide what is out of date: setuptools would look at no header or flag
            # Kept between builds, of which editable ones would use a temporary folder; one for each torch.
            self.build_temp = str(Path("build", f"torch-{torch.__version__}").resolve())

        def run(self) -> None:
            super().run()
            path = Path(self.get_ext_fullpath("gradfast._C")).with_name("_build.json")
            path.write_text(json.dumps(record, indent=2) + "\n")

    return extension, BuildNative


# What was compiled against one minor version of torch runs with no other, so a wheel asks for that one: pip then picks
# a torchvision that fits the torch at hand, and warns when torch is upgraded alone. A source distribution is for all.
if {"egg_info", "sdist"} & set(sys.argv):
    setup(install_requires=[user_torch.any_requirement()])
elif "dist_info" in sys.argv:
    setup(install_requires=[user_torch.requirement()])
else:
    native, build_native = native_extension()
    setup(install_requires=[user_torch.requirement()], ext_modules=[native], cmdclass={"build_ext": build_native})
