"""Kills trainings again and again, and checks that they end as those that were left alone.

    python tests/kill_often.py 200 --worlds 1,2,3 --results kills.jsonl

Each kill is a SIGKILL of all its processes: while it starts, trains, evaluates or writes a checkpoint. Then the same
training is started again. Some keep their number of processes and must end with the same bits; some go on among another
number each time, with the same total batch, and must end within 1e-6. After each kill the newest checkpoint must be
readable; in the end, every image of every epoch must have been trained on once, in the order of the undisturbed run.

With --results, what is done is kept there, and the same command goes on with the rest.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import CLASSES, write_images  # noqa: E402

import main as program  # noqa: E402
from models.weights import load_checkpoint  # noqa: E402
from runtime.checkpoint import LAST, TEMPORARY, load_latest, position_of  # noqa: E402
from runtime.errors import exit_on_error  # noqa: E402
from runtime.samplers import Key  # noqa: E402
from tasks import loading  # noqa: E402
from tasks.options import parse_args  # noqa: E402

TOTAL_BATCH, EPOCHS, IMAGES_PER_CLASS = 12, 3, 12
PHASES = ("starting", "training", "writing", "training")
TIMEOUT = 3600
COMMON = [
    *("--input_size", "32", "--epochs", str(EPOCHS), "--warmup_epochs", "1", "--model_ema_decay", "0.9"),
    *("--device", "cpu", "--num_workers", "0", "--no_repeated_aug", "--print_freq", "3"),
    *("--checkpoint_minutes", "0.0005", "--save_every", "2", "--keep", "2"),
]
EVERYTHING = [
    *("--model", "debiformer_nano", "--model_kwargs", "embed_dims=16,32,48,64", "depths=1,1,1,1"),
    *("--drop_path", "0.1", "--lr", "1e-2"),
]
"""AdamW, mixing, erasing, stochastic depth and BatchNorm: all that depends on the process that does it."""

ALIKE_ANYWHERE = [
    *("--model", "vit_tiny_patch16_224", "--model_kwargs", "embed_dim=32", "depth=2", "num_heads=2", "patch_size=8"),
    *("--drop_path", "0", "--mixup", "0", "--cutmix", "0", "--reprob", "0", "--opt", "sgd", "--lr", "1e-1"),
]
"""Nothing that depends on the number of processes but the order of sums."""


class Recorded(loading.Transformed):
    """Notes each training image as "epoch position index" when it is read."""

    images: int

    def __getitem__(self, key: Key) -> tuple:
        if len(self.source) == len(CLASSES) * IMAGES_PER_CLASS:
            os.write(self.images, f"{key.epoch} {key.position} {key.index}\n".encode())
        return super().__getitem__(key)


@dataclass
class Kind:
    """Trainings that must end alike. worlds: the numbers of processes that they may have."""

    name: str
    worlds: list[int]
    argv: list[str]
    tolerance: float = 0.0
    whole: Path = field(init=False)  # the undisturbed one
    seconds: tuple[float, float] = (0.0, 0.0)  # until its first image, and in all


def kinds_of(worlds: list[int]) -> list[Kind]:
    same = [Kind(f"{world} process(es) throughout", [world], EVERYTHING) for world in worlds]
    if len(worlds) == 1:
        return same
    return [*same, Kind(f"{', '.join(map(str, worlds))} processes in turn", worlds, ALIKE_ANYWHERE, tolerance=1e-6)]


class Launch:
    """The processes of one start of a training, forked from this one, which has imported everything already."""

    def __init__(self, kind: Kind, root: Path, folder: Path, world: int, number: int) -> None:
        self.images, self.log = root / f"images.{number}", root / f"log.{number}"
        self.images.touch()
        self.began = time.monotonic()
        meet = f"file://{root}/meet.{number}"
        batch = TOTAL_BATCH // world
        argv = [*COMMON, *kind.argv, "--batch_size", batch, "--output_dir", folder, "--dist_url", meet]
        argv = list(map(str, [*argv, "--data_path", root.parent / "data"]))
        sys.stdout.flush()
        sys.stderr.flush()
        self.ranks = [self._fork(rank, world, argv) for rank in range(world)]
        self.codes: dict[int, int] = {}

    def _fork(self, rank: int, world: int, argv: list[str]) -> int:
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            os.setsid()
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            Recorded.images = os.open(self.images, os.O_WRONLY | os.O_APPEND)
            loading.Transformed = Recorded
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
            exit_on_error("main.py", lambda: program.run(parse_args(argv)))
            self.log.with_name("modules").write_text("\n".join(sys.modules))
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def running(self) -> bool:
        for rank in self.ranks:
            if rank not in self.codes:
                ended, status = os.waitpid(rank, os.WNOHANG)
                if ended:
                    self.codes[rank] = status
        if any(self.codes.values()):
            self.kill(random.Random())
            raise RuntimeError(f"a process failed:\n{self.log.read_text()}")
        if time.monotonic() - self.began > TIMEOUT:
            self.kill(random.Random())
            raise RuntimeError(f"no end after {TIMEOUT} s:\n{self.log.read_text()}")
        return len(self.codes) < len(self.ranks)

    def kill(self, chance: random.Random) -> None:
        """SIGKILL to all, at once or to one of them first, and wait for their end."""
        left = [rank for rank in self.ranks if rank not in self.codes]
        chance.shuffle(left)
        for number, rank in enumerate(left):
            os.kill(rank, signal.SIGKILL)
            if number == 0 and chance.random() < 0.5:
                time.sleep(chance.uniform(0, 0.3))
        for rank in left:
            os.waitpid(rank, 0)

    def has_begun(self) -> bool:
        return self.images.stat().st_size > 0


def images_read(file: Path) -> Iterator[tuple[tuple[int, int], int]]:
    """((epoch, position), index) of the images that the processes of a start have read."""
    for line in file.read_text().splitlines():
        epoch, position, index = map(int, line.split())
        yield (epoch, position), index


def is_writing(folder: Path) -> bool:
    return folder.is_dir() and any(name.endswith(TEMPORARY) for name in os.listdir(folder))


def train(kind: Kind, root: Path) -> Launch:
    """One training, undisturbed. RuntimeError with its output if it fails."""
    root.mkdir(parents=True)
    launch, first = Launch(kind, root, root / "run", kind.worlds[0], 0), None
    while launch.running():
        if first is None and launch.has_begun():
            first = time.monotonic() - launch.began
        time.sleep(0.01)
    check_finished(launch, root / "run")
    kind.whole, kind.seconds = root, (first, time.monotonic() - launch.began)
    return launch


def import_again(modules: Path) -> None:
    """Import what a training has imported, so that those forked from here need no more time for it."""
    for name in modules.read_text().splitlines():
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def check_finished(launch: Launch, folder: Path) -> None:
    if not (folder / LAST).exists() or load_checkpoint(folder / LAST)["epoch"] != EPOCHS or is_writing(folder):
        raise RuntimeError(f"the training failed:\n{launch.log.read_text()}")


def newest(folder: Path) -> tuple[int, int]:
    """The place of the newest checkpoint, which must be readable, without falling back to an older one."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        found = load_latest(folder)
    if said.getvalue():
        raise RuntimeError(f"the newest checkpoint could not be read: {said.getvalue()}")
    return position_of(found[0])[:2] if found else (0, 0)


