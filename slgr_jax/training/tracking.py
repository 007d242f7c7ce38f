"""Experiment trackers beside a run's own log: TensorBoard, Weights & Biases, MLflow (`--track`).

A tracker gets what `log.jsonl` gets, the run's settings once, and the test metrics when the run is
evaluated. Where it keeps them is the tracker's own business (WANDB_MODE, WANDB_PROJECT,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME); project and experiment are called slgr_jax unless
these say otherwise. TensorBoard files are in RUN/tensorboard.

`RUN/tracking.json` holds, by tracker, the id of its run and the last step that it was told. So a
resumed run goes on in the same tracker run without a step told twice, and what a tracker missed is
told when the same command runs again. A tracker that fails is left out, with one warning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from slgr_jax import config
from slgr_jax.config.knobs import flag_name
from slgr_jax.errors import ConfigError, printable
from slgr_jax.files import write_atomically

STATE, TENSORBOARD = "tracking.json", "tensorboard"
PROJECT = "slgr_jax"
LOGGER = logging.getLogger(__name__)
# Seconds that a service may take to answer before it counts as failed.
_PATIENCE = 20


class Tracker(Protocol):
    """One tracker's run."""

    id: str  # by which the tracker finds this run again

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics after `step` steps."""
        ...

    def summarize(self, values: Mapping[str, float]) -> None:
        """Final metrics, which belong to no step."""
        ...

    def close(self, status: str) -> None:
        """End: finished, interrupted or failed."""
        ...


# (run, id of the tracker's run or None) -> a tracker; raises ImportError without its package.
Maker = Callable[[config.RunConfig, str | None], Tracker]


def settings(run: config.RunConfig) -> dict[str, Any]:
    """A run's knobs by flag name, with `data` and `workdir`; tuples as text with commas."""
    values: dict[str, Any] = {"data": run.data, "workdir": run.workdir}
    for name in config.sections():
        section = getattr(run, name)
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            is_tuple = isinstance(value, tuple)
            values[flag_name(field)] = ",".join(map(str, value)) if is_tuple else value
    return values


class _TensorBoard:
    """Event files in RUN/tensorboard; each record is flushed, a kill loses none."""

    def __init__(self, run: config.RunConfig, known: str | None) -> None:
        from tensorboardX import SummaryWriter

        self.id = TENSORBOARD
        # What an earlier run left in the directory is not shown beside a new one.
        purge = {} if known else {"purge_step": 0}
        self._writer = SummaryWriter(os.path.join(run.workdir, TENSORBOARD), **purge)
        if known is None:
            rows = "".join(f"| {name} | {value} |\n" for name, value in settings(run).items())
            self._writer.add_text("settings", f"| knob | value |\n|---|---|\n{rows}", 0)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def summarize(self, values: Mapping[str, float]) -> None:
        self.record(0, values)

    def close(self, status: str) -> None:
        self._writer.close()


class _WandB:
    """A run of Weights & Biases; without a network WANDB_MODE=offline keeps it in RUN/wandb."""

    def __init__(self, run: config.RunConfig, known: str | None) -> None:
        import wandb

        quiet = wandb.Settings(
            console="off", silent=True, init_timeout=_PATIENCE, reinit="create_new"
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=pathlib.Path(run.workdir).name,
            id=known,
            resume="allow",
            dir=run.workdir,
            config=settings(run),
            settings=quiet,
        )
        self.id = self._run.id
        if self._run.url:
            LOGGER.info("wandb: %s", self._run.url)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def summarize(self, values: Mapping[str, float]) -> None:
        self._run.summary.update(dict(values))

    def close(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)


