"""The frozen text encoders: captions to token ids to the outputs that a model is conditioned on.

Each encoder is a Hugging Face folder; going from small random encoders to the published ones is a
change of path. What becomes of the outputs is in `conditioning` (and importable from here).
"""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmdit_jax import sharding
from mmdit_jax.encoders import clip, t5
from mmdit_jax.encoders import folder as hf_folder
from mmdit_jax.encoders.conditioning import (
    CLIP_NAMES,
    ENCODER_NAMES,
    Condition,
    TextOutputs,
    assemble,
    drop_mask,
    null_condition,
    zero_outputs,
)
from mmdit_jax.encoders.dispatched import Dispatched

__all__ = [
    "CLIP_NAMES",
    "ENCODER_NAMES",
    "Condition",
    "TextEncoder",
    "TextOutputs",
    "assemble",
    "count_truncated",
    "describe",
    "describe_architecture",
    "dispatch",
    "drop_mask",
    "encode",
    "load_text_encoders",
    "null_condition",
    "require_recorded",
    "zero_outputs",
]

LOADERS = {"clip_l": clip.load, "clip_g": clip.load, "t5": t5.load}

# T5 pads its embedding table to a multiple of 128 rows (32128 for 32100 tokens); CLIP does not.
T5_PADDING_ROWS = 128

# Which folder of a diffusers pipeline holds the tokenizer of which text encoder.
DIFFUSERS_TOKENIZERS = {
    "text_encoder": "tokenizer",
    "text_encoder_2": "tokenizer_2",
    "text_encoder_3": "tokenizer_3",
}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")

PROBE = "a photo of a red cube"


