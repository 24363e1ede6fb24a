//! Whole passes of a tiny model on this backend: rows do not depend on their neighbours, nor on the threads.
//!
//! That the ops compute the right thing is checked against an oracle of its own in `verify-tests`.

use half::bf16;
use treespark_kernel_gen::layout::{HEADER_WORDS, accepted_words};
use treespark_kernel_gen::op::Batch;
use treespark_kernel_gen::{BufferDesc, DType, MAX_NODES, Op, Pass, Request, Role, Row, TreeShape, TreeSpec};
use treespark_models::{Bytes, Tensor};

use super::testing::Random;
use super::*;

const PAGES: usize = 16;
const ROWS: usize = 64;
const VOCAB: usize = 37;

/// One layer with every option, a head, a draw and the accepted path's commit.
fn pass(page_size: usize) -> Pass {
    let (hidden, heads, kv_heads, dim, ffn) = (40, 6, 2, 16, 56);
    let mut pass = Pass::new("tiny", ROWS);
    let p = &mut pass;
    let batch = Batch {
        rows: p.add("rows", Role::Input, DType::U32, &[ROWS, Row::WORDS]),
        requests: p.add("requests", Role::Input, DType::U32, &[HEADER_WORDS + Request::WORDS]),
        pages: p.add("pages", Role::Input, DType::U32, &[1, PAGES]),
    };
    let mut weight = |name: &str, dtype, shape: &[usize]| p.add(name, Role::Weight, dtype, shape);
    let table = weight("table", DType::BF16, &[VOCAB, hidden]);
    let norm = weight("norm", DType::F32, &[hidden]);
    let qkv = weight("qkv", DType::BF16, &[(heads + 2 * kv_heads) * dim, hidden]);
    let bias = Some(weight("bias", DType::F32, &[(heads + 2 * kv_heads) * dim]));
    let q_norm = Some(weight("q_norm", DType::F32, &[dim]));
    let k_norm = Some(weight("k_norm", DType::F32, &[dim]));
    let rope = weight("rope", DType::F32, &[PAGES * page_size, dim / 2, 2]);
    let o = weight("o", DType::F32, &[hidden, heads * dim]);
    let gate_up = weight("gate_up", DType::F16, &[2 * ffn, hidden]);
    let down = weight("down", DType::BF16, &[hidden, ffn]);
    let mut scratch = |name: &str, shape: &[usize]| p.add(name, Role::Scratch, DType::F32, shape);
    let (x, inner) = (scratch("x", &[ROWS, hidden]), scratch("inner", &[ROWS, ffn]));
    let (q, mixed) = (scratch("q", &[ROWS, heads, dim]), scratch("mixed", &[ROWS, heads, dim]));
    let logits = p.add("logits", Role::Output, DType::F32, &[ROWS, VOCAB]);
    let seen = p.add("seen", Role::Input, DType::U32, &[1, VOCAB.div_ceil(32)]);
    let draws = p.add("draws", Role::Output, DType::U32, &[ROWS]);
    let (ids, values) =
        (p.add("ids", Role::Output, DType::U32, &[ROWS, 5]), p.add("values", Role::Output, DType::F32, &[ROWS, 5]));
    let accepted = p.add("accepted", Role::Output, DType::U32, &[1, accepted_words(MAX_NODES)]);
    let mut cache = |name: &str| p.add(name, Role::Cache, DType::BF16, &[1, PAGES, kv_heads, page_size, dim]);
    let (k_cache, v_cache) = (cache("k"), cache("v"));
    let (layer, eps, scale, tree) = (0, 1e-5, 0.25, TreeSpec::Any(MAX_NODES));
    p.ops = vec![
        Op::Embed { batch, table, out: x },
        Op::Qkv {
            batch,
            layer,
            heads,
            kv_heads,
            eps,
            x,
            norm,
            weight: qkv,
            bias,
            q_norm,
            k_norm,
            rope,
            q,
            k_cache,
            v_cache,
        },
        Op::TreeAttention { batch, layer, heads, kv_heads, scale, tree: tree.clone(), q, k_cache, v_cache, out: mixed },
        Op::Project { batch, add: true, x: mixed, weight: o, residual: x },
        Op::GateUp { batch, eps, x, norm, weight: gate_up, out: inner },
        Op::Project { batch, add: true, x: inner, weight: down, residual: x },
        Op::Head { batch, eps, x, norm, weight: table, logits },
        Op::Draw { batch, seen, logits, draws },
        Op::TopK { batch, logits, ids, values },
        Op::Accept { batch, tree, draws, accepted },
        Op::Commit { batch, accepted, k_cache, v_cache: Some(v_cache) },
    ];
    pass
}

/// A backend with the tiny model loaded, and the names of its buffers.
struct Bed {
    backend: CpuBackend,
    pass: Pass,
    ids: Vec<BufferId>,
    compiled: PassId,
}

