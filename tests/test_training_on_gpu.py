"""Training on a GPU, a real or the simulated one: by train_net.py, and how often it waits."""

import contextlib
from collections import Counter

import pytest
import torch

from detectron2.config import LazyConfig, instantiate
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils.events import EventStorage

from msrcnn_d2 import MaskScoringPredictor
from msrcnn_d2.engine.trainer import FiniteAMPTrainer, FiniteTrainer
from msrcnn_d2.utils.distributed import StepAgreement
from tests.helpers import many_processes
from tests.helpers.simulated_cuda import SimulatedCuda
from tests.helpers.toy import tiny_mask_rcnn, tiny_mask_scoring_rcnn, toy_inputs
from tests.helpers.toy_training import lazy_config, run, write_dataset

REAL = torch.cuda.is_available()
no_waits = pytest.mark.skipif(REAL, reason="a real GPU does not say when it is waited for")


@pytest.fixture
def gpu():
    device = SimulatedCuda()
    with contextlib.nullcontext() if REAL else device.running():
        yield device


def test_a_resumed_training_with_mixed_precision_is_the_uninterrupted_one(
    gpu, tmp_path, leave_no_traces
):
    cfg = lazy_config()
    cfg.train.device, cfg.train.amp.enabled = "cuda", True
    cfg.train.max_iter, cfg.train.checkpointer.period = 3, 2
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    (tmp_path / "data").mkdir()
    options = ["--config-file", tmp_path / "config.yaml", *write_dataset(tmp_path / "data")]
    output = tmp_path / "output"
    run(*options, f"train.output_dir={output}")
    whole, half = load(output / "model_final.pth"), load(output / "model_0000001.pth")
    for name in ("model_final.pth", "model_0000002.pth"):
        (output / name).unlink(missing_ok=True)
    (output / "last_checkpoint").write_text("model_0000001.pth")
    run(*options, "--resume", f"train.output_dir={output}")
    resumed = load(output / "model_final.pth")

    assert any(not torch.equal(v, whole["model"][k]) for k, v in half["model"].items())
    assert_same(whole["model"], resumed["model"])
    whole, resumed = whole["trainer"], resumed["trainer"]
    assert whole["iteration"] == resumed["iteration"] == 2
    assert whole["grad_scaler"] == resumed["grad_scaler"] and whole["grad_scaler"]["scale"] > 1
    momenta = [x["optimizer"]["state"] for x in (whole, resumed)]
    assert any(x["momentum_buffer"].any() for x in momenta[0].values())
    assert_same(*({k: v["momentum_buffer"] for k, v in x.items()} for x in momenta))


def test_parts_of_a_batch_with_mixed_precision_add_up_to_the_whole(gpu):
    """Their gradients are scaled alike; all samples are taken, so that no number is random."""

    def gradients(num_parts):
        cfg = many_processes.tiny_model_config()
        cfg.proposal_generator.batch_size_per_image = 4096
        cfg.roi_heads.batch_size_per_image = 128
        cfg.roi_heads.proposal_matcher.thresholds = [0.99]
        torch.manual_seed(0)
        model = instantiate(cfg).to("cuda")
        trainer = FiniteAMPTrainer(
            *(model, [toy_inputs()], torch.optim.SGD(model.parameters(), lr=1e-3)),
            max_nonfinite_steps=0,
            max_skipped_steps=1,
            agreement=StepAgreement(),
            image_ids=lambda: [],
            accumulation_steps=num_parts,
        )
        with EventStorage():
            trainer.run_step()
        return {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}

    whole, parts = gradients(1), gradients(2)
    assert whole.keys() == parts.keys()
    for name, expected in whole.items():
        error = (parts[name] - expected).norm() / expected.norm()
        assert error < 0.05, name  # of float16


def load(path):
    return torch.load(path, map_location="cpu", weights_only=False)


def assert_same(expected, got):
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        if REAL:
            torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4, msg=str(name))
        else:
            assert torch.equal(got[name], value), name


# ---- how often the host waits for the device


def build(cfg):
    torch.manual_seed(0)
    return instantiate(cfg.model).to("cuda")


def waits_of(gpu, function, *args):
    gpu.events.clear()
    function(*args)
    return Counter((x.kind, x.place) for x in gpu.events)


def waits_of_a_step(gpu, cfg, trainer_type, mask_format, **kwargs):
    model = build(cfg)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    trainer = trainer_type(model, [toy_inputs(mask_format)] * 2, optimizer, **kwargs)
    with EventStorage():
        trainer.run_step()  # what the first step sets up does not count
        torch.manual_seed(1)
        return waits_of(gpu, trainer.run_step)


@no_waits
@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
@pytest.mark.parametrize("amp", [False, True], ids=["full", "mixed"])
def test_a_step_waits_at_most_twice_more_than_detectron2(gpu, mask_format, amp):
    """The whole step: with the trainer, which also looks for NaN, and with the optimizer."""
    theirs, ours = (AMPTrainer, FiniteAMPTrainer) if amp else (SimpleTrainer, FiniteTrainer)
    finite = {"max_nonfinite_steps": 0, "agreement": StepAgreement()}
    finite["image_ids"] = lambda: []
    if amp:
        finite["max_skipped_steps"] = 1
    before = waits_of_a_step(gpu, tiny_mask_rcnn(), theirs, mask_format)
    after = waits_of_a_step(gpu, tiny_mask_scoring_rcnn(), ours, mask_format, **finite)
    assert after.total() <= before.total() + 2, after - before
    # Our trainer waits less often than Detectron2's, so the model is bounded alone: once for what
    # is logged, and with polygons four times an image, as they are cropped on the CPU
    own = sum(n for (_, place), n in after.items() if place.startswith("msrcnn_d2/modeling/"))
    assert own <= 1 + (mask_format == "polygon") * 2 * 4, after


@no_waits
def test_the_predictor_waits_at_most_once_more_than_its_model(gpu, tmp_path):
    cfg = tiny_mask_scoring_rcnn()
    torch.save({"model": build(cfg).state_dict()}, tmp_path / "model.pth")
    cfg.train = {"init_checkpoint": str(tmp_path / "model.pth"), "device": "cuda"}
    predictor = MaskScoringPredictor(cfg)
    image = torch.randint(256, (64, 96, 3), dtype=torch.uint8).numpy()
    whole = waits_of(gpu, predictor, [image])
    with torch.no_grad():
        alone = waits_of(gpu, predictor.model, [predictor._model_input(image)])
    assert whole.total() <= alone.total() + 1, whole - alone
