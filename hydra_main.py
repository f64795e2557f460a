"""The run of main.py, composed by Hydra and, with +slurm=PROFILE, submitted to a cluster.

    python hydra_main.py +recipe=debiformer_small batch_size=128 data_path=./data/in1k +slurm=example slurm.nodes=2
    python hydra_main.py -m lr=1e-4,5e-4 +slurm=local slurm.ngpus=2     one job per point

The options are those of main.py, spelt with underscores: key=value. wait=true waits for the job and returns its status.
"""

from runtime.preemption import PreemptionHandler

if __name__ == "__main__":
    PreemptionHandler().install()  # before imports that take seconds

import io
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, fields, make_dataclass
from hashlib import sha1
from pathlib import Path

import hydra
import submitit
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError

from runtime import submitit_job
from runtime.errors import UsageError, exit_on_error
from runtime.options import SlurmOptions, check_ranges, closest_option, names_of, option
from tasks.options import DEFAULT_RECIPE, Options, options_of_task, task_of, validate

CONFIGS = Path(__file__).parent / "configs"
REQUEUE = str(Path(__file__).parent.resolve() / "slurm" / "requeue.sh")
NOT_IN_NAME = (
    *("data_path", "dist_eval", "dist_url", "output_dir", "log_dir", "resume", "slurm", "wait"),
    *("release_dir", "release_mirror", "release_hub"),
)
LONGEST_NAME = 255
SBATCH_OPTION = re.compile(r"[A-Za-z][A-Za-z0-9_-]*", re.ASCII)
FIGURES = re.compile(r"^(?:Best |Accuracy of the network).*", re.M)


@dataclass
class LaunchOptions:
    """How a run is launched."""

    slurm: SlurmOptions | None = None
    wait: bool = option(False, "wait for the job and return its status")


def run_dir(output_dir: str, overrides: list[str], now: str) -> str:
    """The folder of a run: `output_dir` if it is given, else one named after the command line and the time."""
    return output_dir or sweep_dir("", overrides, now)


def sweep_dir(output_dir: str, overrides: list[str], now: str) -> str:
    """The folder of one of many runs: a folder of its own, in `output_dir` if it is given."""
    return f"{output_dir or 'outputs/cls'}/{run_name(overrides)}/{now}"


def run_name(overrides: list[str]) -> str:
    """KEY.VALUE-KEY.VALUE from Hydra overrides, sorted; different overrides give different names.

    Keys that do not change the outcome are left out. What cannot be part of a folder's name is shortened, with a hash.
    """
    parts = []
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key not in NOT_IN_NAME:
            parts.append(f"{key}.{value}".replace("'", "").replace('"', ""))
    name = "-".join(sorted(parts)) or "default"
    if "/" in name or len(name.encode()) > LONGEST_NAME:
        digest = sha1(name.encode()).hexdigest()[:10]
        plain = name.replace("/", "_").encode()[: LONGEST_NAME - 11].decode(errors="ignore")
        name = f"{plain}-{digest}"
    return name


def check_text(slurm: SlurmOptions) -> None:
    """UsageError for what would be more than one line of the job's script, or no option of sbatch."""
    values = {spec.name: getattr(slurm, spec.name) for spec in fields(slurm) if spec.name != "extra"}
    for name, value in slurm.extra.items():
        if not SBATCH_OPTION.fullmatch(str(name)):
            raise UsageError(f"slurm.extra: {str(name)!r} is no option of sbatch; write it like reservation: week30")
        if not isinstance(value, str | int | float):
            raise UsageError(f"slurm.extra.{name} must be a text, a number or true, not {value}")
        values[f"extra.{name}"] = value
    for name, value in values.items():
        if isinstance(value, str) and not value.isprintable():
            raise UsageError(f"slurm.{name}={value!r} holds a line break or control character; write one plain line")


