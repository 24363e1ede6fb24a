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
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from gguf_to_hf import Gguf, convert

SEED = 20261124
TOP = 64
LAST = 6
LEAST_GAP = 1e-4
LEAST_MARGIN = 1e-3
CHAIN = 4
ROUTER_BIAS = "e_score_correction_bias"
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}

COMMON = {"hidden_act": "silu", "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2}

# The keys are those of the real checkpoints, among them some that transformers does not read (`scoring_func`, V3's
# `topk_method`, `moe_layer_freq`).
DEEPSEEK = {
    **COMMON,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 160,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
}


def yarn(mscale, mscale_all_dim):
    return {
        "type": "yarn",
        "factor": 4.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
        "original_max_position_embeddings": 64,
    }


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
    "tiny-deepseek-v2-lite": {
        **DEEPSEEK,
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "rope_scaling": yarn(0.707, 0.707),
    },
    "tiny-deepseek-v2": {
        **DEEPSEEK,
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "q_lora_rank": 40,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.5,
        "rope_scaling": yarn(1.0, 0.8),
    },
    "tiny-deepseek-v3": {
        **DEEPSEEK,
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "v_head_dim": 12,
        "moe_intermediate_size": 16,
        "n_routed_experts": 16,
        "q_lora_rank": 40,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
        "rope_scaling": yarn(1.0, 1.0),
    },
}
TINY["tiny-deepseek-v3-mtp"] = {
    **TINY["tiny-deepseek-v3"],
    "num_hidden_layers": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_nextn_predict_layers": 1,
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
            strong = ("q_proj", "q_b_proj", "k_proj", "mlp.gate.", "lm_head")
            gain = 2.0 if any(part in name for part in strong) else 1.0
            parameter.copy_(gain * noise / parameter.shape[-1] ** 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith(ROUTER_BIAS):
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))


def checkpoint(model):
    """The weights under the names of real checkpoints: one tensor an expert, which transformers keeps stacked."""
    weights = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        stack, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for expert, both in enumerate(tensor.detach()):
                for part, half in zip(("gate_proj", "up_proj"), both.chunk(2)):
                    weights[f"{stack}.{expert}.{part}.weight"] = half.clone()
        elif kind == "down_proj":
            for expert, down in enumerate(tensor.detach()):
                weights[f"{stack}.{expert}.{kind}.weight"] = down.clone()
        elif not name.endswith("inv_freq"):
            weights[name] = tensor.detach().clone()
    return weights


def mtp_checkpoint(model, mtp):
    """The MTP module as real checkpoints have it: one more layer, with copies of the embedding and the head."""
    prefix = f"model.layers.{model.config.num_hidden_layers}."
    weights = {}
    for name, tensor in checkpoint(mtp.layers).items():
        name = name.removeprefix("0.").removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
        weights[prefix + name] = tensor
    weights[prefix + "embed_tokens.weight"] = model.model.embed_tokens.weight.detach().clone()
    weights[prefix + "shared_head.head.weight"] = model.lm_head.weight.detach().clone()
    return weights


@torch.no_grad()
def logits_of(model, tokens):
    return model(torch.tensor([tokens])).logits[0].float().numpy()


@torch.no_grad()
def mtp_of(model, mtp, tokens):
    """The MTP module's logits, its greedy continuations, and the least margin of a token in those."""

    def step(states, inputs, cache):
        start = 1 + cache.get_seq_length()
        positions = torch.arange(start, start + inputs.numel())[None]
        return mtp.forward_layer(0, states, positions, cache, input_ids=inputs)

    ids = torch.tensor([tokens])
    states = model.model(ids).last_hidden_state
    logits = model.lm_head(step(states[:, :-1], ids[:, 1:], MtpCache(config=mtp.config)))[0]
    lengths = [1, 5, 17, 33, len(tokens) - 1]
    chains, margins = [], []
    for length in lengths:
        cache = MtpCache(config=mtp.config)
        state = step(states[:, :length], ids[:, 1 : length + 1], cache)[:, -1:]
        chain = []
        while True:
            best = model.lm_head(state)[0, 0].topk(2)
            margins.append((best.values[0] - best.values[1]).item())
            chain.append(best.indices[0].item())
            if len(chain) == CHAIN:
                break
            state = step(state, best.indices[None, :1], cache)
        chains.append(chain)
    arrays = {
        "mtp.logits": logits.numpy(),
        "mtp.lengths": np.array(lengths, np.uint32),
        "mtp.chain": np.array(chains, np.uint32),
    }
    return arrays, min(margins)


