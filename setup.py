"""Build `gradfast._C` from csrc. Package metadata is in pyproject.toml; what a build may be told:

GRADFAST_CUDA          auto (default: with CUDA if a toolkit matches the installed torch), 0 (without), 1 (must have)
TORCH_CUDA_ARCH_LIST   "8.0;9.0+PTX" or native; by default all from 8.0 that the toolkit knows
CUDA_HOME              the toolkit, where it is not to be found otherwise
MAX_JOBS               compilers at a time
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).parent / "build_backend"))

import cuda_toolkit  # noqa: E402
import user_torch  # noqa: E402


def native_extension() -> tuple[Extension, type]:
    """Return `gradfast._C`, and the command that compiles it and leaves a record of it beside the result."""
    user_torch.make_importable()
    import torch

    toolkit, reason = cuda_toolkit.choose(torch.version.cuda, torch.version.hip)
    architectures = cuda_toolkit.architectures(toolkit) if toolkit else ""
    if toolkit:  # cpp_extension reads both, the first of them when it is imported
        os.environ.update(CUDA_HOME=str(toolkit.root), TORCH_CUDA_ARCH_LIST=architectures)
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

    built = f"CPU and CUDA ({reason}, architectures {architectures})" if toolkit else f"CPU only, no CUDA: {reason}"
    summary = f"gradfast: building for torch {torch.__version__}: {built}"
    print(summary, flush=True)

    record = {
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "cuda_toolkit": toolkit.version if toolkit else None,
        "cuda_architectures": architectures,
        "summary": summary,
    }
    # The macro with torch's version is there so that another torch at the same path recompiles everything.
    macros = [f'-DGRADFAST_TORCH_VERSION="{torch.__version__}"', f'-DGRADFAST_CUDA_ARCHS="{architectures}"']
    tuning = ["-O3", "-std=c++20"]
    host = ["-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall", "-Wextra", "-g0"]
    extension = CppExtension(
        "gradfast._C",
        sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
        include_dirs=[str(Path("csrc").resolve())],
        extra_compile_args={"cxx": [*tuning, *host, *macros], "nvcc": []},
        # Compiled with -fopenmp but not linked with it: the GOMP_* symbols are to come from the OpenMP runtime that
        # libtorch_cpu has loaded. A second runtime would mean a second pool of threads.
        extra_link_args=["-Wl,-O1"],
    )
    if toolkit:
        jobs = max(1, (os.cpu_count() or 1) // len(cuda_sources())) if cuda_sources() else 1
        extension.sources += cuda_sources()
        extension.include_dirs += [path for path in include_paths("cuda") if path not in extension.include_dirs]
        extension.extra_compile_args["cxx"].append("-DGRADFAST_WITH_CUDA=1")
        extension.extra_compile_args["nvcc"] += [*tuning, *CUDA_FLAGS, f"--threads={jobs}"]
        extension.libraries += ["c10_cuda"]
        extension.extra_link_args += toolkit.link_arguments

    class BuildNative(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            self.force = True  # ninja knows what is out of date; distutils would look at the sources' dates alone
            self.build_temp = str(Path("build", "objects").resolve())  # kept, also by editable installs

        def run(self) -> None:
            super().run()
            Path(self.get_ext_fullpath("gradfast._C")).with_name("_build.json").write_text(json.dumps(record, indent=2))

    return extension, BuildNative


def cuda_sources() -> list[str]:
    return sorted(str(path) for path in Path("csrc", "cuda").glob("*.cu"))


# torch's own nvcc flags take away half-precision operators, which the kernels use; -Xptxas -v reports spills.
CUDA_FLAGS = [
    "-DGRADFAST_WITH_CUDA=1",
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_HALF2_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fvisibility=hidden",
]

if {"egg_info", "dist_info", "sdist", "clean"} & set(sys.argv):  # these read metadata only: torch is not needed
    setup()
else:
    native, build_native = native_extension()
    setup(ext_modules=[native], cmdclass={"build_ext": build_native})
