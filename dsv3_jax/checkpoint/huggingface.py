"""Weights of the public DeepSeek-V3 safetensors checkpoints <-> our parameter tree, one tensor at a time."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from dsv3_jax.checkpoint.huggingface_config import config_from_hf, config_to_hf, fp8_block
from dsv3_jax.checkpoint.huggingface_layout import (
    SCALE_SUFFIX,
    copied_tensors,
    leaf_at,
    mtp_layers,
    tensor_places,
    tensor_shapes,
)
from dsv3_jax.checkpoint.safetensors_shards import (
    INDEX_NAME,
    SINGLE_NAME,
    CheckpointError,
    StoredTensor,
    fill,
    list_tensors,
    name_some,
    scale_values,
)
from dsv3_jax.config import ModelConfig
from dsv3_jax.model_shapes import is_shape, tree_shapes

CONFIG_NAME = "config.json"
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
WEIGHT_DTYPES = {np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16, FP8)}
SCALE_DTYPES = {np.dtype(t) for t in (np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu, np.uint8)}

Tree = dict[str, Any]


def read_config(folder: str | Path) -> ModelConfig:
    """The model of a checkpoint folder. Raises CheckpointError for an unreadable config.json, or ConfigError."""
    return config_from_hf(_config_values(Path(folder)))


def read_params(folder: str | Path, model: ModelConfig, dtype: DTypeLike) -> tuple[Tree, Tree]:
    """(params, router_bias) of a checkpoint folder as host arrays: layers stacked, kernels [in, out].

    Weights are in `dtype`, router_bias [layers, experts] in float32. FP8 weights are multiplied by their block scales
    in float32 first. Holds one stored tensor at a time besides the result, which is the size of the model in `dtype`.
    Raises CheckpointError naming a tensor that is missing, unexpected, of the wrong shape or, for an MTP layer's copy
    of the embedding or head, different from the original; and naming a shard that is missing or truncated.
    """
    folder = Path(folder)
    stored = list_tensors(folder)
    block = fp8_block(_config_values(folder))
    _check_names(folder, model, stored)
    _check_tensors(model, stored, block)

    shapes = tree_shapes(model)
    tree = {
        "params": _empty(shapes["params"], np.dtype(dtype)),
        "router_bias": _empty(shapes["router_bias"], np.dtype(np.float32)),
    }
    places = tensor_places(model)
    for name in sorted(places, key=lambda name: (stored[name].shard, stored[name].offset)):
        _read_into(places[name].view(leaf_at(tree, places[name].path)), name, stored, block)
    for name, original in copied_tensors(model).items():
        if name in stored:
            place = places[original]
            _check_copy(place.view(leaf_at(tree, place.path)), name, original, stored, block)
    return tree["params"], tree["router_bias"]


def write_hf(
    folder: str | Path,
    model: ModelConfig,
    params: Tree,
    router_bias: Tree,
    *,
    shard_bytes: int = 5 * 10**9,
    mtp_copies: bool = True,
) -> None:
    """Writes config.json and the weights, in their own dtype, as a public checkpoint that `read_params` reads.

    One `model.safetensors`, or shards of at most `shard_bytes` bytes (or one tensor) and their index. `mtp_copies`
    repeats the embedding and the head in every MTP layer, as the published checkpoint does. Arrays must be
    addressable from this process. Raises CheckpointError where the trees do not fit the model, and FileExistsError
    for a folder that is not empty.
    """
    folder = Path(folder)
    tree = {"params": params, "router_bias": router_bias}
    _check_tree(tree, model)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: write a checkpoint into a new folder")
    places = tensor_places(model)
    if mtp_copies:
        places |= {name: places[original] for name, original in copied_tensors(model).items()}

    def tensor(name: str) -> np.ndarray:
        place = places[name]
        return np.ascontiguousarray(place.view(np.asarray(leaf_at(tree, place.path))))

    sizes = _tensor_bytes(tree, model, mtp_copies)
    shards = _split(sizes, shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        shard = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensor(name) for name in names}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2))
    dtype = np.dtype(params["embed"]["embedding"].dtype).name
    (folder / CONFIG_NAME).write_text(json.dumps(config_to_hf(model) | {"torch_dtype": dtype}, indent=2))


def _config_values(folder: Path) -> Tree:
    try:
        values = json.loads((folder / CONFIG_NAME).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG_NAME} cannot be read ({error}): download it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{folder / CONFIG_NAME} is not a JSON object: download it again")
    return values


def _empty(shapes: Tree, dtype: np.dtype) -> Tree:
    return jax.tree.map(lambda shape: np.empty(shape, dtype), shapes, is_leaf=is_shape)


def _check_names(folder: Path, model: ModelConfig, stored: dict[str, StoredTensor]) -> None:
    expected = tensor_places(model)
    missing = [name for name in expected if name not in stored]
    if missing:
        of_mtp = tuple(f"model.layers.{layer}." for layer in mtp_layers(model))
        without_mtp = all(name.startswith(of_mtp) for name in missing)
        remedy = (
            f"if it was published without MTP layers, set num_nextn_predict_layers to 0 in {CONFIG_NAME}"
            if without_mtp
            else f"download the shards again, or correct {CONFIG_NAME}"
        )
        raise CheckpointError(f"{folder} lacks the tensor {name_some(missing)}: {remedy}")
    known = expected.keys() | copied_tensors(model).keys()
    scales = {name + SCALE_SUFFIX for name in known if name in stored and stored[name].dtype == FP8}
    if unscaled := sorted(scales - stored.keys()):
        raise CheckpointError(
            f"{folder} stores weights in FP8 without {name_some(unscaled)}: download the shards again"
        )
    if extra := sorted(stored.keys() - known - scales):
        raise CheckpointError(
            f"{folder} holds a tensor this model has no place for, {name_some(extra)}: correct {CONFIG_NAME}"
        )


def _check_tensors(model: ModelConfig, stored: dict[str, StoredTensor], block: tuple[int, int] | None) -> None:
    shapes = dict(tensor_shapes(model))
    shapes |= {name: shapes[original] for name, original in copied_tensors(model).items() if name in stored}
    dtypes = dict.fromkeys(shapes, WEIGHT_DTYPES)
    for name, shape in list(shapes.items()):
        if stored[name].dtype == FP8:
            if block is None or len(shape) != 2:
                raise CheckpointError(
                    f"{name} is stored in FP8, which is read for matrices, with "
                    f"quantization_config.weight_block_size in {CONFIG_NAME}: correct {CONFIG_NAME}"
                )
            shapes[name + SCALE_SUFFIX] = tuple(math.ceil(n / b) for n, b in zip(shape, block, strict=True))
            dtypes[name + SCALE_SUFFIX] = SCALE_DTYPES
    if wrong := [name for name, shape in shapes.items() if stored[name].shape != shape]:
        raise CheckpointError(
            f"{name_some(wrong)} in {stored[wrong[0]].shard} does not fit the model: it is {stored[wrong[0]].shape}, "
            f"and {CONFIG_NAME} asks for {shapes[wrong[0]]}"
        )
    if wrong := [name for name, allowed in dtypes.items() if stored[name].dtype not in allowed]:
        raise CheckpointError(
            f"{name_some(wrong)} in {stored[wrong[0]].shard} is {stored[wrong[0]].dtype}: "
            f"only {', '.join(sorted(str(dtype) for dtype in dtypes[wrong[0]]))} are implemented"
        )


def _read_into(target: np.ndarray, name: str, stored: dict[str, StoredTensor], block: tuple[int, int] | None) -> None:
    scales = stored.get(name + SCALE_SUFFIX)
    fill(target, stored[name].read(), None if scales is None else scale_values(scales.read()), block)


def _check_copy(
    original_values: np.ndarray,
    name: str,
    original: str,
    stored: dict[str, StoredTensor],
    block: tuple[int, int] | None,
) -> None:
    copy = np.empty(original_values.shape, original_values.dtype)
    _read_into(copy, name, stored, block)
    if not np.array_equal(copy, original_values):
        raise CheckpointError(
            f"{name} differs from {original}, and MTP modules share it with the main model: "
            "this checkpoint trained them apart, which is not implemented"
        )


def _check_tree(tree: Tree, model: ModelConfig) -> None:
    shapes, _ = jax.tree.flatten_with_path(tree_shapes(model), is_leaf=is_shape)
    expected = {jax.tree_util.keystr(path): shape for path, shape in shapes}
    leaves, _ = jax.tree.flatten_with_path(tree)
    given = {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}
    wrong = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
    if wrong:
        raise CheckpointError(
            f"{name_some(wrong)} does not fit the model: its shape is {given.get(wrong[0])}, "
            f"and the model's {expected.get(wrong[0])}"
        )


def _tensor_bytes(tree: Tree, model: ModelConfig, mtp_copies: bool) -> dict[str, int]:
    places = tensor_places(model)
    sizes = {
        name: math.prod(shape) * leaf_at(tree, places[name].path).dtype.itemsize for name, shape in tensor_shapes(model)
    }
    if mtp_copies:
        sizes |= {name: sizes[original] for name, original in copied_tensors(model).items()}
    return sizes


def _split(sizes: dict[str, int], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = []
    filled = shard_bytes
    for name, size in sizes.items():
        if not shards or filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
