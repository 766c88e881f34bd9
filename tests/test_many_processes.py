"""
Jobs of two processes: they compute what one does, and none waits for one that is gone.

Most are forked, see `forked`, with what the launchers tell them: as --num-gpus starts them
("spawn"), or with the variables of torchrun. Where the launcher itself matters, it is the real one.
"""

import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from pathlib import Path

import pytest
import torch

import draw
from msrcnn_d2.engine import build_recipe, evaluate_checkpoint
from msrcnn_d2_cli import build_parser
from msrcnn_d2_cli.train import read_config
from tests.helpers import forked, many_processes, simulated_nccl
from tests.helpers.many_processes import CASES, MAX_ITER
from tests.helpers.toy_training import NUM_IMAGES, run, with_python_path

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "projects" / "shapes"
SPAWN = ["--num-gpus", "2", "--dist-url", "auto"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# What the first process does, by the launcher
FORKED = {
    "own": [forked.train],  # options say how many
    "spawn": [forked.train, *SPAWN],
    "torchrun": [forked.as_torchrun, forked.train],
}
MARK = "MSRCNN_D2_TEST_JOB"  # in the environment of a job, to find its processes
SECONDS = 300  # for a job on a busy machine; one that waits for a dead process takes half an hour
FILES = ("instances", "bbox", "segm")


pytestmark = pytest.mark.usefixtures("leave_no_traces")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Of train_net.py: a config and a dataset."""
    return many_processes.write_dataset_and_config(tmp_path_factory.mktemp("many"))


# ---- jobs


class Job:
    """Several processes, of a session of their own, with their output in a file."""

    def __init__(self, log: Path, function, *args):
        """
        Args:
            function: what the process that starts the others does.
        """
        self.log = log
        self.log.touch()
        self.process = forked.start(function, *args, log=log)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def exit_code(self) -> int | None:
        """None while the first process lives; negative if a signal has ended it."""
        return self.process.exitcode

    def wait(self, seconds: float = SECONDS) -> int:
        """For the exit code."""
        end = time.monotonic() + seconds
        while self.exit_code is None:
            assert time.monotonic() < end, self.output[-4000:]
            time.sleep(0.02)
        return self.exit_code

    def wait_for(self, path: Path) -> None:
        end = time.monotonic() + SECONDS
        while not path.exists():
            assert self.exit_code is None, self.output[-4000:]
            assert time.monotonic() < end, self.output[-4000:]
            time.sleep(0.05)

    @property
    def output(self) -> str:
        return self.log.read_text()

    def pids(self) -> list[int]:
        """Of all its processes that live, by their start."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended since
                if self._has(int(folder.name)):
                    found.append(int(folder.name))
        return sorted(found, key=_start_time)

    def _has(self, pid: int) -> bool:
        state, _, _, session, *_ = _stat(pid)
        return int(session) == self.pid and state != "Z"

    def rank(self, local_rank: int) -> int:
        """The process id of a rank."""
        ranks = [pid for pid in self.pids() if _is_rank(pid, self.pid)]
        return ranks[local_rank]

    def end(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()


class RealJob(Job):
    """A command in a Python of its own."""

    def __init__(self, log: Path, *command):
        self.mark = uuid.uuid4().hex
        self.log = log
        environment = {
            **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
            "PYTHONPATH": with_python_path(ROOT),
            "OMP_NUM_THREADS": "1",
            MARK: self.mark,
        }
        with open(log, "w") as f:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", *map(str, command)],
                cwd=ROOT,
                env=environment,
                stdout=f,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def exit_code(self) -> int | None:
        return self.process.poll()

    def _has(self, pid: int) -> bool:
        """torchrun's processes are not of its session."""
        return f"{MARK}={self.mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes()


def _start_time(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(_stat(pid)[19])
    return 0


def _is_rank(pid: int, parent: int) -> bool:
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    return int(_stat(pid)[1]) == parent and b"resource_tracker" not in command


def _stat(pid: int) -> list[str]:
    """What /proc tells after the name of the program, which may contain blanks: state, parent..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


@pytest.fixture
def start(tmp_path):
    """Start a job that trains; what is left of it when the test ends is killed."""
    jobs = []

    def start_job(launcher, *options):
        """
        Args:
            launcher: a key of `FORKED`, or "real torchrun".
        """
        log = tmp_path / f"job_{len(jobs)}.txt"
        if launcher == "real torchrun":
            jobs.append(RealJob(log, *TORCHRUN, ROOT / "train_net.py", *options))
        else:
            jobs.append(Job(log, *FORKED[launcher], *options))
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.end()


def finished(folder, function, *args) -> Job:
    """A job that is to end well."""
    job = Job(folder / "job.txt", function, *args)
    try:
        assert job.wait() == 0, job.output[-4000:]
    finally:
        job.end()
    return job


def assert_ends(job: Job) -> None:
    """Wait for the end of a job that is to fail, with all of its processes."""
    assert job.wait() not in (0, -signal.SIGKILL)
    time.sleep(0.5)
    assert not job.pids()


# ---- what two processes compute


def kept_by_both(folder: Path, *job):
    """The folder, and what the two processes of a job have kept there."""
    finished(folder, *job)
    return folder, *(torch.load(folder / f"rank_{k}.pth", weights_only=False) for k in (0, 1))


@pytest.fixture(scope="module")
def spawn(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spawn")
    return kept_by_both(folder, many_processes.run_both, folder, options)


@pytest.fixture(scope="module")
def torchrun(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun")
    return kept_by_both(folder, forked.as_torchrun, many_processes.run_both, folder, options)


@pytest.fixture(scope="module", params=["spawn", "torchrun"])
def both(request):
    return request.getfixturevalue(request.param)


def test_gradients_are_the_mean_of_those_of_single_images(both):
    """Exact for any number of samples: each process normalises its losses by its own."""
    _, *kept = both
    model = many_processes.build_model("objects")
    images = many_processes.images_of("objects")
    single = [many_processes.step(model, [x], seed=k) for k, x in enumerate(images)]
    for rank in (0, 1):
        found = kept[rank]["steps"]["objects"][0]
        assert found["losses"] == pytest.approx(single[rank]["losses"], rel=1e-6)
        mean = {n: (g + single[1]["gradients"][n]) / 2 for n, g in single[0]["gradients"].items()}
        assert_close(found["gradients"], mean, tolerance=1e-6)
        assert all(g.abs().max() > 0 for g in found["gradients"].values())


def test_gradients_are_those_of_a_batch_of_both_images_if_their_samples_are_as_many(both):
    _, *kept = both
    model = many_processes.build_model("all samples")
    batch = many_processes.step(model, many_processes.images_of("all samples"), seed=0)
    for rank in (0, 1):
        found = kept[rank]["steps"]["all samples"][0]
        assert found["foreground"] == batch["foreground"] == 2  # the latter is a mean
        assert_close(found["gradients"], batch["gradients"], tolerance=2e-5)
    mask_iou = [g for n, g in batch["gradients"].items() if "mask_iou_head" in n]
    assert len(mask_iou) == 10 and all(g.abs().max() > 0 for g in mask_iou)


def test_steps_in_parts_are_those_of_one_process_with_all_images(both):
    _, *kept = both
    first, second = many_processes.images_of("all samples")
    images = [first, second, second, second]
    model = many_processes.build_model("all samples")
    whole = many_processes.step(model, images, seed=0)["gradients"]
    for rank in (0, 1):
        found = kept[rank]["parts"]
        assert_close(found["gradients"], whole, tolerance=2e-5)
        assert len(found["exchanges"]) == len(set(found["exchanges"]))  # only for the last part


def assert_close(found: dict, expected: dict, tolerance: float):
    """Up to a share of the largest gradient of each parameter."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-12)
        assert error <= tolerance, name


@pytest.mark.parametrize("case", CASES)
def test_a_process_without_foreground_takes_part_in_each_step(case, both):
    _, *kept = both
    first, second = (x["steps"][case] for x in kept)
    assert (first[0]["foreground"] > 0) == (case != "neither has objects")
    assert (second[0]["foreground"] > 0) == (case in ("objects", "all samples"))
    for k in (0, 1):
        for losses in (first[k]["losses"], second[k]["losses"]):
            assert "loss_mask_iou" in losses and all(map(math.isfinite, losses.values()))
        if second[k]["foreground"] == 0:
            assert second[k]["losses"]["loss_mask_iou"] == second[k]["losses"]["loss_mask"] == 0
        for name, gradient in first[k]["gradients"].items():
            assert torch.equal(gradient, second[k]["gradients"][name]), name
            if "mask_iou_head" in name:
                assert (gradient.abs().max() > 0) == (case != "neither has objects"), name


def test_all_processes_end_with_the_same_weights(both):
    first, second = (x["run"] for x in both[1:])
    assert different(first["first"], second["first"])  # as they were built
    assert different(first["first"], first["last"])
    assert not different(first["last"], second["last"])


def different(one: dict, other: dict) -> bool:
    assert one.keys() == other.keys()
    return any(not torch.equal(x, other[name]) for name, x in one.items())


def test_the_evaluation_in_training_is_that_of_one_process(both, options):
    """All results, and the files, bit for bit: nine images are five and four."""
    folder, first, second = both
    again = folder / "again"
    weights = f"train.init_checkpoint={folder / 'model_final.pth'}"
    args = build_parser("train").parse(
        [*options, "--eval-only", weights, f"train.output_dir={again}"]
    )
    results = evaluate_here(args)
    assert len(results["segm"]) > 5
    texts = [json.dumps(x, sort_keys=True) for x in (first["run"]["results"], results)]
    assert texts[0] == texts[1]  # NaN is NaN
    assert second["run"]["results"] == {}
    assert_same_files(folder, again)


def evaluate_here(args) -> dict:
    return evaluate_checkpoint(build_recipe(read_config(args)))


def assert_same_files(one: Path, other: Path):
    for name in FILES:
        texts = [(x / "inference" / f"coco_{name}_results.json").read_text() for x in (one, other)]
        assert json.loads(texts[0]) and texts[0] == texts[1]


def logged(output_dir: Path) -> dict[int, dict]:
    """{iteration: its losses and learning rate}; later lines of the same iteration win."""
    lines = map(json.loads, (output_dir / "metrics.json").read_text().splitlines())
    return {
        m["iteration"]: {k: v for k, v in m.items() if "loss" in k or k == "lr"}
        for m in lines
        if "total_loss" in m
    }


def test_both_launchers_give_the_same_losses(spawn, torchrun):
    losses, others = (logged(folder) for folder, *_ in (spawn, torchrun))
    assert set(losses) == set(range(MAX_ITER))
    assert losses == others


def test_the_order_of_images_hardly_depends_on_the_number_of_processes(both):
    _, *kept = both
    for upright in (False, True):
        batches_of_ranks = zip(*(x["orders"][upright] for x in kept))
        shared = [first + second for first, second in batches_of_ranks]
        alone = many_processes.order_of_images(upright)
        assert all(len(x) == 4 for x in shared + alone)
        if not upright:
            # The same images in each iteration, so a run may go on with another number
            assert [sorted(x) for x in shared] == [sorted(x) for x in alone]
            assert set(Counter(sum(shared, [])).values()) == {4}  # in 11 batches of 4
        # Else images wait for others of their shape, in each process for itself
        for k in range(len(alone)):
            before, others = Counter(sum(alone[:k], [])), Counter(sum(shared[:k], []))
            assert sum((before - others).values()) <= 4


# ---- two GPUs


@pytest.fixture(scope="module")
def two_gpus(options, tmp_path_factory):
    """What two processes on GPUs have kept; on simulated ones where there are not two."""
    folder = tmp_path_factory.mktemp("gpus")
    return kept_by_both(folder, forked.as_torchrun, simulated_nccl.run_rank, folder, options)[1:]


def test_processes_on_gpus_compute_what_those_on_cpus_do(two_gpus, spawn):
    """Nothing that NCCL refuses is on the way, from train_net.py's config to the evaluation."""
    first, second = (x["run"] for x in two_gpus)
    assert different(first["first"], second["first"])  # as they were built
    last = {k: v.cpu() for k, v in first["last"].items()}
    assert not different(last, {k: v.cpu() for k, v in second["last"].items()})
    expected = spawn[1]["run"]
    if "refused" in two_gpus[0]:  # simulated
        assert not different(last, expected["last"])
        # On a CPU, evaluation keeps weights in channels-last order, so its convolutions add in
        # another order than those on a GPU. Scores of float32, with 7 digits, differ in the last
        assert first["results"].keys() == expected["results"].keys()
        for task, values in expected["results"].items():
            assert first["results"][task] == pytest.approx(values, rel=1e-5, nan_ok=True), task
    else:
        for name, value in expected["last"].items():
            assert torch.allclose(last[name], value, rtol=1e-3, atol=1e-4), name
        assert first["results"].keys() == expected["results"].keys()


def test_the_stand_in_refuses_what_nccl_refuses(two_gpus):
    for kept in with_simulation(two_gpus):
        assert len(kept["refused"]) == 9 and all(kept["refused"].values()), kept["refused"]


def test_processes_agree_once_a_step(two_gpus):
    """On the CPU, over gloo; each agreement of its own would wait for the slowest process."""
    for kept in with_simulation(two_gpus):
        assert kept["collectives"]["all_reduce", "gloo"] == MAX_ITER


def with_simulation(kept: list[dict]) -> list[dict]:
    if "refused" not in kept[0]:
        pytest.skip("this machine has two GPUs and the real NCCL")
    return kept


# ---- evaluation


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Options for the demo's model, and functions of the number of its images."""
    folder = tmp_path_factory.mktemp("drawn")
    draw.draw_dataset(folder, num_train=1, num_val=NUM_IMAGES, seed=0)
    everything = json.loads((folder / "val.json").read_text())
    first = everything["images"][0]["id"]
    only_first = {
        **everything,
        "images": everything["images"][:1],
        "annotations": [x for x in everything["annotations"] if x["image_id"] == first],
    }
    (folder / "one.json").write_text(json.dumps(only_first))

    def options_for(num_images: int):
        annotations = folder / ("one.json" if num_images == 1 else "val.json")
        return [
            *["--config-file", SHAPES / "ms_rcnn_shapes.py", "--eval-only"],
            *["--dataset", "shapes_val", annotations, folder / "val"],
            f"train.init_checkpoint={SHAPES / 'ms_rcnn_shapes.safetensors'}",
            "dataloader.test.num_workers=0",
        ]

    return options_for


@pytest.mark.parametrize(
    "launcher, num_images",
    [("torchrun", 9), ("spawn", 1)],  # of one image, a process has none
)
def test_two_processes_evaluate_as_one_does_bit_for_bit(launcher, num_images, drawn, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    job = finished(tmp_path, *FORKED[launcher], *drawn(num_images), f"train.output_dir={two}")
    run(*drawn(num_images), f"train.output_dir={one}")

    assert "World size: 2" in job.output
    assert_same_files(one, two)
    reports = [(x / "report" / "report.json").read_text() for x in (one, two)]
    assert json.loads(reports[0])["overall"]["ap"]["mask_score"] > 10
    assert reports[0] == reports[1]
    tables = [table_of_results(x) for x in (one, two)]
    assert tables[0] == tables[1] and "masks by mask score" in tables[0]


def table_of_results(output_dir: Path) -> str:
    log = (output_dir / "log.txt").read_text()
    return log[log.index("Results on shapes_val:") :].split("[")[0]


# ---- resuming


NUM_ITERATIONS = 40  # enough to be killed in the midst of them
LONG = [f"train.max_iter={NUM_ITERATIONS}"]


def test_a_killed_run_of_two_processes_goes_on_with_one(options, start, tmp_path):
    output_dir = f"train.output_dir={tmp_path}"
    job = start("spawn", *options, output_dir, *LONG)
    job.wait_for(checkpoint(tmp_path, 2))
    os.kill(job.rank(1), signal.SIGKILL)
    assert_ends(job)

    assert "error: " in job.output and "SIGKILL" in job.output
    assert_goes_on_with_one_process(options, tmp_path)


def test_a_run_of_one_process_goes_on_with_two_of_which_one_is_killed(options, start, tmp_path):
    output_dir = f"train.output_dir={tmp_path}"
    run(*options, output_dir, *LONG)
    before = logged(tmp_path)
    interrupt(tmp_path, num_iterations=4)
    job = start("real torchrun", "--resume", *options, output_dir, *LONG)
    job.wait_for(checkpoint(tmp_path, 6))
    os.kill(job.rank(0), signal.SIGKILL)
    assert_ends(job)

    assert "SIGKILL" in job.output
    assert "Starting training from iteration 4\n" in job.output
    after = logged(tmp_path)
    assert {k: after[k] for k in range(4)} == {k: before[k] for k in range(4)}
    assert after[4] != before[4]  # other samples, since each process draws its own
    assert_goes_on_with_one_process(options, tmp_path)


def checkpoint(output_dir: Path, num_iterations: int) -> Path:
    return output_dir / f"model_{num_iterations - 1:07}.pth"


def interrupt(output_dir: Path, num_iterations: int) -> None:
    """Leave what a run has written until then."""
    last = checkpoint(output_dir, num_iterations)
    for path in output_dir.glob("model_*.pth"):
        if path.name > last.name:
            path.unlink()
    (output_dir / "last_checkpoint").write_text(last.name)


def assert_goes_on_with_one_process(options, output_dir: Path):
    before = logged(output_dir)
    last = torch.load(output_dir / (output_dir / "last_checkpoint").read_text(), weights_only=False)
    first = last["iteration"] + 1
    assert 2 <= first < NUM_ITERATIONS
    run("--resume", *options, f"train.output_dir={output_dir}", *LONG)

    after = logged(output_dir)
    assert set(after) == set(range(NUM_ITERATIONS)) and (output_dir / "model_final.pth").exists()
    assert {k: after[k] for k in range(first)} == {k: before[k] for k in range(first)}
    assert all(math.isfinite(x) for losses in after.values() for x in losses.values())
    log = (output_dir / "log.txt").read_text()
    assert "Loading trainer from" in log  # with the optimizer's momentum
    # The recipe's schedule: after warm-up 1, from 2/3 of the run on 0.1, from 8/9 on 0.01
    for k in range(1, NUM_ITERATIONS):
        share = k / NUM_ITERATIONS
        factor = 1 if share < 2 / 3 else 0.1 if share < 8 / 9 else 0.01
        assert after[k]["lr"] == pytest.approx(1e-3 * factor), k


# ---- processes that die


def test_a_process_that_fails_in_the_last_iteration_ends_the_others(options, start, tmp_path):
    """Those that are left must not evaluate: they would wait for it."""
    model = "model._target_=tests.helpers.many_processes.FailingRCNN"
    output_dir = f"train.output_dir={tmp_path}"
    job = start("spawn", *options, model, output_dir)
    job.wait_for(checkpoint(tmp_path, 2))
    assert_ends(job)
    assert "the second process has failed" in job.output
    assert not (tmp_path / "model_final.pth").exists()


@pytest.mark.parametrize("launcher", ["spawn", "torchrun"])
def test_a_process_that_fails_while_the_other_waits_for_it_ends_both(
    launcher, options, start, tmp_path
):
    model = "model._target_=tests.helpers.many_processes.WaitingRCNN"
    job = start(launcher, *options, model, f"train.output_dir={tmp_path}")
    assert job.wait() == (2 if launcher == "spawn" else 1)  # torchrun has an exit code of its own
    assert job.output.count("error: The predictions are not finite.") == 1
    assert "Traceback" not in job.output
    assert "Exception during training" not in job.output


def test_a_machine_that_is_gone_ends_the_other(options, start, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{s.getsockname()[1]}"
    machines = [
        start(
            *["own", "--num-gpus", 1, "--num-machines", 2, "--machine-rank", k],
            *["--dist-url", url, *options, f"train.output_dir={tmp_path}", "train.max_iter=9999"],
        )
        for k in (0, 1)
    ]
    machines[0].wait_for(checkpoint(tmp_path, 2))
    machines[1].end()
    assert_ends(machines[0])
    assert "by peer" in machines[0].output


# ---- processes that are told to stop, and what they find


@pytest.mark.parametrize("launcher", ["spawn", "real torchrun"])
def test_all_processes_leave_together_when_their_machine_is_wanted_back(
    launcher, options, start, tmp_path
):
    job = start(launcher, *options, *stoppable(tmp_path))
    wait_for_iteration(job, 3)
    os.kill(job.pid, signal.SIGTERM)  # torchrun has an exit code of its own
    assert job.wait() == (128 + signal.SIGTERM if launcher == "spawn" else 1)
    assert_stopped(job, "SIGTERM", tmp_path)


def test_a_keyboard_interrupt_reaches_all_processes_and_their_workers(options, start, tmp_path):
    workers = "dataloader.train.num_workers=2"
    job = start("spawn", *options, *stoppable(tmp_path), workers)
    wait_for_iteration(job, 3)
    os.killpg(job.pid, signal.SIGINT)
    assert job.wait() == 128 + signal.SIGINT
    assert_stopped(job, "SIGINT|SIGTERM", tmp_path)


def stoppable(output_dir: Path) -> list[str]:
    return [
        f"train.output_dir={output_dir}",
        "train.max_iter=9999",
        "train.checkpointer.period=999",
    ]


def wait_for_iteration(job: Job, iteration: int) -> None:
    end = time.monotonic() + SECONDS
    while f"iter: {iteration} " not in job.output:
        assert job.exit_code is None and time.monotonic() < end, job.output[-4000:]
        time.sleep(0.05)


def assert_stopped(job: Job, name: str, output_dir: Path) -> None:
    text = rf"(?:{name}): iteration (\d+) is saved"
    (iteration,) = re.findall(text, job.output)
    assert (output_dir / "last_checkpoint").read_text() == f"model_{int(iteration):07}.pth"
    time.sleep(0.5)
    assert not job.pids()


def test_a_step_of_two_processes_that_is_not_finite_names_its_images(options, start, tmp_path):
    too_high = ["optimizer.lr=1e12", "lr_multiplier.warmup_factor=1"]
    job = start("spawn", *options, *stoppable(tmp_path), *too_high)
    assert job.wait() == 2
    assert job.output.count("error: Iteration ") == 1 and "Traceback" not in job.output
    (images,) = re.findall(r"\(images (.*?)\)", job.output)
    ids = set(images.split(", "))
    assert ids <= set(map(str, range(1, NUM_IMAGES + 1)))
    # Those of the processes whose own loss is not finite; of both if only gradients are not
    assert len(ids) == 2 if "the gradient of" in job.output else ids


def test_an_image_that_one_process_cannot_read_stops_both(options, start, tmp_path):
    folder = tmp_path / "spoilt"
    folder.mkdir()
    others = many_processes.write_dataset_and_config(folder)
    (folder / "3.png").write_text("not an image")
    limits = ["train.max_bad_images=0", "train.check_images=False"]
    job = start("spawn", *others, *stoppable(tmp_path / "out"), *limits)
    assert job.wait() == 2
    assert job.output.count("error: Iteration ") == 1 and "Traceback" not in job.output
    assert "3.png'" in job.output
