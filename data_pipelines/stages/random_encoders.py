"""Small text encoders with fixed random weights, in the folders that the published ones come in.

For a first look on one CPU: three tokenizers learnt from the captions, and three networks of two
layers, written as Hugging Face folders clip_l/ clip_g/ t5/. Whatever reads them reads the published
encoders too; going there is a change of path. A model can learn from frozen random states as long
as words and their places can be read from them, so the scales below keep both well visible.
"""

import collections
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

WIDTHS = {"clip_l": 64, "clip_g": 64, "t5": 128}

LAYERS = 2
HEAD_WIDTH = 16
POSITIONS = 77
BUCKETS = 32
# Sizes of the published vocabularies: an open set of captions cannot grow beyond them.
CLIP_VOCABULARY = 49408
T5_VOCABULARY = 32128

# Standard deviations. Tokens 1 and positions 0.5 are what is to be read. The branches are a little
# stronger than that: pooled is the state of one token, which learns of the words by attention only.
POSITION_SCALE = 0.5
ATTENTION_SCALE = 1.5
MLP_SCALE = 1.0
# Of T5's relative bias, its only sense of place: strong enough that heads look at chosen distances.
BIAS_SCALE = 2.0

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def make_random_encoders(
    folder: str | Path,
    captions: Sequence[str],
    *,
    seed: int = 0,
    widths: Mapping[str, int] = WIDTHS,
) -> dict[str, str]:
    """Writes three random text encoders; the same arguments give the same bytes.

    Every word of the captions becomes one token of each tokenizer, as long as the vocabularies stay
    under the published sizes; other text is spelt out.

    Args:
        folder: becomes the parent of clip_l/, clip_g/ and t5/; made if missing.
        captions: what the tokenizers learn from.
        seed: of the weights. Other captions give other weights too, and so another hash.
        widths: features of each encoder, multiples of 16.

    Returns:
        encoder name -> its folder, as `encoders.text.load_text_encoders` takes them.

    Raises:
        ValueError: no captions, or a width that heads of 16 features do not fill.
    """
    if not any(caption.strip() for caption in captions):
        raise ValueError("no captions to learn tokenizers from; give at least one that has a word")
    for name, width in widths.items():
        if width <= 0 or width % HEAD_WIDTH:
            raise ValueError(f"{name} width {width} is no multiple of {HEAD_WIDTH}; choose one")
    paths = {name: Path(folder) / name for name in WIDTHS}
    for path in paths.values():
        path.mkdir(parents=True, exist_ok=True)

    clip_vocabulary, merges = _learn_clip_vocabulary(captions)
    # The padding tokens of the published folders: CLIP-L pads with the end token, bigG with id 0.
    for name, padding, projection in (("clip_l", END, False), ("clip_g", "!", True)):
        _write_clip_tokenizer(paths[name], clip_vocabulary, merges, padding)
        config = _clip_config(widths[name], clip_vocabulary, padding, projection)
        _write_json(paths[name] / "config.json", config)
        rng = _rng(seed, name, config, clip_vocabulary)
        _write_weights(paths[name], _clip_weights(rng, config, projection))

    pieces = _learn_t5_pieces(captions)
    _write_t5_tokenizer(paths["t5"], pieces)
    config = _t5_config(widths["t5"], len(pieces))
    _write_json(paths["t5"] / "config.json", config)
    _write_weights(paths["t5"], _t5_weights(_rng(seed, "t5", config, pieces), config))
    return {name: str(path) for name, path in paths.items()}


def _rng(seed: int, name: str, config: Mapping[str, Any], vocabulary: Any) -> np.random.Generator:
    """Draws depend on the words too: equal weights mean equal encoders, tokenizer included."""
    content = json.dumps([seed, name, config, vocabulary], sort_keys=True).encode()
    return np.random.Generator(
        np.random.PCG64(int.from_bytes(hashlib.sha256(content).digest()[:16], "big"))
    )


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(folder: Path, weights: Mapping[str, np.ndarray]) -> None:
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})


# CLIP