def check_launch(slurm: SlurmOptions) -> None:
    """UsageError if the job cannot be submitted as asked."""
    check_ranges(slurm, prefix="slurm.")
    check_text(slurm)
    if slurm.ddp_comm_mode == "file" and not slurm.share_root:
        raise UsageError("slurm.ddp_comm_mode=file needs slurm.share_root, a folder that all machines see")
    if slurm.share_root and not Path(slurm.share_root).is_dir():
        raise UsageError(f"slurm.share_root={slurm.share_root} is not a folder; name one that all machines see")
    if slurm.executor == "local" and slurm.nodes > 1:
        raise UsageError("slurm.executor=local knows one machine only: slurm.nodes=1")
    if slurm.executor == "slurm" and shutil.which("sbatch") is None:
        raise UsageError("sbatch is not installed here: submit from a cluster's login node, or use +slurm=local")


def submit(options: Options, slurm: SlurmOptions) -> submitit.Job:
    """Submit the run. UsageError with Slurm's own words if it refuses."""
    # The job starts in the folder it was submitted from, which need not be the project's.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CONFIGS.parent), os.environ.get("PYTHONPATH")]))
    folder = slurm.job_dir or options.output_dir
    if not folder.isprintable():
        raise UsageError(f"the job's script cannot hold the folder {folder!r}; choose another slurm.job_dir")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}; choose another slurm.job_dir") from error
    python = f"{shlex.quote(sys.executable)} -S -u {shlex.quote(submitit_job.__file__)}"
    executor = submitit.AutoExecutor(
        folder,
        cluster=slurm.executor,
        slurm_max_num_timeout=slurm.requeues,
        slurm_python=python,
        local_python=python,
    )
    executor.update_parameters(
        name=slurm.job_name or options.model,
        nodes=slurm.nodes,
        tasks_per_node=slurm.ngpus,
        cpus_per_task=slurm.cpus_per_task,
        gpus_per_node=0 if options.device == "cpu" else slurm.ngpus,
        timeout_min=max(1, round(slurm.timeout * 60)),
    )
    if slurm.executor == "slurm":
        named = {
            "partition": slurm.partition,
            "mem": slurm.mem,
            "account": slurm.account,
            "qos": slurm.qos,
            "constraint": slurm.constraint,
            "exclude": slurm.exclude_node,
            "comment": slurm.comment,
        }
        extra = dict(slurm.extra) | ({"quotatype": slurm.quotatype} if slurm.quotatype else {})
        executor.update_parameters(
            slurm_signal_delay_s=slurm.signal_delay,
            slurm_srun_args=["--kill-on-bad-exit=1"],  # one dead process must not leave the others waiting
            slurm_setup=["trap : USR2"],  # it is meant for the processes that srun starts
            slurm_teardown=["code=$?", f". {shlex.quote(REQUEUE)}", 'requeue_if_stopped "$code"', 'exit "$code"'],
            slurm_additional_parameters={"open-mode": "append", "requeue": True, **extra},
            **{f"slurm_{name}": value for name, value in named.items() if value is not None},
        )
    try:
        with redirect_stderr(io.StringIO()), signals_left_to_job():  # submitit prints what it raises
            return executor.submit(submitit_job.Job(asdict(options), slurm))
    except (FailedSubmissionError, FailedJobError, OSError) as error:
        raise UsageError(refusal(str(error))) from error


def refusal(words: str) -> str:
    """sbatch's complaint as one sentence."""
    if "Unable to contact slurm controller" in words or "Unable to establish controller machine" in words:
        return "Slurm's controller does not answer; see scontrol ping, and submit again when it does"
    lines = (line.removeprefix("sbatch: ").strip() for line in words.splitlines())
    return f"Slurm refused the job: {'; '.join(lines)}"


