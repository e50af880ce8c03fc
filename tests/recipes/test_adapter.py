from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import safeopt.demo

ADAPTER = Path(safeopt.demo.__file__).parent / "adapter"


def test_shipped_adapter_is_small_bfloat16_and_names_its_model() -> None:
    weights = ADAPTER / "adapter_model.safetensors"
    assert weights.stat().st_size <= 3 * 2**20
    tensors = load_file(weights)
    assert len(tensors) == 2 * 7 * 30  # A and B of seven linear layers in each of thirty blocks
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    config = json.loads((ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
