"""The moving average of a student of megatron-core: each rank keeps that of what its own chunks train, in any layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, mpu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from swift.megatron.callbacks.base import MegatronCallback
from swift.megatron.utils.megatron_lm_utils import get_sharded_sd_metadata
from torch import nn

from ..teachers.average import MovingAverage, SpreadParameters, average_of, check_same
from ..world import from_all
from .options import AVERAGE, resumed_from


class ChunkParameters(SpreadParameters):
    """What this rank's chunks of a model train, each parameter by the number of its chunk and its name there.

    The teacher's values are written where the student's were: a captured graph, the optimizer's buffers and data-parallel gathers know the
    memory.

    Args:
        chunks: Without their wrappers.
        args: ms-swift's arguments.
    """

    def __init__(self, chunks: list[nn.Module], args: Any):
        super().__init__(nn.ModuleList(chunks))
        self.chunks, self.args = chunks, args

    def _release(self) -> None:
        """Parameters are whole between two steps, and nothing else is made of them."""


class ShardedAverage(MovingAverage):
    """With a checkpoint of megatron-core's in each checkpoint, which any layout can read."""

    parameters: ChunkParameters | None

    def _sharded(self) -> dict[str, Any]:
        """The average in fp32, each tensor as the student's checkpoints have the parameter whose average it is.

        Raises:
            RuntimeError: They do not have one of the parameters.
        """
        # Each layer by its own name, for some may be frozen.
        metadata, found = {**get_sharded_sd_metadata(self.parameters.args), 'non_homogeneous_layers': True}, {}
        for number, chunk in enumerate(self.parameters.chunks):
            for key, entry in chunk.sharded_state_dict(metadata=metadata).items():
                name = f'{number}.{key}'
                if name in self.values:
                    # Not through the parameter: one that is given data of another dtype loses the hooks that gather its gradient.
                    dtype = {'dtype': self.values[name].dtype} if hasattr(entry, 'dtype') else {}
                    found[name] = dataclasses.replace(entry, data=self.values[name], **dtype)
        missing = self.values.keys() - found.keys()
        if missing:
            raise RuntimeError(f'--gkd_self_teacher ema: checkpoints of this model do not have {min(missing)}, which is trained.')
        return found

    def save(self, checkpoint: str | Path) -> None:
        """Write the average into a checkpoint, each rank its part. A collective call."""
        directory = Path(checkpoint) / AVERAGE
        directory.mkdir(parents=True, exist_ok=True)
        strategy = FullyParallelSaveStrategyWrapper(
            get_default_save_sharded_strategy(), mpu.get_data_parallel_group(with_context_parallel=True)
        )
        dist_checkpointing.save(self._sharded(), str(directory), strategy)

    def load(self, checkpoint: str | Path, option: str) -> None:
        """A collective call.

        Args:
            option: By which the checkpoint was given.

        Raises:
            OptionError: It has no average, or that of other parameters.
        """
        directory, sharded = str(average_of(checkpoint, AVERAGE, option)), self._sharded()
        trained = set().union(*from_all(_keys(sharded)))
        check_same(f'{option} {checkpoint}: its {AVERAGE}', set(dist_checkpointing.load_tensors_metadata(directory)), trained)
        for name, value in dist_checkpointing.load(sharded, directory).items():
            self.values[name].copy_(value)


def _keys(sharded: dict[str, Any]) -> set[str]:
    """The names of what a checkpoint has of these; some parameters are several tensors there."""
    built = [entry.build() if isinstance(entry, ShardedTensorFactory) else entry for entry in sharded.values()]
    return {entry.key for entry in nested_values({'built': built})}


class Follower(MegatronCallback):
    """The average begins as the student, and follows it after each update, before any checkpoint is written."""

    def on_train_begin(self) -> None:
        trainer = self.trainer
        trainer.teacher.average.begin(ChunkParameters(trainer.unwrapped_models, self.args))
        resumed = resumed_from(self.args)
        if resumed is not None:
            trainer.teacher.average.load(*resumed)

    def on_step_end(self) -> None:
        with self.trainer.gathered_weights():
            self.trainer.teacher.average.follow()