@contextmanager
def signals_left_to_job() -> Iterator[None]:
    """Processes started inside are born with Ctrl-C and hang-up blocked.

    On this machine, submitit's own process would end its tasks a second after either. They get the signals themselves.
    """
    blocked = {signal.SIGINT, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def wait_for(job: submitit.Job) -> None:
    """Wait for all processes of a job and print its accuracy; ends this one with exit code 1 if it failed."""
    try:
        job.results()
    except UncompletedJobError as error:
        cause = next((line for line in str(error).splitlines() if line.startswith("runtime.errors.UsageError: ")), None)
        if cause is not None:
            raise UsageError(cause) from error
        print(f"hydra_main.py: error: job {job.job_id} failed, see {job.paths.stderr}", file=sys.stderr)
        sys.exit(1)
    print(f"Job {job.job_id} is done")
    accuracies = FIGURES.findall(job.stdout() or "")
    if accuracies:
        print(accuracies[-1])


def launch(config: DictConfig) -> None:
    """Run here, or submit."""
    run_options = options_of_task(config.task)
    unknown = set(config) - set(names_of(run_options, LaunchOptions))
    if unknown:
        raise UsageError(unknown_option(min(unknown), run_options))
    options = OmegaConf.to_object(config)
    slurm, hydra_config = options.slurm, HydraConfig.get()
    run = run_options(**{name: getattr(options, name) for name in names_of(run_options)})
    run.recipe = hydra_config.runtime.choices.get("recipe") or ""
    run.output_dir = str(Path(hydra_config.runtime.output_dir).resolve())
    validate(run)
    if slurm is None:
        import main

        main.run(run)
        return
    if PreemptionHandler.current is not None:
        PreemptionHandler.current.hand_back()  # the job has its own
    check_launch(slurm)
    if slurm.share_root:
        slurm.share_root = str(Path(slurm.share_root).resolve())
    job = submit(run, slurm)
    print(f"Submitted job {job.job_id}")
    print(f"  folder:    {run.output_dir}")
    print(f"  follow it: tail -F {job.paths.stdout}")
    print(f"  stop it:   {'scancel' if slurm.executor == 'slurm' else 'kill'} {job.job_id}", flush=True)
    if options.wait:
        wait_for(job)


def compose_and_launch() -> None:
    """Hydra's main, with its errors turned into UsageError."""
    given = dict(argument.lstrip("+~").partition("=")[::2] for argument in sys.argv[1:])
    run_options = options_of_task(task_of({name: given[name] for name in ("task", "recipe") if given.get(name)}))
    if not given.keys() & {"recipe", "model", "data_path", "data_set", "--help", "-h", "--cfg", "-c", "--info", "-i"}:
        print(f"No data_path, data_set, model or recipe given: using +recipe={DEFAULT_RECIPE}")
        sys.argv.append(f"+recipe={DEFAULT_RECIPE}")
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises instead of printing and exiting with 1
    schema = make_dataclass("Schema", [], bases=(LaunchOptions, run_options))
    ConfigStore.instance().store("options", schema)
    OmegaConf.register_new_resolver("run_dir", run_dir, replace=True)
    OmegaConf.register_new_resolver("sweep_dir", sweep_dir, replace=True)
    launched = False

    def task(config: DictConfig) -> None:
        nonlocal launched
        launched = True
        exit_on_error("hydra_main.py", lambda: launch(config))

    try:
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")(task)()
    except MissingConfigException as error:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        raise UsageError(f"there is no {group} {name!r}; known: {', '.join(error.options or [])}") from error
    except OSError as error:
        if launched:
            raise
        raise UsageError(f"cannot write to {error.filename}: {error.strerror}; choose another output_dir") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(in_one_line(error, run_options)) from error


def in_one_line(error: Exception, run_options: type) -> str:
    """The first lines of an error of Hydra and of its cause; for an unknown option, the closest known one."""
    first, cause = (str(e).splitlines()[0] if e and str(e) else "" for e in (error, error.__cause__))
    unknown = re.search(r"Could not override '([\w.]+)'|Key '(\w+)' (?:is )?not in", f"{first} {cause}")
    if unknown is None:
        return f"{first} ({cause})" if cause else first
    name = unknown[1] or unknown[2]
    if name == "model_kwargs":
        return "write +model_kwargs.NAME=VALUE, one for each argument of the model"
    if name in ("slurm", "recipe") or name.startswith(("slurm.extra.", "model_kwargs.")):
        return f"write a plus before {name}: +{name}=..."
    return unknown_option(name.rpartition(".")[2], run_options)


def unknown_option(name: str, run_options: type) -> str:
    known = names_of(run_options, LaunchOptions, SlurmOptions)
    return f"unknown option {name}; {closest_option(name, known, 'see docs/OPTIONS.md')}"


if __name__ == "__main__":
    exit_on_error("hydra_main.py", compose_and_launch)
