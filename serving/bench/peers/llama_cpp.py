"""llama-cpp-python, for `child.py`: the checkpoint as a GGUF file, all sequences of a step in one `llama_decode`.

Its high-level class holds one sequence, so this drives the library underneath, as llama.cpp's own server does: a batch
with the next token of each sequence. Needs the packages `llama-cpp-python` and `gguf`.

The file is of llama.cpp's architecture "deepseek2": latent attention in the absorbed form (one key-value head, kv_b_proj
split into k_b, transposed, and v_b), the experts of a layer stacked, rotary pairs next to each other as in the checkpoint.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
_MODEL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def load(
    *, model_dir: str, dtype: str, max_num_seqs: int, max_tokens: int, threads: int, exact: bool = False
) -> tuple[str, Callable[..., list[list[int]]]]:
    """`dtype` is that of the weights, "float32" or "bfloat16".

    As it comes the cache is fp16 and flash attention rounds further (logits differ by some 1e-4 where everything else is
    fp32, which now and then picks another expert); `exact` has an fp32 cache and none of it, and is slower.
    """
    import llama_cpp

    llama_cpp.llama_backend_init()
    with tempfile.TemporaryDirectory(prefix="baton-gguf-") as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(Path(model_dir), path, dtype)
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    if model is None:
        raise RuntimeError("llama.cpp does not load the file that was written for it; see its messages above")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = max_num_seqs * max_tokens
    params.n_batch = params.n_ctx
    params.n_seq_max = max_num_seqs
    # One buffer for all sequences: 10 to 15 % faster here than one each.
    params.kv_unified = True
    params.n_threads = params.n_threads_batch = threads
    if exact:
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, params)
    if context is None:
        raise RuntimeError("llama.cpp makes no context; see its messages above")
    memory = llama_cpp.llama_get_memory(context)
    batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
    num_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def step(rows: list[list[int]], num_past: int) -> list[int]:
        """One forward over rows of new tokens, row i of sequence i; the greedy token after each."""
        last = []
        place = 0
        for sequence, token_ids in enumerate(rows):
            for offset, token_id in enumerate(token_ids):
                batch.token[place] = token_id
                batch.pos[place] = num_past + offset
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = sequence
                batch.logits[place] = offset == len(token_ids) - 1
                place += 1
            last.append(place - 1)
        batch.n_tokens = place
        status = llama_cpp.llama_decode(context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode answers {status}")
        return [
            int(np.argmax(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, at), shape=(num_vocab,))))
            for at in last
        ]

    def generate(prompts: list[list[int]], num_new_tokens: int) -> list[list[int]]:
        """Prompts of one length."""
        llama_cpp.llama_memory_clear(memory, False)
        tokens = step(prompts, 0)
        new = [[token] for token in tokens]
        for done in range(1, num_new_tokens):
            tokens = step([[token] for token in tokens], len(prompts[0]) + done - 1)
            for sequence, token in zip(new, tokens, strict=True):
                sequence.append(token)
        return new

    return llama_cpp.__version__, generate


def write_gguf(model_dir: Path, path: Path, dtype: str) -> None:
    """The whole file, without a vocabulary. Matrices in `dtype`; norms, the gate and its bias in fp32, as llama.cpp wants."""
    import gguf

    config = json.loads((model_dir / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "deepseek2")
    _add_sizes(writer, config)
    for name, tensor in renamed(read_tensors(model_dir), config):
        if dtype == "float32" or tensor.ndim == 1 or "ffn_gate_inp" in name:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(tensor), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: Any, config: Mapping[str, Any]) -> None:
    import gguf

    rope_width, latent = config["qk_rope_head_dim"], config["kv_lora_rank"]
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)
    # 0: one plain q_proj.
    writer.add_q_lora_rank(config["q_lora_rank"] or 0)
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rope_width)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope_width)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(rope_width)
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    _add_rope(writer, config)


def _add_rope(writer: Any, config: Mapping[str, Any]) -> None:
    """Base and YaRN, as published (`rope_scaling`) or as transformers >= 5 writes it (`rope_parameters`)."""
    import gguf

    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return
    # llama.cpp takes mscale for mscale_all_dim and scales the scores by it twice; true of every published model.
    if not rope.get("mscale") == rope.get("mscale_all_dim") != 0 or rope.get("attention_factor", 1.0) != 1.0:
        raise ValueError(f"llama.cpp has no YaRN with different or no mscale and mscale_all_dim: {rope}")
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast", 32))
    writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow", 1))
    writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def renamed(tensors: Mapping[str, Array], config: Mapping[str, Any]) -> Iterator[tuple[str, Array]]:
    """Tensors of the checkpoint under the file's names and in its shapes; numpy's axes are ggml's in reverse."""
    for theirs, ours in _MODEL_NAMES.items():
        yield ours, tensors[theirs]
    for layer in range(config["num_hidden_layers"]):
        source, target = f"model.layers.{layer}.", f"blk.{layer}."
        for theirs, ours in _LAYER_NAMES.items():
            if source + theirs in tensors:
                yield target + ours, tensors[source + theirs]
        num_heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
        kv_b = tensors[source + "self_attn.kv_b_proj.weight"].reshape(num_heads, -1, config["kv_lora_rank"])
        yield target + "attn_k_b.weight", kv_b[:, :nope].transpose(0, 2, 1)
        yield target + "attn_v_b.weight", kv_b[:, nope:]
        if layer >= config["first_k_dense_replace"]:
            for kind in ("gate", "up", "down"):
                names = [f"{source}mlp.experts.{e}.{kind}_proj.weight" for e in range(config["n_routed_experts"])]
                yield f"{target}ffn_{kind}_exps.weight", np.stack([tensors[name] for name in names])


def read_tensors(model_dir: Path) -> dict[str, Array]:
    """Every tensor of every safetensors file, as fp32. numpy has no bfloat16, hence no safetensors package here."""
    tensors: dict[str, Array] = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        data = np.memmap(path, np.uint8, "r")
        header_end = 8 + int.from_bytes(data[:8].tobytes(), "little")
        entries = json.loads(data[8:header_end].tobytes())
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            begin, end = (header_end + offset for offset in entry["data_offsets"])
            tensors[name] = _as_fp32(data[begin:end], entry["dtype"]).reshape(entry["shape"])
    return tensors


def _as_fp32(data: Array, dtype: str) -> Array:
    if dtype == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype not in ("F32", "F16"):
        raise ValueError(f"weights of type {dtype} are not converted; supported are F32, F16 and BF16")
    return data.view({"F32": np.float32, "F16": np.float16}[dtype]).astype(np.float32)
