"""A model and its tokenizer, from the output folder of a run or from a folder in the public layout."""

import dataclasses
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from dsv3_jax.checkpoint.huggingface import write_hf
from dsv3_jax.checkpoint.pretrained import PretrainedModel, load_pretrained
from dsv3_jax.checkpoint.training import Checkpoints
from dsv3_jax.config import Config, ConfigError, ParallelConfig, from_dict
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer
from dsv3_jax.ops.weights import cast_for_inference
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.train.state import abstract_state

_TOKENIZER = "tokenizer.json"


def load_model(folder: str | Path, dtype: str | None = None, *, average: bool = False) -> PretrainedModel:
    """The newest checkpoint of a run, or a published model, with weights in `dtype` (None: as the run computes).

    `average` takes the averaged weights of a run. Raises ConfigError for a folder that is neither.
    """
    folder = Path(folder)
    if (folder / "checkpoints").is_dir():
        return _load_run(folder, dtype, average)
    if (folder / "config.json").is_file():
        if average:
            raise ConfigError(f"{folder}: a published model has no averaged weights; leave --average out")
        return load_pretrained(folder, dtype or "bfloat16")
    raise ConfigError(
        f"{folder}: holds neither checkpoints of a run nor a config.json with safetensors; give the output_dir of a "
        "run or a folder in the public DeepSeek-V3 layout"
    )


def load_text_tokenizer(folder: str | Path, vocab_size: int) -> Tokenizer:
    """The tokenizer.json of a folder. Raises ConfigError where there is none or it does not fit the model."""
    path = Path(folder) / _TOKENIZER
    if not path.is_file():
        raise ConfigError(f"{path}: is missing; put the model's tokenizer.json there")
    return load_tokenizer(str(path), vocab_size)


def convert_to_hf(folder: str | Path, output: str | Path, dtype: str, *, average: bool = False) -> None:
    """Write a model in the public DeepSeek-V3 safetensors layout, with its tokenizer where it has one.

    Raises FileExistsError for an output folder that is not empty.
    """
    model = load_model(folder, dtype, average=average)
    params, bias = jax.tree.map(np.asarray, (model.params, model.router_bias))
    write_hf(output, model.config, params, bias)
    tokenizer = Path(folder) / _TOKENIZER
    if tokenizer.is_file():
        (Path(output) / _TOKENIZER).write_bytes(tokenizer.read_bytes())


def _load_run(folder: Path, dtype: str | None, average: bool) -> PretrainedModel:
    config = _saved_config(folder)
    abstract = abstract_state(config, make_mesh(config))
    with closing(Checkpoints(folder, config.checkpoint)) as checkpoints:
        # The run may go on meanwhile, and others may read: its files stay where they are.
        restored = checkpoints.restore_newest(config, abstract, set_aside=False)
    if restored is None:
        raise ConfigError(f"{folder}/checkpoints: holds no complete checkpoint; let the run reach its first one")
    if average and restored.average is None:
        raise ConfigError(
            f"{folder}: the run kept no averaged weights; train with optimizer.ema_decay, or use the last"
        )
    params = restored.average if average else restored.state.params
    if dtype is None:
        params = cast_for_inference(params, config.precision)
    else:
        params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
    return PretrainedModel(config.model, params, restored.state.router_bias)


def _saved_config(folder: Path) -> Config:
    """The config of the newest checkpoint that has a readable one, for one device."""
    steps = sorted((int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit()), reverse=True)
    for step in steps:
        path = folder / "checkpoints" / str(step) / "config"
        try:
            config = from_dict(ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(path))
        except (OSError, ValueError):
            continue
        one = ParallelConfig(data=1, node=1, gpu=1, devices=1)
        return dataclasses.replace(config, parallel=one)
    raise ConfigError(f"{folder}/checkpoints: holds no complete checkpoint; let the run reach its first one")
