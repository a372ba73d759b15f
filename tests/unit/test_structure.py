"""The rules of the house: which room may import which, where each library lives, how long things may get.

The rules stand as plain dicts at the top. A failing test names the file and line; either the import moves to the room
where it belongs, or the rule changes here, on purpose and with its reason.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("raydistill", "tune")

# Rooms whose imports within the project are listed in full (besides those of the room itself).
CONFIG = ("raydistill.config",)
MAY_IMPORT_ONLY = {
    "raydistill.errors": (),
    "raydistill.messages": ("raydistill.errors",),
    "raydistill.config": (*CONFIG, "raydistill.errors", "raydistill.quant.formats"),  # the formats are plain data
    "raydistill.cli": (*CONFIG, "raydistill.errors", "raydistill.quiet", "raydistill.background"),
    "raydistill.roles": (*CONFIG, "raydistill.errors", "raydistill.messages", "raydistill.background"),
    "raydistill.health": ("raydistill.errors", "raydistill.messages"),  # pure judgements about messages
    "raydistill.loop": (
        *CONFIG,
        "raydistill.errors",
        "raydistill.messages",
        "raydistill.roles",
        "raydistill.health",
    ),
    "raydistill.losses": ("raydistill.errors",),
    "raydistill.recovery": (
        *CONFIG,
        "raydistill.errors",
        "raydistill.background",
        "raydistill.messages",
        "raydistill.merge",
        "raydistill.roles",
        "raydistill.health",
        "raydistill.quant.hashing",
        "raydistill.quant.formats",  # plain data
        "raydistill.results",
        "raydistill.cli",
        "raydistill.progress",
    ),
    "raydistill.quant": ("raydistill.errors", "raydistill.imports"),
    "raydistill.preflight.estimates": (),  # functions of numbers
}

# Rooms that must not know each other, whatever else they import.
MUST_NOT_IMPORT = {
    "raydistill.actors": ("raydistill.trainer", "raydistill.loop"),
    "raydistill.trainer": ("raydistill.actors", "raydistill.loop"),
    "raydistill.data": ("raydistill.actors", "raydistill.trainer", "raydistill.loop", "raydistill.results"),
    "raydistill.results": ("raydistill.actors", "raydistill.trainer", "raydistill.loop", "raydistill.report"),
    "raydistill.report": ("raydistill.actors", "raydistill.trainer", "raydistill.loop"),
    "raydistill": ("tune",),
}

# Modules that only some may import: the wiring is for entry points, so that every other room can be used without it.
ENTRY_POINTS = (
    "raydistill.train",
    "raydistill.__main__",
    "raydistill.study",
    "raydistill.preflight.doctor",
    "raydistill.reproduce",
    "raydistill.sweep",
    "tune",
)
PYTHON_API = "raydistill"  # the package itself hands on `run` and `load_config`
ONLY_IMPORTED_BY = {
    "raydistill.launch": ENTRY_POINTS,
    "raydistill.loop": ("raydistill.attempt", "raydistill.launch", *ENTRY_POINTS),
    "raydistill.attempt": ("raydistill.launch",),
    "raydistill.pools": ("raydistill.launch", *ENTRY_POINTS),
    "raydistill.train": ("raydistill.__main__",),
    "raydistill.__main__": (),
}

# Libraries with one home.
LIBRARY_HOMES = {
    "vllm": ("raydistill.actors", "raydistill.evaluate", "raydistill.serving.load"),  # load: its load generator
    "deepspeed": ("raydistill.trainer",),
    "ray.tune": ("raydistill.sweep.tuner", "raydistill.sweep.recorder"),
    "mlflow": ("raydistill.results",),
    "compressed_tensors": ("raydistill.quant", "raydistill.ptq.runner"),  # the runner lives in another environment
    "llmcompressor": ("raydistill.ptq.runner",),
    "huggingface_hub": ("raydistill.serving.export", "raydistill.evaluate.hub"),
    "lm_eval": ("raydistill.evaluate",),
    "fsspec": ("raydistill.recovery.storage",),
}

# Rooms whose libraries are listed in full (besides the standard library).
MAY_USE_ONLY = {
    "raydistill.config": ("pydantic", "pydantic_core"),
    "raydistill.cli": ("rich",),
    "raydistill.losses": ("torch", "numpy"),
    "raydistill.quant": ("torch", "numpy", "transformers", "peft", "safetensors", "compressed_tensors"),
}

# Rooms that stay light: they import nothing of these, not even inside a function.
MUST_NOT_USE = {
    "raydistill.errors": ("torch", "ray", "vllm", "transformers", "numpy", "pydantic"),
    "raydistill.messages": ("torch", "ray", "vllm", "transformers"),
    "raydistill.roles": ("torch", "ray", "vllm", "transformers"),
    "raydistill.loop": ("torch", "ray", "vllm", "transformers", "deepspeed", "mlflow"),
}

# Entry points answer `--help` and a bad config at once: heavy imports stand inside functions, after parsing.
LIGHT_AT_START = (
    *("raydistill", "raydistill.train", "raydistill.__main__"),
    *(
        "raydistill.serving.export",
        "raydistill.serving.serve",
        "raydistill.serving.chat",
        "raydistill.serving.model_card",
        "raydistill.serving.server",
        "raydistill.serving.bench",
        "raydistill.serving.bench_inputs",
        "raydistill.ptq.command",
        "raydistill.study.command",
        "raydistill.study.study",
    ),
    *(
        "raydistill.evaluate.command",
        "raydistill.evaluate.arguments",
        "raydistill.evaluate.plan",
        "raydistill.evaluate.targets",
        "raydistill.evaluate.run_defaults",
        "raydistill.evaluate.hub",
        "raydistill.evaluate.task_names",
        "raydistill.evaluate.harness_tasks",
    ),
)
HEAVY = ("torch", "ray", "vllm", "transformers", "deepspeed", "mlflow", "lm_eval", "raydistill.launch")

# Waits for another process without a time limit of their own, and what limits them. Every other one has one where it stands.
MAY_WAIT = {
    "raydistill.background.aside": "a thread of this process, whose own waits are limited; a signal leaves it behind",
    "raydistill.trainer.worker.serve": "an idle crew waits for a job as long as its driver lives",
    "raydistill.trainer.crew.wait_done": "TrainerGroup.finish gives it trainer.timeout_s",
    "raydistill.trainer.crew._answer": "TrainerGroup.start gives it START_TIMEOUT_S, TrainerCrew.end its patience",
    "raydistill.trainer.group._answer": "_within and _trained give it theirs",
    "raydistill.sweep.tuner._next_report": "evaluations come as the run, each of whose calls is limited, gets there",
    "raydistill.sweep.tuner._run": "a trial takes as long as its run, each of whose calls is limited",
}

LONGEST_FILE = 400
LONGEST_FUNCTION = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One `import` of one source file."""

    importer: str
    imported: str
    place: str
    at_start: bool
    """Runs when the importing module is imported: not inside a function, not under TYPE_CHECKING."""


