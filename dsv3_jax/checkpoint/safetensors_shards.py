"""Safetensors folders, tensor by tensor: what is stored where, and block-quantized FP8 back to float32.

The tensors' bytes are read with numpy: the safetensors package checks and lists a shard, but returns no FP8 to numpy.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Shaped
from safetensors import SafetensorError, safe_open

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
UNSCALED_BAND = (128, 128)

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U8": np.dtype(np.uint8),
}


class CheckpointError(ValueError):
    """A checkpoint lacks a tensor, has one too many or of another shape, or cannot be read; the message names it."""


@dataclass(frozen=True)
class StoredTensor:
    """Where the bytes of one tensor lie."""

    shard: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self) -> Shaped[np.ndarray, "..."]:
        """The tensor as it is stored. Raises CheckpointError if the shard has become shorter than its header says."""
        count = math.prod(self.shape)
        values = np.fromfile(self.shard, self.dtype, count, offset=self.offset)
        if values.size != count:
            raise CheckpointError(f"{self.shard} ends before byte {self.offset + count * self.dtype.itemsize}")
        return values.reshape(self.shape)


def name_some(names: list[str]) -> str:
    """The first of many names, and how many others there are."""
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} others)"


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder with `model.safetensors.index.json`, `model.safetensors` or any `*.safetensors`.

    Only headers are read. Raises CheckpointError, naming the file, where a shard is missing, truncated or disagrees
    with the index, or where two shards hold the same tensor.
    """
    weight_map = _weight_map(folder)
    shards = sorted(set(weight_map.values())) if weight_map else _unindexed_shards(folder)
    stored: dict[str, StoredTensor] = {}
    for shard in shards:
        tensors = _list_shard(shard)
        if twice := sorted(tensors.keys() & stored.keys()):
            raise CheckpointError(f"{shard} and {stored[twice[0]].shard.name} both hold {name_some(twice)}")
        stored |= tensors
    for name, shard in weight_map.items():
        if name not in stored or stored[name].shard != shard:
            raise CheckpointError(f"{folder / INDEX_NAME} places {name} in {shard.name}, which does not hold it")
    return stored


def _weight_map(folder: Path) -> Mapping[str, Path]:
    index = folder / INDEX_NAME
    if not index.exists():
        return {}
    try:
        return {name: folder / shard for name, shard in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index ({error!r}): download it again") from error


def _unindexed_shards(folder: Path) -> list[Path]:
    single = folder / SINGLE_NAME
    shards = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(f"{folder} holds no *.safetensors: point to the folder of a downloaded checkpoint")
    return shards


def _list_shard(shard: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(shard, framework="np") as opened, shard.open("rb") as raw:
            # The data follows an 8-byte length and a header of that length, without gaps.
            offset = 8 + int.from_bytes(raw.read(8), "little")
            stored = {}
            for name in opened.offset_keys():
                view = opened.get_slice(name)
                if view.get_dtype() not in DTYPES:
                    raise CheckpointError(f"{name} in {shard} has dtype {view.get_dtype()}, not one of {[*DTYPES]}")
                stored[name] = StoredTensor(shard, offset, DTYPES[view.get_dtype()], tuple(view.get_shape()))
                offset += math.prod(stored[name].shape) * stored[name].dtype.itemsize
            return stored
    except FileNotFoundError as error:
        raise CheckpointError(f"{shard} is missing: download it") from error
    except SafetensorError as error:
        raise CheckpointError(f"{shard} is truncated or not a safetensors file ({error}): download it again") from error


def scale_values(scales: Shaped[np.ndarray, "blocks_out blocks_in"]) -> Float32[np.ndarray, "blocks_out blocks_in"]:
    """Block scales as float32, from float32, F8_E8M0, or the exponents of UE8M0 in uint8 (2^(e - 127))."""
    if scales.dtype == np.uint8:
        scales = scales.view(ml_dtypes.float8_e8m0fnu)
    return scales.astype(np.float32)


def fill(
    target: Shaped[np.ndarray, "..."],
    values: Shaped[np.ndarray, "..."],
    scales: Float32[np.ndarray, "blocks_out blocks_in"] | None,
    block: tuple[int, int] | None,
) -> None:
    """Writes a stored tensor into `target`, cast to its dtype; with scales, each block times its scale in float32.

    Rows go in bands of a block: `target` is usually a transposed view, and a whole transpose misses the cache.
    """
    rows, columns = block or UNSCALED_BAND
    for i, start in enumerate(range(0, len(values), rows)):
        band = values[start : start + rows]
        if scales is not None:
            band = band.astype(np.float32) * np.repeat(scales[i], columns)[: band.shape[1]]
        target[start : start + rows] = band
