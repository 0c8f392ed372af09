"""The packaged text encoder against the transformer called directly, and the prompt's bounds."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from common.prompt import MAX_PROMPT_CHARACTERS, check_prompt
from common.text import MAX_TOKENS, TextEncoder, packaged_encoder

TEXTS = ["guide dog, noto style, on a blue background", "dog", "an ice cream, small in the top left corner"]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(packaged_encoder())


def test_states_are_the_transformers_last_hidden_states(encoder: TextEncoder) -> None:
    """One text at a time, no padding, no mask: what the package's authors' transformer says of its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(packaged_encoder())
    model = AutoModel.from_pretrained(packaged_encoder()).eval()
    states, mask = encoder.encode(TEXTS)
    assert states.dtype == torch.float32 and mask.dtype == torch.bool
    assert states.shape == (3, int(mask.sum(1).max()), 384) and encoder.width == 384
    for row, text in enumerate(TEXTS):
        tokens = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            expected = model(**tokens).last_hidden_state[0]
        assert int(mask[row].sum()) == len(expected)
        torch.testing.assert_close(states[row][mask[row]], expected, atol=2e-5, rtol=1e-4)


def test_mean_of_states_is_the_sentence_embedding(encoder: TextEncoder) -> None:
    """MiniLM was trained so that the masked mean of states tells meanings apart: a kitten is nearer a cat than a car."""
    states, mask = encoder.encode(["a kitten", "a cat", "a lorry"])
    means = torch.nn.functional.normalize((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)
    assert means[0] @ means[1] > 0.6 > means[0] @ means[2]


def test_padding_does_not_matter(encoder: TextEncoder) -> None:
    alone, alone_mask = encoder.encode(["dog"])
    beside, beside_mask = encoder.encode(["dog", " ".join(["giraffe"] * 30)])
    assert beside.shape[1] > alone.shape[1]
    torch.testing.assert_close(beside[0, : alone.shape[1]], alone[0], atol=2e-5, rtol=1e-4)
    assert torch.equal(beside_mask[0, : alone.shape[1]], alone_mask[0])
    assert not beside_mask[0, alone.shape[1] :].any()
    assert not beside[0, alone.shape[1] :].any(), "padding is zero"


def test_long_texts_are_cut(encoder: TextEncoder) -> None:
    states, mask = encoder.encode(["guide dog " * 100])
    assert states.shape[1] == MAX_TOKENS and mask.all()


def test_states_can_be_trained_on(encoder: TextEncoder) -> None:
    states, _ = encoder.encode(["dog"])
    assert not states.requires_grad
    layer = torch.nn.Linear(384, 2)
    layer(states).sum().backward()
    assert layer.weight.grad is not None


def test_unicode_is_encoded(encoder: TextEncoder) -> None:
    states, mask = encoder.encode(["pão de queijo 🧀", "寿司"])
    assert torch.isfinite(states).all() and (mask.sum(1) > 2).all()


def test_white_space_is_made_one_space() -> None:
    assert check_prompt("  a \t guide\n\n dog\u3000, noto ") == "a guide dog , noto"


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t", "\u3000"])
def test_empty_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="prompt: is empty"):
        check_prompt(prompt)


def test_long_prompts_are_refused_with_their_length() -> None:
    assert check_prompt("x" * MAX_PROMPT_CHARACTERS)
    with pytest.raises(ValueError, match="prompt: 10000 characters"):
        check_prompt("x" * 10_000)
