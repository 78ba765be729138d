"""The training loop: steps, and between them evaluations, checkpoints and log lines."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch.optim import Optimizer

from parallel.device import peak_memory_bytes
from parallel.shards import Shards
from parallel.world import ALONE, World
from quant.common.errors import NibbleError
from quant.common.words import counted, format_bytes, format_seconds
from train.config.sections import TrainConfig
from train.data.batches import Batch, EvalBatches, StepBatches
from train.graph import PassGraph
from train.held_out import batch_loss, held_out_loss
from train.optim import NonFiniteError, check_loss, clip_gradients, measure_gradients
from train.output.metrics import MetricsLog
from train.output.report import Report
from train.output.usage import HELD_OUT, TRAINING, usage_record
from train.schedule import rate_of, set_learning_rate
from train.signals import StopOnSignal
from train.state.best import BestResult, Evaluation, evaluations_without_improvement


@dataclass
class Progress:
    """Totals of a run over all its sessions, kept in every checkpoint.

    tokens: trained on, without padding. labelled_tokens: those of them that carried loss. seconds: spent in steps.
    """

    step: int = 0
    tokens: int = 0
    labelled_tokens: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the step's labelled tokens, before the update. grad_norm: before clipping. balance: what
    `model.balance` measured, by the names in metrics.jsonl.
    """

    loss: float
    grad_norm: float
    tokens: int
    labelled: int
    balance: dict[str, float] = field(default_factory=dict)


def training_step(
    shards: Shards,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    *,
    step: int,
    max_grad_norm: float | None,
    device: torch.device,
    world: World = ALONE,
    graph: PassGraph | None = None,
) -> StepResult:
    """One optimiser step over all its micro-batches; `step` is for messages. The learning rate is the optimiser's.

    On several processes each has its own micro-batches, equally many; the result is that of all of them. A single
    process skips a micro-batch without a label, which has no gradient, unless `model.balance` or `model.usage` counts
    its tokens. graph: replays the passes that it can.

    Raises NonFiniteError for a loss or gradient that is infinite or not a number, before any weight has changed.
    """
    model = shards.model
    counts = torch.tensor([sum(batch.labelled for batch in batches), sum(batch.real_tokens for batch in batches)])
    labelled, tokens = world.sum(counts).tolist()
    if labelled == 0:
        raise NibbleError(f"step {step} has no token to learn; such rows should have been skipped. See data.train.")
    balance = model.balance
    counted = balance is not None or (model.usage is not None and model.usage.counting)
    loss, passes = torch.zeros((), device=device), 0
    if balance is not None:
        balance.begin_step()
    for number, batch in enumerate(batches, start=1):
        # Gathering a sharded model is collective, so every process runs every pass.
        if not counted and batch.labelled == 0 and shards.meshes is None:
            continue
        passes += 1
        # One denominator for the whole step, so that every labelled token has the same weight.
        if graph is not None and not counted and (done := graph.run(batch, labelled, first=passes == 1)) is not None:
            loss += done
            continue
        if graph is not None and counted:
            graph.make_room()
        part = batch_loss(model, batch.to(device), denominator=labelled)
        loss += part.detach()
        extra = balance.collect(batch.real_tokens / tokens) if balance is not None else None
        shards.before_pass(last=number == len(batches))
        (part if extra is None else part + extra).backward()
    shards.take_gradients()
    # The step's one wait for the device, when the whole backward pass is queued.
    total = shards.sum_of_parts if shards.meshes is not None else None
    measured = measure_gradients(shards.parameters, world.sum(loss), total=total, replicated=shards.replicated)
    check_loss(measured.loss, step)
    grad_norm = clip_gradients(shards.parameters, max_grad_norm, step, measured=measured)
    optimizer.step()
    if graph is not None and graph.keeps_gradients:
        graph.clear_gradients()
    else:
        optimizer.zero_grad(set_to_none=True)
    return StepResult(measured.loss, grad_norm, tokens, labelled, balance.end_step() if balance is not None else {})