def wait_to_kill(kind: Kind, launch: Launch, folder: Path, phase: str, chance: random.Random) -> bool:
    """Wait for a random moment. False if the training ended before."""
    start, whole = kind.seconds
    if phase == "starting":
        moment = launch.began + chance.uniform(0, start)
    else:
        while not launch.has_begun():
            if not launch.running():
                return False
            time.sleep(0.005)
        moment = time.monotonic() + chance.uniform(0, (whole - start) / 6)
    while time.monotonic() < moment:
        if not launch.running():
            return False
        time.sleep(0.002)
    if phase == "writing":
        while not is_writing(folder):
            if not launch.running():
                return False
            time.sleep(0.0003)
        time.sleep(chance.uniform(0, 0.01))
    return launch.running()


def train_with_kills(kind: Kind, root: Path, most: int, seed: int) -> list[dict]:
    """One training, killed up to `most` times and brought to its end. Returns what is known of each kill."""
    root.mkdir(parents=True)
    chance, folder, kills, places, launches = random.Random(seed), root / "run", [], [(0, 0)], []
    while True:
        world = chance.choice(kind.worlds)
        launch = Launch(kind, root, folder, world, len(launches))
        launches.append(launch)
        if len(kills) == most or not wait_to_kill(kind, launch, folder, chance.choice(PHASES), chance):
            while launch.running():
                time.sleep(0.02)
            check_finished(launch, folder)
            break
        launch.kill(chance)
        place = newest(folder)
        if place < places[-1]:
            raise RuntimeError(f"the newest checkpoint went back from {places[-1]} to {place}")
        phase = "writing" if is_writing(folder) else "training" if launch.has_begun() else "starting"
        kills.append({"phase": phase, "processes": world, "place": place})
        places.append(place)
    trained = []
    for launch, begin, end in zip(launches, places, [*places[1:], (EPOCHS, 0)], strict=True):
        trained += [image for image in images_read(launch.images) if begin <= image[0] < end]
    if sorted(trained) != sorted(images_read(kind.whole / "images.0")):
        raise RuntimeError(f"other images were trained on than in the undisturbed run, see {root}")
    return kills


