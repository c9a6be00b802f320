"""`hydra/launcher=processes`. Hydra takes launchers from the package `hydra_plugins` alone and
imports all that is there whenever it starts, so that the work is in `specdec/lab/launcher.py`."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class _OurLauncher(Launcher):
    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """The task is that of `specdec.run`, which jobs find themselves."""
        self.loader, self.config = hydra_context.config_loader, config


class ProcessLauncher(_OurLauncher):
    """Each job in a Python process of its own; settings as in
    `configs/hydra/launcher/processes.yaml`."""

    def __init__(self, **settings: Any) -> None:
        self.settings = {
            name: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for name, value in settings.items()
        }

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from specdec.lab.launcher import Task, launch

        setup_globals()
        tasks = []
        for number, words in enumerate(job_overrides, initial_job_idx):
            job = self.loader.load_sweep_config(self.config, list(words))
            device, gpus = str(job.device), job.target.get("tp", 1)
            tasks.append(Task(number=number, words=list(words), device=device, gpus=gpus))
        folder = Path(self.config.hydra.sweep.dir).absolute()
        values = launch(tasks, folder, self.config.hydra.overrides.hydra, self.settings)
        return [
            JobReturn(overrides=task.words, status=JobStatus.COMPLETED, _return_value=value)
            for task, value in zip(tasks, values, strict=True)
        ]


class TurnsLauncher(_OurLauncher):
    """All jobs in this process, prompt by prompt (`specdec/lab/turns.py`)."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from specdec.lab.settings import settings_in
        from specdec.lab.turns import launch

        setup_globals()

        def composed(words: list[str]) -> DictConfig:
            return self.loader.load_sweep_config(self.config, words)

        jobs = dict(enumerate(map(list, job_overrides), initial_job_idx))
        folder = Path(self.config.hydra.sweep.dir).absolute()
        values = launch(jobs, partial(settings_in, composed), folder)
        return [
            JobReturn(overrides=words, status=JobStatus.COMPLETED, _return_value=values[number])
            for number, words in jobs.items()
        ]