impl Bed {
    fn new(threads: usize) -> Bed {
        let mut backend = CpuBackend::new(Some(threads));
        let pass = pass(4);
        pass.check().unwrap();
        let mut random = Random::new(3);
        let mut make = |desc: &BufferDesc| match desc.role {
            Role::Weight => {
                let part = tensor(desc, &mut random);
                backend.load(desc, &[part]).unwrap()
            }
            _ => backend.alloc(desc).unwrap(),
        };
        let ids: Vec<BufferId> = pass.buffers.iter().map(&mut make).collect();
        let compiled = backend.compile(&pass, &ids).unwrap();
        let mut bed = Bed { backend, pass, ids, compiled };
        let pages: Vec<u32> = (0..PAGES as u32).map(|i| i * 5 % PAGES as u32).collect();
        bed.backend.write(bed.id("pages"), 0, &pages).unwrap();
        bed
    }

    fn id(&self, name: &str) -> BufferId {
        self.ids[self.pass.buffers.iter().position(|desc| desc.name == name).unwrap()]
    }

    /// Runs a tree behind a prefix and gives the words of a buffer.
    fn run(&mut self, tree: &TreeShape, tokens: &[u32], prefix: usize) {
        let n = tree.len();
        let rows = (0..n).flat_map(|node| {
            let position = (prefix + tree.depth(node)) as u32;
            Row { token: tokens[node], position, request: 0, node: node as u32, ancestors: tree.ancestors(node) }
                .to_words()
        });
        let request = Request {
            prefix: prefix as u32,
            first_row: 0,
            n_rows: n as u32,
            sample: 0,
            seed: [1, 2],
            temperature: 0.8,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.1,
            given: 0,
        };
        let requests: Vec<u32> = [n as u32, 1, 0, 0].into_iter().chain(request.to_words()).collect();
        self.backend.write(self.id("rows"), 0, &rows.collect::<Vec<_>>()).unwrap();
        self.backend.write(self.id("requests"), 0, &requests).unwrap();
        self.backend.run(self.compiled, Extent { rows: n, requests: 1, keys: prefix + n }).unwrap();
    }

    fn words(&mut self, name: &str) -> Vec<u32> {
        let len = self.pass.buffers.iter().find(|desc| desc.name == name).unwrap().bytes() / 4;
        self.backend.read(self.id(name), 0, len).unwrap()
    }
}

fn tensor(desc: &BufferDesc, random: &mut Random) -> Tensor {
    let bytes = (0..desc.len()).flat_map(|_| {
        let value = random.symmetric() / 4.0;
        match desc.dtype {
            DType::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
            DType::F16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
            _ => (2.0 * value + 0.5).to_le_bytes().to_vec(),
        }
    });
    Tensor { dtype: desc.dtype, shape: desc.shape.clone(), bytes: Bytes::from_vec(bytes.collect()) }
}

fn tokens(n: usize) -> Vec<u32> {
    (0..n).map(|i| (i * i + 3) as u32 % VOCAB as u32).collect()
}

#[test]
fn a_chain_in_one_pass_equals_its_tokens_one_by_one() {
    let n = 29;
    let tokens = tokens(n);
    let mut chain = Bed::new(3);
    chain.run(&TreeShape::chain(n - 1).unwrap(), &tokens, 0);
    let (logits, draws, ids) = (chain.words("logits"), chain.words("draws"), chain.words("ids"));
    let mut single = Bed::new(1);
    for i in 0..n {
        single.run(&TreeShape::root(), &tokens[i..], i);
        assert_eq!(single.words("logits")[..VOCAB], logits[i * VOCAB..][..VOCAB], "logits of token {i}");
        assert_eq!(single.words("ids")[..5], ids[i * 5..][..5], "best of token {i}");
        // Plain decoding has not seen its earlier tokens on a path, so only the first draws are penalised alike.
        if i == 0 {
            assert_eq!(single.words("draws")[0], draws[0]);
        }
    }
    assert_eq!(single.words("k"), chain.words("k"));
    assert_eq!(single.words("v"), chain.words("v"));
}

#[test]
fn commit_leaves_the_cache_of_plain_decoding() {
    let mut tree = Bed::new(2);
    let shape: TreeShape = "3x3x3".parse().unwrap();
    // Find a tree whose path is accepted: each node's first child holds another token, its last the draw.
    let mut tokens = tokens(shape.len());
    for _ in 0..3 {
        tree.run(&shape, &tokens, 0);
        let draws = tree.words("draws");
        for node in 1..shape.len() {
            if (node - 1) % 3 == 2 {
                tokens[node] = draws[shape.parent(node)];
            }
        }
    }
    let mut tree = Bed::new(2);
    tree.run(&shape, &tokens, 0);
    let accepted = tree.words("accepted");
    let path = &accepted[1..1 + accepted[0] as usize];
    assert_eq!(path, [0, 3, 12, 39], "the last child of each node was drawn");
    let mut plain = Bed::new(2);
    for (i, &node) in path.iter().enumerate() {
        plain.run(&TreeShape::root(), &tokens[node as usize..], i);
    }
    // The next token sees the same context in both.
    for bed in [&mut tree, &mut plain] {
        bed.run(&TreeShape::root(), &[9], path.len());
    }
    assert_eq!(tree.words("logits")[..VOCAB], plain.words("logits")[..VOCAB]);
}

#[test]
fn memory_that_cannot_be_had_is_an_error() {
    let desc = BufferDesc { name: "k".into(), role: Role::Cache, dtype: DType::F32, shape: vec![1 << 60] };
    let error = CpuBackend::new(Some(1)).alloc(&desc).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { needed, .. } if needed == 4 << 60), "{error}");
}