@dataclass
class Loop:
    """The objects of a run's training loop, and the loop: `run`.

    extended_from: as `train.schedule.rate_of` has it. best: with train.keep_best. stopped_early: whether train.patience
    has ended the run.
    """

    settings: TrainConfig
    shards: Shards
    optimizer: Optimizer
    batches: StepBatches
    held_out: EvalBatches | None
    total_steps: int
    device: torch.device
    metrics: MetricsLog | None  # only on the first process
    report: Report
    stop: StopOnSignal
    save: Callable[[], None]  # writes a checkpoint
    last_checkpoint: Callable[[], str]  # a sentence for error messages
    progress: Progress = field(default_factory=Progress)
    world: World = ALONE
    clock: Callable[[], float] = time.monotonic  # seconds, for train.save_minutes
    extended_from: int = 0
    best: BestResult | None = None
    stopped_early: bool = False
    usage_every: int | None = None  # output.expert_usage
    graph: PassGraph | None = None  # train.cuda_graph

    def run(self) -> bool:
        """Train to the last step, or until train.patience ends it, and evaluate; False when stopped by a signal.

        Either way a checkpoint is written.
        """
        progress, saved = self.progress, self.progress.step if self.progress.step else None
        window, saved_at = _Window(), self.clock()
        model = self.shards.model
        model.train()
        model.activation_checkpointing = self.settings.activation_checkpointing
        while progress.step < self.total_steps:
            # Before a step rather than after one, so that a resumed run makes up for an evaluation that was killed.
            if self._evaluation_due():
                self._evaluate()
            if self._stopping():
                break
            self.stopped_early = self._patience_is_over()
            if self.stopped_early:
                break
            rate, late = self._step(window, saved_at)
            self._log(rate, window)
            if late or (self.settings.save_every and progress.step % self.settings.save_every == 0):
                self._save()
                saved, saved_at = progress.step, self.clock()
        if saved != progress.step:
            self._save()
        if progress.step == self.total_steps and not self._stopping():
            self._evaluate()
        self.report.end_progress()
        return self.stopped_early or (progress.step == self.total_steps and not self._stopping())

    def _stopping(self) -> bool:
        """Whether a signal has reached any process; all of them then stop after the same step."""
        return bool(self.world.max(torch.tensor([int(self.stop.requested)])))

    def _step(self, window: _Window, saved_at: float) -> tuple[float, bool]:
        """One step; returns its learning rate, and whether a checkpoint is due by the first process's clock."""
        settings, progress, started = self.settings, self.progress, time.perf_counter()
        rate = rate_of(
            settings.schedule,
            settings.learning_rate,
            progress.step,
            self.total_steps,
            settings.warmup_ratio,
            self.extended_from,
        )
        set_learning_rate(self.optimizer, rate)
        counted = self.usage_every is not None and (progress.step + 1) % self.usage_every == 0
        if counted:
            self._count_usage()
        try:
            result = training_step(
                self.shards,
                self.optimizer,
                next(self.batches),
                step=progress.step + 1,
                max_grad_norm=settings.max_grad_norm,
                device=self.device,
                world=self.world,
                graph=self.graph,
            )
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}\n{self.last_checkpoint()}") from error
        seconds = time.perf_counter() - started
        progress.step += 1
        progress.tokens += result.tokens
        progress.labelled_tokens += result.labelled
        progress.seconds += seconds
        minutes = settings.save_minutes
        late = self.world.first and minutes is not None and self.clock() - saved_at >= 60 * minutes
        # The largest peak of all processes, and the first one's clock.
        peak, late = self.world.max(torch.tensor([peak_memory_bytes(self.device), late])).tolist()
        progress.peak_memory_bytes = max(progress.peak_memory_bytes, peak)
        window.add(result, seconds)
        if counted:
            self._write_usage(TRAINING)
        return rate, bool(late)

    def _count_usage(self) -> None:
        if self.shards.model.usage is not None:
            self.shards.model.usage.start()

    def _write_usage(self, kind: str) -> None:
        """What was counted since `_count_usage`, on all processes."""
        usage = self.shards.model.usage
        found = usage.stop(self.world.sum) if usage is not None else None
        if found is not None and self.metrics is not None:
            self.metrics.write(usage_record(found, kind, self.progress.step))

    def _log(self, rate: float, window: _Window) -> None:
        progress, result = self.progress, window.mean()
        due = progress.step % self.settings.log_every == 0 or progress.step == self.total_steps
        tokens_per_second = window.tokens_per_second
        if due and self.metrics is not None:
            self.metrics.write(
                {
                    "kind": "train",
                    "step": progress.step,
                    "epoch": round(progress.step / self.batches.steps_per_epoch, 6),
                    "loss": result.loss,
                    "grad_norm": result.grad_norm,
                    **result.balance,
                    "learning_rate": rate,
                    "tokens": progress.tokens,
                    "labelled_tokens": progress.labelled_tokens,
                    "tokens_per_second": round(tokens_per_second, 3),
                    "seconds": round(progress.seconds, 3),
                    "peak_memory_bytes": progress.peak_memory_bytes,
                }
            )
        width, left = len(str(self.total_steps)), self.total_steps - progress.step
        time_left = f"  {format_seconds(window.seconds_per_step * left)} left" if left else ""
        memory = format_bytes(progress.peak_memory_bytes, digits=1)
        balance = "".join(f"{name} {value:.3f}  " for name, value in result.balance.items())
        self.report.progress(
            f"step {progress.step:>{width}}/{self.total_steps}  loss {result.loss:.3f}  grad {result.grad_norm:.2f}  "
            f"{balance}lr {rate:.1e}  {tokens_per_second:,.0f} tok/s  {memory}{time_left}",
            keep=due,
        )
        if due:
            window.start_line()

    def _save(self) -> None:
        parameters = self.shards.parameters
        # Parameters may be on the host or on the device.
        norms = [parameter.detach().norm(dtype=torch.float32).to(self.device) for _, parameter in parameters]
        broken = self.world.max((~torch.stack(norms).isfinite()).to("cpu", torch.int64)).tolist()
        if any(broken):
            raise NonFiniteError(
                f"after step {self.progress.step} {parameters[broken.index(1)][0]} is not finite, so that no checkpoint"
                " is written.\nLower train.learning_rate or lengthen train.warmup_ratio.\n" + self.last_checkpoint()
            )
        if self.metrics is not None:
            self.metrics.sync()
        self.save()

    def _evaluation_due(self) -> bool:
        step, every = self.progress.step, self.settings.eval_every
        return step == 0 or (every is not None and step % every == 0)

    def _evaluate(self) -> None:
        step = self.progress.step
        if self.held_out is None or self._evaluated(step):
            return
        self.report.end_progress()
        count, started = len(self.held_out), time.perf_counter()
        self._count_usage()
        if self.graph is not None:
            self.graph.make_room()
        loss = held_out_loss(
            self.shards.model,
            self.held_out,
            self.device,
            stop=lambda: self.stop.requested,
            progress=lambda done: self.report.progress(f"evaluating  {done}/{count} batches", keep=False),
            world=self.world,
        )
        self.shards.reshard()
        if loss is not None:
            seconds = round(time.perf_counter() - started, 3)
            lowest = self.best is not None and self.best.offer(Evaluation(step, loss))
            self._write_usage(HELD_OUT)
            if self.metrics is not None:
                self.metrics.write({"kind": "eval", "step": step, "loss": loss, "seconds": seconds})
            kept = f"; the lowest so far, kept in {self.best.folder}" if self.best is not None and lowest else ""
            self.report.progress(f"held-out loss {loss:.4f} after step {step}{kept}", keep=True)
        self.report.end_progress()

    def _patience_is_over(self) -> bool:
        """Whether train.patience ends the run here, by the evaluations in metrics.jsonl: so it does after a resume."""
        patience = self.settings.patience
        if patience is None:
            return False
        losses = self.metrics.held_out() if self.metrics is not None else []
        count = evaluations_without_improvement(losses, self.settings.patience_delta)
        count = int(self.world.max(torch.tensor([count])).item())
        if count >= patience:
            self.report.note(
                f"stopped early after step {self.progress.step} of {self.total_steps}: "
                f"{counted(count, 'evaluation')} without a lower held-out loss (train.patience: {patience})"
            )
        return count >= patience

    def _evaluated(self, step: int) -> bool:
        """Whether metrics.jsonl, which the first process has, already holds the held-out loss after `step`."""
        known = self.metrics is not None and self.metrics.evaluated(step)
        return bool(self.world.max(torch.tensor([int(known)])))


class _Window:
    """The steps of this session since the last log line, and the times of the last few steps."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=20)
        self.start_line()

    def start_line(self) -> None:
        self._steps: list[StepResult] = []
        self._seconds = 0.0

    def add(self, result: StepResult, seconds: float) -> None:
        self._recent.append(seconds)
        self._steps.append(result)
        self._seconds += seconds

    def mean(self) -> StepResult:
        """loss: mean over all labelled tokens. grad_norm and balance: mean over the steps. Token counts are sums."""
        steps, labelled = self._steps, sum(step.labelled for step in self._steps)
        return StepResult(
            loss=sum(step.loss * step.labelled for step in steps) / labelled,
            grad_norm=fmean(step.grad_norm for step in steps),
            tokens=sum(step.tokens for step in steps),
            labelled=labelled,
            balance={name: fmean(step.balance[name] for step in steps) for name in steps[-1].balance},
        )

    @property
    def tokens_per_second(self) -> float:
        return sum(step.tokens for step in self._steps) / max(self._seconds, 1e-9)

    @property
    def seconds_per_step(self) -> float:
        return sum(self._recent) / len(self._recent)
