"""Checkpoints of a training run: state, progress with the data iterator, and config, saved asynchronously."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dsv3_jax.config import CheckpointConfig, Config, ConfigError, to_dict
from dsv3_jax.ops.weights import Params
from dsv3_jax.parallel.agreement import all_processes
from dsv3_jax.train.state import TrainState

logger = logging.getLogger(__name__)

Json = dict[str, Any]


@dataclass(frozen=True)
class Restored:
    """What a checkpoint held."""

    step: int
    state: TrainState
    average: Params | None
    """The moving average of the weights, where the run keeps one."""
    progress: Json


class Checkpoints:
    """The checkpoints under a run's output folder. A save returns once the arrays are on the host."""

    def __init__(self, output_dir: str | Path, config: CheckpointConfig):
        self.folder = Path(output_dir).expanduser().absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=config.keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        if not all(all_processes(self.folder.is_dir())):
            raise ConfigError(
                f"output_dir={str(output_dir)!r}: not every process sees the folder that process 0 made; put it on a "
                "filesystem that all hosts share"
            )
        # Each process reads by itself: one that cannot must not leave the others waiting inside.
        alone = ocp.options.MultiprocessingOptions(primary_host=None, active_processes={jax.process_index()})
        reading = ocp.CheckpointManagerOptions(create=False, multiprocessing_options=alone)
        self._reader = ocp.CheckpointManager(self.folder, options=reading)

    def steps(self) -> list[int]:
        """Steps that were saved, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, step: int, config: Config, state: TrainState, average: Params | None, progress: Json) -> None:
        """Start writing a checkpoint, after the one before it is complete; a step that is saved already is left."""
        if step in self._manager.all_steps():
            return
        items = {
            "state": ocp.args.StandardSave(state),
            "progress": ocp.args.JsonSave(progress),
            "config": ocp.args.JsonSave(to_dict(config)),
        }
        if average is not None:
            items["average"] = ocp.args.StandardSave(average)
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore_newest(self, config: Config, abstract: TrainState, *, set_aside: bool = True) -> Restored | None:
        """The newest checkpoint that reads back, onto the shardings of `abstract`; None where there is none.

        One that does not read is reported, and moved aside unless `set_aside` is False, as for a reader of another's
        run. Raises ConfigError if the model's sizes changed, or if no checkpoint reads. Lack of memory is no damage and
        propagates.
        """
        steps = self.steps()
        for step in steps:
            found = error = None
            try:
                found = self._restore(step, config, abstract)
            except ConfigError:
                raise
            # Any other failure to read means the same: use the one before.
            except Exception as caught:
                if _is_out_of_memory(caught):
                    raise
                error = " ".join(str(caught).split())[:300]
            errors = [e for e in all_processes(error) if e is not None]
            if not errors:
                return found
            self._report_unreadable(step, errors[0], set_aside)
        if steps:
            raise ConfigError(
                f"none of the {len(steps)} checkpoints in {self.folder} reads back: use another output_dir"
            )
        return None

    def _restore(self, step: int, config: Config, abstract: TrainState) -> Restored:
        saved = self._reader.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore())).config
        _check_same_model(saved, config, self.folder / str(step))
        keeps_average = config.optimizer.ema_decay is not None
        items = {
            "state": ocp.args.StandardRestore(abstract),
            "progress": ocp.args.JsonRestore(),
        }
        if keeps_average and (self.folder / str(step) / "average").exists():
            items["average"] = ocp.args.StandardRestore(abstract.params)
        found = self._reader.restore(step, args=ocp.args.Composite(**items))
        return Restored(step, found.state, found.get("average"), found.progress)

    def _report_unreadable(self, step: int, reason: str, set_aside: bool) -> None:
        target = self.folder.parent / "unreadable" / f"{step}"
        moved = f"moved to {target}, " if set_aside else ""
        broken = self.folder / str(step)
        logger.warning("checkpoint %s does not read back (%s): %strying the one before", broken, reason, moved)
        if set_aside:
            self._move(broken, target)

    def _move(self, broken: Path, target: Path) -> None:
        """Keep the files, out of the way of a later save of this step."""
        if jax.process_index() == 0:
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            shutil.move(broken, target)
        all_processes("moved")
        self._manager.reload()

    def wait(self) -> None:
        """Until the last save is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Complete the last save and free the manager's threads."""
        self._manager.close()


def _check_same_model(saved: Json, config: Config, folder: Path) -> None:
    """The arrays depend on the model's sizes, and the place in the data on the length of a row."""
    then, now = ({**values["model"], "seq_len": values["batch"]["seq_len"]} for values in (saved, to_dict(config)))
    for name, value in now.items():
        if then.get(name) != value:
            section = "batch" if name == "seq_len" else "model"
            raise ConfigError(
                f"{section}.{name}={value!r}: {folder} was made with {then.get(name)!r}; keep that, or use a new "
                "output_dir"
            )


def _is_out_of_memory(error: Exception) -> bool:
    on_device = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    return on_device or isinstance(error, MemoryError)
