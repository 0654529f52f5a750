"""A run in progress: what is loaded, what is due after a step, how it stops. The loop itself is in loop.py."""

import math
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from shared.errors import RunError
from train import checkpoint, export
from train.checkpoint import State
from train.data import Plan
from train.group import ALONE, Group
from train.learner import Learner, Loader, load_learner
from train.log import RunLog, cut_events
from train.model import load_model
from train.phases import Due, Phase, make_phases
from train.preview import Previews
from train.reading import Reading
from train.run import Run
from train.sample import ensure_texts
from train.scale import LossScale
from train.stores import Dataset
from train.validate import validate

BACKUP_MINUTES = 10
SKIPS_ALLOWED = 10  # updates with a loss that is not finite, in a row


@dataclass
class Task:
    """A run from its newest checkpoint on."""

    run: Run
    data: Dataset
    plan: Plan
    log: RunLog
    state: State | None = None  # where it goes on
    group: Group = ALONE
    loader: Loader = load_model
    stopping: int = 0  # the signal that asked to stop
    unsettled: Reading | None = None  # the last step, while its numbers are on their way
    phases: list[Phase] = field(init=False)

    def __post_init__(self) -> None:
        config, state = self.run.config, self.state
        self.done = state.step if state else 0  # optimizer updates, of all experts
        self.skipped, self.skipped_in_a_row = (state.skipped, state.skipped_in_a_row) if state else (0, 0)
        self.phases = make_phases(config, self.run.spec, self.plan.total_steps())
        if texts := list(self.data.texts.values()):  # one process, and before the DiT takes the memory
            self.group.agree(lambda: len(ensure_texts([*texts, *config.sample_prompts], self.run).texts))
        self.previews = Previews(self.run, self.log, self.group)
        minutes = config.backup_after is None
        self.backup = Due(
            BACKUP_MINUTES if minutes else config.backup_after,
            "MINUTE" if minutes else config.backup_after_unit,
            self.plan,
        )
        self.sample = Due(config.sample_after, config.sample_after_unit, self.plan)
        self.save = Due(config.save_after, config.save_after_unit, self.plan)
        self.check = Due(config.validate_after, "STEP", self.plan)

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM stop after the current step, with a checkpoint."""
        before = {number: signal.signal(number, self.ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agree(self, loss: Tensor) -> Tensor:
        """The loss of the global batch; and if one process was asked to stop, all stop."""
        if self.group.world == 1:
            return loss
        total, stopping = self.group.total(torch.stack([loss, loss.new_tensor(float(self.stopping))])).unbind()
        self.stopping = self.stopping or int(stopping)
        return total

    def ask_to_stop(self, number: int, _: FrameType | None) -> None:
        """First signal: stop after this step, with a checkpoint. The second one ends the process at once."""
        self.stopping = number
        signal.signal(number, signal.SIG_DFL)
        self.log.say("stopping after this step; Ctrl-C again stops at once, and loses what is not saved yet")

    def load(self, phase: Phase) -> Learner:
        """Load an expert as its phase, or its newest checkpoint, wants it."""
        self.previews.start(phase)
        return load_learner(self.run, self.data, phase, self.done, self.group, self.loader)

    @property
    def joins(self) -> bool:
        """Whether this process takes part in what is not a step: the first does, and all that hold divided weights."""
        return self.group.first or self.group.divides(self.run.config)

    def look(self, learner: Learner, phase: Phase, step: int) -> None:
        """Validation and preview."""
        if self.joins:
            with learner.evaluated():
                self.validate(learner, phase, step)
                self.previews.take(learner.bank, phase, step)
        if self.group.world == 1:  # several processes can only stop together, after a step
            self.stop_if_asked()

    def validate(self, learner: Learner, phase: Phase, step: int) -> None:
        """Measure held-out samples, when there are any."""
        if self.data.validation:
            self.log.doing("validation")
            losses = validate(learner.bank, self.data, phase.law, self.run.config)
            self.log.doing("")
            self.log.row({"event": "validation", "step": step, "expert": phase.expert, **losses})
            self.log.say(f"step {step} {phase.expert} validation loss {losses['loss']:.4f}")

    def keep(self, reading: Reading) -> None:
        """Log the step before this one, and this one too unless its numbers are still on their way."""
        self.settle()
        reading.end()
        self.unsettled = reading
        if reading.skipped is not None:
            self.settle()

    def settle(self) -> None:
        """Read and log the numbers that were not waited for."""
        if (reading := self.unsettled) is None:
            return
        self.unsettled = None
        numbers, skipped = reading.numbers.tolist(), reading.skipped
        if skipped is None:
            skipped = self.guard(reading.row["step"], numbers, None)
        loss, norm = (None, None) if skipped else numbers
        row = reading.row | {"loss": loss, "grad_norm": norm}
        self.log.step(row, reading.samples, reading.seconds, reading.waited)

    def guard(self, step: int, numbers: list[float], scale: LossScale | None) -> bool:
        """Whether to skip an update because loss or gradient are not finite; gives up after several in a row.

        Gradients that overflow at a loss scale that can go down are the scale's fault, and not counted in the row.
        """
        loss, norm = numbers
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped_in_a_row = 0
            if scale is not None:
                scale.after(overflowed=False)
            return False
        self.skipped += 1
        message = f"step {step}: loss {loss}, gradient norm {norm}: update skipped"
        if scale is not None and math.isfinite(loss) and not scale.at_floor:
            scale.after(overflowed=True)
            self.log.say(f"{message}, the loss scale is {scale.value:g} now")
            return True
        self.log.say(message)
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= SKIPS_ALLOWED:
            saved = checkpoint.latest(self.run.folder)
            raise RunError(
                f"{self.skipped_in_a_row} updates in a row were not finite; the last good checkpoint is "
                f"{saved or 'none'}; lower learning_rate, or train in FLOAT_32"
            )
        return True

    def due(self, end: bool) -> list[bool]:
        """Whether validation, preview, result and checkpoint are due after this step; the first process decides."""

        def decide() -> list[bool]:
            return [end or each.after(self.done) for each in (self.check, self.sample, self.save, self.backup)]

        return self.group.agree(decide) if self.group.divides(self.run.config) else decide()

    def after_step(self, learner: Learner, phase: Phase) -> None:
        """Everything that is due now; the checkpoint comes last, so that it covers the rest."""
        end = self.done == phase.stop
        check, sample, save, backup = self.due(end) if self.joins else [end] * 4
        if any((check, sample, save, backup, self.stopping)):
            self.settle()
        if self.joins:
            if check or sample:
                with learner.evaluated():
                    if check:
                        self.validate(learner, phase, self.done)
                    if sample:
                        self.previews.take(learner.bank, phase, self.done)
            if save:
                self.export(learner, phase, end)
            if backup or self.stopping:
                self.write_checkpoint(learner, phase, must=bool(end or self.stopping))
        self.stop_if_asked()
        self.previews.decode_next()

    def stop_if_asked(self) -> None:
        """End the process the way its signal would have, saying what is saved and how to go on."""
        if self.stopping:
            saved = checkpoint.latest(self.run.folder)
            where = f"saved in {saved}; go on" if saved is not None else "nothing to save yet; start again"
            self.log.say_last(f"stopped after step {self.done}; {where} with: make train RUN={self.run.folder}")
            raise SystemExit(128 + self.stopping)

    def write_checkpoint(self, learner: Learner, phase: Phase, must: bool) -> None:
        """Save; a full disk ends the run only when this checkpoint is its last."""
        scale = learner.scale or LossScale()
        state = State(
            step=self.done,
            expert=phase.expert,
            events_bytes=self.log.length(),
            data=self.data.fingerprint,
            skipped_in_a_row=self.skipped_in_a_row,
            skipped=self.skipped,
            processes=self.group.world,
            loss_scale=scale.value,
            steps_at_scale=scale.good,
        )
        tensors, optimizer = learner.tensors(phase.expert), learner.optimizer.state_dict()
        writers = self.group if learner.divided else ALONE
        try:
            checkpoint.save(self.run.folder, state, tensors, optimizer, self.run.config.backup_keep, writers)
        except OSError as error:
            if must:
                raise
            saved = checkpoint.latest(self.run.folder)
            why = error.strerror or error
            self.log.say(f"checkpoint of step {self.done} failed ({why}); the last good one is {saved or 'none'}")

    def export(self, learner: Learner, phase: Phase, end: bool) -> None:
        """Write the result in output_model_format, and its average beside it."""
        config, run = self.run.config, self.run
        kept = learner.tensors(phase.expert)
        if not self.group.first:
            return
        metadata = export.describe(config, run.spec, phase.expert, self.done - phase.first, self.data.fingerprint)
        name = run.name if end else f"{run.name}-step{self.done:06d}"
        for kind, stem in (("weights", name), ("average", f"{name}_ema")):
            if (tensors := kept.get(f"{kind}_{phase.expert}")) is None:
                continue
            what = run, phase.expert, config.output_model_format
            for path in export.write_result(run.folder, stem, what, tensors, metadata):
                if end and config.output_model_destination is not None:
                    copy_result(path, Path(config.output_model_destination))
                self.log.say(f"wrote {path}")

    def finish(self) -> None:
        """After the last step of the last expert."""
        self.group.wait()
        if not self.group.first:
            return
        self.previews.finish()
        (self.run.folder / "done").touch()


def copy_result(path: Path, destination: Path) -> None:
    """Copy a result, a file or a folder, into a folder."""
    destination.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, destination / path.name, dirs_exist_ok=True)
    else:
        shutil.copyfile(path, destination / path.name)


def restore(run: Run, data: Dataset, group: Group) -> tuple[State | None, list[str]]:
    """(state of the newest checkpoint, remarks); cuts the event log back to it.

    Raises RunError when another number of processes trained it: the global batch, and so the order, would change.
    """
    saved = checkpoint.latest(run.folder)
    state = checkpoint.read_state(saved) if saved is not None else None
    if state is not None and state.processes != group.world:
        raise RunError(
            f"{run.folder} was trained by {count_processes(state.processes)}, this is {group.world}; go on with as "
            "many (torchrun --nproc_per_node), or start another with RUN=new_folder"
        )
    if group.first:
        cut_events(run.folder / "events.jsonl", state.events_bytes if state else 0)
    if state is None:
        return None, []
    remarks = [f"resuming {run.folder} at step {state.step}"]
    if state.data != data.fingerprint:
        remarks.append("the store changed since then: the order of samples is another one from here on")
    return state, remarks


def count_processes(count: int) -> str:
    """'1 process', '2 processes'."""
    return f"{count} process{'' if count == 1 else 'es'}"
