"""Tests on a CPU with tiny random models; two minutes. `python -m pytest models/train`

Parity of dspark.py needs fixtures that DeepSpec's own classes computed: the folder with `vanilla` and `dflash` is taken
from TREESPARK_DEEPSPEC_FIXTURES, or is verify-tests/fixtures/deepspec.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import rules
from corpus import Corpus, loops
from decode import Decoder
from dspark import DSpark, dspark_config, load_dspark
from losses import head_loss, plain
from pack import pack
from score import propose, tokens_per_round
from standalone import standalone_chains
from target import Llama, load_llama, load_target, read_tensors

HERE = Path(__file__).parent
FIXTURES = Path(
    os.environ.get("TREESPARK_DEEPSPEC_FIXTURES", HERE.parent.parent / "verify-tests" / "fixtures" / "deepspec")
)
TEMPLATE = (
    "<s>system\nBe brief.</s>{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["vanilla", "dflash"])
def test_dspark_agrees_with_deepspec(name):
    folder = FIXTURES / name
    if not folder.exists():
        pytest.skip(f"{folder} is absent")
    expected, text = load_file(folder / "expected.safetensors"), json.loads((folder / "expected.json").read_text())
    target = load_llama(folder / "target", "cpu", torch.float32)
    draft = load_dspark(folder / "draft", None, None, "cpu")
    start = len(text["prompt"])
    with torch.no_grad():
        for i, drafted in enumerate(text["rounds"][:3]):
            ids = torch.tensor([text["plain"][: start + i + 1]])
            features, _ = target(ids, draft.taps)
            if i == 0:
                assert_close(features[0, :start], expected["prompt_features"])
            assert ids[0, -1] == drafted["anchor"]
            hidden = draft(features, ids, torch.tensor([[start + i]]))[:, 0]
            tokens, confidence = draft.chain(hidden, ids[:, -1])
            assert tokens[0].tolist() == drafted["draft_tokens"]
            assert_close(hidden[0], expected[f"round{i}.hidden"])
            assert_close(draft.base(hidden)[0], expected[f"round{i}.base"])
            previous = draft.previous(torch.cat([ids[:, -1:], tokens[:, :-1]], dim=1))
            assert_close((draft.base(hidden) + draft.bias(previous))[0], expected[f"round{i}.logits"])
            if confidence is not None:
                assert_close(confidence[0], expected[f"round{i}.confidence"])


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mix", [(1.0, 0.0, 0.0), (0.1, 0.9, 0.0), (0.5, 0.0, 0.5)])
def test_head_loss_is_what_autograd_says(mix):
    torch.manual_seed(0)
    x, w = torch.randn(7, 12, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    frozen, teacher = torch.randn(50, 8), (torch.randn(7, 6), torch.randn(50, 6))
    tokens, weights = torch.randint(0, 50, (7,)), torch.rand(7)
    log_q = torch.log_softmax(x @ torch.cat([frozen, w], 1).T, 1)
    p = torch.softmax(teacher[0] @ teacher[1].T, 1)
    terms = [
        -log_q.gather(1, tokens[:, None])[:, 0],
        (log_q.exp() - p).abs().sum(1),
        (p * (p.log() - log_q)).sum(1),
    ]
    expected = (weights * sum(m * t for m, t in zip(mix, terms))).sum()
    total, ours = head_loss(x, frozen, w, tokens, weights, mix, teacher)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(ours, torch.stack(terms, 1).detach())
    for a, b in zip(torch.autograd.grad(total, (x, w)), torch.autograd.grad(expected, (x, w))):
        torch.testing.assert_close(a, b)


KERNEL = """
import torch, losses
torch.manual_seed(0)
for mix, teacher in [((1.0, 0.0, 0.0), False), ((0.1, 0.9, 0.0), True), ((0.5, 0.0, 0.5), True)]:
    z, t = 3 * torch.randn(5, 300), 3 * torch.randn(5, 300)
    tokens, weights = torch.randint(0, 300, (5,)), torch.rand(5)
    a, b = z.clone(), z.clone()
    ours = losses.fused(a, t if teacher else None, tokens, weights, mix, block=128)
    theirs = losses.plain(b, t if teacher else None, tokens, weights, mix)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
