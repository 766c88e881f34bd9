"""
Trainings that are killed, stopped, or run out of disk, and continue.

One of them is killed at random moments. KILLS says how often, and KILLS_SEED is the seed of
the moments. `make nightly` kills more often, at other moments each time; a failure prints the seed.
"""

import errno
import io
import multiprocessing
import os
import random
import re
import signal
import time
import zipfile
from pathlib import Path

import pytest
import torch

from msrcnn_d2.checkpoint.reading import check_whole
from msrcnn_d2.engine.hooks import StopOnSignal
from msrcnn_d2.utils.distributed import StepAgreement
from tests.helpers.killable import Training
from tests.helpers.toy_training import write_dataset, write_lazy_config

NUM_KILLS = int(os.environ.get("KILLS", 5))
SEED = os.environ.get("KILLS_SEED", "1")
MAX_ITER = 4 * NUM_KILLS


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """Options of a training that saves after each second iteration."""
    folder = tmp_path_factory.mktemp("base")
    config, dataset = write_lazy_config(folder / "lazy.yaml"), write_dataset(folder)
    options = [f"train.max_iter={MAX_ITER}", "train.checkpointer.period=2", "train.eval_period=0"]
    return ["--resume", "--config-file", config, *dataset, *options]


@pytest.fixture(scope="module")
def base(long):
    """The same in ten iterations, which makes another learning rate of each."""
    return [*long, "train.max_iter=10"]


def losses_of(options, folder):
    """The losses of each iteration of a training that nobody disturbs."""
    training = Training([*options, f"train.output_dir={folder}/output"], folder)
    assert training.exit_code() == 0, training.printed()[-3000:]
    return dict(training.losses())


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    losses = losses_of(base, tmp_path_factory.mktemp("whole"))
    assert list(losses) == list(range(10))
    return losses


def tagged(output: Path) -> Path | None:
    """The file that "last_checkpoint" names; it has to be complete."""
    tag = output / "last_checkpoint"
    if not tag.exists():
        return None
    checkpoint = output / tag.read_text()
    check_whole(str(checkpoint))
    return checkpoint


def iteration_of(checkpoint: Path | None) -> int:
    return torch.load(checkpoint)["iteration"] if checkpoint else -1


def test_a_training_that_is_killed_many_times_has_the_losses_of_one_that_is_not(long, tmp_path):
    (tmp_path / "whole").mkdir()
    whole = losses_of(long, tmp_path / "whole")
    seed = random.randrange(10**6) if SEED == "random" else int(SEED)
    print(f"to repeat this: KILLS={NUM_KILLS} KILLS_SEED={seed}")
    moments = random.Random(seed)
    kills, first, output = 0, MAX_ITER, tmp_path
    while kills < NUM_KILLS or first < MAX_ITER:
        if first == MAX_ITER:  # the first one, or finished before enough kills
            first, output = 0, tmp_path / f"from_kill_{kills}"
        training = Training([*long, f"train.output_dir={output}"], tmp_path)
        if kills < NUM_KILLS:
            iterations = moments.randint(0, 4)
            training.wait_for(lambda t, n=iterations: len(t.losses()) >= n)
            # Somewhere in the start or, after iterations, in the next one or in a checkpoint
            training.process.join(moments.uniform(0, 0.1 if iterations else 1.5))
            training.process.kill()
        assert training.exit_code() in (0, -signal.SIGKILL), training.printed()[-3000:]
        kills += training.exit_code() == -signal.SIGKILL
        losses = training.losses()
        if losses:  # killed before there was a last_checkpoint, it may know better
            assert first <= losses[0][0] <= first + (first == 0) * 2
            assert [k for k, _ in losses] == list(range(losses[0][0], losses[-1][0] + 1))
        assert dict(losses) == {k: whole[k] for k, _ in losses}
        first = iteration_of(tagged(output)) + 1
    assert tagged(output).name == "model_final.pth"
    assert not list(output.glob("*.incomplete"))


AVERAGED = ["train.model_ema.enabled=True", "train.model_ema.decay=0.5"]


