"""raydistill: distil a full-precision teacher into a quantized student, on text the student writes itself.

    from raydistill import load_config, run

    config = load_config(["@configs/demo.toml", "--trainer.num_steps", "50"]).config
    summary = run(config)

More in docs/extending.md.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raydistill.config import Config
    from raydistill.config.load import load_config
    from raydistill.launch import Pools, RunSummary, make_pools, run, start_cluster

__version__ = "0.1.0"
__all__ = ["Config", "Pools", "RunSummary", "__version__", "load_config", "make_pools", "run", "start_cluster"]
_HOMES = {
    "Config": "raydistill.config",
    "load_config": "raydistill.config.load",
    **dict.fromkeys(("Pools", "RunSummary", "make_pools", "run", "start_cluster"), "raydistill.launch"),
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import raydistill` itself stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