def routing_gap(model, compute):
    """How near to a tie the choice of groups and experts comes, in scores. Rounding must not decide a fixture."""
    gaps = [1.0]

    def look(gate, _, output):
        bias = getattr(gate, ROUTER_BIAS, None)
        scores = output[0].softmax(1) if bias is None else output[0].sigmoid() + bias
        if settings.topk_method != "greedy":
            groups = scores.unflatten(1, (settings.n_group, -1))
            best = groups.amax(2) if bias is None else groups.topk(2).values.sum(2)
            chosen = best.topk(settings.topk_group + 1)
            gaps.append((chosen.values[:, -2] - chosen.values[:, -1]).min().item())
            kept = torch.zeros_like(best).scatter(1, chosen.indices[:, :-1], 1.0).bool()
            scores = groups.masked_fill(~kept[:, :, None], -1e9).flatten(1)
        experts = scores.topk(settings.num_experts_per_tok + 1).values
        gaps.append((experts[:, -2] - experts[:, -1]).min().item())

    settings = model.config
    hooks = [m.register_forward_hook(look) for name, m in model.named_modules() if name.endswith("mlp.gate")]
    compute()
    for hook in hooks:
        hook.remove()
    return min(gaps)


def make_tiny(name, config, out):
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    dump(folder / "config.json", config)
    generator = torch.Generator().manual_seed(SEED)
    settings = transformers.AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(settings, **PLAIN)
    randomise(model, generator)
    weights = checkpoint(model)
    extra = {}
    if config.get("num_nextn_predict_layers"):
        built_mtp = MtpModel(model, 1).eval()
        randomise(built_mtp.layers, generator)
        extra = mtp_checkpoint(model, built_mtp)
        # Transformers looks for DeepSeek-V3's MTP module at layer 61, wherever the model ends.
        mtp_layer = rf"model\.layers\.{config['num_hidden_layers']}\."
        type(model)._keys_to_ignore_on_load_unexpected = [mtp_layer]
    (folder / "model.safetensors").write_bytes(safetensors.torch.save({**weights, **extra}, {"format": "pt"}))

    # Loaded again, so that the logits are those of the folder as anybody would read it.
    built = model.eval()
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **PLAIN
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    model.eval()
    mtp = MtpModel.from_pretrained(model).eval() if extra else None

    def clear_cut(tokens):
        if routing_gap(model, lambda: logits_of(model, tokens)) < LEAST_GAP:
            return False
        if not extra:
            return True
        return (
            routing_gap(mtp, lambda: mtp_of(model, mtp, tokens)) >= LEAST_GAP
            and mtp_of(model, mtp, tokens)[1] >= LEAST_MARGIN
        )

    arrays = {"inv_freq": model.model.rotary_emb.inv_freq.numpy()}
    for i, length in enumerate((61, 90) if extra else (61, 131) if "kv_lora_rank" in config else (28, 41)):
        tokens = None
        while tokens is None or not clear_cut(tokens):
            tokens = torch.randint(0, config["vocab_size"], (length,), generator=generator).tolist()
        logits = logits_of(model, tokens)
        assert np.array_equal(logits, logits_of(built, tokens)), name
        arrays[f"tokens.{i}"] = np.array(tokens, np.uint32)
        arrays[f"logits.{i}"] = logits
        if extra:
            drafts, margin = mtp_of(model, mtp, tokens)
            for key, array in mtp_of(built, built_mtp, tokens)[0].items():
                assert np.array_equal(drafts[key], array), (name, key)
                arrays[f"{key}.{i}"] = array
            print(f"{name} {i}: mtp logits std {drafts['mtp.logits'].std():.2f}, least margin of a chain {margin:.4f}")
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
