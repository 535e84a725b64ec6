"""LoRA adapters as PEFT saves them, made ready for the slots of one version.

    PEFT folder ──► open_adapter ──► slot_tensors ──► adapter folder
    adapter_config.json              in the order,     adapter.safetensors   lora.{name}.a (in, rank)
    adapter_model.safetensors        rank and scale                          lora.{name}.b (rank, out)
                                     of the graph      adapter.json  manifest.json

``python -m exporters.adapters PEFT_FOLDER VERSION_FOLDER OUT`` does all of it; the engine copies the tensors of an
adapter folder into a slot of the graph inputs of the same names.

PEFT: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from exporters.adapters.peft_folder import Adapter, LowRank, open_adapter
from exporters.adapters.slot_tensors import slot_tensors

__all__ = ["Adapter", "LowRank", "open_adapter", "slot_tensors"]
