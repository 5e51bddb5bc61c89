#!/usr/bin/env bash
# peft 0.21.2 (transformers 5.23.0, torch 2.13.0)
#
# One would expect: LoraConfig(r=4) with Mixtral's projections w1, w2, w3 adapts each of them with
# rank 4, and a warning that keys of rank_pattern "were ignored" means that they were.
# Observed: since w1 and w3 are one parameter (gate_up_proj) in this transformers, peft targets that
# one with rank 8 for each expert, by a rank_pattern of its own; it warns that this very pattern was
# ignored, and applies it. LoraConfig.r stays 4, so whoever sizes an engine by it sizes it too small.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  'torch==2.13.0' 'transformers==5.23.0' 'peft==0.21.2'
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import platform
import warnings

import peft
import torch
import transformers
from transformers import MixtralConfig, MixtralForCausalLM

print("python", platform.python_version(), "| torch", torch.__version__)
print("transformers", transformers.__version__, "| peft", peft.__version__)
EXPERTS, RANK = 4, 4
model = MixtralForCausalLM(
    MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=EXPERTS,
    )
)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=RANK, lora_alpha=8, target_modules=["w1", "w2", "w3"])
    )
said = [str(warning.message) for warning in caught if "rank_pattern" in str(warning.message)]
config = adapted.peft_config["default"]
ranks = {
    name: tensor.shape[0] // EXPERTS
    for name, tensor in adapted.named_parameters()
    if "lora_A" in name
}
print("r", config.r, "rank_pattern", config.rank_pattern)
print(*said, sep="\n")
for name, rank in ranks.items():
    print("rank for each expert", rank, name)

assert config.r == RANK, "the behaviour has changed"
assert len(said) == 1, "the behaviour has changed"
assert "ignored" in said[0], "the behaviour has changed"
assert sorted(ranks.values()) == [RANK, 2 * RANK], "the behaviour has changed"
PYTHON