class TextEncoder:
    """One frozen text encoder with its tokenizer.

    Attributes:
        name: "clip_l", "clip_g" or "t5".
        id: the architecture and its size, for people; `hash` is what tells encoders apart.
        length: tokens per caption; longer captions are cut, shorter ones padded.
        width: features of the sequence.
        pooled_width: features of the pooled vector; None where there is none.
        layer: which state the sequence is, "penultimate" or "final".
        module, params: the network.
        tokenizer: of transformers.
        batch_size: captions per call of the network, a multiple of the devices that share them.
    """

    def __init__(
        self,
        name: str,
        folder: str | Path,
        tokenizer_folder: str | Path,
        length: int,
        *,
        dtype: Any = jnp.float32,
        batch_size: int = 64,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.name = name
        self.folder = Path(folder)
        self.module, self.params = LOADERS[name](folder, dtype=dtype, mesh=mesh)
        config = self.module.config
        self.tokenizer = load_tokenizer(tokenizer_folder)
        padding_rows = 0 if name in CLIP_NAMES else T5_PADDING_ROWS
        _check_vocabulary(self.tokenizer, config.vocab_size, padding_rows, tokenizer_folder, folder)
        most = config.max_length if name in CLIP_NAMES else None
        if length < 2 or (most is not None and length > most):
            rule = f"from 2 to {most}" if most is not None else "of 2 or more"
            raise ValueError(f"{name} length {length} does not fit {folder}; choose one {rule}")
        self.length = length
        self.batch_size = batch_size
        self.width = config.width
        architecture = describe_architecture(config)
        self.pooled_width, self.layer = architecture["pooled_width"], architecture["layer"]
        self.id = architecture["id"]
        self._mesh, self._place, self._ways = mesh, None, 1
        if mesh is not None:
            self._place, self._ways = sharding.batch_sharding(mesh), sharding.batch_ways(mesh)
            self.batch_size += -batch_size % self._ways
        self._apply = jax.jit(
            lambda params, ids_BT: self.module.apply({"params": params}, ids_BT),
            out_shardings=self._place,
        )

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of the weight files; for a single file the one that model hubs show."""
        return hf_folder.sha256(hf_folder.weight_files(self.folder))

    def tokenize(self, captions: Sequence[str]) -> tuple[np.ndarray, int]:
        """Turns captions into token ids of one length.

        Returns:
            ids_BT int32 with T = `length`, padded with the tokenizer's padding token, and how many
            captions were cut. A cut caption keeps its EOS in the last place: CLIP pools there.
        """
        # The tokenizer is asked for all ids and cut here, because it does not say what it cut.
        all_ids = self.tokenizer(list(captions), verbose=False)["input_ids"] if captions else []
        ids_BT = np.full((len(all_ids), self.length), self.tokenizer.pad_token_id, np.int32)
        truncated = 0
        for row_T, ids in zip(ids_BT, all_ids, strict=True):
            if len(ids) > self.length:
                truncated += 1
                ids = ids[: self.length - 1] + ids[-1:]
            row_T[: len(ids)] = ids
        return ids_BT, truncated

    def count_valid(self, captions: Sequence[str]) -> np.ndarray:
        """Tokens of each caption that are no padding, end token included: (B,) int32."""
        masks = self.tokenizer(list(captions), verbose=False, return_attention_mask=True)
        lengths = [min(sum(mask), self.length) for mask in masks["attention_mask"]]
        return np.array(lengths, np.int32)

    def encode(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Encodes captions and waits, see `dispatch`.

        Returns:
            "sequence" (B, T, D) and, of a CLIP, "pooled" (B, V): float32 on the host.
        """
        return self.dispatch(captions).fetch()

    def dispatch(self, captions: Sequence[str]) -> Dispatched[dict[str, np.ndarray]]:
        """Starts to encode captions; equal ones only once.

        The network sees batches of `batch_size`, the last one filled up, so that it is compiled
        once. A call with fewer captions takes the next power of two (times the devices of the
        mesh): a prompt is not encoded 64 times.

        Returns:
            What fetches the result of `encode`.
        """
        unique = list(dict.fromkeys(captions))
        if not unique:
            raise ValueError(f"no captions to encode with {self.name}; give at least one")
        ids_UT, _ = self.tokenize(unique)
        batch = self._ways
        while batch < min(len(unique), self.batch_size):
            batch *= 2
        batch = min(batch, self.batch_size)
        filled_UT = np.concatenate([ids_UT, np.repeat(ids_UT[:1], -len(unique) % batch, axis=0)])
        with sharding.entered(self._mesh):
            chunks = [
                self._apply(
                    self.params, jax.device_put(filled_UT[start : start + batch], self._place)
                )
                for start in range(0, len(filled_UT), batch)
            ]
        row = {caption: index for index, caption in enumerate(unique)}
        rows_B = np.array([row[caption] for caption in captions])

        def fetch() -> dict[str, np.ndarray]:
            return {
                kind: np.concatenate([np.asarray(c[kind], np.float32) for c in chunks])[rows_B]
                for kind in chunks[0]
            }

        return Dispatched(chunks, fetch)


def load_tokenizer(folder: str | Path) -> Any:
    """Loads a Hugging Face tokenizer; its vocabulary is not checked here.

    Raises:
        FileNotFoundError: no folder, or no tokenizer files in it.
    """
    # Imported here: training assembles conditions but never tokenises; the import takes seconds.
    # Its advice to install torch is none here: tokenizers are all that is wanted of it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give the folder of the tokenizer files")
    if not any((Path(folder) / name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{folder} has no tokenizer ({' or '.join(TOKENIZER_FILES)}); put its files there, or "
            "give its folder after a comma: MODEL_FOLDER,TOKENIZER_FOLDER"
        )
    try:
        # Left open, a folder that brings its own code makes transformers ask at the terminal.
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # damaged files lead transformers to errors of many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the tokenizer in {folder} cannot be read ({reason}); fetch all of its files again"
        ) from error


def _check_vocabulary(
    tokenizer: Any,
    vocab_size: int,
    padding_rows: int,
    tokenizer_folder: str | Path,
    folder: str | Path,
) -> None:
    """Refuses a tokenizer that is not the model's: transformers makes up an empty one silently."""
    known = len(tokenizer)
    if not known <= vocab_size <= known + padding_rows:
        raise ValueError(
            f"the tokenizer in {tokenizer_folder} knows {known} tokens but the model in {folder} "
            f"has {vocab_size}; give the tokenizer that belongs to the model, with all of its files"
        )
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer in {tokenizer_folder} has the padding token {tokenizer.pad_token} and "
            f"the end token {tokenizer.eos_token}; both are needed, see its tokenizer_config.json"
        )
    ids = tokenizer(PROBE)["input_ids"]
    special = {tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    if not set(ids) - special or ids[-1] != tokenizer.eos_token_id:
        raise ValueError(
            f"the tokenizer in {tokenizer_folder} turns {PROBE!r} into {ids}: only unknown tokens, "
            "or no end token; its files are incomplete"
        )


def folders(entry: str) -> tuple[Path, Path]:
    """Splits "MODEL" or "MODEL,TOKENIZER"; without the latter, finds the tokenizer of the model."""
    model, comma, tokenizer = str(entry).partition(",")
    folder = Path(model.strip())
    if comma:
        return folder, Path(tokenizer.strip())
    beside = folder.parent / DIFFUSERS_TOKENIZERS.get(folder.name, folder.name)
    inside = any((folder / name).is_file() for name in TOKENIZER_FILES)
    return folder, beside if beside.is_dir() and not inside else folder


def load_text_encoders(
    paths: Mapping[str, str],
    lengths: Mapping[str, int],
    *,
    dtype: Any = jnp.float32,
    batch_size: int = 64,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, TextEncoder]:
    """Loads text encoders from Hugging Face folders.

    Args:
        paths: encoder name -> folder with the model and its tokenizer, or "MODEL,TOKENIZER" for two
            folders. The tokenizer folders of a diffusers pipeline are found by themselves.
        lengths: encoder name -> tokens per caption (77 each in SD3).
        dtype: of parameters and computation.
        batch_size: captions per call of a network.
        mesh: splits every batch over its devices, and the parameters over its fsdp axis; for the
            devices of this process (`sharding.local_mesh`). None takes the first device.

    Returns:
        The encoders by name, in the order of ENCODER_NAMES.

    Raises:
        FileNotFoundError: missing folders or files.
        ValueError: an unknown name, a missing length, a model of the wrong kind, or a tokenizer
            that does not belong to its model.
    """
    unknown = sorted(set(paths) - set(ENCODER_NAMES))
    if unknown:
        raise ValueError(f"unknown text encoders {unknown}; known are {list(ENCODER_NAMES)}")
    without_length = sorted(set(paths) - set(lengths))
    if without_length:
        raise ValueError(f"text encoders {without_length} have no length; give one to each (77)")
    return {
        name: TextEncoder(
            name,
            *folders(paths[name]),
            lengths[name],
            dtype=dtype,
            batch_size=batch_size,
            mesh=mesh,
        )
        for name in ENCODER_NAMES
        if name in paths
    }


def encode(
    encoders: Mapping[str, TextEncoder], captions: Sequence[str], *, trimmed: bool = False
) -> dict[str, dict[str, np.ndarray]]:
    """Returns the TextOutputs of captions: every encoder's outputs, float32 on the host.

    With `trimmed` they have the "length" (B,) of every caption: `assemble` zeroes what comes after.
    """
    return dispatch(encoders, captions, trimmed=trimmed).fetch()


def dispatch(
    encoders: Mapping[str, TextEncoder], captions: Sequence[str], *, trimmed: bool = False
) -> Dispatched[dict[str, dict[str, np.ndarray]]]:
    """Starts to encode captions with every encoder; what is returned fetches `encode`'s result."""
    started = {name: encoder.dispatch(captions) for name, encoder in encoders.items()}

    def fetch() -> dict[str, dict[str, np.ndarray]]:
        outputs = {name: each.fetch() for name, each in started.items()}
        for name in encoders if trimmed else ():
            outputs[name] = {**outputs[name], "length": encoders[name].count_valid(captions)}
        return outputs

    return Dispatched([each.arrays for each in started.values()], fetch)


def count_truncated(encoders: Mapping[str, TextEncoder], captions: Sequence[str]) -> dict[str, int]:
    """Returns how many of the captions each encoder has to cut."""
    return {name: encoder.tokenize(captions)[1] for name, encoder in encoders.items()}


def describe(encoder: TextEncoder) -> dict[str, Any]:
    """Returns what a manifest records of an encoder, JSON-able."""
    architecture = describe_architecture(encoder.module.config)
    return {"hash": encoder.hash, "length": encoder.length, **architecture}


def describe_architecture(config: clip.CLIPTextConfig | t5.T5Config) -> dict[str, Any]:
    """Returns the part of `describe` that an encoder's config decides."""
    sizes = f"{config.layers}x{config.width}"
    if isinstance(config, clip.CLIPTextConfig):
        return {
            "id": f"{clip.CLIPTextEncoder.__name__}-{sizes}",
            "kind": "clip",
            "width": config.width,
            "pooled_width": config.pooled_width,
            "layer": "penultimate",
        }
    return {
        "id": f"{t5.T5Encoder.__name__}-{sizes}",
        "kind": "t5",
        "width": config.width,
        "pooled_width": None,
        "layer": "final",
    }


def require_recorded(
    encoders: Mapping[str, TextEncoder], recorded: Mapping[str, Mapping[str, Any]]
) -> None:
    """Refuses encoders other than those that the training data was encoded with.

    Args:
        encoders: as loaded now.
        recorded: encoder name -> `describe` of then; other entries (a path) are not compared.

    Raises:
        ValueError: every difference, with both values.
    """
    problems = []
    if set(encoders) != set(recorded):
        problems.append(f"encoders {sorted(encoders)} here, {sorted(recorded)} recorded")
    for name in sorted(set(encoders) & set(recorded)):
        for key, here in describe(encoders[name]).items():
            if recorded[name].get(key) != here:
                problems.append(f"{name} {key} {here} here, {recorded[name].get(key)} recorded")
    if problems:
        raise ValueError(
            f"text encoders differ from the data set's: {'; '.join(problems)}; load those that the "
            "data was encoded with"
        )
