"""The figures of the log line."""

import torch
from torch import nn
from transformers import ViTConfig

from hf_masked import MAEConfig, MAEForPreTraining
from hf_masked.training.throughput import ThroughputMeter, forward_flops, matmul_rate


def test_operations_are_those_of_the_paper_sizes():
    """ViT-B/16 at 224 px: MAE's forward is 8.8 GFLOP in the encoder and 10.7 in the decoder."""
    model = MAEForPreTraining(MAEConfig())
    flops = forward_flops(model, {"pixel_values": torch.zeros(1, 3, 224, 224)})
    assert abs(flops - 19.5e9) < 0.3e9


def test_attention_is_counted():
    class Attend(nn.Module):
        def forward(self, query):
            return nn.functional.scaled_dot_product_attention(query, query, query)

    query = torch.zeros(2, 3, 10, 8)
    assert forward_flops(Attend(), {"query": query}) == 2 * 2 * (2 * 3 * 10 * 10 * 8)


def test_counting_leaves_model_and_random_state_alone():
    model = MAEForPreTraining(MAEConfig(backbone_config=ViTConfig(num_hidden_layers=1))).train()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    forward_flops(model, {"pixel_values": torch.zeros(1, 3, 224, 224)})
    assert torch.equal(torch.rand(3), expected) and model.training


def test_report_counts_since_the_last_one(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("hf_masked.training.throughput.time.perf_counter", lambda: now[0])
    meter = ThroughputMeter(torch.device("cpu"), torch.float32)
    meter.flops_per_sample, meter.peak_rate = 5.0, 1000.0
    meter.samples, meter.waited, now[0] = 100, 0.5, 2.0
    assert meter.report() == {"images/s": 50.0, "data_wait_%": 25.0, "matmul_rate_%": 25.0}
    now[0] = 4.0
    assert meter.report()["images/s"] == 0.0


def test_a_pause_counts_for_nothing(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("hf_masked.training.throughput.time.perf_counter", lambda: now[0])
    meter = ThroughputMeter(torch.device("cpu"), torch.float32)
    meter.samples, now[0] = 100, 1.0
    with meter.paused():
        now[0] = 9.0
    now[0] = 10.0
    assert meter.report()["images/s"] == 50.0


def test_share_of_the_rate_is_that_of_all_processes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("hf_masked.training.throughput.time.perf_counter", lambda: now[0])
    meter = ThroughputMeter(torch.device("cpu"), torch.float32, processes=2)
    meter.flops_per_sample, meter.peak_rate = 5.0, 1000.0
    meter.samples, now[0] = 100, 1.0
    assert meter.report()["matmul_rate_%"] == 25.0


def test_matmul_rate_is_a_rate():
    assert 1e8 < matmul_rate(torch.device("cpu"), torch.float32, seconds=0.05) < 1e15