def difference(one: Path, two: Path) -> float:
    """The largest difference of two runs' weights and averages; 0 if they are identical to the bit."""
    first, second = load_checkpoint(one / LAST), load_checkpoint(two / LAST)
    return max(
        0.0 if torch.equal(value, second[key][name]) else (value - second[key][name]).abs().max().item()
        for key in ("model", "model_ema")
        for name, value in first[key].items()
    )


def same_weights(one: Path, two: Path) -> bool:
    return difference(one, two) == 0.0


def work(kinds: list[Kind], root: Path, results: Path, job: int, kills: int, seed: int) -> None:
    """Kill so often, over trainings of all kinds in turn. A line of results for each training."""
    done, number = 0, 0
    while done < kills:
        kind = kinds[(job + number) % len(kinds)]
        folder = root / f"job{job}.{number}"
        found = train_with_kills(kind, folder, min(12, kills - done), seed=hash((seed, job, number)))
        differ = difference(kind.whole / "run", folder / "run")
        if differ > kind.tolerance:
            raise RuntimeError(f"the weights differ by {differ}, see {folder}")
        with open(results, "a") as file:
            file.write(json.dumps({"kind": kind.name, "kills": found, "difference": differ}) + "\n")
        done, number = done + len(found), number + 1


def summary(lines: list[dict]) -> str:
    """A table of what was done, for each kind of training."""
    rows = ["| processes | trainings | kills | starting | training, evaluating | writing a checkpoint | weights |"]
    rows.append("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for name in sorted({line["kind"] for line in lines}):
        mine = [line for line in lines if line["kind"] == name]
        phases = Counter(kill["phase"] for line in mine for kill in line["kills"])
        worst = max(line["difference"] for line in mine)
        counts = f"{len(mine)} | {phases.total()} | {phases['starting']} | {phases['training']} | {phases['writing']}"
        rows.append(f"| {name} | {counts} | {'identical' if worst == 0 else f'within {worst:.1e}'} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=50)
    parser.add_argument("--worlds", default="1", help="numbers of processes, such as 1,2,3 (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="file that keeps what is done")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for number, shade in enumerate(CLASSES):
            write_images(root / "data" / "train" / shade, IMAGES_PER_CLASS, 45 * number, seed=number)
            write_images(root / "data" / "val" / shade, 5, 45 * number, seed=100 + number)
        results = args.results or root / "results.jsonl"
        results.touch()
        earlier = [json.loads(line) for line in results.read_text().splitlines()]
        left = args.kills - sum(len(line["kills"]) for line in earlier)
        kinds = kinds_of(list(map(int, args.worlds.split(","))))
        train(kinds[0], root / "first")
        import_again(root / "first" / "modules")
        for number, kind in enumerate(kinds):
            train(kind, root / f"whole{number}")
        jobs = []
        for job in range(args.jobs if left > 0 else 0):
            share = left // args.jobs + (job < left % args.jobs)
            jobs.append(os.fork())
            if not jobs[-1]:
                code = 1
                try:
                    work(kinds, root, results, job, share, args.seed + len(earlier))
                    code = 0
                except Exception:
                    traceback.print_exc()
                finally:
                    os._exit(code)
        failed = [job for job in jobs if os.waitpid(job, 0)[1]]
        lines = [json.loads(line) for line in results.read_text().splitlines()]
    print(summary(lines))
    kills = sum(len(line["kills"]) for line in lines)
    print(f"{kills} kills; {'FAILED' if failed else 'every training ended as it should'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
