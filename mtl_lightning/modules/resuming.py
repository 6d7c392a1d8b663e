"""A validation that a checkpoint came before, and that Lightning does not make up for."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


def missed_validation(trainer: Trainer) -> bool:
    """Return whether the run was resumed from a checkpoint written between a batch and the validation after it.

    Lightning goes on with the next batch then, and leaves a gap in all that is recorded per validation. The condition
    is the one by which it would have validated, for loaders of known length and intervals counted in batches.
    """
    batches = trainer.fit_loop.epoch_loop
    if not (batches.restarted_on_train_batch_end and trainer.enable_validation):
        return False
    at_the_end = batches.batch_progress.is_last_batch
    every = trainer.check_val_every_n_epoch
    # An epoch whose last batch is done already counts as completed here.
    epoch = trainer.current_epoch if at_the_end else trainer.current_epoch + 1
    if every is not None and epoch % every:
        return False
    if trainer.val_check_batch == float("inf"):
        return at_the_end
    if trainer.val_check_batch is None:
        return False  # by the clock, which starts anew
    progress: Any = batches.batch_progress
    done = progress.total.ready if every is None else progress.current.ready
    return bool(done % trainer.val_check_batch == 0)


def make_up_for_validation(trainer: Trainer) -> None:
    """Run the validation, in the epoch that it belongs to."""
    batches = trainer.fit_loop.epoch_loop
    epochs: Any = trainer.fit_loop.epoch_progress.current
    shift = int(batches.batch_progress.is_last_batch)
    epochs.processed -= shift
    epochs.completed -= shift
    # What the checkpoint says of the progress of the validation before does not concern this one.
    batches.val_loop.batch_progress.reset_on_run()
    batches.val_loop.restarting = False
    trainer.validating = True
    batches.val_loop.run()
    trainer.training = True
    epochs.processed += shift
    epochs.completed += shift
