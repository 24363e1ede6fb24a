"""Writes the fixtures that our logits are compared with: tiny random models, and SmolLM2-135M-Instruct.

The reference is the Hugging Face implementation in f32 on a CPU. See README.md beside this file for the command, and
the README.md of the output folder for the format.

    python make_parity_fixtures.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --smollm2 FOLDER --out FIXTURES
"""

import argparse
import hashlib
import json
import platform
from pathlib import Path

import numpy as np
import safetensors.numpy
import safetensors.torch
import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from gguf_to_hf import Gguf, convert

SEED = 20261124
TOP = 64
LAST = 6

COMMON = {"hidden_act": "silu", "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2}

# Sizes are chosen to be awkward: odd groups, hidden != heads * head_dim, a vocabulary that is no multiple of 32. The
# first two write rope in the older dialect, the third in the newer one.
TINY = {
    "tiny-llama": {
        **COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 96,
        "intermediate_size": 136,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 168,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
    "tiny-qwen2": {
        **COMMON,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 112,
        "intermediate_size": 136,
        "num_hidden_layers": 2,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "vocab_size": 136,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 8,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
    "tiny-qwen3": {
        **COMMON,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 72,
        "intermediate_size": 120,
        "num_hidden_layers": 2,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "vocab_size": 320,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        "attention_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    },
}

MESSAGES = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": "Is 1729 = 10³ + 9³?"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "And 12³ + 1?"},
    ],
]
TEXTS = [
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n\n" * 4
    + "def",
    "Der Föhn weht über 北京 und 東京 🏔️👩‍🚀: “naïve” café,\tΩ ≈ 3.14159 … and then",
]


def dump(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_arrays(arrays, folder):
    (folder / "expected.safetensors").write_bytes(safetensors.numpy.save(arrays))


@torch.no_grad()
def randomise(model, generator):
    """Weights that give each row its own, far from uniform distribution, and attention that looks at few keys."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            parameter.copy_(1 + 0.2 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.5 * noise)
        elif "embed_tokens" in name:
            parameter.copy_((0.25 if model.config.tie_word_embeddings else 1.0) * noise)
        else:
            gain = 2.0 if any(part in name for part in ("q_proj", "k_proj", "lm_head")) else 1.0
            parameter.copy_(gain * noise / parameter.shape[1] ** 0.5)


@torch.no_grad()
def logits_of(model, tokens):
    return model(torch.tensor([tokens])).logits[0].float().numpy()


def make_tiny(name, config, out):
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    dump(folder / "config.json", config)
    generator = torch.Generator().manual_seed(SEED)
    settings = transformers.AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(settings, attn_implementation="eager")
    randomise(model, generator)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(weights, {"format": "pt"}))

    # Loaded again, so that the logits are those of the folder as anybody would read it.
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    arrays = {"inv_freq": model.model.rotary_emb.inv_freq.numpy()}
    for i, length in enumerate((28, 41)):
        tokens = torch.randint(0, config["vocab_size"], (length,), generator=generator).tolist()
        logits = logits_of(model.eval(), tokens)
        arrays[f"tokens.{i}"] = np.array(tokens, np.uint32)
        arrays[f"logits.{i}"] = logits
        top = np.sort(logits, axis=1)[:, ::-1]
        print(f"{name} {i}: logits std {logits.std():.2f}, gap of the best two {np.mean(top[:, 0] - top[:, 1]):.2f}")
    save_arrays(arrays, folder)


def make_smollm2(gguf_path, folder, out):
    out = out / "smollm2-135m-instruct"
    out.mkdir(parents=True, exist_ok=True)
    _, weights = convert(Gguf(gguf_path), folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    prompts = []
    for messages in MESSAGES:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompts.append({"messages": messages, "text": text})
    prompts += [{"text": text} for text in TEXTS]
    for prompt in prompts:
        prompt["tokens"] = tokenizer.encode(prompt["text"], add_special_tokens=False)
        assert tokenizer.decode(prompt["tokens"]) == prompt["text"]

    arrays = {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for weights_dtype in ("bf16", "f32"):
        if weights_dtype == "f32":
            missing = model.load_state_dict(weights, strict=False)
            assert not missing.unexpected_keys and missing.missing_keys in ([], ["lm_head.weight"]), missing
        for i, prompt in enumerate(prompts):
            logits = torch.from_numpy(logits_of(model, prompt["tokens"])[-LAST:])
            values, ids = logits.topk(TOP)
            arrays[f"{weights_dtype}.ids.{i}"] = ids.numpy().astype(np.uint32)
            arrays[f"{weights_dtype}.values.{i}"] = values.numpy()
            arrays[f"{weights_dtype}.logsumexp.{i}"] = torch.logsumexp(logits, dim=1).numpy()
            best = tokenizer.decode(ids[-1, :3])
            print(f"smollm2 {weights_dtype} {i}: {len(prompt['tokens'])} tokens, then one of {best!r}")
    save_arrays(arrays, out)
    dump(out / "prompts.json", prompts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--smollm2", type=Path, required=True, help="where to write it as a Hugging Face folder")
    parser.add_argument("--out", type=Path, required=True, help="where to write the fixtures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, config in TINY.items():
        make_tiny(name, config, args.out)
    make_smollm2(args.gguf, args.smollm2, args.out)
    versions = {
        "seed": SEED,
        "python": platform.python_version(),
        **{m.__name__: m.__version__ for m in (torch, transformers, tokenizers, np)},
        "smollm2_gguf_sha256": hashlib.sha256(args.gguf.read_bytes()).hexdigest(),
    }
    dump(args.out / "versions.json", versions)


if __name__ == "__main__":
    main()
