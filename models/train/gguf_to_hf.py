"""Turns a GGUF file of a Llama model with a byte-level BPE tokenizer into a folder in the Hugging Face layout.

Written in plain numpy, and on its own, so that it checks the Rust reader instead of repeating its mistakes. Knows what
SmolLM2 needs: tensors of F32, F16, Q8_0 and Q4_1, the `smollm` pre-tokenizer, no rope scaling.

    python gguf_to_hf.py MODEL.gguf FOLDER
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
CONTROL_TOKEN = 3


class Gguf:
    """Metadata in `keys`, tensors as (type, shape, raw bytes) in `tensors`."""

    def __init__(self, path):
        self.data, self.at = np.memmap(path, np.uint8, "r"), 0
        magic, version, n_tensors, n_keys = self.scalars("IIQQ")
        if magic != 0x46554747 or version != 3:
            raise SystemExit(f"{path} is no GGUF file of version 3")
        self.keys = {}
        for _ in range(n_keys):
            name = self.string()
            self.keys[name] = self.value(self.scalars("I")[0])
        infos = []
        for _ in range(n_tensors):
            name = self.string()
            dims = self.scalars(f"{self.scalars('I')[0]}Q")
            infos.append((name, dims[::-1], *self.scalars("IQ")))
        alignment = self.keys.get("general.alignment", 32)
        start = -(-self.at // alignment) * alignment
        self.tensors = {name: (kind, shape, self.data[start + offset :]) for name, shape, kind, offset in infos}

    def scalars(self, codes):
        codes = "<" + codes
        values = struct.unpack_from(codes, self.data, self.at)
        self.at += struct.calcsize(codes)
        return values

    def string(self):
        (length,) = self.scalars("Q")
        self.at += length
        return bytes(self.data[self.at - length : self.at]).decode()

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            item, length = self.scalars("IQ")
            return [self.value(item) for _ in range(length)]
        return self.scalars(SCALARS[kind])[0]

    def tensor(self, name):
        """The tensor in f32."""
        kind, shape, raw = self.tensors[name]
        n = int(np.prod(shape))
        if kind == 0:
            values = raw[: n * 4].view(np.float32)
        elif kind == 1:
            values = raw[: n * 2].view(np.float16).astype(np.float32)
        elif kind == 8:  # Q8_0: per 32 values an f16 scale and 32 int8
            blocks = raw[: n // 32 * 34].reshape(-1, 34)
            scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
            values = scale * blocks[:, 2:].copy().view(np.int8).astype(np.float32)
        elif kind == 3:  # Q4_1: per 32 values an f16 scale, an f16 minimum and 16 bytes, low nibbles first
            blocks = raw[: n // 32 * 20].reshape(-1, 20)
            scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
            minimum = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
            nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
            values = scale * nibbles.astype(np.float32) + minimum
        else:
            raise SystemExit(f"{name} has GGUF type {kind}, known are 0, 1, 3 and 8")
        return np.array(values, np.float32).reshape(shape)


def hf_config(keys):
    hidden, heads = keys["llama.embedding_length"], keys["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": keys["llama.feed_forward_length"],
        "num_hidden_layers": keys["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": keys["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "vocab_size": len(keys["tokenizer.ggml.tokens"]),
        "max_position_embeddings": keys["llama.context_length"],
        "rope_theta": keys["llama.rope.freq_base"],
        "rms_norm_eps": round(keys["llama.attention.layer_norm_rms_epsilon"], 12),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": keys["tokenizer.ggml.bos_token_id"],
        "eos_token_id": keys["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "bfloat16",
    }


def uninterleave(rows, heads):
    """GGUF keeps the q and k rows of a head as pairs (0, D/2, 1, D/2 + 1, ...); Hugging Face as two halves."""
    n, k = rows.shape
    return rows.reshape(heads, n // heads // 2, 2, k).swapaxes(1, 2).reshape(n, k)


def hf_tensors(gguf, config):
    """All tensors in f32, by their Hugging Face names."""
    tensors = {
        "model.embed_tokens.weight": gguf.tensor("token_embd.weight"),
        "model.norm.weight": gguf.tensor("output_norm.weight"),
    }
    names = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in names.items():
            tensor = gguf.tensor(f"blk.{layer}.{theirs}.weight")
            if theirs in heads:
                tensor = uninterleave(tensor, heads[theirs])
            tensors[f"model.layers.{layer}.{ours}.weight"] = tensor
    return {name: torch.from_numpy(np.ascontiguousarray(tensor)) for name, tensor in tensors.items()}


def hf_tokenizer(keys):
    if keys["tokenizer.ggml.pre"] != "smollm":
        raise SystemExit(f"pre-tokenizer {keys['tokenizer.ggml.pre']} is not known, only smollm")
    vocabulary = {token: i for i, token in enumerate(keys["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in keys["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"])
    special = [token for token, kind in kinds if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def convert(gguf, folder):
    """Writes the folder (weights in bf16) and returns (config, tensors in f32)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = hf_config(gguf.keys)
    tensors = hf_tensors(gguf, config)
    save_file({n: t.to(torch.bfloat16) for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    hf_tokenizer(gguf.keys).save(str(folder / "tokenizer.json"))
    tokens = gguf.keys["tokenizer.ggml.tokens"]
    ids = {name: config[f"{name}_token_id"] for name in ("bos", "eos")}
    files = {
        "config.json": config,
        "generation_config.json": {f"{name}_token_id": i for name, i in ids.items()},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{name}_token": tokens[i] for name, i in ids.items()},
            "clean_up_tokenization_spaces": False,
            "chat_template": gguf.keys["tokenizer.chat_template"],
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return config, tensors


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    convert(Gguf(sys.argv[1]), Path(sys.argv[2]))
