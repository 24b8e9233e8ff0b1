import pytest
import torch
from fpo.pipeline.report import rates
from fpo.pipeline.report.rates import rates_of


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA GeForce RTX 4090", 165e12, 82.6e12),
    ],
)
def test_known_gpus_have_the_rates_of_their_data_sheets(monkeypatch, name, bf16, fp32):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = rates_of("cuda:0", jobs=2)
    assert (found.of("bf16"), found.of("fp32")) == (bf16, fp32)
    assert name in found.name and "data sheet" in found.name and found.cuda
    assert (found.training, found.inference) == (0.45, 0.55)


def test_an_unknown_gpu_is_measured_and_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Brand New")
    monkeypatch.setattr(rates, "measured_rate", lambda device, dtype: 7e12 if dtype is torch.bfloat16 else 3e12)
    found = rates_of("cuda:0", jobs=1)
    assert (found.bf16, found.fp32) == (7e12, 3e12)
    assert "Brand New" in found.name and "measured" in found.name


def test_a_cpu_is_measured_with_the_share_of_threads_that_a_job_has(monkeypatch):
    seen = []
    monkeypatch.setattr(rates, "measured_rate", lambda *_: seen.append(torch.get_num_threads()) or 1e9)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: threads.__setitem__(0, number))
    threads = [8]
    assert "2 of 8 threads: 1 GFLOP/s" in rates_of("cpu", jobs=4).name
    assert (seen, threads) == ([2], [8])


def test_a_measured_rate_is_one_that_a_processor_could_have():
    assert 1e8 < rates_of("cpu", jobs=1).fp32 < 1e14
