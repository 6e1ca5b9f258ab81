"""`RoutedTrainer`: what a trainer of TRL, or transformers' own, lacks for a model with experts, as a mixin.

    class Trainer(moelab.RoutedTrainer, trl.DPOTrainer): ...
    Trainer(moelab.as_transformers(model), reference, ...).train()

TRL's own loss stays as it is, and so does what it reports as `loss`. Added are the balance losses of the model's
config, once in the backward pass of each micro-batch; `after_step` of routers and losses, once after each optimizer
step; and our tags in what is logged. TRL's auxiliary loss, Mixtral's over all layers pooled, needs router logits that
the adapter does not declare, so it is never added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from moelab.adapter.base import MoelabPreTrainedModel
from moelab.adapter.registration import register_with_transformers
from moelab.alignment.measures import RouteMeasures
from moelab.builder import build_balance_losses
from moelab.checkpoint import stored_tensors
from moelab.errors import ConfigError
from moelab.moe.balance import NamedLoss
from moelab.moe.batch_statistics import BatchStatistics
from moelab.moe.routing import LayerRecord
from moelab.nn.count import moe_blocks
from moelab.registry import Registry
from moelab.tensor_file import write_tensors
from moelab.training.router_statistics import RouterStatistics

LOSSES = "balance_losses.safetensors"  # of a checkpoint of transformers' trainers


def adapter_of(model: Any) -> MoelabPreTrainedModel:
    """The adapter inside what PEFT or accelerate made of it. Raises ConfigError where there is none."""
    model = getattr(model, "module", model)  # of accelerate, in several processes
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT
    if not isinstance(model, MoelabPreTrainedModel):
        raise ConfigError(f"model: RoutedTrainer trains what moelab.as_transformers gives, not {type(model).__name__}")
    return model


class RoutedTrainer:
    """Stands before a trainer class of TRL or transformers; takes its arguments, and `balance_losses`."""

    def __init__(
        self,
        *args: Any,
        balance_losses: Sequence[NamedLoss] | None = None,
        registry: Registry | None = None,
        **kwargs: Any,
    ) -> None:
        """`balance_losses`: None for those of the model's config, () for none; `registry`: plugins that have them.

        A reference that is not given is TRL's to read, from the folder that the model was read from.
        """
        register_with_transformers()
        super().__init__(*args, **kwargs)
        trainer: Any = self
        adapter = adapter_of(trainer.model)
        if balance_losses is None:
            balance_losses = build_balance_losses(adapter.model.config, registry or Registry())
        self.routes = Routes(adapter, balance_losses)
        reference = getattr(trainer, "ref_model", None)
        if isinstance(reference, MoelabPreTrainedModel):
            self.routes.watch_reference(reference)
        trainer.add_callback(_AfterStep(trainer))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of an optimizer step, whose tokens are counted: balance losses are means over all."""
        samples, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self.routes.begin_step(samples, self.state.global_step)  # type: ignore[attr-defined]
        return samples, items

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Theirs, with the balance losses in its backward pass."""
        with self.routes.in_backward(self.accelerator, inputs):  # type: ignore[attr-defined]
            return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Theirs, and what balance losses carry from step to step."""
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        state = self.routes.state()
        if state:
            write_tensors(Path(output_dir) / LOSSES, state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Theirs, and what `_save_optimizer_and_scheduler` wrote beside. Raises CheckpointError where it is missing."""
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None and self.routes.state():
            stored = stored_tensors(Path(checkpoint), LOSSES)
            self.routes.restore({name: tensor.read() for name, tensor in stored.items()})

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Theirs, with our tags beside."""
        if self.model.training:  # type: ignore[attr-defined]
            logs |= self.routes.metrics()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class Routes:
    """The records of the passes that are trained, and what becomes of them until the optimizer has stepped."""

    def __init__(self, adapter: MoelabPreTrainedModel, balance_losses: Sequence[NamedLoss]) -> None:
        self.decoder = adapter.model
        self.balance_losses = list(balance_losses)
        self.statistics, self.measures = RouterStatistics(), RouteMeasures()
        self._losses: dict[str, Tensor] = {}  # unweighted, summed over the steps since they were last told
        self._steps = 0  # of these
        self._records: list[LayerRecord] = []
        self._reference: list[LayerRecord] = []
        self._seen = BatchStatistics(self.balance_losses)
        self._before: BatchStatistics | None = None  # counts of the whole step, where a loss needs them first
        self._step, self._parts, self._tokens = 0, 1, 0
        adapter.on_records = self._take

    def watch_reference(self, reference: MoelabPreTrainedModel) -> None:
        """Compare routes with those of its passes, which are over the same tokens as the policy's."""
        reference.on_records = self._reference.extend

    def _take(self, records: Sequence[LayerRecord]) -> None:
        if torch.is_grad_enabled() and self.decoder.training:  # not what was sampled, evaluated, or a reference's
            self._records += records

    def begin_step(self, samples: Sequence[Any], step: int) -> None:
        """Before the first micro-batch of an optimizer step, counted from 0."""
        self._step, self._parts = step, max(len(samples), 1)
        counts = [_tokens(sample) for sample in samples]
        self._tokens = sum(counts) if all(counts) else 0
        self._before = None
        if self._tokens and len(samples) > 1 and any(named.loss.needs_batch_counts for named in self.balance_losses):
            self._before = self._counted(samples)

    @torch.no_grad()
    def _counted(self, samples: Sequence[Mapping[str, Tensor]]) -> BatchStatistics:
        """The load of each layer over all micro-batches: a pass without the head over each."""
        device, counted = next(self.decoder.parameters()).device, BatchStatistics(self.balance_losses)
        self.decoder.train()
        for sample in samples:
            ids, mask = sample["input_ids"].to(device), sample["attention_mask"].to(device)
            counted.add(self.decoder(ids, mask, head=False).records)
        return counted

    @contextmanager
    def in_backward(self, accelerator: Any, inputs: Any) -> Iterator[None]:
        """Within it, what is trained by `accelerator.backward` is the loss given and the balance losses."""
        share = _tokens(inputs) / self._tokens if self._tokens else 1 / self._parts
        answers = inputs.get("completion_mask") if isinstance(inputs, Mapping) else None
        own = accelerator.backward

        def backward(loss: Tensor, **kwargs: Any) -> None:
            own(loss + self._take_in(share, answers), **kwargs)

        accelerator.backward = backward
        try:
            yield
        finally:
            del accelerator.backward  # the class's own again
            self._records.clear()
            self._reference.clear()

    def _take_in(self, share: float, answers: Tensor | None) -> Tensor | float:
        """The weighted balance losses of the micro-batch, whose records are counted and dropped."""
        records = list(self._records)
        self._seen.add(records)
        self.statistics.add(records)
        if self._reference:
            self.measures.add_reference(records, self._reference)
        if answers is not None and records and answers.numel() == records[0].routing.num_tokens:
            self.measures.add_pairs(records, answers)
        before = self._before
        if before is None:
            before = BatchStatistics(self.balance_losses)
            before.add(records)
        total: Tensor | float = 0.0
        for named in self.balance_losses if records else ():
            value = named(records, before.context(named)) * share
            self._losses[named.name] = self._losses.get(named.name, 0) + value.detach()
            total = total + value * named.weight_at(self._step)
        return total

    def after_step(self, step: int) -> None:
        """Once after each optimizer step that was made."""
        if self._seen.wanted:
            self._seen.after_step(moe_blocks(self.decoder), step)
            for named in self.balance_losses:
                named.after_step(self._seen.context(named))
        self._steps += 1
        self.forget()

    def forget(self) -> None:
        """Begin counting anew: the step is over, or was not made."""
        self._seen = BatchStatistics(self.balance_losses)

    def state(self) -> dict[str, Tensor]:
        """{loss/name: tensor} of what balance losses carry from step to step; most carry nothing."""
        found: dict[str, Mapping[str, Tensor]] = {
            named.name: getattr(named.loss, "state_dict", dict)() for named in self.balance_losses
        }
        return {f"{name}/{key}": value for name, held in found.items() for key, value in held.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        for named in self.balance_losses:
            prefix = f"{named.name}/"
            mine = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            if mine:
                named.loss.load_state_dict(mine)  # type: ignore[attr-defined]

    def metrics(self) -> dict[str, float]:
        """What was seen since the last time, by our tags. Waits for the device."""
        found = {name: float(total) / max(self._steps, 1) for name, total in self._losses.items()}
        self._losses, self._steps = {}, 0
        return found | self.statistics.reduce().metrics | self.measures.metrics()


class _AfterStep(TrainerCallback):
    """Tells routers and losses when the optimizer has stepped."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.accelerator.optimizer_step_was_skipped:  # fp16 that overflowed
            self.trainer.routes.forget()
        else:
            self.trainer.routes.after_step(state.global_step)


def _tokens(inputs: Any) -> int:
    """Tokens of a micro-batch that are not padding; 0 where it holds none yet, prompts to sample from say."""
    if not isinstance(inputs, Mapping) or "input_ids" not in inputs:
        return 0
    mask = inputs.get("attention_mask")
    return int(mask.sum()) if mask is not None else int(inputs["input_ids"].numel())