def test_a_signal_in_the_evaluation_of_averages_saves_the_weights(base, tmp_path):
    options = [*base, "train.checkpointer.period=3"]
    losses_of(options, tmp_path)
    options = [*base, *AVERAGED, "train.checkpointer.period=1000", "train.eval_period=3"]
    options += [f"train.output_dir={tmp_path}/stopped"]
    stopped = Training(options, tmp_path, prepare=("evaluate_slowly", 20))
    stopped.wait_for(lambda t: "Start inference" in t.printed())
    os.kill(stopped.process.pid, signal.SIGTERM)
    assert stopped.exit_code(timeout=90) == 128 + signal.SIGTERM
    expected = torch.load(tmp_path / "output" / "model_0000002.pth")["model"]
    found = torch.load(tmp_path / "stopped" / "model_0000002.pth")
    assert all(torch.equal(value, expected[name]) for name, value in found["model"].items())
    assert any((value != found["ema_state"][name]).any() for name, value in expected.items())


@pytest.mark.parametrize(
    "moment, count, expected",
    # The second checkpoint, of iteration 3; each has a file of its own and one for its name
    [("half", 2, 1), ("synced", 5, 1), ("named", 3, 1), ("renamed", 3, 1), ("named", 4, 1)]
    + [("renamed", 4, 3)],
)
def test_a_training_killed_in_a_checkpoint_goes_on_from_the_last_complete_one(
    moment, count, expected, base, whole, tmp_path
):
    output = tmp_path / "output"
    base = [*base, f"train.output_dir={output}"]
    killed = Training(base, tmp_path, prepare=("die_while_saving", moment, count))
    assert killed.exit_code() == -signal.SIGKILL
    assert iteration_of(tagged(output)) == expected
    resumed = Training(base, tmp_path)
    assert resumed.exit_code() == 0, resumed.printed()[-3000:]
    assert [k for k, _ in resumed.losses()] == list(range(expected + 1, 10))
    assert dict(resumed.losses()) == {k: whole[k] for k in range(expected + 1, 10)}
    assert not list(output.glob("*.incomplete"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_to_stop_saves_the_step(number, base, whole, tmp_path):
    output = tmp_path / "output"
    base = [*base, f"train.output_dir={output}", "train.checkpointer.period=1000"]
    stopped = Training(base, tmp_path)
    stopped.wait_for(lambda t: len(t.losses()) >= 5)
    os.kill(stopped.process.pid, number)
    assert stopped.exit_code() == 128 + number
    last = stopped.losses()[-1][0]
    assert iteration_of(tagged(output)) == last
    printed = stopped.printed()
    assert f"{number.name}: iteration {last} is saved" in printed and "--resume" in printed
    assert "Traceback" not in printed
    resumed = Training(base, tmp_path)
    assert resumed.exit_code() == 0
    assert dict(resumed.losses()) == {k: whole[k] for k in range(last + 1, 10)}


def test_a_signal_to_stop_does_not_wait_for_an_evaluation(base, tmp_path):
    output = tmp_path / "output"
    options = ["train.eval_period=3", "train.checkpointer.period=1000"]
    stopped = Training(
        [*base, f"train.output_dir={output}", *options], tmp_path, prepare=("evaluate_slowly", 20)
    )
    stopped.wait_for(lambda t: "Start inference" in t.printed())
    os.kill(stopped.process.pid, signal.SIGTERM)
    assert stopped.exit_code(timeout=90) == 128 + signal.SIGTERM
    assert iteration_of(tagged(output)) == 2
    assert "Traceback" not in stopped.printed()


def test_only_a_second_keyboard_interrupt_does_not_wait_for_the_step():
    stop = StopOnSignal(lambda: 0, StepAgreement())
    before = signal.getsignal(signal.SIGTERM)
    with stop.listening():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # what launchers do
        signal.raise_signal(signal.SIGINT)  # may be the same Ctrl-C, by way of one of them
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_processes_that_a_dataset_forks_can_be_ended():
    # multiprocessing.Pool, with which Detectron2 reads Cityscapes, waits for this
    stop = StopOnSignal(lambda: 0, StepAgreement())
    context = multiprocessing.get_context("fork")
    is_there = context.Event()  # a process that has just been forked forgets signals
    with stop.listening():
        forked = context.Process(target=lambda: (is_there.set(), time.sleep(60)))
        forked.start()
        assert is_there.wait(60)
        forked.terminate()
        forked.join(10)
        ended = forked.exitcode
        forked.kill()
    assert ended == -signal.SIGTERM


def test_a_finished_training_that_is_stopped_in_its_evaluation_stays_finished(base, tmp_path):
    output = tmp_path / "output"
    base = [*base, f"train.output_dir={output}", "train.max_iter=2"]
    assert Training(base, tmp_path).exit_code() == 0
    before = sorted(output.glob("*.pth"))
    stopped = Training(base, tmp_path, prepare=("evaluate_slowly", 20))
    stopped.wait_for(lambda t: "Start inference" in t.printed())
    os.kill(stopped.process.pid, signal.SIGTERM)
    assert stopped.exit_code() == 128 + signal.SIGTERM
    assert sorted(output.glob("*.pth")) == before
    assert tagged(output).name == "model_final.pth"
    assert torch.load(tagged(output))["trainer"]["iteration"] == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: content[:1000] + bytes(1000) + content[2000:],
        lambda content: _flipped(content),
    ],
    ids=["cut off", "empty", "zeros", "one bit"],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage, base, whole, tmp_path):
    output = tmp_path / "output"
    base = [*base, f"train.output_dir={output}"]
    assert Training(base, tmp_path).exit_code() == 0
    for name in ("model_final.pth", "model_0000009.pth", "model_0000007.pth"):
        (output / name).write_bytes(damage((output / name).read_bytes()))
    resumed = Training(base, tmp_path)
    assert resumed.exit_code() == 0
    assert dict(resumed.losses()) == {k: whole[k] for k in range(6, 10)}
    for name in ("model_final.pth'", "model_0000009.pth'", "model_0000007.pth'"):
        assert re.search(rf"WARNING.*{re.escape(name)}", resumed.printed()), name