def _byte_characters() -> list[str]:
    """The characters that stand for the 256 bytes, in the order of CLIP ("!" is id 0)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def _learn_clip_vocabulary(captions: Sequence[str]) -> tuple[dict[str, int], list[list[str]]]:
    """Byte-pair encoding, laid out as in CLIP: bytes, bytes that end words, merges, specials."""
    tokenizer = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    characters = _byte_characters()
    most_merges = CLIP_VOCABULARY - 2 * len(characters) - 2
    trainer = trainers.BpeTrainer(
        vocab_size=CLIP_VOCABULARY,
        initial_alphabet=characters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"][:most_merges]
    tokens = characters + [character + "</w>" for character in characters]
    tokens += ["".join(pair) for pair in merges]
    tokens += [START, END]
    # Two merges may spell the same token; dict.fromkeys leaves the first.
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def _write_clip_tokenizer(
    folder: Path, vocabulary: dict[str, int], merges: list[list[str]], padding: str
) -> None:
    _write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": padding}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {**special, "model_max_length": POSITIONS, "tokenizer_class": "CLIPTokenizer"},
    )


def _clip_config(
    width: int, vocabulary: Mapping[str, int], padding: str, projection: bool
) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "attention_dropout": 0.0,
        "bos_token_id": vocabulary[START],
        "dtype": "float32",
        "eos_token_id": vocabulary[END],
        "hidden_act": "gelu" if projection else "quick_gelu",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": POSITIONS,
        "num_attention_heads": width // HEAD_WIDTH,
        "num_hidden_layers": LAYERS,
        "pad_token_id": vocabulary[padding],
        "projection_dim": width,
        "vocab_size": len(vocabulary),
    }


def _normal(rng: np.random.Generator, scale: float, *shape: int) -> np.ndarray:
    return (scale * rng.standard_normal(shape, np.float32)).astype(np.float32)


def _clip_weights(
    rng: np.random.Generator, config: Mapping[str, Any], projection: bool
) -> dict[str, np.ndarray]:
    width, mlp_width = config["hidden_size"], config["intermediate_size"]
    weights: dict[str, np.ndarray] = {}

    def linear(name: str, rows: int, columns: int, scale: float) -> None:
        weights[f"{name}.weight"] = _normal(rng, scale / math.sqrt(columns), rows, columns)
        weights[f"{name}.bias"] = np.zeros(rows, np.float32)

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = np.ones(width, np.float32)
        weights[f"{name}.bias"] = np.zeros(width, np.float32)

    embeddings = "text_model.embeddings"
    weights[f"{embeddings}.token_embedding.weight"] = _normal(rng, 1.0, config["vocab_size"], width)
    weights[f"{embeddings}.position_embedding.weight"] = _normal(
        rng, POSITION_SCALE, POSITIONS, width
    )
    for index in range(LAYERS):
        layer = f"text_model.encoder.layers.{index}"
        norm(f"{layer}.layer_norm1")
        for name in ("q_proj", "k_proj", "v_proj"):
            linear(f"{layer}.self_attn.{name}", width, width, 1.0)
        linear(f"{layer}.self_attn.out_proj", width, width, ATTENTION_SCALE)
        norm(f"{layer}.layer_norm2")
        linear(f"{layer}.mlp.fc1", mlp_width, width, 1.0)
        linear(f"{layer}.mlp.fc2", width, mlp_width, MLP_SCALE)
    norm("text_model.final_layer_norm")
    if projection:
        weights["text_projection.weight"] = _normal(rng, 1 / math.sqrt(width), width, width)
    return weights


# T5


def _learn_t5_pieces(captions: Sequence[str]) -> list[tuple[str, float]]:
    """Unigram pieces with log probabilities: whole words, and all characters to spell with."""
    counts: collections.Counter[str] = collections.Counter()
    for caption in captions:
        for chunk in caption.split():
            first, *others = re.findall(r"\w+|[^\w]", chunk)
            counts.update(["▁" + first, *others])
    spelling = sorted({chr(code) for code in range(33, 127)} | {"▁"} | set("".join(counts)))
    special = ["<pad>", "</s>", "<unk>"]
    most = T5_VOCABULARY - len(special) - len(spelling)
    words = sorted(set(counts) - set(spelling), key=lambda piece: (-counts[piece], piece))[:most]
    total = sum(counts.values())
    scores = [math.log(counts[word] / total) for word in words]
    # Far below every word, so that a word is never spelt where it is known.
    spelt = min(scores, default=0.0) - 10.0
    return (
        [(piece, 0.0) for piece in special]
        + list(zip(words, scores, strict=True))
        + [(character, spelt) for character in spelling]
    )


def _write_t5_tokenizer(folder: Path, pieces: list[tuple[str, float]]) -> None:
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {**special, "extra_ids": 0, "model_max_length": 512, "tokenizer_class": "T5Tokenizer"},
    )


def _t5_config(width: int, pieces: int) -> dict[str, Any]:
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_ff": 2 * width,
        "d_kv": HEAD_WIDTH,
        "d_model": width,
        "dropout_rate": 0.1,
        "dtype": "float32",
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "layer_norm_epsilon": 1e-6,
        "num_heads": width // HEAD_WIDTH,
        "num_layers": LAYERS,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": BUCKETS,
        "tie_word_embeddings": False,
        "use_cache": False,
        # Padded to a multiple of 128 rows, as the published table is (32128 rows for 32100 tokens).
        "vocab_size": -(-pieces // 128) * 128,
    }


def _t5_weights(rng: np.random.Generator, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    width, mlp_width, heads = config["d_model"], config["d_ff"], config["num_heads"]
    inner = heads * config["d_kv"]

    def linear(rows: int, columns: int, scale: float) -> np.ndarray:
        return _normal(rng, scale / math.sqrt(columns), rows, columns)

    weights = {
        "shared.weight": _normal(rng, 1.0, config["vocab_size"], width),
        "encoder.final_layer_norm.weight": np.ones(width, np.float32),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": _normal(
            rng, BIAS_SCALE, BUCKETS, heads
        ),
    }
    for index in range(LAYERS):
        block = f"encoder.block.{index}"
        attention, mlp = f"{block}.layer.0.SelfAttention", f"{block}.layer.1.DenseReluDense"
        weights |= {
            f"{block}.layer.0.layer_norm.weight": np.ones(width, np.float32),
            # T5 does not divide its logits by the root of the head width, so the weights do.
            f"{attention}.q.weight": linear(inner, width, 1 / math.sqrt(HEAD_WIDTH)),
            f"{attention}.k.weight": linear(inner, width, 1.0),
            f"{attention}.v.weight": linear(inner, width, 1.0),
            f"{attention}.o.weight": linear(width, inner, ATTENTION_SCALE),
            f"{block}.layer.1.layer_norm.weight": np.ones(width, np.float32),
            f"{mlp}.wi_0.weight": linear(mlp_width, width, 1.0),
            f"{mlp}.wi_1.weight": linear(mlp_width, width, 1.0),
            f"{mlp}.wo.weight": linear(width, mlp_width, MLP_SCALE),
        }
    return weights
