"""`raydistill VERB ...`: thin verbs over functions that can be called from Python. Heavy imports happen inside them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from raydistill import __version__
from raydistill.cli import main_with_errors
from raydistill.errors import ConfigError

VERBS: dict[str, tuple[str, str, str]] = {
    "demo": ("raydistill.study.command", "demo_command", "the whole system on a world that needs no download"),
    "compare": (
        "raydistill.study.command",
        "compare_command",
        "distillation against the best PTQ: the table that decides",
    ),
    "train": ("raydistill.train", "train_command", "distil a student as a config says"),
    "evaluate": ("raydistill.evaluate.command", "evaluate_command", "score exported students, runs and models"),
    "export": ("raydistill.serving.export", "export_command", "write a run's student as a folder for any tool"),
    "serve": ("raydistill.serving.serve", "serve_command", "an OpenAI-compatible server of a folder, by vLLM"),
    "chat": ("raydistill.serving.chat", "chat_command", "talk to a folder's model in the terminal"),
    "bench": ("raydistill.serving.bench", "bench_command", "speed and memory of a student beside its teacher, by vLLM"),
    "sweep": ("raydistill.sweep.command", "sweep_command", "many runs of one config on one cluster, compared"),
    "ptq": ("raydistill.ptq.command", "ptq_command", "quantize without training: rounding, GPTQ, AWQ"),
    "results": (
        "raydistill.report.listing",
        "results_command",
        "list, filter, show, compare, export and report runs; --ui opens MLflow's page",
    ),
    "watch": ("raydistill.report.watch", "watch_command", "a run in the terminal while it trains"),
    "init": (
        "raydistill.preflight.init",
        "init_command",
        "write a config that fits a model, its data and the GPUs there are",
    ),
    "doctor": ("raydistill.preflight.doctor", "doctor_command", "check a config before it costs anything"),
    "runs": ("raydistill.recovery.runs", "runs_command", "the runs of a folder and their disk; prune frees it"),
    "plan": ("raydistill.preflight.plan", "plan_command", "actors, memory, bytes and time of a config; starts nothing"),
    "reproduce": ("raydistill.reproduce", "reproduce_command", "run a recorded config again and list what differs"),
    "config": ("raydistill.cli", "config_command", "show, check and explain settings"),
}


def help_text() -> str:
    """What `raydistill --help` prints."""
    verbs = "\n".join(f"  {verb:10} {text}" for verb, (_, _, text) in VERBS.items())
    return (
        f"raydistill {__version__}: distil a full-precision teacher into a quantized student that is ready to serve.\n\n"
        f"usage: raydistill VERB ...\n\nverbs:\n{verbs}\n\n"
        "`raydistill VERB --help` teaches each one; `raydistill demo` is the place to start."
    )


def dispatch(argv: Sequence[str]) -> int:
    """Run one verb."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] not in VERBS:
        from difflib import get_close_matches

        near = get_close_matches(argv[0], VERBS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(VERBS)}"
        raise ConfigError(f"raydistill has no verb {argv[0]!r}{hint}")
    module, function, _ = VERBS[argv[0]]
    command: Callable[[Sequence[str]], int] = getattr(import_module(module), function)
    return command(argv[1:])


def main() -> int:
    """The console script."""
    return main_with_errors(dispatch)


if __name__ == "__main__":
    sys.exit(main())
