"""Shows the indexers' loss in the logs of Transformers' `Trainer`, whose own logs hold the summed loss alone."""

from typing import Any

import torch


class IndexerLossLogging:
    """Mixin for `Trainer` and its subclasses: logs `indexer_loss`, and `eval_indexer_loss` after an evaluation.

    Put it before the trainer's class, and use the result in its place:

        class IndexerTrainer(IndexerLossLogging, Trainer): ...

    The value is in nats and without its coefficient. While training it is the value of an optimizer step's whole
    batch, averaged over the steps since the last log, as `loss` is. While evaluating it is the mean over batches. A
    model that returns no `indexer_loss` logs nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        # Sums of the values, in training (True) and in evaluation (False), and the number of evaluation batches.
        self._indexer_losses: dict[bool, torch.Tensor] = {}
        self._indexer_batches = 0
        self._indexer_first_step = 0
        super().__init__(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any):
        """Train as the trainer does, from new sums."""
        self._forget(True)  # values that came after the last log of an earlier call
        self._forget(False)  # values of `predict`, which logs nothing
        return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        """Evaluate as the trainer does, from new sums."""
        self._forget(False)  # as above
        return super().evaluation_loop(*args, **kwargs)

    def _forget(self, training: bool) -> None:
        self._indexer_losses.pop(training, None)
        if not training:
            self._indexer_batches = 0

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ):
        """The trainer's loss. Adds the batch's `indexer_loss` to the sums."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        value = outputs.get("indexer_loss") if isinstance(outputs, dict) else None
        if value is not None:
            value = value.detach().float().mean()
            if model.training:
                if True not in self._indexer_losses:
                    self._indexer_first_step = self.state.global_step
                value = self._share_of_step(value, num_items_in_batch)
            else:
                if num_items_in_batch is not None:  # the tokens of all processes, in an evaluation too
                    value = self._share_of_step(value, num_items_in_batch)
                self._indexer_batches += 1
            self._indexer_losses[model.training] = self._indexer_losses.get(model.training, 0.0) + value
        return (loss, outputs) if return_outputs else loss

    def _share_of_step(self, value: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
        """The part of a micro-batch in the value of its optimizer step. The mean over processes gives that value."""
        if num_items_in_batch is None:
            return value / self.current_gradient_accumulation_steps
        # The values were divided by the tokens of all processes, so they are parts of a sum.
        return value * self.accelerator.num_processes if self.args.average_tokens_across_devices else value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the trainer does, with the mean of the indexers' loss beside a loss."""
        prefix = next((name.removesuffix("loss") for name in logs if name.endswith("_loss")), None)
        if "loss" in logs and True in self._indexer_losses:
            steps = self.state.global_step - self._indexer_first_step
            logs["indexer_loss"] = self._mean_over_processes(self._indexer_losses.pop(True) / steps)
        elif prefix is not None and False in self._indexer_losses:
            total = self._indexer_losses.pop(False)
            logs[f"{prefix}indexer_loss"] = self._mean_over_processes(total / self._indexer_batches)
            self._indexer_batches = 0
        super().log(logs, start_time)

    def _mean_over_processes(self, value: torch.Tensor) -> float:
        return self.accelerator.reduce(value, reduction="mean").item()
