"""What we use of PEFT, imported in one place: without bitsandbytes, as none of our layers is one of its own."""

from raydistill.imports import without

with without("bitsandbytes", "sklearn"):
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners import lora

__all__ = ["LoraConfig", "inject_adapter_in_model", "lora"]