"""


def test_row_kernel_in_tritons_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", KERNEL], cwd=HERE, env=environment, check=True)


def test_plain_gradient_has_no_mass():
    z, t = torch.randn(3, 20), torch.randn(3, 20)
    plain(z, t, torch.tensor([1, 2, 3]), torch.ones(3), (0.3, 0.9, 0.2))
    torch.testing.assert_close(z.sum(1), torch.zeros(3), atol=1e-6, rtol=0)


def test_loops():
    assert loops([1, 2, 3, 4] * 16) and not loops(range(64))


def random_law(generator, *shape):
    return generator.dirichlet(np.full(shape[-1], 0.7), shape[:-1])


def test_block_rule_on_fixed_text_counts_what_block_verification_accepts():
    """Both expectations in full, over all drafts and all texts of a tiny vocabulary."""
    generator, n, gamma = np.random.default_rng(3), 3, 3
    law = lambda: {c: random_law(generator, n) for k in range(gamma + 1) for c in itertools.product(range(n), repeat=k)}  # noqa: E731
    p, q = law(), law()
    live = 0.0
    for x in itertools.product(range(n), repeat=gamma):
        prefix, chance, survive, successes = 1.0, 1.0, 1.0, []
        for i in range(gamma):
            chance *= q[x[:i]][x[i]]
            prefix = min(1.0, prefix * p[x[:i]][x[i]] / q[x[:i]][x[i]])
            z = np.maximum(prefix * p[x[: i + 1]] - q[x[: i + 1]], 0).sum() if i + 1 < gamma else None
            successes.append(prefix if z is None else z / (z + 1 - prefix))
        for i in reversed(range(gamma)):  # the last success counts
            live += chance * survive * successes[i] * (i + 1)
            survive *= 1 - successes[i]
    fixed = 0.0
    for y in itertools.product(range(n), repeat=gamma):
        chance, prefix, reach = 1.0, 1.0, 1.0
        for i in range(gamma):
            py, qy = p[y[:i]][y[i]], q[y[:i]][y[i]]
            chance *= py
            reach *= min(1.0, qy / (prefix * py))
            prefix = min(1.0, prefix * py / qy)
            fixed += reach * np.prod([p[y[:j]][y[j]] for j in range(i + 1)]) / n ** (gamma - i - 1)
    assert abs(live - fixed) < 1e-9
    # The vectorised rule, on all texts at once, weighted by their chance.
    texts = list(itertools.product(range(n), repeat=gamma))
    log_p, log_q = (
        np.log([[laws[y[:i]][y[i]] for i in range(gamma)] for y in texts]).repeat(4000, axis=0) for laws in (p, q)
    )
    counts = rules.accepted("block", log_p, log_q, None, None, np.full(len(log_p), 99), generator)
    assert abs((np.exp(log_p.sum(1)) * counts).sum() / 4000 - live) < 0.02


def test_noise_given_the_targets_token():
    torch.manual_seed(0)
    p, q = torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), torch.tensor([0.2, 0.5, 0.2, 0.1]).log()
    y = torch.multinomial(p.exp(), 200_000, replacement=True)[:, None]
    noise = rules.noise_given(p.expand(len(y), -1), y)
    assert ((p + noise).argmax(1) == y[:, 0]).all()
    drawn = torch.bincount((q + noise).argmax(1), minlength=4) / len(y)
    torch.testing.assert_close(drawn, q.exp(), atol=0.01, rtol=0)


# --- a tiny target, and everything from its own text to evaluated drafters ---


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    make_target(folder / "target")
    rows = [{"turns": [f"say {i} {'x' * (i % 7)}"], "source": "test", "licence": "CC0"} for i in range(120)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "eval").mkdir()
    (folder / "eval" / "tiny.jsonl").write_text("\n".join(json.dumps({"turns": [f"what {i}"]}) for i in range(6)))
    run("generate", "--target", folder / "target", "--prompts", folder / "prompts.jsonl", "--out", folder / "corpus",
        "--eval", folder / "eval", "--minutes", 1, "--rows", 64, "--magpie", 8, "--new-tokens", 24)  # fmt: skip
    return folder


def make_target(folder):
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<s>", "</s>", "<empty>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>", "<empty>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 264,
        "max_position_embeddings": 512, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": TEMPLATE})
    )
    torch.manual_seed(5)
    model = Llama(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.5 if "embed" in name else 1.5 / parameter.shape[1] ** 0.5)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")


def run(script, *args):
    done = subprocess.run(
        [sys.executable, str(HERE / f"{script}.py"), *map(str, args)], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_corpus(work):
    train, heldout = (Corpus(work / "corpus", kind, "cpu") for kind in ("train", "heldout"))
    report = json.loads((work / "corpus" / "corpus-0-of-1.json").read_text())
    assert len(train) == report["sequences"]["train"] > 100 and len(heldout) == report["sequences"]["heldout"] > 3
    batch = next(train.batches(2048, 1))
    places, valid = batch.anchors(8)
    row = torch.arange(len(places))[:, None].expand_as(places)[valid]
    assert (places[valid] >= batch.answers[row]).all() and (places[valid] + 1 < batch.lengths[row]).all()
    keys = (row * 1000 + places[valid]).tolist()
    assert len(set(keys)) == len(keys)


def test_decoder_is_greedy_decoding(work):
    target = load_target(work / "target", "cpu")
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 264, (n,), generator=generator).tolist() for n in (9, 3, 150, 20, 5, 31, 4, 6, 7)]
    answers = Decoder(target, [1], 9, 150 + 100).generate(prompts, [0.0] * 9, 100)
    for prompt, answer in zip(prompts, answers):
        ids = list(prompt)
        while len(ids) < len(prompt) + 100 and (len(ids) == len(prompt) or ids[-1] != 1):
            with torch.no_grad():
                ids.append(int(target.logits(target(torch.tensor([ids]))[1][0, -1]).argmax()))
        assert ids[len(prompt) :] == answer


@pytest.mark.parametrize("kind", ["dspark", "dflash", "medusa", "standalone"])
def test_training(work, kind):
    out, command = work / kind, "dspark" if kind == "dflash" else kind
    args = [command, "--target", work / "target", "--corpus", work / "corpus", "--out", out, "--minutes", 0.5,
            "--tokens", 1024, "--taps", "0,1,2", "--mask-token", 2, "--anchors", 8, "--layers", 2, "--device", "cpu",
            "--hidden", 32, "--rank", 0 if kind == "dflash" else 8, "--rate", 0.003]  # fmt: skip
    first, last = losses_of(run("train", *args, "--steps", 25, "--log-every", 0))
    again = run("train", *args, "--resume", "--steps", 5)
    assert "; step 25, " in again
    state = torch.load(out / "state.pt")
    assert state["step"] == 30
    assert last < first
    report = work / f"{kind}.json"
    run("evaluate", "--target", work / "target", "--eval", work / "eval", "--new-tokens", 40, "--out", report, out,
        "--answers", work / "answers.json", *(["--rules"] if command == "dspark" else []))  # fmt: skip
    result = json.loads(report.read_text())["drafters"][kind]
    assert result["kind"] == command and result["sets"]["tiny"]["tokens_per_round"] >= 1
    if kind == "dspark":
        run("calibrate", "--target", work / "target", "--corpus", work / "corpus", out)
        calibration = json.loads((out / "calibration.json").read_text())
        assert len(calibration["temperatures"]) == 7
        pack(out, work / "packed", limit=150_000)
        assert read_tensors(work / "packed").keys() == load_file(out / "model.safetensors").keys()
        assert set(json.loads((out / "config.json").read_text())["target_layer_ids"]) == {0, 1, 2}


def losses_of(log):
    """The loss of the first step and the mean of the last five."""
    values = [float(line.split(": loss ")[1].split()[0]) for line in log.splitlines() if ": loss " in line]
    return values[0], sum(values[-5:]) / 5


def test_standalone_chains_are_greedy_continuations(work):
    model = load_llama(work / "target", "cpu", torch.float32)
    ids = torch.randint(3, 264, (2, 12), generator=torch.Generator().manual_seed(2))
    chains = standalone_chains(model, ids, 3)
    for b, s in ((0, 0), (0, 7), (1, 11)):
        text = ids[b, : s + 1].tolist()
        for step in range(3):
            with torch.no_grad():
                text.append(int(model.logits(model(torch.tensor([text]))[1][0, -1]).argmax()))
            assert text[-1] == chains[b, s, step]


def test_walk_is_what_decoding_does(work):
    """A greedy decoding loop with the drafter takes as many rounds as the walk over its proposals says."""
    target = load_target(work / "target", "cpu")
    config = dspark_config(target.config, 1, 4, [0, 1, 2], 2)
    torch.manual_seed(0)
    model = DSpark(config, target.model.embed_tokens.weight, target.head)
    model.start(target.model.norm.weight)
    corpus = Corpus(work / "corpus", "heldout", "cpu")
    batch = corpus.batch(corpus.pick(4, temperature=0.0))
    proposals = propose("dspark", model, target, batch, contextlib.nullcontext)
    rounds = emitted = 0
    for ids, length, start in zip(batch.ids, batch.lengths.tolist(), batch.answers.tolist()):
        while start < length - 1:
            text = ids[None, : start + 1]
            with torch.no_grad():
                hidden = model(target(text, model.taps)[0], text, torch.tensor([[start]]))[:, 0]
            drafted, n = model.chain(hidden, text[:, -1])[0][0].tolist(), 0
            while n < 7 and start + n + 1 < length and drafted[n] == ids[start + n + 1]:
                n += 1
            step = min(n + 1, length - 1 - start)
            rounds, emitted, start = rounds + 1, emitted + step, start + step
    assert abs(tokens_per_round(proposals, proposals.accepted()) - emitted / rounds) < 1e-9
