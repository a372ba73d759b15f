"""An exported student in another layout: as compressed-tensors, or as plain weights that any tool loads.

    packed               as `export_student` wrote it
    compressed-tensors   int4 as vLLM and transformers read it (compressed.py)
    dequantized          Q(W) in the dtype that the student computes in; with `merge_adapter` Q(W) + s*BA, summed
                         and stored in float32

Each holds configuration, tokenizer, generation settings, raydistill.json (`as` names the layout) and, for a student in
served mode, adapter/. `write_layout` reads a folder that has codes (the first two); `load_layout` is `load_exported` for the
last two.
"""

import io
import json
import shutil
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig, GenerationConfig

from raydistill.errors import QuantError
from raydistill.quant.compressed import compressed_tensors, quantization_config, take_codes
from raydistill.quant.export import WEIGHTS, layout_of, read_manifest
from raydistill.quant.export_files import (
    ADAPTER_WEIGHTS,
    PEFT_PREFIX,
    apply_adapter,
    compare_hashes,
    copied_files,
    packed_tensors,
    read_tensors,
    stored_codes,
    stored_format,
)
from raydistill.quant.formats import ADAPTER_FOLDER, MANIFEST, Layout, check_layout
from raydistill.quant.grid import QuantizedWeight, dequantize
from raydistill.quant.hashing import hash_tensors
from raydistill.quant.packing import pack
from raydistill.quant.rebuild import merged_weight


@torch.no_grad()
def write_layout(
    source: Path, building: Path, layout: Layout, merge_adapter: bool = False, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Fill the new folder `building` from an export; returns raydistill.json. The caller gives it its final name.

    extra: added to what raydistill.json keeps. QuantError if codes read back are not those that were read first.
    """
    manifest = read_manifest(source)
    fmt, dtype = stored_format(manifest), manifest["dtype"]
    check_layout(layout, fmt, manifest["lora"] is not None, merge_adapter)
    building.mkdir(parents=True)
    for path in copied_files(source):
        shutil.copyfile(path, building / path.name)
    manifest["extra"] = {**manifest.get("extra", {}), **(extra or {})}
    codes, others = _read_weights(source, manifest)
    if layout == "packed":
        tensors = others | packed_tensors({name: pack(quantized) for name, quantized in codes.items()})
    elif layout == "compressed-tensors":
        assert fmt is not None
        tensors = others | compressed_tensors(codes)
        _set_config(building, dtype, quantization_config(fmt, _other_linears(source, manifest["layers"])))
    else:
        tensors = others | {f"{name}.weight": dequantize(quantized) for name, quantized in codes.items()}
        if dtype is not None:
            tensors = _in_dtype(tensors, getattr(torch, dtype))
        if merge_adapter:
            _merge(tensors, source, manifest["lora"])
            # An adapter's part is below what bfloat16 resolves of many weights: rounded, it would be another student.
            tensors = _in_dtype(tensors, torch.float32)
            manifest["lora"], dtype = None, "float32"
            manifest["dtype"] = dtype
        _set_config(building, dtype, None)
        manifest["others_hash"] = hash_tensors(tensors)
    save_file(tensors, building / WEIGHTS, metadata={"format": "pt"})
    manifest["as"] = layout
    if manifest["lora"] is not None:
        shutil.copytree(source / ADAPTER_FOLDER, building / ADAPTER_FOLDER)
    if not (building / "generation_config.json").is_file():
        GenerationConfig.from_model_config(AutoConfig.from_pretrained(source)).save_pretrained(building)
    _read_weights(building, manifest)
    (building / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def load_layout(folder: Path, manifest: Mapping[str, Any], dtype: torch.dtype | None = None) -> nn.Module:
    """See `load_exported`. transformers reads the weights, as it would for anyone; hashes are compared first.

    compressed-tensors computes Q(W) in the dtype it loads in, so it loads in float32 and the finished weights are
    rounded to the student's dtype, once, as in training.
    """
    _read_weights(folder, manifest)
    wanted = dtype or (getattr(torch, manifest["dtype"]) if manifest["dtype"] else None)
    is_compressed = layout_of(manifest) == "compressed-tensors"
    options: dict[str, Any] = {"dtype": wanted or "auto"}
    if is_compressed:
        options = {"dtype": torch.float32, "quantization_config": CompressedTensorsConfig(dequantize=True)}
    try:
        with redirect_stderr(io.StringIO()):  # a progress bar of the library's own
            model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise QuantError(f"{folder} does not load in transformers ({reason}); export the student again.") from error
    if is_compressed and wanted not in (None, torch.float32):
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(wanted)
    if manifest["lora"] is not None:
        apply_adapter(model, folder / ADAPTER_FOLDER, manifest["lora"])
    return cast(nn.Module, model).eval()


def _read_weights(folder: Path, manifest: Mapping[str, Any]) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
    """(codes by layer, all other tensors) of an export; QuantError unless they are what raydistill.json says.
    Dequantized weights have no codes any more: they are all among the others."""
    path = folder / WEIGHTS
    tensors = read_tensors(path)
    if layout_of(manifest) == "packed":
        return stored_codes(manifest, tensors, path)
    if layout_of(manifest) == "dequantized":
        if hash_tensors(tensors) != manifest["others_hash"]:
            raise QuantError(f"{path} is damaged: its weights are not those that were written; export it again.")
        return {}, tensors
    fmt = stored_format(manifest)
    assert fmt is not None, "check_layout refuses unquantized weights"
    try:
        codes = take_codes(tensors, manifest["layers"], fmt)
    except KeyError as error:
        raise QuantError(f"{path} lacks tensor {error}; export the student again.") from error
    compare_hashes(manifest, codes, tensors, path)
    return codes, tensors


def _in_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}


def _merge(tensors: dict[str, Tensor], source: Path, lora: Mapping[str, Any]) -> None:
    """Put the adapter into dense weights."""
    path = source / ADAPTER_FOLDER / ADAPTER_WEIGHTS
    adapter = read_tensors(path)
    if hash_tensors(adapter) != lora["hash"]:
        raise QuantError(f"{path} is damaged: the adapter is not what was written; export the student again.")
    for name in lora["targets"]:
        if f"{name}.weight" not in tensors:
            raise QuantError(f"--merge-adapter: the weight of {name} is tied to another layer's; leave the switch out")
        pair = [adapter[f"{PEFT_PREFIX}{name}.lora_{part}.weight"] for part in "AB"]
        tensors[f"{name}.weight"] = merged_weight(tensors[f"{name}.weight"], pair[0], pair[1], lora["scaling"])


def _set_config(folder: Path, dtype: str | None, quantization: dict[str, Any] | None) -> None:
    """Say in config.json what the weights are; `dtype` is what tools load them in unless told otherwise."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if dtype is not None:
        config["dtype"] = dtype
        config.pop("torch_dtype", None)  # the name that older versions of transformers gave it
    if quantization is not None:
        config["quantization_config"] = quantization
    else:
        config.pop("quantization_config", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def _other_linears(folder: Path, layers: Mapping[str, Any]) -> list[str]:
    """Names of the linear layers that are not quantized."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return [name for name in linears if name not in layers]
