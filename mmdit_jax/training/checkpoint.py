"""Checkpoints: Orbax, asynchronous, the newest `keep`, restored onto any mesh.

A checkpoint holds four items, so that sampling reads the weights without the optimizer:
`params`, `ema_params` (unless EMA is off), `optimizer` (its state and the step), `meta` (JSON).
"""

import os
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from mmdit_jax.training.state import StatePlan, TrainState


def _with_shardings(abstract: Any, shardings: Any) -> Any:
    # Orbax needs the sharding of every leaf: without, another number of devices is refused.
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
    )


class Checkpointer:
    """Saves and restores the training state under `workdir/checkpoints`."""

    def __init__(self, workdir: str | os.PathLike, *, keep: int = 3, read_only: bool = False):
        """Opens the directory, which is made when it is missing (unless `read_only`)."""
        self._directory = os.path.join(os.path.abspath(workdir), "checkpoints")
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else keep,
                create=not read_only,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
                enable_async_checkpointing=not read_only,
                async_options=ocp.AsyncOptions(timeout_secs=1800),
            ),
        )

    def latest_step(self) -> int | None:
        """Newest saved step, or None when nothing has been saved."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All saved steps, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts saving a state in the background; training may go on (and donate it) at once."""
        step = int(state.step)
        items = {
            "params": ocp.args.StandardSave(state.params),
            "optimizer": ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
            "meta": ocp.args.JsonSave(meta),
        }
        if state.ema_params is not None:
            items["ema_params"] = ocp.args.StandardSave(state.ema_params)
        if not self._manager.save(step, args=ocp.args.Composite(**items), force=True):
            raise RuntimeError(f"checkpoint of step {step} was not accepted by Orbax")

    def restore(self, plan: StatePlan, step: int) -> TrainState:
        """The whole state of a step, on the mesh of the plan.

        Raises:
            RuntimeError: the checkpoint cannot be read; nothing else is used in its place.
        """
        abstract, shardings = plan.abstract, plan.shardings
        items = {
            "params": ocp.args.StandardRestore(_with_shardings(abstract.params, shardings.params)),
            "optimizer": ocp.args.StandardRestore(
                _with_shardings(
                    {"step": abstract.step, "opt_state": abstract.opt_state},
                    {"step": shardings.step, "opt_state": shardings.opt_state},
                )
            ),
        }
        if abstract.ema_params is not None:
            items["ema_params"] = ocp.args.StandardRestore(
                _with_shardings(abstract.ema_params, shardings.ema_params)
            )
        restored = self._restore(step, items)
        logging.info("restored step %d from %s", step, self._directory)
        return TrainState(
            step=restored["optimizer"]["step"],
            params=restored["params"],
            ema_params=restored["ema_params"] if "ema_params" in items else None,
            opt_state=restored["optimizer"]["opt_state"],
        )

    def restore_weights(self, abstract: Any, shardings: Any, step: int, weights: str) -> Any:
        """The parameters of a step, `weights` being "ema" or "raw"."""
        item = {"ema": "ema_params", "raw": "params"}[weights]
        target = ocp.args.StandardRestore(_with_shardings(abstract, shardings))
        return self._restore(step, {item: target})[item]

    def _restore(self, step: int, items: dict[str, Any]) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            raise RuntimeError(
                f"checkpoint {self._directory}/{step} cannot be restored ({error}); to go on from "
                "an older one, move this directory away"
            ) from error

    def wait(self) -> None:
        """Returns when everything started has been committed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases the directory."""
        self._manager.wait_until_finished()
        self._manager.close()


def save_weights(workdir: str | os.PathLike, params: Any, meta: dict[str, Any]) -> None:
    """Saves parameters alone, as step 0: to sample and to start training from, not to resume.

    Not in the background, and little at once: Orbax copies what it is writing, and the parameters
    may be most of the memory there is.
    """
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    manager = ocp.CheckpointManager(
        os.path.join(os.path.abspath(workdir), "checkpoints"),
        options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
        item_handlers={
            # The type says int, the limit is any number; it must admit the largest array.
            "params": ocp.StandardCheckpointHandler(save_concurrent_gb=1.25 * largest / 1e9),
            "meta": ocp.JsonCheckpointHandler(),
        },
    )
    items = {"params": ocp.args.StandardSave(params), "meta": ocp.args.JsonSave(meta)}
    if not manager.save(0, args=ocp.args.Composite(**items), force=True):
        raise RuntimeError(f"{workdir}: weights were not accepted by Orbax")
    manager.close()
