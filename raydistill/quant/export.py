"""The product: a folder with the packed student that stands alone, and the way back to a transformers model.

    config.json, tokenizer files      as in the base folder
    model.safetensors                 <layer>.weight_packed (uint8), .weight_scale, .weight_zero_point (uint8, packed);
                                      every other tensor in its own dtype; a tied output head is not stored again
    adapter/                          served mode: the adapter in PEFT's format
    raydistill.json                   format, mode, shapes, hashes; the last file written

A folder is written beside its final name and then renamed, so a half-written one never carries the name.
`load_exported` compares the hashes with what it read.
"""

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from raydistill.errors import QuantError
from raydistill.quant.export_files import (
    apply_adapter,
    copied_files,
    dense_state,
    model_folder,
    packed_tensors,
    read_tensors,
    rename_over,
    unquantized_tensors,
    write_adapter,
)
from raydistill.quant.formats import ADAPTER_FOLDER, MANIFEST, Layout, WeightFormat
from raydistill.quant.grid import QuantizedWeight
from raydistill.quant.hashing import hash_codes, hash_tensors
from raydistill.quant.packing import pack
from raydistill.quant.prepare import LoraSettings
from raydistill.quant.rebuild import Mode
from raydistill.quant.student import adapter_state, base_weight, merged_weight, student_codes, student_form

WEIGHTS = "model.safetensors"
LAYOUT_VERSION = 1


