"""CLIP-like models of `transformers` with random weights, a few kilobytes each, saved as a hub would give them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTImageProcessor,
)

WORDS = ("[PAD]", "[UNK]", "a", "red", "blue", "guide", "dog", "castle", "on", "hill", "[CLS]", "[SEP]")
CONTEXT = 12
SIDE = 16
_WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = _WIDTH | {"vocab_size": len(WORDS), "max_position_embeddings": CONTEXT}
_VISION = _WIDTH | {"image_size": SIDE, "patch_size": 8}


def tiny_clip() -> CLIPModel:
    """CLIP; its text vector is read at the last token."""
    torch.manual_seed(1)
    ids = {"pad_token_id": 0, "bos_token_id": 10, "eos_token_id": 11}
    text = CLIPTextConfig(**_TEXT, **ids, projection_dim=24)
    vision = CLIPVisionConfig(**_VISION, projection_dim=24)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)).eval()


def tiny_siglip() -> SiglipModel:
    """SigLIP; texts are padded to the full context."""
    torch.manual_seed(2)
    text = SiglipTextConfig(**_TEXT, projection_size=32, pad_token_id=0, bos_token_id=10, eos_token_id=11)
    vision = SiglipVisionConfig(**_VISION)
    return SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).eval()


def tiny_dual() -> VisionTextDualEncoderModel:
    """A ViT and a BERT side by side."""
    torch.manual_seed(3)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        ViTConfig(**_VISION), BertConfig(**_TEXT, pad_token_id=0), projection_dim=20
    )
    return VisionTextDualEncoderModel(config).eval()


def save_tiny(model: PreTrainedModel, folder: Path) -> Path:
    """Weights, tokenizer and preprocessing of a tiny model, as a folder."""
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    processors_of = {"clip": CLIPImageProcessor, "siglip": SiglipImageProcessor}
    processor = processors_of.get(model.config.model_type, ViTImageProcessor)
    crop = {"crop_size": {"height": SIDE, "width": SIDE}} if processor is CLIPImageProcessor else {}
    size = {"shortest_edge": SIDE} if crop else {"height": SIDE, "width": SIDE}
    processor(size=size, **crop).save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    words.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 10), ("[SEP]", 11)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
