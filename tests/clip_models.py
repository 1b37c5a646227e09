"""Tiny models that open_clip knows by their configs, one for each kind of tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VIT: dict[str, Any] = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT: dict[str, Any] = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
BERT: dict[str, Any] = {"model_type": "roberta", "vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2} | {
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "pad_token_id": 1,
    "max_position_embeddings": 40,
}


def register(folder: Path) -> None:
    """Tell open_clip of `tiny-clip`, `tiny-clipa`, `tiny-coca`, `tiny-siglip`, `tiny-resnet` and `tiny-roberta`."""
    import open_clip

    roberta = folder / "roberta"
    roberta.mkdir()
    (roberta / "config.json").write_text(json.dumps(BERT))
    towers: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
        "tiny-clip": (VIT, TEXT, {}),
        "tiny-clipa": (
            VIT | {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
            TEXT | {"vocab_size": 120, "pool_type": "last", "no_causal_mask": True},
            {},
        ),
        "tiny-coca": (
            VIT | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
            TEXT | {"vocab_size": 120, "embed_cls": True, "output_tokens": True},
            {"multimodal_cfg": TEXT | {"vocab_size": 120, "attn_pooler_heads": 2}, "custom_text": True},
        ),
        "tiny-siglip": (
            {
                "image_size": 384,
                "timm_model_name": "vit_pe_core_tiny_patch16_384",
                "timm_pool": "map",
                "timm_proj": "none",
            },
            TEXT | {"vocab_size": 120, "pool_type": "last", "no_causal_mask": True, "proj_bias": True},
            {"custom_text": True, "init_logit_bias": -10},
        ),
        "tiny-resnet": ({"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}, TEXT, {}),
        "tiny-roberta": (VIT, {"hf_model_name": str(roberta), "hf_pooler_type": "mean_pooler"}, {}),
    }
    for name, (vision, text, more) in towers.items():
        config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text} | more
        if name == "tiny-siglip":
            config["embed_dim"] = 192  # timm's width: what it pools is what is compared
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")