def export_student(
    folder_out: str | Path,
    base_folder: str | Path,
    codes: Mapping[str, QuantizedWeight],
    adapter: Mapping[str, Tensor] | None = None,
    *,
    fmt: WeightFormat | None,
    mode: Mode,
    lora: LoraSettings | None = None,
    other_weights: Mapping[str, Tensor] | None = None,
    dtype: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> str:
    """Write the folder; returns the hash of the codes (`hash_codes`).

    codes: every quantized layer. adapter: served mode only, a state of `adapter_state`; it needs `lora`.
    other_weights: parameters (by Hugging Face name) that replace those of the base folder. dtype: in which the student
    computes, such as "float32" (default: that of config.json). extra: kept in raydistill.json. An earlier export at
    `folder_out` is replaced; any other folder that is not empty is refused.
    """
    out, base = Path(folder_out), model_folder(base_folder)
    if (adapter is not None) != (mode == "served") or (adapter is not None and lora is None):
        raise QuantError(
            f"mode={mode!r}: an export takes an adapter and its lora settings if and only if it is 'served'."
        )
    if out.exists() and not (out / MANIFEST).is_file() and any(out.iterdir()):
        raise QuantError(f"{out} exists and is no export of raydistill; choose another folder or empty it.")
    others = unquantized_tensors(base, codes, other_weights or {})
    packed = {name: pack(quantized) for name, quantized in codes.items()}
    manifest = {
        "layout": LAYOUT_VERSION,
        "mode": mode,
        "format": None if fmt is None else {"name": fmt.name, **fmt.to_dict()},
        "dtype": dtype,
        "layers": {name: list(weight.shape_OI) for name, weight in sorted(packed.items())},
        "codes_hash": hash_codes(codes),
        "others_hash": hash_tensors(others),
        "lora": None,
        "extra": dict(extra or {}),
    }
    building = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        building.mkdir(parents=True)
        for source in copied_files(base):
            shutil.copyfile(source, building / source.name)
        save_file(others | packed_tensors(packed), building / WEIGHTS, metadata={"format": "pt"})
        if adapter is not None and lora is not None:
            manifest["lora"] = write_adapter(building / ADAPTER_FOLDER, adapter, lora)
        (building / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        rename_over(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return str(manifest["codes_hash"])


def export_live(folder_out: str | Path, model: nn.Module, base_folder: str | Path, extra: Mapping[str, Any]) -> str:
    """`export_student` of a live student as it computes now; returns the hash of its codes."""
    form = student_form(model)
    state = adapter_state(model)
    dtype = next(parameter.dtype for name, parameter in model.named_parameters() if "lora_" not in name)
    codes = student_codes(model)
    others: dict[str, Tensor] = {}
    if form.mode == "none":
        others = {key: value.to(dtype) for key, value in state.items() if key.removesuffix(".weight") not in codes}
    elif form.mode == "merged" and form.fmt is None and form.lora is not None:
        for name in form.targets:
            pair = (state[f"{name}.lora_A"], state[f"{name}.lora_B"])
            others[f"{name}.weight"] = merged_weight(base_weight(model, name).cpu(), *pair, form.lora.scaling).to(dtype)
    served = form.mode == "served"
    return export_student(
        folder_out, base_folder, codes, state if served else None, fmt=form.fmt, mode=form.mode,
        lora=form.lora if served else None, other_weights=others, dtype=str(dtype).removeprefix("torch."), extra=extra,
    )  # fmt: skip


def load_exported(folder: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """A transformers model in eval mode that computes what the student computed: dense Q(W), and in served mode the
    adapter beside it; from a folder in any layout (layouts.py). dtype None: the one the student was trained in.

    A folder without raydistill.json is loaded as the plain transformers model that it is (a teacher). QuantError if a
    file is missing or damaged or a hash differs.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise QuantError(f"{folder} is no folder; give an exported student or a downloaded model.")
    if not (folder / MANIFEST).is_file():
        return _load_plain(folder, dtype)
    manifest = read_manifest(folder)
    if layout_of(manifest) != "packed":
        from raydistill.quant.layouts import load_layout

        return load_layout(folder, manifest, dtype)
    state = dense_state(manifest, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    if dtype is None:
        dtype = getattr(torch, manifest["dtype"]) if manifest["dtype"] else None
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise QuantError(f"{folder / 'config.json'} is missing or damaged ({error}); export again.") from error
    model = cast(nn.Module, AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32))
    keys = model.load_state_dict(state, strict=False)
    tied = set(cast(Any, model).all_tied_weights_keys)
    if keys.unexpected_keys or set(keys.missing_keys) - tied:
        odd = (keys.unexpected_keys + sorted(set(keys.missing_keys) - tied))[:3]
        raise QuantError(f"{folder / WEIGHTS} does not fit config.json (first differences: {odd}); export again.")
    cast(Any, model).tie_weights()
    if (folder / "generation_config.json").is_file():
        cast(Any, model).generation_config = GenerationConfig.from_pretrained(folder)
    if manifest["lora"] is not None:
        apply_adapter(model, folder / ADAPTER_FOLDER, manifest["lora"])
    return model.eval()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """raydistill.json of an exported folder."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        needed = {"layout", "mode", "format", "dtype", "layers", "codes_hash", "others_hash", "lora"}
        missing = needed - manifest.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise QuantError(f"{path} cannot be read ({error}); export the student again.") from error
    if missing or manifest["layout"] != LAYOUT_VERSION:
        lacks = f" and lacks {sorted(missing)}" if missing else ""
        raise QuantError(f"{path} has another layout than version {LAYOUT_VERSION}{lacks}; export the student again.")
    return cast(dict[str, Any], manifest)


def layout_of(manifest: Mapping[str, Any]) -> Layout:
    """How the folder stores its weights; see layouts.py."""
    return cast(Layout, manifest.get("as", "packed"))


def packed_bytes(folder: str | Path) -> int:
    """Bytes of all weight files in the folder, the adapter's included."""
    files = list(Path(folder).rglob("*.safetensors"))
    if not files:
        raise QuantError(f"{folder} holds no .safetensors file; give an exported student or a model folder.")
    return sum(path.stat().st_size for path in files)


def _load_plain(folder: Path, dtype: torch.dtype | None) -> nn.Module:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise QuantError(f"{folder} is neither an exported student nor a model that loads: {reason}") from error
    return cast(nn.Module, model).eval()