class _MLflow:
    """A run of MLflow, by its client: the fluent API's active run stays the caller's."""

    _STATUS: Mapping[str, str] = {"finished": "FINISHED", "interrupted": "KILLED"}

    def __init__(self, run: config.RunConfig, known: str | None) -> None:
        # Unless told otherwise MLflow tries for minutes to reach a server that is not there.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(_PATIENCE))
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        if known is not None:
            self.id = known
            self._client.update_run(known, status="RUNNING")
            return
        name = pathlib.Path(run.workdir).name
        self.id = self._client.create_run(self._experiment(), run_name=name).info.run_id
        params = [Param(name, str(value)) for name, value in settings(run).items()]
        for start in range(0, len(params), 100):  # as many as one request may carry
            self._client.log_batch(self.id, params=params[start : start + 100])

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        if self._client.get_experiment_by_name(name) is None:
            with contextlib.suppress(MlflowException):  # another run made it at this moment
                self._client.create_experiment(name)
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            raise MlflowException(f"there is no experiment {name}, and none can be made")
        return str(experiment.experiment_id)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_mlflow_name(name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def summarize(self, values: Mapping[str, float]) -> None:
        logged = self._client.get_run(self.id).data.metrics
        new = {k: value for k, value in values.items() if logged.get(_mlflow_name(k)) != value}
        self.record(0, new)

    def close(self, status: str) -> None:
        self._client.set_terminated(self.id, self._STATUS.get(status, "FAILED"))


def _mlflow_name(name: str) -> str:
    """`name` as MLflow takes it: `valid/ndcg@10` is `valid/ndcg_at_10`."""
    return re.sub(r"[^\w\-. /]", "_", name.replace("@", "_at_"))


_MAKERS: Mapping[str, Maker] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}
assert tuple(_MAKERS) == config.TRACKERS


class Trackers:
    """The trackers of one run, none of which can end it.

    Args:
      run: whose `--track` names them; its directory says which tracker runs go on.

    Raises:
      ConfigError: the package of a tracker is not installed.
    """

    def __init__(self, run: config.RunConfig) -> None:
        self._path = pathlib.Path(run.workdir) / STATE
        self._state = _read_state(self._path)
        self._open: dict[str, Tracker] = {}
        for name in run.train.tracker_names:
            with self._tolerated(name):
                try:
                    tracker = _MAKERS[name](run, self._state.get(name, {}).get("id"))
                except ImportError as error:
                    raise ConfigError(
                        f"--track={name} needs the extra: pip install 'slgr_jax[{name}]' ({error})"
                    ) from error
                self._open[name] = tracker
                self._state.setdefault(name, {"step": -1})["id"] = tracker.id
        if self._open:
            self._save()

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """Tell every tracker that has not been told of this step."""
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and name not in ("step", "time")
        }
        for name, tracker in list(self._open.items()):
            if step > self._state[name]["step"]:
                with self._tolerated(name):
                    tracker.record(step, numbers)
                    self._state[name]["step"] = step
                    self._save()

    def summarize(self, values: Mapping[str, float]) -> None:
        """Tell every tracker the final metrics."""
        for name, tracker in list(self._open.items()):
            with self._tolerated(name):
                tracker.summarize(values)

    def close(self, status: str) -> None:
        """End every tracker's run: finished, interrupted or failed."""
        for name, tracker in list(self._open.items()):
            with self._tolerated(name):
                tracker.close(status)

    def _save(self) -> None:
        write_atomically(self._path, json.dumps(self._state, indent=2) + "\n")

    @contextlib.contextmanager
    def _tolerated(self, name: str) -> Iterator[None]:
        """Leave a tracker out from its first failure on, with a warning."""
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:
            self._open.pop(name, None)
            why = " ".join(printable(f"{type(error).__name__}: {error}").split())[:300]
            LOGGER.warning(
                "--track=%s fails and is left out (%s); the run goes on, and the same command "
                "called again tells what was missed",
                name,
                why,
            )


def summarize(run: config.RunConfig, values: Mapping[str, float]) -> None:
    """Tell the trackers of a finished run its final metrics; a missing package is a warning."""
    if not run.train.tracker_names:
        return
    try:
        trackers = Trackers(run)
    except ConfigError as error:
        LOGGER.warning("%s; the test metrics are in metrics.json alone", error)
        return
    trackers.summarize(values)
    trackers.close("finished")


def _read_state(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What tracking.json says; nothing where it is damaged: the trackers begin anew."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return {name: {"id": str(of["id"]), "step": int(of["step"])} for name, of in state.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