def _flipped(content: bytes) -> bytes:
    """A checkpoint with one bit of one tensor another way, which PyTorch would load."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    position = largest.header_offset + 200 + largest.file_size // 2
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def test_checkpoints_that_are_all_damaged_are_not_a_new_start(base, tmp_path):
    output = tmp_path / "output"
    base = [*base, f"train.output_dir={output}", "train.max_iter=2"]
    assert Training(base, tmp_path).exit_code() == 0
    for checkpoint in output.glob("*.pth"):
        checkpoint.write_bytes(b"PK\x03\x04 and no more")
    resumed = Training(base, tmp_path)
    assert resumed.exit_code() == 2
    printed = resumed.printed()
    assert printed.count("error: ") == 1 and "Traceback" not in printed


def test_a_full_disk_is_one_error_and_harms_no_older_checkpoint(base, whole, tmp_path):
    output = tmp_path / "output"
    base = [*base, f"train.output_dir={output}"]
    # The third checkpoint; of each, the tag is written, too
    full = Training(base, tmp_path, prepare=("run_out_of_disk", 5, 2**20))
    assert full.exit_code() == 2
    printed = full.printed()
    assert printed.count(os.strerror(errno.EFBIG)) == 1 and "Traceback" not in printed
    assert printed.count("error: ") == 1 and "--resume" in printed
    kept = sorted(output.glob("*.pth"))
    assert [iteration_of(checkpoint) for checkpoint in kept] == [1, 3]
    assert tagged(output) == kept[-1]
    assert not list(output.glob("*.incomplete"))

    resumed = Training(base, tmp_path)
    assert resumed.exit_code() == 0
    assert dict(resumed.losses()) == {k: whole[k] for k in range(4, 10)}


def test_old_checkpoints_go_when_new_ones_are_complete_also_after_a_resumption(base, tmp_path):
    output = tmp_path / "output"
    base = [*base, f"train.output_dir={output}", "train.checkpointer.max_to_keep=2"]
    assert Training([*base, "train.max_iter=6"], tmp_path).exit_code() == 0

    def numbered():
        return [p.name for p in sorted(output.glob("model_0*.pth"))]

    assert numbered() == ["model_0000003.pth", "model_0000005.pth"]
    # None of the training: neither one to go on from, nor one to delete
    (output / "backbone_0000001.pth").write_bytes(b"somebody's own")
    (output / "model_1.pth").write_bytes(b"somebody's own")
    # Killed when the third is half written: both are still there
    killed = Training([*base, "train.max_iter=8"], tmp_path, ("die_while_saving", "half", 1))
    assert killed.exit_code() == -signal.SIGKILL
    assert numbered() == ["model_0000003.pth", "model_0000005.pth"]
    assert Training([*base, "train.max_iter=8"], tmp_path).exit_code() == 0
    assert numbered() == ["model_0000005.pth", "model_0000007.pth"]
    # Saved at other times, there are more than should be kept
    (output / "model_0000006.pth").write_bytes((output / "model_0000007.pth").read_bytes())
    assert Training([*base, "train.max_iter=10"], tmp_path).exit_code() == 0
    assert numbered() == ["model_0000007.pth", "model_0000009.pth"]
    assert (output / "backbone_0000001.pth").exists() and (output / "model_1.pth").exists()
