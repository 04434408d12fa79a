"""Loading takes no second copy of the model: measured as the peak of a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model_factory import make_checkpoint

# Peak resident bytes of a process that loads a folder. A tiny folder stands for "everything imported, nothing loaded": the
# code of the loader and of the kernels it calls is resident in both, only the weights differ.
_PROBE = """
import json, sys
import torch
from serving.model.config import ModelConfig
from serving.model.weights import load_weights

torch.set_num_threads(1)
model = load_weights(sys.argv[1], ModelConfig.from_folder(sys.argv[1]), getattr(torch, sys.argv[2]))
lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps(int(lines["VmHWM"].split()[0]) * 1024))
"""

# Near the embedded model: 8 layers, FP8, about 14 MB on disk.
SIZES = {
    "num_hidden_layers": 8,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "vocab_size": 2048,
}


def peak_bytes(folder: Path, dtype: str) -> int:
    command = [sys.executable, "-c", _PROBE, str(folder), dtype]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[4])}
    done = subprocess.run(command, check=True, capture_output=True, timeout=100, env=environment)
    return int(json.loads(done.stdout))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to read the peak")
@pytest.mark.parametrize(("storage", "dtype", "width"), [("fp8", "bfloat16", 2)])
def test_peak_memory_is_imports_plus_weights_and_little_more(
    tmp_path: Path, storage: str, dtype: str, width: int
) -> None:
    make_checkpoint(tmp_path / "tiny", seed=1, storage=storage, num_shards=1)
    weights = make_checkpoint(tmp_path / "model", seed=1, storage=storage, num_shards=1, **SIZES)
    repeated = ("model.layers.8.embed_tokens.weight", "model.layers.8.shared_head.head.weight")
    resident = width * sum(weight.numel() for name, weight in weights.items() if name not in repeated)
    grown = peak_bytes(tmp_path / "model", dtype) - peak_bytes(tmp_path / "tiny", dtype)
    assert 0.8 * resident < grown
    assert grown < 1.3 * resident
