"""Residual blocks: what they write over is theirs, and a compiler sees all of them in one graph."""

from __future__ import annotations

import pytest
import torch

from common.unet.layers import ResidualBlock

FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture
def block() -> ResidualBlock:
    torch.manual_seed(0)
    made = ResidualBlock(8, 6).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("layout", FORMATS)
def test_without_gradients_it_says_the_same_and_leaves_its_input_alone(
    block: ResidualBlock, layout: torch.memory_format
) -> None:
    whole, embedding = torch.randn(4, 8, 6, 5).contiguous(memory_format=layout), torch.randn(1, 6).expand(2, 6)
    before = whole.clone()
    given = whole[1:3]  # a part of a caller's tensor
    expected = block(given, embedding)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            torch.testing.assert_close(block(given, embedding), expected)
    assert torch.equal(whole, before)


def test_a_compiler_sees_one_graph(block: ResidualBlock) -> None:
    """As fixed as served stages are compiled: whatever breaks a graph raises."""
    x, embedding = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last), torch.randn(2, 6)
    with torch.inference_mode():
        compiled = torch.compile(block, backend="eager", fullgraph=True, dynamic=False)
        torch.testing.assert_close(compiled(x, embedding), block(x, embedding))
