"""A model of `transformers`: log-probabilities with a cache equal whole texts without one."""

from __future__ import annotations

import numpy as np
import pytest

from slgr_jax.teacher.local.likelihood import Transformers

torch = pytest.importorskip("torch", reason="the extra 'transformers' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is missing")
VOCABULARY = 26


@pytest.fixture(scope="module")
def tiny():
    """(our wrapper, the model) of two layers; a token is a letter of the text."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    ).eval()
    with torch.no_grad():  # as made, its predictions are all but uniform
        for weight in model.parameters():
            weight.mul_(4 if weight.ndim == 2 else 1)

    def tokenizer(texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[ord(letter) - ord("a") for letter in text] for text in texts]}

    wrapper = Transformers.__new__(Transformers)  # without files on disk
    wrapper._torch, wrapper._model, wrapper._tokenizer = torch, model, tokenizer
    wrapper._batch_tokens = 40
    return wrapper, model


def test_log_probabilities_equal_those_of_each_whole_text(tiny):
    wrapper, model = tiny
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, VOCABULARY, size).tolist() for size in (8, 3)]
    texts = [[rng.integers(0, VOCABULARY, n).tolist() for n in (3, 1, 6, 2, 4)] for _ in prompts]
    for prompt, continuations, values in zip(
        prompts, texts, wrapper.log_probs(prompts, texts), strict=True
    ):
        expected = []
        for continuation in continuations:
            whole = torch.tensor([prompt + continuation])
            with torch.no_grad():
                steps = model(whole, use_cache=False).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, whole.shape[1] - 1)
            expected.append(
                sum(
                    float(steps[place, token])
                    for place, token in zip(places, continuation, strict=True)
                )
            )
        assert np.ptp(expected) > 5
        np.testing.assert_allclose(values, expected, atol=1e-4)


def test_vectors_are_unit_means_of_last_states(tiny):
    wrapper, model = tiny
    texts = ["abc", "", "z"]
    vectors = wrapper.embed(texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 0, 1], atol=1e-6)
    for text, vector in zip(texts, vectors, strict=True):
        if text:
            ids = torch.tensor([[ord(letter) - ord("a") for letter in text]])
            with torch.no_grad():
                mean = model.model(ids).last_hidden_state[0].mean(0).numpy()
            np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)
