"""The files of an export: reading safetensors, naming packed tensors, PEFT's adapter folder, the atomic rename."""

import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.utils import cached_file

from raydistill.errors import QuantError
from raydistill.quant.formats import WeightFormat, format_from_dict
from raydistill.quant.grid import QuantizedWeight, dequantize
from raydistill.quant.hashing import hash_codes, hash_tensors
from raydistill.quant.lora import LoraConfig
from raydistill.quant.packing import PackedWeight, unpack
from raydistill.quant.prepare import ADAPTER, LoraSettings, inject_lora

PEFT_PREFIX = "base_model.model."
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def model_folder(model: str | Path) -> Path:
    """The folder of a model given as a folder, or as a hub id that was downloaded before."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(str(cached_file(str(model), "config.json", local_files_only=True))).parent
    except (OSError, ValueError) as error:
        raise QuantError(f"{model} is neither a folder nor a hub id in the local cache; download it first.") from error


def read_tensors(path: Path, skip: set[str] | None = None) -> dict[str, Tensor]:
    """All tensors of a safetensors file but those in `skip`, on the host."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if key not in (skip or set())}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise QuantError(f"{path} is missing or damaged ({error}); export or download it again.") from error


def unquantized_tensors(
    base: Path, codes: Mapping[str, QuantizedWeight], replaced: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The base folder's tensors that an export stores as they are, with those in `replaced` put in their place."""
    files = sorted(base.glob("model*.safetensors"))
    if not files or not (base / "config.json").is_file():
        raise QuantError(
            f"{base} holds no config.json with model*.safetensors; give the folder of a downloaded model, saved with "
            "save_pretrained (pickled weights are not read)."
        )
    quantized = {f"{name}.weight" for name in codes}
    skip = set(quantized)
    if AutoConfig.from_pretrained(base).get_text_config().tie_word_embeddings:
        skip.add("lm_head.weight")
    kept: dict[str, Tensor] = {}
    found: set[str] = set()
    for path in files:
        kept.update(read_tensors(path, skip))
        with safe_open(path, framework="pt") as file:
            found.update(file.keys())
    odd = sorted((quantized | replaced.keys()) - found)
    if odd:
        raise QuantError(
            f"{base} has no tensor {odd[0]} ({len(odd)} of the student's names differ); it is not the base of this "
            "student, or was saved by another version: load it in transformers and save_pretrained it first."
        )
    kept.update({key: value.detach().cpu().contiguous() for key, value in replaced.items()})
    return kept


def packed_tensors(packed: Mapping[str, PackedWeight]) -> dict[str, Tensor]:
    """Names in the file of every packed layer's parts."""
    tensors: dict[str, Tensor] = {}
    for name, weight in packed.items():
        tensors[f"{name}.weight_packed"] = weight.codes
        tensors[f"{name}.weight_scale"] = weight.scale_OG
        if weight.zero_point is not None:
            tensors[f"{name}.weight_zero_point"] = weight.zero_point
    return tensors


def stored_format(manifest: Mapping[str, Any]) -> WeightFormat | None:
    """The weight format that raydistill.json names; None for an unquantized student."""
    stored = manifest["format"]
    return stored and format_from_dict({key: value for key, value in stored.items() if key != "name"})


def stored_codes(
    manifest: Mapping[str, Any], tensors: dict[str, Tensor], path: Path
) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
    """(codes by layer, all other tensors) of a packed file, after comparing both hashes."""
    codes: dict[str, QuantizedWeight] = {}
    others, fmt = dict(tensors), stored_format(manifest)
    try:
        for name, shape in manifest["layers"].items():
            assert fmt is not None, f"{path} has quantized layers and no format"
            weight = PackedWeight(
                codes=others.pop(f"{name}.weight_packed"),
                scale_OG=others.pop(f"{name}.weight_scale"),
                zero_point=None if fmt.symmetric else others.pop(f"{name}.weight_zero_point"),
                shape_OI=(shape[0], shape[1]),
                fmt=fmt,
            )
            codes[name] = unpack(weight)
    except KeyError as error:
        raise QuantError(f"{path} lacks tensor {error}; export the student again.") from error
    compare_hashes(manifest, codes, others, path)
    return codes, others


def compare_hashes(
    manifest: Mapping[str, Any], codes: Mapping[str, QuantizedWeight], others: Mapping[str, Tensor], path: Path
) -> None:
    """QuantError unless what was read is what raydistill.json says was written."""
    for what, stored, read in (
        ("codes", manifest["codes_hash"], hash_codes(codes)),
        ("unquantized tensors", manifest["others_hash"], hash_tensors(others)),
    ):
        if stored != read:
            raise QuantError(f"{path}: the {what} have hash {read}, the export wrote {stored}; export it again.")


def dense_state(manifest: Mapping[str, Any], tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The state dict that the file's tensors stand for, after comparing both hashes."""
    codes, others = stored_codes(manifest, tensors, path)
    return others | {f"{name}.weight": dequantize(quantized) for name, quantized in codes.items()}


def write_adapter(folder: Path, adapter: Mapping[str, Tensor], lora: LoraSettings) -> dict[str, Any]:
    """The adapter in PEFT's format; returns what raydistill.json says about it."""
    targets = sorted({key.rpartition(".")[0] for key in adapter})
    folder.mkdir()
    tensors = {f"{PEFT_PREFIX}{key}.weight": value.detach().cpu().contiguous() for key, value in adapter.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    return {
        "rank": lora.rank,
        "alpha": lora.alpha,
        "scaling": lora.scaling,
        "targets": targets,
        "hash": hash_tensors(tensors),
    }


@torch.no_grad()
def apply_adapter(model: nn.Module, folder: Path, settings: Mapping[str, Any]) -> None:
    """Put the stored adapter beside the model's layers, as plain PEFT LoRA."""
    path = folder / ADAPTER_WEIGHTS
    tensors = read_tensors(path)
    if hash_tensors(tensors) != settings["hash"]:
        raise QuantError(f"{path} has hash {hash_tensors(tensors)}, the export wrote {settings['hash']}; export again.")
    targets = tuple(settings["targets"])
    inject_lora(model, LoraSettings(rank=settings["rank"], alpha=settings["alpha"], targets=targets), targets)
    for name in targets:
        layer: Any = model.get_submodule(name)
        layer.lora_A[ADAPTER].weight.copy_(tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"])
        layer.lora_B[ADAPTER].weight.copy_(tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"])


def rename_over(building: Path, final: Path) -> None:
    """Give a finished folder its final name; an earlier one steps aside first and is removed last."""
    aside = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}.old"
    if final.exists():
        final.rename(aside)
    building.rename(final)
    shutil.rmtree(aside, ignore_errors=True)


def copied_files(base: Path) -> Iterator[Path]:
    """Everything a model folder holds besides weights: configuration, tokenizer, chat template."""
    names = ("*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
             "*.model", "chat_template*")  # fmt: skip
    for path in sorted({path for name in names for path in base.glob(name)}):
        if path.is_file() and path.name != "adapter_config.json":
            yield path