@cache
def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for name, path in modules().items() for found in imports_of(name, path))


def imports_of(name: str, path: Path) -> Iterator[Import]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node, at_start in _statements(tree_of(path)):
        for imported in _imported_names(node, package):
            place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            yield Import(importer=name, imported=imported, place=place, at_start=at_start)


def _statements(tree: ast.AST, at_start: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Every statement, and whether it runs when the module is imported. Expressions hold no import, and are most of a tree."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.stmt, ast.excepthandler, ast.match_case)):
            yield node, at_start
            yield from _statements(node, at_start and not _runs_later(node))


def _runs_later(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def _imported_names(node: ast.AST, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    parents = package.split(".")[: len(package.split(".")) - node.level + 1]
    base = ".".join([*(parents if node.level else []), *([node.module] if node.module else [])])
    # `from ray import tune` imports the module ray.tune: keep the name, prefix rules then see both.
    return [f"{base}.{alias.name}" for alias in node.names]


def covers(room: str, name: str) -> bool:
    """Whether a dotted name is in a room."""
    return name == room or name.startswith(f"{room}.")


def in_any(rooms: tuple[str, ...], name: str) -> bool:
    return any(covers(room, name) for room in rooms)


def is_ours(name: str) -> bool:
    return in_any(PACKAGES, name) and name not in PACKAGES


def report(offenders: list[Import], rule: str) -> str:
    return "\n".join(f"{found.place}: {found.importer} imports {found.imported}; {rule}" for found in offenders)


def test_the_lower_rooms_import_only_what_lies_below_them():
    for room, allowed in MAY_IMPORT_ONLY.items():
        offenders = [
            found
            for found in imports()
            if covers(room, found.importer)
            and is_ours(found.imported)
            and not in_any((room, *allowed), found.imported)
            and found.imported != "raydistill.__version__"
        ]
        assert not offenders, report(offenders, f"{room} may import only {', '.join(allowed) or 'nothing of ours'}")


def test_rooms_that_must_not_know_each_other_do_not():
    for room, forbidden in MUST_NOT_IMPORT.items():
        offenders = [found for found in imports() if covers(room, found.importer) and in_any(forbidden, found.imported)]
        assert not offenders, report(offenders, f"{room} must not know {', '.join(forbidden)}")


def test_the_wiring_is_imported_by_entry_points_only():
    for module, importers in ONLY_IMPORTED_BY.items():
        offenders = [
            found
            for found in imports()
            if covers(module, found.imported)
            and not in_any((module, *importers), found.importer)
            and found.importer != PYTHON_API
        ]
        assert not offenders, report(offenders, f"only {', '.join(importers) or 'the interpreter'} may")


def test_each_library_stays_in_its_home():
    for library, homes in LIBRARY_HOMES.items():
        offenders = [
            found for found in imports() if covers(library, found.imported) and not in_any(homes, found.importer)
        ]
        assert not offenders, report(offenders, f"the home of {library} is {', '.join(homes)}")


def test_rooms_with_few_libraries_use_no_other():
    for room, allowed in MAY_USE_ONLY.items():
        offenders = [
            found
            for found in imports()
            if covers(room, found.importer)
            and not in_any(PACKAGES, found.imported)
            and found.imported.partition(".")[0] not in sys.stdlib_module_names
            and not in_any(allowed, found.imported)
        ]
        assert not offenders, report(offenders, f"{room} uses only {', '.join(allowed)}")


def test_light_rooms_use_no_heavy_library():
    for room, avoided in MUST_NOT_USE.items():
        offenders = [found for found in imports() if covers(room, found.importer) and in_any(avoided, found.imported)]
        assert not offenders, report(offenders, f"{room} does without {', '.join(avoided)}")


def test_entry_points_import_heavy_libraries_only_after_parsing():
    offenders = [
        found
        for found in imports()
        if found.importer in LIGHT_AT_START and found.at_start and in_any(HEAVY, found.imported)
    ]
    assert not offenders, report(offenders, "import it inside the function that needs it, after parsing")


def test_no_modules_import_each_other_in_a_circle():
    names = modules()
    edges: dict[str, set[str]] = {name: set() for name in names}
    for found in imports():
        target = found.imported if found.imported in names else found.imported.rpartition(".")[0]
        if found.at_start and target in names and target != found.importer:
            edges[found.importer].add(target)
    remaining = dict(edges)
    while leaves := [name for name, targets in remaining.items() if not targets & remaining.keys()]:
        for name in leaves:
            del remaining[name]
    assert not remaining, f"a circle of imports lies within: {', '.join(sorted(remaining))}"


def test_every_module_says_what_it_is_responsible_for():
    silent = [
        str(path.relative_to(ROOT))
        for name, path in modules().items()
        if covers("raydistill", name) and not ast.get_docstring(tree_of(path))
    ]
    assert not silent, f"no module docstring: {', '.join(silent)}"


def test_no_file_is_longer_than_a_reader_can_hold():
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in modules().values()}
    too_long = sorted(((lines, str(path)) for path, lines in lengths.items() if lines > LONGEST_FILE), reverse=True)
    assert not too_long, f"longer than {LONGEST_FILE} lines, longest first: {too_long}"


def test_no_function_is_longer_than_a_screen_or_two():
    lengths = sorted(
        (
            (node.end_lineno or 0) - node.lineno + 1,
            f"{path.relative_to(ROOT)}:{node.lineno} {node.name}",
        )
        for path in modules().values()
        for node in ast.walk(tree_of(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    too_long = [entry for entry in reversed(lengths) if entry[0] > LONGEST_FUNCTION]
    assert not too_long, f"longer than {LONGEST_FUNCTION} lines, longest first: {too_long}"


def unlimited_waits(tree: ast.AST, function: str = "") -> Iterator[str]:
    """The function of each `ray.get`, `ray.wait` or awaited remote call without a time limit, as far as one expression shows
    it: a reference that is awaited by its name is not seen."""
    for node in ast.iter_child_nodes(tree):
        inner = node.name if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
        if isinstance(node, ast.Call) and _is_ray_wait(node.func):
            if all(keyword.arg != "timeout" for keyword in node.keywords):
                yield inner
        elif isinstance(node, ast.Await) and isinstance(node.value, ast.Call):
            awaited = ast.unparse(node.value.func)
            if awaited.endswith(".remote") or awaited == "asyncio.wrap_future":
                yield inner
        yield from unlimited_waits(node, inner)


def _is_ray_wait(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in ("get", "wait") and ast.unparse(node.value) == "ray"


def test_every_wait_for_another_process_has_a_time_limit():
    found = {f"{name}.{function}" for name, path in modules().items() for function in unlimited_waits(tree_of(path))}
    assert found == MAY_WAIT.keys(), "give it a limit, or name what limits it in MAY_WAIT"


def test_the_rule_about_waits_sees_each_form():
    source = (
        "async def a():\n    await actor.work.remote(1)\nasync def b():\n    await asyncio.wrap_future(ref.future())\n"
        "def c():\n    return [ray.get(ref)]\ndef d():\n    ray.wait(refs, num_returns=2)\n"
        "async def fine():\n    ray.get(ref, timeout=1)\n    await asyncio.wait_for(actor.work.remote(1), 1)\n"
    )
    assert list(unlimited_waits(ast.parse(source))) == ["a", "b", "c", "d"]


def test_the_rules_see_imports_of_every_form():
    source = (
        "import vllm.entrypoints\nfrom ray import tune\nfrom . import launch\nfrom ..trainer import group\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import mlflow\n"
    )
    tree = ast.parse(source)
    names = [name for node in ast.walk(tree) for name in _imported_names(node, "raydistill.actors")]
    assert {"vllm.entrypoints", "ray.tune", "raydistill.actors.launch", "raydistill.trainer.group", "mlflow"} <= set(
        names
    )
    later = [node for node in tree.body if _runs_later(node)]
    assert [type(node) for node in later] == [ast.If, ast.FunctionDef]
    assert covers("raydistill.config", "raydistill.config.load")
    assert not covers("ray", "raydistill.config")


def test_the_script_for_the_other_environment_knows_nothing_of_ours():
    offenders = [found for found in imports() if found.importer == "raydistill.ptq.runner" and is_ours(found.imported)]
    assert not offenders, report(offenders, "it runs where raydistill and its libraries are not")
