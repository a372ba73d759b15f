"""Which folder vLLM runs for an export on this machine, and in which precision.

vLLM does not know raydistill's packed layout, and has no 4-bit kernel for x86 processors without AVX-512: plain weights are
then written beside the export, and used again the next time. `raydistill runs prune` removes them.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import uuid
from pathlib import Path
from typing import Any

from raydistill.cli import console
from raydistill.errors import ModelError, UserError
from raydistill.quant.formats import MANIFEST, PLAIN_COPY, SOURCE


def runnable_folder(folder: Path, takes_int4: bool) -> Path:
    """The model's folder itself, or plain weights written beside it."""
    reason = why_plain(folder, takes_int4)
    return folder if reason is None else plain_copy(folder, reason)


def why_plain(folder: Path, takes_int4: bool) -> str | None:
    """Why vLLM cannot run these weights as they are stored; None if it can."""
    manifest = manifest_of(folder)
    if manifest is None or manifest.get("as") == "dequantized":
        return None
    if manifest.get("as", "packed") == "packed":
        return "is packed"
    return None if takes_int4 else "is int4, for which vLLM has no kernel on this processor"


def plain_copy(export: Path, reason: str) -> Path:
    """FOLDER.dequantized beside an export: written if it is not there or is of another student.

    A float32 student's adapter becomes part of the weights, which on a CPU is twice as fast as vLLM's LoRA. In 16 bits the
    sum would be rounded to another student: the adapter stays beside the weights.
    """
    copy, source = export.with_name(f"{export.name}{PLAIN_COPY}"), _source_of(export)
    manifest, made = manifest_of(export) or {}, manifest_of(copy)
    is_served = manifest.get("lora") is not None
    merges = is_served and manifest.get("dtype") == "float32"
    is_beside = made is not None and made.get("lora") is not None
    if made is not None and made.get("extra", {}).get(SOURCE) == source and is_beside == (is_served and not merges):
        console.print(f"{export} {reason}: using the plain weights in {copy}", soft_wrap=True)
        return copy
    if copy.exists() and (made is None or SOURCE not in made.get("extra", {})):
        raise UserError(f"{copy} is in the way: plain weights of {export.name} belong there; move or remove it")
    console.print(f"{export} {reason}: writing plain weights to {copy}", soft_wrap=True)
    from raydistill.quant.export_files import rename_over
    from raydistill.quant.layouts import write_layout

    building = copy.with_name(f".{copy.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        write_layout(export, building, "dequantized", merge_adapter=merges, extra={SOURCE: source})
        rename_over(building, copy)
    except OSError as error:
        raise UserError(
            f"plain weights cannot be written to {copy} ({error.strerror or error}); export the run with "
            "--as dequantized to a place with room, and serve that"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return copy


def engine_dtype(folder: Path, is_cpu: bool) -> str:
    """In which vLLM computes: what the folder says (left alone, vLLM takes bfloat16 for float32); its 4-bit kernels for CPUs
    know bfloat16 only."""
    config = json.loads((folder / "config.json").read_text())
    if is_cpu and config.get("quantization_config"):
        return "bfloat16"
    text = config.get("text_config") or {}
    said = [
        (manifest_of(folder) or {}).get("dtype"),
        *(c.get(k) for c in (config, text) for k in ("dtype", "torch_dtype")),
    ]
    return str(next((dtype for dtype in said if dtype), "auto"))


def _source_of(export: Path) -> str:
    """Fingerprint of an export: its raydistill.json holds the hashes of all its weights."""
    return hashlib.sha256((export / MANIFEST).read_bytes()).hexdigest()[:16]


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """raydistill.json of a folder; None where there is none."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except OSError:
        return None
    except ValueError as error:
        raise ModelError(f"{folder / MANIFEST} is damaged ({error}); export the student again") from error
    return manifest


def takes_int4() -> bool:
    """Whether vLLM has a 4-bit kernel on this machine."""
    return not is_cpu() or _cpu_takes_int4()


def is_cpu() -> bool:
    """Whether vLLM runs on CPUs here."""
    import torch

    return not torch.cuda.is_available()


def _cpu_takes_int4() -> bool:
    """vLLM's build for x86 processors without AVX-512 loads int4 weights and fails at the first token."""
    import torch

    return platform.machine().lower() not in ("x86_64", "amd64") or bool(torch.cpu._is_avx512_supported())
