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
from torch import Tensor, nn

from shared.errors import RunError
from train import checkpoint, export
from train.adapter import copy_into
from train.adapter_file import adapter_path, start_from
from train.checkpoint import State
from train.data import ALONE, WEIGHTS, Plan, random_of
from train.group import Group
from train.log import RunLog, cut_events
from train.method import make_trained
from train.model import Model, TextBank, load_model, pick_device
from train.optim import Average, Optimizer, make_optimizer
from train.phases import Due, Phase, make_phases
from train.preview import Previews
from train.run import Run
from train.sample import ensure_texts
from train.stores import Dataset
from train.validate import validate

BACKUP_MINUTES = 10
SKIPS_ALLOWED = 10  # updates with a loss that is not finite, in a row


@dataclass
class Learner:
    """One expert being trained."""

    model: Model
    bank: TextBank
    trained: dict[str, nn.Parameter]
    optimizer: Optimizer
    average: Average | None

    def update_average(self) -> None:
        """Move the averaged weights, when there are any."""
        if self.average is not None:
            self.average.update()

    def tensors(self, expert: str) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps, by file."""
        kept = {f"weights_{expert}": {name: part.detach() for name, part in self.trained.items()}}
        return kept | ({f"average_{expert}": self.average.mean} if self.average else {})


@dataclass
class Task:
    """A run from its newest checkpoint on."""

    run: Run
    data: Dataset
    plan: Plan
    log: RunLog
    done: int = 0  # optimizer updates, of all experts
    skipped: int = 0  # in a row
    stopping: int = 0  # the signal that asked to stop
    group: Group = ALONE
    phases: list[Phase] = field(init=False)

    def __post_init__(self) -> None:
        config = self.run.config
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
        total, stopping = self.group.total(torch.stack([loss.float(), loss.new_tensor(float(self.stopping))])).unbind()
        self.stopping = self.stopping or int(stopping)
        return total

    def ask_to_stop(self, number: int, _: FrameType | None) -> None:
        """First signal: stop after this step, with a checkpoint. The second one ends the process at once."""
        self.stopping = number
        signal.signal(number, signal.SIG_DFL)
        self.log.say("stopping after this step; once more stops at once, and loses what is not saved yet")

    def load(self, phase: Phase) -> Learner:
        """Load an expert, its adapter and optimizer; take their state from the checkpoint when it is of this phase."""
        config = self.run.config
        self.previews.start(phase)
        model = load_model(self.run.spec, phase.expert, config, pick_device())
        seed = int(random_of(config.seed, WEIGHTS, phase.first).integers(2**62))
        texts = [*self.data.texts.values(), *config.sample_prompts]
        bank, trained = make_trained(model, self.run, seed, self.data.reader, texts)
        average = Average(trained, config.ema) if config.ema else None
        learner = Learner(model, bank, trained, make_optimizer(config, trained), average)
        if self.done == phase.first and config.resume_from_adapter:
            start_from(adapter_path(config, phase.expert), trained, config)
        if self.done > phase.first and (saved := checkpoint.latest(self.run.folder)) is not None:
            copy_into(trained, checkpoint.read_tensors(saved, f"weights_{phase.expert}"), str(saved))
            learner.optimizer.load_state_dict(checkpoint.read_optimizer(saved))
            if learner.average is not None:
                learner.average.load(checkpoint.read_tensors(saved, f"average_{phase.expert}"))
        return learner

    def look(self, learner: Learner, phase: Phase, step: int) -> None:
        """Validation and preview."""
        if not self.group.first:
            return
        self.validate(learner, phase, step)
        self.previews.take(learner.bank, phase, step)
        if self.group.world == 1:  # several processes can only stop together, after a step
            self.stop_if_asked()

    def validate(self, learner: Learner, phase: Phase, step: int) -> None:
        """Measure held-out samples, when there are any."""
        if self.data.validation:
            losses = validate(learner.bank, self.data, phase.law, self.run.config)
            self.log.row({"event": "validation", "step": step, "expert": phase.expert, **losses})
            self.log.say(f"step {step} {phase.expert} validation loss {losses['loss']:.4f}")

    def guard(self, numbers: list[float]) -> bool:
        """Whether to skip an update because loss or gradient are not finite; gives up after several in a row."""
        if all(map(math.isfinite, numbers)):
            self.skipped = 0
            return False
        self.skipped += 1
        self.log.say(f"step {self.done + 1}: loss {numbers[0]}, gradient norm {numbers[1]}: update skipped")
        if self.skipped >= SKIPS_ALLOWED:
            saved = checkpoint.latest(self.run.folder)
            raise RunError(
                f"{self.skipped} updates in a row were not finite; the last good checkpoint is "
                f"{saved or 'none'}; lower learning_rate, or train in FLOAT_32"
            )
        return True

    def after_step(self, learner: Learner, phase: Phase) -> None:
        """Everything that is due now; the checkpoint comes last, so that it covers the rest."""
        end = self.done == phase.stop
        if not self.group.first:
            self.stop_if_asked()
            return
        if end or self.check.after(self.done):
            self.validate(learner, phase, self.done)
        if end or self.sample.after(self.done):
            self.previews.take(learner.bank, phase, self.done)
        if end or self.save.after(self.done):
            self.export(learner, phase, end)
        if end or self.stopping or self.backup.after(self.done):
            self.write_checkpoint(learner, phase, must=bool(end or self.stopping))
        self.stop_if_asked()
        self.previews.decode_next()
        self.log.resume_clock()

    def stop_if_asked(self) -> None:
        """End the process the way its signal would have, saying what is saved and how to go on."""
        if self.stopping:
            saved = checkpoint.latest(self.run.folder)
            where = f"saved in {saved}; go on" if saved is not None else "nothing to save yet; start again"
            self.log.say_last(f"stopped after step {self.done}; {where} with: make train RUN={self.run.folder}")
            raise SystemExit(128 + self.stopping)

    def write_checkpoint(self, learner: Learner, phase: Phase, must: bool) -> None:
        """Save; a full disk ends the run only when this checkpoint is its last."""
        state = State(
            step=self.done,
            expert=phase.expert,
            events_bytes=self.log.length(),
            data=self.data.fingerprint,
            skipped_in_a_row=self.skipped,
        )
        tensors, optimizer = learner.tensors(phase.expert), learner.optimizer.state_dict()
        try:
            checkpoint.save(self.run.folder, state, tensors, optimizer, self.run.config.backup_keep)
        except OSError as error:
            if must:
                raise
            saved = checkpoint.latest(self.run.folder)
            why = error.strerror or error
            self.log.say(f"checkpoint of step {self.done} failed ({why}); the last good one is {saved or 'none'}")

    def export(self, learner: Learner, phase: Phase, end: bool) -> None:
        """Write the result in output_model_format, and its average beside it."""
        config, run = self.run.config, self.run
        metadata = export.describe(config, run.spec, phase.expert, self.done - phase.first, self.data.fingerprint)
        name = run.name if end else f"{run.name}-step{self.done:06d}"
        results = {name: {name: part.data for name, part in learner.trained.items()}}
        if learner.average is not None:
            results[f"{name}_ema"] = learner.average.mean
        for stem, tensors in results.items():
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


def restore(run: Run, data: Dataset, group: Group) -> tuple[int, int, list[str]]:
    """(steps done, skips in a row, remarks) of the newest checkpoint; cuts the event log back to it."""
    saved = checkpoint.latest(run.folder)
    state = checkpoint.read_state(saved) if saved is not None else None
    if group.first:
        cut_events(run.folder / "events.jsonl", state.events_bytes if state else 0)
    if state is None:
        return 0, 0, []
    remarks = [f"resuming {run.folder} at step {state.step}"]
    if state.data != data.fingerprint:
        remarks.append("the store changed since then: the order of samples is another one from here on")
    return state.step, state.skipped_in_a_row, remarks
