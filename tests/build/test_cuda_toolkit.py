"""Finding a CUDA toolkit, with toolkits made of shell scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

import cuda_toolkit


def make_toolkit(root: Path, version: str = "13.0", architectures: str = "80 86 90", refusal: str = "") -> Path:
    """Write a toolkit whose nvcc answers as the real one does to the questions that a build asks."""
    for folder in ("bin", "include", "lib64"):
        (root / folder).mkdir(parents=True)
    (root / "include" / "cuda_runtime_api.h").touch()
    (root / "lib64" / "libcudart.so").touch()
    listing = "\n".join(f"echo compute_{number}" for number in architectures.split())
    return write_script(
        root / "bin" / "nvcc",
        f"""case "$*" in
*--version*) echo "Cuda compilation tools, release {version}, V{version}.1" ;;
*--dryrun*) echo "#$ _HERE_={root}/bin" >&2; echo "#$ TOP={root}/bin/.." >&2 ;;
*--list-gpu-arch*) {listing or ":"} ;;
*) {f"echo '{refusal}' >&2; exit 1" if refusal else "exit 0"} ;;
esac
""",
    )


def write_script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine on which no toolkit is in a customary place, and nothing is set."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX", "GRADFAST_CUDA", "TORCH_CUDA_ARCH_LIST", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
    monkeypatch.setattr(cuda_toolkit, "customary_places", lambda major: iter(()))


def test_wrapper_script_on_path_leads_to_the_toolkit_behind_it(tmp_path: Path) -> None:
    nvcc = make_toolkit(tmp_path / "cuda-13.0")
    write_script(tmp_path / "path" / "nvcc", f'exec {nvcc} "$@"\n')
    toolkit, reason = cuda_toolkit.find(13)
    assert toolkit is not None
    assert toolkit.root == tmp_path / "cuda-13.0"
    assert toolkit.version == "13.0"
    assert reason == f"toolkit 13.0 in {tmp_path / 'cuda-13.0'}"


def test_wrapper_beside_headers_is_used_where_the_reported_folder_has_none(tmp_path: Path) -> None:
    # Debian's own package: nvcc reports a private folder, the headers are beside the wrapper's.
    (tmp_path / "private").mkdir()
    make_toolkit(tmp_path / "usr")
    (tmp_path / "usr" / "bin" / "nvcc").write_text(
        (tmp_path / "usr" / "bin" / "nvcc").read_text().replace("/usr/bin/..", "/private/bin/..")
    )
    (tmp_path / "path").symlink_to(tmp_path / "usr" / "bin")
    toolkit, _ = cuda_toolkit.find(13)
    assert toolkit is not None
    assert toolkit.root == tmp_path / "usr"


def test_cuda_home_precedes_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_toolkit(tmp_path / "named", version="13.1")
    nvcc = make_toolkit(tmp_path / "other", version="13.0")
    write_script(tmp_path / "path" / "nvcc", f'exec {nvcc} "$@"\n')
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "named"))
    toolkit, _ = cuda_toolkit.find(13)
    assert toolkit is not None
    assert toolkit.version == "13.1"


def test_toolkit_of_another_major_version_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_toolkit(tmp_path / "old", version="12.4")
    nvcc = make_toolkit(tmp_path / "new", version="13.0")
    write_script(tmp_path / "path" / "nvcc", f'exec {nvcc} "$@"\n')
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "old"))
    toolkit, _ = cuda_toolkit.find(13)
    assert toolkit is not None
    assert toolkit.root == tmp_path / "new"


def test_other_major_version_alone_is_named_in_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_toolkit(tmp_path / "old", version="12.4")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "old"))
    toolkit, reason = cuda_toolkit.find(13)
    assert toolkit is None
    assert reason == f"no CUDA 13 toolkit ({tmp_path / 'old'} is CUDA 12.4)"


def test_nothing_found_says_where_it_looked() -> None:
    assert cuda_toolkit.find(13) == (
        None,
        "no CUDA 13 toolkit (no nvcc on PATH, no CUDA_HOME, nothing in /usr/local)",
    )


def test_toolkit_that_refuses_the_compiler_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_toolkit(tmp_path / "cuda", refusal="#error: unsupported GNU version! gcc versions later than 12")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    toolkit, reason = cuda_toolkit.find(13)
    assert toolkit is None
    assert "unsupported GNU version" in reason


@pytest.mark.parametrize(
    ("missing", "reason"),
    [("include/cuda_runtime_api.h", "no cuda_runtime_api.h"), ("lib64/libcudart.so", "no libcudart.so")],
)
def test_incomplete_toolkit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, reason: str
) -> None:
    make_toolkit(tmp_path / "cuda")
    (tmp_path / "cuda" / missing).unlink()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    toolkit, why = cuda_toolkit.find(13)
    assert toolkit is None
    assert reason in why


def test_versioned_runtime_library_is_linked_by_its_file_name(tmp_path: Path) -> None:
    # pip's packages have lib/libcudart.so.13 and no libcudart.so.
    make_toolkit(tmp_path / "cu13")
    (tmp_path / "cu13" / "lib64" / "libcudart.so").unlink()
    (tmp_path / "cu13" / "lib").mkdir()
    (tmp_path / "cu13" / "lib" / "libcudart.so.13").touch()
    toolkit, _ = cuda_toolkit.inspect(tmp_path / "cu13")
    assert toolkit is not None
    assert toolkit.link_arguments == [f"-L{tmp_path / 'cu13' / 'lib'}", "-l:libcudart.so.13"]


@pytest.mark.parametrize(
    ("value", "meaning"), [("", "auto"), ("auto", "auto"), (" AUTO ", "auto"), ("0", "0"), ("1", "1")]
)
def test_gradfast_cuda_values(value: str, meaning: str) -> None:
    assert cuda_toolkit.wanted({"GRADFAST_CUDA": value}) == meaning


@pytest.mark.parametrize("value", ["yes", "2", "on", "true"])
def test_gradfast_cuda_refuses_other_values(value: str) -> None:
    with pytest.raises(SystemExit, match=f"GRADFAST_CUDA must be auto, 0 or 1, not '{value}'"):
        cuda_toolkit.wanted({"GRADFAST_CUDA": value})


def test_auto_builds_cuda_where_a_toolkit_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_toolkit(tmp_path / "cuda", version="13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    toolkit, _ = cuda_toolkit.choose("13.2")  # torch's and the toolkit's minor versions may differ
    assert toolkit is not None
    assert cuda_toolkit.choose("12.8")[0] is None
    assert cuda_toolkit.choose(None) == (None, "this torch is built without CUDA")
    assert cuda_toolkit.choose(None, "6.4")[0] is None


def test_zero_leaves_cuda_out_though_there_is_a_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("GRADFAST_CUDA", "0")
    assert cuda_toolkit.choose("13.0") == (None, "GRADFAST_CUDA=0")


@pytest.mark.parametrize(
    ("torch_cuda", "reason"), [("13.0", "no CUDA 13 toolkit"), (None, "this torch is built without CUDA")]
)
def test_one_makes_absence_an_error(monkeypatch: pytest.MonkeyPatch, torch_cuda: str | None, reason: str) -> None:
    monkeypatch.setenv("GRADFAST_CUDA", "1")
    with pytest.raises(SystemExit, match=f"GRADFAST_CUDA=1, but CUDA can't be built: {reason}"):
        cuda_toolkit.choose(torch_cuda)


@pytest.mark.parametrize(
    ("known", "chosen"),
    [
        ("75 80 86 87 89 90 100 103 110 120 121", "8.0;8.6;8.9;9.0;10.0;12.0+PTX"),  # CUDA 13.0
        ("50 52 60 61 70 72 75 80 86 87 89 90", "8.0;8.6;8.9;9.0+PTX"),  # CUDA 12.1
    ],
)
def test_default_architectures_are_those_the_toolkit_knows(tmp_path: Path, known: str, chosen: str) -> None:
    make_toolkit(tmp_path / "cuda", architectures=known)
    toolkit, _ = cuda_toolkit.inspect(tmp_path / "cuda")
    assert toolkit is not None
    assert cuda_toolkit.architectures(toolkit) == chosen


def test_toolkit_too_old_for_every_architecture_is_an_error(tmp_path: Path) -> None:
    make_toolkit(tmp_path / "cuda", architectures="60 70")
    toolkit, _ = cuda_toolkit.inspect(tmp_path / "cuda")
    assert toolkit is not None
    with pytest.raises(SystemExit, match="set TORCH_CUDA_ARCH_LIST"):
        cuda_toolkit.architectures(toolkit)


@pytest.mark.parametrize("asked", ["8.0;9.0+PTX", "8.0 9.0+PTX", "8.0, 9.0+PTX"])
def test_torch_cuda_arch_list_is_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    make_toolkit(tmp_path / "cuda")
    toolkit, _ = cuda_toolkit.inspect(tmp_path / "cuda")
    assert toolkit is not None
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert cuda_toolkit.architectures(toolkit) == "8.0;9.0+PTX"


@pytest.mark.parametrize(
    ("capabilities", "chosen"),
    [
        ([(9, 0)], "9.0+PTX"),
        ([(9, 0), (9, 0), (8, 6)], "8.6;9.0+PTX"),
        ([(12, 0)], "9.0+PTX"),  # newer than the toolkit: its newest code, compiled from PTX by the driver
    ],
)
def test_native_architectures_are_those_of_the_gpus(capabilities: list[tuple[int, int]], chosen: str) -> None:
    assert cuda_toolkit.native_architectures(["7.5", "8.0", "8.6", "9.0"], capabilities) == chosen


@pytest.mark.parametrize(
    ("capabilities", "message"), [([], "no GPU is visible"), ([(6, 1)], "nothing for compute capability 6.1")]
)
def test_native_without_a_suitable_gpu_is_an_error(capabilities: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        cuda_toolkit.native_architectures(["7.5", "8.0"], capabilities)
